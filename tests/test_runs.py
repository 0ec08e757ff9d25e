"""Whole runs of the scripts: resuming, what they write, and how they end early. On pointmaze, which is fast."""

import contextlib
import csv
import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import types
import urllib.error
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
import qam_baseline
import trqam_offline
import trqam_online

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import kill_resume

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"trqam_offline": trqam_offline, "trqam_online": trqam_online, "qam_baseline": qam_baseline}
STRENGTH = {script: "--inverse-temperature" if "qam_b" in script else "--kl-budget" for script in SCRIPTS}  # above 0
ENV = "pointmaze-medium-navigate-singletask-task1-v0"
ANTMAZE = "antmaze-large-navigate-singletask-task1-v0"
TINY = (
    f"--env-id {ENV} --hidden-dims 16 16 --num-critics 2 --flow-steps 3 --batch-size 8 --chunk-length 4 "
    "--bc-steps 12 --offline-steps 18 --eval-interval 9 --eval-episodes 2 --log-interval 3 --checkpoint-interval 5 "
    "--num-threads 1 --device cpu"
).split()
TINY_FOR = {script: TINY for script in SCRIPTS}
TINY_FOR["trqam_online"] = [*TINY, *"--online-steps 9 --learning-starts 2".split()]


DRAW = common.Run.draw


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """And without pictures, which take most of a tiny run's time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.Run, "draw", lambda run: None)


def start(script, monkeypatch, *words):
    """`python script.py words` in this process; returns what it said when it stopped early, else None."""
    module = SCRIPTS[script]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
    try:
        common.run_script(module.main, module.Args, module.settings, script, getattr(module, "STARTS_FROM", None))
    except SystemExit as stop:
        return stop.code


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def differences(first, second):
    """Names of what differs between two finished runs; their folders, and the clock's columns, aside."""
    ours, theirs = ({**torch.load(run / "checkpoint.pt", weights_only=True), "args": None} for run in (first, second))
    tables = [
        name
        for name in ("train.csv", "eval.csv")
        if kill_resume.rows_of(first / name) != kill_resume.rows_of(second / name)
    ]
    return kill_resume.unequal("checkpoint.pt", ours, theirs) + tables


class Killed(BaseException):
    pass


def stop_and_resume(script, monkeypatch, stop_after, *flags):
    """A run that is killed after so many steps, and resumed."""
    tick, count = common.Run.tick, iter(range(1, 1000))

    def stopping_tick(run, *updates):
        tick(run, *updates)
        if next(count) == stop_after:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, "tick", stopping_tick)
        start(script, patch, *flags)
    assert start(script, monkeypatch, *flags, "--resume") is None


def test_a_stopped_and_resumed_run_equals_an_untouched_one(dataset, tmp_path, monkeypatch):
    script, flags = "trqam_offline", [*TINY, "--dataset-path", dataset]
    assert start(script, monkeypatch, *flags, "--run-dir", "whole") is None
    for stop_after in (3, 12, 26):  # before any checkpoint, at the change of stage, in fine-tuning
        run_dir = tmp_path / f"stopped-{stop_after}"
        stop_and_resume(script, monkeypatch, stop_after, *flags, "--run-dir", run_dir)
        assert differences(tmp_path / "whole", run_dir) == []
    assert start(script, monkeypatch, *flags, "--run-dir", "other", "--seed", 1) is None
    assert len(differences(tmp_path / "whole", tmp_path / "other")) > 10  # the comparison does see differences


ONLINE = "--online-steps 31 --learning-starts 10 --balanced-sampling --best-of-n 2 --eval-interval 20".split()
ONLINE_FOR = {"trqam_online": ["--kl-budget-online", "0.3"], "qam_baseline": ["--edit-scale", "0.3"]}


@pytest.mark.parametrize("script", ONLINE_FOR)
def test_an_online_stage_resumes_in_the_middle_of_a_chunk_and_an_episode(script, dataset, tmp_path, monkeypatch):
    short_episodes(monkeypatch)
    flags = [*TINY, "--dataset-path", dataset, *ONLINE, *ONLINE_FOR[script]]
    assert start(script, monkeypatch, *flags, "--run-dir", "whole") is None
    for stop_after in (12, 39, 57):  # at the change of stage; online, when only collecting; online, when updating too
        run_dir = tmp_path / f"stopped-{stop_after}"
        stop_and_resume(script, monkeypatch, stop_after, *flags, "--run-dir", run_dir)
        assert differences(tmp_path / "whole", run_dir) == []
        assert Path("whole/replay.bin").read_bytes() == (run_dir / "replay.bin").read_bytes()
    state = torch.load("whole/checkpoint.pt", weights_only=True)
    assert state["replay"]["size"] == 2031 and state["replay"]["episodes"] == 2 + 4  # 31 steps of 7-step episodes
    assert Path("whole/replay.bin").stat().st_size == 4 * (31 + 4) * (2 + 2 + 1 + 1) and state["replay"]["rows"] == 35
    assert state["environment"]["episode"] == 4
    evaluated = [(row["stage"], int(row["step"])) for row in rows(Path("whole/eval.csv"))]
    assert evaluated == [("bc", 12), ("offline", 18), ("online", 20), ("online", 31)]
    train = {int(row["step"]): row for row in rows(Path("whole/train.csv")) if row["stage"] == "online"}
    assert train[9]["losses/critic_loss"] == "" and float(train[12]["losses/critic_loss"]) > 0
    assert float(train[9]["charts/online_length"]) == 7
    speeds = [[float(train[step][f"charts/{name}_SPS"]) for name in ("environment", "update")] for step in (9, 12)]
    assert speeds[0][0] > 0 and speeds[0][1] == 0 and min(speeds[1]) > 0


def test_a_run_on_shards_that_take_turns_resumes(dataset, tmp_path, monkeypatch):
    arrays = dict(np.load(dataset))
    (tmp_path / "shards").mkdir()
    for number in range(2):
        np.savez(tmp_path / f"shards/{number}.npz", **{key: array[number::2] for key, array in arrays.items()})
    monkeypatch.setattr(common.RotatingShards, "BATCHES_PER_FILE", 4)
    flags = [*TINY, "--dataset-path", "shards", "--max-data-gb", 1e-6]
    assert start("trqam_offline", monkeypatch, *flags, "--run-dir", "whole") is None
    stop_and_resume("trqam_offline", monkeypatch, 26, *flags, "--run-dir", "stopped")  # its checkpoint is of step 25
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []
    assert json.loads(Path("whole/config.json").read_text())["dataset"]["rotating"]
    online = ["--online-steps", 9, "--learning-starts", 4]
    assert "--max-data-gb" in start("trqam_online", monkeypatch, *flags, *online, "--run-dir", "online")
    assert not Path("online").exists()


def test_going_online_later_is_the_same_as_at_once(dataset, tmp_path, monkeypatch):
    flags = [*TINY, "--dataset-path", dataset, *ONLINE, *ONLINE_FOR["qam_baseline"]]
    assert start("qam_baseline", monkeypatch, *flags, "--run-dir", "whole") is None
    assert start("qam_baseline", monkeypatch, *flags, "--online-steps", 0, "--run-dir", "later") is None
    fewer = ["--offline-steps", 9, "--online-steps", 31]
    said = start("qam_baseline", monkeypatch, "--run-dir", "later", "--resume", *fewer)
    assert "has done 18 offline steps" in said
    assert start("qam_baseline", monkeypatch, "--run-dir", "later", "--resume", "--online-steps", 31) is None
    assert differences(tmp_path / "whole", tmp_path / "later") == []
    config = Path("later/config.json").read_bytes()
    for steps in (["--online-steps", 11], ["--offline-steps", 99], ["--offline-steps", 17]):
        said = start("qam_baseline", monkeypatch, "--run-dir", "later", "--resume", *steps)
        assert "has done 18 offline and 31 online steps" in said and "\n" not in said
    assert Path("later/config.json").read_bytes() == config


def test_trqam_goes_online_from_an_offline_checkpoint_as_in_one_run(dataset, tmp_path, monkeypatch, capsys):
    """Weights, lambda, its average, optimiser, targets and tables carry over: all ends as if one command did it."""
    flags = [*TINY, "--dataset-path", dataset, "--kl-budget", 0.8]
    online = [*ONLINE[:4], "--kl-budget-online", 0.3]
    assert start("trqam_online", monkeypatch, *flags, *online, "--run-dir", "whole") is None
    assert start("trqam_offline", monkeypatch, *flags, "--run-dir", "offline") is None
    go = ["--checkpoint", "offline/checkpoint.pt", "--run-dir", "online", "--num-threads", 1]
    stop_and_resume("trqam_online", monkeypatch, 3, *go, *online)  # of its 31 steps: before its own first checkpoint
    assert differences(tmp_path / "whole", tmp_path / "online") == []
    config = json.loads(Path("online/config.json").read_text())
    assert config["args"]["kl_budget"] == 0.8 and config["args"]["env_id"] == ENV and config["args"]["bc_steps"] == 12
    sha256 = common.file_hash(Path("offline/checkpoint.pt"))
    assert config["started_from"] == dict(checkpoint="offline/checkpoint.pt", step=30, sha256=sha256)

    offline, whole = (torch.load(f"{run}/checkpoint.pt", weights_only=True) for run in ("offline", "whole"))
    assert 0 < offline["agent"]["lam"] < 1 and whole["agent"]["lam"] != offline["agent"]["lam"]
    train = rows(Path("online/train.csv"))
    budgets = {
        stage: {row["trust_region/kl_budget"] for row in train if row["stage"] == stage}
        for stage in ("offline", "online")
    }
    assert budgets == {"offline": {"0.8"}, "online": {"", "0.3"}}  # none while only collecting

    # Its start must not change before it has a checkpoint of its own.
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "begin", lambda *_: sys.exit("stopped"))
        assert start("trqam_online", patch, *go[:2], "--run-dir", "changed", *online) == "stopped"
    other = Path("offline/checkpoint.pt").read_bytes()
    torch.save({**offline, "seconds": 0.0}, "offline/checkpoint.pt")
    said = start("trqam_online", monkeypatch, "--run-dir", "changed", "--resume")
    assert "offline/checkpoint.pt has changed since the run began from it" in said
    Path("offline/checkpoint.pt").write_bytes(other)

    # A shorter offline stage than was done cannot be asked for; another learning rate can.
    said = start("trqam_online", monkeypatch, *go[:2], "--run-dir", "fewer", *online, "--offline-steps", 9)
    assert "--checkpoint: the run has done 18 offline steps" in said and not Path("fewer").exists()
    faster = ["--run-dir", "faster", "--learning-rate", 0.01, "--online-steps", 11, "--learning-starts", 10]
    assert start("trqam_online", monkeypatch, *go[:2], *faster) is None
    optimizer = torch.load("faster/checkpoint.pt", weights_only=True)["optimizer"]
    assert optimizer["param_groups"][0]["lr"] == 0.01 and optimizer["state"][0]["step"] == 18 + 1

    # Without the tables beside it, the policy is evaluated before it goes online.
    Path("alone").mkdir()
    Path("offline/checkpoint.pt").rename("alone/checkpoint.pt")
    alone = [
        "--checkpoint",
        "alone/checkpoint.pt",
        "--run-dir",
        "from-alone",
        "--online-steps",
        2,
        "--learning-starts",
        1,
    ]
    assert start("trqam_online", monkeypatch, *alone) is None
    assert [(row["stage"], row["step"]) for row in rows(Path("from-alone/eval.csv"))] == [
        ("offline", "18"),
        ("online", "2"),
    ]


def test_trqam_goes_online_from_a_cloned_policy_alone(dataset, tmp_path, monkeypatch):
    flags = [*TINY_FOR["trqam_online"], "--dataset-path", dataset]
    without = flags.index("--offline-steps")
    flags = flags[:without] + flags[without + 2 :]
    prior = saved(tmp_path)
    assert start("trqam_online", monkeypatch, *flags, "--bc-checkpoint", prior, "--run-dir", "run") is None
    assert [(row["stage"], row["step"]) for row in rows(Path("run/eval.csv"))] == [("bc", "0"), ("online", "9")]
    config = json.loads(Path("run/config.json").read_text())
    assert config["args"]["offline_steps"] == 0
    slow = torch.load(prior, weights_only=True)["actor_slow"]
    base = torch.load("run/checkpoint.pt", weights_only=True)["agent"]
    moved = max(float((base[f"target_actor_slow.{key}"] - slow[key]).abs().max()) for key in slow)
    assert 0 < moved < 1e-3  # the base is the cloned policy, after 7 updates at tau 0.005


def short_episodes(monkeypatch):
    """Time is up after 7 steps of an episode, in this process."""
    make = common.make_env
    truncated = lambda *words, **settings: gymnasium.wrappers.TimeLimit(make(*words, **settings), 7)
    monkeypatch.setattr(common, "make_env", truncated)


class Corridor:
    """Stands in for an environment: each third step ends its episode."""

    action_space = gymnasium.spaces.Box(-9, 9, (1,))

    def __init__(self):
        self.actions = []

    def reset(self, seed):
        return np.zeros(2), {}

    def step(self, action):
        self.actions.append(float(action[0]))
        return np.zeros(2), -1.0, False, len(self.actions) % 3 == 0, {"success": 0.0}


@pytest.mark.parametrize("module", [trqam_online, qam_baseline])
def test_an_episodes_end_drops_the_rest_of_its_chunk(module, dataset, monkeypatch):
    data, _ = common.load_dataset(ENV, chunk_length=2, gamma=0.9, dataset_path=str(dataset))
    data.make_room(8)
    chunks = iter(torch.arange(20.0).view(10, 2))  # one number an action, two actions a chunk
    monkeypatch.setattr(module, "act", lambda *_: next(chunks))
    corridor = Corridor()
    monkeypatch.setattr(common, "make_env", lambda _: corridor)
    args, environment = module.Args(chunk_length=2), common.OnlineEnvironment("", 0)
    agent = module.Agent(2, 4, module.Args(hidden_dims=(4,)))
    for _ in range(8):
        module.online_step(agent, data, environment, torch.Generator(), args)
    assert corridor.actions == [0, 1, 2, 4, 5, 6, 8, 9]  # 3 and 7 were never executed
    assert len(environment.chunk) == 0 and data.size == 2008 and data.episodes == 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_process_killed_while_it_trains_resumes(script, dataset, tmp_path, monkeypatch):
    flags = [*TINY_FOR[script], "--dataset-path", str(dataset), "--bc-steps", "60", "--offline-steps", "400"]
    flags += ["--eval-interval", "300"]
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags, "--run-dir", "killed"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not Path("killed/checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert start(script, monkeypatch, *flags, "--run-dir", "killed", "--resume") is None
    assert start(script, monkeypatch, *flags, "--run-dir", "whole") is None
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_saves_and_stops_and_the_run_then_resumes(number, dataset, tmp_path, monkeypatch):
    flags = [
        *TINY_FOR["trqam_online"],
        "--dataset-path",
        str(dataset),
        "--online-steps",
        "20000",
        "--log-interval",
        "7",
    ]
    flags += ["--eval-interval", "20000", "--checkpoint-interval", "20000", "--compile", "off"]
    command = [sys.executable, str(ROOT / "trqam_online.py"), *flags, "--run-dir", "stopped"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        online = lambda: (
            "online" in Path("stopped/train.csv").read_text() if Path("stopped/train.csv").exists() else False
        )
        while not online() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number
    assert "stopped; continue with --run-dir stopped --resume" in said and "Traceback" not in said
    step = torch.load("stopped/checkpoint.pt", weights_only=True)["step"]
    assert 30 < step < 20030
    end = ["--online-steps", step - 30 + 20]
    assert start("trqam_online", monkeypatch, "--run-dir", "stopped", "--resume", *end) is None
    assert start("trqam_online", monkeypatch, *flags, *end, "--run-dir", "whole") is None
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_writes_its_files_and_a_prior_that_others_can_start_from(script, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common.Run, "draw", DRAW)
    flags = [*TINY_FOR[script], "--dataset-path", dataset]
    strength = [STRENGTH[script], 0.7]
    assert start(script, monkeypatch, *flags, "--run-dir", "first", *strength) is None
    run = tmp_path / "first"
    config = json.loads((run / "config.json").read_text())
    assert config["script"] == script and config["args"][strength[0][2:].replace("-", "_")] == 0.7
    assert config["dataset"]["sha256"] == common.file_hash(dataset) and config["dataset"]["transitions"] == 2000
    assert config["versions"]["ogbench"] == "1.2.2" and config["hardware"]["cores"] == os.cpu_count()
    header = (run / "eval.csv").read_text().splitlines()[0]
    assert header == "stage,step,success,success_stderr,return,length,episodes"
    evaluated = [(row["stage"], int(row["step"])) for row in rows(run / "eval.csv")]
    online = [("online", 9)] if script == "trqam_online" else []
    assert evaluated == [("bc", 12), ("offline", 9), ("offline", 18), *online]
    train = rows(run / "train.csv")
    assert [int(row["step"]) for row in train] == [3, 6, 9, 12, 3, 6, 9, 12, 15, 18] + [3, 6, 9] * len(online)
    assert all(np.isfinite(float(row["losses/bc_loss"])) for row in train)
    keys = ["path_kl", "closed_form_kl"]
    keys += ["path_kl_ema", "lambda", "kl_budget"] if "trqam" in script else []
    for key in keys:
        assert float(train[-1][f"trust_region/{key}"]) > 0
    assert float(train[-1]["losses/grad_norm"]) > 0 and float(train[-1]["charts/SPS"]) > 0
    assert list(run.glob("events.out.tfevents.*")) and (run / "learning_curve.png").stat().st_size > 10_000
    assert "behaviour cloning" in capsys.readouterr().out

    # The prior: fine-tuning from the file is the same as fine-tuning at once.
    prior = ["--bc-checkpoint", run / "bc_checkpoint.pt", *strength]
    assert start(script, monkeypatch, *flags, "--run-dir", "second", *prior) is None
    ours, theirs = (torch.load(f"{name}/checkpoint.pt", weights_only=True)["agent"] for name in ("first", "second"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    # A prior can be evaluated by itself, and a run that has ended can be resumed, even without its prior's file.
    assert start(script, monkeypatch, *flags, "--run-dir", "prior", *prior, "--offline-steps", 0) is None
    Path(prior[1]).rename("moved.pt")
    assert start(script, monkeypatch, "--run-dir", "second", "--resume") is None

    capsys.readouterr()
    evaluate = ["--eval-only", "--checkpoint", run / "checkpoint.pt"]
    assert "--num-critics 2" in start(script, monkeypatch, *evaluate, "--num-critics", 3)
    assert start(script, monkeypatch, *evaluate) is None
    last = rows(run / "eval.csv")[-1]
    assert f"success {float(last['success']):.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_come_from_the_domain_and_flags_win(script, monkeypatch):
    module = SCRIPTS[script]
    parse = lambda *words: (
        monkeypatch.setattr(sys, "argv", [script, *words]),
        common.parse_args(module.Args, module.settings, script),
    )[1]
    args = parse("--env-id", "cube-triple-play-singletask-task2-v0")
    assert (args.hidden_dims, args.actor_layer_norm, args.chunk_length) == ((1024,) * 4, True, 5)
    args = parse("--env-id", "humanoidmaze-medium-navigate-singletask-task1-v0", "--rho", "0.3")
    assert (args.gamma, args.rho, args.chunk_length, args.sparse_reward) == (0.999, 0.3, 1, False)
    args = parse("--env-id", "puzzle-3x3-play-singletask-task1-v0", "--no-sparse-reward")
    assert not args.sparse_reward
    assert parse("--env-id", "scene-play-singletask-task1-v0").sparse_reward
    quick = parse("quick", "--bc-steps", "5")
    assert quick.bc_steps == 5
    assert all(getattr(quick, name) == value for name, value in module.QUICK.items() if name != "bc_steps")
    assert parse("quick", "--env-id", ENV).env_id == ENV
    assert parse("--env-id", ENV) == module.Args(env_id=ENV)  # not a known domain: the general defaults
    domain = ["--env-id", "cube-quadruple-play-singletask-task1-v0"]
    if "trqam" in script:
        assert parse("--env-id", "cube-triple-play-singletask-task2-v0").kl_budget == 0.5
        assert parse("--env-id", "humanoidmaze-medium-navigate-singletask-task1-v0").kl_budget == 0.5
        assert parse(*domain).kl_budget == 1.0
    else:
        assert parse(*domain).inverse_temperature == 1.0
        assert parse(*domain, "--edit-scale", "0.1").inverse_temperature == 3.0  # QAM-E's own
        assert parse(*domain, "--edit-scale", "0.1", "--inverse-temperature", "2").inverse_temperature == 2.0
        assert module.EDIT_TEMPERATURES.keys() < module.DOMAINS.keys()
    assert module.DOMAINS.keys() == trqam_offline.DOMAINS.keys()


def saved(tmp_path, **changes):
    """A bc_checkpoint.pt for TINY, with something changed."""
    args = trqam_offline.Args(hidden_dims=(16, 16), chunk_length=4)
    sizes = dict(domain="pointmaze-medium-navigate", observation_dim=2, action_dim=2, chunk_length=4)
    sizes |= {"hidden_dims": (16, 16), "actor_layer_norm": False, **changes}
    actor = trqam_offline.Agent(2, 8, args).actor_slow.state_dict()
    torch.save(dict(kind="bc", sizes=sizes, actor_slow=actor), tmp_path / "bc.pt")
    return tmp_path / "bc.pt"


def flax_actor(actor, wrap=lambda array: array):
    """A velocity field as the authors' checkpoints nest it: kernels [in, out], one dictionary a layer."""
    mlp, arrays = {}, lambda layer: (layer.weight.detach().numpy(), wrap(layer.bias.detach().numpy()))
    linear = [layer for layer in actor.net if isinstance(layer, torch.nn.Linear)]
    for i, (weight, bias) in enumerate(map(arrays, linear)):
        mlp[f"Dense_{i}"] = dict(kernel=wrap(weight.T.copy()), bias=bias)
    for i, layer in enumerate(layer for layer in actor.net if isinstance(layer, torch.nn.LayerNorm)):
        mlp[f"LayerNorm_{i}"] = dict(scale=wrap(layer.weight.detach().numpy()), bias=wrap(layer.bias.detach().numpy()))
    others = dict(modules_critic={}, modules_actor_slow=dict(mlp=mlp))
    return dict(agent=dict(rng=np.zeros(2, np.uint32), network=dict(step=np.int32(300_000), params=others)))


class JaxArray:
    """Pickles as jax.Array does."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        return jax_array._reconstruct_array, (*self.array.__reduce__(), dict(weak_type=False))


jax_array = types.ModuleType("jax._src.array")
jax_array._reconstruct_array = lambda *parts: None
jax_array._reconstruct_array.__module__, jax_array._reconstruct_array.__qualname__ = (
    "jax._src.array",
    "_reconstruct_array",
)


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("wrap", [lambda array: array, JaxArray], ids=["numpy", "jax"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_authors_cloned_policies_are_read(wrap, layer_norm, protocol, tmp_path, monkeypatch):
    for name, module in {"jax": None, "jax._src": None, "jax._src.array": jax_array}.items():
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    actor = trqam_offline.VelocityField(2, 8, (16, 24), layer_norm)
    for parameter in actor.parameters():
        torch.nn.init.normal_(parameter)
    (tmp_path / "params_300000.pkl").write_bytes(pickle.dumps(flax_actor(actor, wrap), protocol=protocol))
    sizes = dict(domain="x", observation_dim=2, action_dim=2, chunk_length=4, hidden_dims=(16, 24))
    sizes["actor_layer_norm"] = layer_norm
    monkeypatch.delitem(sys.modules, "jax")  # reading needs none of it
    found = common.load_checkpoint(tmp_path / "params_300000.pkl", "bc", "--bc-checkpoint", sizes)["actor_slow"]
    copy = trqam_offline.VelocityField(2, 8, (16, 24), layer_norm)
    copy.load_state_dict(found)
    s, x = torch.randn(5, 2), torch.randn(5, 8)
    assert torch.equal(copy(s, x, 0.3), actor(s, x, 0.3))
    for other in (dict(hidden_dims=(24, 16)), dict(actor_layer_norm=not layer_norm), dict(chunk_length=5)):
        with pytest.raises(common.UserError, match="holds a policy of layers"):
            common.load_checkpoint(tmp_path / "params_300000.pkl", "bc", "--bc-checkpoint", sizes | other)


def test_a_run_starts_from_the_authors_cloned_policy(dataset, monkeypatch):
    actor = trqam_offline.VelocityField(2, 8, (16, 16), False)
    Path("params_1.pkl").write_bytes(pickle.dumps(flax_actor(actor)))
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", "--offline-steps", 0]
    assert start("trqam_offline", monkeypatch, *flags, "--bc-checkpoint", "params_1.pkl") is None


class Hostile:
    def __init__(self, function, *words):
        self.parts = function, words

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("hostile, named", [
    (Hostile(os.system, "touch harmed"), "posix.system"),
    (dict(agent=[Hostile(eval, "open('harmed', 'w')")]), "builtins.eval"),
    (Hostile(getattr, Path, "touch"), "builtins.getattr"),
    (Hostile(np.load, "x.npy"), "numpy.load"),
    (Hostile(np.ndarray, (3,)), "cannot be read"),
    (np.array([Hostile(os.system, "touch harmed")], dtype=object), "an array of type 'O8'"),
    (np.zeros(3, dtype="datetime64[s]"), "an array of type 'M8'"),
    (dict(agent=3), "cannot be read"),
    ("text", "cannot be read"),
])  # fmt: skip
def test_a_hostile_or_foreign_pickle_runs_nothing(hostile, named, dataset, monkeypatch):
    Path("params_1.pkl").write_bytes(pickle.dumps(hostile))
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", "--bc-checkpoint", "params_1.pkl"]
    said = start("trqam_offline", monkeypatch, *flags)
    assert "--bc-checkpoint: params_1.pkl" in said and named in said and "\n" not in said
    assert [path.name for path in Path().iterdir()] == ["params_1.pkl"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda_that_is_absent_is_refused(script, dataset, monkeypatch):
    said = start(script, monkeypatch, *TINY, "--dataset-path", dataset, "--device", "cuda")
    assert "--device cuda" in said and "--device cpu" in said and not list(Path().iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_never_overwritten_and_resumes_only_as_itself(script, dataset, tmp_path, monkeypatch):
    flags = [*TINY_FOR[script], "--dataset-path", dataset, "--run-dir", "run", "--offline-steps", 3, "--bc-steps", 3]
    assert start(script, monkeypatch, *flags) is None
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert "not empty" in start(script, monkeypatch, *flags)
    assert f"{STRENGTH[script]} 1.0" in start(script, monkeypatch, *flags, "--resume", STRENGTH[script], 2.0)
    np.savez("other.npz", **{key: array for key, array in np.load(dataset).items() if key != "qvel"})
    said = start(script, monkeypatch, "--run-dir", "run", "--resume", "--dataset-path", "other.npz")
    assert "--resume: the run began on" in said and said.count("sha256") == 2
    config = Path("run/config.json").read_text()
    for damage in ("", "{}", "[]", config[:100]):
        Path("run/config.json").write_text(damage)
        said = start(script, monkeypatch, *flags, "--resume")
        assert "config.json is damaged" in said and "\n" not in said
    Path("run/config.json").write_text(config)
    with open("run/.lock") as lock:
        common.fcntl.flock(lock, common.fcntl.LOCK_EX)
        assert "another process" in start(script, monkeypatch, *flags, "--resume")
    whole = Path("run/checkpoint.pt").read_bytes()
    Path("run/checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    said = start(script, monkeypatch, *flags, "--resume")
    assert "checkpoint.pt is damaged" in said and "\n" not in said
    Path("run/checkpoint.pt").write_bytes(whole)
    other = next(other for other in SCRIPTS if other != script)
    said = start(other, monkeypatch, "--run-dir", "run", "--resume")
    assert f"is one of {script}.py, not of {other}.py" in said and "\n" not in said
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_leaves_the_last_good_checkpoint(script, dataset, tmp_path, monkeypatch):
    flags = [*TINY_FOR[script], "--dataset-path", dataset, "--run-dir", "run"]
    write, saves = common.os.fsync, iter(range(1000))

    def full(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith(".checkpoint.pt.tmp") and next(saves) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file)

    monkeypatch.setattr(common.os, "fsync", full)
    said = start(script, monkeypatch, *flags)
    assert "checkpoint.pt could not be written (No space left on device)" in said
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 10  # the second of 5, 10, 12, ...
    monkeypatch.setattr(common.os, "fsync", write)
    assert start(script, monkeypatch, *flags, "--resume") is None
    assert not list(Path("run").glob(".*.tmp"))


@pytest.mark.parametrize("env_id, way_out", [
    ("scene-play-singletask-task1-v0", "--collect-episodes 1000"),
    (ANTMAZE, "no oracle for it exists"),
])  # fmt: skip
def test_a_failed_download_says_how_to_go_on(env_id, way_out, tmp_path, monkeypatch):
    def unreachable(names, folder):
        raise urllib.error.URLError("host is down")

    monkeypatch.setattr(common.ogbench, "download_datasets", unreachable)
    said = start("trqam_offline", monkeypatch, "--env-id", env_id, "--dataset-dir", tmp_path / "data")
    assert "host is down" in said and way_out in said and "\n" not in said
    assert not list(tmp_path.iterdir())


def test_divergence_is_named_and_ends_the_run(dataset, monkeypatch):
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", "--learning-rate", 1e9]
    said = start("trqam_offline", monkeypatch, *flags)
    assert "is not finite at step" in said and "of bc: training diverged" in said and "--learning-rate" in said


def loss_turns_bad(module, monkeypatch, number):
    """Call `number` of the adjoint matching loss gives infinity."""
    loss, calls = module.adjoint_matching_loss, iter(range(1, 1000))
    give = lambda *parts: loss(*parts) + (math.inf if next(calls) == number else 0)
    monkeypatch.setattr(module, "adjoint_matching_loss", give)


def gradient_turns_bad(module, monkeypatch, number):
    """Backward pass `number` of the critic's first kernel gives one NaN."""
    make, calls = module.Agent.make_optimizer, iter(range(1, 1000))
    bad = lambda gradient: gradient.index_fill(2, torch.tensor(1), math.nan) if next(calls) == number else gradient

    def with_hook(agent, args):
        if not agent.critic.kernels[0]._backward_hooks:
            agent.critic.kernels[0].register_hook(bad)
        return make(agent, args)

    monkeypatch.setattr(module.Agent, "make_optimizer", with_hook)


@pytest.mark.parametrize("turn_bad, name", [
    (loss_turns_bad, "losses/adjoint_matching_loss"),
    (gradient_turns_bad, "gradients/critic"),
])  # fmt: skip
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_not_finite_first_is_named_with_its_step(script, turn_bad, name, dataset, monkeypatch):
    """Between two rows of the log, and two checkpoints: the newest checkpoint is from before it."""
    turn_bad(SCRIPTS[script], monkeypatch, 4 + 11)  # after the four updates that are timed
    flags = [*TINY_FOR[script], "--dataset-path", dataset, "--run-dir", "run", "--log-interval", 7]
    said = start(script, monkeypatch, *flags)
    assert said.startswith(f"error: {name} is not finite at step 11 of offline: ") and "\n" not in said
    assert "run/checkpoint.pt is from before it" in said
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert state["step"] == 12 + 10 and all(torch.isfinite(weight).all() for weight in state["agent"].values())


def action_turns_bad(module, monkeypatch):
    act = module.act
    monkeypatch.setattr(module, "act", lambda *parts: act(*parts) * (math.nan if len(parts[1]) == 1 else 1))


def observation_turns_bad(module, monkeypatch):
    step = gymnasium.wrappers.TimeLimit.step
    bad = lambda env, action: (step(env, action)[0] * np.inf, *step(env, action)[1:])
    monkeypatch.setattr(gymnasium.wrappers.TimeLimit, "step", bad)


@pytest.mark.parametrize("turn_bad, name", [
    (action_turns_bad, "the action of online step 1"),
    (observation_turns_bad, "the observation after online step 1"),
])  # fmt: skip
@pytest.mark.parametrize("script", ["trqam_online", "qam_baseline"])
def test_actions_and_observations_that_are_not_finite_end_the_run(script, turn_bad, name, dataset, monkeypatch):
    turn_bad(SCRIPTS[script], monkeypatch)
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", "--online-steps", 9, "--learning-starts", 2]
    said = start(script, monkeypatch, *flags)
    assert said.startswith(f"error: {name} is not finite (number [0] is ") and "\n" not in said
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 30  # the end of the offline stage


def test_online_the_update_that_was_not_finite_is_named_and_not_the_action_that_followed(dataset, monkeypatch):
    gradient_turns_bad(
        trqam_online, monkeypatch, 4 + 18 + 2
    )  # the second online update, after the timed and the offline
    flags = [*TINY_FOR["trqam_online"], "--dataset-path", dataset, "--run-dir", "run", "--log-interval", 100]
    said = start("trqam_online", monkeypatch, *flags)
    assert said.startswith("error: gradients/critic is not finite at step 4 of online: training diverged")


def test_an_evaluated_action_that_is_not_finite_is_named(dataset, monkeypatch):
    act = trqam_offline.act
    monkeypatch.setattr(trqam_offline, "act", lambda *parts: act(*parts) * math.nan)
    said = start("trqam_offline", monkeypatch, *TINY, "--dataset-path", dataset, "--run-dir", "run")
    assert said.startswith("error: at step 12 of bc, an action in the evaluation is not finite") and "\n" not in said


class NoWaiting(TorchDispatchMode):
    """Refuses the operations that bring a tensor's value to the program, and so wait for the device."""

    WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        lists = [part for part in args if isinstance(part, (list, tuple))]
        masks = [x for part in lists for x in part if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        assert operation not in self.WAITING and not ("index" in str(operation) and masks), operation
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_step_between_two_logs_waits_for_the_device(script, dataset, monkeypatch):
    tick, patch, stack, entered = common.Run.tick, pytest.MonkeyPatch(), contextlib.ExitStack(), []

    def waits(tensor, *args, **kwargs):
        raise AssertionError("a tensor's value was asked for")

    def watched(run, stage, step, statistics, updates=1):
        tick(run, stage, step, statistics, updates)
        if (stage, step) == ("offline", 4):
            stack.enter_context(NoWaiting())
            for name in ("tolist", "numpy", "cpu", "item", "__float__", "__bool__"):  # which do not all go through it
                patch.setattr(torch.Tensor, name, waits)
        if (stage, step) == ("offline", 6):
            patch.undo()
            stack.close()
            entered.append(step)

    monkeypatch.setattr(common.Run, "tick", watched)
    flags = [*TINY_FOR[script], "--dataset-path", dataset, "--run-dir", "run"]
    flags += ["--log-interval", 10, "--checkpoint-interval", 20]
    try:
        assert start(script, monkeypatch, *flags) is None and entered == [6]
    finally:
        patch.undo()
        stack.close()


def test_training_finishes_when_nothing_can_be_filmed(dataset, monkeypatch, capsys):
    monkeypatch.setenv("MUJOCO_GL", "no-such-renderer")
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", "--offline-steps", 3, "--bc-steps", 3]
    assert start("trqam_offline", monkeypatch, *flags, "--capture-video") is None
    said = capsys.readouterr().out
    assert "no video: " in said and "minutes; curve: " in said
