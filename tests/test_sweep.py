"""Sweeps on a cluster of two simulated nodes, whose driver, worker and node die in the middle."""

import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")
if sys.platform != "linux":
    pytest.skip("processes are found in /proc", allow_module_level=True)
os.environ |= dict(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")  # not behind all others

import sweep
import torch
from ray.cluster_utils import Cluster
from test_runs import ENV, TINY, differences, rows, start

import common
import qam_baseline
import trqam_offline

DOMAIN = common.domain_of(ENV)
PRIOR, TRQAM, QAM = f"{DOMAIN}/prior/seed0", f"{ENV}/trqam/seed0", f"{ENV}/qam/seed0"
OTHERS, BAD = f"{ENV}/others/seed0", f"{ENV}/bad/seed0"
FLAGS = [*TINY, *"--bc-steps 120 --offline-steps 120 --eval-interval 120 --eval-episodes 1".split()]
PATIENCE = 300  # seconds for what takes a few, on a machine that does much else


def wait_for(what, driver=None):
    """What a function gives once that is true."""
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end and (not driver or driver.poll() is None)
        time.sleep(0.05)
    return found


def of_process(number, key):
    """An entry of /proc/NUMBER/status; "" where there is no such process."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{number}/status").read_text().splitlines()
        return next(line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return ""


def halt(folder, stage, step, driver):
    """Halts a run's process in the middle of a stage -> its number."""

    def reached():
        with contextlib.suppress(OSError, ValueError, KeyError):
            return any(row["stage"] == stage and int(row["step"]) >= step
                       for row in rows(folder / "train.csv"))

    wait_for(reached, driver)
    word = f"--run-dir\0{folder}\0".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGSTOP)
                return int(path.parent.name)
    raise AssertionError(f"no process runs in {folder}")


def leaves(nested):
    """All tensors in nested dicts."""
    if isinstance(nested, dict):
        return [x for value in nested.values() for x in leaves(value)]
    return [nested] if isinstance(nested, torch.Tensor) else []


def begin(cluster, flags, folder, *arms):
    """A sweep in a process of its own; what it prints goes to FOLDER.out."""
    command = [sys.executable, sweep.__file__, "--tasks", ENV, "--folder", folder]
    command += ["--address", cluster.address, "--poll-seconds", "0.2", "--arms", "trqam", "qam"]
    command = [*map(str, [*command, *arms]), f"--flags={' '.join(map(str, flags))}"]
    with open(f"{folder}.out", "w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def cluster():
    soon = dict(health_check_initial_delay_ms=0, health_check_period_ms=500,
                health_check_failure_threshold=6)
    head = dict(num_cpus=0, include_dashboard=False, object_store_memory=10**8,
                _system_config=soon)
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.workers = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    yield cluster
    cluster.shutdown()


def test_driver_worker_and_node_die_and_runs_end_as_if_left_alone(
    cluster, dataset, tmp_path, monkeypatch, capsys
):
    flags, root = [*FLAGS, "--dataset-path", dataset], tmp_path / "sweep"
    out = tmp_path / "sweep.out"
    (root / OTHERS).mkdir(parents=True)
    (root / OTHERS / "config.json").write_text(json.dumps(dict(args=dict(kl_budget=9.0))))
    more = ["others=trqam_offline.py", "bad=trqam_offline.py --lambda-min 5 --lambda-max 1"]

    driver = begin(cluster, flags, root, *more)
    process = halt(root / PRIOR, "bc", 30, driver)
    driver.send_signal(signal.SIGTERM)
    wait_for(lambda: "stopping: " in out.read_text(), driver)
    os.kill(process, signal.SIGCONT)
    driver.wait(PATIENCE)
    assert "stopped; the same command goes on" in out.read_text()
    stopped_at = torch.load(root / PRIOR / "checkpoint.pt", weights_only=True)["done"]["bc"]
    assert 30 <= stopped_at < 120 and not of_process(process, "State")

    driver = begin(cluster, flags, root, *more)
    process = halt(root / TRQAM, "offline", 30, driver)
    os.kill(int(of_process(process, "PPid")), signal.SIGKILL)  # its worker
    wait_for(lambda: of_process(process, "State") in ("", "Z"))  # takes it along
    process = halt(root / QAM, "offline", 30, driver)
    raylet = int(of_process(of_process(process, "PPid"), "PPid"))
    [node] = [node for node in cluster.workers
              if node.all_processes["raylet"][0].process.pid == raylet]
    cluster.remove_node(node, allow_graceful=False)
    wait_for(lambda: of_process(process, "State") in ("", "Z"))
    driver.wait(PATIENCE)
    said = out.read_text()
    assert driver.returncode == 1 and "error: 2 runs failed" in said
    assert f"failed: {OTHERS}: it was made with --kl-budget 9.0, not 1.0" in said
    assert f"failed: {BAD}: error: --lambda-min is above --lambda-max" in said
    assert f"{TRQAM}: finished" in said and f"{QAM}: finished" in said
    assert f"{TRQAM}: offline 120: success" in said

    own = flags, "--env-id", ENV, "--seed", 0
    clone = ["--bc-checkpoint", root / PRIOR / "bc_checkpoint.pt"]
    for name, script, extra, middle in (
        (PRIOR, trqam_offline, ["--offline-steps", 0], dict(bc=stopped_at)),
        (TRQAM, trqam_offline, clone, None),
        (QAM, qam_baseline, clone, None),
    ):
        alone = tmp_path / Path(name).parent.name
        assert start(script, monkeypatch, *own[0], *own[1:], *extra, "--run-dir", alone) is None
        assert differences(alone, root / name) == []
        sittings = json.loads((root / name / "config.json").read_text())["sittings"]
        assert len(sittings) == 2 and not sittings[0]["began_at"]
        assert sittings[1]["began_at"] == middle or 0 < sittings[1]["began_at"]["offline"] < 120
        assert (root / f"{name}.log").read_text().count("minutes; curve") == 1

    monkeypatch.setattr(sweep, "connect", None)
    args = sweep.Args(tasks=(ENV,), arms=("trqam", "qam"), folder=root, flags=" ".join(
        map(str, flags)))
    sweep.main(args)  # runs nothing
    assert "3 runs are finished, 0 to go" in capsys.readouterr().out
    state = torch.load(root / TRQAM / "checkpoint.pt", weights_only=True)["state"]
    clone = torch.load(root / PRIOR / "bc_checkpoint.pt", weights_only=True)["state"]
    sizes = [sum(x.nbytes for x in leaves(part)) for part in (state["agent"], state["optimizer"])]
    expected = 2 * sum(sizes) + sum(x.nbytes for x in leaves(clone))
    assert sweep.gigabytes(sweep.runs_of(args)[TRQAM]) * 1e9 == pytest.approx(expected, rel=0.01)



def test_the_papers_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "gigabytes", lambda run: 0.5)
    args = sweep.Args(paper=True, plan=True, updates_per_second=200.0, folder=tmp_path)
    sweep.main(args)
    said = capsys.readouterr().out
    assert "1,200 runs: prior 80, trqam 400, qam 400, qam-e 320" in said
    assert "not run beside it, in scene-play, cube-double-play" in said
    # 1,120 fine-tunings of a million updates, 80 clonings of 300,000
    assert "width 512: 654,400,000 updates" in said and "width 1024: 489,600,000 updates" in said
    assert f"in all {(1120 + 24) * 1e6 / 200 / 3600:,.1f} GPU hours at 200 updates/s" in said
    assert "disk: 600.0 GB" in said and not any(tmp_path.iterdir())
    tasks = tuple(f"{x}-singletask-task3-v0" for x in ("puzzle-4x4-play", "cube-triple-play"))
    arms = "qam-e", "low=qam_baseline.py --inverse-temperature 0.5"
    args = sweep.Args(tasks=tasks, arms=arms, seeds=2, gpus_per_run=0.5, flags="--bc-steps 7")
    runs = sweep.runs_of(args)
    assert [*runs][:3] == ["puzzle-4x4-play/prior/seed0", *(f"{tasks[0]}/{x}/seed0" for x in
                                                            ("qam-e", "low"))]
    edits, low, triple = (runs[f"{task}/{arm}/seed1"] for task, arm in (
        (tasks[0], "qam-e"), (tasks[0], "low"), (tasks[1], "qam-e")))
    strength = lambda run: (run.args.inverse_temperature, run.args.edit_scale)
    assert [*map(strength, (edits, low, triple))] == [(0.1, 0.9), (0.5, 0.0), (3.0, 0.1)]
    assert edits.args.env_id == tasks[0] and edits.args.seed == 1 and edits.args.device == "cuda"
    assert edits.steps == [0, 1_000_000, 0] and runs[edits.prior].steps == [7, 0, 0]
    for arm, words in (("best", "'best' is none of trqam"), ("x=y.py", "there is no .*y.py")):
        with pytest.raises(common.UserError, match=words):
            sweep.runs_of(sweep.Args(tasks=tasks, arms=(arm,)))


def test_a_script_waits_for_a_lock_is_not_run_twice_and_a_signal_is_no_failure(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep.time, "sleep", lambda _, sleep=time.sleep: sleep(0.01))
    lines = """import os, pathlib, sys
        folder, count = pathlib.Path(sys.argv[2]), pathlib.Path("count")
        count.open("a").write("x")
        if len(count.read_text()) == 1:
            sys.exit("error: --run-dir: another process is running in x; wait for it")
        if len(count.read_text()) == 2:
            os.kill(os.getpid(), 15)
        folder.mkdir()"""
    (tmp_path / "script.py").write_text(lines.replace("\n        ", "\n"))
    words = tmp_path / "a" / "run", [str(tmp_path / "script.py")], [], "[1, 2, 3]", str(tmp_path)
    with pytest.raises(ChildProcessError):
        sweep.train(*words)
    for _ in range(2):
        assert sweep.train(*words) == "" and (tmp_path / "count").read_text() == "xxx"
    assert sweep.train(*words, "error") == sweep.CLONE_FAILED
    assert sweep.LOCKED in inspect.getsource(common.lock_file)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(common.UserError, match="pip install ray"):
        sweep.connect(sweep.Args())
