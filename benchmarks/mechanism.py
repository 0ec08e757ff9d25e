"""Why a trust region: TRQAM against QAM, on the quick preset's task, in one figure and one table.

    python benchmarks/mechanism.py               # one seed
    python benchmarks/mechanism.py --seeds 3     # the committed figure
    python benchmarks/mechanism.py --full        # prints the commands of the same runs at full size, for a GPU

All runs are runs of `trqam_offline.py` and `qam_baseline.py`, fine-tuned from one cloned policy per seed. Finished ones
are kept in --runs-dir and reused; one that was stopped is resumed. What the study changes in a script, it changes from
outside, here:

critic error: the critic that steers the policy is Q + e f, with f a fixed random function of (s, a), of mean 0 and
    variance 1 (256 random Fourier features of a Gaussian kernel of length scale 1 in each number of the action and 5 in
    each of the observation; seeded by the run's seed). So e is the root mean square of the critic's error, and of each
    number of its action gradient's error. What the critic itself learns is untouched: the error is in (E7) alone.
external penalty: QAM's loss plus b KL, KL the path KL (E11) of the batch, with b >= 0 moved by the same dual descent
    that moves TRQAM's lambda, at its own rate: b <- b + 5 (D - budget). At the regression's optimum it divides QAM's
    inverse temperature by 1 + b h / (2 c).
"""

import concurrent.futures
import contextlib
import csv
import importlib
import json
import multiprocessing
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import tyro
from torch import Tensor

import common

PRESET_BUDGET, PRESET_TEMPERATURE, EDIT_SCALE = 0.2, 1.0, 0.1  # of the plain comparison
BUDGETS = (0.1, 0.5, 1.5)
TEMPERATURES = (1.0, 3.0, 10.0)
ERRORS = (1.0, 3.0)
OBSERVATION_LENGTH = 5.0  # over which the critic's error changes; two random states of this data are 5.5 apart
COMPARED_BUDGET, COMPARED_TEMPERATURE = 0.5, 3.0  # of the runs with a wrong critic, and of the constant lambda
PENALISED_TEMPERATURE = 10.0  # of the runs with an external penalty: QAM alone goes far over the budget with it


@dataclass
class Args:
    seeds: int = 1
    """seeds 0 ... seeds - 1 of every setting"""
    updates: int = 1_500
    """fine-tuning updates of each run"""
    runs_dir: str = "runs/mechanism"
    """folder of the runs; finished ones in it are reused"""
    output: str = "runs/mechanism"
    """folder of mechanism.png, mechanism.md and mechanism.csv"""
    workers: int = os.cpu_count()
    """runs trained at the same time (each on one thread, with the quick preset)"""
    preset: Literal["quick", "full"] = "quick"
    """preset of the scripts; `full`: the settings of the environment's domain"""
    env_id: str = "cube-single-play-singletask-task2-v0"
    """OGBench single-task environment"""
    full: bool = False
    """print the commands of the same study at full size, for a GPU, and stop"""


@dataclass
class Setting:
    name: str  # of its folder, with the seed behind it
    label: str
    script: str
    flags: list[str]
    change: Callable[[Any, int], None] | None = None  # of the script's module, given the seed
    after: str = ""  # the setting whose mean lambda this one keeps constant


def random_function(seed: int, observation_dim: int, action_dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    """f(s [B, O], a [B, A]) -> [B], of mean 0 and variance 1 over such functions: see this file's head."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(observation_dim + action_dim, 256, generator=generator)
    frequencies[:observation_dim] /= OBSERVATION_LENGTH
    phases = 2 * torch.pi * torch.rand(256, generator=generator)
    amplitude = (2 / 256) ** 0.5
    return lambda s, a: amplitude * torch.cos(torch.cat([s, a], dim=-1) @ frequencies.to(a) + phases.to(a)).sum(-1)


@dataclass
class CriticError:
    """Makes the critic that steers the policy wrong by `size` (root mean square)."""

    size: float

    def __call__(self, script: Any, seed: int):
        exact = script.terminal_adjoint

        def terminal_adjoint(critic, observation: Tensor, x: Tensor) -> Tensor:
            f = random_function(seed, observation.shape[-1], x.shape[-1])
            return exact(lambda s, a: critic(s, a) + self.size * f(s, a), observation, x)

        script.terminal_adjoint = terminal_adjoint


@dataclass
class ExternalPenalty:
    """Adds an adaptive KL penalty to the loss; its state is in the agent, so that checkpoints hold it."""

    budget: float
    rate: float = 5.0

    def __call__(self, script: Any, seed: int):
        agent_class, loss, update = script.Agent, script.adjoint_matching_loss, script.update

        class Agent(agent_class):
            def __init__(self, observation_dim, action_dim, args):
                super().__init__(observation_dim, action_dim, args)
                self.register_buffer("penalty", torch.tensor(0.0))  # b
                self.register_buffer("kl_ema", torch.tensor(0.0))  # D

        def penalised_update(agent, optimizer, batch, noise, args):
            def penalised_loss(delta, adjoints, temperature):
                kl = script.path_kl(delta, args.chunk_length)
                penalty = agent.penalty.clone()
                with torch.no_grad():
                    agent.kl_ema.lerp_(kl.clamp(max=2 * self.budget), 0.1)
                    agent.penalty.add_(self.rate * (agent.kl_ema - self.budget)).clamp_(min=0)
                return loss(delta, adjoints, temperature) + penalty * kl

            script.adjoint_matching_loss = penalised_loss
            statistics = update(agent, optimizer, batch, noise, args)
            trust_region = dict(path_kl_ema=agent.kl_ema.clone(), penalty=agent.penalty.clone())
            return statistics | {f"trust_region/{key}": value for key, value in trust_region.items()}

        script.Agent, script.update = Agent, penalised_update


def settings() -> list[Setting]:
    """All settings of the study."""
    budget = lambda e: ["--kl-budget", str(e)]
    temperature = lambda tau: ["--inverse-temperature", str(tau)]
    found = [
        *(Setting(f"trqam-{e}", f"TRQAM, budget {e}", "trqam_offline", budget(e)) for e in BUDGETS),
        *(Setting(f"qam-{tau}", f"QAM, τ = {tau:g}", "qam_baseline", temperature(tau)) for tau in TEMPERATURES),
    ]
    for size in ERRORS:
        words, error = f", critic error {size:g}", CriticError(size)
        e, tau = COMPARED_BUDGET, COMPARED_TEMPERATURE
        found += [
            Setting(f"trqam-{e}-error-{size:g}", f"TRQAM, budget {e}{words}", "trqam_offline", budget(e), error),
            Setting(f"qam-{tau}-error-{size:g}", f"QAM, τ = {tau:g}{words}", "qam_baseline", temperature(tau), error),
        ]
    e, tau = COMPARED_BUDGET, PENALISED_TEMPERATURE
    penalty = ExternalPenalty(e)
    found += [
        Setting("penalty", f"QAM, τ = {tau:g}, penalty, budget {e}", "qam_baseline", temperature(tau), penalty),
        Setting("constant", f"TRQAM, λ constant at budget {e}'s", "trqam_offline", budget(e), after=f"trqam-{e}"),
    ]
    e, tau, edits = PRESET_BUDGET, PRESET_TEMPERATURE, ["--edit-scale", str(EDIT_SCALE)]
    label = f"QAM-E, τ = {tau:g}, edits of {EDIT_SCALE}"
    found += [
        Setting(f"trqam-{e}", f"TRQAM, budget {e} (preset)", "trqam_offline", budget(e)),
        Setting("qam_e", label, "qam_baseline", [*temperature(tau), *edits]),
    ]
    return found


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a run's table."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def last_quarter(run: Path, key: str) -> float:
    """Mean of a column of train.csv over the last quarter of fine-tuning; nan where it is not logged."""
    rows = [row for row in read(run / "train.csv") if row["stage"] == "offline"]
    values = [float(row.get(key) or "nan") for row in rows[-max(1, len(rows) // 4) :]]
    return float(np.mean(values)) if values else float("nan")


def finished(run: Path, updates: int, args: Args) -> bool:
    """Whether a run has been evaluated at its end. Raises UserError for a run of other settings."""
    if not (run / "config.json").exists():
        return False
    stored = json.loads((run / "config.json").read_text())["args"]
    for key, value in dict(preset=args.preset, env_id=args.env_id, offline_steps=updates).items():
        if stored[key] != value:
            raise common.UserError(f"{run} was made with {key} {stored[key]}, not {value}; name another --runs-dir")
    rows = read(run / "eval.csv") if (run / "eval.csv").exists() else []
    return bool(rows) and int(rows[-1]["step"]) == (updates or stored["bc_steps"])


def train(setting: Setting, seed: int, run: Path, flags: list[str]) -> str:
    """One run of a script, changed as the setting says, in a process of its own -> "" or what went wrong."""
    script = importlib.import_module(setting.script)
    if setting.change:
        setting.change(script, seed)
    how = ["--resume"] if (run / "config.json").exists() else [*flags, "--seed", str(seed)]
    sys.argv = [f"{setting.script}.py", *how, "--run-dir", str(run)]
    run.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(run.parent / f"{run.name}.log", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            starts_from = getattr(script, "STARTS_FROM", None)
            common.run_script(script.main, script.Args, script.settings, script.SCRIPT, starts_from)
        except SystemExit as stop:
            return str(stop.code)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    return ""


def train_together(pool: concurrent.futures.Executor, wave: list[tuple[Setting, int, Path, list[str]]]):
    """`train` runs, given by its arguments, in the pool's processes. Raises UserError where one fails."""
    tasks = {pool.submit(train, *arguments): arguments[2] for arguments in wave}
    for task in concurrent.futures.as_completed(tasks):
        run, said = tasks[task], task.result()
        if said:
            pool.shutdown(cancel_futures=True)
            raise common.UserError(f"{run}: {said.removeprefix('error: ')} (log: {run}.log)")
        print(f"finished {run}", flush=True)


def train_all(args: Args, study: list[Setting]):
    """Train what is not there yet, `workers` runs at a time. Raises UserError where one fails."""
    runs = Path(args.runs_dir)
    common_flags = [args.preset, "--env-id", args.env_id]
    if args.preset == "quick":
        every = ["--eval-interval", str(args.updates // 2), "--log-interval", "25"]
        common_flags += [*every, "--num-threads", "1"]
    prior = Setting("prior", "behaviour cloning", "trqam_offline", ["--offline-steps", "0"])
    from_prior = lambda seed: ["--bc-checkpoint", str(runs / f"prior-seed{seed}" / "bc_checkpoint.pt")]
    tuned = [
        (setting, seed, [*common_flags, *setting.flags, "--offline-steps", str(args.updates), *from_prior(seed)])
        for seed in range(args.seeds)
        for setting in study
    ]
    waves = [
        [(prior, seed, [*common_flags, *prior.flags]) for seed in range(args.seeds)],
        [run for run in tuned if not run[0].after],
        [run for run in tuned if run[0].after],
    ]
    with concurrent.futures.ProcessPoolExecutor(
        args.workers, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for wave in waves:
            missing = []
            for setting, seed, flags in wave:
                run = runs / f"{setting.name}-seed{seed}"
                if finished(run, 0 if setting is prior else args.updates, args):
                    continue
                if setting.after:
                    lam = str(last_quarter(runs / f"{setting.after}-seed{seed}", "trust_region/lambda"))
                    flags = [*flags, "--eta-lambda", "0", "--lambda-min", lam, "--lambda-max", lam]
                missing.append((setting, seed, run, flags))
            train_together(pool, missing)


COLUMNS = {  # of mechanism.csv, after the success -> column of train.csv, averaged over the last quarter of fine-tuning
    "path_kl": "trust_region/path_kl",
    "lambda": "trust_region/lambda",
    "critic_loss": "losses/critic_loss",
}


def summarise(args: Args, study: list[Setting]) -> list[dict[str, Any]]:
    """What each run came to, with where it was made: the rows of mechanism.csv."""
    rows = []
    for name, label in [("prior", "behaviour cloning"), *((setting.name, setting.label) for setting in study)]:
        for seed in range(args.seeds):
            run = Path(args.runs_dir) / f"{name}-seed{seed}"
            config, last = json.loads((run / "config.json").read_text()), read(run / "eval.csv")[-1]
            row = dict(setting=label, seed=seed, updates=0 if name == "prior" else args.updates)
            row |= {key: float(last[key]) for key in ("success", "success_stderr")}
            row |= {key: last_quarter(run, column) for key, column in COLUMNS.items()}
            row |= dict(env_id=args.env_id, dataset_sha256=config["dataset"]["sha256"], commit=config["git_commit"])
            rows.append(row | dict(cpu=config["hardware"]["cpu"], torch=config["versions"]["torch"]))
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds ± their standard error, as markdown."""
    lines = ["| | success | path KL | λ | critic loss |", "|---|---|---|---|---|"]
    for label in dict.fromkeys(row["setting"] for row in rows):
        cells = []
        for key in ("success", *COLUMNS):
            values = [row[key] for row in rows if row["setting"] == label]
            error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2g}" if len(values) > 1 else ""
            cells.append("" if np.isnan(values).any() else f"{np.mean(values):.3g}{error}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(args: Args) -> str:
    """What the runs are, for figure and table."""
    config = json.loads((Path(args.runs_dir) / "prior-seed0" / "config.json").read_text())
    seeds = f"{args.seeds} seeds" if args.seeds > 1 else "1 seed"
    hardware = config["hardware"]
    return (
        f"{config['args']['env_id']}, {seeds}, {args.updates:,} updates, evaluations of "
        f"{config['args']['eval_episodes']} episodes\n{common.describe_dataset(config['dataset'])}\n"
        f"{hardware['cores']} cores of {hardware['cpu']}, torch {config['versions']['torch']}, "
        f"commit {config['git_commit'] or 'unknown'}"
    )


def draw(args: Args, study: list[Setting]) -> Any:
    """The figure: each row of panels one part of the study; means over seeds, band: their standard error."""
    from matplotlib.figure import Figure

    runs = Path(args.runs_dir)
    named = {setting.name: setting for setting in study}
    by_number = [0, 1, 2, 3, 4, 5, *(1, 4) * len(ERRORS), 6, 7, 8, 9]
    colors = {name: f"C{number}" for name, number in zip(named, by_number)}
    styles = {name: "-" for name in named}
    for size, style in zip(ERRORS, ("--", ":")):
        styles |= {name: style for name in named if name.endswith(f"error-{size:g}")}
    compared = f"trqam-{COMPARED_BUDGET}", f"qam-{COMPARED_TEMPERATURE}"
    parts = {
        "budgets and temperatures": [name for name in named if name.count("-") == 1],
        "the preset's TRQAM, QAM, QAM-E": [f"trqam-{PRESET_BUDGET}", f"qam-{PRESET_TEMPERATURE}", "qam_e"],
        "adaptive, constant, external": [compared[0], "constant", "penalty", f"qam-{PENALISED_TEMPERATURE}"],
        "a critic that is wrong": [name for name in named if name.startswith(compared)],
    }
    figure = Figure(figsize=(15, 15), layout="constrained")
    for row, (part, names) in zip(figure.subplots(len(parts), 4), parts.items()):
        for axis, (title, key) in zip(row, (
            ("path KL, nats per action", "trust_region/path_kl"),
            ("λ (TRQAM)", "trust_region/lambda"),
            ("critic loss, mean of 5 rows", "losses/critic_loss"),
            ("success", "success"),
        )):  # fmt: skip
            for name in names:
                table = "eval.csv" if key == "success" else "train.csv"
                of_seeds = [
                    {int(line["step"]): float(line[key]) for line in read(runs / f"{name}-seed{seed}" / table)
                     if line["stage"] == "offline" and line.get(key)}
                    for seed in range(args.seeds)
                ]  # fmt: skip
                steps = sorted(of_seeds[0])
                if not steps:
                    continue
                values = np.array([[line[step] for step in steps] for line in of_seeds])  # [seeds, steps]
                if key == "losses/critic_loss" and len(steps) >= 5:
                    values = np.lib.stride_tricks.sliding_window_view(values, 5, axis=1).mean(-1)
                    steps = steps[2:-2]
                if key == "success":
                    priors = [read(runs / f"prior-seed{seed}" / "eval.csv")[-1] for seed in range(args.seeds)]
                    values = np.column_stack([[float(prior["success"]) for prior in priors], values])
                    steps = [0, *steps]
                mean, error = values.mean(0), values.std(0, ddof=args.seeds > 1) / len(values) ** 0.5
                style = dict(color=colors[name], ls=styles[name])
                axis.plot(steps, mean, label=named[name].label, lw=1.2, **style)
                axis.fill_between(steps, mean - error, mean + error, alpha=0.15, lw=0, color=colors[name])
                if name in {f"trqam-{e}" for e in (*BUDGETS, PRESET_BUDGET)} and key == "trust_region/path_kl":
                    axis.axhline(float(name.split("-")[1]), color=colors[name], ls=(0, (1, 2)), lw=1)
            axis.set(title=f"{part}: {title}" if axis is row[0] else title, xlabel="fine-tuning updates")
            axis.set(yscale="linear" if key == "success" else "log")
            axis.grid(alpha=0.3)
        row[-1].set_ylim(-0.03, 1.03)
        row[-1].legend(fontsize=7)
    for axis in figure.axes:
        axis.title.set_fontsize(9)
    band = "; band: standard error over seeds" if args.seeds > 1 else "; one seed: no band"
    figure.suptitle(f"{describe(args)}{band}; dotted horizontals: budgets", fontsize=9)
    return figure


def main(args: Args):
    if args.seeds < 1 or args.updates < 200 or args.workers < 1:
        raise common.UserError("--seeds and --workers must be at least 1, and --updates at least 200")
    study = settings()
    if args.full:
        env_id = args.env_id if "cube-single" not in args.env_id else "scene-play-singletask-task1-v0"
        size = f"--preset full --updates 1000000 --seeds {max(3, args.seeds)} --workers 1"
        print(f"# all of it, one run after the other:\npython benchmarks/mechanism.py {size} --env-id {env_id}"
              " --runs-dir runs/mechanism-full --output runs/mechanism-full\n"
              "# its runs that change nothing in a script, one by one (here seed 0):")  # fmt: skip
        folder = "runs/mechanism-full"
        print(f"python trqam_offline.py --env-id {env_id} --offline-steps 0 --run-dir {folder}/prior-seed0")
        for setting in study:
            if not setting.change and not setting.after:
                flags = [*setting.flags, "--bc-checkpoint", f"{folder}/prior-seed0/bc_checkpoint.pt"]
                where = ["--env-id", env_id, "--run-dir", f"{folder}/{setting.name}-seed0"]
                print(shlex.join(["python", f"{setting.script}.py", *where, *flags]))
        return
    train_all(args, study)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = summarise(args, study)
    table = as_table(rows)
    (output / "mechanism.md").write_text(f"{describe(args)}\n\n{table}")
    with open(output / "mechanism.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(args, study).savefig(output / "mechanism.png", dpi=80)
    print(f"\n{table}\n{output}: mechanism.png, mechanism.md (this table), mechanism.csv (each run)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except common.UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
