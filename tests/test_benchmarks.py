"""What the benchmarks change in a script, and what they make of runs."""

import copy
import csv
import dataclasses
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

B, O, A = 64, 3, 2
ARGS = qam_baseline.Args(hidden_dims=(16, 16), num_critics=2, flow_steps=4, chunk_length=1)


@pytest.fixture
def script(monkeypatch):
    """qam_baseline, put back afterwards as it was."""
    for name in ("Agent", "update", "terminal_adjoint", "adjoint_matching_loss"):
        monkeypatch.setattr(qam_baseline, name, getattr(qam_baseline, name))
    return qam_baseline


def train(agent, updates=1, args=ARGS):
    """The statistics of each of some updates, on one batch and fresh noise."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    ones = torch.ones(B)
    batch = common.Batch(normal(B, O), normal(B, A).clamp(-1, 1), normal(B), ones, normal(B, O), valid=ones)
    optimizer = agent.make_optimizer(args)
    noises = [qam_baseline.draw_noise(B, A, args, generator) for _ in range(updates)]
    return [qam_baseline.update(agent, optimizer, batch, noise, args) for noise in noises]


def test_the_critics_error_has_the_size_and_the_gradient_it_says():
    values, slopes, over_states = [], [], []
    for seed in range(1000):
        f = mechanism.random_function(seed, O, A)
        s, a = 5 * torch.randn(20, O), torch.rand(20, A) * 2 - 1
        values.append(f(s, a))
        slopes.append(torch.func.grad(lambda a: f(s, a).sum())(a))
        over_states.append(torch.func.grad(lambda s: f(s, a).sum())(s))
    values, slopes, over_states = torch.stack(values), torch.stack(slopes), torch.stack(over_states)
    assert abs(values.mean()) < 0.1 and abs(values.pow(2).mean() - 1) < 0.1
    assert abs(slopes.pow(2).mean().sqrt() - 1) < 0.1
    assert abs(over_states.pow(2).mean().sqrt() - 1 / mechanism.OBSERVATION_LENGTH) < 0.02
    same = mechanism.random_function(999, O, A)(s, a)
    assert torch.equal(same, values[-1]) and not torch.equal(same, mechanism.random_function(38, O, A)(s, a))


def test_the_critics_error_enters_the_adjoint_alone(script):
    agent = script.Agent(O, A, ARGS)
    twin = copy.deepcopy(agent)
    s, x = torch.randn(B, O), torch.randn(B, A) / 3
    exact, before = script.terminal_adjoint(agent.target_critic, s, x), train(agent)[0]
    mechanism.CriticError(3.0)(script, seed=5)
    f = mechanism.random_function(5, O, A)
    slope = torch.func.grad(lambda x: f(s, x.clamp(-1, 1)).sum())(x)
    wrong = script.terminal_adjoint(twin.target_critic, s, x)
    torch.testing.assert_close(wrong, exact - 3 * slope, rtol=1e-4, atol=1e-5)
    after = train(twin)[0]
    assert after["losses/critic_loss"] == before["losses/critic_loss"]
    assert after["losses/adjoint_matching_loss"] != before["losses/adjoint_matching_loss"]


def test_the_external_penalty_holds_the_kl_at_its_budget(script):
    args = dataclasses.replace(ARGS, inverse_temperature=20.0, learning_rate=1e-2)
    torch.manual_seed(0)
    plain = script.Agent(O, A, args)
    mechanism.ExternalPenalty(budget=0.2)(script, seed=0)
    agent = script.Agent(O, A, args)
    agent.load_state_dict(plain.state_dict(), strict=False)
    statistics = train(agent, 600, args)
    mean = lambda key: float(torch.stack([row[f"trust_region/{key}"] for row in statistics[-100:]]).mean())
    assert statistics[0]["trust_region/penalty"] == 0  # the KL starts below its budget
    assert mean("penalty") > 1 and 0.15 < mean("path_kl") < 0.25
    assert agent.state_dict()["penalty"] == statistics[-1]["trust_region/penalty"]  # so a checkpoint holds it


def test_without_the_penalty_the_kl_goes_far_over_that_budget():
    args = dataclasses.replace(ARGS, inverse_temperature=20.0, learning_rate=1e-2)
    torch.manual_seed(0)
    statistics = train(qam_baseline.Agent(O, A, args), 600, args)
    assert torch.stack([row["trust_region/path_kl"] for row in statistics[-100:]]).mean() > 0.5


def write_run(folder, script, seed, curve, **args):
    folder.mkdir()
    args = dict(env_id="cube-double-play-singletask-task1-v0", seed=seed, offline_steps=200_000, **args)
    dataset = dict(origin="path", sha256="0" * 64)
    (folder / "config.json").write_text(json.dumps(dict(script=script, args=args, dataset=dataset)))
    with open(folder / "eval.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(common.EVAL_COLUMNS)
        for stage, step, success in curve:
            table.writerow([stage, step, success, 0.05, -100, 100, 50])
    return folder


def test_runs_are_grouped_by_method_and_drawn_with_their_intervals(tmp_path, capsys):
    qam = dict(inverse_temperature=3.0)
    ends = (0.4, 0.6, 0.8)
    runs = [
        write_run(tmp_path / f"q{seed}", "qam_baseline", seed, [("bc", 9, 0.1), ("offline", 200_000, end)],
                  edit_scale=0.0, **qam)
        for seed, end in enumerate(ends)
    ]  # fmt: skip
    curve = [("bc", 9, 0.1), ("offline", 200_000, 0.3), ("online", 500, 0.7)]
    runs += [write_run(tmp_path / "e", "qam_baseline", 0, curve, edit_scale=0.1, online_steps=500, **qam)]
    runs += [write_run(tmp_path / "n", "trqam_online", 0, curve, kl_budget=0.5, online_steps=500)]
    runs += [write_run(tmp_path / "t", "trqam_offline", 0, [("bc", 9, 0.1)], kl_budget=0.5)]
    compare.main(compare.Args(runs=tuple(runs), output=tmp_path / "figure.png"))
    said = capsys.readouterr().out
    half = 4.30 * np.std(ends, ddof=1) / np.sqrt(3)
    assert f"| QAM, τ = 3 | 3 | 200,000 | 0.60 ± {half:.2f} |" in said
    assert f"| QAM-E, edit 0.1, τ = 3, then online | 1 | 200,500 | 0.70 ± {1.96 * 0.05:.2f} |" in said
    assert "| TRQAM, budget 0.5, then online | 1 | 200,500 | 0.70 ± 0.10 |" in said
    assert "| TRQAM, budget 0.5 | 1 | 0 | 0.10 ± 0.10 |" in said
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="second run"):
        compare.main(compare.Args(runs=(runs[0], runs[0]), output=tmp_path / "figure.png"))
    other = write_run(tmp_path / "o", "qam_baseline", 9, [("bc", 9, 0.1)], edit_scale=0.0, tau=0.5, **qam)
    with pytest.raises(SystemExit, match="tau 0.5"):
        compare.main(compare.Args(runs=(runs[0], other), output=tmp_path / "figure.png"))
    with pytest.raises(SystemExit, match="is no run"):
        compare.main(compare.Args(runs=(tmp_path / "nowhere",), output=tmp_path / "figure.png"))
    for seed, tf32 in ((7, False), (8, True)):  # a switch that the first run is older than
        write_run(tmp_path / f"s{seed}", "qam_baseline", seed, [("bc", 9, 0.1)], edit_scale=0.0, tf32=tf32, **qam)
    compare.main(compare.Args(runs=(runs[0], tmp_path / "s7"), output=tmp_path / "figure.png"))
    with pytest.raises(SystemExit, match="tf32 True, the first run of its method and task off"):
        compare.main(compare.Args(runs=(runs[0], tmp_path / "s8"), output=tmp_path / "figure.png"))


def test_the_study_says_what_its_runs_say(tmp_path, monkeypatch):
    folders = dict(runs_dir=str(tmp_path), output=str(tmp_path))
    args = mechanism.Args(seeds=2, updates=400, env_id="cube-double-play-singletask-task1-v0", **folders)
    study = mechanism.settings()
    assert len({setting.name for setting in study}) == len(study)
    for seed in range(2):
        made = dict(hardware=dict(cores=2, cpu="a processor"), versions=dict(torch="2"), git_commit="abc")
        prior = write_run(tmp_path / f"prior-seed{seed}", "trqam_offline", seed, [("bc", 9, 0.1 + 0.1 * seed)])
        (prior / "config.json").write_text(json.dumps(json.loads((prior / "config.json").read_text()) | made))
        (prior / "train.csv").write_text("stage,step,losses/bc_loss\nbc,9,0.5\n")
        for number, setting in enumerate(study):
            run = tmp_path / f"{setting.name}-seed{seed}"
            curve = [("bc", 0, 0.1), ("offline", 200, 0.2), ("offline", 400, 0.3 + 0.02 * number + 0.1 * seed)]
            write_run(run, setting.script, seed, curve, eval_episodes=50, preset="quick", bc_steps=9)
            config = json.loads((run / "config.json").read_text())
            config["args"] |= dict(offline_steps=400)
            (run / "config.json").write_text(json.dumps(config | made))
            with open(run / "train.csv", "w", newline="") as file:
                table = csv.writer(file)
                table.writerow(["stage", "step", "trust_region/path_kl", "trust_region/lambda", "losses/critic_loss"])
                for step in range(25, 401, 25):  # the last quarter is 325 ... 400
                    lam = 3.0 if setting.script == "trqam_offline" else ""
                    table.writerow(["offline", step, 1.0 + seed if step > 300 else 99.0, lam, 2.0])
            assert mechanism.finished(run, 400, args)
            with pytest.raises(common.UserError, match="offline_steps 400, not 200"):
                mechanism.finished(run, 200, args)
    (run / "eval.csv").write_text("".join((run / "eval.csv").read_text().splitlines(keepends=True)[:-1]))
    assert not mechanism.finished(run, 400, args) and not mechanism.finished(tmp_path / "missing", 400, args)
    with open(run / "eval.csv", "a") as file:
        file.write(f"offline,400,{0.3 + 0.02 * number + 0.1},0.05,-100,100,50\n")
    rows = mechanism.summarise(args, study)
    assert len(rows) == 2 * (1 + len(study)) and rows[-1]["commit"] == "abc"
    table = mechanism.as_table(rows)
    assert "| behaviour cloning | 0.15 ± 0.05 |  |  |  |" in table
    assert "| TRQAM, budget 0.1 | 0.35 ± 0.05 | 1.5 ± 0.5 | 3 ± 0 | 2 ± 0 |" in table
    assert "| QAM, τ = 3 | 0.43 ± 0.05 | 1.5 ± 0.5 |  | 2 ± 0 |" in table
    monkeypatch.setattr(mechanism, "describe", lambda args: "two seeds of nothing")
    figure = mechanism.draw(args, study)
    drawn = {line.get_label() for axis in figure.axes for line in axis.lines}
    assert {setting.label for setting in study} <= drawn


def test_the_online_study_says_what_its_runs_say(tmp_path):
    args = online.Args(seeds=2, online_steps=600, runs_dir=str(tmp_path), output=str(tmp_path))
    made = dict(hardware=dict(cores=2, cpu="a processor"), versions=dict(torch="2"), git_commit="abc")
    kept = dict(eval_episodes=50, balanced_sampling=True, utd_ratio=1, learning_starts=100, kl_budget=0.5)
    kept |= dict(online_steps=600)
    made |= dict(resumed=[dict(git_commit="abc"), dict(git_commit="def")])
    for seed in range(2):
        for setting, flag, _ in online.STUDY:
            offline = [] if "clone" in setting.name else [("offline", 200_000, 0.3)]
            curve = [("bc", 9, 0.1), *offline, ("online", 300, 0.5), ("online", 600, 0.7 + 0.2 * seed)]
            run = write_run(tmp_path / f"{setting.name}-seed{seed}", setting.script, seed, curve, **kept)
            (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | made))
            with open(run / "train.csv", "w", newline="") as file:
                table = csv.writer(file)
                keys = ["trust_region/path_kl", "trust_region/lambda", "charts/environment_SPS", "charts/update_SPS"]
                table.writerow(["stage", "step", *keys])
                table.writerow(["offline", 200_000, 9.0, 2.0, "", ""])
                for step in (100, 200, 300, 400, 500, 600):  # only collecting at first, so nothing is known of the KL
                    table.writerow(["online", step, *((step / 100, 3.0) if step > 100 else ("", "")), 800.0, 15.0])
            assert online.finished(run, "online", 600)
            with pytest.raises(common.UserError, match="600 online steps, not 700"):
                online.finished(run, "online", 700)
    assert not online.finished(tmp_path / "missing", "offline", None)
    rows = online.summarise(args)
    assert [(row["step"], row["path_kl"]) for row in rows[-2:]] == [(300, 2.5), (600, 5.0)]
    assert rows[-1]["environment_SPS"] == 800 and rows[-1]["commits"] == "abc def"
    table = online.as_table(rows)
    heads = "cloned | before going online | 300 steps online | 600 steps online | mean of 1, after 300 | path KL, last"
    cells = "0.50 ± 0.00 | 0.80 ± 0.10 | 0.80 ± 0.10 | 5.00 ± 0.00 |"
    assert f"| | {heads} |" in table
    assert f"| TRQAM | 0.10 ± 0.00 | 0.30 ± 0.00 | {cells}" in table
    assert f"| TRQAM, from the clone alone | 0.10 ± 0.00 |  | {cells}" in table
    (tmp_path / "trqam-online-seed0" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "trqam-online-seed0" / "config.json").read_text())
        | dict(dataset=dict(origin="path", sha256="0" * 64, files=["a.npz"], dataset="cube", transitions=9)))
    )  # fmt: skip
    figure = online.draw(args)
    success, kl, lam = figure.axes
    assert list(success.lines[0].get_xdata()) == [-200_000, 0, 300, 600]
    assert {line.get_label() for line in kl.lines} >= {setting.label for setting, *_ in online.STUDY} | {"budget"}


def test_a_study_starts_its_runs_as_the_command_line_does(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(common, "run_script", lambda *words: started.append((*words, sys.argv)))
    monkeypatch.setattr(sys, "argv", [])
    assert mechanism.train(online.STUDY[0][0], 3, tmp_path / "run", ["--checkpoint", "x.pt"]) == ""
    script, words = trqam_online, ["--checkpoint", "x.pt", "--seed", "3", "--run-dir", str(tmp_path / "run")]
    expected = script.main, script.Args, script.settings, "trqam_online", "trqam_offline", ["trqam_online.py", *words]
    assert started == [expected]


def test_kill_resume_finds_every_difference(tmp_path):
    """Of two finished runs that are equal but for one number, one row or one byte; the clock's columns do not count."""
    for name in ("whole", "resumed"):
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        (tmp_path / name / "data").mkdir()
        (tmp_path / name / "data" / "x.npz").write_bytes(b"rows")
        (run / "replay.bin").write_bytes(b"rows")
        weights = {"net.0.weight": torch.arange(3.0), "lam": torch.tensor(1.0)}
        state = dict(step=9, seconds=name, args=dict(resume=name), agent=weights, rows={"train.csv": 1})
        for file in ("checkpoint.pt", "checkpoint_previous.pt", "bc_checkpoint.pt"):
            torch.save(state, run / file)
        (run / "train.csv").write_text(f"stage,step,charts/SPS,losses/bc_loss\nbc,9,{len(name)},0.5\n")
        (run / "eval.csv").write_text("stage,step,success\nbc,9,0.5\n")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert kill_resume.differences(whole, resumed) == []
    state["agent"]["lam"] += 1e-7
    torch.save(state, resumed / "run" / "checkpoint.pt")
    (resumed / "run" / "checkpoint_previous.pt").unlink()
    (resumed / "run" / "train.csv").write_text("stage,step,charts/SPS,losses/bc_loss\nbc,9,1,0.5\nbc,9,1,0.5\n")
    (resumed / "run" / "eval.csv").write_text("stage,step,success\nbc,9,0.6\n")
    (resumed / "run" / "replay.bin").write_bytes(b"row")
    assert kill_resume.differences(whole, resumed) == [
        "checkpoint.pt/agent/lam", "checkpoint_previous.pt", "train.csv", "eval.csv", "run/replay.bin",
    ]  # fmt: skip


def test_soak_counts_a_process_and_its_workers():
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    waits = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()  # it has started
        found = soak.sample(os.getpid())
        child.stdin.close()
    assert found["workers"] >= 1 and found["memory_mib"] > 50 and found["worker_memory_mib"] > 1
    assert found["files"] >= 3 and found["worker_files"] >= 3
