"""Seconds of one fine-tuning update, by network width: random data, full-size batch, critics and flow steps.

    python benchmarks/speed.py

Prints a table of medians over --repeats updates, after a burn-in of three.
"""

import importlib
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro

import common

OBSERVATION_DIM, ACTION_DIM = 40, 25  # of the scene, with chunks of 5


@dataclass
class Args:
    scripts: tuple[Literal["trqam_offline", "qam_baseline"], ...] = ("trqam_offline", "qam_baseline")
    """scripts to time"""
    widths: tuple[int, ...] = (128, 256, 512)
    """widths of all four hidden layers"""
    repeats: int = 10
    """timed updates"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train"""
    num_threads: int = 0
    """CPU threads of torch; 0: as many as torch chooses"""


def seconds_of_an_update(script, width: int, repeats: int, device: torch.device) -> float:
    """Median over `repeats` updates, each waited for."""
    args = script.Args(hidden_dims=(width,) * 4)
    torch.manual_seed(0)
    agent = script.Agent(OBSERVATION_DIM, ACTION_DIM, args).to(device)
    optimizer = agent.make_optimizer(args)
    generator = torch.Generator(device).manual_seed(0)
    b, ones = args.batch_size, torch.ones(args.batch_size, device=device)
    random = lambda dim: torch.rand(b, dim, generator=generator, device=device) * 2 - 1
    batch = common.Batch(random(OBSERVATION_DIM), random(ACTION_DIM), -ones, ones, random(OBSERVATION_DIM), ones)
    times = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        noise = script.draw_noise(b, ACTION_DIM, args, generator)
        float(script.update(agent, optimizer, batch, noise, args)["losses/critic_loss"])  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def main(args: Args):
    device = common.choose_device(args.device, args.num_threads)
    name = torch.cuda.get_device_name() if device.type == "cuda" else common.cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {common.git_commit()}")
    print("batch 256, 10 critics, 10 flow steps, 4 hidden layers\n")
    print("| script | width | s per update | updates/s |\n|---|---|---|---|")
    for name in args.scripts:
        for width in args.widths:
            seconds = seconds_of_an_update(importlib.import_module(name), width, args.repeats, device)
            print(f"| {name} | {width} | {seconds:.3f} | {1 / seconds:.1f} |", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except common.UserError as error:
        sys.exit(f"error: {error}")
