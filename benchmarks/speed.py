"""How fast this machine trains, evaluates and collects, and what an update's time goes into.

    python benchmarks/speed.py                                        # updates by width and batch, and the rest
    python benchmarks/speed.py --compile off on --widths 128 --batches 256    # the compiled update beside the plain one

Prints tables, and writes their rows, with where and on which commit they were measured, to --output. An update here is
all that a training run does for one: drawing the batch and the noise, losses, backward, clip, Adam, moving averages.
Modes are timed in turns within one run, because a processor's clock drifts: quote their ratios. The share of peak is
of the largest rate of float32 matrix products, at the shapes of a hidden layer, timed in the same turns. On a GPU each
mode is timed launch by launch and as a CUDA graph, twenty updates at a time: training does not wait for single ones.
"""

import contextlib
import copy
import csv
import functools
import importlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

import common

OBSERVATION_DIM, ACTION_DIM, CHUNK_LENGTH = 40, 5, 5  # of the scene
LARGEST_OBSERVATION_DIM = 55  # of cube-quadruple, whose dataset of 100 million transitions is the largest
ENV_ID = "cube-single-play-singletask-task2-v0"  # for evaluating and collecting


@dataclass
class Args:
    script: Literal["trqam_offline", "trqam_online", "qam_baseline"] = "trqam_offline"
    """script whose update is timed"""
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    """widths of all four hidden layers"""
    batches: tuple[int, ...] = (64, 256, 1024, 4096)
    """batch sizes"""
    compile: tuple[Literal["off", "on"], ...] = ("off",)
    """modes of the update, timed in turns; compiling takes a minute or two for each width and batch"""
    seconds: float = 10.0
    """time for each width and batch (at least three updates of each mode are timed)"""
    num_critics: int = 10
    """members of the critic ensemble"""
    flow_steps: int = 10
    """Euler steps from noise to an action"""
    transitions: int = 1_000_000
    """transitions of the dataset whose memory is measured, at cube-quadruple's sizes"""
    environments: bool = True
    """time starting, evaluating and collecting too"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train"""
    num_threads: int = 0
    """CPU threads of torch; 0: as many as torch chooses"""
    tf32: bool = False
    """on a GPU, multiply float32 matrices in TF32"""
    output: str = ""
    """csv file of all rows; default: none is written"""


def wait(device: torch.device):
    """For what was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(
    runs: dict[Any, Callable[[], Any]], seconds: float, device: torch.device, before: int = 3
) -> dict[Any, float]:
    """Median time of each of several calls, made in turns after `before` of each; at least three, at most 200. On a GPU
    a turn is twenty calls, and waits for the last one alone."""
    times, calls = {name: [] for name in runs}, 20 if device.type == "cuda" else 1
    for run in [*runs.values()] * before:
        run()
    wait(device)
    began = time.perf_counter()
    while len(next(iter(times.values()))) < 3 or time.perf_counter() - began < seconds:
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            wait(device)
            times[name].append((time.perf_counter() - start) / calls)
        if len(times[name]) == 200:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def random_dataset(
    transitions: int, device: torch.device, observation_dim: int = OBSERVATION_DIM
) -> common.ChunkDataset:
    """Random rows, in [0, 1), in episodes of 1,000 transitions."""
    rng, rows = np.random.default_rng(0), transitions + transitions // 1000
    random = lambda dim: rng.random((rows, dim), dtype=np.float32)
    ones = np.ones(rows, np.float32)
    return common.ChunkDataset(
        random(observation_dim), random(ACTION_DIM), -ones, ones, np.arange(rows) % 1001 == 1000,
        chunk_length=CHUNK_LENGTH, gamma=0.995, device=device,
    )  # fmt: skip


def products(args: Args, width: int, batch: int, device: torch.device) -> dict[str, tuple[Callable[[], Any], int]]:
    """Float32 matrix products at the shapes of a hidden layer, of one network, of the ensemble and of all flow steps at
    once: name -> (call, its multiplications and additions)."""
    normal = lambda *shape: torch.randn(*shape, device=device)
    shapes = {
        "product of one network": ((batch, width), (width, width)),
        "product of all flow steps": ((args.flow_steps * batch, width), (width, width)),
        "product of the ensemble": ((args.num_critics, batch, width), (args.num_critics, width, width)),
    }
    calls = {}
    for name, (left, right) in shapes.items():
        a, b, out = normal(*left), normal(*right), torch.empty(*left, device=device)
        calls[name] = functools.partial(torch.matmul, a, b, out=out), 2 * a.numel() * width
    return calls


class OneModule(contextlib.nullcontext):
    """In place of the counter's tracking of modules, whose hooks do not go through torch.func."""

    parents = ("Global",)


def time_updates(args: Args, width: int, batch_size: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each mode of the update at one width and batch."""
    script = importlib.import_module(args.script)
    settings = script.Args(
        hidden_dims=(width,) * 4, batch_size=batch_size, num_critics=args.num_critics, flow_steps=args.flow_steps
    )
    torch.manual_seed(0)
    torch.compiler.reset()  # each size is compiled for itself, as in a training run
    agent = script.Agent(OBSERVATION_DIM, CHUNK_LENGTH * ACTION_DIM, settings).to(device)
    dataset, generator = random_dataset(20_000, device), torch.Generator(device).manual_seed(0)

    def train_step(mode: str, cuda_graph: bool) -> Callable[[], Any]:
        twin, chosen = copy.deepcopy(agent), replace(settings, compile=mode, cuda_graph=cuda_graph)
        return script.make_train_step(twin, twin.make_optimizer(chosen), dataset, generator, "offline", chosen)

    modes = list(itertools.product(args.compile, (False, True) if device.type == "cuda" else (False,)))
    runs = {mode: train_step(*mode) for mode in modes}
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = OneModule()
    with counter:
        train_step("off", False)()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    matrix = products(args, width, batch_size, device)
    seconds = median_seconds(runs | {name: call for name, (call, _) in matrix.items()}, args.seconds, device)
    flops, peak = counter.get_total_flops(), max(flops / seconds[name] for name, (_, flops) in matrix.items())
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")
    return [
        dict(what="update", width=width, batch=batch_size, compile=mode[0], cuda_graph=mode[1], seconds=seconds[mode],
             per_s=1 / seconds[mode], ratio=seconds[modes[0]] / seconds[mode], gflop=flops / 1e9,
             gflop_per_s=flops / seconds[mode] / 1e9, peak_gflop_per_s=peak / 1e9,
             share_of_peak=flops / seconds[mode] / peak, device_mib=memory)
        for mode in modes
    ]  # fmt: skip


def time_parts(args: Args, width: int, batch_size: int, mode: str, device: torch.device) -> list[dict[str, Any]]:
    """What the time of an update goes into: its functions one by one, on the same inputs. A compiled one's losses are
    one part."""
    script = importlib.import_module(args.script)
    settings = script.Args(
        hidden_dims=(width,) * 4, batch_size=batch_size, num_critics=args.num_critics, flow_steps=args.flow_steps,
        compile=mode,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.compiler.reset()
    action_dim = CHUNK_LENGTH * ACTION_DIM
    agent = script.Agent(OBSERVATION_DIM, action_dim, settings).to(device)
    optimizer, generator = agent.make_optimizer(settings), torch.Generator(device).manual_seed(0)
    dataset = random_dataset(20_000, device)
    batch = dataset.sample(batch_size, generator)
    noise, s = script.draw_noise(batch_size, action_dim, settings, generator), batch.observation
    fast, base, no_grad = agent.policy, agent.base, torch.no_grad()
    rollout = no_grad(lambda: script.memoryless_rollout(fast, base, s, noise.sde_x0, noise.sde))
    xs, x_final = rollout()
    adjoint = no_grad(lambda: script.terminal_adjoint(agent.target_critic, s, x_final))()
    target = no_grad(lambda: script.critic_target(agent, batch, noise.next_action, settings))
    y = target()
    function = script.compiled(script.losses) if mode == "on" else script.losses
    losses = lambda: function(agent, batch, noise, settings)[0]
    losses().backward()
    parameters = agent.trained_parameters()
    of_losses = {
        "critic_target (E1, E2)": target,
        "memoryless_rollout (E6)": rollout,
        "terminal_adjoint (E7)": no_grad(lambda: script.terminal_adjoint(agent.target_critic, s, x_final)),
        "lean_adjoint (E8)": no_grad(lambda: script.lean_adjoint(base, s, xs, adjoint)),
        "velocity_difference, forward (E9)": lambda: script.velocity_difference(fast, base, s, xs),
        "critic and cloning losses, forward (E3, E4)": lambda: (
            script.critic_loss(agent.critic(s, batch.action), y, batch.valid),
            script.bc_loss(agent.clone, batch, noise.flow_x0, noise.flow_t),
        ),
    }
    parts = (of_losses if mode == "off" else {}) | {
        "draw batch and noise": lambda: (
            dataset.sample(batch_size, generator), script.draw_noise(batch_size, action_dim, settings, generator)
        ),
        "clip": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0),
        "moving averages": no_grad(lambda: script.update_targets(agent, settings.tau)),
        "Adam": optimizer.step,
    }  # fmt: skip
    seconds = {name: median_seconds({name: part}, args.seconds / 5, device)[name] for name, part in parts.items()}
    both = median_seconds({"forward": losses, "all": lambda: losses().backward()}, args.seconds / 5, device)
    seconds |= {} if mode == "off" else {"losses, forward": both["forward"]}
    seconds["backward"] = both["all"] - both["forward"]
    total = sum(seconds.values())
    return [
        dict(what=f"part: {name}", width=width, batch=batch_size, compile=mode, seconds=value, share=value / total)
        for name, value in seconds.items()
    ]


def time_environments(args: Args) -> list[dict[str, Any]]:
    """Evaluation in parallel against one episode after the other, in three turns, with a policy that costs nothing;
    collection."""
    cores, episodes, c = os.cpu_count(), 50, CHUNK_LENGTH
    evaluator = common.Evaluator(ENV_ID, c, episodes, seed=0, noise_dim=1)
    standing = lambda observation, noise: torch.zeros(len(observation), 5 * c)
    env = common.ChunkedEpisode(common.make_env(ENV_ID), c)

    def one_after_the_other():
        for seed in evaluator.seeds:
            env.reset(seed=seed)
            done = False
            while not done:
                _, _, terminated, truncated, _ = env.step(np.zeros(5 * c, dtype=np.float32))
                done = terminated or truncated

    evaluator.evaluate(standing)  # starts the processes
    runs = {"parallel": lambda: evaluator.evaluate(standing), "serial": one_after_the_other}
    parallel, serial = median_seconds(runs, 0, torch.device("cpu"), before=0).values()
    evaluator.close()
    env.close()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        common.collect_dataset("cube-single-play-v0", 4 * cores, 0, folder)
        collecting = (4 * cores + max(1, 4 * cores // 10)) * 1001 / (time.perf_counter() - start)
    return [
        dict(what="evaluation of 50 episodes, parallel", seconds=parallel, ratio=serial / parallel, cores=cores),
        dict(what="evaluation of 50 episodes, one after the other", seconds=serial, ratio=1.0, cores=cores),
        dict(what="collection (steps/s, with starting the processes)", per_s=collecting, cores=cores),
    ]


def time_start(args: Args) -> list[dict[str, Any]]:
    """Seconds from starting the script to its first plain updates at full size, on data that is there. It says when it
    has done four of each kind."""
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        data = common.collect_dataset("cube-single-play-v0", 1, 0, folder)
        command = [sys.executable, "-u", str(root / f"{args.script}.py"), "--env-id", ENV_ID, "--device", args.device]
        command += "--bc-steps 1 --offline-steps 1 --compile off --num-threads".split() + [str(args.num_threads)]
        command += ["--dataset-path", str(data), "--run-dir", f"{folder}/run"]
        start, seconds = time.perf_counter(), {}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            for line in process.stdout:
                seconds[line.partition(":")[0]] = time.perf_counter() - start
                if "fine-tuning" in seconds:
                    break
            process.kill()
        if "fine-tuning" not in seconds:
            raise common.UserError(f"{' '.join(command)} ended before its first update: run it by hand to see why")
    return [
        dict(what="start-up to the end of four updates of cloning, plain", seconds=seconds["bc"]),
        dict(what="... and of four of fine-tuning", seconds=seconds["fine-tuning"]),
    ]


def memory_of_data(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """Bytes that transitions take on the device, over those of their numbers in the file; drawing a batch from them."""
    dataset, generator = random_dataset(args.transitions, device, LARGEST_OBSERVATION_DIM), torch.Generator(device)
    tensors = [value for value in vars(dataset).values() if isinstance(value, torch.Tensor)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    own = len(dataset.rewards) * (LARGEST_OBSERVATION_DIM + ACTION_DIM + 2) * 4
    drawing = median_seconds({"draw": lambda: dataset.sample(256, generator)}, 1.0, device)["draw"]
    return [
        dict(what=f"{args.transitions:,} transitions on the device", device_mib=held / 2**20, ratio=held / own),
        dict(what="... and drawing a batch of 256 from them", seconds=drawing, per_s=1 / drawing),
    ]


def show(rows: list[dict[str, Any]], columns: dict[str, str]):
    """A table of some columns, each in its format."""
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = (format(row[key], form) if key in row and row[key] == row[key] else "" for key, form in columns.items())
        print(f"| {' | '.join(cells)} |", flush=True)


def main(args: Args):
    device = common.choose_device(args.device, args.num_threads, args.tf32)
    if "on" in args.compile:
        common.choose_compile("on", device, 0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else common.cpu_name()
    where = dict(device=name, threads=torch.get_num_threads(), tf32=args.tf32)
    where |= dict(torch=torch.__version__, commit=common.git_commit())
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{args.script}, {args.num_critics} critics, {args.flow_steps} flow steps, 4 hidden layers")
    rows = []
    for width in args.widths:
        for batch in args.batches:
            rows += time_updates(args, width, batch, device)
    show(rows, dict(width="d", batch="d", compile="", cuda_graph="", seconds=".4f", per_s=".1f", ratio=".2f",
                    gflop=".1f", gflop_per_s=".0f", peak_gflop_per_s=".0f", share_of_peak=".0%",
                    device_mib=".0f"))  # fmt: skip
    for width, mode in itertools.product(args.widths, args.compile):
        parts = time_parts(args, width, 256, mode, device)
        show(parts, dict(what="", width="d", batch="d", compile="", seconds=".4f", share=".0%"))
        rows += parts
    others = memory_of_data(args, device)
    others += time_start(args) + time_environments(args) if args.environments else []
    show(others, dict(what="", seconds=".4g", per_s=".0f", ratio=".2f", cores="d", device_mib=".0f"))
    rows += others
    if args.output:
        columns = list(dict.fromkeys(key for row in rows for key in row)) + list(where)
        with open(args.output, "w", newline="") as file:
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            table.writerows(row | where for row in rows)
        print(f"\n{args.output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except common.UserError as error:
        sys.exit(f"error: {error}")
