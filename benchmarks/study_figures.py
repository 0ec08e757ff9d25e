"""The pictures of the numbers in benchmarks/results/two_dimensions: drawn by
examples/two_dimensions.py."""

import csv
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

plt.rcParams |= {"axes.titlesize": 10.5, "font.size": 9.5}
BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#e07b28", "#3a9d5d", "#8a8a8a"
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)  # Student's t, 1 ... 7 degrees of freedom


def save(figure, path: Path, note: str):
    figure.tight_layout(rect=(0, 0.035, 1, 1))
    figure.text(0.995, 0.008, note, ha="right", fontsize=8, color=GREY)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(160).save(path, optimize=True)  # a third of the size


def plane(ax, title: str, reach: float = 1.0):
    ax.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), xticks=(), yticks=(), aspect=1)


def shade(ax, mass, cmap: str):
    """A number for each cell of [-1, 1]^2."""
    image = mass.reshape(round(len(mass) ** 0.5), -1).T
    ax.imshow(image, origin="lower", extent=(-1, 1, -1, 1), cmap=cmap, alpha=0.8, aspect="auto")


def arrows(ax, x, direction, color: str, length: float = 0.16):
    """Of equal length: the sizes differ by orders of magnitude."""
    direction = length * direction / direction.norm(dim=-1, keepdim=True)
    ax.quiver(*x.T, *direction.T, color=color, angles="xy", scale_units="xy", scale=1, width=0.006)


def read(path: Path) -> list[dict]:
    """Rows, with numbers as floats."""

    def number(text: str):
        try:
            return float(text)
        except ValueError:
            return text

    with path.open() as file:
        return [
            {name: text if name == "commit" else number(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def where(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over seeds (nan for one seed)."""
    n = len(values)
    half = T975[min(n, 8) - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.fmean(values), half


def curve(ax, groups: dict[float, list[dict]], value, **style):
    """Means with intervals over x -> rows; value(row) -> number."""
    means, halves = zip(*(interval([value(row) for row in rows]) for rows in groups.values()))
    ax.errorbar([*groups], means, halves, capsize=2, **style)


def by(rows: list[dict], name: str) -> dict[float, list[dict]]:
    groups = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return dict(sorted(groups.items()))


def note(rows: list[dict]) -> str:
    seeds, commits = {row["seed"] for row in rows}, sorted({row["commit"] for row in rows})
    seeds = "seed 0" if len(seeds) == 1 else f"{len(seeds)} seeds, 95 % intervals over them"
    return f"{seeds}, commit {', '.join(commits)}"


def draw_steps(grid_rows: list[dict], rows: list[dict], path: Path):
    figure, axes = plt.subplots(1, 3, figsize=(11, 4))
    for ax, sample in zip(axes, ("ode", "sde")):
        ax.axhline(1, color="black", lw=0.8, ls=":")
        colors = {"k": BLUE, "k+1": ORANGE, "dynamic programme": GREY}
        for index, color in colors.items():
            chosen = where(grid_rows, case="four sharp modes", index=index)
            label = index if index.startswith("d") else f"adjoint {index}: fixed point"
            ax.plot(
                [row["flow_steps"] for row in chosen],
                [row[f"share_{sample}"] for row in chosen],
                ls="--" if index.startswith("d") else "-",
                color=color,
                label=label,
            )
        for after, color in ((0, BLUE), (1, ORANGE)):
            for learned, marker in ((0, "o"), (1, "s")):
                chosen = where(rows, after=after, learned=learned)
                if chosen:
                    name = f"trained, {'learned' if learned else 'exact'} prior"
                    curve(
                        ax,
                        by(chosen, "flow_steps"),
                        lambda row: row[f"share_{sample}"],
                        color=color,
                        ls="",
                        marker=marker,
                        mfc="white" if learned else color,
                        label=name if after else None,
                    )
        ax.set(
            title=f"Share of the possible gain, {sample.upper()} actions",
            xlabel="flow steps K",
            ylim=(-0.4, 1.6),
        )
    axes[0].legend(fontsize=7)
    for index, color in (("k", BLUE), ("k+1", ORANGE)):
        chosen = where(grid_rows, case="four sharp modes", index=index)
        steps = [row["flow_steps"] for row in chosen]
        axes[2].plot(
            steps, [row["tv_ode"] for row in chosen], color=color, label=f"adjoint {index}"
        )
    own = [row["tv_base_ode"] for row in chosen]
    axes[2].plot(steps, own, color="black", ls=":", label="the prior's own, by K steps")
    for after, color in ((0, BLUE), (1, ORANGE)):
        for learned, marker in ((0, "o"), (1, "s")):
            chosen = where(rows, after=after, learned=learned)
            if chosen:
                curve(
                    axes[2],
                    by(chosen, "flow_steps"),
                    lambda row: row["tv_ode"],
                    color=color,
                    marker=marker,
                    mfc="white" if learned else color,
                    label=f"adjoint k{'+1' * after}, {'learned' if learned else 'exact'} prior",
                )
    chosen = where(rows, after=0, learned=0)
    if chosen:
        curve(
            axes[2],
            by(chosen, "flow_steps"),
            lambda row: row["tv_prior_ode"],
            color=GREY,
            ls="--",
            label="the exact prior's own, by K steps",
        )
    axes[2].set(
        title="Total variation from prior · exp(Q/T), ODE", xlabel="flow steps K", ylim=(0, 1)
    )
    axes[2].legend(fontsize=7)
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xticks((5, 10, 20, 50), (5, 10, 20, 50))
        ax.minorticks_off()
    save(figure, path, "lines: 1-D grid, no sampling" + (f"; points: {note(rows)}" if rows else ""))


def draw_theorem(rows: list[dict], path: Path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    kinds = {
        "path_kl": ("path KL (E11)", BLUE, "o-"),
        "tilted_kl": ("KL of prior · exp(Q/T)", "black", "-"),
        "kl_sde": ("KL of the SDE's actions", GREEN, "^-"),
        "kl_ode": ("KL of the ODE's actions", ORANGE, "s-"),
        "closed_form_kl": ("closed form", GREY, "x--"),
    }
    for ax, after in zip(axes, (0, 1)):
        for name, (label, color, style) in kinds.items():
            curve(
                ax,
                by(where(rows, after=after), "temperature"),
                lambda row: row[name],
                color=color,
                fmt=style,
                label=label,
                ms=4,
            )
        ax.set(
            title=f"Adjoint of step k{' + 1' * after}",
            xlabel="temperature λ_eff",
            xscale="log",
            yscale="log",
            ylim=(1e-3, 1e4),
        )
    axes[0].set_ylabel("nats")
    axes[0].legend(fontsize=8)
    save(figure, path, f"K = 10, {note(rows)}")


METHODS = (  # budget, tau, color
    (0.3, 1.0, "#7fb2e5"),
    (1.0, 1.0, BLUE),
    (0.0, 1.0, "#f3c08f"),
    (0.0, 3.0, ORANGE),
    (0.0, 10.0, "#9c4a0b"),
)


TURNED = ("eta_lambda", "kl_ema_coef", "lam_scale", "lam")  # of the dual descent


def label_of(budget: float, tau: float) -> str:
    return f"TRQAM, budget {budget:g}" if budget else f"QAM, τ = {tau:g}"


def draw_lemma(rows: list[dict], path: Path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    xs = [10 ** (i / 20 - 2) for i in range(61)]
    for budget, tau, color in METHODS:
        ax = axes[0] if not budget else axes[1]
        chosen = [row for row in where(rows, budget=budget, tau=tau) if row["error"]]
        groups = {}
        for row in chosen:
            groups.setdefault(row["error"], []).append(row)
        groups = {
            2 * e * statistics.fmean(1 / row["temperature"] for row in g): g
            for e, g in groups.items()
        }
        curve(
            ax,
            groups,
            lambda row: row["tv_true_critic"],
            color=color,
            marker="o",
            label=label_of(budget, tau),
        )
        curve(ax, groups, lambda row: row["tv_exact"], color=color, ls=":", label=None)
    for ax, title in zip(
        axes, ("QAM: fixed τ", "TRQAM: fixed budget (β = 1/λ_eff, where it ended)")
    ):
        ax.plot(
            xs, [min(1.0, math.expm1(x) / 2) for x in xs], color="black", label="Lemma 1, at most 1"
        )
        ax.set(
            title=title,
            xscale="log",
            ylim=(0, 1.05),
            xlabel="2 β e   (inverse temperature · largest critic error)",
        )
        ax.legend(fontsize=8)
    axes[0].set_ylabel("total variation from the\ntrue critic's policy")
    save(figure, path, f"dotted: the exact tilted densities; {note(rows)}")


def draw_scale(rows: list[dict], path: Path):
    figure, axes = plt.subplots(2, 3, figsize=(11, 7))
    shown = (
        ("reward_ode", "true reward", (0, 1)),
        ("path_kl", "path KL, nats", (1e-4, 100)),
        ("off_support", "share of actions off the data", (0, 1)),
    )
    for line, error in zip(axes, (0.0, 1.0)):
        for ax, (name, title, limits) in zip(line, shown):
            for budget, tau, color in METHODS:
                chosen = where(rows, budget=budget, tau=tau, error=error)
                style = dict(color=color, marker="o", ms=4, label=label_of(budget, tau))
                curve(ax, by(where(chosen, drift=0.0), "scale"), lambda row: row[name], **style)
                if drifting := where(chosen, drift=1.0):
                    curve(
                        ax,
                        {1e3: drifting},
                        lambda row: row[name],
                        **style | dict(marker="D", label=None),
                    )
            if name == "reward_ode":
                mean = statistics.fmean(row["prior_reward_ode"] for row in rows)
                ax.axhline(mean, color="black", lw=0.8, ls=":")
            ax.set(
                xscale="log",
                title="wrong critic: " * bool(error) + title,
                ylim=limits,
            )
            ax.set_xlim(5e-3, 3e3)
            ax.set_yscale("log" if name == "path_kl" else "linear")
            ax.set_xticks((0.01, 0.1, 1, 10, 100, 1000), ("0.01", "0.1", "1", "10", "100", "drift"))
            ax.set_xlabel("reward multiplied by")
            ax.minorticks_off()
            ax.title.set_fontsize(10)
    axes[0, 2].legend(fontsize=8, loc="upper left")
    save(
        figure,
        path,
        f"dotted: the prior; drift: from 0.1 to 10 during training; K = 10, {note(rows)}",
    )


def draw_lambda(rows: list[dict], path: Path, commit: str):
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True)
    usual = dict(eta_lambda=0.01, kl_ema_coef=0.1, lam_scale=3.0, lam=1.0, scale=1.0)
    for (above, below), (name, title) in zip(
        axes.T,
        (
            ("scale", "Reward multiplied by"),
            ("eta_lambda", "eta_lambda"),
            ("lam", "λ at the start"),
        ),
    ):
        chosen = where(rows, **{other: value for other, value in usual.items() if other != name})
        for (value, group), color in zip(by(chosen, name).items(), (GREY, BLUE, ORANGE)):
            for ax, shown in ((above, "path_kl"), (below, "lam_now")):
                updates = by(group, "update")
                means = [statistics.fmean(row[shown] for row in at) for at in updates.values()]
                ax.plot([*updates], means, color=color, lw=1, label=f"{value:g}")
        above.axhline(0.5, color="black", ls="--", lw=0.8)
        above.set(title=title, ylim=(0.005, 20), yscale="log")
        below.set(yscale="log", xlabel="update", ylim=(0.005, 20))
        above.legend(fontsize=8)
    axes[0, 0].set_ylabel("path KL (budget dashed)")
    axes[1, 0].set_ylabel("λ")
    seeds = len({row["seed"] for row in rows})
    save(figure, path, f"mean over {seeds} seed{'s' * (seeds > 1)}, K = 10, commit {commit}")


def draw_studies(results: Path, output: Path):
    """Of each study that has numbers."""
    grid_rows, rows = read(results / "grid.csv"), read(results / "studies.csv")
    draw_steps(grid_rows, where(rows, study="steps"), output / "two_dimensions_steps.png")
    if chosen := where(rows, study="theorem"):
        draw_theorem(chosen, output / "two_dimensions_theorem.png")
    if chosen := where(rows, study="lemma"):
        draw_lemma(chosen, output / "two_dimensions_lemma.png")
    if chosen := where(rows, study="scale"):
        draw_scale(chosen, output / "two_dimensions_scale.png")
    if chosen := where(rows, study="lambda"):
        draw_lambda(
            read(results / "lambda.csv"), output / "two_dimensions_lambda.png", chosen[0]["commit"]
        )


def table(head: list[str], lines: list[list]):
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for line in lines:
        print("| " + " | ".join(map(str, line)) + " |")


def cell(rows: list[dict], name: str) -> str:
    mean, half = interval([row[name] for row in rows])
    return f"{mean:.2f}" + (f" ± {half:.2f}" if half == half else "")


def settling(rows: list[dict]) -> tuple[str, str, str]:
    """Of one setting's seeds, with a budget of 0.5: largest KL, the first update at which the mean
    KL of the last 50 is within a fifth of the budget (median), and the mean KL of the last fifth
    of training."""
    peaks, reached, ends = [], [], []
    for run in by(rows, "seed").values():
        kls = [row["path_kl"] for row in run]
        means = [statistics.fmean(kls[i - 4 : i + 1]) for i in range(4, len(kls))]
        inside = (row["update"] for row, mean in zip(run[4:], means) if abs(mean - 0.5) < 0.1)
        peaks.append(max(kls))
        reached.append(next(inside, math.inf))
        ends.append(statistics.fmean(kls[-len(kls) // 5 :]))
    first = statistics.median_high(reached)
    first = "never" if math.isinf(first) else f"{first:.0f}"
    return f"{statistics.fmean(peaks):.2f}", first, f"{statistics.fmean(ends):.2f}"


def print_tables(results: Path):
    """The tables of docs/two_dimensions.md."""
    lines = []
    for row in read(results / "grid.csv"):
        shown = [
            f"{row[name]:.2f}"
            for name in (
                "share_sde",
                "share_ode",
                "last_step_share",
                "tv_sde",
                "tv_ode",
                "tv_base_sde",
                "tv_base_ode",
            )
        ]
        lines.append([row["case"], int(row["flow_steps"]), row["index"], *shown])
    table(
        [
            "",
            "K",
            "adjoint",
            "share, SDE",
            "share, ODE",
            "last step's part of the path KL",
            "TV, SDE",
            "TV, ODE",
            "prior's own TV, SDE",
            "ODE",
        ],
        lines,
    )

    rows = where(read(results / "studies.csv"), study="steps")
    names = ("share_sde", "share_ode", "tv_sde", "tv_ode", "path_kl", "lam_end")
    table(
        ["prior", "K", "adjoint", "share, SDE", "share, ODE", "TV, SDE", "TV, ODE", "path KL", "λ"],
        [
            [
                "learned" if learned else "exact",
                int(steps),
                "k+1" if after else "k",
                *(cell(chosen, n) for n in names),
            ]
            for learned in (0, 1)
            for steps, at in by(where(rows, learned=learned), "flow_steps").items()
            for after, chosen in by(at, "after").items()
        ],
    )

    rows = where(read(results / "studies.csv"), study="scale")
    for error in (0.0, 1.0):
        for name in ("reward_ode", "path_kl", "off_support"):
            scales = by(where(rows, error=error, drift=0.0), "scale")
            drifting = where(rows, error=error, drift=1.0)
            table(
                [
                    f"{name}, critic error {error:g}",
                    *map("{:g}".format, scales),
                    *["drift"] * bool(drifting),
                ],
                [
                    [
                        label_of(budget, tau),
                        *(
                            cell(where(at, budget=budget, tau=tau), name)
                            for at in (*scales.values(), *[drifting] * bool(drifting))
                        ),
                    ]
                    for budget, tau, _ in METHODS
                ],
            )

    rows = read(results / "lambda.csv") if (results / "lambda.csv").exists() else []
    settings = {}
    for row in rows:
        settings.setdefault(tuple(row[name] for name in TURNED), []).append(row)
    table(
        [
            *TURNED,
            *(
                f"{what}, reward × {scale:g}"
                for scale in (0.1, 1, 10)
                for what in ("peak", "reached", "at the end")
            ),
        ],
        [
            [
                *(f"{value:g}" for value in setting),
                *(each for at in by(chosen, "scale").values() for each in settling(at)),
            ]
            for setting, chosen in settings.items()
        ],
    )


if __name__ == "__main__":
    print_tables(Path(__file__).resolve().parent / "results" / "two_dimensions")
