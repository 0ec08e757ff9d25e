"""Success over training steps of any runs, by method, with 95 % intervals, beside the published curve of the task.

    python benchmarks/compare.py runs/a runs/b ... --output comparison.png

Runs of one method, at one strength, on one task are taken together; each seed counts once. With several seeds the
interval is Student's t over them; with one, 1.96 standard errors over its episodes. Published curves (published.csv:
QAM and QAM-E as released with the QAM paper, every 100,000 steps; TRQAM from an independent replication with 4 seeds)
are dashed, their intervals Student's t over their seeds. They were made on the official data at full size, the QAM
paper's with its own settings (gamma 0.99 in most domains, width 512), and around the change of OGBench 1.2.0 in when
a single task's success is computed. Prints the last point of each curve as a table.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; beyond the table the normal distribution's.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)

# Settings in which runs of one method may differ: the others make them another method.
MAY_DIFFER = set(
    "seed run_dir resume device num_threads dataset_path dataset_dir collect_seed bc_checkpoint bc_steps eval_only "
    "checkpoint eval_interval log_interval checkpoint_interval capture_video track online_steps compile "
    "cuda_graph max_data_gb".split()
)


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, of any of the scripts"""
    output: Path = Path("comparison.png")
    """the figure"""


def method_of(config: dict) -> str:
    """What a run's curve is called."""
    args = config["args"]
    online = (", then online" if args["offline_steps"] else ", online") if args.get("online_steps") else ""
    if config["script"].startswith("trqam"):
        return f"TRQAM, budget {args['kl_budget']:g}{online}"
    name = f"QAM-E, edit {args['edit_scale']:g}" if args["edit_scale"] else "QAM"
    return f"{name}, τ = {args['inverse_temperature']:g}{online}"


def read_run(folder: Path) -> tuple[dict, dict[int, tuple[float, float]]]:
    """(config, fine-tuning step -> (success, its standard error over episodes)) of a run; cloning is step 0."""
    try:
        config = json.loads((folder / "config.json").read_text())
        with open(folder / "eval.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        before = {"bc": None, "offline": 0, "online": config["args"]["offline_steps"]}
        curve = {
            0 if row["stage"] == "bc" else before[row["stage"]] + int(row["step"]): (
                float(row["success"]), float(row["success_stderr"])
            )
            for row in rows
        }  # fmt: skip
        method_of(config)
    except OSError as error:
        sys.exit(f"error: {folder} is no run: {error.filename} cannot be read ({error.strerror})")
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {folder}: config.json or eval.csv is damaged ({error!r})")
    if not curve:
        sys.exit(f"error: {folder} has no evaluation yet; train on, or leave it out")
    return config, curve


def interval(values: np.ndarray, of_one: np.ndarray) -> np.ndarray:
    """Half width of the 95 % interval of the mean of values [seeds, steps]; of_one [steps]: errors of a single seed."""
    seeds = len(values)
    if seeds == 1:
        return 1.96 * of_one
    return (T95[seeds - 2] if seeds - 2 < len(T95) else 1.96) * values.std(0, ddof=1) / np.sqrt(seeds)


def main(args: Args):
    if not args.runs:
        sys.exit("error: name at least one folder of a run")
    groups: dict[str, dict[str, dict[int, dict]]] = {}  # task -> method -> seed -> curve
    first: dict[tuple[str, str], dict] = {}  # (task, method) -> settings of its first run
    origins = {}
    for folder in args.runs:
        config, curve = read_run(folder)
        env_id, seed = config["args"]["env_id"], config["args"]["seed"]
        online = config["args"].get("online_steps")  # which follow the offline ones, so those must be equally many
        may_differ = MAY_DIFFER if online else MAY_DIFFER | {"offline_steps"}
        # A run older than a switch had it off.
        settings = {k: value for k, value in config["args"].items() if k not in may_differ and value is not False}
        same = first.setdefault((env_id, method_of(config)), settings)
        for key in settings | same:
            ours, theirs = settings.get(key, "off"), same.get(key, "off")
            if ours != theirs:
                sys.exit(f"error: {folder} has {key} {ours}, the first run of its method and task {theirs}")
        seeds = groups.setdefault(env_id, {}).setdefault(method_of(config), {})
        if seed in seeds:
            sys.exit(f"error: {folder} is a second run of {method_of(config)} with seed {seed} on {env_id}")
        seeds[seed] = curve
        data = config["dataset"]
        origins.setdefault(env_id, set()).add(f"{data['origin']}, sha256 {data['sha256'][:12]}")
    with open(Path(__file__).with_name("published.csv"), newline="") as file:
        published = list(csv.DictReader(file))

    figure = Figure(figsize=(7 * len(groups), 4.5), layout="constrained")
    print("| task | method | seeds | steps | success, 95 % interval |\n|---|---|---|---|---|")
    for axis, (env_id, methods) in zip(np.atleast_1d(figure.subplots(1, len(groups))), groups.items()):
        for number, (method, seeds) in enumerate(sorted(methods.items())):
            steps = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
            if not steps:
                sys.exit(f"error: the runs of {method} on {env_id} have no evaluation at the same step")
            values = np.array([[curve[step][0] for step in steps] for curve in seeds.values()])  # [seeds, steps]
            errors = np.array([next(iter(seeds.values()))[step][1] for step in steps])
            mean, half = values.mean(0), interval(values, errors)
            axis.plot(steps, mean, marker="o", ms=3, color=f"C{number}", label=f"{method} ({len(seeds)} seeds)")
            axis.fill_between(steps, mean - half, mean + half, color=f"C{number}", alpha=0.2, lw=0)
            print(f"| {env_id} | {method} | {len(seeds)} | {steps[-1]:,} | {mean[-1]:.2f} ± {half[-1]:.2f} |")
        for number, method in enumerate(sorted({row["method"] for row in published if row["env_id"] == env_id})):
            rows = [row for row in published if row["env_id"] == env_id and row["method"] == method]
            steps, mean, deviation, n = (
                np.array([float(row[key]) for row in rows]) for key in ("step", "success_mean", "success_std", "seeds")
            )
            half = T95[int(n[0]) - 2] * deviation / np.sqrt(n)
            label = f"{method}, published ({n[0]:.0f} seeds, official data)"
            axis.plot(steps, mean, ls="--", lw=1, color=f"C{number + 7}", label=label)
            axis.fill_between(steps, mean - half, mean + half, color=f"C{number + 7}", alpha=0.1, lw=0)
        data = "; ".join(sorted(origins[env_id]))
        axis.set_title(f"{env_id}\ndata: {data}", fontsize=9)
        axis.set(xlabel="fine-tuning steps", ylabel="success", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(f"\n{args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
