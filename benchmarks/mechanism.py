"""Why a trust region: TRQAM against QAM, on the quick preset's task, in one figure and one table.

    python benchmarks/mechanism.py               # one seed
    python benchmarks/mechanism.py --seeds 3     # the committed figure
    python benchmarks/mechanism.py --preset full --env-id scene-play-singletask-task1-v0 \\
        --updates 1000000 --seeds 3 --workers 1 --runs-dir runs/full    # for a GPU

All runs are runs of `trqam_offline.py` and `qam_baseline.py`, fine-tuned from one cloned policy per
seed. Finished ones are kept in --runs-dir and reused; one that was stopped is resumed. What the
study changes in a script, it changes from outside, here:

critic error: the critic that steers the policy is Q + e f, with f a fixed random function of s and
    a, of mean 0 and variance 1 (256 random Fourier features of a Gaussian kernel of length scale 1
    in each number of the action and 5 in each of the observation; seeded by the run's seed). So e
    is the root mean square of the critic's error, and of each number of its action gradient's
    error. What the critic itself learns is untouched: the error is in (E7) alone.
external penalty: as in variant_qam.py.
"""

import concurrent.futures
import csv
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro
import variant_qam
from torch import Tensor, nn

import common

PRESET_BUDGET, PRESET_TEMPERATURE, EDIT_SCALE = 0.2, 1.0, 0.1  # of the plain comparison
BUDGETS = (0.1, 0.5, 1.5)
TEMPERATURES = (1.0, 3.0, 10.0)
ERRORS = (1.0, 3.0)
OBSERVATION_LENGTH = 5.0  # of the critic's error; two random states of this data are 5.5 apart
COMPARED_BUDGET, COMPARED_TEMPERATURE = 0.5, 3.0  # with a wrong critic, and a constant lambda
PENALISED_TEMPERATURE = 10.0  # with an external penalty: QAM alone goes far over the budget


@dataclass
class Args:
    seeds: int = 1
    """seeds 0 ... seeds - 1 of every setting"""
    updates: int = 1_500
    """fine-tuning updates of each run"""
    runs_dir: str = "runs/mechanism"
    """folder of the runs, whose finished ones are reused, and of mechanism.png, .md and .csv"""
    workers: int = os.cpu_count() or 1
    """runs trained at the same time (each on one thread, with the quick preset)"""
    preset: Literal["quick", "full"] = "quick"
    """preset of the scripts; `full`: the settings of the environment's domain"""
    env_id: str = "cube-single-play-singletask-task2-v0"
    """OGBench single-task environment"""


@dataclass
class Setting:
    name: str  # of its folder, with the seed behind it
    label: str
    script: str
    flags: list[str]
    change: Callable[[Any, int], None] | None = None  # of the script's module, given the seed
    after: str = ""  # the setting whose mean lambda this one keeps constant


class RandomFunction(nn.Module):
    """f(s [B, O], a [B, A]) -> [B], of mean 0 and variance 1 over such functions: see the head."""

    def __init__(self, seed: int, observation_dim: int, action_dim: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        frequencies = torch.randn(observation_dim + action_dim, 256, generator=generator)
        frequencies[:observation_dim] /= OBSERVATION_LENGTH
        phases = 2 * torch.pi * torch.rand(256, generator=generator)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("phases", phases, persistent=False)

    def forward(self, s: Tensor, a: Tensor) -> Tensor:
        waves = torch.cos(torch.cat([s, a], dim=-1) @ self.frequencies + self.phases)  # [B, 256]
        return (2 / 256) ** 0.5 * waves.sum(-1)


@dataclass
class CriticError:
    """Makes the critic that steers the policy wrong by `size` (root mean square)."""

    size: float

    def __call__(self, script: Any, seed: int):
        exact = script.terminal_adjoint

        class Critic(script.Critic):
            def __init__(self, observation_dim: int, chunk_dim: int, *words):
                super().__init__(observation_dim, chunk_dim, *words)
                self.error = RandomFunction(seed, observation_dim, chunk_dim)

        def terminal_adjoint(critic: Critic, observation: Tensor, x: Tensor) -> Tensor:
            wrong = lambda s, a: critic(s, a) + self.size * critic.error(s, a)
            return exact(wrong, observation, x)

        script.Critic, script.terminal_adjoint = Critic, terminal_adjoint


@dataclass
class ExternalPenalty:
    """Adds an adaptive KL penalty to QAM's loss: see variant_qam.py."""

    budget: float

    def __call__(self, script: Any, seed: int):
        variant_qam.penalise(self.budget)


def settings() -> list[Setting]:
    """All settings of the study."""
    trqam = lambda e: Setting(
        f"trqam-{e}", f"TRQAM, budget {e}", "trqam_offline", ["--kl-budget", str(e)])
    qam = lambda tau: Setting(
        f"qam-{tau}", f"QAM, τ = {tau:g}", "qam_baseline", ["--inverse-temperature", str(tau)])
    compared, high = trqam(COMPARED_BUDGET), qam(PENALISED_TEMPERATURE)
    preset, low, e = trqam(PRESET_BUDGET), qam(PRESET_TEMPERATURE), COMPARED_BUDGET
    label, edits = f"{low.label}, edits of {EDIT_SCALE}", ["--edit-scale", str(EDIT_SCALE)]
    return [
        *map(trqam, BUDGETS),
        *map(qam, TEMPERATURES),
        *(replace(x, name=f"{x.name}-error-{size:g}", label=f"{x.label}, critic error {size:g}",
                  change=CriticError(size))
          for size in ERRORS for x in (compared, qam(COMPARED_TEMPERATURE))),
        replace(high, name="penalty", label=f"{high.label}, penalty, budget {e}",
                change=ExternalPenalty(e)),
        replace(compared, name="constant", label=f"TRQAM, λ constant at budget {e}'s",
                after=compared.name),
        replace(preset, label=f"{preset.label} (preset)"),
        replace(low, name="qam_e", label=label.replace("QAM", "QAM-E"), flags=[*low.flags, *edits]),
    ]


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a run's table; none where it is not there yet."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def last_quarter(run: Path, key: str) -> float:
    """Mean of a column of train.csv over the last quarter of fine-tuning; nan where it has none."""
    rows = [row for row in read(run / "train.csv") if row["stage"] == "offline"]
    values = [float(row.get(key) or "nan") for row in rows[-max(1, len(rows) // 4) :]]
    return float(np.mean(values)) if values else float("nan")


def finished(run: Path, stage: str, **settings) -> bool:
    """Whether a run was evaluated at a stage's end. Raises UserError for one of others."""
    if not (run / "config.json").exists():
        return False
    stored = config_of(run)["args"]
    for key, value in settings.items():
        words = f"{run} was made with {key} {stored[key]}, not {value}; name another --runs-dir"
        common.require(stored[key] == value, words)
    end = stage, str(stored[f"{stage}_steps"])
    return end in [(row["stage"], row["step"]) for row in read(run / "eval.csv")]


def train(setting: Setting, seed: int, run: Path, flags: list[str]) -> str:
    """One run of a script, changed as the setting says, alone in a process -> "" or an error."""
    script = importlib.import_module(setting.script)
    if setting.change:
        setting.change(script, seed)
    there = any((run / name).exists() for name in common.CHECKPOINTS)
    how = ["--resume"] if there else [*flags, "--seed", str(seed)]
    sys.argv = [f"{setting.script}.py", *how, "--run-dir", str(run)]
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            common.run_script(script.__file__, script.main, script.Args, script.settings)
        except SystemExit as stop:
            return str(stop.code).removeprefix("error: ")
    return ""


def train_waves(workers: int, waves: Iterable[list[tuple[Setting, int, Path, list[str]]]]):
    """`train` runs, given by its arguments: those of a wave at once. Raises UserError."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, max_tasks_per_child=1)
    try:
        for wave in waves:
            tasks = {pool.submit(train, *arguments): arguments[2] for arguments in wave}
            for task in concurrent.futures.as_completed(tasks):
                run, said = tasks[task], task.result()
                common.require(not said, f"{run}: {said} (log: {run}.log)")
                print(f"finished {run}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def missing_runs(args: Args, study: list[Setting]) -> Iterable[list[tuple]]:
    """What is not trained yet: priors, what starts from them, what needs a lambda of these."""
    runs, same = Path(args.runs_dir), dict(preset=args.preset, env_id=args.env_id)
    flags = [args.preset, "--env-id", args.env_id]
    if args.preset == "quick":
        flags += ["--eval-interval", str(args.updates // 2), "--log-interval", "25"]
        flags += ["--num-threads", "1"]
    prior = Setting("prior", "behaviour cloning", "trqam_offline", [])
    for wave in ([prior], [x for x in study if not x.after], [x for x in study if x.after]):
        missing = []
        for seed in range(args.seeds):
            for setting in wave:
                run, updates = runs / f"{setting.name}-seed{seed}", args.updates * (wave != [prior])
                if finished(run, "offline" if updates else "bc", offline_steps=updates, **same):
                    continue
                words = [*flags, *setting.flags, "--offline-steps", str(updates)]
                if updates:
                    words += ["--bc-checkpoint", str(runs / f"prior-seed{seed}/bc_checkpoint.pt")]
                if setting.after:
                    lam = last_quarter(runs / f"{setting.after}-seed{seed}", "trust_region/lambda")
                    words += f"--eta-lambda 0 --lambda-min {lam} --lambda-max {lam}".split()
                missing.append((setting, seed, run, words))
        yield missing


COLUMNS = {  # of mechanism.csv -> of train.csv, averaged over the last quarter of fine-tuning
    "path_kl": "trust_region/path_kl",
    "lambda": "trust_region/lambda",
    "critic_loss": "losses/critic_loss",
}


def commits_of(config: dict[str, Any]) -> str:
    """Of all sittings of a run, in order."""
    commits = (sitting["git_commit"] or "unknown" for sitting in config["sittings"])
    return " ".join(dict.fromkeys(commits))


def made_on(config: dict[str, Any], commits: str) -> dict[str, str]:
    """The last columns of a study's rows."""
    return {"dataset_sha256": config["dataset"]["sha256"], commits: commits_of(config),
            "cpu": config["hardware"]["cpu"], "torch": config["versions"]["torch"]}


def summarise(args: Args, study: list[Setting]) -> list[dict[str, Any]]:
    """What each run came to, with where it was made: the rows of mechanism.csv."""
    rows = []
    for name, label in [("prior", "behaviour cloning"), *((x.name, x.label) for x in study)]:
        for seed in range(args.seeds):
            run = Path(args.runs_dir) / f"{name}-seed{seed}"
            config, last = config_of(run), read(run / "eval.csv")[-1]
            row = dict(setting=label, seed=seed, updates=0 if name == "prior" else args.updates)
            row |= {key: float(last[key]) for key in ("success", "success_stderr")}
            row |= {key: last_quarter(run, column) for key, column in COLUMNS.items()}
            rows.append(row | dict(env_id=args.env_id) | made_on(config, "commit"))
    return rows


def over_seeds(values: list[float], digits: str, of_error: str) -> str:
    """Mean ± its standard error; empty where there is no number."""
    if not values or np.isnan(values).any():
        return ""
    error = np.std(values, ddof=len(values) > 1) / len(values) ** 0.5
    return f"{np.mean(values):{digits}}" + f" ± {error:{of_error}}" * (len(values) > 1)


def as_table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, as markdown."""
    lines = ["| | success | path KL | λ | critic loss |", "|---|---|---|---|---|"]
    for label in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == label]
        columns = [[row[key] for row in mine] for key in ("success", *COLUMNS)]
        cells = [over_seeds(column, ".3g", ".2g") for column in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(config: dict[str, Any], seeds: int, words: str) -> str:
    """What the runs are, for figure and table, by the config of one."""
    args, hardware, torch_version = config["args"], config["hardware"], config["versions"]["torch"]
    return (f"{args['env_id']}, {seeds} seed{'s' * (seeds > 1)}, evaluations of "
            f"{args['eval_episodes']} episodes, {words}\n"
            f"{common.describe_dataset(config['dataset'])}\n{hardware['cores']} cores of "
            f"{hardware['cpu']}, torch {torch_version}, commit {commits_of(config)}")


def draw_mean(axis: Any, curves: list[dict[int, float]], **style):
    """Mean over seeds of curves, step -> value each; band: its standard error."""
    if steps := sorted(set.intersection(*map(set, curves))):
        values = np.array([[curve[step] for step in steps] for curve in curves])  # [seeds, steps]
        mean, error = values.mean(0), values.std(0, ddof=len(curves) > 1) / len(curves) ** 0.5
        color = axis.plot(steps, mean, **style)[0].get_color()
        axis.fill_between(steps, mean - error, mean + error, alpha=0.15, lw=0, color=color)


def curve_of(run: Path, key: str, prior: Path) -> dict[int, float]:
    """A column over fine-tuning; success begins with the prior's, critic losses are smoothed."""
    rows = read(run / ("eval.csv" if key == "success" else "train.csv"))
    rows = [row for row in rows if row["stage"] == "offline" and row.get(key)]
    steps, values = [int(row["step"]) for row in rows], [float(row[key]) for row in rows]
    if key == "success":
        steps, values = [0, *steps], [float(read(prior / "eval.csv")[-1][key]), *values]
    elif key == "losses/critic_loss" and len(steps) >= 5:
        steps, values = steps[2:-2], np.convolve(values, np.full(5, 1 / 5), "valid")
    return dict(zip(steps, values))


def draw(args: Args, study: list[Setting], title: str) -> Any:
    """The figure: each row of panels is a part of the study."""
    from matplotlib.figure import Figure

    runs = Path(args.runs_dir)
    named = {setting.name: setting for setting in study}
    numbers = [*range(6), *(1, 4) * len(ERRORS), *range(6, 10)]
    colors = {name: f"C{number}" for name, number in zip(named, numbers)}
    dashes = {f"error-{size:g}": style for size, style in zip(ERRORS, ("--", ":"))}
    compared = f"trqam-{COMPARED_BUDGET}", f"qam-{COMPARED_TEMPERATURE}"
    preset = f"trqam-{PRESET_BUDGET}", f"qam-{PRESET_TEMPERATURE}", "qam_e"
    external = compared[0], "constant", "penalty", f"qam-{PENALISED_TEMPERATURE}"
    parts = {
        "budgets and temperatures": [name for name in named if name.count("-") == 1],
        "the preset's TRQAM, QAM, QAM-E": preset,
        "adaptive, constant, external": external,
        "a critic that is wrong": [name for name in named if name.startswith(compared)],
    }
    heads = "path KL, nats per action", "λ (TRQAM)", "critic loss, mean of 5 rows", "success"
    figure = Figure(figsize=(15, 15), layout="constrained")
    for row, (part, names) in zip(figure.subplots(len(parts), 4), parts.items()):
        for axis, (head, key) in zip(row, zip(heads, [*COLUMNS.values(), "success"])):
            for name in names:
                curves = [curve_of(runs / f"{name}-seed{seed}", key, runs / f"prior-seed{seed}")
                          for seed in range(args.seeds)]
                style = dict(color=colors[name], ls=dashes.get(name[-7:], "-"), lw=1.2)
                draw_mean(axis, curves, label=named[name].label, **style)
                budget = name.removeprefix("trqam-")
                if key == "trust_region/path_kl" and budget.replace(".", "").isdigit():
                    axis.axhline(float(budget), color=colors[name], ls=(0, (1, 2)), lw=1)
            axis.set_title(f"{part}: {head}" if axis is row[0] else head, fontsize=9)
            axis.set(xlabel="fine-tuning updates", yscale="linear" if key == "success" else "log")
            axis.grid(alpha=0.3)
        row[-1].set_ylim(-0.03, 1.03)
        row[-1].legend(fontsize=7)
    band = "; band: standard error over seeds" if args.seeds > 1 else "; one seed: no band"
    figure.suptitle(f"{title}{band}; dotted horizontals: budgets", fontsize=9)
    return figure


def write(output: Path, title: str, table: str, rows: list[dict[str, Any]], figure: Any):
    """Table, rows and figure as NAME.md, NAME.csv and NAME.png, for output = FOLDER/NAME."""
    output.with_suffix(".md").write_text(f"{title}\n\n{table}")
    with open(output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    figure.savefig(output.with_suffix(".png"), dpi=80)
    print(f"\n{table}\n{output}: .png, .md (this table), .csv (each run)")


def main(args: Args):
    common.require(args.seeds > 0 and args.workers > 0 and args.updates >= 200,
                   "--seeds and --workers must be at least 1, --updates at least 200")
    study = settings()
    train_waves(args.workers, missing_runs(args, study))
    config = config_of(Path(args.runs_dir) / "prior-seed0")
    title, rows = describe(config, args.seeds, f"{args.updates:,} updates"), summarise(args, study)
    figure = draw(args, study, title)
    write(Path(args.runs_dir, "mechanism"), title, as_table(rows), rows, figure)


def start(main: Callable, args_class: type):
    """Run a study; what the user can mend ends it with one line."""
    try:
        main(tyro.cli(args_class))
    except (common.UserError, KeyboardInterrupt) as error:
        sys.exit(f"error: {error}" if str(error) else "stopped; the same command goes on")


if __name__ == "__main__":
    start(main, Args)
