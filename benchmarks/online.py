"""From offline to online: TRQAM at its budget and at a larger one, from a cloned policy alone, and QAM.

    python benchmarks/online.py               # one seed
    python benchmarks/online.py --seeds 3     # the committed figure

All runs are runs of the scripts with their quick presets, from one cloned policy per seed; QAM's inverse temperature
is the best of those tried in mechanism.py. Finished runs are kept in --runs-dir and reused; one that was stopped is
resumed.
"""

import concurrent.futures
import csv
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np
import tyro
from mechanism import Setting, read, train_together

import common

TEMPERATURE, ONLINE_BUDGET = 3.0, 1.0
OFFLINE = Setting("trqam-offline", "TRQAM, offline", "trqam_offline", [])  # whose files the others start from
TRQAM, QAM = "trqam_online", "qam_baseline"
BUDGET, TAU = ["--kl-budget-online", str(ONLINE_BUDGET)], ["--inverse-temperature", str(TEMPERATURE)]
STUDY = [  # setting, flag that takes the file of an offline run from which it starts, and that file
    (Setting("trqam-online", "TRQAM", TRQAM, []), "--checkpoint", "checkpoint.pt"),
    (
        Setting(f"trqam-online-{ONLINE_BUDGET}", f"TRQAM, budget {ONLINE_BUDGET} online", TRQAM, BUDGET),
        "--checkpoint",
        "checkpoint.pt",
    ),
    (Setting("clone-online", "TRQAM, from the clone alone", TRQAM, []), "--bc-checkpoint", "bc_checkpoint.pt"),
    (Setting("qam", f"QAM, τ = {TEMPERATURE:g}", QAM, TAU), "--bc-checkpoint", "bc_checkpoint.pt"),
]


@dataclass
class Args:
    seeds: int = 1
    """seeds 0 ... seeds - 1 of every setting"""
    online_steps: int = 8_000
    """environment steps of each run"""
    runs_dir: str = "runs/online"
    """folder of the runs; finished ones in it are reused"""
    output: str = "runs/online"
    """folder of online.png, online.md and online.csv"""
    workers: int = os.cpu_count()
    """runs trained at the same time (each on one thread)"""


def finished(run: Path, stage: str, steps: int | None) -> bool:
    """Whether a run has been evaluated at the end of a stage. Raises UserError where that has not so many steps."""
    if not (run / "config.json").exists():
        return False
    end = json.loads((run / "config.json").read_text())["args"][f"{stage}_steps"]
    if steps not in (None, end):
        raise common.UserError(f"{run} was made with {end} {stage} steps, not {steps}; name another --runs-dir")
    rows = read(run / "eval.csv") if (run / "eval.csv").exists() else []
    return any(row["stage"] == stage and int(row["step"]) == end for row in rows)


def train_all(args: Args):
    """Train what is not there yet, `workers` runs at a time. Raises UserError where one fails."""
    runs, threads = Path(args.runs_dir), ["--num-threads", "1"]
    online = ["--online-steps", str(args.online_steps), *threads]
    waves = [[], []]
    for seed in range(args.seeds):
        start = runs / f"{OFFLINE.name}-seed{seed}"
        if not finished(start, "offline", None):
            waves[0].append((OFFLINE, seed, start, ["quick", *threads]))
        for setting, flag, file in STUDY:
            run, preset = runs / f"{setting.name}-seed{seed}", [] if flag == "--checkpoint" else ["quick"]
            if not finished(run, "online", args.online_steps):
                waves[1].append((setting, seed, run, [*preset, *setting.flags, *online, flag, str(start / file)]))
    with concurrent.futures.ProcessPoolExecutor(
        args.workers, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for wave in waves:
            train_together(pool, wave)


def commits_of(config: dict[str, Any]) -> str:
    """Of all sittings of a run, in order."""
    sittings = [config, *config.get("resumed", [])]
    return " ".join(dict.fromkeys(str(sitting["git_commit"] or "unknown") for sitting in sittings))


def summarise(args: Args) -> list[dict[str, Any]]:
    """Each evaluation of each run, with the trust region's mean over the steps since the one before, and its speed."""
    found = []
    for setting, *_ in STUDY:
        for seed in range(args.seeds):
            run = Path(args.runs_dir) / f"{setting.name}-seed{seed}"
            config, train_rows = json.loads((run / "config.json").read_text()), read(run / "train.csv")
            last = {"bc": 0, "offline": 0, "online": 0}
            for row in read(run / "eval.csv"):
                stage, step = row["stage"], int(row["step"])
                since = [
                    line for line in train_rows if line["stage"] == stage and last[stage] < int(line["step"]) <= step
                ]
                last[stage] = step
                mean = lambda key: np.mean([float(line[key]) for line in since if line.get(key)] or [float("nan")])
                new = dict(setting=setting.label, seed=seed, stage=stage, step=step)
                new |= {key: float(row[key]) for key in ("success", "success_stderr")}
                new |= {key: mean(f"trust_region/{key}") for key in ("path_kl", "kl_budget", "lambda")}
                new |= {key: mean(f"charts/{key}") for key in ("environment_SPS", "update_SPS")}
                new |= dict(dataset_sha256=config["dataset"]["sha256"], commits=commits_of(config))
                found.append(new | dict(cpu=config["hardware"]["cpu"], torch=config["versions"]["torch"]))
    return found


def over_seeds(rows: list[dict[str, Any]], key: str) -> str:
    """Mean of each seed's mean ± standard error over seeds; empty where there are no rows."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    values = [np.mean([row[key] for row in rows if row["seed"] == seed]) for seed in seeds]
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{error}" if values else ""


def as_table(rows: list[dict[str, Any]]) -> str:
    """Success of each setting at each stage's end, at equal environment steps, and over the last half, as markdown."""
    every = sorted({row["step"] for row in rows if row["stage"] == "online"})
    steps = every[:: -max(1, len(every) // 4)][::-1]
    late = [step for step in every if step > every[-1] / 2]
    heads = ["cloned", "before going online", *(f"{step:,} steps online" for step in steps)]
    heads += [f"mean of {len(late)}, after {every[-1] // 2:,}", "path KL, last"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for label in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == label]
        offline = max((row["step"] for row in mine if row["stage"] == "offline"), default=None)
        at = lambda stage, *steps: [row for row in mine if row["stage"] == stage and row["step"] in steps]
        groups = [[row for row in mine if row["stage"] == "bc"], at("offline", offline)]
        groups += [at("online", step) for step in steps] + [at("online", *late)]
        cells = [over_seeds(group, "success") for group in groups] + [over_seeds(at("online", every[-1]), "path_kl")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(args: Args) -> str:
    """What the runs are, for figure and table."""
    config = json.loads((Path(args.runs_dir) / f"{STUDY[0][0].name}-seed0" / "config.json").read_text())
    hardware, settings = config["hardware"], config["args"]
    return (
        f"{settings['env_id']}, {args.seeds} seed{'s' * (args.seeds > 1)}, evaluations of {settings['eval_episodes']} "
        f"episodes; online: batches {'half of what was collected' if settings['balanced_sampling'] else 'uniform'}, "
        f"{settings['utd_ratio']} update a step after {settings['learning_starts']}\n"
        f"{common.describe_dataset(config['dataset'])}\n{hardware['cores']} cores of {hardware['cpu']}, "
        f"torch {config['versions']['torch']}, commits {commits_of(config)}"
    )


def draw(args: Args) -> Any:
    """Success, path KL and lambda over environment steps; left of 0, offline updates. Band: standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    panels = (("success", "eval.csv"), ("trust_region/path_kl", "train.csv"), ("trust_region/lambda", "train.csv"))
    for axis, (key, table) in zip(figure.subplots(1, 3), panels):
        for number, (setting, *_) in enumerate(STUDY):
            curves = []
            for seed in range(args.seeds):
                run = Path(args.runs_dir) / f"{setting.name}-seed{seed}"
                rows = [row for row in read(run / table) if row.get(key) and (row["stage"] != "bc" or key == "success")]
                offline = max((int(row["step"]) for row in rows if row["stage"] == "offline"), default=0)
                starts = {"bc": None, "offline": -offline, "online": 0}
                place = lambda row: -offline if row["stage"] == "bc" else starts[row["stage"]] + int(row["step"])
                curves.append({place(row): float(row[key]) for row in rows})
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            if not steps:
                continue
            values = np.array([[curve[step] for step in steps] for curve in curves])  # [seeds, steps]
            mean, error = values.mean(0), values.std(0, ddof=args.seeds > 1) / len(values) ** 0.5
            marker = dict(marker="o", ms=3) if key == "success" else dict(lw=0.9)
            axis.plot(steps, mean, color=f"C{number}", label=setting.label, **marker)
            axis.fill_between(steps, mean - error, mean + error, color=f"C{number}", alpha=0.2, lw=0)
        axis.axvline(0, color="0.4", ls=":")
        axis.grid(alpha=0.3)
        axis.set(
            title=key.split("/")[-1].replace("_kl", " KL, nats per action"),
            yscale="linear" if key == "success" else "log",
        )
        axis.set_xlabel("offline updates  <  0  <  environment steps")
    success, kl, _ = figure.axes
    success.set_ylim(-0.03, 1.03)
    success.legend(fontsize=8)
    config = json.loads((Path(args.runs_dir) / f"{STUDY[0][0].name}-seed0" / "config.json").read_text())
    kl.axhline(config["args"]["kl_budget"], color="C3", ls="--", lw=1, label="budget")
    kl.legend(fontsize=8)
    figure.suptitle(f"{describe(args)}; band: standard error over seeds", fontsize=8)
    return figure


def main(args: Args):
    if args.seeds < 1 or args.workers < 1 or args.online_steps <= 500:
        raise common.UserError("--seeds and --workers must be at least 1, and --online-steps more than 500")
    train_all(args)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = summarise(args)
    table = as_table(rows)
    (output / "online.md").write_text(f"{describe(args)}\n\n{table}")
    with open(output / "online.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(args).savefig(output / "online.png", dpi=90)
    print(f"\n{table}\n{output}: online.png, online.md (this table), online.csv (each evaluation)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except common.UserError as error:
        sys.exit(f"error: {error}")
