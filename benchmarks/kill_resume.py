"""Kills tiny runs at random moments, resumes them, and compares their ends with those of runs that were left alone.

    python benchmarks/kill_resume.py --kills 100

Each case is a script and a way to start it: collecting, behaviour cloning, offline, online, with evaluations and
checkpoints a few steps apart. Its processes get SIGKILL after a uniformly random time, up to that of the whole run, and
are started again with --resume, until they finish. What is compared, to the bit: all of checkpoint.pt and of the one
before it (weights, Adam's moments, lambda, generator, counters), bc_checkpoint.pt, what was collected, offline and
online, and the rows of train.csv and eval.csv; the clock's columns aside. Prints the moments that were hit and every
difference found, and exits with status 1 where there is one.
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
    "--env-id pointmaze-medium-navigate-singletask-task1-v0 --hidden-dims 16 16 --num-critics 2 --flow-steps 3 "
    "--batch-size 8 --chunk-length 4 --bc-steps 40 --offline-steps 40 --eval-interval 20 --eval-episodes 2 "
    "--log-interval 2 --checkpoint-interval 5 --num-threads 1 --run-dir run --dataset-dir data --collect-episodes 3"
).split()
ONLINE = "--online-steps 40 --learning-starts 10".split()
CASES = {  # name -> (script, flags); "prior" is a finished run of trqam_offline.py
    "trqam_offline": ("trqam_offline", []),
    "trqam_online": ("trqam_online", ONLINE),
    "trqam_online, from an offline run": ("trqam_online", [*ONLINE, "--checkpoint", "../prior/run/checkpoint.pt"]),
    "trqam_online, from a clone": ("trqam_online", [*ONLINE, "--bc-checkpoint", "../prior/run/bc_checkpoint.pt"]),
    "qam_baseline": ("qam_baseline", [*ONLINE, "--balanced-sampling"]),
    "qam_baseline, with edits": ("qam_baseline", [*ONLINE, "--edit-scale", "0.2"]),
}
CLOCK = {"charts/SPS", "charts/environment_SPS", "charts/update_SPS"}  # columns
OF_A_SITTING = {"seconds", "resume"}  # entries of a checkpoint, and of its args


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


def command(script: str, flags: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), *flags]


def start(words: list[str], folder: Path) -> subprocess.Popen:
    with open(folder / "output", "a") as output:
        return subprocess.Popen(words, cwd=folder, stdout=output, stderr=subprocess.STDOUT)


def moment(folder: Path, began: float) -> str:
    """What a run that was started at a time, in seconds since the epoch, was doing, by its files."""
    run = folder / "run"
    if not (run / "config.json").exists():
        return "before its folder"
    if any(path.stat().st_mtime > began for path in folder.glob("*/.*.tmp")):  # not one of an earlier sitting
        return "writing a file"
    if not any((folder / "data").glob("*-v0.json")):
        return "collecting"
    stages = [line.split(",")[0] for line in (run / "train.csv").read_text().splitlines()[1:]]
    return stages[-1] if stages else "starting"


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if key not in CLOCK} for row in csv.DictReader(file)]


def unequal(name: str, ours, theirs) -> list[str]:
    """Names of what differs between two nested values, bit by bit."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [name]
        keys = ours.keys() - OF_A_SITTING
        return [found for key in sorted(keys, key=str) for found in unequal(f"{name}/{key}", ours[key], theirs[key])]
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        bits = lambda tensor: (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
        return [] if bits(ours) == bits(theirs) else [name]
    return [] if type(ours) is type(theirs) and ours == theirs else [name]


def differences(whole: Path, resumed: Path) -> list[str]:
    """Names of what differs between two finished runs, each with its data beside it."""
    found = []
    for name in ("checkpoint.pt", "checkpoint_previous.pt", "bc_checkpoint.pt"):
        paths = [folder / "run" / name for folder in (whole, resumed)]
        if paths[0].exists() != paths[1].exists():
            found.append(name)
        elif paths[0].exists():
            found += unequal(name, *(torch.load(path, weights_only=True) for path in paths))
    for name in ("train.csv", "eval.csv"):
        found += [name] if rows_of(whole / "run" / name) != rows_of(resumed / "run" / name) else []
    for path in [*(whole / "data").glob("*.npz"), *(whole / "run").glob("replay.bin")]:
        twin = resumed / path.relative_to(whole)
        found += [] if twin.exists() and path.read_bytes() == twin.read_bytes() else [str(path.relative_to(whole))]
    return found


def finish(script: str, flags: list[str], folder: Path) -> float:
    """Run a case that nobody stops -> seconds it took."""
    folder.mkdir()
    began = time.monotonic()
    if start(command(script, flags), folder).wait():
        sys.exit(f"error: {script}.py {' '.join(flags)}: {(folder / 'output').read_text().splitlines()[-1]}")
    return time.monotonic() - began


def kill_and_resume(case: str, whole: Path, folder: Path, seconds: float, most: int, rng: random.Random):
    """A run of a case that is killed up to `most` times -> (moments of the kills, what differs in the end)."""
    script, flags = CASES[case]
    folder.mkdir()
    moments = []
    while True:
        resume, began = (folder / "run" / "config.json").exists(), time.time()
        process = start(command(script, ["--run-dir", "run", "--resume"] if resume else [*TINY, *flags]), folder)
        try:
            status = process.wait(rng.uniform(0, seconds) if len(moments) < most else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            moments.append(moment(folder, began))
            continue
        if status:
            return moments, [f"a resumed run failed: {(folder / 'output').read_text().splitlines()[-1]}"]
        return moments, differences(whole, folder)


def main(args: Args):
    rng, hits, ends, bad = random.Random(args.seed), Counter(), Counter(), []
    with tempfile.TemporaryDirectory() as root, concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        root = Path(root)
        finish("trqam_offline", TINY, root / "prior")
        whole = {case: root / f"whole {number}" for number, case in enumerate(CASES)}
        waiting = {case: pool.submit(finish, s, [*TINY, *flags], whole[case]) for case, (s, flags) in CASES.items()}
        seconds = {case: future.result() for case, future in waiting.items()}
        print(", ".join(f"{case}: {value:.0f} s" for case, value in seconds.items()), flush=True)
        while sum(hits.values()) < args.kills:
            number = sum(ends.values())
            futures = {
                case: pool.submit(
                    kill_and_resume, case, whole[case], root / f"{number + i}", seconds[case], args.most,
                    random.Random(rng.random()),
                )
                for i, case in enumerate(CASES)
            }  # fmt: skip
            for case, future in futures.items():
                moments, found = future.result()
                hits.update(moments)
                ends[case] += 1
                bad += [f"{case}, killed at {moments}: {found}"] if found else []
            print(f"{sum(hits.values())} kills, {sum(ends.values())} runs, {len(bad)} unequal ends", flush=True)
    print("\nkilled while: " + ", ".join(f"{moment} {count}" for moment, count in hits.most_common()))
    print("runs: " + ", ".join(f"{case} {count}" for case, count in ends.items()))
    print("\n".join([*bad, f"{sum(hits.values())} kills, {sum(ends.values())} runs, {len(bad)} unequal ends"]))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main(tyro.cli(Args))
