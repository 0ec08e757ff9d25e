"""What surrounds a run must not break or bend it: variables of other programs, terminals, pipes,
temporary folders, shared machines, and programs that call `main` as a function."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from test_runs import ENV, TINY, start

import common
import trqam_offline

SHORT = [*TINY, "--bc-steps", "4", "--offline-steps", "4", "--eval-episodes", "1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(words, cwd=None, **variables):
    """A finished process, with environment variables set."""
    return subprocess.run(
        words, cwd=cwd, env=os.environ | variables, capture_output=True, text=True
    )


def test_a_program_without_a_guard_in_a_hostile_environment_trains(dataset, tmp_path):
    """Its own lines run once, and not in each worker; a long TMPDIR, an ASCII terminal, files
    of the current folder that are named like Python's modules, and what other programs set for
    MuJoCo, Matplotlib and Python change nothing; PYTHONPATH is kept."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "queue.py").write_text("raise SystemExit('not of Python')")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "of_the_user.py").write_text("")
    (tmp_path / ("t" * 90)).mkdir()
    settings = dict(
        env_id=ENV,
        dataset_path=str(dataset),
        run_dir=str(tmp_path / "run"),
        hidden_dims=(16,),
        num_critics=2,
        flow_steps=3,
        batch_size=8,
        bc_steps=4,
        offline_steps=4,
        eval_episodes=2,
        num_threads=1,
    )
    program = tmp_path / "own.py"
    program.write_text(
        "import of_the_user, trqam_offline\nprint('own line')\n"
        f"trqam_offline.main(trqam_offline.Args(**{settings!r}))\n"
    )
    said = run(
        [sys.executable, str(program)],
        cwd=tmp_path / "here",
        PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{ROOT}",
        TMPDIR=str(tmp_path / ("t" * 90)),
        PYTHONIOENCODING="ascii",
        MUJOCO_GL="nonsense",
        MPLBACKEND="nonsense",
        PYTHONWARNINGS="error::DeprecationWarning:none",
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("own line") == 1 and "minutes; curve" in said.stdout
    assert (tmp_path / "run" / "learning_curve.png").exists()


def test_workers_get_the_users_pythonpath(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with common.worker_context():
        assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(tmp_path)]
    assert os.environ["PYTHONPATH"] == str(tmp_path)


def test_a_closed_pipe_is_told_as_one(dataset, tmp_path):
    """As after `| head -1`."""
    words = [sys.executable, "-u", trqam_offline.__file__, *SHORT, "--dataset-path", str(dataset)]
    words += ["--run-dir", str(tmp_path / "run")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(words, **pipes) as process:
        assert process.stdout.readline().startswith("run: ")
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and "Traceback" not in said and "mend" not in said
    assert "error: what reads this program's output has ended" in said


def test_without_a_home_the_flag_that_needs_one_is_named(dataset, tmp_path, monkeypatch):
    def homeless(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", homeless)
    flags = [*SHORT, "--run-dir", tmp_path / "run"]
    said = start(trqam_offline, monkeypatch, *flags)
    assert "--dataset-dir" in said and "home directory" in said and not (tmp_path / "run").exists()
    trqam_offline.Args(dataset_path=str(dataset)).check()  # which does not use that folder


def test_the_output_of_a_process_without_a_terminal_at_all(tmp_path):
    words = f"{sys.executable} {trqam_offline.__file__} --env-id nonsense >&- 2>&-"
    assert subprocess.run(["bash", "-c", words]).returncode == 1


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert common.cores() == 1


def test_evaluation_takes_no_more_processes_than_memory_has_room_for(monkeypatch):
    started = []

    class Vector:
        def __init__(self, makers, **_):
            started.append(len(makers))

    monkeypatch.setattr(gymnasium.vector, "AsyncVectorEnv", Vector)
    monkeypatch.setattr(common, "cores", lambda: 64)
    for memory in (2**29, 3 * 2**30, 2**40):
        monkeypatch.setattr(common, "total_memory", lambda memory=memory: memory)
        common.Evaluator(ENV, 1, episodes=50, seed=0, noise_dim=1)
    assert started == [1, 3, 50] and common.total_memory() == 2**40


def test_a_wait_for_another_processs_lock_is_said(tmp_path, monkeypatch, capsys):
    first = common.lock_file(tmp_path / "x.lock", wait=True)
    calls, flock = [], common.fcntl.flock

    def unlock_then(file, how):
        calls.append(how)
        if len(calls) == 2:
            first.close()
        return flock(file, how)

    monkeypatch.setattr(common.fcntl, "flock", unlock_then)
    common.lock_file(tmp_path / "x.lock", wait=True).close()
    assert f"waiting for another process, which holds {tmp_path}/x.lock" in capsys.readouterr().out


def test_workers_that_cannot_start_are_told_before_anything_is_written(dataset, monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(common.multiprocessing, "get_context", lambda *_: Broken())
    said = start(trqam_offline, monkeypatch, *SHORT, "--dataset-path", dataset, "--run-dir", "run")
    assert "worker processes cannot be started" in said and not Path("run").exists()


def test_a_disk_without_room_for_checkpoints_is_told_first(dataset, monkeypatch):
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    said = start(trqam_offline, monkeypatch, *SHORT, "--dataset-path", dataset, "--run-dir", "run")
    assert "no room for two checkpoints" in said and not Path("run").exists()


def test_another_number_of_rows_is_not_called_official(dataset, tmp_path):
    name = "pointmaze-medium-navigate-v0"
    (tmp_path / f"{name}.npz").write_bytes(dataset.read_bytes())
    _, info = common.load_dataset(ENV, chunk_length=1, gamma=1.0, dataset_dir=str(tmp_path))
    assert info["origin"] == "path" and "official" not in common.describe_dataset(info)


def test_a_smaller_set_than_the_published_one_says_so():
    info = dict(origin="path", files=["x.npz"], dataset="cube-triple-play-v0", sha256="0" * 64)
    info |= dict(transitions=3_000_000, published_transitions=10_000_000)
    assert "published results of the domain: 10,000,000" in common.describe_dataset(info)
    info |= dict(transitions=10_000_000)
    assert "published" not in common.describe_dataset(info)


def test_rewards_that_are_not_used_and_missing_ends_are_said(dataset, tmp_path, capsys):
    arrays = dict(np.load(dataset))
    arrays |= dict(rewards=np.ones(2002), terminals=np.zeros(2002, bool))
    np.savez(tmp_path / "x.npz", **arrays)
    common.load_dataset(ENV, chunk_length=1, gamma=1.0, dataset_path=str(tmp_path / "x.npz"))
    said = capsys.readouterr().out
    assert "rewards and masks in" in said and "not used" in said and "marks no end" in said


def test_files_that_are_never_read_cannot_make_a_dataset_fail(dataset, tmp_path):
    (tmp_path / dataset.name).write_bytes(dataset.read_bytes())
    (tmp_path / f"{dataset.stem}-val.npz").write_bytes(b"damaged")
    (tmp_path / "notes.json").write_text("{")
    data, info = common.load_dataset(ENV, chunk_length=1, gamma=1.0, dataset_path=str(tmp_path))
    assert data.size == 2000 and torch.isfinite(data.rewards).all() and info["origin"] == "path"


@pytest.mark.parametrize("device", ["mps", "cuda:x", "gpu"])
def test_devices_that_are_not_supported_are_refused_by_name(device):
    with pytest.raises(common.UserError, match=device):
        trqam_offline.Args(device=device).check()


def test_a_script_that_git_does_not_hold_makes_the_commit_one_with_changes(tmp_path, monkeypatch):
    """And so does a tree that differs from its commit; outside a checkout there is none."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert common.git_commit() is None
    (tmp_path / "common.py").write_text("")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    clean = common.git_commit()
    assert len(clean) == 40
    for variant in (str(tmp_path / "trqam_const.py"), "a notebook"):
        assert common.git_commit(variant) == f"{clean}+changes"
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook of another repository
    assert common.git_commit() == clean
    (tmp_path / "common.py").write_text("changed")
    assert common.git_commit() == f"{clean}+changes"


def test_a_folder_of_files_is_one_dataset_or_refused(dataset, tmp_path, capsys):
    other = "pointmaze-large-navigate-v0.npz"  # by its name, of another maze
    load = functools.partial(
        common.load_dataset, ENV, chunk_length=1, gamma=1.0, dataset_path=str(tmp_path)
    )
    (tmp_path / other).write_bytes(dataset.read_bytes())
    (tmp_path / "._x.npz").write_bytes(b"of a file manager")
    load()
    assert f"{other} has the name of another dataset" in capsys.readouterr().out
    (tmp_path / "twice.npz").write_bytes(dataset.read_bytes())
    with pytest.raises(common.UserError, match="holds a file twice"):
        load()
    (tmp_path / "twice.npz").unlink()
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(common.UserError, match="pipe.npz is no file"):
        load()
    (tmp_path / "pipe.npz").unlink()
    made = dict(dataset=other.removesuffix(".npz"), sha256=common.file_hash(dataset))
    (tmp_path / other).with_suffix(".json").write_text(json.dumps(made))
    with pytest.raises(common.UserError, match="was collected as pointmaze-large"):
        load()


def test_collected_data_in_a_folder_that_is_only_read(dataset, monkeypatch):
    monkeypatch.setattr(common, "make_folder", None)
    name = "pointmaze-medium-navigate-v0"
    assert common.collect_dataset(name, 2, 0, str(dataset.parent)) == dataset


def test_a_worker_that_is_killed_is_told_as_one():
    evaluator = common.Evaluator(ENV, 20, episodes=2, seed=0, noise_dim=1)

    def policy(observation, noise):
        evaluator.envs.processes[1].kill()
        return torch.zeros(len(observation), 40)

    with pytest.raises(common.UserError, match="a worker process has ended"):
        evaluator.evaluate(policy)
    evaluator.close(at_once=True)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def without(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(common.fcntl, "flock", without)
    common.lock_file(tmp_path / "x.lock", wait=False).close()
    assert f"{tmp_path} is on a file system without locks" in capsys.readouterr().out


def test_limits_of_this_processs_control_group_and_those_above(tmp_path, monkeypatch):
    files = {
        "/proc/self/cgroup": "1:cpu:/old\n0::/job/step\n",
        "/sys/fs/cgroup/memory.max": "max",
        "/sys/fs/cgroup/job/memory.max": f"{2**32}",
        "/sys/fs/cgroup/job/step/memory.max": "max",
        "/sys/fs/cgroup/job/step/cpu.max": "150000 100000",
    }
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert common.total_memory() == 2**32 and common.cores() == 2


def test_a_picture_that_cannot_be_drawn_is_told_and_settings_of_matplotlib_count_not(
    dataset, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "$a_b$" / "x.npz"
    path.parent.mkdir()
    path.write_bytes(dataset.read_bytes())
    with matplotlib.rc_context({"text.usetex": True, "savefig.format": "pdf"}):
        flags = [*SHORT, "--dataset-path", path]
        assert start(trqam_offline, monkeypatch, *flags, "--run-dir", "run") is None
    assert Path("run/learning_curve.png").read_bytes()[1:4] == b"PNG"
    monkeypatch.setattr(common.Run, "draw", lambda run: 1 / 0)
    assert start(trqam_offline, monkeypatch, *flags, "--run-dir", "other") is None
    said = capsys.readouterr().out
    assert "learning curve could not be drawn (division by zero)" in said and "minutes;" in said


def test_each_run_is_one_of_weights_and_biases(dataset, monkeypatch):
    calls = []

    class Wandb:
        id = "an-id"

        def init(self, **words):
            calls.append(words["id"])
            if not words["id"] and len(calls) > 3:
                raise RuntimeError("No API key configured")
            return self

        def finish(self, exit_code):
            calls.append(exit_code)

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: True)
    flags = [*SHORT, "--dataset-path", dataset, "--track", "--run-dir"]
    assert start(trqam_offline, monkeypatch, *flags, "run") is None
    assert start(trqam_offline, monkeypatch, "--resume", "--track", "--run-dir", "run") is None
    assert calls == [None, 0, "an-id", 0]
    assert "try `wandb login`" in start(trqam_offline, monkeypatch, *flags, "other")


def test_actions_are_scaled_once_where_a_task_scales_its_own(monkeypatch):
    monkeypatch.setattr(common, "TASKS", {})
    rows = dict(observations=np.zeros((2, 3)), next_observations=np.zeros((2, 3)))
    rows |= dict(rewards=np.ones(2), terminated=[False, True], truncated=[False, False])
    for wrap, actions in ((lambda env: gymnasium.wrappers.RescaleAction(env, -1, 1), 0.5),
                          (lambda env: env, 1.0)):  # Pendulum's are in [-2, 2]
        make = lambda wrap=wrap, **words: wrap(gymnasium.make("Pendulum-v1", **words))
        load = lambda actions=actions: rows | dict(actions=np.full((2, 1), actions))
        common.register_task("own-v0", make, load)
        data, _ = common.load_dataset("own-v0", chunk_length=1, gamma=1.0)
        assert data.actions[0] == pytest.approx(0.5)
    common.register_task("own-v0", make, lambda: rows | dict(actions=np.ones((2, 2))))
    with pytest.raises(common.UserError, match="low and high|actions have 2 numbers"):
        common.load_dataset("own-v0", chunk_length=1, gamma=1.0)


def test_a_resumed_optimizer_has_the_learning_rate_it_had():
    weights = [torch.nn.Parameter(torch.ones(2))]
    state = torch.optim.Adam(weights, lr=0.5).state_dict()
    for resumes, rate in ((True, 0.5), (False, 0.1)):
        optimizer = torch.optim.Adam(weights, lr=0.1)
        common.restore_state(optimizer, state, resumes)
        assert optimizer.param_groups[0]["lr"] == rate


def test_success_that_is_told_only_where_there_is_some(monkeypatch):
    evaluator = object.__new__(common.Evaluator)
    evaluator.seeds, evaluator.envs = [0, 1, 2, 3], type("", (), {"num_envs": 4})
    success = np.array([np.nan, 1.0, np.nan, np.nan])
    monkeypatch.setattr(evaluator, "play", lambda *_: np.stack([success, success * 0 + 1, success]))
    assert evaluator.evaluate(None)["success"] == 0.25


@pytest.mark.parametrize("env_id", [ENV, "cube-single-play-singletask-task2-v0"])
def test_films_of_each_kind_of_environment(env_id, tmp_path, monkeypatch):
    """Without a renderer: its pictures are empty."""
    monkeypatch.setenv("DISPLAY", "none")
    make = common.make_env

    def without_renderer(*words, **settings):
        env = make(*words, **settings)
        monkeypatch.setattr(type(env.unwrapped), "render", lambda _: np.zeros((9, 9, 3), np.uint8))
        return env

    monkeypatch.setattr(common, "make_env", without_renderer)
    (size,) = make(env_id).action_space.shape
    chunks = np.zeros((3, 2 * size), np.float32)
    common.film_here(env_id, None, 2, [(5, chunks), (6, chunks)], tmp_path, "x")
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"x-episode-0.mp4", "x-episode-1.mp4"}


def test_a_callers_signal_handlers_come_back(dataset, monkeypatch):
    monkeypatch.setattr(common.Run, "finish", lambda run, policy: None)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    flags = [*SHORT, "--dataset-path", dataset, "--run-dir", "run"]
    assert start(trqam_offline, monkeypatch, *flags) is None
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


def test_a_folder_that_another_run_has_had_meanwhile_is_refused(dataset, monkeypatch):
    load = common.load_dataset

    def and_another(*words, **settings):
        Path("run").mkdir()
        Path("run/checkpoint.pt").write_text("another's")
        return load(*words, **settings)

    monkeypatch.setattr(common, "load_dataset", and_another)
    flags = [*SHORT, "--dataset-path", dataset, "--run-dir", "run"]
    assert "is not empty" in start(trqam_offline, monkeypatch, *flags)
    assert Path("run/checkpoint.pt").read_text() == "another's"


def test_the_data_needs_torch_and_numpy_alone():
    """OGBench and Gymnasium are imported where they are used."""
    program = """import sys
        sys.modules |= dict.fromkeys(["ogbench", "gymnasium", "mujoco"])
        import common, trqam_offline
        words = dict(low=-1, high=1, chunk_length=1, gamma=0.9)
        steps = [[0.0]], [[0.5]], [1.0], [[1.0]], [True], [False]
        print(common.ChunkDataset.from_transitions(*steps, **words).size)"""
    program = program.replace("\n        ", "\n")
    said = run([sys.executable, "-c", program], PYTHONPATH=str(ROOT))
    assert said.stdout == "1\n", said.stderr
