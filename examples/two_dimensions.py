"""TRQAM in two dimensions: the whole method as pictures, with the truth known. Read with docs/two_dimensions.md.

    python examples/two_dimensions.py             # all pictures, into runs/two_dimensions
    python examples/two_dimensions.py --seeds 8   # the same, after computing all committed numbers anew

An action has two numbers, and there is one state. The data are four Gaussians, the critic is a known function of the
action, and the exact answer, prior * exp(Q / temperature), is a sum over cells. All else is `trqam_offline.py`: a
policy is cloned from samples by its `bc_update` and fine-tuned by its `update`, as they are, in the first two pictures.
The others show what benchmarks/grid.py and benchmarks/stacked.py computed, from benchmarks/results/two_dimensions.
"""

import csv
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import matplotlib
import torch
import tyro
from torch import Tensor, nn

import common
import grid
import trqam_offline as script

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODE, STD = 0.5, 0.1  # the data: a Gaussian of this standard deviation at each (+-MODE, +-MODE)
CENTRES = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) * MODE
WORTH, WIDTH = torch.tensor([1.0, 0.5, 0.5, 0.2]), 0.2  # of the reward's bumps there
CELLS, BINS = 200, 20  # on each side of [-1, 1]^2: of exact sums, and of histograms of samples
BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#e07b28", "#3a9d5d", "#8a8a8a"


@dataclass
class Args:
    seeds: int = 0
    """compute the committed numbers anew with so many seeds; 0: draw those there are"""
    output: Path = Path("runs/two_dimensions")
    """folder of the pictures"""


# ----------------------------------------------------------------------------- what is known exactly
class Prior(nn.Module):
    """The velocity of the exact flow to the data. (A module with a weight, as an agent's networks are.)"""

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


def off_support(action: Tensor) -> float:
    """Share of the actions more than 4 standard deviations from every mode (of the data: 0.0003)."""
    return float((torch.cdist(action, CENTRES).amin(-1) > 4 * STD).double().mean())


# ------------------------------------------------------------------------------- a run of the script
class Reward(nn.Module):
    """The reward as a critic that needs no training."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return reward(action)[None]


def start(seed: int, **settings) -> tuple:
    """An agent of the script, its settings, and a function that draws a batch of data and noise."""
    args = script.Args(hidden_dims=(64, 64), num_critics=1, flow_steps=10, chunk_length=1,
                       learning_rate=2e-3, kl_budget=0.5, **settings)
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


def clone_prior(seed: int, updates: int = 3_000, **settings) -> nn.Module:
    """The data's velocity, learned by `bc_update`."""
    agent, args, draw = start(seed, **settings)
    optimizer = agent.make_optimizer(args)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - update / updates)
        script.bc_update(agent, optimizer, *draw(), args)
    return agent.clone


def run(seed: int = 0, updates: int = 600, **settings) -> tuple:
    """Cloning and fine-tuning by the script's functions -> agent, args, statistics [updates] each."""
    agent, args, draw = start(seed, **settings)
    agent.critic, agent.target_critic = Reward(), Reward()
    agent.clone.load_state_dict(clone_prior(seed, **settings).state_dict())
    agent.start_from_clone()
    optimizer = agent.make_optimizer(args)
    history = [script.update(agent, optimizer, *draw(), args) for _ in range(updates)]
    return agent, args, {name: [float(row[name]) for row in history] for name in history[0]}
