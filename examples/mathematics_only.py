"""The mathematics of trqam_offline.py alone, with a network and a loop of one's own: no data, no
environment, no critic to learn. The prior is cloned from a Gaussian for each condition; Q is known.
Checks itself against the exact answer, prior * exp(Q / T), first at a given temperature T, then at
the one that the dual descent finds for a budget.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trqam_offline as trqam

B, K = 128, 40  # batch, flow steps
MEANS, SCALE = torch.tensor([[-0.3, 0.0], [0.3, 0.2]]), 0.15  # of actions, for conditions 0 and 1


class Velocity(nn.Module):
    """v(condition [.., 1], x [.., 2], t) -> [.., 2]: any callable of these three will do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, condition: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
        return self.net(torch.cat([condition, x, torch.zeros_like(x[..., :1]) + t], dim=-1))


def critic(condition: Tensor, action: Tensor) -> Tensor:
    """Q(condition, a) = a_0 + a_1 / 2, as an ensemble of one -> [1, B]."""
    return (action[:, 0] + action[:, 1] / 2)[None]


def train(budget: float = 0.0, temperature: float = 0.2, updates: int = 1000, steps: int = K):
    """Clone, then fine-tune -> base, policy, last temperature, path KL of the last 100 updates."""
    clone, kls, lam, kl_ema = Velocity(), [], torch.tensor(temperature), torch.tensor(0.0)
    optimizer = torch.optim.Adam(clone.parameters(), lr=5e-3)
    for _ in range(updates):
        condition = torch.randint(2, (B, 1)).float()
        action = MEANS[condition[:, 0].long()] + SCALE * torch.randn(B, 2)
        x0, t = torch.randn(B, 2), torch.rand(B, 1)
        optimizer.zero_grad()
        trqam.bc_loss(clone, condition, action, torch.ones(B), x0, t).backward()  # (E4)
        optimizer.step()
    policy, base = copy.deepcopy(clone), clone.requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    for _ in range(updates):
        condition = torch.randint(2, (B, 1)).float()
        x0, noise = torch.randn(B, 2), torch.randn(steps, B, 2)
        with torch.no_grad():
            xs, end = trqam.memoryless_rollout(policy, base, condition, x0, noise)  # (E6)
            terminal = trqam.terminal_adjoint(critic, condition, end)  # (E7)
            adjoints = trqam.lean_adjoint(base, condition, xs, terminal)  # (E8)
        delta = trqam.velocity_difference(policy, base, condition, xs)  # (E9)
        optimizer.zero_grad()
        trqam.adjoint_matching_loss(delta, adjoints, lam.clone()).backward()  # (E10)
        optimizer.step()
        kls.append(trqam.path_kl(delta.detach(), chunk_length=1))  # (E11)
        if budget:
            trqam.dual_descent(lam, kl_ema, kls[-1], budget, 0.005, lambda_min=0.05)  # (E12)
    return base, policy, float(lam), float(torch.stack(kls[-100:]).mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    for budget in (0.0, 0.3):
        base, policy, temperature, kl = train(budget)
        print(f"budget {budget or 'none'}: temperature {temperature:.3f}, path KL {kl:.3f}")
        for condition in (torch.zeros(20_000, 1), torch.ones(20_000, 1)):
            noise = torch.randn(20_000, 2), torch.randn(K, 20_000, 2)
            with torch.no_grad():
                prior, ours = (trqam.memoryless_rollout(v, v, condition, *noise)[1]
                               for v in (base, policy))
            exact = (critic(condition, prior)[0] / temperature).softmax(0) @ prior
            before, now = ((x - exact).norm().item() for x in (prior.mean(0), ours.mean(0)))
            print(f"  mean action, distance from the exact one: {before:.3f} before, {now:.3f} now")
            assert now < 0.35 * before, "further from the exact answer than it should be"
