"""Does a long run grow, and its checkpoints? Trains online at tiny size for hours, and watches it.

    python benchmarks/soak.py                                      # two hours, on one core
    python benchmarks/soak.py --transitions 0 100000 500000 1000000

Samples, from Linux's /proc, the resident memory and the open files of the training process and of
its workers; prints them, and at the end their change from the second tenth of the time, when all is
loaded, to the last. With --transitions it measures instead, without an environment, how long a
checkpoint of cube-double's full size takes to write, and how large it is, once so many transitions
are collected online. With --output, the rows become a csv file that says where they were made.
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

import torch
import tyro

import common
import trqam_online

TINY = (
    "--env-id pointmaze-medium-navigate-singletask-task1-v0 --collect-episodes 4 --num-critics 2 "
    "--hidden-dims 32 32 --flow-steps 3 --batch-size 32 --bc-steps 200 --offline-steps 200 "
    "--online-steps 2000000 --learning-starts 200 --eval-interval 2000 --eval-episodes 4 "
    "--log-interval 500 --checkpoint-interval 1000 --num-threads 1 --compile off"
)
OBSERVATION_DIM, ACTION_DIM, EPISODE = 37, 5, 500  # of cube-double; steps of an episode


@dataclass
class Args:
    hours: float = 2.0
    """how long to train"""
    interval: float = 60.0
    """seconds between samples"""
    transitions: tuple[int, ...] = ()
    """measure checkpoints with so many collected transitions, instead of training"""
    output: str = ""
    """csv file of the rows; default: none is written"""


def sample(process: int) -> dict[str, float]:
    """Resident MiB and open files of a process, and of all that it started together."""
    found, memory, files = [process], {}, {}
    for number in found:
        with contextlib.suppress(OSError, TypeError):  # it ended meanwhile
            for task in Path(f"/proc/{number}/task").glob("*/children"):
                found += [int(child) for child in task.read_text().split()]
            status = Path(f"/proc/{number}/status").read_text()
            resident = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024
            memory[number], files[number] = resident, len(os.listdir(f"/proc/{number}/fd"))
    row = dict(memory_mib=memory.pop(process), files=files.pop(process), workers=len(memory))
    return row | dict(worker_memory_mib=sum(memory.values()), worker_files=sum(files.values()))


def steps_done(run: Path) -> int:
    """Online steps, by the newest row of the log; 0 where there is none yet."""
    lines = (run / "train.csv").read_text().splitlines() if (run / "train.csv").exists() else []
    stage, step = lines[-1].split(",")[:2] if lines else ("", "")
    return int(step) if stage == "online" else 0


def watch(args: Args) -> list[dict[str, float]]:
    """Train, and sample memory and open files."""
    rows, began, script = [], time.monotonic(), trqam_online.__file__
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/output", "w+") as output:
        command = [sys.executable, script, *TINY.split(), "--dataset-dir", folder]
        command += ["--run-dir", f"{folder}/run"]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while (seconds := time.monotonic() - began) < 3600 * args.hours:
            time.sleep(min(args.interval, 3600 * args.hours - seconds + 0.01))
            if process.poll() is not None:
                output.seek(0)
                sys.exit(f"error: the run ended: {output.read().splitlines()[-1]}")
            rows.append(dict(seconds=round(time.monotonic() - began)))
            rows[-1] |= dict(step=steps_done(Path(folder, "run")), **sample(process.pid))
            print(", ".join(f"{key} {x:,.0f}" for key, x in rows[-1].items()), flush=True)
        process.terminate()
        process.wait()
    tenth = max(1, len(rows) // 10)
    for key in ("memory_mib", "files", "worker_memory_mib", "worker_files"):
        parts = rows[tenth : 2 * tenth] or rows, rows[-tenth:]
        before, after = (sum(row[key] for row in part) / len(part) for part in parts)
        print(f"{key}: {before:,.1f} in the second tenth of the time, {after:,.1f} in the last")
    return rows


def checkpoint(transitions: int) -> dict[str, float]:
    """Seconds to write a checkpoint with so many collected transitions, median of 5; its MiB."""
    args, observation = trqam_online.Args(), torch.zeros(OBSERVATION_DIM)
    agent = trqam_online.Agent(OBSERVATION_DIM, args.chunk_length * ACTION_DIM, args)
    optimizer, action = agent.make_optimizer(args), torch.zeros(ACTION_DIM)
    sum(weight.sum() for weight in agent.trained_parameters()).backward()
    optimizer.step()  # which makes its moments
    two = [torch.zeros(2, *shape) for shape in (observation.shape, action.shape, (), ())]
    dataset = common.ChunkDataset(*two, [0, 1], chunk_length=1, gamma=1)
    dataset.make_room(transitions)
    observation, action = observation.numpy(), action.numpy()
    for step in range(1, transitions + 1):
        dataset.append(observation, action, -1, 1, observation, done=step % EPISODE == 0)
    objects, seconds = dict(agent=agent, optimizer=optimizer, dataset=dataset), []
    with tempfile.TemporaryDirectory() as folder:
        path, previous = (Path(folder, name) for name in common.CHECKPOINTS)
        for _ in range(5):
            began = time.perf_counter()
            state = {name: x.state_dict() for name, x in objects.items()}
            common.write_checkpoint(path, dict(kind="trqam_online", state=state), previous)
            seconds.append(time.perf_counter() - began)
        row = dict(transitions=transitions, seconds=sorted(seconds)[2])
        row |= dict(file_mib=path.stat().st_size / 2**20)
    print(", ".join(f"{key} {x:,.2f}" for key, x in row.items()), flush=True)
    return row


def main(args: Args):
    rows = [checkpoint(number) for number in args.transitions] or watch(args)
    if args.output:
        where = dict(script="trqam_online", cpu=common.cpu_name(), commit=common.git_commit())
        with open(args.output, "w", newline="") as file:
            table = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
            table.writeheader()
            table.writerows(row | where for row in rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
