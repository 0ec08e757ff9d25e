"""Whole runs of the scripts: resuming, what they write, and how they end early. On pointmaze, which
is fast; in long chunks, so that evaluating takes few steps of the policy."""

import contextlib
import csv
import dataclasses
import enum
import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import gymnasium
import kill_resume
import numpy as np
import pytest
import short_evaluations
import torch
from conftest import SCRIPTS, scripts_with
from torch.utils._python_dispatch import TorchDispatchMode

import common
import qam_baseline
import trqam_offline
import trqam_online

ENV = "pointmaze-medium-navigate-singletask-task1-v0"
ANTMAZE = "antmaze-large-navigate-singletask-task1-v0"
TINY = (
    f"--env-id {ENV} --hidden-dims 16 16 --num-critics 2 --flow-steps 3 --batch-size 8 "
    "--chunk-length 20 --bc-steps 12 --offline-steps 18 --eval-interval 9 --eval-episodes 2 "
    "--log-interval 3 --checkpoint-interval 5 --num-threads 1 --device cpu"
).split()
ONLINE = (
    "--online-steps 31 --learning-starts 10 --balanced-sampling --best-of-n 2 --eval-interval 20 "
    "--chunk-length 4"
).split()
OF_ITS_OWN = {"kl_budget_online": ["--kl-budget-online", 0.3], "edit_scale": ["--edit-scale", 0.3]}
DRAW = common.Run.draw


def tiny(script):
    """Flags of a run of seconds, with an online stage where that is not optional."""
    always = getattr(script.Args, "online_steps", 0)
    return [*TINY, *"--online-steps 9 --learning-starts 2".split()] if always else TINY


def online(script):
    """Flags of a tiny online stage, with what only this script has."""
    return [
        *ONLINE,
        *(x for setting, own in OF_ITS_OWN.items() if hasattr(script.Args, setting) for x in own),
    ]


def strength(script):
    """The flag that says how far a script's policy may go."""
    return "--kl-budget" if hasattr(script.Args, "kl_budget") else "--inverse-temperature"


@pytest.fixture(autouse=True)
def in_an_empty_folder(request, tmp_path, monkeypatch):
    """Without pictures, and in short evaluations: both take most of a tiny run's time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.Run, "draw", lambda run: None)
    if not request.node.get_closest_marker("whole_episodes"):
        monkeypatch.setattr(common, "make_chunked_env", short_evaluations.make_chunked_env)


def start(script, monkeypatch, *words):
    """`python script.py words` in this process; what it said when it stopped early, else None."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    try:
        common.run_script(script.__file__, script.main, script.Args, script.settings)
    except SystemExit as stop:
        return stop.code


def load(path):
    """A run's checkpoint."""
    return torch.load(Path(path, "checkpoint.pt"), weights_only=True)


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def differences(first, second):
    """Names of what differs between two finished runs; paths, and the clock's columns, aside."""
    names = [
        name
        for name in ("train.csv", "eval.csv")
        if kill_resume.rows_of(first / name) != kill_resume.rows_of(second / name)
    ]
    ours, theirs = (
        {**load(run), "args": None, "rows": None, "data": None} for run in (first, second)
    )
    return kill_resume.unequal("checkpoint.pt", ours, theirs) + names


class Killed(BaseException):
    pass


def stop_and_resume(script, monkeypatch, stop_after, *flags):
    """A run that is killed after so many steps, and resumed."""
    after, count = common.Run.after, iter(range(1, 1000))

    def stopping(run, *words):
        after(run, *words)
        if next(count) == stop_after:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, "after", stopping)
        start(script, patch, *flags)
    assert start(script, monkeypatch, *flags, "--resume") is None


def test_a_stopped_and_resumed_run_equals_an_untouched_one(dataset, tmp_path, monkeypatch):
    script, flags = trqam_offline, [*TINY, "--dataset-path", dataset]
    assert start(script, monkeypatch, *flags, "--run-dir", "whole") is None
    for stop_after in (3, 12, 26):  # before any checkpoint, at the change of stage, in fine-tuning
        run_dir = tmp_path / f"stopped-{stop_after}"
        stop_and_resume(script, monkeypatch, stop_after, *flags, "--run-dir", run_dir)
        assert differences(tmp_path / "whole", run_dir) == []
    assert start(script, monkeypatch, *flags, "--run-dir", "other", "--seed", 1) is None
    assert len(differences(tmp_path / "whole", tmp_path / "other")) > 10  # it does see differences


@pytest.mark.parametrize("script", scripts_with("online_steps"))
def test_an_online_stage_resumes_within_a_chunk_and_an_episode(
    script, dataset, tmp_path, monkeypatch
):
    short_episodes(monkeypatch)
    flags = [*TINY, "--dataset-path", dataset, *online(script)]
    assert start(script, monkeypatch, *flags, "--run-dir", "whole") is None
    for stop_after in (12, 39, 57):  # at the change of stage; online, collecting; online, updating
        run_dir = tmp_path / f"stopped-{stop_after}"
        stop_and_resume(script, monkeypatch, stop_after, *flags, "--run-dir", run_dir)
        assert differences(tmp_path / "whole", run_dir) == []
    state = load("whole")["state"]
    assert len(state["dataset"]["ends"]) == 4  # 31 steps of 7-step episodes
    assert state["dataset"]["observations"].shape == (31 + 4, 2)
    assert state["environment"]["episode"] == 4
    evaluated = [(row["stage"], int(row["step"])) for row in rows(Path("whole/eval.csv"))]
    assert evaluated == [("bc", 12), ("offline", 18), ("online", 20), ("online", 31)]
    train = {int(row["step"]): row for row in rows("whole/train.csv") if row["stage"] == "online"}
    assert train[9]["losses/critic_loss"] == "" and float(train[12]["losses/critic_loss"]) > 0
    assert float(train[9]["charts/online_length"]) == 7
    assert float(train[9]["charts/environment_SPS"]) > float(train[9]["charts/SPS"]) > 0


def test_going_online_later_is_the_same_as_at_once(dataset, tmp_path, monkeypatch):
    script, flags = qam_baseline, [*TINY, "--dataset-path", dataset, *online(qam_baseline)]
    again = ["--run-dir", "later", "--resume"]
    assert start(script, monkeypatch, *flags, "--run-dir", "whole") is None
    assert start(script, monkeypatch, *flags, "--online-steps", 0, "--run-dir", "later") is None
    said = start(script, monkeypatch, *again, "--offline-steps", 9, "--online-steps", 31)
    assert "has done 18 offline steps" in said
    assert start(script, monkeypatch, *again, "--online-steps", 31) is None
    assert differences(tmp_path / "whole", tmp_path / "later") == []
    config = Path("later/config.json").read_bytes()
    for steps in (["--online-steps", 11], ["--offline-steps", 99], ["--offline-steps", 17]):
        said = start(script, monkeypatch, *again, *steps)
        assert "the run has done" in said and "\n" not in said
    assert Path("later/config.json").read_bytes() == config


def test_trqam_goes_online_from_an_offline_checkpoint_as_in_one_run(dataset, tmp_path, monkeypatch):
    """Weights, lambda, its average, optimizer, targets and tables carry over."""
    flags = [*TINY, "--dataset-path", dataset, "--kl-budget", 0.8]
    more = [*ONLINE[:4], "--kl-budget-online", 0.3]
    assert start(trqam_online, monkeypatch, *flags, *more, "--run-dir", "whole") is None
    assert start(trqam_offline, monkeypatch, *flags, "--run-dir", "offline") is None
    go = ["--checkpoint", "offline/checkpoint.pt", "--dataset-path", dataset, "--num-threads", 1]
    stop_and_resume(trqam_online, monkeypatch, 3, *go, *more, "--run-dir", "online")
    assert differences(tmp_path / "whole", tmp_path / "online") == []
    args = json.loads(Path("online/config.json").read_text())["args"]
    assert args["kl_budget"] == 0.8 and args["env_id"] == ENV and args["bc_steps"] == 12
    offline, whole = (load(run)["state"]["agent"] for run in ("offline", "whole"))
    assert 0 < offline["lam"] < 1 and whole["lam"] != offline["lam"]
    budgets = {}
    for row in rows("online/train.csv"):
        budgets.setdefault(row["stage"], set()).add(row["trust_region/kl_budget"])
    assert budgets == {
        "bc": {""},
        "offline": {"0.8"},
        "online": {"", "0.3"},
    }  # none while collecting

    # A shorter offline stage than was done cannot be asked for; another learning rate can.
    said = start(trqam_online, monkeypatch, *go, *more, "--run-dir", "fewer", "--offline-steps", 9)
    assert "the run has done 18 offline steps" in said and not Path("fewer").exists()
    faster = ["--learning-rate", 0.01, "--online-steps", 11, "--learning-starts", 10]
    assert start(trqam_online, monkeypatch, *go, "--run-dir", "faster", *faster) is None
    optimizer = load("faster")["state"]["optimizer"]
    assert optimizer["param_groups"][0]["lr"] == 0.01 and optimizer["state"][0]["step"] == 18 + 1


def test_trqam_goes_online_from_a_cloned_policy_alone(dataset, tmp_path, monkeypatch):
    flags = [*tiny(trqam_online), "--dataset-path", dataset, "--run-dir", "run"]
    flags += ["--offline-steps", 0]
    prior = saved_clone(tmp_path)
    assert start(trqam_online, monkeypatch, *flags, "--bc-checkpoint", prior) is None
    evaluated = [(row["stage"], row["step"]) for row in rows("run/eval.csv")]
    assert evaluated == [("bc", "0"), ("online", "9")]
    clone = torch.load(prior, weights_only=True)["state"]
    agent = load("run")["state"]["agent"]
    moved = max(float((agent[f"base.{key}"] - clone[key]).abs().max()) for key in clone)
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


@pytest.mark.parametrize("script", scripts_with("online_steps"))
def test_an_episodes_end_drops_the_rest_of_its_chunk(script, dataset, monkeypatch):
    data, _ = common.load_dataset(ENV, chunk_length=2, gamma=0.9, dataset_path=str(dataset))
    data.make_room(8)
    chunks = iter(torch.arange(20.0).view(10, 2))  # one number an action, two actions a chunk
    monkeypatch.setattr(script, "act", lambda *_: next(chunks))
    corridor = Corridor()
    monkeypatch.setattr(common, "make_env", lambda _: corridor)
    args, environment = script.Args(chunk_length=2), common.OnlineEnvironment("", 0)
    agent = script.Agent(2, 4, script.Args(hidden_dims=(4,)))
    for _ in range(8):
        script.online_step(agent, data, environment, torch.Generator(), args)
    assert corridor.actions == [0, 1, 2, 4, 5, 6, 8, 9]  # 3 and 7 were never executed
    assert len(environment.chunk) == 0 and data.size == 2008 and data.episodes == 4


def wait_for(process, holds):
    deadline = time.monotonic() + 300
    while not holds() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.whole_episodes  # as in a process of its own
@pytest.mark.parametrize("script", scripts_with("kl_budget_online"))
def test_a_process_killed_while_it_trains_resumes(script, dataset, tmp_path, monkeypatch):
    flags = [*tiny(script), "--dataset-path", dataset, "--bc-steps", 60, "--offline-steps", 120]
    flags += "--eval-interval 300 --checkpoint-interval 20 --log-interval 20".split()
    command = [sys.executable, script.__file__, *map(str, flags), "--run-dir", "killed"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen(command, **quiet) as process:
        wait_for(process, Path("killed/checkpoint_previous.pt").exists)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert start(script, monkeypatch, *flags, "--run-dir", "killed", "--resume") is None
    assert start(script, monkeypatch, *flags, "--run-dir", "whole") is None
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


@pytest.mark.whole_episodes  # as in a process of its own
def test_a_first_signal_saves_and_stops_and_the_run_resumes(dataset, tmp_path, monkeypatch):
    flags = [*tiny(trqam_online), "--dataset-path", dataset, "--log-interval", 7]
    flags += ["--eval-interval", 20000, "--checkpoint-interval", 20000, "--compile", "off"]
    words = [*flags, "--online-steps", 20000, "--run-dir", "stopped"]
    quiet, step = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), 0
    for number in (signal.SIGTERM, signal.SIGINT):
        table = Path("stopped/train.csv")
        before = table.read_text().count("online") if table.exists() else 0
        command = [sys.executable, trqam_online.__file__, *map(str, words)]
        with subprocess.Popen(command, **quiet) as process:
            wait_for(process, lambda: table.exists() and table.read_text().count("online") > before)
            process.send_signal(number)
            said = process.communicate(timeout=300)[1]
        assert process.returncode == 128 + number
        assert f"stopped; continue with --run-dir {tmp_path}/stopped --resume" in said
        assert "Traceback" not in said
        assert step < load("stopped")["done"]["online"] < 20000
        step, words = load("stopped")["done"]["online"], ["--run-dir", "stopped", "--resume"]
    end = ["--online-steps", step + 20]
    monkeypatch.chdir("/")  # a run resumes from any folder
    run = tmp_path / "stopped"
    assert start(trqam_online, monkeypatch, "--run-dir", run, "--resume", *end) is None
    assert start(trqam_online, monkeypatch, *flags, *end, "--run-dir", tmp_path / "whole") is None
    assert differences(tmp_path / "whole", run) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_writes_its_files_and_a_clone_to_start_from(
    script, dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(common.Run, "draw", DRAW)
    flags, strong = [*tiny(script), "--dataset-path", dataset], [strength(script), 0.7]
    assert start(script, monkeypatch, *flags, "--run-dir", "first", *strong) is None
    run = tmp_path / "first"
    config = json.loads((run / "config.json").read_text())
    assert config["script"] == script.__name__
    assert config["args"][strong[0][2:].replace("-", "_")] == 0.7
    assert config["dataset"]["sha256"] == common.file_hash(dataset)
    assert config["dataset"]["transitions"] == 2000
    assert (
        config["versions"]["ogbench"] == "1.2.2" and config["hardware"]["cores"] == common.cores()
    )
    columns = {"stage", "step", "success", "success_stderr", "return", "length", "episodes"}
    assert columns < set(rows(run / "eval.csv")[0])
    evaluated = [(row["stage"], int(row["step"])) for row in rows(run / "eval.csv")]
    last = [("online", 9)] if "--online-steps" in flags else []
    assert evaluated == [("bc", 12), ("offline", 9), ("offline", 18), *last]
    train = rows(run / "train.csv")
    steps = [3, 6, 9, 12, 3, 6, 9, 12, 15, 18] + [3, 6, 9] * len(last)
    assert [int(row["step"]) for row in train] == steps
    assert all(np.isfinite(float(row["losses/bc_loss"])) for row in train)
    keys = ["trust_region/path_kl", "trust_region/closed_form_kl", "losses/grad_norm", "charts/SPS"]
    if hasattr(script.Args, "kl_budget"):
        keys += [f"trust_region/{key}" for key in ("path_kl_ema", "lambda", "kl_budget")]
    assert all(float(train[-1][key]) > 0 for key in keys)
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "learning_curve.png").stat().st_size > 10_000
    assert "behaviour cloning" in capsys.readouterr().out

    # Fine-tuning from the clone's file is the same as fine-tuning at once.
    prior = ["--bc-checkpoint", run / "bc_checkpoint.pt", *strong]
    own = ["--offline-steps", 18]
    assert start(script, monkeypatch, *flags, "--run-dir", "second", *prior, *own) is None
    ours, theirs = (load(name)["state"]["agent"] for name in ("first", "second"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    # A run that has ended can be resumed, without its prior's file, and its tables heal.
    Path(prior[1]).rename("moved.pt")
    table = Path("second/train.csv").read_text()
    Path("second/train.csv").write_text("damaged")
    assert start(script, monkeypatch, "--run-dir", "second", "--resume") is None
    assert Path("second/train.csv").read_text() == table

    capsys.readouterr()
    assert start(script, monkeypatch, "--eval-only", "--checkpoint", run / "checkpoint.pt") is None
    last = rows(run / "eval.csv")[-1]
    assert f"success {float(last['success']):.2f}" in capsys.readouterr().out
    one = ["--eval-episodes", 1]
    assert (
        start(script, monkeypatch, "--eval-only", "--checkpoint", run / "checkpoint.pt", *one)
        is None
    )
    assert "nan" not in capsys.readouterr().out


def test_only_a_policy_that_exists_is_evaluated(dataset, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        after = common.Run.after
        patch.setattr(common.Run, "after", lambda run, *x: after(run, *x) or kill_at(run, 7))
        start(trqam_offline, patch, *TINY, "--dataset-path", dataset, "--run-dir", "run")
    said = start(trqam_offline, monkeypatch, "--eval-only", "--checkpoint", "run/checkpoint.pt")
    assert "no policy to evaluate yet" in said


def kill_at(run, step):
    if run.done == {"bc": step}:
        raise Killed


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_come_from_the_domain_and_flags_win(script, monkeypatch):
    def parse(*words):
        monkeypatch.setattr(sys, "argv", [script.__name__, *words])
        return common.parse_args(script.__name__, script.Args, script.settings)

    args = parse("--env-id", "cube-triple-play-singletask-task2-v0")
    assert (args.hidden_dims, args.actor_layer_norm, args.chunk_length) == ((1024,) * 4, True, 5)
    args = parse("--env-id", "humanoidmaze-medium-navigate-singletask-task1-v0", "--rho", "0.3")
    assert (args.gamma, args.rho, args.chunk_length, args.sparse_reward) == (0.999, 0.3, 1, False)
    args = parse("--env-id", "puzzle-3x3-play-singletask-task1-v0", "--no-sparse-reward")
    assert not args.sparse_reward
    assert parse("--env-id", "scene-play-singletask-task1-v0").sparse_reward
    quick = parse("quick", "--bc-steps", "5")
    assert quick.bc_steps == 5
    preset = {name: x for name, x in script.QUICK.items() if name != "bc_steps"}
    assert {name: getattr(quick, name) for name in preset} == preset
    assert parse("quick", "--env-id", ENV).env_id == ENV
    assert parse("--env-id", ENV) == script.Args(env_id=ENV)  # no known domain: general defaults
    domain = ["--env-id", "cube-quadruple-play-singletask-task1-v0"]
    if hasattr(script.Args, "kl_budget"):
        for env_id in (
            "cube-triple-play-singletask-task2-v0",
            "humanoidmaze-medium-navigate-singletask-v0",
        ):
            assert parse("--env-id", env_id).kl_budget == 0.5
        assert parse(*domain).kl_budget == 1.0
    if hasattr(script.Args, "edit_scale"):
        edits = [*domain, "--edit-scale", "0.1"]
        assert parse(*domain).inverse_temperature == 1.0
        assert parse(*edits).inverse_temperature == 3.0  # QAM-E's own
        assert parse(*edits, "--inverse-temperature", "2").inverse_temperature == 2.0
    assert script.DOMAINS.keys() == trqam_offline.DOMAINS.keys()


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class VariantArgs(trqam_offline.Args):
    """Settings of types that a variant may have."""

    widths: tuple[float, ...] = (0.5, 1.0)
    limit: float | None = None
    folder: Path = Path("x")
    names: tuple[str, ...] = ("a", "b")


def test_a_variant_may_have_settings_of_any_type_and_tensors_of_any(dataset, monkeypatch):
    """A step counter and a switch among its buffers, too: all of it saves, resumes and
    evaluates."""

    class Agent(trqam_offline.Agent):
        def __init__(self, *words):
            super().__init__(*words)
            self.register_buffer("count", torch.tensor(7, dtype=torch.int64))
            self.register_buffer("on", torch.tensor([True, False]))

    monkeypatch.setattr(trqam_offline, "Args", VariantArgs)
    monkeypatch.setattr(trqam_offline, "Agent", Agent)
    own = ["--widths", 0.25, 4, "--limit", 3.5, "--folder", "a/b", "--names", "c"]
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", *own]
    assert start(trqam_offline, monkeypatch, *flags) is None
    assert (
        start(trqam_offline, monkeypatch, "--resume", "--run-dir", "run", "--offline-steps", 20)
        is None
    )
    found = common.read_checkpoint(Path("run/checkpoint.pt"), "trqam_offline", "")
    assert found["done"]["offline"] == 20 and found["state"]["agent"]["count"] == 7
    args = {name: found["args"][name] for name in ("widths", "limit", "folder", "names")}
    assert args == dict(widths=(0.25, 4.0), limit=3.5, folder=Path("a/b"), names=("c",))
    assert (
        start(trqam_offline, monkeypatch, "--eval-only", "--checkpoint", "run/checkpoint.pt")
        is None
    )


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    common.write_checkpoint(tmp_path / "x.pt", {"state": torch.ones(2)})
    before = (tmp_path / "x.pt").read_bytes()
    for content in ({"state": Colour.RED}, {"state": torch.tensor([1.0, math.nan])}):
        with pytest.raises(common.UserError, match="could not be read back|is not finite"):
            common.write_checkpoint(tmp_path / "x.pt", content)
    assert (tmp_path / "x.pt").read_bytes() == before


def saved_clone(folder, **args):
    """A bc_checkpoint.pt for TINY, or for other settings."""
    args = trqam_offline.Args(**{"env_id": ENV, "hidden_dims": (16, 16), "chunk_length": 20} | args)
    clone = trqam_offline.Agent(2, 2 * args.chunk_length, args).clone.state_dict()
    domain = common.domain_of(args.env_id)
    content = dict(kind="bc", domain=domain, args=vars(args), data=None, state=clone)
    torch.save(content, folder / "bc.pt")
    return folder / "bc.pt"


class Hostile:
    def __init__(self, function, *words):
        self.parts = function, words

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    "hostile",
    [
        Hostile(os.system, "touch harmed"),
        dict(agent=[Hostile(eval, "open('harmed', 'w')")]),
        Hostile(getattr, Path, "touch"),
        Hostile(Path.touch, Path("harmed")),
    ],
)
def test_a_hostile_checkpoint_runs_nothing(hostile, dataset, monkeypatch):
    torch.save(dict(kind="bc", domain="pointmaze-medium-navigate", state=hostile), "x.pt")
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", "--bc-checkpoint", "x.pt"]
    said = start(trqam_offline, monkeypatch, *flags)
    assert "x.pt is damaged or no checkpoint" in said and "\n" not in said
    assert [path.name for path in Path().iterdir()] == ["x.pt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_that_is_absent_is_refused(dataset, monkeypatch):
    said = start(trqam_offline, monkeypatch, *TINY, "--dataset-path", dataset, "--device", "cuda")
    assert "--device cuda" in said and "--device cpu" in said and not list(Path().iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_never_overwritten_and_resumes_only_as_itself(script, dataset, monkeypatch):
    flags = [*tiny(script), "--dataset-path", dataset, "--run-dir", "run"]
    flags += ["--offline-steps", 3, "--bc-steps", 3]
    assert start(script, monkeypatch, *flags) is None
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert "not empty" in start(script, monkeypatch, *flags)
    flag = strength(script)
    assert f"{flag} 1.0" in start(script, monkeypatch, *flags, "--resume", flag, 2.0)
    with open("run/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in start(script, monkeypatch, *flags, "--resume")
    other = SCRIPTS[SCRIPTS.index(script) - 1]
    said = start(other, monkeypatch, "--run-dir", "run", "--resume")
    assert f"'{script.__name__}'; one of '{other.__name__}' is needed" in said and "\n" not in said
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


@pytest.mark.parametrize("script", scripts_with("kl_budget"))
@pytest.mark.parametrize("lambda_min", [0.5, 1.0])
def test_a_lambda_at_an_end_of_its_range_is_told(script, lambda_min, dataset, monkeypatch, capsys):
    monkeypatch.setattr(common.Run, "evaluate_and_save", lambda run, policy: run.save())
    monkeypatch.setattr(common.Run, "finish", lambda run, policy: None)
    flags = [*tiny(script), "--dataset-path", dataset, "--run-dir", "run"]
    flags += ["--kl-budget", 2, "--lambda-min", lambda_min]  # a KL below 2 lets lambda fall from 1
    assert start(script, monkeypatch, *flags) is None
    evaluations = 2 + hasattr(script.Args, "kl_budget_online")
    told = capsys.readouterr().out.count("lambda stands at 1, an end of its range")
    assert told == evaluations * (lambda_min == 1)
    assert (load("run")["state"]["agent"]["lam"] < 1) == (lambda_min == 0.5)


def test_two_runs_started_in_one_second_get_folders_of_their_own(dataset, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    for _ in range(2):
        assert start(trqam_offline, monkeypatch, *TINY, "--dataset-path", dataset) is None
    assert len([*Path("runs").iterdir()]) == 2


def test_a_full_disk_leaves_the_last_good_checkpoint(dataset, monkeypatch):
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run"]
    write, saves = common.os.fsync, iter(range(1000))

    def full(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith(".checkpoint.pt.tmp") and next(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file)

    monkeypatch.setattr(common.os, "fsync", full)
    said = start(trqam_offline, monkeypatch, *flags)
    assert "checkpoint.pt could not be written (No space left on device)" in said
    assert load("run")["done"] == {"bc": 10}  # the third of step 0, 5, 10, ...
    monkeypatch.setattr(common.os, "fsync", write)
    assert start(trqam_offline, monkeypatch, *flags, "--resume") is None
    assert not list(Path("run").glob(".*.tmp"))


@pytest.mark.parametrize(
    "env_id, way_out",
    [
        ("scene-play-singletask-task1-v0", "--collect-episodes 1000"),
        (ANTMAZE, "--dataset-path"),
    ],
)
def test_a_failed_download_says_how_to_go_on(env_id, way_out, tmp_path, monkeypatch):
    def unreachable(names, folder):
        raise urllib.error.URLError("host is down")

    monkeypatch.setattr(common.import_ogbench()[1], "download_datasets", unreachable)
    said = start(trqam_offline, monkeypatch, "--env-id", env_id, "--dataset-dir", tmp_path / "data")
    assert "host is down" in said and way_out in said and "mirror" in said and "\n" not in said
    assert not [*Path("data").iterdir()] and not Path("runs").exists()


@pytest.mark.parametrize("content", [b"<html>404</html>", b"PK\3\4 cut short"])
def test_a_download_that_is_no_whole_file_is_not_kept_and_fetched_again(
    content, dataset, monkeypatch
):
    fetched = []

    def download(names, folder):
        fetched.append(names)
        content_now = content if len(fetched) == 1 else dataset.read_bytes()
        Path(folder, f"{names[0]}.npz").write_bytes(content_now)

    monkeypatch.setattr(common.import_ogbench()[1], "download_datasets", download)
    flags = ["--dataset-dir", "data", "--run-dir", "run"]
    said = start(trqam_offline, monkeypatch, *TINY, *flags)
    assert "could not be downloaded" in said and not [*Path("data").iterdir()]
    assert start(trqam_offline, monkeypatch, *TINY, *flags) is None and len(fetched) == 2
    assert [path.name for path in Path("data").iterdir()] == ["pointmaze-medium-navigate-v0.npz"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_divergence_ends_the_run_and_keeps_a_checkpoint_from_before(script, dataset, monkeypatch):
    loss, calls = script.adjoint_matching_loss, iter(range(1, 1000))

    def turns_bad(*words):
        return loss(*words) + (math.inf if next(calls) == 13 else 0)

    monkeypatch.setattr(script, "adjoint_matching_loss", turns_bad)
    flags = [*tiny(script), "--dataset-path", dataset, "--run-dir", "run", "--log-interval", 13]
    said = start(script, monkeypatch, *flags)
    assert said.startswith(
        "error: losses/adjoint_matching_loss is not finite at step 13 of offline"
    )
    assert "training diverged" in said and "--learning-rate" in said and "\n" not in said
    assert "run/checkpoint.pt is from before it" in said
    found = load("run")
    assert found["done"]["offline"] == 10
    assert all(torch.isfinite(weight).all() for weight in found["state"]["agent"].values())


def test_weights_that_are_not_finite_are_not_saved(dataset, monkeypatch):
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", "--learning-rate", 1e9]
    said = start(trqam_offline, monkeypatch, *flags, "--log-interval", 1000)
    assert "is not finite at step" in said and "training diverged" in said
    assert all(torch.isfinite(x).all() for x in load("run")["state"].get("agent", {}).values())


def action_turns_bad(script, monkeypatch):
    act = script.act

    def bad(agent, observation, noise, args):
        return act(agent, observation, noise, args) * (math.nan if len(noise) == 1 else 1)

    monkeypatch.setattr(script, "act", bad)


def observation_turns_bad(script, monkeypatch):
    step = gymnasium.wrappers.TimeLimit.step

    def bad(env, action):
        observation, *others = step(env, action)
        return observation * np.inf, *others

    monkeypatch.setattr(gymnasium.wrappers.TimeLimit, "step", bad)


@pytest.mark.parametrize(
    "turn_bad, name",
    [
        (action_turns_bad, "the environment's action"),
        (observation_turns_bad, "the environment's observation"),
    ],
)
@pytest.mark.parametrize("script", scripts_with("online_steps"))
def test_actions_and_observations_that_are_not_finite_end_the_run(
    script, turn_bad, name, dataset, monkeypatch
):
    turn_bad(script, monkeypatch)
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run"]
    said = start(script, monkeypatch, *flags, "--online-steps", 9, "--learning-starts", 2)
    assert said.startswith(f"error: {name} is not finite at step 1 of online") and "\n" not in said
    assert load("run")["done"] == {"bc": 12, "offline": 18}


def test_an_evaluated_action_that_is_not_finite_is_named(dataset, monkeypatch):
    act = trqam_offline.act
    monkeypatch.setattr(trqam_offline, "act", lambda *words, **more: act(*words, **more) * math.nan)
    said = start(trqam_offline, monkeypatch, *TINY, "--dataset-path", dataset, "--run-dir", "run")
    assert said.startswith("error: an action in the evaluation is not finite at step 12 of bc")


def test_evaluating_what_diverged_gives_no_advice_on_training(dataset, monkeypatch):
    monkeypatch.setattr(common.Evaluator, "evaluate", lambda *_: {"episodes": 1})
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", "--offline-steps", 2]
    assert start(trqam_offline, monkeypatch, *flags) is None

    def evaluate(*_):
        common.require_finite("an action in the evaluation", math.nan)

    monkeypatch.setattr(common.Evaluator, "evaluate", evaluate)
    said = start(trqam_offline, monkeypatch, "--eval-only", "--checkpoint", "run/checkpoint.pt")
    assert "run/checkpoint.pt: an action in the evaluation is not finite; evaluate another" in said


def test_a_run_killed_while_it_collects_resumes(monkeypatch):
    flags = [*TINY, "--collect-episodes", 2, "--dataset-dir", "data", "--run-dir", "run"]
    monkeypatch.setattr(common.Run, "evaluate_and_save", lambda run, policy: run.save())
    monkeypatch.setattr(common.Run, "finish", lambda run, policy: None)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common, "collect_dataset", kill_at_once)
        start(trqam_offline, patch, *flags)
    assert load("run")["done"] == {}
    assert start(trqam_offline, monkeypatch, "--resume", "--run-dir", "run") is None
    assert load("run")["data"]["episodes"] == 2


class NoWaiting(TorchDispatchMode):
    """Refuses the operations that bring a tensor's value to the program, and so wait for the
    device."""

    WAITING = [
        getattr(torch.ops.aten, x).default for x in ("_local_scalar_dense", "nonzero", "equal")
    ]

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        lists = [part for part in args if isinstance(part, (list, tuple))]
        tensors = [x for part in lists for x in part if isinstance(x, torch.Tensor)]
        by_mask = "index" in str(operation) and any(x.dtype == torch.bool for x in tensors)
        assert operation not in self.WAITING and not by_mask, operation
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_step_between_two_logs_waits_for_the_device(script, dataset, monkeypatch):
    after, patch, stack = common.Run.after, pytest.MonkeyPatch(), contextlib.ExitStack()
    entered = []

    def waits(tensor, *args, **kwargs):
        raise AssertionError("a tensor's value was asked for")

    def watched(run, *words):
        after(run, *words)
        if run.done == {"bc": 12, "offline": 4}:
            stack.enter_context(NoWaiting())
            for name in (
                "tolist",
                "numpy",
                "cpu",
                "item",
                "__float__",
                "__bool__",
            ):  # not all go through
                patch.setattr(torch.Tensor, name, waits)
        if run.done == {"bc": 12, "offline": 6}:
            patch.undo()
            stack.close()
            entered.append(True)

    monkeypatch.setattr(common.Run, "after", watched)
    flags = [*tiny(script), "--dataset-path", dataset, "--run-dir", "run"]
    flags += ["--log-interval", 10, "--checkpoint-interval", 20]
    try:
        assert start(script, monkeypatch, *flags) is None and entered
    finally:
        patch.undo()
        stack.close()


def test_a_missing_renderer_is_told_first(dataset, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "no-such-renderer")
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", "--capture-video"]
    words = [sys.executable, trqam_offline.__file__, *map(str, flags)]
    said = subprocess.run(words, capture_output=True, text=True)
    assert said.returncode == 1 and "--capture-video: no renderer works here" in said.stderr
    assert not Path("run").exists()


def test_a_run_killed_before_its_first_file_is_whole_starts_or_resumes(dataset, monkeypatch):
    """Its checkpoint is written first: there is no moment at which neither is possible."""
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run"]
    for method in ("save", "write_table"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(common.Run, method, kill_at_once)
            start(trqam_offline, patch, *flags)
        more = ["--resume"] if Path("run/checkpoint.pt").exists() else []
    assert more and start(trqam_offline, monkeypatch, *flags, *more) is None


def kill_at_once(*_, **__):
    raise Killed


def test_going_online_from_a_quick_checkpoint_keeps_the_presets_online_settings(monkeypatch):
    args = vars(trqam_offline.Args(preset="quick", **trqam_offline.QUICK))
    stored = {"args": args | dict(kl_budget=0.7, offline_steps=9)}
    monkeypatch.setattr(common, "read_checkpoint", lambda *_: stored)
    monkeypatch.setattr(sys, "argv", ["trqam_online.py", "--checkpoint", "x", "--utd-ratio", "2"])
    found = common.parse_args("trqam_online", trqam_online.Args, trqam_online.settings)
    assert (found.kl_budget, found.offline_steps, found.utd_ratio) == (0.7, 9, 2)
    preset = [trqam_online.QUICK[name] for name in ("online_steps", "learning_starts")]
    assert [found.online_steps, found.learning_starts] == preset and found.balanced_sampling
