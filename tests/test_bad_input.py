"""Bad input, given to the scripts as processes: one line that names the culprit and the way out, a
non-zero exit, no traceback, and a file system that is as it was."""

import fcntl
import hashlib
import itertools
import os
import pickle
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import short_evaluations
import torch
from conftest import ROOT, SCRIPTS, scripts_with
from test_runs import ANTMAZE, ENV, Hostile, saved_clone, start, tiny

import common

FINISHED = {}  # script -> folder of a finished run of it


def script_in_this_process(script, words, folder):
    """`python script.py words` in `folder`, in a worker process whose imports are done."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(folder.with_name(f"{folder.name}.{name}"), flags), number)
    os.chdir(folder)
    os.environ.update(HOME=str(folder), XDG_CACHE_HOME=str(folder), MPLCONFIGDIR=str(folder))
    sys.argv = [f"{script}.py", *words]
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


def run(script, folder, *words):
    """(exit status, what it printed, what it printed as errors) of a script's process."""
    words = script.__name__, [str(word) for word in words], folder
    with common.worker_context() as context:
        process = context.Process(target=script_in_this_process, args=words)
        process.start()
    process.join(600)
    assert process.exitcode is not None, f"{words} did not end"
    outputs = (folder.with_name(f"{folder.name}.{x}").read_text() for x in ("stdout", "stderr"))
    return process.exitcode, *outputs


def contents(folder):
    """Path -> time and hash of all files, and all folders, below a folder."""
    return {
        path: path.is_file()
        and (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session", autouse=True)
def finished(dataset, tmp_path_factory):
    """A finished run of each script."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "draw", lambda run: None)
        patch.setattr(common, "make_chunked_env", short_evaluations.make_chunked_env)
        for script in SCRIPTS:
            short = ["--bc-steps", 2, "--offline-steps", 2, "--eval-episodes", 1]
            FINISHED[script] = folder / script.__name__
            words = [*tiny(script), *short, "--dataset-path", dataset, "--run-dir"]
            assert start(script, patch, *words, FINISHED[script]) is None


def copy_of(script, folder, **files):
    """A copy of a finished run with some files' content changed (None: removed), `.` written
    `__`."""
    target = shutil.copytree(FINISHED[script], folder / "run")
    for name, change in files.items():
        path = target / name.replace("__", ".")
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    return target


def changed(path, change):
    """A checkpoint of ours, with something changed in it."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


def resumed(change, **files):
    """Flags that resume a copy of a finished run, with something changed in its checkpoint."""

    def flags(t, d, s):
        folder = copy_of(s, t, checkpoint_previous__pt=None, **files)
        changed(folder / "checkpoint.pt", change)
        return ["--resume", "--run-dir", folder]

    return flags


def half(content):
    return content[: len(content) // 2]


def flipped(content):
    """With one bit of a large array changed."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def data(change):
    """Flags that name a copy of the dataset with arrays replaced, or removed (None)."""

    def flags(t, d, s):
        arrays = {**np.load(d)}
        arrays |= change(arrays) if callable(change) else change
        np.savez(t / "x.npz", **{key: array for key, array in arrays.items() if array is not None})
        return ["--dataset-path", t / "x.npz"]

    return flags


def clone(change=None, content=None, **args):
    """Flags that name a cloned policy with something changed in it, or in its bytes."""

    def flags(t, d, s):
        path = saved_clone(t, **args)
        if change:
            changed(path, change)
        if content:
            path.write_bytes(content(path.read_bytes()))
        return ["--bc-checkpoint", path]

    return flags


def boast(content):
    """A header that declares a terabyte which is not there."""
    return content.replace(b"'shape': (2002, 2), }       ", b"'shape': (99999999999, 2), }")


def newest(folder):
    return folder / "checkpoint.pt"


def other_than(script):
    return SCRIPTS[SCRIPTS.index(script) - 1]


def fifo(path):
    os.mkfifo(path)
    return path


NONE = torch.zeros(3)
HOSTILE = pickle.dumps(Hostile(os.system, "touch harmed"))
FLAGS = {  # a row a case: flags, and the words that the one line must hold
    "--env-id scene-play-singletask-task9-v0": "--env-id; did you mean",
    "--env-id scene-play-v0": "--env-id; did you mean",
    "--dataset-path none.npz": "--dataset-path; none.npz does not exist",
    "--dataset-path .": "--dataset-path; holds no .npz",
    "--dataset-path a\nb.npz": "--dataset-path; a b.npz",
    "--run-dir /proc/run": "--run-dir; name another folder",
    "--run-dir ~no-such-user/x": "--run-dir ; ~no-such-user; write another path",
    "--run-dir x\udcff": "--run-dir ; write another path",
    "--run-dir " + 300 * "x": "--run-dir; File name too long",
    "--bc-checkpoint .": "--bc-checkpoint; is no file",
    "--bc-checkpoint no.pt": "--bc-checkpoint; no.pt does not exist",
    f"--env-id {ANTMAZE} --collect-episodes 5 --dataset-path ": "no oracle; --dataset-path",
    f"--env-id {ENV.replace('medium', 'large')}": "collected as pointmaze-medium; pointmaze-large",
    "--resume": "--resume; --run-dir",
    "--resume --run-dir nowhere": "--resume; nowhere holds no run",
    "--eval-only": "--eval-only; --checkpoint",
    "--seed -1": "--seed; between 0 and",
    "--seed 18446744073709551616": "--seed; between 0 and",
    "--device tpu": "--device; cuda:N; tpu",
    "--device cuda:99": "--device cuda:99; --device cpu",
    "--num-threads 1000000": "--num-threads; number of cores",
    "--flow-steps 0": "--flow-steps; greater than 0",
    "--gamma 1.1": "--gamma; at most 1",
    "--tau 0": "--tau; greater than 0",
    "--hidden-dims 16 0": "--hidden-dims; greater than 0",
    "--hidden-dims 16 10000000000000000000": "--hidden-dims; at most 1,000,000,000",
    "--learning-rate inf": "--learning-rate; greater than 0",
    "--learning-rate nan": "--learning-rate; greater than 0",
    "--learning-rate 1e300": "--learning-rate; at most 1,000,000,000",
    "--eval-episodes 0": "--eval-episodes; greater than 0",
    "--batch-size 0": "--batch-size; greater than 0",
    "--batch-size 2001": "--batch-size 2001; 2000 transitions",
    "--chunk-length 2001": "chunk of length 2001; 1000 transitions",
    "--num-critics -1": "--num-critics; greater than 0",
    "--best-of-n 0": "--best-of-n; greater than 0",
    "--offline-steps -5": "--offline-steps; 0 or greater",
    "--bc-steps 1000000000000000": "--bc-steps; at most 1,000,000,000",
    "--collect-episodes 1 --batch-size 5000 --dataset-path ": "--batch-size; 1000 transitions",
}
WITH = {  # setting that the script must have -> the same
    "kl_budget": {
        "--kl-budget 0": "--kl-budget; greater than 0",
        "--kl-budget nan": "--kl-budget; greater than 0",
        "--lambda-min 3 --lambda-max 2": "--lambda-min; --lambda-max",
        "--lambda-max nan": "--lambda-max; greater than 0",
    },
    "online_steps": {
        "--online-steps -1": "--online-steps; 0 or greater",
        "--online-steps 9 --learning-starts 9": "--learning-starts; --online-steps",
        "--online-steps 9 --learning-starts 3 --balanced-sampling": "--balanced-sampling",
        "--utd-ratio 0": "--utd-ratio; greater than 0",
    },
    "kl_budget_online": {"--kl-budget-online -1": "--kl-budget-online; 0 or greater"},
    "edit_scale": {
        "--inverse-temperature 0": "--inverse-temperature; greater than 0",
        "--edit-scale -0.1": "--edit-scale; between 0 and 1; -0.1",
        "--edit-scale nan": "--edit-scale; between 0 and 1",
    },
}
FILES = {  # what stands in a file: flags as a function of (folder, dataset, script), the same words
    "not npz": (lambda t, d, s: ["--dataset-path", __file__], "test_bad_input.py; cannot be read"),
    "missing key": (data(dict(qpos=None)), "x.npz; has no qpos"),
    "wrong dimensions": (data(dict(actions=np.zeros((2002, 5)))), "actions; (2002, 5); (2002, 2)"),
    "other states": (data(dict(qpos=np.zeros((2002, 9)))), "qpos; (2002, 9); (2002, 2)"),
    "rows missing": (data(dict(actions=np.zeros((99, 2)))), "actions; (99, 2)"),
    "pickled": (data(dict(actions=np.array([{}] * 2002, dtype=object))), "x.npz; cannot be read"),
    "not finite": (data(dict(observations=np.full((2002, 2), np.nan))), "observations; finite"),
    "too large": (data(dict(observations=np.full((2002, 2), 1e300))), "observations; finite"),
    "names for numbers": (data(dict(actions=np.full((2002, 2), "left"))), "not finite numbers"),
    "actions beyond": (data(dict(actions=np.full((2002, 2), 1.5))), "actions; [-1, 1]"),
    "no rows": (data(lambda x: {key: array[:0] for key, array in x.items()}), "x.npz; (0,"),
    "no table": (data(dict(observations=np.float32(3))), "observations; ()"),
    "other byte order": (
        lambda t, d, s: [
            *data(lambda x: dict(observations=x["observations"].astype(">f4")))(t, d, s),
            "--batch-size", 2001,
        ],
        "--batch-size 2001",  # read as well as any
    ),
    **{
        f"dataset: {change.__name__}": (
            lambda t, d, s, change=change: [
                "--dataset-path", written(t / "x.npz", change(d.read_bytes()))
            ],
            "x.npz; cannot be read; fetch or collect it again",
        )
        for change in (half, flipped, boast, bytes)
        if change is not bytes
    },
    "empty file": (lambda t, d, s: ["--dataset-path", written(t / "x.npz", b"")], "cannot be read"),
    "validation alone": (
        lambda t, d, s: ["--dataset-path", written(t / "f" / "x-val.npz", d.read_bytes()).parent],
        "--dataset-path; holds no .npz",
    ),
    "a folder for data": (lambda t, d, s: [
        "--dataset-path", "", "--collect-episodes", 1, "--dataset-dir", d,
    ], "--dataset-dir; name another folder"),
    "a file for a run": (lambda t, d, s: ["--run-dir", d], "--run-dir; name another folder"),
    "a run in a file": (lambda t, d, s: ["--run-dir", d / "run"], "--run-dir; name another folder"),
    "a run beside files": (
        lambda t, d, s: ["--run-dir", written(t / "f" / "x", b"").parent],
        "--run-dir; not empty; name another folder",
    ),
    "a pipe for a prior": (lambda t, d, s: ["--bc-checkpoint", fifo(t / "x.pt")], "is no file"),
    "a foreign prior": (lambda t, d, s: ["--bc-checkpoint", d], "--bc-checkpoint; no checkpoint"),
    "a hostile prior": (
        lambda t, d, s: ["--bc-checkpoint", written(t / "x.pt", HOSTILE)], "x.pt; no checkpoint",
    ),
    "half a prior": (clone(content=half), "--bc-checkpoint; bc.pt is damaged"),
    "a flipped bit in it": (clone(content=flipped), "--bc-checkpoint; checksum"),
    "a prior of other width": (clone(hidden_dims=(32, 32)), "--bc-checkpoint; does not fit; [32"),
    "a prior of another chunk": (clone(chunk_length=5), "--bc-checkpoint; does not fit"),
    "a prior of another domain": (
        clone(lambda c: c.update(domain="scene-play")), "scene-play; pointmaze-medium-navigate",
    ),
    "a prior that is not finite": (
        clone(lambda c: c["state"]["net.0.bias"].fill_(np.nan)), "net.0.bias; not finite",
    ),
    "a prior that lacks a layer": (clone(lambda c: c["state"].pop("net.0.bias")), "does not fit"),
    "a run for a prior": (
        lambda t, d, s: ["--bc-checkpoint", copy_of(s, t) / "checkpoint.pt"], "one of 'bc'",
    ),
    "evaluating a prior": (
        lambda t, d, s: ["--eval-only", "--checkpoint", saved_clone(t)], "checkpoint of 'bc'",
    ),
    "evaluating another script's": (
        lambda t, d, s: ["--eval-only", "--checkpoint", newest(copy_of(other_than(s), t))],
        "--checkpoint; is needed",
    ),
    "evaluating what is not finite": (
        lambda t, d, s: ["--eval-only", "--checkpoint", changed(
            newest(copy_of(s, t)), lambda c: c["state"]["agent"]["critic.kernels.0"].fill_(np.inf)
        )],
        "critic.kernels.0; not finite",
    ),
    "resuming half": (
        lambda t, d, s: ["--resume", "--run-dir", copy_of(s, t, checkpoint__pt=half)],
        "checkpoint.pt is damaged; checkpoint_previous.pt is whole; rename it",
    ),
    "resuming a flipped bit": (
        lambda t, d, s: ["--resume", "--run-dir", copy_of(s, t, checkpoint__pt=flipped)],
        "checksum; checkpoint_previous.pt is whole",
    ),
    "resuming with both damaged": (
        lambda t, d, s: [
            "--resume", "--run-dir",
            copy_of(s, t, checkpoint__pt=half, checkpoint_previous__pt=half),
        ],
        "checkpoint.pt is damaged; use another",
    ),
    "resuming another script's": (
        lambda t, d, s: ["--resume", "--run-dir", copy_of(other_than(s), t)], "is needed",
    ),
    "resuming and evaluating": (
        lambda t, d, s: ["--resume", "--run-dir", copy_of(s, t), "--eval-only"], "leave one out",
    ),
    "resuming from no user's home": (
        lambda t, d, s: ["--resume", "--run-dir", "~no-such-user/x"], "--run-dir; ~no-such-user",
    ),
    "resuming with another setting": (
        lambda t, d, s: ["--resume", "--run-dir", copy_of(s, t), "--num-critics", 3],
        "--num-critics 2; 3; leave that flag out",
    ),
    "resuming with fewer steps": (
        lambda t, d, s: ["--resume", "--run-dir", copy_of(s, t), "--offline-steps", 0],
        "2 offline steps; ask for at least as many",
    ),
    "resuming on other data": (
        lambda t, d, s: [
            "--resume", "--run-dir", copy_of(s, t),
            *data(lambda x: {key: array[500:] for key, array in x.items()})(t, d, s),
        ],
        "the run began on; 1,500 transitions",
    ),
    "an agent that is none": (resumed(lambda c: c["state"].update(agent=[1, 2])), "agent; damaged"),
    "weights of another shape": (
        resumed(lambda c: c["state"].update(agent=dict.fromkeys(c["state"]["agent"], NONE))),
        "its agent; does not fit",
    ),
    "no optimizer": (resumed(lambda c: c["state"].update(optimizer={})), "its optimizer"),
    "moments of another shape": (  # which torch would write past
        resumed(lambda c: c["state"]["optimizer"]["state"][0].update(exp_avg=torch.zeros(1))),
        "its optimizer; another shape",
    ),
    "noise that is none": (resumed(lambda c: c["state"].update(generator=NONE)), "its generator"),
    "a weight that is larger than its file": (
        resumed(lambda c: c["state"]["agent"].update(x=torch.zeros(1).expand(10**12))),
        "no plain tensor",
    ),
    "weights that are not dense": (
        resumed(lambda c: c["state"]["agent"].update(x=torch.eye(3).to_sparse())),
        "no plain tensor",
    ),
    "settings that are none": (resumed(lambda c: c.update(args=3)), "checkpoint.pt; damaged"),
    "rows that are none": (resumed(lambda c: c.update(rows=[3])), "checkpoint.pt; damaged"),
    "no steps": (resumed(lambda c: c.update(done={"bc": "two"})), "checkpoint.pt; damaged"),
}
ONLINE_FILES = {
    "an episode that cannot be played": (
        resumed(lambda c: c["state"]["environment"].update(actions=torch.zeros(3, 9))),
        "its environment; does not fit",
    ),
    "episodes that do not follow": (
        resumed(lambda c: c["state"]["dataset"].update(ends=torch.tensor([5, 3]))),
        "its dataset; does not fit",
    ),
}
STARTS_FILES = {
    "two starts": (
        lambda t, d, s: ["--checkpoint", d, "--bc-checkpoint", saved_clone(t)], "leave one out",
    ),
    "no start": (lambda t, d, s: ["--checkpoint", d], "--checkpoint; no checkpoint"),
    "a clone for a start": (lambda t, d, s: ["--checkpoint", saved_clone(t)], "checkpoint of 'bc'"),
    "a start of other sizes": (
        lambda t, d, s: [
            "--checkpoint", newest(copy_of(other_than(s), t)), "--num-critics", 3,
            "--bc-steps", 2, "--offline-steps", 2,
        ],
        "its agent; does not fit",
    ),
}


def of_words(words):
    return lambda t, d, s: words.split(" ")


COMMON = {words: (of_words(words), said) for words, said in FLAGS.items()} | FILES
CASES = [*zip(itertools.cycle(SCRIPTS), COMMON.items())]  # scripts take turns: all is shared
for setting, rows in WITH.items():
    flags = [(words, (of_words(words), said)) for words, said in rows.items()]
    CASES += [(script, case) for script in scripts_with(setting) for case in flags]
CASES += [(s, case) for s in scripts_with("online_steps") for case in ONLINE_FILES.items()]
CASES += [(s, case) for s in SCRIPTS if s.Args.starts_from for case in STARTS_FILES.items()]


@pytest.mark.parametrize(
    "script, case", CASES, ids=[f"{script.__name__}: {case[0]}"[:80] for script, case in CASES]
)
def test_bad_input_is_one_line_before_anything_is_written(script, case, dataset, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    (_, (flags, said)) = case
    flags = flags(folder, dataset, script)
    before, data_before = contents(folder), contents(dataset.parent)
    alone = {"--resume", "--eval-only"} & {str(flag) for flag in flags}
    given = [] if alone else [*tiny(script), "--dataset-path", dataset]
    status, printed, errors = run(script, folder, *given, *flags)
    assert status == 1 and printed == "", errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert not [word for word in said.split("; ") if word not in errors], errors
    assert contents(folder) == before and contents(dataset.parent) == data_before


@pytest.mark.parametrize(
    "words",
    ["--num-criticss 1", "--rho much", "--rho", "--bc-steps 1.5", "quickly", "--compile maybe"],
)
def test_a_malformed_command_line_is_told_by_tyro(words, tmp_path):
    (tmp_path / "here").mkdir()
    status, printed, errors = run(SCRIPTS[0], tmp_path / "here", *words.split())
    assert status == 2 and words.split()[0] in printed + errors and "Traceback" not in errors
    assert not contents(tmp_path / "here")


def test_a_run_in_a_locked_folder_is_refused(tmp_path):
    (tmp_path / "here").mkdir()
    folder = copy_of(SCRIPTS[0], tmp_path / "here")
    before = contents(folder)
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, errors = run(SCRIPTS[0], tmp_path / "here", "--resume", "--run-dir", folder)
    assert status == 1 and "another process is running" in errors and errors.count("\n") == 1
    assert contents(folder) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_started_by_hand_says_the_same(script, tmp_path):
    command = [sys.executable, script.__file__, "--env-id", "scene-ply-singletask-v0"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.splitlines() == [
        "error: --env-id: unknown environment 'scene-ply-singletask-v0'; did you mean "
        "'scene-play-singletask-v0'?"
    ]
    assert not list(tmp_path.iterdir())
