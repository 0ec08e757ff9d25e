"""Success (return, where a task tells none) over training steps of any runs, with 95 % intervals,
beside the task's published curve.

    python benchmarks/compare.py runs/a runs/b ... --output comparison.png

Runs of one script on one task make one curve where they differ in nothing but the seed and what
belongs to a sitting; others make curves of their own, which name what differs. A copied and changed
script goes by its own name. Of several seeds the interval is Student's t over them; of one, 1.96
standard errors over its episodes. Published curves (published.csv: QAM and QAM-E as released with
the QAM paper; TRQAM from an independent replication) are dashed, their intervals Student's t over
their seeds. They were made on the official data at full size, the QAM paper's with its own settings
(gamma 0.99 in most domains, width 512), and around the change of OGBench 1.2.0 in when a single
task's success is computed. Prints each curve's last point and commits ("+changes": and changes).
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro
from matplotlib.figure import Figure

import common

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; beyond them the normal's.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
NAMES = dict.fromkeys(("trqam_offline", "trqam_online"), "TRQAM, budget {kl_budget:g}")
NAMES["qam_baseline"] = "QAM, τ = {inverse_temperature:g}"
MAY_DIFFER = common.OF_A_SITTING | set(  # in one curve; the data is known by its sha256
    "env_id seed dataset_path dataset_dir collect_episodes collect_seed bc_checkpoint "
    "eval_interval log_interval checkpoint_interval offline_steps online_steps".split()
)


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, of any script"""
    output: Path = Path("comparison.png")
    """the figure"""


def read_run(folder: Path) -> dict:
    """A run by its files. curve: fine-tuning step (0: cloned) -> success or return, its standard
    error; empty before the first evaluation. steps: of fine-tuning, that its settings ask for."""
    try:
        config = json.loads((folder / "config.json").read_text())
        rows = [*csv.DictReader((folder / "eval.csv").read_text().splitlines())]
        args, script = config["args"], config["script"]
        data = config["dataset"] or dict(origin="not there yet", sha256="")
        offline, online = args.get("offline_steps", 0), args.get("online_steps", 0)
        method = NAMES.get(script, script).format(**args)
        if script in NAMES and args.get("edit_scale"):
            method = f"QAM-E, edit {args['edit_scale']:g}{method[3:]}"
        method += (", then online" if offline else ", online") if online else ""
        if script in NAMES and not offline + online:
            method = "behaviour cloning"
        # A run older than a switch had it off.
        settings = {key: x for key, x in args.items() if key not in MAY_DIFFER and x is not False}
        settings |= dict(script=script, data=data["sha256"][:12])
        settings |= dict(ogbench=config.get("versions", {}).get("ogbench"))  # which scores
        settings |= dict(offline_steps=offline) if online else {}  # before the online ones
        place, curve = dict(bc=lambda step: 0, offline=int, online=lambda x: offline + int(x)), {}
        measure = "success" if all(row.get("success") for row in rows) else "return"
        for row in rows:
            scores = float(row[measure]), float(row.get(f"{measure}_stderr") or "nan")
            curve[place[row["stage"]](row["step"])] = scores
        sittings = [config | sitting for sitting in config.get("sittings", [config])]
        commits = [x.get("git_commit") or "unknown" for x in sittings]
        commits = [x[:7] + "+changes" * x.endswith("+changes") for x in commits]
        found = dict(folder=folder, task=args["env_id"], seed=args["seed"], method=method)
        found |= dict(settings=settings, curve=curve, measure=measure, steps=offline + online)
        hardware = [x["hardware"].get("gpu") or x["hardware"]["cpu"] for x in sittings]
        found |= dict(commits=commits, hardware=hardware, episodes=args.get("eval_episodes"))
        found |= dict(data=f"{data['origin']}, sha256 {data['sha256'][:12]}")
        found |= dict(clone="loaded" if args.get("bc_checkpoint") else "own")
    except OSError as error:
        sys.exit(f"error: {folder} is no run: {error.filename} cannot be read ({error.strerror})")
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {folder}: config.json or eval.csv is damaged ({error!r})")
    return found


def curves_of(runs: list[dict]) -> dict[str, list[dict]]:
    """Label -> the runs of a curve, from all runs of a task."""
    curves, labelled = {}, {}
    for run in runs:
        mine = curves.setdefault(repr((run["method"], sorted(run["settings"].items()))), [])
        for other in mine:
            if other["seed"] == run["seed"]:
                where = f"{run['task']}: {other['folder']} and {run['folder']}"
                sys.exit(f"error: a second run of {run['method']}, seed {run['seed']}, {where}")
        mine.append(run)
    for mine in curves.values():
        label, settings = mine[0]["method"], mine[0]["settings"]
        alike = [run["settings"] for run in runs if run["method"] == label]
        for key in sorted(set().union(*alike)):
            if any(other.get(key) != settings.get(key) for other in alike):
                label += f", {key} {settings.get(key, 'off')}"
        labelled[label] = mine
    return dict(sorted(labelled.items()))


def published(task: str) -> list[dict]:
    """The task's published curves: method, seeds, source, and arrays of steps, mean success and
    half of its interval."""
    rows = [*csv.DictReader(Path(__file__).with_name("published.csv").read_text().splitlines())]
    curves = []
    for method in sorted({row["method"] for row in rows if row["env_id"] == task}):
        mine = [row for row in rows if (row["env_id"], row["method"]) == (task, method)]
        columns = "step", "success_mean", "success_std", "seeds"
        steps, mean, std, n = (np.array([float(row[key]) for row in mine]) for key in columns)
        half = T95[int(n[0]) - 2] * std / np.sqrt(n)
        curve = dict(method=method, seeds=int(n[0]), source=mine[0]["source"])
        curves.append(curve | dict(steps=steps, mean=mean, half=half))
    return curves


def draw(axis, runs: list[dict], curves: list[tuple]):
    """A task's curves: (label, steps, mean, lower and upper end) of each; and the published ones,
    dashed."""
    drawn, task = [(*curve, dict(marker="o", ms=3)) for curve in curves], runs[0]["task"]
    for x in published(task):
        label = f"{x['method']}, published ({x['seeds']} seeds, official data)"
        ends = x["mean"] - x["half"], x["mean"] + x["half"]
        drawn.append((label, x["steps"], x["mean"], *ends, dict(ls="--", lw=1)))
    for number, (label, steps, mean, low, high, style) in enumerate(drawn):
        axis.plot(steps, mean, color=f"C{number}", label=label, **style)
        axis.fill_between(steps, low, high, color=f"C{number}", alpha=0.15, lw=0)
    data = sorted({run["data"] for run in runs})
    axis.set_title(f"{task}\ndata: {'; '.join(data)}", fontsize=9)
    axis.set(xlabel="fine-tuning steps", ylabel=runs[0]["measure"])
    axis.set(**dict(ylim=(-0.03, 1.03)) if runs[0]["measure"] == "success" else {})
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def common_curve(runs: list[dict]) -> tuple[list[int], np.ndarray]:
    """The steps at which all runs were evaluated, and their scores and standard errors there
    [seeds, steps, 2]."""
    steps = sorted(set.intersection(*(set(run["curve"]) for run in runs)))
    if not steps:
        where = " and ".join(str(run["folder"]) for run in runs)
        sys.exit(f"error: no evaluation at the same step: {where}")
    return steps, np.array([[run["curve"][step] for step in steps] for run in runs])


def main(args: Args):
    runs = [read_run(folder) for folder in args.runs or sys.exit("error: name a run's folder")]
    for run in runs:
        if not run["curve"]:
            sys.exit(f"error: {run['folder']} has no evaluation yet; train on, or leave it out")
    tasks = dict.fromkeys(run["task"] for run in runs)
    figure = Figure(figsize=(7 * len(tasks), 4.5), layout="constrained")
    print("| task | method | seeds | steps | score, 95 % interval | commits |\n|" + "---|" * 6)
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        drawn, here = [], [run for run in runs if run["task"] == task]
        for label, mine in curves_of(here).items():
            (steps, values), n = common_curve(mine), len(mine)
            success, t = values[..., 0], (1.96, *T95, *[1.96] * n)[n - 1]
            error = values[0, :, 1] if n == 1 else success.std(0, ddof=1) / np.sqrt(n)
            mean, half = success.mean(0), t * error
            drawn.append((f"{label} ({n} seeds)", steps, mean, mean - half, mean + half))
            commits = ", ".join(dict.fromkeys(x for run in mine for x in run["commits"]))
            end = f"{steps[-1]:,} | {mean[-1]:.2f} ± {half[-1]:.2f} | {commits}"
            print(f"| {task} | {label} | {n} | {end} |")
        draw(axis, here, drawn)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(f"\n{args.output}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # an ASCII terminal
    main(tyro.cli(Args))
