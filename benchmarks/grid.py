"""How far K flow steps fall short of the exact answer, on a one-dimensional grid: no sampling
noise, no networks.

    python benchmarks/grid.py        # rewrites benchmarks/results/two_dimensions/grid.csv, in
    about two minutes

Prior and reward are sums over coordinates, so one coordinate tells all. Where the regression (E10)
has converged, the velocity is Delta_k(x) = -g_k^2 E[adjoint | x_k = x] / (2 T), an expectation
over paths that Delta itself moves: a fixed point, computed here backwards from the last step. With
the adjoint of step k (the authors' program) or k + 1 ("after"). Beside them `dynamic_programme`:
the best that any mean shifts of the K Gaussian steps can do at the same price.

share = gain in reward of the policy's actions over the prior's / gain of the exact prior tilted by
exp(reward / T') at a KL of BUDGET nats, both at a path KL (E11) of BUDGET nats. The prior's
actions are drawn by the same K-step sampler, so that its own error is in neither.
"""

# ruff: noqa: E402 (imports need the path)

import csv
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

import trqam_offline as script

BUDGET = 0.25  # nats, per coordinate
STEPS = (5, 10, 20, 50)
X = torch.linspace(-4, 4, 801, dtype=torch.float64)  # the grid of positions
DX = float(X[1] - X[0])
REWARD = X.clamp(-1, 1)  # of the clipped action


def two_modes(mode: float, std: float):
    """The exact flow from N(0, 1) to (N(-mode, std^2) + N(mode, std^2)) / 2, per coordinate; any
    script's `Velocity`: x [..., A] at t (a number or [..., 1]) -> [..., A]."""

    def velocity(observation: Tensor | None, x: Tensor, t: float | Tensor) -> Tensor:
        variance = (1 - t) ** 2 + (t * std) ** 2
        mean = mode * torch.tanh(
            t * mode * x / variance
        )  # E[centre of the action's mode | x_t = x]
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


def density(mode: float, std: float) -> Tensor:
    p = sum(torch.exp(-((X - m) ** 2) / (2 * std**2)) for m in (-mode, mode))
    return p / p.sum()


CASES = {  # name -> the prior's mode and deviation in a coordinate, which is its own reward
    "four sharp modes": (0.5, 0.1),
    "one broad mode": (0.0, 0.35),
    "one narrow mode": (0.0, 0.1),
}


def interpolate(values: Tensor, x: Tensor) -> Tensor:
    """values on the grid -> at x, constant beyond its ends."""
    place = ((x - X[0]) / DX).clamp(0, len(X) - 1 - 1e-9)
    left = place.long()
    return torch.lerp(values[left], values[left + 1], place - left)


def derivative(values: Tensor) -> Tensor:
    return torch.gradient(values, spacing=DX)[0]


def scatter(x: Tensor, weights: Tensor) -> Tensor:
    """Masses at x -> masses on the grid: the transpose of `interpolate`."""
    place = ((x - X[0]) / DX).clamp(0, len(X) - 1 - 1e-9)
    left, part = place.long(), place.frac()
    masses = torch.zeros_like(X).index_add(0, left, weights * (1 - part))
    return masses.index_add(0, left + 1, weights * part)


def gaussian_steps(variance: float) -> Tensor:
    """[grid, grid]: row i holds the masses of N(X_i, variance)."""
    kernel = torch.exp(-((X[:, None] - X) ** 2) / (2 * variance))
    return kernel / kernel.sum(1, keepdim=True)


class Problem:
    """The K-step control problem: what (E5) to (E8) are on the grid."""

    def __init__(self, mode: float, std: float, flow_steps: int):
        self.velocity = two_modes(mode, std)
        self.h = 1 / flow_steps
        self.k = range(flow_steps)
        self.g2 = [script.memoryless_g2(k * self.h, self.h) for k in self.k]
        self.noise = [gaussian_steps(self.h * g2) for g2 in self.g2]
        self.base = [self.velocity(None, X, k * self.h) for k in self.k]
        # (E6): mean of x_{k+1} under the prior; the last step is the base's, and has no noise.
        self.mean = [
            X + self.h * (2 * v - X / ((k + 1) * self.h)) for k, v in zip(self.k, self.base)
        ]
        self.last = X + self.h * self.base[-1]
        # (E8): 1 + h db_k/dx, with the base at t_k + h.
        self.growth = [
            1
            + self.h
            * (2 * derivative(self.velocity(None, X, (k + 1) * self.h)) - 1 / ((k + 1) * self.h))
            for k in self.k
        ]
        self.slope = derivative(REWARD)

    def fixed_point(
        self, temperature: float, after: bool, growth: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Delta_k on the grid where (E10) has converged, from 0 as training does."""
        growth = growth or self.growth
        adjoint = -interpolate(self.slope, self.last)  # E[adjoint_K | x_{K-1}]
        deltas = []
        for k in reversed(self.k):
            price = self.g2[k] / (2 * temperature) * (1 if after else growth[k])
            if k == self.k[-1]:
                delta = -price * adjoint
            else:
                ahead = self.noise[k] @ adjoint  # E adjoint_{k+1}, by the step's mean
                delta = torch.zeros_like(X)
                for _ in range(60):
                    delta = delta + 0.3 * (
                        -price * interpolate(ahead, self.mean[k] + 2 * self.h * delta) - delta
                    )
                adjoint = interpolate(ahead, self.mean[k] + 2 * self.h * delta)
            adjoint = growth[k] * adjoint
            deltas.append(delta)
        return deltas[::-1]

    def dynamic_programme(self, temperature: float) -> list[Tensor]:
        """Delta_k = argmax_u E V_{k+1}(mean + 2hu + sqrt(h) g z) - T 2h u^2 / g^2, by trying u on
        a grid; 0 at the last step, which the rollout leaves to the base."""
        value, deltas = interpolate(REWARD, self.last), [torch.zeros_like(X)]
        shifts = torch.linspace(-1, 1, 501, dtype=X.dtype)[:, None]  # 2 h u
        for k in reversed(self.k[:-1]):
            price = temperature * shifts**2 / (2 * self.h * self.g2[k])
            ahead = self.noise[k] @ value
            value, best = (interpolate(ahead, self.mean[k] + shifts) - price).max(0)
            deltas.append(shifts[best, 0] / (2 * self.h))
        return deltas[::-1]

    def path_kl(self, deltas: list[Tensor]) -> tuple[Tensor, list[float]]:
        """The density of x_{K-1} under (E6), and what each step costs in (E11)."""
        p = torch.exp(-(X**2) / 2)
        p, costs = p / p.sum(), []
        for k in self.k:
            costs.append(float(2 * self.h / self.g2[k] * (p * deltas[k] ** 2).sum()))
            if k < self.k[-1]:
                p = scatter(self.mean[k] + 2 * self.h * deltas[k], p) @ self.noise[k]
        return p, costs

    def outcome(self, deltas: list[Tensor]) -> dict:
        """Path KL (E11), its last step's part, the actions of (E6) and (E1): places and masses."""
        p, costs = self.path_kl(deltas)
        quantiles = (torch.arange(20_000, dtype=X.dtype) + 0.5) / 20_000
        x = torch.special.ndtri(quantiles)
        for k in self.k:
            x = x + self.h * (self.velocity(None, x, k * self.h) + interpolate(deltas[k], x))
        return dict(
            kl=sum(costs),
            last=costs[-1],
            sde=(self.last, p),
            ode=(x, torch.full_like(x, 1 / len(x))),
        )


def mean_reward(actions: tuple[Tensor, Tensor]) -> float:
    """Of places and masses."""
    return float((interpolate(REWARD, actions[0]) * actions[1]).sum())


def at_kl(kl_of, budget: float) -> float:
    """The temperature at which a falling kl_of(temperature) is `budget`, by bisection of its
    logarithm."""
    low, high = math.log(0.02), math.log(20)
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_of(math.exp(middle)) > budget else (low, middle)
    return math.exp(high)


def tilted(p: Tensor, reward: Tensor, temperature: float) -> tuple[Tensor, float]:
    """p exp(reward / temperature), and its KL to p; p of any shape sums to 1."""
    q = p * torch.exp((reward - reward.max()) / temperature)
    q = q / q.sum()
    return q, float((q * ((q / p).clamp(min=1e-300)).log()).nansum())


def total_variation(actions: tuple[Tensor, Tensor], q: Tensor, bins: int = 80) -> float:
    """Between an action sample and a density on the grid, in bins over [-1.2, 1.2]."""
    width = 2.4 / bins

    def histogram(x, weights):
        place = ((x + 1.2) / width).long().clamp(0, bins - 1)
        return torch.zeros(bins, dtype=X.dtype).index_add(0, place, weights)

    return float((histogram(*actions) - histogram(X, q)).abs().sum()) / 2


def rows_of(name: str, flow_steps: int) -> list[dict]:
    problem, prior = Problem(*CASES[name], flow_steps), density(*CASES[name])
    best, _ = tilted(
        prior, REWARD, at_kl(lambda temperature: tilted(prior, REWARD, temperature)[1], BUDGET)
    )
    gain = float(((best - prior) * REWARD).sum())
    base = problem.outcome([torch.zeros_like(X)] * flow_steps)
    rows = []
    for index, solve in (
        ("k", lambda temperature: problem.fixed_point(temperature, after=False)),
        ("k+1", lambda temperature: problem.fixed_point(temperature, after=True)),
        ("dynamic programme", problem.dynamic_programme),
    ):
        temperature = at_kl(lambda temperature: sum(problem.path_kl(solve(temperature))[1]), BUDGET)
        found = problem.outcome(solve(temperature))
        target, _ = tilted(prior, REWARD, temperature)
        row = dict(
            case=name,
            flow_steps=flow_steps,
            index=index,
            temperature=temperature,
            path_kl=found["kl"],
        )
        row |= dict(last_step_share=found["last"] / found["kl"])
        for sample in ("sde", "ode"):
            row[f"share_{sample}"] = (mean_reward(found[sample]) - mean_reward(base[sample])) / gain
            row[f"tv_{sample}"] = total_variation(found[sample], target)
            row[f"tv_base_{sample}"] = total_variation(base[sample], prior)
        rows.append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
        print(rows[-1], flush=True)
    return rows


def main():
    torch.set_num_threads(1)
    rows = [row for name in CASES for flow_steps in STEPS for row in rows_of(name, flow_steps)]
    path = ROOT / "benchmarks" / "results" / "two_dimensions" / "grid.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
