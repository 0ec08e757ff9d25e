"""How fast this machine trains and evaluates, and what an update's time goes into.

    python benchmarks/speed.py                                 # all of it, with plain updates
    python benchmarks/speed.py --compile off on --batches 256  # compiled ones beside them
    python benchmarks/speed.py --measure agents --widths 512   # several at once, on a GPU

Prints tables; --output also gets their rows, with where and on which commit they were measured.
An update here is all that a training run does for one: drawing the batch and the noise, losses,
backward, clipping, Adam, moving averages. Modes are timed in turns within one run, because a
processor's clock drifts: quote their ratios. The share of peak is of the largest rate of float32
matrix products, at the shapes of a hidden layer, timed in the same turns. On a GPU each mode is
timed launch by launch and as a CUDA graph, twenty calls at a time: training does not wait for
single ones. CUDA_VISIBLE_DEVICES= measures the CPU, OMP_NUM_THREADS sets its threads.
"""

import collections
import contextlib
import csv
import functools
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

import common
import trqam_offline as script

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # so that no stream waits for another

OBSERVATION_DIM, ACTION_DIM, CHUNK_LENGTH = 40, 5, 5  # of the scene
LARGEST_OBSERVATION_DIM = 55  # of cube-quadruple, whose 100 million transitions are the largest set
BATCH_SIZE = 256  # the published one
Measurement = Literal["updates", "parts", "agents", "data", "evaluation", "start"]
Row = dict[str, Any]


@dataclass
class Args:
    measure: tuple[Measurement, ...] = get_args(Measurement)
    """updates by width and batch (of cloning too), the parts of one, several agents at once, memory
    of data, evaluation, start-up to the first updates"""
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    """widths of all four hidden layers; agents and start-up have the first"""
    batches: tuple[int, ...] = (64, 256, 1024, 4096)
    """batch sizes of the updates; all else has 256"""
    compile: tuple[Literal["off", "on"], ...] = ("off",)
    """modes of the update; compiling takes a minute or two for each width and batch"""
    agents: tuple[int, ...] = (1, 2, 4, 8)
    """agents trained at once, by one thread"""
    seconds: float = 10.0
    """time for each width and batch (at least three calls of each mode are timed)"""
    transitions: int = 1_000_000
    """transitions whose memory is measured, at cube-quadruple's sizes"""
    env_id: str = "cube-single-play-singletask-task2-v0"
    """task to evaluate and to start on, of a domain that can be collected"""
    episodes: int = 50
    """episodes of the evaluation"""
    tf32: bool = False
    """on a GPU, multiply float32 matrices in TF32"""
    output: str = ""
    """csv file of all rows; default: none is written"""


def wait(device: torch.device):
    """For what was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(runs: dict[Any, Callable], seconds: float, device: torch.device,
                   before: int = 3, least: int = 3) -> dict[Any, float]:
    """Median time of each of several calls, made in turns after `before` of each: at least `least`,
    at most 200. On a GPU a turn is twenty calls, and waits for the last one alone."""
    times, calls = {name: [] for name in runs}, 20 if device.type == "cuda" else 1
    for run in [*runs.values()] * before:
        run()
    wait(device)
    began, turns = time.perf_counter(), 0
    while turns < least or turns < 200 and time.perf_counter() - began < seconds:
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            wait(device)
            times[name].append((time.perf_counter() - start) / calls)
        turns += 1
    return {name: statistics.median(values) for name, values in times.items()}


def random_dataset(transitions: int, device: torch.device, observation_dim: int = OBSERVATION_DIM):
    """Random rows, made on the device, in [0, 1), in episodes of 1,000 transitions."""
    rows = transitions + transitions // 1000
    random = functools.partial(torch.rand, rows, device=device)
    ones = torch.ones(rows, device=device)
    last = torch.arange(rows, device=device) % 1001 == 1000
    arrays = random(observation_dim), random(ACTION_DIM), -ones, ones, last
    return common.ChunkDataset(*arrays, CHUNK_LENGTH, gamma=0.995, device=device)


class Trainer:
    """An agent with data, noise and updates, as the script's `main` makes them. losses: the
    script's, or compiled ones; graph: record the updates as CUDA graphs."""

    def __init__(self, width: int, batch_size: int, device: torch.device, losses: Callable,
                 graph: bool, seed: int = 0):
        torch.manual_seed(seed)
        self.args = script.Args(hidden_dims=(width,) * 4, batch_size=batch_size)
        self.agent = script.Agent(OBSERVATION_DIM, CHUNK_LENGTH * ACTION_DIM, self.args).to(device)
        self.optimizer = self.agent.make_optimizer(self.args)
        self.dataset = random_dataset(20_000, device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.updates = {
            "update": functools.partial(script.update, loss_function=losses),
            "bc update": script.bc_update,
        }
        for name, update in self.updates.items():
            update = functools.partial(update, self.agent, self.optimizer, args=self.args)
            self.updates[name] = common.CudaGraph(update) if graph else update

    def draw(self):
        words = self.args.batch_size, CHUNK_LENGTH * ACTION_DIM, self.args, self.generator
        return self.dataset.sample(words[0], self.generator), script.draw_noise(*words)

    def step(self, name: str = "update"):
        self.updates[name](*self.draw())

    def launched(self, name: str = "update") -> str:
        """How its updates reach the device."""
        graph = getattr(self.updates[name], "graph", 0)
        return "one by one" if graph == 0 else "as a graph" if graph else "recording failed"


def compiled_losses(mode: str, device: torch.device) -> Callable:
    """The losses, compiled for the next sizes alone, as in a training run."""
    torch.compiler.reset()
    return common.compiled(script.losses, mode, 0, device)


def products(args: script.Args, width: int, device: torch.device) -> dict[str, tuple]:
    """Float32 matrix products at the shapes of a hidden layer: name -> (call, its operations)."""
    calls, batch, members = {}, args.batch_size, args.num_critics
    for name, left, right in (("of one network", (batch,), ()),
                              ("of all flow steps", (args.flow_steps * batch,), ()),
                              ("of the ensemble", (members, batch), (members,))):
        a, b = (torch.randn(*shape, width, device=device) for shape in (left, (*right, width)))
        call = functools.partial(torch.matmul, a, b, out=torch.empty_like(a))
        calls[f"product {name}"] = call, 2 * a.numel() * width
    return calls


def count_flops(call: Callable) -> int:
    """Operations of a call's matrix products."""
    counter = FlopCounterMode(display=False)
    # Not its own: that has hooks of modules, which do not go through torch.func.
    counter.mod_tracker = contextlib.nullcontext()
    counter.mod_tracker.parents = ("Global",)
    with counter:
        call()
    return counter.get_total_flops()


def time_updates(args: Args, device: torch.device, width: int, batch_size: int) -> list[Row]:
    """A row for each mode of the update at one width and batch, and of cloning's."""
    size, trainers = (width, batch_size, device), {}
    graphs = (False, True) if device.type == "cuda" else (False,)
    for name, modes in ("update", args.compile), ("bc update", ("off",)):
        for mode in modes:
            losses = compiled_losses(mode, device)
            for graph in graphs:
                trainers[name, mode, graph] = Trainer(*size, losses, graph)
    plain = Trainer(*size, script.losses, graph=False)
    flops = {name: count_flops(functools.partial(plain.step, name)) for name in plain.updates}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    matrix = products(plain.args, width, device)
    calls = {key: functools.partial(trainer.step, key[0]) for key, trainer in trainers.items()}
    calls |= {name: call for name, (call, _) in matrix.items()}
    seconds = median_seconds(calls, args.seconds, device)
    peak, rows, first = max(n / seconds[name] for name, (_, n) in matrix.items()), [], {}
    for (name, mode, graph), trainer in trainers.items():
        each = seconds[name, mode, graph]
        rate = flops[name] / each
        rows.append(dict(what=name, width=width, batch=batch_size, compile=mode,
                         launched=trainer.launched(name), seconds=each, per_s=1 / each,
                         ratio=first.setdefault(name, each) / each, gflop=flops[name] / 1e9,
                         gflop_per_s=rate / 1e9, peak_gflop_per_s=peak / 1e9,
                         share_of_peak=rate / peak))
        if device.type == "cuda":
            rows[-1]["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return rows


def time_agents(args: Args, device: torch.device, mode: str) -> list[Row]:
    """Updates per second of several agents together, launched by one thread: on a GPU each has a
    stream and a recorded graph of its own, on a CPU one comes after the other."""
    losses, cuda = compiled_losses(mode, device), device.type == "cuda"
    size = args.widths[0], BATCH_SIZE
    trainers = [Trainer(*size, device, losses, cuda, seed) for seed in range(max(args.agents))]
    wait(device)  # until the streams below may read what this one made
    streams = [torch.cuda.Stream() if cuda else None for _ in trainers]

    def turn(count: int):
        for trainer, stream in zip(trainers[:count], streams):
            with torch.cuda.stream(stream):  # which does nothing with None
                trainer.step()

    turns = {count: functools.partial(turn, count) for count in args.agents}
    seconds = median_seconds(turns, args.seconds, device)
    return [dict(what="agents at once", width=size[0], batch=size[1], compile=mode, agents=count,
                 launched=trainers[-1].launched(), seconds=each, per_s=count / each)
            for count, each in seconds.items()]


def time_parts(args: Args, device: torch.device, width: int, mode: str) -> list[Row]:
    """What the time of a plain update, or one of compiled losses, goes into: its functions, each
    waited for, and without those that it calls."""
    spent, running = collections.defaultdict(float), [""]

    def timed(name: str, function: Callable):
        def call(*words, **more):
            wait(device)
            start = time.perf_counter()
            running.append(name)
            result = function(*words, **more)
            running.pop()
            wait(device)
            took = time.perf_counter() - start
            spent[name] += took
            spent[running[-1]] -= took
            return result

        return call

    losses = timed("losses", compiled_losses(mode, device))
    trainer = Trainer(width, BATCH_SIZE, device, losses, graph=False)
    for _ in range(3):
        trainer.step()
    agent, utils = trainer.agent, torch.nn.utils  # the optimizer's step is Adam's
    places = {"draw": trainer, "step": trainer.optimizer, "backward": torch.Tensor,
              "get_total_norm": utils, "clip_grad_norm_": utils, "_foreach_lerp_": torch}
    if mode == "off":
        places |= dict.fromkeys((
            "ode_sample", "memoryless_rollout", "terminal_adjoint", "lean_adjoint",
            "velocity_difference", "bc_loss"), script)
    spent.clear()
    with contextlib.ExitStack() as stack:
        for name, owner in places.items():
            stack.enter_context(patch.object(owner, name, timed(name, getattr(owner, name))))
        for network in (agent.critic, agent.target_critic) if mode == "off" else ():
            stack.enter_context(patch.object(network, "forward", timed("critics", network.forward)))
        step, began, count = timed("all else", trainer.step), time.perf_counter(), 0
        while count < 3 or time.perf_counter() - began < args.seconds / 2:
            step()
            count += 1
    total = -spent.pop("")
    return [dict(what=f"part: {name}", width=width, batch=BATCH_SIZE, compile=mode,
                 seconds=each / count, share=each / total) for name, each in spent.items()]


def time_data(args: Args, device: torch.device) -> list[Row]:
    """Bytes that transitions take on the device, over those of their numbers; drawing a batch."""
    dataset = random_dataset(args.transitions, device, LARGEST_OBSERVATION_DIM)
    held = sum(x.nbytes for x in vars(dataset).values() if isinstance(x, torch.Tensor))
    own = len(dataset.rewards) * (LARGEST_OBSERVATION_DIM + ACTION_DIM + 2) * 4
    draw = functools.partial(dataset.sample, BATCH_SIZE, torch.Generator(device))
    each = median_seconds({0: draw}, args.seconds / 5, device)[0]
    return [dict(what=f"{args.transitions:,} transitions on the device, over their own bytes",
                 device_mib=held / 2**20, ratio=held / own),
            dict(what=f"... drawing {BATCH_SIZE} chunks of them", seconds=each, per_s=1 / each)]


def time_evaluation(args: Args, device: torch.device) -> list[Row]:
    """Evaluation in parallel and one episode after the other, of a policy that costs nothing."""
    evaluator = common.Evaluator(args.env_id, CHUNK_LENGTH, args.episodes, seed=0, noise_dim=1)
    env = common.make_chunked_env(args.env_id, CHUNK_LENGTH)
    still = np.zeros(env.action_space.shape, np.float32)
    parallel = lambda: evaluator.evaluate(lambda s, noise: torch.zeros(len(s), still.size))

    def serial():
        for seed in evaluator.seeds:
            env.reset(seed=seed)
            while not any(env.step(still)[2:4]):
                pass

    parallel()  # starts the processes
    runs = {"in parallel": parallel, "one after the other": serial}
    seconds = median_seconds(runs, args.seconds, torch.device("cpu"), before=0, least=1)
    evaluator.close()
    env.close()
    return [dict(what=f"evaluation of {args.episodes} episodes, {name}", seconds=each,
                 ratio=seconds["one after the other"] / each, cores=common.cores())
            for name, each in seconds.items()]


def time_start(args: Args, device: torch.device) -> list[Row]:
    """Seconds from starting the script to its fourth update of each stage, plain, on data that is
    there: on a GPU the first three are launched one by one, and recorded."""
    flags = "--bc-steps 4 --offline-steps 4 --log-interval 1 --eval-episodes 1 --compile off"
    flags = [*flags.split(), "--env-id", args.env_id, "--hidden-dims", *4 * [str(args.widths[0])]]
    quiet, seconds = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), []
    with tempfile.TemporaryDirectory() as folder:
        data = common.collect_dataset(common.split_env_id(args.env_id)[1], 1, 0, folder)
        table, start = Path(folder, "run", "train.csv"), time.perf_counter()
        command = [sys.executable, script.__file__, *flags, "--dataset-path", str(data)]
        with subprocess.Popen([*command, "--run-dir", table.parent], **quiet) as process:
            for stage in ("bc", "offline"):
                while not table.exists() or f"\n{stage},4," not in table.read_text():
                    common.require(process.poll() is None, f"it ended early: {command}")
                    time.sleep(0.01)
                seconds.append(time.perf_counter() - start)
            process.kill()
    return [dict(what="start-up to the end of four updates of cloning", seconds=seconds[0]),
            dict(what="... of an evaluated episode and four of fine-tuning", seconds=seconds[1])]


COLUMNS = dict(
    what="", width="d", batch="d", compile="", launched="", agents="d", seconds=".4g", per_s=".2f",
    ratio=".2f", gflop=".1f", gflop_per_s=".0f", peak_gflop_per_s=".0f", share_of_peak=".0%",
    share=".0%", cores="d", device_mib=".0f",
)  # fmt: skip


def show(rows: list[Row]):
    """A table of the columns that these rows have."""
    columns = [key for key in COLUMNS if any(key in row for row in rows)]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = [format(row[key], COLUMNS[key]) if key in row else "" for key in columns]
        print(f"| {' | '.join(cells)} |", flush=True)


MEASURE = dict(  # what -> its function, and the settings whose every combination is one call
    updates=(time_updates, "widths", "batches"), parts=(time_parts, "widths", "compile"),
    agents=(time_agents, "compile"), data=(time_data,), evaluation=(time_evaluation,),
    start=(time_start,),
)  # fmt: skip


def main(args: Args):
    device = common.choose_device("auto", 0, args.tf32)
    name = torch.cuda.get_device_name() if device.type == "cuda" else common.cpu_name()
    where = dict(device=name, threads=torch.get_num_threads(), tf32=args.tf32)
    where |= dict(torch=torch.__version__, commit=common.git_commit())
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows = []
    for what in args.measure:
        function, *over = MEASURE[what]
        before = len(rows)
        for chosen in itertools.product(*(getattr(args, name) for name in over)):
            rows += function(args, device, *chosen)
            if args.output:  # at once, in case that the next one does not come to its end
                with open(args.output, "w", newline="") as file:
                    table = csv.DictWriter(file, [*COLUMNS, *where], lineterminator="\n")
                    table.writeheader()
                    table.writerows(row | where for row in rows)
        show(rows[before:])


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except common.UserError as error:
        sys.exit(f"error: {error}")
