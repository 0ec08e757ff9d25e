"""Hundreds of small policies trained at once: the studies of docs/two_dimensions.md, by which
claims are checked.

    python benchmarks/stacked.py --seeds 8     # rewrites studies.csv and lambda.csv in
    benchmarks/results/two_dimensions

A network of 32 units leaves a processor idle: an update takes as long as its thousand small calls.
So the policies of one study are one network of stacked weights, whose batch holds the rows of
each. The losses, the rollout, the adjoint, the KL and the dual descent are the scripts' own
functions, `update` too; what is theirs per policy (lambda, budget, temperature) is here a tensor
with a number for each. Prior and reward are those of examples/two_dimensions.py.
"""

# ruff: noqa: E402 (imports need the path)

import csv
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "examples"))

import grid
import torch
import tyro
from torch import Tensor, nn
from two_dimensions import (
    CELL,
    CENTRES,
    PRIOR,
    STD,
    Prior,
    clone_prior,
    histogram,
    reward,
    total_variation,
)

import common
import trqam_offline as script

REWARD = reward(CELL).double()
SAMPLES = 10_000  # actions from which a policy's numbers are estimated


@dataclass
class Args:
    seeds: int = 1
    """seeds 0 ... seeds - 1 of every setting"""
    studies: tuple[str, ...] = ("scale", "theorem", "lemma", "lambda", "steps")
    """which ones"""
    keep: bool = False
    """keep the numbers there are, and add what is missing"""
    results: Path = ROOT / "benchmarks" / "results" / "two_dimensions"
    """folder of the csv files"""


class Landscape(nn.Module):
    """The critic: scale * (reward + error * f), with f a random function of largest value 1 on the
    box, one for each member's seed. scale, error [M]; row m * B of the actions [M * B, 2] is the
    first of member m."""

    def __init__(self, scale: Tensor, error: Tensor, seeds: list[int]):
        super().__init__()
        self.scale, self.error = (
            nn.Parameter(value, requires_grad=False) for value in (scale, error)
        )
        draws = [
            torch.randn(5, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        self.waves = torch.stack(draws)  # [M, 5, 32]: wave vectors, phases, heights
        self.size = 1.0
        self.size = self.random(CELL[::7].expand(len(seeds), -1, -1)).abs().amax(1, keepdim=True)

    def random(self, action: Tensor) -> Tensor:
        vectors, phase, height = self.waves[:, :2] / 0.3, 6 * self.waves[:, 2:3], self.waves[:, 3:4]
        return (height * torch.cos(action @ vectors + phase)).sum(-1) / self.size  # [M, B]

    def q(self, action: Tensor) -> Tensor:
        """[M, B, 2] -> [M, B]."""
        return self.scale[:, None] * (reward(action) + self.error[:, None] * self.random(action))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.q(action.unflatten(0, (len(self.scale), -1))).flatten()[None]  # [E = 1, M * B]


# ------------------------------------------------------------------------------ many policies at
# once
def off_support(action: Tensor) -> float:
    """Share of the actions more than 4 standard deviations from every mode (of the data:
    0.0003)."""
    return float((torch.cdist(action, CENTRES).amin(-1) > 4 * STD).double().mean())


class Stack(nn.Module):
    """M networks as one: row m * B of x [..., M * B, 2] is the first of member m."""

    def __init__(self, fields: list[nn.Module]):
        super().__init__()
        weights, _ = torch.func.stack_module_state(fields)
        self.names, self.weights, self.one = (
            [*weights],
            nn.ParameterList(weights.values()),
            [fields[0]],
        )

    def forward(self, observation: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
        def member(weights, observation, x):
            return torch.func.functional_call(
                self.one[0], dict(zip(self.names, weights)), (observation, x, t)
            )

        rows = [each.unflatten(-2, (len(self.weights[0]), -1)) for each in (observation, x)]
        return torch.func.vmap(member, (0, -3, -3), -3)([*self.weights], *rows).flatten(-3, -2)


class Policy(nn.Module):
    """The prior plus a network that begins at 0."""

    def __init__(self, base: nn.Module, members: int):
        super().__init__()
        fields = [script.VelocityField(1, 2, (32, 32), layer_norm=False) for _ in range(members)]
        for field in fields:
            nn.init.zeros_(field.net[-1].weight)
        self.base, self.change = base, Stack(fields)

    def forward(self, observation: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
        return self.base(observation, x, t) + self.change(observation, x, t)


def stacked_losses(
    agent, batch: common.Batch, noise: script.Noise, args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scripts' `losses` for M policies at once; prior and critic are given, so that (E6) to
    (E11) are left. QAM is the member with a temperature of 1 whose terminal adjoint `tau`
    multiplies."""
    s, members = batch.observation, len(agent.lam)
    rows = lambda value: value.repeat_interleave(len(s) // members)[:, None]  # [M] -> [M * B, 1]
    temperature = args.lam_scale * agent.lam
    with torch.no_grad():
        xs, x_final = script.memoryless_rollout(
            agent.policy, agent.base, s, noise.sde_x0, noise.sde
        )
        terminal = rows(args.inverse_temperature) * script.terminal_adjoint(
            agent.target_critic, s, x_final
        )
        adjoints = script.lean_adjoint(agent.base, s, xs, terminal)
        adjoints = torch.where(
            rows(args.after), torch.cat([adjoints[1:], terminal[None]]), adjoints
        )
    delta = script.velocity_difference(agent.policy, agent.base, s, xs)
    loss = members * script.adjoint_matching_loss(delta, adjoints, rows(temperature))
    each = [value.detach().unflatten(1, (members, -1)) for value in (delta, adjoints)]
    return loss, {
        "trust_region/path_kl": torch.func.vmap(lambda delta: script.path_kl(delta, 1), 1)(each[0]),
        "trust_region/closed_form_kl": torch.func.vmap(
            lambda adjoints, temperature: script.closed_form_kl(adjoints, temperature, 1), (1, 0)
        )(each[1], temperature),
    }


def make_agent(settings: list[dict], base: nn.Module) -> tuple[script.Agent, script.Args]:
    """One agent whose members are the policies of `settings`; every number of its args may be one
    per member."""
    column = lambda name: torch.tensor([float(setting[name]) for setting in settings])
    args = script.Args(
        hidden_dims=(1,),
        num_critics=1,
        chunk_length=1,
        flow_steps=settings[0]["flow_steps"],
        batch_size=64,
        learning_rate=3e-3,
        max_grad_norm=math.inf,
        eta_lambda=column("eta_lambda"),
        lam_scale=column("lam_scale"),
        kl_ema_coef=column("kl_ema_coef"),
    )
    args.after, args.inverse_temperature = column("after").bool(), column("tau")
    agent = script.Agent(1, 2, args)
    agent.critic = agent.target_critic = Landscape(
        column("scale"), column("error"), [s["seed"] for s in settings]
    )
    agent.clone = agent.base = base
    agent.policy = Policy(base, len(settings))
    agent.lam, agent.kl_ema, agent.kl_budget = (
        column("lam"),
        torch.zeros(len(settings)),
        column("budget"),
    )
    return agent, args


def fine_tune(settings: list[dict], base: nn.Module):
    """Trains the policies of `settings` -> agent, args, and lambda, path KL and closed form
    [updates, M]."""
    agent, args = make_agent(settings, base)
    optimizer, generator = (
        agent.make_optimizer(args),
        torch.Generator().manual_seed(settings[0]["seed"]),
    )
    n, updates, scale = (
        len(settings) * args.batch_size,
        settings[0]["updates"],
        agent.critic.scale.clone(),
    )
    drift, zeros = torch.tensor([setting["drift"] for setting in settings]), torch.zeros(n)
    batch = common.Batch(zeros[:, None], torch.zeros(n, 2), zeros, zeros, zeros[:, None], zeros)
    history = []
    for update in range(updates):
        agent.critic.scale.copy_(scale * 10 ** (drift * (2 * update / updates - 1)))
        noise = script.draw_noise(n, 2, args, generator)
        row = script.update(agent, optimizer, batch, noise, args, stacked_losses)
        history.append(
            [row[f"trust_region/{name}"] for name in ("lambda", "path_kl", "closed_form_kl")]
        )
    return agent, args, [torch.stack(values) for values in zip(*history)]


# ------------------------------------------------------------------------------------- the studies
# Of one policy. Budget 0: QAM, at inverse temperature tau. Drift: decades of scale, up and down.
DEFAULT = dict(
    study="",
    seed=0,
    flow_steps=10,
    learned=0,
    after=0,
    budget=0.0,
    tau=1.0,
    scale=1.0,
    error=0.0,
    drift=0.0,
    lam=1.0,
    eta_lambda=0.01,
    kl_ema_coef=0.1,
    lam_scale=3.0,
    updates=600,
)
METHODS = [dict(budget=budget) for budget in (0.3, 1.0)] + [
    dict(tau=tau) for tau in (1.0, 3.0, 10.0)
]
TURNED = ("eta_lambda", "kl_ema_coef", "lam_scale", "lam")  # of the dual descent
TURNS = [
    dict(),
    *(dict(eta_lambda=eta) for eta in (0.001, 0.1)),
    *(dict(kl_ema_coef=k) for k in (0.01, 1.0)),
    *(dict(lam_scale=scale) for scale in (1.0, 10.0)),
    *(dict(lam=lam) for lam in (0.1, 10.0)),
]
STUDIES = {  # name -> what differs from DEFAULT
    "steps": [
        dict(budget=0.5, lam=0.3, flow_steps=steps, after=after, learned=learned)
        for steps in grid.STEPS
        for learned in (0, 1)
        for after in (0, 1)
    ],
    "theorem": [
        dict(tau=tau, after=after) for tau in (0.3, 1, 2, 3, 5, 10, 20) for after in (0, 1)
    ],
    "lemma": [dict(method, error=error) for method in METHODS for error in (0, 0.001, 0.1, 0.3, 1)],
    "scale": [
        dict(method, **changed)
        for method in METHODS
        for changed in (
            *(dict(scale=scale) for scale in (0.01, 0.1, 1.0, 10.0, 100.0)),
            *(dict(scale=scale, error=1.0) for scale in (0.1, 1.0, 10.0)),
            dict(drift=1.0),
        )
    ],
    "lambda": [
        dict(turn, budget=0.5, scale=scale, updates=1_000)
        for turn in TURNS
        for scale in (0.1, 1.0, 10.0)
    ],
}


def settings_of(study: str, seed: int) -> list[dict]:
    """The policies of a study; QAM's temperature is 1, and its lambda does not move."""
    chosen = [DEFAULT | dict(study=study, seed=seed) | change for change in STUDIES[study]]
    still = dict(eta_lambda=0.0, lam=1 / DEFAULT["lam_scale"])
    return [setting if setting["budget"] else setting | still for setting in chosen]


def kl_of_histograms(p: Tensor, q: Tensor) -> float:
    """Where no sample of q fell, half a sample is assumed: a lower estimate where p has left q."""
    return float((p * (p / q.clamp(min=0.5 / SAMPLES)).log()).nansum())


@torch.no_grad()
def measure(
    setting: dict,
    scale: float,
    q: Tensor,
    actions: dict[str, Tensor],
    prior: dict[str, Tensor],
    history: list[Tensor],
):
    """The numbers of one policy: q [cells] its critic's values, actions and the prior's by sampler
    [N, 2], history [updates] each. lambda and KLs are means over the last fifth of training."""
    lam, kl, closed = (float(values[-len(values) // 5 :].mean()) for values in history)
    temperature = setting["lam_scale"] * lam / setting["tau"]
    target, tilted_kl = grid.tilted(PRIOR, q.double(), temperature)
    true, _ = grid.tilted(PRIOR, scale * REWARD, temperature)
    at_its_kl = grid.at_kl(lambda t: grid.tilted(PRIOR, REWARD, t)[1], kl)
    gain = float(((grid.tilted(PRIOR, REWARD, at_its_kl)[0] - PRIOR) * REWARD).sum())
    row = dict(
        setting,
        lam_end=lam,
        temperature=temperature,
        path_kl=kl,
        closed_form_kl=closed,
        tilted_kl=tilted_kl,
    )
    row |= dict(kl_max=float(history[1].max()), off_support=off_support(actions["ode"]))
    row |= dict(tv_exact=total_variation(target, true))  # of the exact answers to both critics
    for name, action in actions.items():
        found, base = histogram(action), histogram(prior[name])
        row |= {
            f"reward_{name}": float(reward(action).mean()),
            f"prior_reward_{name}": float(reward(prior[name]).mean()),
            f"tv_{name}": total_variation(found, histogram(CELL, target)),
            f"tv_prior_{name}": total_variation(base, histogram(CELL, PRIOR)),
            f"share_{name}": float(reward(action).mean() - reward(prior[name]).mean()) / gain,
            f"kl_{name}": kl_of_histograms(found, base),
        }
    return row, histogram(actions["ode"])


@torch.no_grad()
def sample(agent, args, velocity: nn.Module, members: int) -> dict[str, Tensor]:
    """Actions [M, SAMPLES, 2] by the ODE (E1) and by the memoryless SDE (E6)."""
    n, generator = members * SAMPLES, torch.Generator().manual_seed(1)
    s, x = torch.zeros(n, 1), torch.randn(n, 2, generator=generator)
    noise = torch.randn(args.flow_steps, n, 2, generator=generator)
    ode = script.ode_sample(velocity, s, x, args.flow_steps)
    sde = script.memoryless_rollout(velocity, agent.base, s, x, noise)[1].clamp(-1, 1)
    return {
        name: action.unflatten(0, (members, -1)) for name, action in (("ode", ode), ("sde", sde))
    }


def train_study(study: str, seed: int, clones: list, commit: str) -> tuple[list[dict], list[dict]]:
    """Trains the policies of a study with one seed -> their numbers, and curves of KL and
    lambda."""
    groups, rows, curves, histograms = {}, [], [], {}
    for setting in settings_of(study, seed):
        groups.setdefault((setting["flow_steps"], setting["learned"]), []).append(setting)
    for (_, learned), settings in groups.items():
        if learned and not clones:
            clones.append(clone_prior(seed))
        base = Stack(clones * len(settings)).requires_grad_(False) if learned else Prior()
        agent, args, history = fine_tune(settings, base)
        actions, prior = (sample(agent, args, each, len(settings)) for each in (agent.policy, base))
        q = agent.critic.q(CELL.expand(len(settings), -1, -1))
        for m, setting in enumerate(settings):
            of_one = lambda stacked: {name: action[m] for name, action in stacked.items()}
            ours = of_one(actions), of_one(prior), [each[:, m] for each in history]
            row, found = measure(setting, float(agent.critic.scale[m]), q[m], *ours)
            key = tuple((name, value) for name, value in setting.items() if name != "error")
            true = histograms.setdefault(key, found)  # that of error 0 comes first
            rows.append(row | dict(tv_true_critic=total_variation(found, true), commit=commit))
            of_setting = {name: setting[name] for name in (*TURNED, "scale", "seed")}
            for update in range(10, setting["updates"] + 1, 10):
                lam, kl = (float(each[update - 10 : update].mean()) for each in ours[2][:2])
                curves.append(of_setting | dict(update=update, lam_now=lam, path_kl=kl))
    return rows, curves if study == "lambda" else []


def write(path: Path, rows: list[dict]):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        for row in rows:
            numbers = {name: round(v, 5) if isinstance(v, float) else v for name, v in row.items()}
            writer.writerow(numbers)


def main(args: Args):
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    commit = (common.git_commit(sys.modules[__name__]) or "unknown")[:7]
    kept = {}
    for name in ("studies", "lambda"):
        path = args.results / f"{name}.csv"
        old = [*csv.DictReader(path.open())] if args.keep and path.exists() else []
        kept[name] = [row | dict(seed=int(row["seed"])) for row in old]
    done = {(row["study"], row["seed"]) for row in kept["studies"]}
    for seed in range(args.seeds):
        clones = []  # the learned prior of this seed
        for study in args.studies:
            if (study, seed) in done:
                continue
            began = time.time()
            found = train_study(study, seed, clones, commit)
            for name, rows in zip(kept, found):
                kept[name] += rows
                if rows:
                    write(args.results / f"{name}.csv", kept[name])
            print(f"{study}, seed {seed}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
