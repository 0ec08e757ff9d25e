"""Does a long run grow? Trains online at tiny size for hours, and watches its memory and its open files.

    python benchmarks/soak.py                  # two hours, on one core
    python benchmarks/soak.py --hours 0.1

Samples, from Linux's /proc, the resident memory and the open files of the training process and of all its workers;
prints them, a line a minute, and at the end their change from the second tenth of the time, when all is loaded, to
the last. With --output, the samples become a csv file that says where it ran.
"""

import contextlib
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

import common

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "--env-id pointmaze-medium-navigate-singletask-task1-v0 --collect-episodes 4 --hidden-dims 32 32 --num-critics 2 "
    "--flow-steps 3 --batch-size 32 --bc-steps 200 --offline-steps 200 --online-steps 2000000 --learning-starts 200 "
    "--eval-interval 2000 --eval-episodes 4 --log-interval 500 --checkpoint-interval 1000 --num-threads 1 --compile off"
)


@dataclass
class Args:
    hours: float = 2.0
    """how long to train"""
    interval: float = 60.0
    """seconds between samples"""
    script: str = "trqam_online"
    """script that trains: trqam_online or qam_baseline"""
    output: str = ""
    """csv file of the samples; default: none is written"""


def descendants(process: int) -> list[int]:
    """A process and all that it started, directly or not."""
    found = [process]
    for parent in found:
        with contextlib.suppress(OSError):  # it ended meanwhile
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in task.read_text().split()]
    return found


def sample(process: int) -> dict[str, float]:
    """Resident MiB and open files of the process itself and of its workers together, and their number."""
    memory, files = {}, {}
    for number in descendants(process):
        try:
            status = Path(f"/proc/{number}/status").read_text()
            memory[number] = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024
            files[number] = len(os.listdir(f"/proc/{number}/fd"))
        except (OSError, TypeError):  # it ended meanwhile
            continue
    others = [number for number in memory if number != process]
    return dict(
        memory_mib=memory[process], files=files[process], workers=len(others),
        worker_memory_mib=sum(memory[number] for number in others),
        worker_files=sum(files[number] for number in others),
    )  # fmt: skip


def steps_done(run: Path) -> int:
    """Online steps, by the newest row of the log."""
    rows = common.read_csv(run / "train.csv")[1]
    return int(rows[-1]["step"]) if rows and rows[-1]["stage"] == "online" else 0


def main(args: Args):
    samples, began = [], time.monotonic()
    where = dict(script=args.script, cpu=common.cpu_name(), commit=common.git_commit())
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(ROOT / f"{args.script}.py"), *TINY.split(), "--run-dir", str(run)]
        command += ["--dataset-dir", folder]
        with open(Path(folder) / "output", "w+") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            while (seconds := time.monotonic() - began) < 3600 * args.hours:
                time.sleep(min(args.interval, 3600 * args.hours - seconds + 0.01))
                if process.poll() is not None:
                    output.seek(0)
                    sys.exit(f"error: the run ended after {seconds:.0f} s: {output.read().splitlines()[-1]}")
                samples.append(
                    dict(seconds=round(time.monotonic() - began), step=steps_done(run), **sample(process.pid))
                )
                print(", ".join(f"{key} {value:,.0f}" for key, value in samples[-1].items()), flush=True)
            process.terminate()
            process.wait()
    tenth = max(1, len(samples) // 10)
    warm, last = samples[tenth : 2 * tenth] or samples, samples[-tenth:]
    mean = lambda rows, key: sum(row[key] for row in rows) / len(rows)
    print(f"\n{args.script}: {samples[-1]['step']:,} online steps in {args.hours} hours")
    for key in ("memory_mib", "files", "worker_memory_mib", "worker_files"):
        before, after = mean(warm, key), mean(last, key)
        print(
            f"{key}: {before:,.1f} in the second tenth of the time, {after:,.1f} in the last ({after - before:+,.1f})"
        )
    if args.output:
        with open(args.output, "w", newline="") as file:
            table = csv.DictWriter(file, [*samples[0], *where], lineterminator="\n")
            table.writeheader()
            table.writerows(row | where for row in samples)


if __name__ == "__main__":
    main(tyro.cli(Args))
