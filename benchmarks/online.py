"""From offline to online: TRQAM at its budget, at a larger one and from a clone alone, and QAM.

    python benchmarks/online.py               # one seed
    python benchmarks/online.py --seeds 3     # the committed figure

All runs are runs of the scripts with their quick presets, from one cloned policy per seed; QAM's
inverse temperature is the best of those tried in mechanism.py. Finished runs are kept in --runs-dir
and reused; one that was stopped is resumed.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mechanism
import numpy as np
from mechanism import Setting, config_of, finished, read

import common

TEMPERATURE, BUDGET = 3.0, 1.0
OFFLINE = Setting("trqam-offline", "TRQAM, offline", "trqam_offline", [])  # where they start
TRQAM, CLONE = "trqam_online", "bc_checkpoint.pt"
STUDY = [  # setting, file of the offline run from which it starts
    (Setting("trqam-online", "TRQAM", TRQAM, []), "checkpoint.pt"),
    (Setting(f"trqam-online-{BUDGET}", f"TRQAM, budget {BUDGET} online", TRQAM,
             ["--kl-budget-online", str(BUDGET)]), "checkpoint.pt"),
    (Setting("clone-online", "TRQAM, from the clone alone", TRQAM,
             ["--offline-steps", "0"]), CLONE),
    (Setting("qam", f"QAM, τ = {TEMPERATURE:g}", "qam_baseline",
             ["--inverse-temperature", str(TEMPERATURE)]), CLONE),
]


@dataclass
class Args:
    seeds: int = 1
    """seeds 0 ... seeds - 1 of every setting"""
    online_steps: int = 8_000
    """environment steps of each run"""
    runs_dir: str = "runs/online"
    """folder of the runs, whose finished ones are reused, and of online.png, .md and .csv"""
    workers: int = os.cpu_count() or 1
    """runs trained at the same time (each on one thread)"""


def missing_runs(args: Args) -> Iterable[list[tuple]]:
    """What is not trained yet: the offline runs, then what starts from them."""
    runs, threads = Path(args.runs_dir), ["--num-threads", "1"]
    seeds = {seed: runs / f"{OFFLINE.name}-seed{seed}" for seed in range(args.seeds)}
    yield [(OFFLINE, seed, run, ["quick", *threads]) for seed, run in seeds.items()
           if not finished(run, "offline")]
    missing = []
    for seed, start in seeds.items():
        for setting, file in STUDY:
            run, clone = runs / f"{setting.name}-seed{seed}", file == CLONE
            if not finished(run, "online", online_steps=args.online_steps):
                words = [*["quick"] * clone, *setting.flags, *threads]
                words += ["--bc-checkpoint" if clone else "--checkpoint", str(start / file)]
                words += ["--online-steps", str(args.online_steps)]
                missing.append((setting, seed, run, words))
    yield missing


def summarise(args: Args) -> list[dict[str, Any]]:
    """Each evaluation of each run, with means over the steps since the one before."""
    found = []
    for setting, _ in STUDY:
        for seed in range(args.seeds):
            run = Path(args.runs_dir) / f"{setting.name}-seed{seed}"
            trained, last = read(run / "train.csv"), {}
            for row in read(run / "eval.csv"):
                stage, step = row["stage"], int(row["step"])
                since = range(last.get(stage, 0) + 1, step + 1)
                lines = [x for x in trained if x["stage"] == stage and int(x["step"]) in since]
                last[stage] = step
                new = dict(setting=setting.label, seed=seed, stage=stage, step=step)
                new |= {key: float(row[key]) for key in ("success", "success_stderr")}
                for key in ("trust_region/path_kl", "trust_region/kl_budget", "trust_region/lambda",
                            "charts/environment_SPS", "charts/SPS"):
                    values = [float(line[key]) for line in lines if line.get(key)]
                    new[key.split("/")[1]] = np.mean(values or [np.nan])
                found.append(new | mechanism.made_on(config_of(run), "commits"))
    return found


def as_table(rows: list[dict[str, Any]]) -> str:
    """Success at stages' ends, at equal environment steps and over the last half, as markdown."""
    every = sorted({row["step"] for row in rows if row["stage"] == "online"})
    steps = every[:: -max(1, len(every) // 4)][::-1]
    late = [step for step in every if step > every[-1] / 2]
    heads = ["cloned", "before going online", *(f"{step:,} steps online" for step in steps)]
    heads += [f"mean of {len(late)}, after {every[-1] // 2:,}", "path KL, last"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for label in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == label]
        offline = max((row["step"] for row in mine if row["stage"] == "offline"), default=None)

        def mean(stage: str, steps: list[int] | None, key: str = "success") -> str:
            chosen = [x for x in mine if x["stage"] == stage and (not steps or x["step"] in steps)]
            seeds = dict.fromkeys(x["seed"] for x in chosen)
            values = [np.mean([x[key] for x in chosen if x["seed"] == seed]) for seed in seeds]
            return mechanism.over_seeds(values, ".2f", ".2f")

        cells = [mean("bc", None), mean("offline", [offline])]
        cells += [mean("online", group) for group in [*([step] for step in steps), late]]
        cells.append(mean("online", every[-1:], "path_kl"))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def curve_of(run: Path, key: str) -> dict[int, float]:
    """A column of a run over environment steps; left of 0, over offline updates."""
    rows = read(run / ("eval.csv" if key == "success" else "train.csv"))
    rows = [x for x in rows if x.get(key) and (x["stage"] != "bc" or key == "success")]
    offline = max((int(row["step"]) for row in rows if row["stage"] == "offline"), default=0)
    place = dict(bc=lambda step: -offline, offline=lambda step: step - offline, online=int)
    return {place[row["stage"]](int(row["step"])): float(row[key]) for row in rows}


def draw(args: Args, title: str, budget: float) -> Any:
    """Success, path KL and lambda over environment steps; left of 0, offline updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    success, kl, lam = axes = figure.subplots(1, 3)
    for axis, key in zip(axes, ("success", "trust_region/path_kl", "trust_region/lambda")):
        for setting, _ in STUDY:
            runs = [Path(args.runs_dir, f"{setting.name}-seed{seed}") for seed in range(args.seeds)]
            mechanism.draw_mean(axis, [curve_of(run, key) for run in runs], label=setting.label)
        axis.axvline(0, color="0.4", ls=":")
        axis.grid(alpha=0.3)
        axis.set(xlabel="offline updates  <  0  <  environment steps")
    success.set(title="success", ylim=(-0.03, 1.03))
    kl.set(title="path KL, nats per action", yscale="log")
    lam.set(title="lambda", yscale="log")
    kl.axhline(budget, color="0.4", ls="--", lw=1, label="budget")
    success.legend(fontsize=8)
    kl.legend(fontsize=8)
    figure.suptitle(f"{title}; band: standard error over seeds", fontsize=8)
    return figure


def main(args: Args):
    common.require(args.seeds > 0 and args.workers > 0 and args.online_steps > 500,
                   "--seeds and --workers must be at least 1, --online-steps more than 500")
    mechanism.train_waves(args.workers, missing_runs(args))
    config = config_of(Path(args.runs_dir) / f"{STUDY[0][0].name}-seed0")
    settings, rows = config["args"], summarise(args)
    batches = "half of what was collected" if settings["balanced_sampling"] else "uniform"
    words = (f"online: batches {batches}, {settings['utd_ratio']} update a step after "
             f"{settings['learning_starts']}")
    title = mechanism.describe(config, args.seeds, words)
    figure = draw(args, title, settings["kl_budget"])
    mechanism.write(Path(args.runs_dir, "online"), title, as_table(rows), rows, figure)


if __name__ == "__main__":
    mechanism.start(main, Args)
