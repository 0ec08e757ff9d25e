"""What the benchmarks change in a script, and what they make of runs."""

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
import trqam_offline
import trqam_online

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import compare
import kill_resume
import soak
import variant_qam
import variant_trqam

B, S, A = 64, 3, 2
ARGS = qam_baseline.Args(hidden_dims=(16, 16), num_critics=2, flow_steps=4, chunk_length=1)
PENALISED = dataclasses.replace(ARGS, inverse_temperature=20.0, learning_rate=1e-2)
POINTMAZE = "pointmaze-medium-navigate-singletask-task1-v0"
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
    losses = torch.compile(losses, fullgraph=True, backend="eager", disable=not compiled)
    noises = [qam_baseline.draw_noise(B, A, args, generator) for _ in range(updates)]
    update = lambda noise: qam_baseline.update(agent, optimizer, batch, noise, args, losses)
    return agent, [update(noise) for noise in noises]


def test_an_update_with_the_external_penalty_can_be_compiled(script):
    variant_qam.penalise(budget=0.01)
    torch.testing.assert_close(train(5, PENALISED, compiled=True)[1], train(5, PENALISED)[1])


def test_the_external_penalty_holds_the_kl_at_its_budget(script):
    mean = lambda key: np.mean([float(row[f"trust_region/{key}"]) for row in rows[-100:]])
    _, rows = train(300, PENALISED)
    assert mean("path_kl") > 0.5  # far over that budget, without the penalty
    variant_qam.penalise(budget=0.2)
    agent, rows = train(600, PENALISED)
    assert rows[0]["trust_region/penalty"] == 0  # the KL starts below its budget
    assert mean("penalty") > 1 and 0.15 < mean("path_kl") < 0.25
    assert agent.state_dict()["penalty"] == rows[-1]["trust_region/penalty"]  # in checkpoints


def test_a_variants_settings_reach_the_algorithm(script, dataset, monkeypatch):
    called = []
    for changed in (variant_trqam, variant_qam):
        monkeypatch.setattr(common, "load_dataset", common.load_dataset)
        monkeypatch.setattr(trqam_offline, "lean_adjoint", trqam_offline.lean_adjoint)
        monkeypatch.setattr(changed.script, "main", called.append)
        load, where = common.load_dataset, dict(chunk_length=1, gamma=1, dataset_path=str(dataset))
        own = dict(reward_scale=10.0)
        own |= {"adjoint_after_step": True} if changed is variant_trqam else {"penalty_budget": 1.0}
        changed.main(args := changed.Args(**own))
        assert called[-1] is args
        rewards = common.load_dataset(POINTMAZE, **where)[0].rewards
        assert torch.equal(rewards, 10 * load(POINTMAZE, **where)[0].rewards)
    xs, terminal = torch.randn(4, B, A), torch.randn(B, A)
    base = lambda s, x, t: t * x**2
    adjoints = trqam_offline.lean_adjoint(base, None, xs, terminal)
    assert torch.equal(adjoints[:-1], qam_baseline.lean_adjoint(base, None, xs, terminal)[1:])
    assert torch.equal(adjoints[-1], terminal)
    assert hasattr(script.Agent(S, A, ARGS), "penalty")


def write_run(folder, script, seed, curve, train=({},), sha256="0" * 64, commits=("abc",), **args):
    """The files of a run, as the benchmarks read them. curve: (stage, step, success)."""
    folder.mkdir()
    args = dict(env_id=TASK, seed=seed, eval_episodes=50, offline_steps=200_000, bc_steps=9) | args
    dataset = dict(origin="path", sha256=sha256, files=["a.npz"], dataset="cube", transitions=9)
    sittings, hardware = [dict(git_commit=x) for x in commits], dict(cores=2, cpu="a processor")
    config = dict(script=script, args=args, dataset=dataset, hardware=hardware, sittings=sittings)
    (folder / "config.json").write_text(json.dumps(config | dict(versions=dict(torch="2"))))
    evals = [dict(stage=a, step=b, success=c, success_stderr=0.05) for a, b, c in curve]
    for name, rows in (("eval.csv", evals), ("train.csv", train)):
        lines = [",".join(rows[-1]), *(",".join(f"{x.get(k, '')}" for k in rows[-1]) for x in rows)]
        (folder / name).write_text("\n".join([*lines, ""]))
    return folder


def test_runs_are_pooled_by_script_and_settings_and_drawn_with_their_intervals(tmp_path, capsys):
    def run(script, seed=0, end=0.3, **args):
        curve = [("bc", 9, 0.1), ("offline", 200_000, end), ("online", 500, 0.7)]
        folder = tmp_path / f"{len(os.listdir(tmp_path))}"
        return write_run(folder, script, seed, curve[: 2 + ("online_steps" in args)], **args)

    def table(*runs):
        compare.main(compare.Args(runs=runs, output=tmp_path / "figure.png"))
        rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if TASK in line]
        return {row[1]: " | ".join(row[2:])[:-2] for row in rows}

    ends, qam = (0.4, 0.6, 0.8), dict(inverse_temperature=3.0, edit_scale=0.0)
    three = [run("qam_baseline", seed, ends[seed], run_dir=f"{seed}", **qam) for seed in range(3)]
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
    base = "TRQAM, budget 0.5"
    for other, labels in (
        (dict(tf32=False), {base}),  # a switch that the first is older than
        (dict(tf32=True), {f"{base}, tf32 off", f"{base}, tf32 True"}),
        (dict(tau=0.5), {f"{base}, tau off", f"{base}, tau 0.5"}),
        (dict(sha256="1" * 64), {f"{base}, data {digit * 12}" for digit in "01"}),
    ):
        assert table(trqam, run("trqam_offline", 1, kl_budget=0.5, **other)).keys() == labels
    assert table(trqam, run("trqam_const", 1)).keys() == {base, "trqam_const"}
    for runs, words in (((trqam, trqam), "second run"), ((tmp_path / "nowhere",), "is no run")):
        with pytest.raises(SystemExit, match=words):
            table(*runs)


def test_kill_resume_finds_every_difference(tmp_path):
    """Of two runs equal but for one number, row or byte; the clock and the paths do not count."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        clock, run, data = len(folder.name), folder / "run", folder / "data" / "x.npz"
        run.mkdir(parents=True)
        data.parent.mkdir()
        data.write_bytes(b"rows")
        state = dict(agent={"lam": torch.tensor(1.0)}, dataset={"rewards": torch.ones(3)})
        rows = {"train.csv": [{"step": 9, "charts/SPS": clock}, {"step": 10}]}
        content = dict(seconds=clock, args=dict(run_dir=f"{run}"), rows=rows, state=state)
        for name in ("checkpoint.pt", "checkpoint_previous.pt", "bc_checkpoint.pt"):
            torch.save(content, run / name)
        (run / "train.csv").write_text(f"stage,step,charts/SPS\nbc,9,{clock}\n")
        (run / "eval.csv").write_text("stage,step,success\nbc,9,0.5\n")
    assert kill_resume.differences(whole, resumed) == []
    state["agent"]["lam"] += 1e-7
    state["dataset"]["rewards"] = torch.ones(4)
    rows["train.csv"][1]["step"] = 11
    torch.save(content, run / "checkpoint.pt")
    (run / "checkpoint_previous.pt").unlink()
    (run / "train.csv").write_text("stage,step,charts/SPS\nbc,9,1\nbc,9,1\n")
    (run / "eval.csv").write_text("stage,step,success\nbc,9,0.6\n")
    data.write_bytes(b"row")
    newest = "rows/train.csv/1/step", "state/agent/lam", "state/dataset/rewards"
    others = "run/checkpoint_previous.pt", "run/train.csv", "run/eval.csv/0/success", "data/x.npz"
    expected = [*(f"run/checkpoint.pt/{name}" for name in newest), *others]
    assert kill_resume.differences(whole, resumed) == expected


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_soak_counts_a_process_and_its_workers():
    with subprocess.Popen(["sleep", "60"]) as child:
        found = soak.sample(os.getpid())
        child.kill()
    least = dict(workers=1, memory_mib=50, files=3, worker_memory_mib=0.1, worker_files=3)
    assert all(found[key] >= value for key, value in least.items())


def test_soak_measures_a_checkpoint_with_what_was_collected(monkeypatch):
    small = functools.partial(trqam_online.Args, hidden_dims=(8,), num_critics=2)
    monkeypatch.setattr(trqam_online, "Args", small)
    none, many = soak.checkpoint(0), soak.checkpoint(10_000)
    mib = (10_000 + 20) * 4 * (37 + 5 + 1 + 1) / 2**20  # 500 steps an episode, of cube-double
    assert many["file_mib"] - none["file_mib"] == pytest.approx(mib, rel=0.01)
