"""The mathematics of trqam_offline.py alone, in a loop and with a network of one's own: no data, no
environment, no critic to learn. Checks itself against the exact answer, prior * exp(Q / T).

    python examples/mathematics_only.py        # about a minute

The prior is cloned from samples, one Gaussian per condition; Q is known, so the answer is too. Under
`--budget` the temperature T is not given, but found by the dual descent, so that the path KL is it.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from trqam_offline import (
    adjoint_matching_loss, bc_loss, dual_descent, lean_adjoint, memoryless_rollout, path_kl,
    terminal_adjoint, velocity_difference,
)

B, K = 256, 50  # batch, flow steps
MEANS = torch.tensor([[-0.3, 0.0], [0.3, 0.2]])  # of the prior's actions, for conditions 0 and 1
SCALE = 0.15  # their standard deviation


class Velocity(nn.Module):
    """v(condition [.., 1], x [.., 2], t) -> [.., 2]: any callable of these three will do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, condition: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
        t = torch.zeros_like(x[..., :1]) + t
        return self.net(torch.cat([condition, x, t], dim=-1))


def critic(condition: Tensor, action: Tensor) -> Tensor:
    """Q(condition, a) = a_0 + a_1 / 2, as an ensemble of one -> [1, B]."""
    return (action[:, 0] + action[:, 1] / 2)[None]


def train(budget: float | None = None, temperature: float = 0.2, updates: int = 1500):
    """Clone, then fine-tune -> (base, policy, the temperature in the end, the path KL at the end)."""
    clone, valid = Velocity(), torch.ones(B)
    optimizer = torch.optim.Adam(clone.parameters(), lr=2e-3)
    for _ in range(updates):
        condition = torch.randint(2, (B, 1)).float()
        action = MEANS[condition[:, 0].long()] + SCALE * torch.randn(B, 2)
        loss = bc_loss(clone, condition, action, valid, torch.randn(B, 2), torch.rand(B, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    base, policy = clone.requires_grad_(False), copy.deepcopy(clone).requires_grad_(True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    lam, kl_ema, kls = torch.tensor(temperature), torch.tensor(0.0), []
    for _ in range(updates):
        condition = torch.randint(2, (B, 1)).float()
        with torch.no_grad():
            noise = torch.randn(B, 2), torch.randn(K, B, 2)
            xs, end = memoryless_rollout(policy, base, condition, *noise)
            adjoints = lean_adjoint(base, condition, xs, terminal_adjoint(critic, condition, end))
        delta = velocity_difference(policy, base, condition, xs)
        loss, kl = adjoint_matching_loss(delta, adjoints, lam.clone()), path_kl(delta.detach(), 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kls.append(float(kl))
        if budget:
            with torch.no_grad():
                dual_descent(lam, kl_ema, kl, budget, eta_lambda=0.005, lambda_min=0.05)
    return base, policy, float(lam), sum(kls[-100:]) / 100


def compare(base, policy, temperature: float, n: int = 50_000) -> list[tuple[Tensor, Tensor]]:
    """For each condition: the policy's mean action, and that of prior * exp(Q / T), which weighs the
    samples of the prior -> [2] each."""
    found = []
    for condition in torch.zeros(n, 1), torch.ones(n, 1):
        with torch.no_grad():
            noise = torch.randn(n, 2), torch.randn(K, n, 2)
            _, ours = memoryless_rollout(policy, policy, condition, *noise)
            _, prior = memoryless_rollout(base, base, condition, *noise)
        weights = (critic(condition, prior)[0] / temperature).softmax(0)
        found.append((ours.mean(0), weights @ prior))
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    for budget in (None, 0.3):
        base, policy, temperature, kl = train(budget)
        print(f"budget {budget}: temperature {temperature:.3f}, path KL {kl:.3f}")
        for number, (ours, exact) in enumerate(compare(base, policy, temperature)):
            print(f"  condition {number}: mean action {ours.tolist()}, exact {exact.tolist()}")
            assert (ours - exact).abs().max() < 0.03, "further from the exact answer than it should be"
