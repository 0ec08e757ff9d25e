"""Tables, learning curves and scores of many runs, for a page, beside the published numbers.

    python benchmarks/results.py runs/study --output docs/results/study \\
        --page docs/results.md --section study --keep benchmarks/results/study

A method is a folder of runs that differ in the seed alone: ARM/seed0, ARM/seed1, ... of one task,
TASK/ARM/seed0, ... of many; each task may have settings of its own. The first method is compared
with the others: that of the folder that is named first, and below one, in alphabetical order.

Refuses to pool what differs: an ARM's runs on a task must agree in settings, data, the evaluations
that count, and in whether they cloned behaviour themselves; commits and hardware may differ, and
are listed. A run that has not done all its steps is left out, and named.

As rliable does: the mean is over tasks, the interquartile mean over all runs of all tasks (one with
more seeds counts more); the probability of improvement is the share of pairs of runs in which A's
score is higher, ties one half, averaged over tasks; intervals are 95 % percentiles of a bootstrap
that draws each task's seeds anew. The draws are the same in each call.
"""

import csv
import itertools
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tyro
from compare import common_curve, curves_of, draw, published, read_run
from matplotlib.figure import Figure
from scipy.stats import bootstrap, trim_mean

import common

FILES, ROWS_KEPT = ("config.json", "eval.csv", "train.csv"), 200  # kept, the last one thinned
PATHS = set("run_dir dataset_path dataset_dir bc_checkpoint checkpoint".split())
LISTED = ["hardware", "commits"]  # may differ in a pool, and in the sittings of a run
COLUMNS = [*"task arm method seed score scored steps data clone".split(), *LISTED]
HEADS = "task|method|seeds|mean|interquartile mean|updates|scored on|data|hardware|commits"
IMPROVES = "task|A|B|probability that A improves on B"
NOTE = """A run's score: the mean of its last {} evaluations (all, where it has fewer). In brackets:
95 % intervals, by a bootstrap over seeds, stratified over tasks; of a few seeds, they are too
narrow. Published: one evaluation, at the step nearest to the runs' updates; Student's t over seeds.
"""


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, or folders that hold such at any depth"""
    last: int = 3
    """a run's score is the mean of its last evaluations, so many of them"""
    output: Path = Path("results")
    """the figure and the scores of each run: this name with .png and .csv"""
    page: Path | None = None
    """where the tables go, between <!-- results.py: SECTION --> and <!-- end -->; else printed"""
    section: str = ""
    """name of the page's section"""
    keep: Path | None = None
    """folder for a small copy of the runs, without this machine's paths: ARM/seed0, ..."""


def find_runs(args: Args) -> list[dict]:
    """The finished runs below the folders, each with its arm and score."""
    folders, runs = {}, []
    for path in args.runs:
        below = sorted(Path(x) for x, _, _ in os.walk(path, followlinks=True))
        found = [x for x in below if (x / "eval.csv").exists() and (x / FILES[0]).exists()]
        folders |= dict.fromkeys(x.resolve() for x in found or sys.exit(f"error: no run in {path}"))
    for run in map(read_run, folders):
        if max(run["curve"], default=-1) < run["steps"]:
            print(f"left out, not finished: {run['folder']}", file=sys.stderr)
            continue
        # The clone's score, at 0, counts only where nothing came after it.
        steps = sorted(set(run["curve"]) - {0})[-args.last :] or [0]
        run["settings"] |= dict(clone=run["clone"], evaluated_at=" ".join(map(str, steps)))
        score = round(np.mean([run["curve"][step][0] for step in steps]), 9)  # so ties are ties
        scored = f"{run['measure']}, {len(steps)} × {run['episodes']} episodes"
        runs.append(run | dict(arm=run["folder"].parent.name, score=score, scored=scored))
    return runs or sys.exit("error: no finished run")


def pool(runs: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """(task, arm) -> its runs, by seed. Exits where they differ in what must not."""
    pools = {}
    for run in runs:
        pools.setdefault((run["task"], run["arm"]), []).append(run)
    for (task, arm), mine in pools.items():
        mine.sort(key=lambda run: run["seed"])
        if len(curves := curves_of(mine)) > 1:
            (one, (a, *_)), (two, (b, *_)) = [*curves.items()][:2]
            sys.exit(f"error: runs of {arm} on {task} are not pooled, because they differ:\n"
                     f"  {a['folder']}: {one}\n  {b['folder']}: {two}\n"
                     "give each method a folder of its own, or leave one out")
    return pools


def labels_of(runs: list[dict]) -> dict[str, str]:
    """Arm -> compare.py's name of its method, or where several go by it, the arm's own name."""
    pairs = dict.fromkeys((run["arm"], run["method"]) for run in runs)
    arms, methods = zip(*pairs)
    single = lambda arm, method: arms.count(arm) == methods.count(method) == 1
    return {arm: method if single(arm, method) else arm for arm, method in pairs}


def mean(*samples, axis=-1):
    """Mean over tasks, of one sample of runs for each."""
    return np.mean([sample.mean(axis) for sample in samples], axis=0)


def iqm(*samples, axis=-1):
    """Interquartile mean over all runs of all tasks."""
    return trim_mean(np.concatenate(samples, axis), 0.25, axis=axis)


def improvement(*samples, axis=-1):
    """Probability that A improves on B: A's sample for each task, then B's."""
    tasks = len(samples) // 2
    pairs = zip(samples[:tasks], samples[tasks:])
    signs = [np.sign(a[..., :, None] - b[..., None, :]).mean((-2, -1)) for a, b in pairs]
    return (1 + np.mean(signs, axis=0)) / 2


def interval(statistic, samples: list[np.ndarray], axis: int = -1):
    """Ends of the 95 % interval. Each sample, one for each task, is drawn anew on its own."""
    result = bootstrap(samples, statistic, axis=axis, vectorized=True, method="percentile", rng=0)
    return result.confidence_interval


def cell(statistic, samples: list[np.ndarray]) -> str:
    """`0.61 [0.56, 0.64]`"""
    value = f"{statistic(*samples):.2f}"
    if min(map(len, samples)) < 2:  # which says nothing of its task's spread
        return f"{value} (1 seed)"
    return "{} [{:.2f}, {:.2f}]".format(value, *interval(statistic, samples))


def unique(values) -> str:
    return "; ".join(dict.fromkeys(map(str, values)))


def groups_of(runs: list[dict]) -> dict[str, list[str]]:
    """Name -> its tasks: each task, each domain that has several, and all."""
    tasks, domains = [*dict.fromkeys(run["task"] for run in runs)], {}
    returns = {run["task"] for run in runs if run["measure"] == "return"}
    for task in tasks:
        if task not in returns:  # whose scales differ
            domains.setdefault(common.domain_of(task), []).append(task)
    groups = {task: [task] for task in tasks}
    groups |= {f"{name}, {len(x)} tasks": x for name, x in domains.items() if len(x) > 1}
    every = [*itertools.chain(*domains.values())]
    return groups | ({f"all {len(every)} tasks": every} if len(domains) > 1 else {})


def tables(pools: dict, groups: dict[str, list[str]], labels: dict[str, str]) -> str:
    """The scores, and who improves on whom."""
    scores, better = [HEADS.split("|")], [IMPROVES.split("|")]
    for name, tasks in groups.items():
        samples, updates = {}, 0
        for arm, label in labels.items():
            mine = [pools[task, arm] for task in tasks if (task, arm) in pools]
            if len(mine) < len(tasks):
                missing = f"only {len(mine)} of the tasks"
                scores += [[name, label, missing, *[""] * 7]] if mine else []
                continue
            samples[arm] = [np.array([run["score"] for run in runs]) for runs in mine]
            runs = [*itertools.chain(*mine)]
            updates = max(updates, *(run["steps"] for run in runs))
            facts = [unique(f"{run['steps']:,}" for run in runs)]
            facts += [unique(run[key] for run in runs) for key in ("scored", "data")]
            facts += [unique(x for run in runs for x in run[key]) for key in LISTED]
            scores.append([name, label, unique(sorted(map(len, mine))), cell(mean, samples[arm]),
                           cell(iqm, samples[arm]), *facts])
        for x in published(name):
            i = np.abs(x["steps"] - updates).argmin()
            (value, half), step = (x[key][i] for key in ("mean", "half")), f"{x['steps'][i]:,.0f}"
            value = f"{value:.2f} [{value - half:.2f}, {value + half:.2f}]"
            scores.append([name, f"{x['method']}, published", str(x["seeds"]), value, "", step, "",
                           f"official; {x['source']}", "", ""])
        first, *others = samples or [""]
        better += [[name, labels[first], labels[arm],
                    cell(improvement, samples[first] + samples[arm])] for arm in others]
    line = lambda row: f"| {' | '.join(row)} |\n"
    as_text = lambda rows: "".join(map(line, (rows[0], ["---"] * len(rows[0]), *rows[1:])))
    return "\n".join(as_text(rows) for rows in (scores, better) if len(rows) > 1)


def figure_of(pools: dict, tasks: list[str], labels: dict[str, str]) -> Figure:
    rows, columns = -(-len(tasks) // 3), min(3, len(tasks))
    figure = Figure(figsize=(7 * columns, 4.5 * rows), layout="constrained")
    for place, task in enumerate(tasks):
        curves, here = [], {arm: pools[task, arm] for arm in labels if (task, arm) in pools}
        for arm, runs in here.items():
            steps, values = common_curve(runs)
            middle = values[..., 0].mean(0)
            ends = interval(mean, [values[..., 0]], axis=0) if len(runs) > 1 else (middle, middle)
            curves.append((f"{labels[arm]} ({len(runs)} seeds)", steps, middle, *ends))
        axis = figure.add_subplot(rows, columns, place + 1)
        draw(axis, [*itertools.chain(*here.values())], curves)
    return figure


def keep(run: dict, folder: Path):
    """A small copy of a run, without the paths of the machine."""
    bare = lambda x: re.sub(r"[^\s=]*/(?=\S)", "", x) if isinstance(x, str) else [*map(bare, x)]
    config, evals, train = ((run["folder"] / x).read_text() for x in FILES)
    config, (head, *rows) = json.loads(config), train.splitlines(keepends=True)
    config["args"] |= {key: bare(config["args"][key]) for key in PATHS & config["args"].keys()}
    config["dataset"] |= dict(files=bare(config["dataset"]["files"]))
    for sitting in (config, *config.get("sittings", [])):
        sitting |= {key: bare(sitting[key]) for key in {"command"} & sitting.keys()}
    rows = rows[::-1][:: -(-len(rows) // ROWS_KEPT) or 1][::-1]  # the last one is among them
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, (json.dumps(config, indent=1), evals, "".join([head, *rows]))):
        (folder / name).write_text(text)


def put(page: Path, section: str, text: str):
    """Between the section's marks, and nowhere else."""
    begin, end = f"<!-- results.py: {section} -->\n", "<!-- end -->"
    before, _, rest = (page.read_text(encoding="utf-8") if page.exists() else "").partition(begin)
    inside, found, after = rest.partition(end)
    if not found or "<!-- results.py:" in inside:
        sys.exit(f"error: {page} needs two lines, {begin.strip()} and, after it, {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def main(args: Args):
    if args.last < 1:
        sys.exit("error: --last must be at least 1")
    runs = find_runs(args)
    pools, groups, labels = pool(runs), groups_of(runs), labels_of(runs)
    tasks = [*dict.fromkeys(run["task"] for run in runs)]
    png, scores = (Path(f"{args.output}.{ending}") for ending in ("png", "csv"))
    png.parent.mkdir(parents=True, exist_ok=True)
    figure_of(pools, tasks, labels).savefig(png, dpi=110)
    with open(scores, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for run in itertools.chain(*pools.values()):
            writer.writerow(run | {key: unique(run[key]) for key in LISTED})
    home = args.page.parent if args.page else "."
    png, scores = (os.path.relpath(path, home) for path in (png, scores))
    links = f"![Learning curves]({png})\n\nThe score of each run: [{scores}]({scores}).\n"
    text = "\n".join([NOTE.format(args.last), tables(pools, groups, labels), links])
    put(args.page, args.section, text) if args.page else print(text)
    for run in runs if args.keep else ():
        task = run["task"] if len(tasks) > 1 else ""
        keep(run, args.keep / task / run["arm"] / f"seed{run['seed']}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # an ASCII terminal
    main(tyro.cli(Args))
