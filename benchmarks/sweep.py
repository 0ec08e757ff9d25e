"""Tasks x algorithms x seeds, side by side on one machine or on any Ray cluster, by the scripts.

    python benchmarks/sweep.py --tasks scene-play-singletask-task2-v0 --seeds 3
    python benchmarks/sweep.py --paper --plan        # what it would take; nothing starts
    python benchmarks/sweep.py --paper --address auto --gpus-per-run 0.25    # docs/sweep.md
    python benchmarks/sweep.py --tasks ENV_ID --arms trqam "tight=trqam_offline.py --kl-budget 0.1"

Each run is `python SCRIPT.py ...` in a process of its own, in the folder TASK/ARM/seedN below
--folder, with what it prints beside that, in seedN.log. All runs of a domain and seed start from
one cloned policy, DOMAIN/prior/seedN, which is made first. Whatever dies, process, machine or this
program: its runs go on from their newest checkpoint, by themselves or by the same command, which
leaves out what is finished. Needs Ray: `pip install ray`.
"""

import contextlib
import csv
import functools
import importlib
import itertools
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import tyro

import common
import trqam_offline

ARMS = {"trqam": "trqam_offline.py", "qam": "qam_baseline.py", "qam-e": "qam_baseline.py"}
EDIT_SCALES = {"puzzle-4x4-play": 0.9, "scene-play": 0.0, "cube-double-play": 0.0}  # published
EDIT_SCALE = 0.1  # in all other domains
EXAMPLE = 100.0  # updates/s, for a plan without a measured rate
CPU_RATES = {512: 2.9, 1024: 0.80}  # of published settings by width, on two cores: docs/speed.md
RETRIES = 1000  # of a run whose worker, node or process was killed
CLONE_FAILED = "its cloned policy failed"
LOCKED = "another process is running in"  # says a script of a folder that is not free yet
# A killed worker must take its script along, which would else train on in the folder where another
# worker resumes it. By a program that becomes the script: a worker has threads, and between fork
# and exec of such a process little is safe.
FOLLOWER = """if True:
    import ctypes, os, sys
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() == int(sys.argv[1]):
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass
class Args:
    tasks: tuple[str, ...] = ()
    """OGBench single-task environments"""
    seeds: int = 1
    """seeds 0 ... seeds - 1 of every task and algorithm"""
    paper: bool = False
    """all 50 tasks and 8 seeds, in place of --tasks and --seeds"""
    arms: tuple[str, ...] = tuple(ARMS)
    """of trqam, qam, qam-e (edits as published), and, quoted, 'NAME=SCRIPT FLAGS'"""
    flags: str = ""
    """of all runs and cloned policies, as --flags='quick --collect-episodes 100'"""
    folder: Path = Path("runs/sweep")
    """folder of all runs; in a cluster, one that all nodes see by this name"""
    address: str = ""
    """of a running Ray cluster; `auto`: this machine's; default: Ray on this machine alone"""
    cpus_per_run: int = 1
    """cores, and threads, of each run"""
    gpus_per_run: float = 0.0
    """share of a GPU for each run; 0: none, on the CPU"""
    poll_seconds: float = 10.0
    """time between looks at the runs' files"""
    plan: bool = False
    """print runs, GPU hours and disk; start nothing"""
    updates_per_second: float = 0.0
    """for --plan: of one GPU, all runs on it together (benchmarks/gpu/2_speed.sh measures it)"""


@dataclass
class Run:
    arm: str
    script: str
    flags: list[str]
    args: Any  # all settings that these make
    steps: list[int]  # of cloning, offline and online
    prior: str  # name of the run that makes its cloned policy


@functools.cache
def settings_of(script: str, flags: tuple[str, ...]) -> Any:
    """All settings that a script would run with. Raises UserError."""
    common.require((ROOT / f"{script}.py").is_file(), f"--arms: there is no {ROOT}/{script}.py")
    module = importlib.import_module(script)
    with patch.object(sys, "argv", [script, *flags]):
        return common.parse_args(script, module.Args, module.settings)


def arm_of(arm: str, domain: str) -> tuple[str, str, list[str]]:
    """An arm's name, script and own flags in a domain. Raises UserError."""
    if arm == "qam-e":  # without edits it is QAM, which need not be run twice
        scale = EDIT_SCALES.get(domain, EDIT_SCALE)
        arm = f"qam-e={ARMS[arm]} --edit-scale {scale}" if scale else "qam"
    name, _, command = (f"{arm}={ARMS[arm]}" if arm in ARMS else arm).partition("=")
    common.require(command and name and name == Path(name).name,
                   f"--arms: {arm!r} is none of {', '.join(ARMS)}, and no 'NAME=SCRIPT FLAGS'")
    script, *flags = shlex.split(command)
    return name, script.removesuffix(".py"), flags


def runs_of(args: Args) -> dict[str, Run]:
    """Name (of its folder) -> run; whole seeds first, each cloned policy before what needs it."""
    runs, device = {}, "cuda" if args.gpus_per_run else "cpu"  # by name: not in silence on another
    shared = ["--device", device, "--num-threads", str(args.cpus_per_run)]
    shared += shlex.split(args.flags)
    for seed, task in itertools.product(range(args.seeds), args.tasks):
        domain = common.domain_of(task)
        first, prior = f"{domain}-singletask-task1-v0", f"{domain}/prior/seed{seed}"
        cloning = prior, first, ("prior", "trqam_offline", ["--offline-steps", "0"])
        arms = [arm_of(arm, domain) for arm in args.arms]
        for name, env_id, (arm, script, flags) in (
                cloning, *((f"{task}/{arm[0]}/seed{seed}", task, arm) for arm in arms)):
            flags = [*shared, *flags, "--env-id"]
            settings = settings_of(script, (*flags, first))  # looked up once in a domain
            settings = replace(settings, env_id=env_id, seed=seed)
            steps = [getattr(settings, f"{x}_steps", 0) for x in ("bc", "offline", "online")]
            steps[0] *= name == prior
            flags += [env_id, "--seed", str(seed)]
            runs[name] = Run(arm, script, flags, settings, steps, prior * (name != prior))
    return runs


def is_finished(folder: Path, mark: str) -> bool:
    """Whether a run ended with status 0, after these steps. The mark is made after that: tables and
    checkpoints have their last step before it, and one before the other. A run that died between
    its end and its mark is resumed, which trains nothing."""
    with contextlib.suppress(OSError):
        return (folder / ".finished").read_text() == mark
    return False


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def refusal(run: Run, folder: Path) -> str:
    """Which setting of a folder's run is not the one asked for; "" where none. A script that is
    resumed sees those that are given, but not those that are given no more."""
    asked = json.loads(json.dumps(vars(run.args), default=str))
    with contextlib.suppress(OSError, ValueError, LookupError):
        for key, value in config_of(folder)["args"].items():
            fixed = key in asked.keys() - common.RESUME_MAY_CHANGE - {"bc_checkpoint"}
            if fixed and value != asked[key]:
                return (f"it was made with {common.flag_of(key)} {value}, not {asked[key]}; name "
                        "another --folder or arm")
    return ""


def train(folder: Path, words: list[str], at_first: list[str], mark: str, cwd: str,
          prior: str = "") -> str:
    """In a Ray worker: run a script in a process of its own -> "", or its last line where it
    failed. prior: what this gave for the run that makes the cloned policy."""
    if prior:
        return CLONE_FAILED
    folder.parent.mkdir(parents=True, exist_ok=True)
    while not is_finished(folder, mark):
        there = any((folder / x).exists() for x in ("checkpoint.pt", "checkpoint_previous.pt"))
        command = [*words, "--run-dir", str(folder), *(["--resume"] if there else at_first)]
        with open(f"{folder}.log", "a") as log:
            head = f"# {time.ctime()}, {socket.gethostname()}: {shlex.join(command)}"
            print(head, file=log, flush=True)
            command = [sys.executable, "-c", FOLLOWER, str(os.getpid()), *command]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, cwd=cwd,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:  # `wait` could not be cancelled
                time.sleep(0.2)
        except BaseException:  # it is cancelled, or its node drained
            process.terminate()
            process.wait()
            raise
        if (status := process.returncode) < 0 or status in (130, 143):
            raise ChildProcessError(f"a signal ended the script (status {status})")
        if status:
            last = Path(f"{folder}.log").read_text().strip().splitlines()[-1]
            if LOCKED not in last:
                return last
            time.sleep(5)  # until a node that lost its cluster has noticed
            continue
        (folder / ".finished.tmp").write_text(mark)
        os.replace(folder / ".finished.tmp", folder / ".finished")
    return ""


def events(folder: Path) -> list[str]:
    """What has happened in a run, by its files."""
    said = []
    with contextlib.suppress(OSError, ValueError, LookupError):
        for number, sitting in enumerate(config_of(folder)["sittings"], 1):
            begun = "".join(f", {stage} {step:,}" for stage, step in sitting["began_at"].items())
            said.append(f"sitting {number} begins{begun}")
        for row in csv.DictReader((folder / "eval.csv").read_text().splitlines()):
            success = {key: float(x) for key, x in row.items() if key[:7] == "success" and x}
            said.append(f"{row['stage']} {int(row['step']):,}: {common.show(success)}")
    return said


def fine_tuned(run: Run, folder: Path) -> int:
    """Fine-tuning steps so far, by the newest whole row of train.csv."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        with open(folder / "train.csv", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2**14))
            stage, step = file.read().decode().split("\n")[-2].split(",")[:2]
        return {"offline": 0, "online": run.steps[1]}[stage] + int(step)
    return 0


def gigabytes(run: Run) -> float:
    """Of two checkpoints and a cloned policy, without tables and logs: a prior has a little less"""
    env, args = common.unplayed_env(run.args.env_id), run.args
    with torch.device("meta"):
        agent = importlib.import_module(run.script).Agent(
            env.observation_space.shape[0], args.chunk_length * env.action_space.shape[0], args)
    size = lambda weights: sum(x.numel() for x in weights) * 4 / 1e9
    moments = 2 * size(agent.trained_parameters())  # of Adam
    return 2 * (size(agent.state_dict().values()) + moments) + size(agent.clone.parameters())


def plan(args: Args, left: list[Run]) -> str:
    """What is left to run, its GPU hours and disk, in words."""
    arms, updates = Counter(run.arm for run in left), Counter()
    for run in left:
        updates[run.args.hidden_dims[0]] += sum(run.steps)
    kind_of = lambda run: (common.domain_of(run.args.env_id), run.arm)
    one_of = {kind_of(run): run for run in left}
    disk = sum(n * gigabytes(one_of[x]) for x, n in Counter(map(kind_of, left)).items())
    lines = [f"{len(left):,} runs: {', '.join(f'{arm} {n:,}' for arm, n in arms.items())}"]
    domains = dict.fromkeys(common.domain_of(task) for task in args.tasks)
    if same := [x for x in domains if "qam-e" in args.arms and not EDIT_SCALES.get(x, EDIT_SCALE)]:
        lines.append(f"QAM-E as published is QAM, and not run beside it, in {', '.join(same)}")
    rate = args.updates_per_second or EXAMPLE
    lines += [f"width {width}: {n:,} updates, {n / rate / 3600:,.1f} GPU hours"
              for width, n in updates.items()]
    lines.append(f"in all {updates.total() / rate / 3600:,.1f} GPU hours at {rate:g} updates/s of "
                 "a GPU; cloning counted as no faster, evaluations not at all")
    if not args.updates_per_second:
        lines.append(f"{rate:g} is an example: give --updates-per-second what "
                     "benchmarks/gpu/2_speed.sh measures")
    if args.paper and updates.keys() <= CPU_RATES.keys():
        hours = sum(n / CPU_RATES[width] for width, n in updates.items()) / 3600
        lines.append(f"measured are CPUs alone (docs/speed.md): {hours:,.0f} hours of two cores")
    return "\n".join([*lines, f"disk: {disk:,.1f} GB, with two checkpoints of each run"])


def connect(args: Args) -> Any:
    """Ray, connected. Raises UserError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of a change
    try:
        import ray
    except ImportError:
        raise common.UserError("a sweep needs Ray: pip install ray") from None
    own = {} if args.address else dict(object_store_memory=10**8)  # results are a line each
    try:
        context = ray.init(args.address or "local", logging_level=logging.WARNING,
                           log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise common.UserError(f"--address: {common.one_line(error)}") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # in place of Ray's: the runs save
    for key, share in (("CPU", args.cpus_per_run), ("GPU", args.gpus_per_run)):
        there = ray.cluster_resources().get(key, 0)
        common.require(there >= share, f"a run needs {share:g} {key}, and Ray has {there:g}")
    if context.dashboard_url:
        print(f"dashboard: http://{context.dashboard_url}")
    return ray


def sweep(args: Args, root: Path, runs: dict[str, Run]) -> dict[str, str]:
    """Train these runs -> name -> what it said, of those that failed."""
    ray, refs, failed = connect(args), {}, {}
    remote = ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run,
                        max_retries=RETRIES, retry_exceptions=[ChildProcessError])(train)
    for name, run in runs.items():
        clone = ["--bc-checkpoint", str(root / run.prior / "bc_checkpoint.pt")] if run.prior else []
        words, mark = [str(ROOT / f"{run.script}.py"), *run.flags], str(run.steps)
        after = refs.get(run.prior, "")
        refs[name] = remote.remote(root / name, words, clone, mark, os.getcwd(), after)
    waiting = {ref: name for name, ref in refs.items()}
    told = {(name, event) for name in runs for event in events(root / name)}
    steps = {name: fine_tuned(run, root / name) for name, run in runs.items()}
    began, before = time.monotonic(), sum(steps.values())
    try:
        while waiting:
            ended, _ = ray.wait([*waiting], timeout=args.poll_seconds)
            names = [*waiting.values()]
            steps |= {name: fine_tuned(runs[name], root / name) for name in names}
            news = [(name, event) for name in names for event in events(root / name)]
            for ref in ended:
                name = waiting.pop(ref)
                try:
                    said = ray.get(ref)
                except ray.exceptions.RayError as error:
                    said = common.one_line(error)
                failed |= {name: said} if said else {}
                news.append((name, f"failed: {said}" if said else "finished"))
            words, made = f"{len(waiting):,} to go", sum(steps.values()) - before
            if made > 0:
                left = sum(sum(runs[name].steps[1:]) - steps[name] for name in waiting.values())
                seconds = left / made * (time.monotonic() - began)
                words += f", {timedelta(seconds=round(seconds))} left"
            for name, event in news:
                if (name, event) not in told:
                    print(f"{time.strftime('%H:%M:%S')}, {words} | {name}: {event}", flush=True)
            told.update(news)
    except KeyboardInterrupt:
        print("stopping: the runs save and end; once more ends at once", flush=True)
        for ref in waiting:
            ray.cancel(ref)
        ray.wait([*waiting], num_returns=len(waiting))
        raise
    return failed


def main(args: Args):
    if args.paper:
        tasks = (f"{x}-singletask-task{n}-v0" for x in trqam_offline.DOMAINS for n in range(1, 6))
        args = replace(args, tasks=tuple(tasks), seeds=8)
    common.require(args.tasks and args.seeds > 0, "name --tasks, or --paper; --seeds is at least 1")
    for task in args.tasks:
        common.split_env_id(task)
    runs, root = runs_of(args), args.folder.expanduser().absolute()
    failed = {}
    for name, run in runs.items():
        if said := refusal(run, root / name) or CLONE_FAILED * (run.prior in failed):
            failed[name] = said
    left = {name: run for name, run in runs.items()
            if name not in failed and not is_finished(root / name, str(run.steps))}
    done = len(runs) - len(left) - len(failed)
    print(f"{root}: {done:,} runs are finished, {len(left):,} to go", flush=True)
    needed = {run.prior for run in left.values()}  # not those of which all runs are finished
    left = {name: run for name, run in left.items() if run.prior or name in needed}
    if args.plan:
        print(plan(args, [*left.values()]))
    elif left:
        failed |= sweep(args, root, left)
    for name, said in failed.items():
        print(f"failed: {name}: {said} (log: {root / name}.log)")
    common.require(not failed, f"{len(failed)} runs failed; the same command tries them again")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # an ASCII terminal
    try:
        main(tyro.cli(Args))
    except (common.UserError, KeyboardInterrupt) as error:
        sys.exit(f"error: {error}" if str(error) else "stopped; the same command goes on")
