"""Bad input, given to the scripts as processes: one line that names the culprit and the way out, a non-zero exit, no
traceback, and a file system that is as it was."""

import hashlib
import itertools
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_runs import ANTMAZE, ENV, SCRIPTS, TINY_FOR, Hostile, saved

import common

ROOT = Path(__file__).resolve().parent.parent
FINISHED = {}  # script -> folder of a finished run of it


def script_in_this_process(script, words, folder):
    """`python script.py words` in `folder`, in a worker process whose imports are done."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder.with_name(f"{folder.name}.{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.update(HOME=str(folder), XDG_CACHE_HOME=str(folder), MPLCONFIGDIR=str(folder))
    sys.argv = [f"{script}.py", *words]
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


def run(script, folder, *words):
    """(exit status, what it printed, what it printed as errors) of a script."""
    process = common.process_context().Process(
        target=script_in_this_process, args=(script, [str(word) for word in words], folder)
    )
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        pytest.fail(f"{script}.py {words} did not end")
    outputs = (folder.with_name(f"{folder.name}.{name}").read_text() for name in ("stdout", "stderr"))
    return process.exitcode, *outputs


def contents(folder):
    """Path -> time and hash of all files, and all folders, below a folder."""
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session", autouse=True)
def finished(dataset, tmp_path_factory):
    """A finished run of each script."""
    folder = tmp_path_factory.mktemp("finished")
    for script in SCRIPTS:
        flags = [*TINY_FOR[script], "--bc-steps", 2, "--offline-steps", 2, "--eval-episodes", 1]
        flags += ["--dataset-path", dataset, "--run-dir", script]
        assert run(script, folder, *flags)[0] == 0
        FINISHED[script] = folder / script


def run_of(script, folder, **files):
    """A copy of a finished run, in `folder`, with some of its files given other content (None: removed)."""
    target = shutil.copytree(FINISHED[script], folder / "run")
    for name, content in files.items():
        path = target / name.replace("__", ".")
        path.unlink() if content is None else path.write_bytes(content(path.read_bytes()))
    return target


def other_than(script):
    """The next of the scripts."""
    names = [*SCRIPTS]
    return names[(names.index(script) + 1) % len(names)]


def only_offline(script):
    """Flags by which a run of a script would be its offline stage alone."""
    return [] if script == "trqam_offline" else ["--online-steps", 0]


def half(content):
    return content[: len(content) // 2]


def flipped(content):
    """With one bit of a large array changed."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]


def changed(path, change):
    """A checkpoint of ours, with something changed in it."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


def edited(script, folder, change):
    """A copy of a finished run, with something changed in its checkpoint; without the one before it."""
    run = run_of(script, folder, checkpoint_previous__pt=None)
    changed(run / "checkpoint.pt", change)
    return run


def compressed(path):
    """A checkpoint with its parts deflated."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def bomb(folder, dataset):
    """Zeros that a small file holds 1,000 times over."""
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in np.load(dataset).items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.zeros((10**8, 2), bool) if key == "qpos" else array)
    return folder / "bomb.npz"


def boast(folder, dataset):
    """A header that declares a terabyte which is not there."""
    np.savez(folder / "boast.npz", **np.load(dataset))
    content = (folder / "boast.npz").read_bytes()
    (folder / "boast.npz").write_bytes(
        content.replace(b"'shape': (2002, 2), }       ", b"'shape': (99999999999, 2), }")
    )
    return folder / "boast.npz"


def hostile(path):
    """A pickle that would make a file, where a checkpoint is expected."""
    path.write_bytes(pickle.dumps(Hostile(os.system, "touch harmed")))
    return path


def written(path, content):
    """A file of that content."""
    path.write_bytes(content)
    return path


def of_trqam(tmp_path, **args):
    """A checkpoint.pt of trqam_offline.py with some settings changed; without any, parts are missing."""
    if args:
        return changed(
            run_of("trqam_offline", tmp_path) / "checkpoint.pt", lambda c: c["args"].update(bc_steps=12, **args)
        )
    torch.save(dict(kind="trqam_offline", sizes={}, args=args, agent={}), tmp_path / "trqam.pt")
    return tmp_path / "trqam.pt"


def broken(tmp_path, dataset, **changes):
    """A copy of the dataset with arrays replaced, or removed (None)."""
    arrays = {**np.load(dataset), **changes}
    np.savez(tmp_path / "broken.npz", **{key: array for key, array in arrays.items() if array is not None})
    return tmp_path / "broken.npz"


def not_finite(dataset):
    observations = np.load(dataset)["observations"]
    observations[77, 1] = np.nan
    return observations


BAD = {  # case -> (flags, as a function of (tmp_path, dataset), words that the one line must hold)
    "unknown environment": (lambda t, d: ["--env-id", "scene-play-singletask-task9-v0"], ["--env-id", "did you mean"]),
    "environment without a task": (lambda t, d: ["--env-id", "scene-play-v0"], ["--env-id", "did you mean"]),
    "unknown flag": (lambda t, d: ["--num-criticss", "1"], ["--num-criticss", "did you mean --num-critics"]),
    "no number": (lambda t, d: ["--rho", "much"], ["--rho", "much"]),
    "unknown preset": (lambda t, d: ["quickly"], ["quickly", "quick"]),
    "no dataset": (lambda t, d: ["--dataset-path", t / "none.npz"], ["--dataset-path", "none.npz", "does not exist"]),
    "empty folder": (lambda t, d: ["--dataset-path", t], ["--dataset-path", "holds no .npz"]),
    "not npz": (lambda t, d: ["--dataset-path", __file__], ["test_bad_input.py", "cannot be read"]),
    "missing key": (lambda t, d: ["--dataset-path", broken(t, d, qpos=None)], ["broken.npz", "has no qpos"]),
    "wrong dimensions": (
        lambda t, d: ["--dataset-path", broken(t, d, actions=np.zeros((2002, 5)))],
        ["broken.npz", "actions", "(2002, 5)", "(2002, 2)"],
    ),
    "other states": (
        lambda t, d: ["--dataset-path", broken(t, d, qpos=np.zeros((2002, 9)))],
        ["qpos", "(2002, 9)", "(2002, 2)"],
    ),
    "a folder for a file": (
        lambda t, d: [(t / "folder.npz" / "x.npz").mkdir(parents=True), "--dataset-path", t / "folder.npz"][1:],
        ["x.npz", "cannot be read"],
    ),
    "dataset folder is a file": (
        lambda t, d: ["--dataset-path", "", "--collect-episodes", 1, "--dataset-dir", d],
        ["--dataset-dir", "name another folder"],
    ),
    "run folder is a file": (lambda t, d: ["--run-dir", d], ["--run-dir", "name another folder"]),
    "run folder in a file": (lambda t, d: ["--run-dir", d / "run"], ["--run-dir", "name another folder"]),
    "checkpoint is a folder": (lambda t, d: ["--bc-checkpoint", t], ["--bc-checkpoint", "not a checkpoint"]),
    "rows missing": (lambda t, d: ["--dataset-path", broken(t, d, actions=np.zeros((99, 2)))], ["actions", "(99, 2)"]),
    "pickled": (
        lambda t, d: ["--dataset-path", broken(t, d, actions=np.array([{}] * 2002, dtype=object))],
        ["broken.npz", "cannot be read"],
    ),
    "not finite": (
        lambda t, d: ["--dataset-path", broken(t, d, observations=not_finite(d))],
        ["broken.npz", "observations", "finite"],
    ),
    "shorter than a chunk": (lambda t, d: ["--chunk-length", 2001], ["2000 transitions", "2001"]),
    "batch too large": (lambda t, d: ["--batch-size", 2001], ["--batch-size 2001", "2000"]),
    "no oracle": (
        lambda t, d: ["--env-id", ANTMAZE, "--dataset-path", "", "--collect-episodes", 5],
        ["no oracle", "antmaze-large-navigate-v0.npz", "--dataset-path"],
    ),
    "resume what": (lambda t, d: ["--resume"], ["--resume", "--run-dir"]),
    "nothing to resume": (lambda t, d: ["--resume", "--run-dir", t / "nowhere"], ["--resume", "nowhere", "no run"]),
    "no checkpoint": (lambda t, d: ["--bc-checkpoint", t / "no.pt"], ["--bc-checkpoint", "no.pt", "does not exist"]),
    "foreign checkpoint": (lambda t, d: ["--bc-checkpoint", d], ["--bc-checkpoint", "damaged or not a checkpoint"]),
    "other width": (
        lambda t, d: ["--bc-checkpoint", saved(t, hidden_dims=(32, 32))],
        ["--bc-checkpoint", "(32, 32)", "(16, 16)"],
    ),
    "other domain": (
        lambda t, d: ["--bc-checkpoint", saved(t, domain="scene-play")],
        ["domain scene-play", "domain pointmaze-medium-navigate"],
    ),
    "other chunk": (lambda t, d: ["--bc-checkpoint", saved(t, chunk_length=5)], ["chunk_length 5", "chunk_length 4"]),
    "wrong maze": (
        lambda t, d: ["--env-id", ENV.replace("medium", "large")],
        ["collected as pointmaze-medium-navigate-v0", "needs pointmaze-large-navigate-v0"],
    ),
    "seed too large": (lambda t, d: ["--seed", 2**64], ["--seed", "at most"]),
    "more batch than collected": (
        lambda t, d: ["--dataset-path", "", "--collect-episodes", 1, "--batch-size", 5000, "--dataset-dir", t / "data"],
        ["--batch-size", "1000 transitions"],
    ),
    "no flow": (lambda t, d: ["--flow-steps", 0], ["--flow-steps", "greater than 0"]),
    "gamma above 1": (lambda t, d: ["--gamma", 1.1], ["--gamma", "at most 1"]),
    "no width": (lambda t, d: ["--hidden-dims", 16, 0], ["--hidden-dims", "greater than 0"]),
    "evaluate what": (lambda t, d: ["--eval-only"], ["--eval-only", "--checkpoint"]),
}
NO_START = {"checkpoint for what": (lambda t, d: ["--checkpoint", d], ["--eval-only", "--checkpoint"])}
BAD_TRQAM = {  # the same, for scripts with a trust region
    "no budget": (lambda t, d: ["--kl-budget", 0], ["--kl-budget", "greater than 0"]),
    "budget not a number": (lambda t, d: ["--kl-budget", "nan"], ["--kl-budget", "greater than 0"]),
    "bracket reversed": (lambda t, d: ["--lambda-min", 3, "--lambda-max", 2], ["--lambda-min", "--lambda-max", "swap"]),
    "endless lambda": (lambda t, d: ["--lambda-max", "nan"], ["--lambda-max", "greater than 0"]),
}
BAD_ONLINE = {  # for scripts with an online stage
    "steps below 0": (lambda t, d: ["--online-steps", -1], ["--online-steps", "0 or greater"]),
    "no update": (
        lambda t, d: ["--online-steps", 9, "--learning-starts", 9],
        ["--learning-starts 9", "--online-steps 9"],
    ),
    "no chunk to balance with": (
        lambda t, d: ["--online-steps", 9, "--learning-starts", 3, "--balanced-sampling"],
        ["--learning-starts 3", "--balanced-sampling", "4"],
    ),
    "endless": (lambda t, d: ["--online-steps", 10**18], ["--online-steps", "at most 1,000,000,000"]),
    "no ratio": (lambda t, d: ["--utd-ratio", 0], ["--utd-ratio", "greater than 0"]),
    "half a ratio": (lambda t, d: ["--utd-ratio", 0.5], ["--utd-ratio", "0.5"]),
}
BAD_FOR = {
    "trqam_offline": BAD_TRQAM | NO_START,
    "trqam_online": BAD_TRQAM
    | BAD_ONLINE
    | {
        "online budget below 0": (lambda t, d: ["--kl-budget-online", -1], ["--kl-budget-online", "0 or greater"]),
        "two starts": (
            lambda t, d: ["--checkpoint", of_trqam(t), "--bc-checkpoint", saved(t)],
            ["--checkpoint", "--bc-checkpoint", "leave out"],
        ),
        "resuming with half of what was collected": (
            lambda t, d: ["--resume", "--run-dir", run_of("trqam_online", t, replay__bin=half)],
            ["--resume", "replay.bin is damaged or missing"],
        ),
        "resuming without what was collected": (
            lambda t, d: ["--resume", "--run-dir", run_of("trqam_online", t, replay__bin=None)],
            ["--resume", "replay.bin is damaged or missing"],
        ),
        "resuming more than was collected": (
            lambda t, d: ["--resume", "--run-dir", edited("trqam_online", t, lambda c: c["replay"].update(size=10**9))],
            ["--resume", "replay.bin is damaged or missing"],
        ),
        "resuming a report that is none": (
            lambda t, d: [
                "--resume",
                "--run-dir",
                edited(
                    "trqam_online", t, lambda c: c["environment"].update(last_episode={"charts/online_return": "x"})
                ),
            ],
            ["--resume", "checkpoint.pt is damaged", "last_episode"],
        ),
        "resuming an episode that cannot be played": (
            lambda t, d: [
                "--resume",
                "--run-dir",
                edited("trqam_online", t, lambda c: c["environment"].update(actions=torch.zeros(3, 9))),
            ],
            ["--resume", "do not fit this run's networks or environment"],
        ),
        "a checkpoint that is none": (
            lambda t, d: ["--checkpoint", d],
            ["--checkpoint", "damaged or not a checkpoint"],
        ),
        "a checkpoint that is not there": (lambda t, d: ["--checkpoint", t / "no.pt"], ["no.pt does not exist"]),
        "a cloned policy where a checkpoint belongs": (
            lambda t, d: ["--checkpoint", saved(t)],
            ["--checkpoint", "is a bc checkpoint", "one of trqam_offline is needed"],
        ),
        "a checkpoint with parts missing": (
            lambda t, d: ["--checkpoint", of_trqam(t)],
            ["--checkpoint", "lacks", "damaged"],
        ),
        "a checkpoint of another task": (
            lambda t, d: ["--checkpoint", of_trqam(t, env_id=ENV.replace("task1", "task2"))],
            ["--checkpoint", "has --env-id", "task2", "task1"],
        ),
        "a checkpoint of other sizes": (
            lambda t, d: ["--checkpoint", of_trqam(t, num_critics=3)],
            ["--checkpoint", "has --num-critics 3, which 2 cannot replace"],
        ),
    },
    "qam_baseline": BAD_ONLINE
    | NO_START
    | {
        "no temperature": (lambda t, d: ["--inverse-temperature", 0], ["--inverse-temperature", "greater than 0"]),
        "edits below 0": (lambda t, d: ["--edit-scale", -0.1], ["--edit-scale", "between 0 and 1", "-0.1"]),
        "edits above 1": (lambda t, d: ["--edit-scale", 1.5], ["--edit-scale", "between 0 and 1", "1.5"]),
        "edits not a number": (lambda t, d: ["--edit-scale", "nan"], ["--edit-scale", "between 0 and 1"]),
        "resuming a chunk of another length": (
            lambda t, d: [
                "--resume",
                "--run-dir",
                edited("qam_baseline", t, lambda c: c["environment"].update(chunk=torch.zeros(3, 1))),
            ],
            ["--resume", "do not fit this run's networks or environment"],
        ),
        "resuming an episode that is none": (
            lambda t, d: [
                "--resume",
                "--run-dir",
                edited("qam_baseline", t, lambda c: c["environment"].update(episode="two")),
            ],
            ["--resume", "checkpoint.pt is damaged", "no counts"],
        ),
        "another algorithm's checkpoint as prior": (
            lambda t, d: ["--bc-checkpoint", of_trqam(t)],
            ["--bc-checkpoint", "is a trqam_offline checkpoint", "one of bc is needed"],
        ),
        "another algorithm's checkpoint to evaluate": (
            lambda t, d: ["--eval-only", "--checkpoint", of_trqam(t)],
            ["--checkpoint", "is a trqam_offline checkpoint", "one of qam_baseline is needed"],
        ),
    },
}

MORE = {  # the same, for every script, and, as a third thing, the script that it is
    "no value": (lambda t, d, s: ["--rho"], ["--rho"]),
    "half a step": (lambda t, d, s: ["--bc-steps", 1.5], ["--bc-steps", "1.5"]),
    "unknown device": (lambda t, d, s: ["--device", "tpu"], ["--device", "tpu"]),
    "unknown mode": (lambda t, d, s: ["--compile", "maybe"], ["--compile", "maybe"]),
    "two presets": (lambda t, d, s: ["quick", "full"], ["full"]),
    "endless rate": (lambda t, d, s: ["--learning-rate", "inf"], ["--learning-rate", "greater than 0"]),
    "rate not a number": (lambda t, d, s: ["--learning-rate", "nan"], ["--learning-rate", "greater than 0"]),
    "no rate of targets": (lambda t, d, s: ["--tau", 0], ["--tau", "greater than 0"]),
    "no episodes": (lambda t, d, s: ["--eval-episodes", 0], ["--eval-episodes", "greater than 0"]),
    "no batch": (lambda t, d, s: ["--batch-size", 0], ["--batch-size", "greater than 0"]),
    "no critics": (lambda t, d, s: ["--num-critics", -1], ["--num-critics", "greater than 0"]),
    "no samples": (lambda t, d, s: ["--best-of-n", 0], ["--best-of-n", "greater than 0"]),
    "offline steps below 0": (lambda t, d, s: ["--offline-steps", -5], ["--offline-steps", "0 or greater"]),
    "endless steps": (lambda t, d, s: ["--bc-steps", 10**15], ["--bc-steps", "at most 1,000,000,000"]),
    "seed below 0": (lambda t, d, s: ["--seed", -1], ["--seed", "0 or greater"]),
    "memory below 0": (lambda t, d, s: ["--max-data-gb", -1], ["--max-data-gb", "0 or greater"]),
    "more threads than cores": (lambda t, d, s: ["--num-threads", 10**6], ["--num-threads", "at most"]),
    "run folder with files": (
        lambda t, d, s: [(t / "full").mkdir(), written(t / "full" / "x", b""), "--run-dir", t / "full"][2:],
        ["--run-dir", "full is not empty", "name another folder"],
    ),
    "run folder of a name too long": (lambda t, d, s: ["--run-dir", t / ("x" * 300)], ["File name too long"]),
    "run folder where none can be": (lambda t, d, s: ["--run-dir", "/proc/run"], ["--run-dir", "cannot be made"]),
    "only a validation file": (
        lambda t, d, s: [written(t / "x-val.npz", d.read_bytes()), "--dataset-path", t][1:],
        ["--dataset-path", "holds no .npz"],
    ),
    "empty file": (lambda t, d, s: ["--dataset-path", written(t / "x.npz", b"")], ["x.npz", "cannot be read"]),
    "half a dataset": (
        lambda t, d, s: ["--dataset-path", written(t / "x.npz", half(d.read_bytes()))],
        ["x.npz", "cannot be read", "fetch or collect it again"],
    ),
    "a flipped bit in the dataset": (
        lambda t, d, s: ["--dataset-path", written(t / "x.npz", flipped(d.read_bytes()))],
        ["x.npz", "cannot be read", "fetch or collect it again"],
    ),
    "a bomb": (lambda t, d, s: ["--dataset-path", bomb(t, d)], ["bomb.npz", "it would unpack to", "times its size"]),
    "a boast": (lambda t, d, s: ["--dataset-path", boast(t, d)], ["boast.npz", "declares 799,999,999,992 bytes"]),
    "names for numbers": (
        lambda t, d, s: ["--dataset-path", broken(t, d, actions=np.full((2002, 2), "left"))],
        ["broken.npz", "actions", "not finite numbers"],
    ),
    "no rows": (
        lambda t, d, s: ["--dataset-path", broken(t, d, **{k: v[:0] for k, v in np.load(d).items()})],
        ["broken.npz", "no row"],
    ),
    "no table": (lambda t, d, s: ["--dataset-path", broken(t, d, observations=np.float32(3))], ["observations", "()"]),
    "half a prior": (
        lambda t, d, s: ["--bc-checkpoint", written(t / "x.pt", half(saved(t).read_bytes()))],
        ["--bc-checkpoint", "x.pt is damaged or not a checkpoint"],
    ),
    "a flipped bit in the prior": (
        lambda t, d, s: ["--bc-checkpoint", written(t / "x.pt", flipped(saved(t).read_bytes()))],
        ["--bc-checkpoint", "x.pt is damaged or not a checkpoint", "checksum"],
    ),
    "a prior that is not finite": (
        lambda t, d, s: ["--bc-checkpoint", changed(saved(t), lambda c: c["actor_slow"]["net.0.bias"].fill_(np.nan))],
        ["--bc-checkpoint", "bc.pt", "net.0.bias", "not finite"],
    ),
    "a prior that lacks a layer": (
        lambda t, d, s: ["--bc-checkpoint", changed(saved(t), lambda c: c["actor_slow"].pop("net.0.bias"))],
        ["--bc-checkpoint", "bc.pt", "do not fit"],
    ),
    "a prior of another shape": (
        lambda t, d, s: [
            "--bc-checkpoint", changed(saved(t), lambda c: c["actor_slow"].update({"net.0.bias": torch.zeros(3)})),
        ],
        ["--bc-checkpoint", "bc.pt", "do not fit"],
    ),
    "a prior that is text": (lambda t, d, s: ["--bc-checkpoint", __file__], ["--bc-checkpoint", "not a checkpoint"]),
    "a hostile prior": (lambda t, d, s: ["--bc-checkpoint", hostile(t / "x.pt")], ["--bc-checkpoint", "x.pt"]),
    "a hostile prior in the authors' name": (
        lambda t, d, s: ["--bc-checkpoint", hostile(t / "params_1.pkl")],
        ["--bc-checkpoint", "params_1.pkl", "posix.system"],
    ),
    "evaluating a prior": (
        lambda t, d, s: ["--eval-only", "--checkpoint", saved(t)],
        ["--checkpoint", "is a bc checkpoint", "one of "],
    ),
    "evaluating half a checkpoint": (
        lambda t, d, s: ["--eval-only", "--checkpoint", run_of(s, t, checkpoint__pt=half) / "checkpoint.pt"],
        ["--checkpoint", "damaged or not a checkpoint"],
    ),
    "evaluating another script's": (
        lambda t, d, s: ["--eval-only", "--checkpoint", run_of(other_than(s), t) / "checkpoint.pt"],
        ["--checkpoint", "checkpoint, but one of"],
    ),
    "evaluating what is not finite": (
        lambda t, d, s: [
            "--eval-only", "--checkpoint",
            changed(run_of(s, t) / "checkpoint.pt", lambda c: c["agent"]["critic.kernels.0"].fill_(np.inf)),
        ],
        ["--checkpoint", "critic.kernels.0", "not finite"],
    ),
    "resuming from a checkpoint of wrong types": (
        lambda t, d, s: ["--resume", "--run-dir", edited(s, t, lambda c: c.update(agent=[1, 2]))],
        ["--resume", "checkpoint.pt", "its agent is of a wrong type"],
    ),
    "resuming from a step below 0": (
        lambda t, d, s: ["--resume", "--run-dir", edited(s, t, lambda c: c.update(step=-5))],
        ["--resume", "checkpoint.pt is damaged", "no counts"],
    ),
    "resuming from a checkpoint of another run": (
        lambda t, d, s: ["--resume", "--run-dir", edited(s, t, lambda c: c["sizes"].update(chunk_length=5))],
        ["--resume", "checkpoint.pt has chunk_length 5", "this run has chunk_length 4"],
    ),
    "resuming weights of another shape": (
        lambda t, d, s: ["--resume", "--run-dir", edited(s, t, lambda c: c["agent"].update(
            {name: torch.zeros(3) for name in c["agent"]}
        ))],
        ["--resume", "do not fit this run's networks"],
    ),
    "resuming an optimizer that is none": (
        lambda t, d, s: ["--resume", "--run-dir", edited(s, t, lambda c: c.update(optimizer={}))],
        ["--resume", "checkpoint.pt is damaged", "lacks", "state"],
    ),
    "resuming moments of another shape": (  # which torch would write past
        lambda t, d, s: ["--resume", "--run-dir", edited(
            s, t, lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(1))
        )],
        ["--resume", "do not fit this run's networks"],
    ),
    "resuming tables anywhere": (
        lambda t, d, s: ["--resume", "--run-dir", edited(s, t, lambda c: c["rows"].update({str(t / "new.csv"): -1}))],
        ["--resume", "checkpoint.pt is damaged", "other tables"],
    ),
    "resuming weights that are not dense": (
        lambda t, d, s: ["--resume", "--run-dir", edited(
            s, t, lambda c: c["agent"].update({"critic.kernels.0": torch.eye(3).to_sparse()})
        )],
        ["--resume", "critic.kernels.0", "no plain float32 tensor"],
    ),
    "resuming with other settings than the checkpoint's": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(
            s, t, config__json=lambda c: c.replace(b'"bc_steps": 2', b'"bc_steps": 9')
        )],
        ["config.json is damaged", "--bc-steps 9", "checkpoint 2"],
    ),
    "resuming a mode that is none": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(
            s, t, config__json=lambda c: c.replace(b'"compile": "off"', b'"compile": "maybe"')
        )],
        ["--compile must be one of", "not maybe"],
    ),
    "resuming a history that is none": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(
            s, t, config__json=lambda c: c.replace(b"{", b'{"resumed": 5,', 1)
        )],
        ["--resume", "config.json is damaged", "history"],
    ),
    "resuming a table with words": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t, train__csv=lambda c: c.replace(b"0.", b"x", 1))],
        ["train.csv is damaged", "another folder"],
    ),
    "critics beyond all numbers": (lambda t, d, s: ["--num-critics", 10**400], ["--num-critics", "at most 10,000"]),
    "resuming noise that is none": (
        lambda t, d, s: ["--resume", "--run-dir", edited(s, t, lambda c: c.update(generator=torch.zeros(3)))],
        ["--resume", "do not fit this run's networks"],
    ),
    "a weight that is larger than its file": (
        lambda t, d, s: ["--resume", "--run-dir", edited(s, t, lambda c: c["agent"].update(
            {"critic.kernels.0": torch.zeros(1).expand(10**12)}
        ))],
        ["--resume", "checkpoint.pt", "critic.kernels.0", "no plain float32 tensor"],
    ),
    "a checkpoint with lines for a name": (
        lambda t, d, s: [
            "--eval-only", "--checkpoint", edited(s, t, lambda c: c.update(kind="a\nb")) / "checkpoint.pt",
        ],
        ["--checkpoint", "is a a b checkpoint"],
    ),
    "a compressed prior": (
        lambda t, d, s: ["--bc-checkpoint", compressed(saved(t))],
        ["--bc-checkpoint", "bc.pt", "it is compressed"],
    ),
    "resuming with rows missing": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t, eval__csv=lambda c: c[: c.index(b"\n") + 1])],
        ["eval.csv is damaged", "another folder"],
    ),
    "resuming with words for numbers": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t, eval__csv=lambda c: c.replace(b",0.", b",none"))],
        ["eval.csv is damaged", "another folder"],
    ),
    "resuming with settings of wrong types": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t, config__json=lambda c: c.replace(
            b'"batch_size": 8', b'"batch_size": "many"'
        ))],
        ["--resume", "'batch_size' as 'many'"],
    ),
    "resuming with settings without end": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t, config__json=lambda c: b"[" * 200_000)],
        ["--resume", "config.json is damaged"],
    ),
    "a pipe for a dataset": (
        lambda t, d, s: [os.mkfifo(t / "x.npz"), "--dataset-path", t / "x.npz"][1:],
        ["x.npz", "it is no file"],
    ),
    "a pipe for a prior": (
        lambda t, d, s: [os.mkfifo(t / "x.pt"), "--bc-checkpoint", t / "x.pt"][1:],
        ["--bc-checkpoint", "x.pt", "it is no file"],
    ),
    "bytes in another order": (
        lambda t, d, s: [
            "--dataset-path", broken(t, d, observations=np.load(d)["observations"].astype(">f4")), "--batch-size", 2001,
        ],
        ["--batch-size 2001"],  # read as well as any
    ),
    "numbers too large to hold": (
        lambda t, d, s: ["--dataset-path", broken(t, d, observations=np.full((2002, 2), 1e300))],
        ["broken.npz", "observations", "finite"],
    ),
    "a home that is none": (lambda t, d, s: ["--run-dir", "~no-such-user/x"], ["~", "write it out"]),
    "lines in a path": (lambda t, d, s: ["--dataset-path", "a\nb.npz"], ["--dataset-path", "a b.npz"]),
    "bytes in a path": (lambda t, d, s: ["--run-dir", "x\udcff"], ["--run-dir", "no text"]),
    "endless episodes": (lambda t, d, s: ["--eval-episodes", 10**9], ["--eval-episodes", "at most 100,000"]),
    "endless samples": (lambda t, d, s: ["--best-of-n", 10**9], ["--best-of-n", "at most 100,000"]),
    "endless critics": (lambda t, d, s: ["--num-critics", 10**30], ["--num-critics", "at most 10,000"]),
    "endless width": (lambda t, d, s: ["--hidden-dims", 16, 10**19], ["--hidden-dims", "at most 1,000,000"]),
    "endless flow": (lambda t, d, s: ["--flow-steps", 10**9], ["--flow-steps", "at most 10,000"]),
    "endless collecting": (lambda t, d, s: ["--collect-episodes", 10**12], ["--collect-episodes", "at most 1,000,000"]),
    "a rate beyond all": (lambda t, d, s: ["--learning-rate", 1e300], ["--learning-rate", "at most 1,000,000,000"]),
    "resuming another script's run": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(other_than(s), t)],
        ["--resume", "is one of", ".py, not of"],
    ),
    "resuming with another setting": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t), "--num-critics", 3],
        ["--resume", "--num-critics", "leave that flag out"],
    ),
    "resuming on other data": (
        lambda t, d, s: [
            "--resume", "--run-dir", run_of(s, t), "--dataset-path",
            broken(t, d, **{key: array[1001:] for key, array in np.load(d).items()}),
        ],
        ["--resume", "the run began on", "1,000 transitions"],
    ),
    "resuming where the data is gone": (
        lambda t, d, s: [
            "--resume", "--run-dir", run_of(s, t, config__json=lambda c: c.replace(b".npz", b"-gone.npz")),
        ],
        ["--dataset-path", "-gone.npz does not exist"],
    ),
    "resuming with a damaged log": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t, train__csv=lambda c: c + b"\xff\xfe")],
        ["train.csv is damaged", "another folder"],
    ),
    "resuming without settings": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t, config__json=None)],
        ["--resume", "no run (no config.json)"],
    ),
    "resuming with damaged settings": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t, config__json=half)],
        ["--resume", "config.json is damaged"],
    ),
    "resuming from half a checkpoint": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t, checkpoint__pt=half)],
        ["checkpoint.pt is damaged", "checkpoint_previous.pt, of step", "is whole", "rename it"],
    ),
    "resuming from a flipped bit": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t, checkpoint__pt=flipped)],
        ["checkpoint.pt is damaged", "checksum", "checkpoint_previous.pt, of step"],
    ),
    "resuming with both damaged": (
        lambda t, d, s: [
            "--resume", "--run-dir", run_of(s, t, checkpoint__pt=half, checkpoint_previous__pt=half),
        ],
        ["checkpoint.pt is damaged", "use another"],
    ),
    "resuming with fewer steps": (
        lambda t, d, s: ["--resume", "--run-dir", run_of(s, t), "--offline-steps", 0, *only_offline(s)],
        ["--resume: the run has done", "ask for at least as many"],
    ),
}  # fmt: skip
COMMON = {case: (lambda t, d, s, flags=flags: flags(t, d), words) for case, (flags, words) in BAD.items()} | MORE
CASES = [*zip(itertools.cycle(SCRIPTS), COMMON)]  # what reads them is the same for all, so the scripts take turns
CASES += [(script, case) for script in SCRIPTS for case in BAD_FOR[script]]


@pytest.mark.parametrize("script, case", CASES)
def test_bad_input_is_one_line_before_anything_is_written(script, case, dataset, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    flags, words = COMMON[case] if case in COMMON else BAD_FOR[script][case]
    flags = flags(folder, dataset, script) if case in COMMON else flags(folder, dataset)
    before, data_before = contents(folder), contents(dataset.parent)
    given = (
        [] if "--resume" in flags[:1] or "--eval-only" in flags[:1] else [*TINY_FOR[script], "--dataset-path", dataset]
    )
    status, said, errors = run(script, folder, *given, *flags)
    assert status == 1 and said == ""
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert all(str(word) in errors for word in words), errors
    assert contents(folder) == before and contents(dataset.parent) == data_before


def test_a_run_in_a_locked_folder_is_refused(dataset, tmp_path):
    (tmp_path / "here").mkdir()
    folder = run_of("trqam_offline", tmp_path / "here")
    before = contents(folder)
    with open(folder / ".lock", "a") as lock:
        common.fcntl.flock(lock, common.fcntl.LOCK_EX)
        status, _, errors = run("trqam_offline", tmp_path / "here", "--resume", "--run-dir", folder)
    assert status == 1 and "another process is running" in errors and errors.count("\n") == 1
    assert contents(folder) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_started_by_hand_says_the_same(script, tmp_path):
    command = [sys.executable, str(ROOT / f"{script}.py"), "--env-id", "scene-ply-singletask-v0"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.splitlines() == [
        "error: --env-id: unknown environment 'scene-ply-singletask-v0'; did you mean 'scene-play-singletask-v0'?"
    ]
    assert not list(tmp_path.iterdir())
