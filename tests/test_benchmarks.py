"""What the benchmarks change in a script, and what they make of runs."""

import csv
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import qam_baseline
import trqam_online

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import compare
import kill_resume
import mechanism
import online
import soak

B, S, A = 64, 3, 2
ARGS = qam_baseline.Args(hidden_dims=(16, 16), num_critics=2, flow_steps=4, chunk_length=1)
PENALISED = dataclasses.replace(ARGS, inverse_temperature=20.0, learning_rate=1e-2)
TASK = "cube-double-play-singletask-task1-v0"


@pytest.fixture
def script(monkeypatch):
    """qam_baseline, put back afterwards as it was."""
    for name in ("Agent", "Critic", "update", "terminal_adjoint", "adjoint_matching_loss"):
        monkeypatch.setattr(qam_baseline, name, getattr(qam_baseline, name))
    return qam_baseline


def train(updates=1, args=ARGS, compiled=False):
    """A new agent, and the statistics of each of its updates, on one batch and fresh noise."""
    torch.manual_seed(0)
    agent, generator = qam_baseline.Agent(S, A, args), torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    s, a, ones = normal(B, S), normal(B, A).clamp(-1, 1), torch.ones(B)
    batch = common.Batch(s, a, normal(B), ones, normal(B, S), valid=ones)
    optimizer, losses = agent.make_optimizer(args), qam_baseline.losses
    if compiled:
        losses = torch.compile(losses, fullgraph=True, backend="eager")
    noises = [qam_baseline.draw_noise(B, A, args, generator) for _ in range(updates)]
    update = lambda noise: qam_baseline.update(agent, optimizer, batch, noise, args, losses)
    return agent, [update(noise) for noise in noises]


def test_the_critics_error_has_the_size_and_the_gradient_it_says():
    values, slopes, over_states = [], [], []
    for seed in range(400):
        f = mechanism.RandomFunction(seed, S, A)
        s, a = 5 * torch.randn(20, S), torch.rand(20, A) * 2 - 1
        values.append(f(s, a))
        slopes.append(torch.func.grad(lambda a: f(s, a).sum())(a))
        over_states.append(torch.func.grad(lambda s: f(s, a).sum())(s))
    rms = lambda x: torch.stack(x).pow(2).mean().sqrt()
    assert abs(torch.stack(values).mean()) < 0.1 and abs(rms(values) - 1) < 0.05
    assert abs(rms(slopes) - 1) < 0.1
    assert abs(rms(over_states) - 1 / mechanism.OBSERVATION_LENGTH) < 0.02
    assert torch.equal(mechanism.RandomFunction(399, S, A)(s, a), values[-1])
    assert not torch.equal(mechanism.RandomFunction(38, S, A)(s, a), values[-1])


def test_the_critics_error_enters_the_adjoint_alone(script):
    agent, [before] = train()
    s, x = torch.randn(B, S), torch.randn(B, A) / 3
    exact = script.terminal_adjoint(agent.target_critic, s, x)
    mechanism.CriticError(3.0)(script, seed=5)
    twin, [after] = train()
    f = mechanism.RandomFunction(5, S, A)
    slope = torch.func.grad(lambda x: f(s, x.clamp(-1, 1)).sum())(x)
    wrong = script.terminal_adjoint(twin.target_critic, s, x)
    torch.testing.assert_close(wrong, exact - 3 * slope, rtol=1e-4, atol=1e-5)
    assert twin.state_dict().keys() == agent.state_dict().keys()
    assert after["losses/critic_loss"] == before["losses/critic_loss"]
    assert after["losses/adjoint_matching_loss"] != before["losses/adjoint_matching_loss"]


@pytest.mark.parametrize("change", [mechanism.CriticError(3.0), mechanism.ExternalPenalty(0.01)])
def test_a_changed_update_can_be_compiled(script, change):
    change(script, seed=5)
    (_, plain), (_, compiled) = train(5, PENALISED), train(5, PENALISED, compiled=True)
    torch.testing.assert_close(compiled, plain)


def test_the_external_penalty_holds_the_kl_at_its_budget(script):
    mean = lambda key: np.mean([float(row[f"trust_region/{key}"]) for row in rows[-100:]])
    _, rows = train(600, PENALISED)
    assert mean("path_kl") > 0.5  # far over that budget, without the penalty
    mechanism.ExternalPenalty(budget=0.2)(script, seed=0)
    agent, rows = train(600, PENALISED)
    assert rows[0]["trust_region/penalty"] == 0  # the KL starts below its budget
    assert mean("penalty") > 1 and 0.15 < mean("path_kl") < 0.25
    assert agent.state_dict()["penalty"] == rows[-1]["trust_region/penalty"]  # a checkpoint holds it


def write_run(folder, script, seed, curve, train=({},), sha256="0" * 64, commits=("abc",), **args):
    """The files of a run that the benchmarks read. curve: (stage, step, success); train: rows."""
    folder.mkdir()
    args = dict(env_id=TASK, seed=seed, eval_episodes=50, offline_steps=200_000, bc_steps=9) | args
    dataset = dict(origin="path", sha256=sha256, files=["a.npz"], dataset="cube", transitions=9)
    config = dict(script=script, args=args, dataset=dataset, git_commit=commits[-1])
    config |= dict(hardware=dict(cores=2, cpu="a processor"), versions=dict(torch="2"))
    config |= dict(sittings=[dict(git_commit=commit) for commit in commits])
    (folder / "config.json").write_text(json.dumps(config))
    evals = [dict(stage=a, step=b, success=c, success_stderr=0.05) for a, b, c in curve]
    for name, rows in (("eval.csv", evals), ("train.csv", train)):
        with open(folder / name, "w", newline="") as file:
            table = csv.DictWriter(file, rows[-1])
            table.writeheader()
            table.writerows(rows)
    return folder


def test_runs_are_pooled_by_script_and_settings_and_drawn_with_their_intervals(tmp_path, capsys):
    def run(script, seed=0, end=0.3, **args):
        curve = [("bc", 9, 0.1), ("offline", 200_000, end)]
        curve += [("online", 500, 0.7)] if "online_steps" in args else []
        return write_run(tmp_path / f"{len(os.listdir(tmp_path))}", script, seed, curve, **args)

    def table(*runs):
        compare.main(compare.Args(runs=runs, output=tmp_path / "figure.png"))
        rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if TASK in line]
        return {row[1]: " | ".join(row[2:])[:-2] for row in rows}

    ends, qam = (0.4, 0.6, 0.8), dict(inverse_temperature=3.0, edit_scale=0.0)
    three = [run("qam_baseline", seed, end, run_dir=f"{seed}", **qam) for seed, end in enumerate(ends)]
    edits = run("qam_baseline", **qam | dict(edit_scale=0.1, online_steps=500))
    commits, trqam = ("a" * 40, "f" * 40 + "+changes"), run("trqam_offline", kl_budget=0.5)
    went_online = run("trqam_online", kl_budget=0.5, online_steps=500, commits=commits)
    assert table(*three, edits, went_online, trqam) == {
        "QAM, τ = 3": f"3 | 200,000 | 0.60 ± {4.30 * np.std(ends, ddof=1) / 3**0.5:.2f} | abc",
        "QAM-E, edit 0.1, τ = 3, then online": "1 | 200,500 | 0.70 ± 0.10 | abc",
        "TRQAM, budget 0.5, then online": "1 | 200,500 | 0.70 ± 0.10 | aaaaaaa, fffffff+changes",
        "TRQAM, budget 0.5": "1 | 200,000 | 0.30 ± 0.10 | abc",
    }
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    # A switch that the other is older than, and is off, tells no runs apart; what makes no further
    # seed of a run is a changed copy of its script, another setting, TF32, and other data.
    others = dict(tf32=True), dict(tau=0.5), dict(sha256="1" * 64)
    others = [run("trqam_offline", 1, kl_budget=0.5, **other) for other in (dict(tf32=False), *others)]
    labels = [table(trqam, other).keys() - {"TRQAM, budget 0.5"} for other in others]
    off, one = "TRQAM, budget 0.5, {} off", "TRQAM, budget 0.5, {}"
    data = [one.format(f"data {x * 12}") for x in "01"]
    assert labels == [set(), {off.format("tf32"), one.format("tf32 True")},
                      {off.format("tau"), one.format("tau 0.5")}, {*data}]
    copied = run("trqam_const", 1, kl_budget=0.5)
    assert table(trqam, copied).keys() == {"TRQAM, budget 0.5", "trqam_const"}
    for runs, words in (((trqam, trqam), "second run"), ((tmp_path / "nowhere",), "is no run")):
        with pytest.raises(SystemExit, match=words):
            table(*runs)


def test_the_study_says_what_its_runs_say(tmp_path):
    args = mechanism.Args(seeds=2, updates=400, env_id=TASK, runs_dir=str(tmp_path))
    study = mechanism.settings()
    assert len({setting.name for setting in study}) == len(study)
    for seed in range(2):
        write_run(tmp_path / f"prior-seed{seed}", "trqam_offline", seed,
                  [("bc", 9, 0.1 + 0.1 * seed)], offline_steps=0, preset="quick")
        for number, setting in enumerate(study):
            end = 0.3 + 0.02 * number + 0.1 * seed
            curve = [("bc", 0, 0.1), ("offline", 200, 0.2), ("offline", 400, end)]
            lam = 3.0 if setting.script == "trqam_offline" else ""
            rows = [{"stage": "offline", "step": step, "trust_region/lambda": lam,
                     "trust_region/path_kl": 1.0 + seed if step > 300 else 99.0,
                     "losses/critic_loss": 2.0} for step in range(25, 401, 25)]
            run = tmp_path / f"{setting.name}-seed{seed}"
            write_run(run, setting.script, seed, curve, rows, offline_steps=400, preset="quick")
    assert not any(mechanism.missing_runs(args, study))
    with pytest.raises(common.UserError, match="offline_steps 400, not 200"):
        mechanism.finished(run, "offline", offline_steps=200)
    rows = mechanism.summarise(args, study)
    assert len(rows) == 2 * (1 + len(study)) and rows[-1]["commit"] == "abc"
    table = mechanism.as_table(rows)
    assert "| behaviour cloning | 0.15 ± 0.05 |  |  |  |" in table
    assert "| TRQAM, budget 0.1 | 0.35 ± 0.05 | 1.5 ± 0.5 | 3 ± 0 | 2 ± 0 |" in table
    assert "| QAM, τ = 3 | 0.43 ± 0.05 | 1.5 ± 0.5 |  | 2 ± 0 |" in table
    figure = mechanism.draw(args, study, "two seeds of nothing")
    drawn = {line.get_label() for axis in figure.axes for line in axis.lines}
    assert {setting.label for setting in study} <= drawn
    committed = Path(mechanism.__file__).with_name("results") / "mechanism" / "mechanism.csv"
    assert ",".join(rows[0]) == committed.read_text().splitlines()[0]
    mechanism.write(tmp_path / "mechanism", "two seeds of nothing", table, rows, figure)
    assert (tmp_path / "mechanism.md").read_text() == f"two seeds of nothing\n\n{table}"
    assert len((tmp_path / "mechanism.csv").read_text().splitlines()) == 1 + len(rows)
    # A run that was stopped before its end goes on; the constant lambda is the mean of another's.
    run, [*_, constant] = tmp_path / "constant-seed1", [x for x in study if x.after]
    lines = (run / "eval.csv").read_text().splitlines(keepends=True)
    (run / "eval.csv").write_text("".join(lines[:-1]))
    *done, [(*left, flags)] = mechanism.missing_runs(args, study)
    assert done == [[], []] and left == [constant, 1, run]
    assert " ".join(flags).endswith("--eta-lambda 0 --lambda-min 3.0 --lambda-max 3.0")


def test_the_online_study_says_what_its_runs_say(tmp_path):
    args = online.Args(seeds=2, online_steps=600, runs_dir=str(tmp_path))
    kept = dict(balanced_sampling=True, utd_ratio=1, learning_starts=100, kl_budget=0.5)
    rates = {"charts/environment_SPS": 800.0, "charts/SPS": 15.0}
    train = [{"stage": "offline", "step": 200_000, "trust_region/path_kl": 9.0}]
    for step in range(100, 601, 100):  # only collecting at first, so nothing is known of the KL
        region = {"trust_region/path_kl": step / 100, "trust_region/lambda": 3.0}
        train += [dict(stage="online", step=step) | rates | (region if step > 100 else {})]
    for seed in range(2):
        for setting, file in [(online.OFFLINE, ""), *online.STUDY]:
            curve = [("bc", 9, 0.1), ("offline", 200_000, 0.3)][: 1 if "bc" in file else 2]
            curve += [("online", 300, 0.5), ("online", 600, 0.7 + 0.2 * seed)]
            words = dict(kept, online_steps=600, commits=("abc", "def"))
            run = write_run(tmp_path / f"{setting.name}-seed{seed}", setting.script, seed, curve,
                            train, **words)
    assert not any(online.missing_runs(args))
    with pytest.raises(common.UserError, match="online_steps 600, not 700"):
        mechanism.finished(run, "online", online_steps=700)
    rows = online.summarise(args)
    assert [(row["step"], row["path_kl"]) for row in rows[-2:]] == [(300, 2.5), (600, 5.0)]
    assert rows[-1]["environment_SPS"] == 800 and rows[-1]["commits"] == "abc def"
    table = online.as_table(rows)
    heads = "cloned | before going online | 300 steps online | 600 steps online"
    cells = "0.50 ± 0.00 | 0.80 ± 0.10 | 0.80 ± 0.10 | 5.00 ± 0.00 |"
    assert f"| | {heads} | mean of 1, after 300 | path KL, last |" in table
    assert f"| TRQAM | 0.10 ± 0.00 | 0.30 ± 0.00 | {cells}" in table
    assert f"| TRQAM, from the clone alone | 0.10 ± 0.00 |  | {cells}" in table
    title = mechanism.describe(mechanism.config_of(run), 2, "words")
    assert f"{TASK}, 2 seeds, evaluations of 50 episodes, words" in title and "abc def" in title
    success, kl, _ = online.draw(args, title, budget=0.5).axes
    assert list(success.lines[0].get_xdata()) == [-200_000, 0, 300, 600]
    labels = {setting.label for setting, _ in online.STUDY} | {"budget"}
    assert {line.get_label() for line in kl.lines} >= labels
    (tmp_path / "qam-seed1" / "config.json").unlink()
    [_, [(setting, seed, where, flags)]] = online.missing_runs(args)
    assert (setting.name, seed, where) == ("qam", 1, tmp_path / "qam-seed1")
    assert flags[0] == "quick" and flags[flags.index("--bc-checkpoint") + 1].endswith(
        "trqam-offline-seed1/bc_checkpoint.pt")


def test_a_study_starts_its_runs_as_the_command_line_does_and_resumes_them(tmp_path, monkeypatch):
    started, script, run = [], trqam_online, tmp_path / "run"
    monkeypatch.setattr(common, "run_script", lambda *words: started.append((*words, sys.argv)))
    monkeypatch.setattr(sys, "argv", [])
    for _ in range(2):
        assert mechanism.train(online.STUDY[0][0], 3, run, ["--checkpoint", "x.pt"]) == ""
        run.mkdir(exist_ok=True)
        (run / "checkpoint.pt").touch()
    words = script.__file__, script.main, script.Args, script.settings
    new = ["trqam_online.py", "--checkpoint", "x.pt", "--seed", "3", "--run-dir", str(run)]
    again = ["trqam_online.py", "--resume", "--run-dir", str(run)]
    assert started == [(*words, new), (*words, again)]


def test_kill_resume_finds_every_difference(tmp_path):
    """Of two runs equal but for one number, row or byte; the clock and the paths do not count."""
    for name in ("whole", "resumed"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "data").mkdir()
        (tmp_path / name / "data" / "x.npz").write_bytes(b"rows")
        state = dict(agent={"lam": torch.tensor(1.0)}, dataset={"rewards": torch.ones(3)})
        rows = {"train.csv": [{"step": 9, "charts/SPS": len(name)}, {"step": 10}]}
        content = dict(done=9, seconds=name, args=dict(resume=name), rows=rows, state=state)
        for file in ("checkpoint.pt", "checkpoint_previous.pt", "bc_checkpoint.pt"):
            torch.save(content, tmp_path / name / "run" / file)
        train = f"stage,step,charts/SPS,losses/bc_loss\nbc,9,{len(name)},0.5\n"
        (tmp_path / name / "run" / "train.csv").write_text(train)
        (tmp_path / name / "run" / "eval.csv").write_text("stage,step,success\nbc,9,0.5\n")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert kill_resume.differences(whole, resumed) == []
    state["agent"]["lam"] += 1e-7
    state["dataset"]["rewards"] = torch.ones(4)
    rows["train.csv"][1]["step"] = 11
    torch.save(content, resumed / "run" / "checkpoint.pt")
    (resumed / "run" / "checkpoint_previous.pt").unlink()
    (resumed / "run" / "train.csv").write_text(train + "bc,9,1,0.5\n")
    (resumed / "run" / "eval.csv").write_text("stage,step,success\nbc,9,0.6\n")
    (resumed / "data" / "x.npz").write_bytes(b"row")
    inside = "rows/train.csv/1/step", "state/agent/lam", "state/dataset/rewards"
    files = "run/checkpoint_previous.pt", "run/train.csv", "run/eval.csv", "data/x.npz"
    expected = [*(f"run/checkpoint.pt/{name}" for name in inside), *files]
    assert kill_resume.differences(whole, resumed) == expected


def test_soak_counts_a_process_and_its_workers():
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    waits = "import sys; print(flush=True); sys.stdin.read()"
    words = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", waits], **words) as child:
        child.stdout.readline()  # it has started
        found = soak.sample(os.getpid())
        child.stdin.close()
    assert found["workers"] >= 1 and found["memory_mib"] > 50 and found["worker_memory_mib"] > 1
    assert found["files"] >= 3 and found["worker_files"] >= 3


def test_soak_measures_a_checkpoint_with_what_was_collected(monkeypatch):
    small = functools.partial(trqam_online.Args, hidden_dims=(8,), num_critics=2)
    monkeypatch.setattr(trqam_online, "Args", small)
    none, many = soak.checkpoint(0), soak.checkpoint(10_000)
    rows, row = 10_000 + 20, 4 * (37 + 5 + 1 + 1)  # of cube-double, 500 steps an episode; bytes
    assert many["file_mib"] - none["file_mib"] == pytest.approx(rows * row / 2**20, rel=0.01)
    assert many["seconds"] > 0
