"""TRQAM in two dimensions: the whole method as pictures, with the truth known. The page to read
with it: docs/two_dimensions.md.

    python examples/two_dimensions.py             # all pictures, into runs/two_dimensions
    python examples/two_dimensions.py --seeds 8   # the same, all numbers behind them computed anew

An action has two numbers, and there is one state. The data are four Gaussians, the critic is a
known function, and the exact answer, prior * exp(Q / temperature), is a sum over cells. All else is
`trqam_offline.py`: its `bc_update` and `update`, as they are, made the first picture. The others
show what benchmarks/grid.py and benchmarks/stacked.py computed, from their committed numbers.
"""

# ruff: noqa: E402 (imports need the path)

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import grid
import torch
import tyro
from study_figures import BLUE, GREY, ORANGE, arrows, draw_studies, plane, plt, save, shade
from torch import Tensor, nn

import common
import trqam_offline as script

MODE, STD = 0.5, 0.1  # the data: a Gaussian of this standard deviation at each (+-MODE, +-MODE)
CENTRES = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) * MODE
WORTH, WIDTH = torch.tensor([1.0, 0.5, 0.5, 0.2]), 0.2  # of the reward's bumps there
CELLS, BINS = 200, 20  # on each side of [-1, 1]^2: of exact sums, and of histograms of samples


@dataclass
class Args:
    seeds: int = 0
    """compute the committed numbers anew with so many seeds; 0: draw those there are"""
    output: Path = Path("runs/two_dimensions")
    """folder of the pictures"""


# --------------------------------------------------------------------------- what is known exactly
class Prior(nn.Module):
    """The velocity of the exact flow to the data. (A module with a weight, as an agent's networks
    are.)"""

    def __init__(self):
        super().__init__()
        self.mode = nn.Parameter(torch.tensor(MODE), requires_grad=False)

    def forward(self, observation: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
        return grid.two_modes(self.mode, STD)(observation, x, t)


def reward(action: Tensor) -> Tensor:
    """[..., 2] -> [...]."""
    squares = ((action[..., None, :] - CENTRES) ** 2).sum(-1)  # [..., 4]
    return (WORTH * torch.exp(-squares / (2 * WIDTH**2))).sum(-1)


side = (torch.arange(CELLS) + 0.5) / CELLS * 2 - 1
CELL = torch.cartesian_prod(side, side)  # the middle of each cell, [CELLS^2, 2]
PRIOR = torch.exp(-((CELL[:, None] - CENTRES) ** 2).sum(-1) / (2 * STD**2)).sum(-1).double()
PRIOR = PRIOR / PRIOR.sum()  # mass of each cell


def histogram(action: Tensor, mass: Tensor | None = None) -> Tensor:
    """Masses of BINS x BINS bins, of actions [N, 2] of equal mass or of those given."""
    mass = torch.full((len(action),), 1 / len(action)).double() if mass is None else mass
    place = ((action + 1) / 2 * BINS).long().clamp(0, BINS - 1)
    return torch.zeros(BINS**2).double().index_add(0, place[:, 0] * BINS + place[:, 1], mass)


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum()) / 2


# ----------------------------------------------------------------------------- a run of the script
class Reward(nn.Module):
    """The reward as a critic that needs no training."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return reward(action)[None]


def start(seed: int, **settings) -> tuple:
    """An agent of the script, its settings, and a function that draws a batch of data and noise."""
    args = script.Args(
        hidden_dims=(64, 64),
        num_critics=1,
        flow_steps=10,
        chunk_length=1,
        learning_rate=2e-3,
        kl_budget=0.5,
        **settings,
    )
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    agent, n = script.Agent(1, 2, args), args.batch_size

    def draw():
        centre = CENTRES[torch.randint(4, (n,), generator=generator)]
        action = centre + STD * torch.randn(n, 2, generator=generator)
        s, zero, one = torch.zeros(n, 1), torch.zeros(n), torch.ones(n)
        batch = common.Batch(s, action, zero, zero, s, one)
        return batch, script.draw_noise(n, 2, args, generator)

    return agent, args, draw


def clone_prior(seed: int, updates: int = 2_000, **settings) -> nn.Module:
    """The data's velocity, learned by `bc_update`."""
    agent, args, draw = start(seed, **settings)
    optimizer = agent.make_optimizer(args)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - update / updates)
        script.bc_update(agent, optimizer, *draw(), args)
    return agent.clone


def run(seed: int = 0, cloned: int = 2_000, updates: int = 600, **settings) -> tuple:
    """Cloning and fine-tuning by the script's functions -> agent, args, statistics [updates]
    each."""
    agent, args, draw = start(seed, **settings)
    agent.critic, agent.target_critic = Reward(), Reward()
    agent.clone.load_state_dict(clone_prior(seed, cloned, **settings).state_dict())
    agent.start_from_clone()
    optimizer = agent.make_optimizer(args)
    history = [script.update(agent, optimizer, *draw(), args) for _ in range(updates)]
    return agent, args, {name: [float(row[name]) for row in history] for name in history[0]}


# ---------------------------------------------------------------------------------------- pictures
@torch.no_grad()
def draw_one_update(agent, args, history: dict, path: Path, commit: str):
    """The method in six panels: see docs/two_dimensions.md."""
    figure, ((one, two, three), (four, five, six)) = plt.subplots(2, 3, figsize=(11, 7.4))
    generator, n, steps = torch.Generator().manual_seed(3), 3_000, args.flow_steps
    s, x = torch.zeros(n, 1), torch.randn(n, 2, generator=generator)
    noise = torch.randn(steps, n, 2, generator=generator)

    plane(one, "1  The prior: noise flows to four habits", 2.2)
    shade(one, PRIOR, "Blues")
    line = [x[:40]]
    for k in range(steps):
        line.append(line[-1] + agent.base(s[:40], line[-1], k / steps) / steps)
    one.plot(*torch.stack(line).permute(2, 0, 1), color=GREY, lw=0.8)
    one.scatter(*x[:40].T, s=8, color=GREY)

    xs, x_final = script.memoryless_rollout(agent.base, agent.base, s, x, noise)
    plane(two, "2  Roll out with the memoryless noise", 2.2)
    shade(two, PRIOR, "Blues")
    two.plot(*torch.cat([xs, x_final[None]])[:, :5].permute(2, 0, 1), lw=1, marker=".", ms=3)
    two.scatter(*x[:5].T, s=18, color="black", zorder=3)

    plane(three, "3  Carry the critic's gradient back along them")
    shade(three, reward(CELL), "Oranges")
    terminal = script.terminal_adjoint(agent.critic, s, x_final)
    adjoints = script.lean_adjoint(agent.base, s, xs, terminal)
    shown = xs[5:].abs().amax((0, 2)).argsort()[:600:40]  # paths that stay in sight
    three.plot(*torch.cat([xs[5:], x_final[None]])[:, shown].permute(2, 0, 1), color=GREY, lw=0.7)
    for points, adjoint in zip(xs[6:], adjoints[6:]):
        arrows(three, points[shown], -adjoint[shown], "black")

    k = 7
    plane(four, f"4  The velocity's change, at t = {k / steps}")
    places = torch.cartesian_prod(*[torch.linspace(-0.9, 0.9, 13)] * 2)
    change = agent.policy(s[:169], places, k / steps) - agent.base(s[:169], places, k / steps)
    shade(four, PRIOR, "Blues")
    four.quiver(*places.T, *change.T, color="black", angles="xy", width=0.005)

    temperature = float(args.lam_scale * agent.lam)
    target, _ = grid.tilted(PRIOR, reward(CELL).double(), temperature)
    action = script.ode_sample(agent.policy, s, x, steps)
    distance = total_variation(histogram(action), histogram(CELL, target))
    plane(five, "5  Prior · exp(Q/T), and the policy's actions")
    shade(five, target, "Blues")
    five.scatter(*action[:1_200].T, s=1.5, color=ORANGE)
    label = f"T = {temperature:.2f}: total variation {distance:.2f}"
    five.text(0, 0, label, ha="center", va="center", fontsize=9)

    six.plot(history["trust_region/path_kl"], color=BLUE, lw=1)
    six.axhline(args.kl_budget, color="black", ls="--", lw=1)
    six.set(title="6  Path KL on its budget; λ moves", xlabel="update", ylim=(0, 1.5))
    six.set_ylabel("path KL, nats", color=BLUE)
    right = six.twinx()
    right.plot(history["trust_region/lambda"], color=ORANGE)
    right.set_ylabel("λ", color=ORANGE)
    right.set_ylim(0)
    save(figure, path, f"one run of trqam_offline.py's update, seed 0, commit {commit}")


@torch.no_grad()
def draw_memoryless(path: Path, commit: str):
    """Beginning against end, of the exact prior's paths."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    prior, n = Prior(), 20_000
    generator = torch.Generator().manual_seed(0)
    found = {"ODE": [], "memoryless SDE": []}
    for steps in grid.STEPS:
        s, x = torch.zeros(n, 1), torch.randn(n, 2, generator=generator)
        noise = torch.randn(steps, n, 2, generator=generator)
        ends = (
            script.ode_sample(prior, s, x, steps),
            script.memoryless_rollout(prior, prior, s, x, noise)[1],
        )
        for ax, (name, correlations), end in zip(axes, found.items(), ends):
            correlations.append(float(torch.corrcoef(torch.stack([x[:, 0], end[:, 0]]))[0, 1]))
            if steps == 10:
                ax.scatter(x[:1_500, 0], end[:1_500, 0], s=2, color=BLUE)
                ax.set(xlabel="where the path begins", ylabel="where it ends", ylim=(-1.1, 1.1))
                ax.set_title(f"{name}, K = 10: correlation {correlations[-1]:.2f}")
    for (name, correlations), color in zip(found.items(), (GREY, BLUE)):
        axes[2].semilogx(grid.STEPS, correlations, "o-", color=color, label=name)
    axes[2].set(title="Correlation over the steps", xlabel="flow steps K", ylim=(-0.1, 1))
    axes[2].set_xticks(grid.STEPS, grid.STEPS)
    axes[2].minorticks_off()
    axes[2].legend()
    save(figure, path, f"exact prior, first coordinate of {n:,} paths, seed 0, commit {commit}")


def main(args: Args):
    torch.set_num_threads(1)  # such small networks are slower with more
    results, commit = ROOT / "benchmarks/results/two_dimensions", common.git_commit() or "unknown"
    if args.seeds:
        import stacked  # which imports this file

        grid.main()
        stacked.main(stacked.Args(seeds=args.seeds, results=results))
    args.output.mkdir(parents=True, exist_ok=True)
    draw_memoryless(args.output / "two_dimensions_memoryless.png", commit[:7])
    draw_one_update(*run(), args.output / "two_dimensions.png", commit[:7])
    draw_studies(results, args.output)
    print(f"pictures: {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
