"""Kills tiny runs at random moments, resumes them, and compares their ends with undisturbed ones.

    python benchmarks/kill_resume.py --kills 100

Each case is a script and a way to start it, from collecting to online, with evaluations and
checkpoints a few steps apart. Its processes get SIGKILL after a uniformly random time, up to the
whole run's, and are started again, with --resume where there is a checkpoint, until they finish.
Compared, to the bit, are all of the three checkpoints, the collected files and the tables, but for
clock and paths. Prints the moments that were hit and all that differs; if any, the status is 1.
"""

import concurrent.futures
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--env-id pointmaze-medium-navigate-singletask-task1-v0 --hidden-dims 16 16 --num-critics 2 "
    "--flow-steps 3 --batch-size 8 --chunk-length 4 --bc-steps 40 --offline-steps 40 "
    "--eval-interval 20 --eval-episodes 2 --log-interval 2 --checkpoint-interval 5 --num-threads 1 "
    "--run-dir run --dataset-dir data --collect-episodes 3"
).split()
ONLINE = "--online-steps 40 --learning-starts 10".split()
CASES = {  # name -> (script, flags); "prior" is a finished run of trqam_offline.py
    "trqam_offline": ("trqam_offline", []),
    "trqam_online": ("trqam_online", ONLINE),
    "trqam_online, from an offline run":
        ("trqam_online", [*ONLINE, "--checkpoint", "../prior/run/checkpoint.pt"]),
    "trqam_online, from a clone":
        ("trqam_online", [*ONLINE, "--bc-checkpoint", "../prior/run/bc_checkpoint.pt"]),
    "qam_baseline": ("qam_baseline", [*ONLINE, "--balanced-sampling"]),
    "qam_baseline, with edits": ("qam_baseline", [*ONLINE, "--edit-scale", "0.2"]),
}
CHECKPOINTS = "checkpoint.pt", "checkpoint_previous.pt"
# Columns of the clock, and what else a checkpoint holds of the sitting that wrote it: not compared.
OF_A_SITTING = set("charts/SPS charts/environment_SPS seconds wandb_id sittings files resume "
                   "run_dir dataset_dir checkpoint bc_checkpoint".split())


@dataclass
class Args:
    kills: int = 100
    """processes to kill, at least"""
    most: int = 5
    """kills of one run, at most; then it is left to finish"""
    seed: int = 0
    """of the random moments"""
    workers: int = os.cpu_count() or 1
    """runs side by side"""


def start(script: str, flags: list[str], folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    words = [sys.executable, str(ROOT / f"{script}.py"), *flags]
    with open(folder / "output", "a") as output:
        return subprocess.Popen(words, cwd=folder, stdout=output, stderr=subprocess.STDOUT)


def last_line(folder: Path) -> str:
    return (folder / "output").read_text().splitlines()[-1]


def moment(folder: Path, began: float) -> str:
    """What a run, started at a time in seconds since the epoch, was doing, by its files."""
    if any(path.stat().st_mtime > began for path in folder.glob("*/.*.tmp")):  # of this sitting
        return "writing a file"
    if not (folder / "run" / CHECKPOINTS[0]).exists():
        return "before its first checkpoint"
    if not any((folder / "data").glob("*-v0.json")):
        return "collecting"
    table = folder / "run" / "train.csv"
    rows = rows_of(table) if table.exists() else []
    return rows[-1]["stage"] if rows else "starting"


def rows_of(path: Path) -> list[dict[str, str]]:
    """A table's rows, without the clock's columns."""
    with open(path, newline="") as file:
        return [{key: x for key, x in row.items() if key not in OF_A_SITTING}
                for row in csv.DictReader(file)]


def unequal(name: str, ours, theirs) -> list[str]:
    """Names of what differs between two nested values, bit by bit."""
    if isinstance(ours, list) and isinstance(theirs, list):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = ours.keys() - OF_A_SITTING
        if keys != theirs.keys() - OF_A_SITTING:
            return [name]
        pairs = ((f"{name}/{key}", ours[key], theirs[key]) for key in sorted(keys, key=str))
        return [found for pair in pairs for found in unequal(*pair)]
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        ours, theirs = ((x.dtype, x.shape, x.numpy().tobytes()) for x in (ours, theirs))
    return [] if type(ours) is type(theirs) and ours == theirs else [name]


def differences(whole: Path, resumed: Path) -> list[str]:
    """Names of what differs between two finished runs, each with its data beside it."""
    readers = {f"run/{name}": torch.load for name in (*CHECKPOINTS, "bc_checkpoint.pt")}
    readers |= {"run/train.csv": rows_of, "run/eval.csv": rows_of}
    readers |= {f"data/{path.name}": Path.read_bytes for path in (whole / "data").glob("*.npz")}
    found = []
    for name, read in readers.items():
        pair = [read(x / name) if (x / name).exists() else None for x in (whole, resumed)]
        found += unequal(name, *pair)
    return found


def finish(script: str, flags: list[str], folder: Path) -> float:
    """Run a case that nobody stops -> seconds it took."""
    began = time.monotonic()
    if start(script, [*TINY, *flags], folder).wait():
        sys.exit(f"error: {script}.py {' '.join(flags)}: {last_line(folder)}")
    return time.monotonic() - began


def kill_and_resume(case: str, whole: Path, folder: Path, seconds: float, most: int, seed: float):
    """A case's run, killed up to `most` times -> (moments of its kills, what differs at its end)"""
    (script, flags), moments, rng = CASES[case], [], random.Random(seed)
    while True:
        resume = any((folder / "run" / name).exists() for name in CHECKPOINTS)
        began, again = time.time(), ["--run-dir", "run", "--resume"]
        process = start(script, again if resume else [*TINY, *flags], folder)
        try:
            status = process.wait(rng.uniform(0, seconds) if len(moments) < most else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            moments.append(moment(folder, began))
            continue
        failed = [f"it failed: {last_line(folder)}"] if status else []
        return moments, failed or differences(whole, folder)


def main(args: Args):
    rng, hits, ends, bad = random.Random(args.seed), Counter(), Counter(), []
    pool = concurrent.futures.ThreadPoolExecutor(args.workers)
    with tempfile.TemporaryDirectory() as root, pool:
        root = Path(root)
        finish("trqam_offline", [], root / "prior")
        whole = {case: root / f"whole {number}" for number, case in enumerate(CASES)}
        waiting = {case: pool.submit(finish, *CASES[case], whole[case]) for case in CASES}
        seconds = {case: future.result() for case, future in waiting.items()}
        print(", ".join(f"{case}: {value:.0f} s" for case, value in seconds.items()), flush=True)
        while hits.total() < args.kills:
            futures = {}
            for number, case in enumerate(CASES, ends.total()):
                words = whole[case], root / f"{number}", seconds[case], args.most, rng.random()
                futures[case] = pool.submit(kill_and_resume, case, *words)
            for case, future in futures.items():
                moments, found = future.result()
                hits.update(moments)
                ends[case] += 1
                bad += [f"{case}, killed at {moments}: {found}"] if found else []
            total = f"{hits.total()} kills, {ends.total()} runs, {len(bad)} unequal ends"
            print(total, flush=True)
    print("\nkilled while: " + ", ".join(f"{what} {count}" for what, count in hits.most_common()))
    print("runs: " + ", ".join(f"{case} {count}" for case, count in ends.items()))
    print("\n".join([*bad, total]))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main(tyro.cli(Args))
