"""TRQAM, Trust Region Q Adjoint Matching, offline-to-online: the whole algorithm, in this one file.

A flow policy is a velocity field v(s, x, t) that carries noise x at t = 0 to an action at t = 1.
The clone is trained by behaviour cloning all along; its moving average, the base, is the prior.
TRQAM fine-tunes a copy, the policy, towards actions of higher Q, as far from the prior as a budget
in nats lets it go: first on a dataset, then in the environment, whose transitions join it:

0. train the critics, and the clone                                            critic_loss, bc_loss
1. roll the policy out as a memoryless SDE, from noise to an action            memoryless_rollout
2. carry the critic's action gradient back along that path, through the        lean_adjoint
   *prior's* drift alone
3. regress the velocity onto it, with no gradient through the sampler: at the  adjoint_matching_loss
   optimum, actions are distributed as prior * exp(Q / temperature)
4. measure how far the paths have moved from the prior's, as a path-space KL   path_kl
5. move the temperature lambda so that this KL stays at its budget             dual_descent
6. online, act with the policy: each step adds a transition, then 0. to 5.     online_step

`losses` and `update` do 0. to 5. once; `main` is the whole run.

Papers: TRQAM, arXiv 2605.27079; QAM, arXiv 2601.14234; Adjoint Matching, arXiv 2409.08861. The
numbers (E1) to (E12) are those of docs/algorithm.md. Shapes: B batch, O observation, d one action,
c actions in a chunk, A = c*d a flattened chunk, E critics, K flow steps of h = 1/K from t_0 = 0.
Code that several scripts share is identical in each: a diff of two shows what differs.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import common
from common import Fraction, NotNegative, Positive


@dataclass
class Args(common.RunArgs):
    # Stages
    bc_steps: Annotated[int, NotNegative] = 300_000
    """updates of the behaviour-cloning stage"""
    offline_steps: Annotated[int, NotNegative] = 1_000_000
    """updates of the offline fine-tuning stage"""
    online_steps: Annotated[int, NotNegative] = 500_000
    """environment steps of the online stage"""
    learning_starts: Annotated[int, NotNegative] = 5_000
    """online steps that only collect, before updates begin"""
    utd_ratio: Annotated[int, Positive] = 1
    """updates for each online step"""
    balanced_sampling: bool = False
    """online, draw half of each batch from the dataset and half from what was collected"""

    # Algorithm specific arguments
    batch_size: Annotated[int, Positive] = 256
    """chunks in a batch, B"""
    learning_rate: Annotated[float, Positive] = 3e-4
    """learning rate of Adam, for all networks"""
    max_grad_norm: Annotated[float, Positive] = 1.0
    """global norm to which the gradient of all networks together is clipped"""
    gamma: Annotated[float, Fraction] = 0.995
    """discount per environment step"""
    tau: Annotated[float, Fraction] = 0.005
    """rate at which target networks follow the online ones"""
    chunk_length: Annotated[int, Positive] = 5
    """actions predicted and executed at once, c"""
    sparse_reward: bool = False
    """train on reward -1 wherever the environment's is not 0"""
    hidden_dims: Annotated[tuple[int, ...], Positive] = (512, 512, 512, 512)
    """widths of the hidden layers of every network"""
    actor_layer_norm: bool = False
    """LayerNorm in the velocity fields too (critics always have it)"""
    num_critics: Annotated[int, Positive] = 10
    """members of the critic ensemble, E"""
    rho: Annotated[float, NotNegative] = 0.5
    """pessimism: the target is the ensemble's mean minus rho times its standard deviation"""
    flow_steps: Annotated[int, Positive] = 10
    """Euler steps from noise to an action, K"""
    best_of_n: Annotated[int, Positive] = 1
    """action chunks drawn when acting; the one of highest mean Q is executed"""
    kl_budget: Annotated[float, Positive] = 1.0
    """path-space KL to the prior allowed per action of a chunk, epsilon_KL, in nats"""
    kl_budget_online: Annotated[float, NotNegative] = 0.0
    """the same for the online stage; 0: as offline"""
    lam_scale: Annotated[float, Positive] = 3.0
    """temperature = lam_scale * lambda, as the authors have it; eta_lambda moves lambda alone"""
    eta_lambda: Annotated[float, NotNegative] = 0.01
    """step size of the dual descent on lambda"""
    kl_ema_coef: Annotated[float, Fraction] = 0.1
    """weight of the newest KL in its running average"""
    kl_clip_coef: Annotated[float, Positive] = 2.0
    """a single KL counts for at most this many budgets in the average"""
    lambda_min: Annotated[float, Positive] = 0.01
    """lower end of lambda's range"""
    lambda_max: Annotated[float, Positive] = 100.0
    """upper end of lambda's range"""

    starts_from = "trqam_offline"  # whose checkpoints this script can continue

    def check(self):
        super().check()
        common.require(self.lambda_min <= self.lambda_max, "--lambda-min is above --lambda-max")
        common.require(not self.online_steps or self.online_steps > self.learning_starts,
                       "--learning-starts leaves no update in --online-steps: lower it")
        common.require(self.learning_starts >= self.chunk_length or not self.balanced_sampling,
                       "--balanced-sampling needs --learning-starts of at least --chunk-length")


WIDE = dict(hidden_dims=(1024,) * 4, actor_layer_norm=True)
DOMAINS = {  # what differs from the defaults above; every flag on the command line wins over it
    "scene-play": dict(sparse_reward=True),
    "puzzle-3x3-play": dict(sparse_reward=True),
    "puzzle-4x4-play": dict(sparse_reward=True, **WIDE),
    "cube-double-play": dict(),
    "cube-triple-play": dict(kl_budget=0.5, **WIDE),
    "cube-quadruple-play": dict(**WIDE),
    "antmaze-large-navigate": dict(chunk_length=1),
    "antmaze-giant-navigate": dict(chunk_length=1, **WIDE),
    "humanoidmaze-medium-navigate": dict(chunk_length=1, gamma=0.999, rho=0.0, kl_budget=0.5),
    "humanoidmaze-large-navigate": dict(chunk_length=1, gamma=0.999, rho=0.0),
}
QUICK = dict(
    env_id="cube-single-play-singletask-task2-v0", collect_episodes=100,
    bc_steps=8_000, offline_steps=4_000, eval_interval=1_000, log_interval=100,
    checkpoint_interval=1_000, learning_rate=1e-3, gamma=0.98, tau=0.02,
    hidden_dims=(128,) * 4, num_critics=2, flow_steps=5, kl_budget=0.2,
    online_steps=4_000, learning_starts=500, balanced_sampling=True,
)


def settings(args: Args) -> dict:
    """What the environment's domain and the preset set; flags win."""
    chosen = dict(DOMAINS.get(common.domain_of(args.env_id), {}))
    if args.preset == "quick":  # the settings of its environment's domain come by a second call
        chosen |= QUICK
    return chosen


# -------------------------------------------------------------------------------- the mathematics
# Functions of tensors and of two callables: velocity(observation, x, t), shaped like x, and
# critic(observation, action) -> [E, B]. x is [B, A] with t a number or [B, 1], or [K, B, A] with t
# [K, 1, 1]. Call rollout, adjoints and dual descent under `torch.no_grad()`, as `losses` does.
Velocity = Callable[[Tensor, Tensor, float | Tensor], Tensor]


def ode_sample(velocity: Velocity, observation: Tensor, x: Tensor, flow_steps: int) -> Tensor:
    """(E1) The policy's action: K Euler steps from noise x [B, A] at observation [B, O] -> [B, A],
    clipped to [-1, 1]."""
    h = 1 / flow_steps
    for k in range(flow_steps):
        x = x + h * velocity(observation, x, k * h)
    return x.clamp(-1, 1)


def critic_target(next_q: Tensor, reward: Tensor, mask: Tensor, discount: float,
                  rho: float) -> Tensor:
    """(E2) y = R + gamma^c m (mean_e Q^e(s', a') - rho std_e Q^e(s', a')), from the target critics'
    next_q [E, B], reward R and mask m [B], and discount gamma^c -> [B]."""
    return reward + discount * mask * (next_q.mean(0) - rho * next_q.std(0, correction=0))


def critic_loss(q: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """(E3) L_Q = mean_{e,b} valid (Q^e(s, a) - y)^2, from q [E, B], target [B], valid [B]."""
    return (valid * (q - target) ** 2).mean()


def bc_loss(velocity: Velocity, observation: Tensor, action: Tensor, valid: Tensor, x0: Tensor,
            t: Tensor) -> Tensor:
    """(E4) Flow matching: L_BC = mean_b valid mean_A (v(s, (1-t) x0 + t a, t) - (a - x0))^2, from
    action and x0 [B, A], valid [B], t [B, 1]."""
    x_t = (1 - t) * x0 + t * action  # [B, A]
    error = velocity(observation, x_t, t) - (action - x0)  # [B, A]
    return (valid * (error**2).mean(-1)).mean()


def memoryless_g2(t: float | Tensor, h: float) -> float | Tensor:
    """(E5) g_k^2 = 2 (1 - t_k + h) / (t_k + h): noise under which a path's end is independent of
    its start, as (E10)'s optimum prior * exp(Q / temperature) needs. In continuous time it is
    2 (1 - t) / t; the shift by h keeps it finite at t = 0."""
    return 2 * (1 - t + h) / (t + h)


def memoryless_rollout(velocity: Velocity, base: Velocity, observation: Tensor, x: Tensor,
                       noise: Tensor) -> tuple[Tensor, Tensor]:
    """(E6) Paths of the memoryless SDE, x_{k+1} = x_k + h (2 v - x_k / (t_k + h)) + sqrt(h) g_k
    noise_k, from x [B, A] with noise [K, B, A] -> x_0 ... x_{K-1} [K, B, A] and x_K [B, A], not
    clipped. (In continuous time 2 v - x / t is v + (g^2 / 2) score: the noise leaves the flow's
    marginals as they are.) As the authors do, the last step is one of the base's ODE, and
    noise_{K-1} is not used."""
    h = 1 / len(noise)
    xs = [x]
    for k in range(len(noise) - 1):
        t = k * h
        drift = 2 * velocity(observation, x, t) - x / (t + h)
        x = x + h * drift + math.sqrt(h * memoryless_g2(t, h)) * noise[k]
        xs.append(x)
    return torch.stack(xs), x + h * base(observation, x, 1 - h)


def terminal_adjoint(critic: Callable, observation: Tensor, x: Tensor) -> Tensor:
    """(E7) adjoint_K = -grad_x mean_e Q^e(s, clip(x, -1, 1)) at the path's end x [B, A] -> [B, A]:
    of the plain mean, without rho. Coordinates of x outside [-1, 1] get no gradient. Raises
    ValueError unless the critic gives [E, B]: a lone [B] would be averaged over the batch."""

    def cost(x: Tensor) -> Tensor:
        q = critic(observation, x.clamp(-1, 1))
        if q.shape[1:] != x.shape[:1]:
            raise ValueError(f"the critic must give [E, B], here [E, {len(x)}], not {[*q.shape]}")
        return -q.mean(0).sum()

    return torch.func.grad(cost)(x)


def lean_adjoint(base: Velocity, observation: Tensor, xs: Tensor, adjoint: Tensor) -> Tensor:
    """(E8) adjoint_k = adjoint_{k+1} + h (db_k/dx)^T adjoint_{k+1}, with the base's drift
    b_k(x) = 2 v_base(s, x, t_k + h) - x / (t_k + h), backwards from adjoint_K [B, A] along xs
    [K, B, A] -> k = 0 ... K-1 [K, B, A]. "Lean": only the base's Jacobian enters. The base is taken
    at t_k + h, not at t_k, and at k = K-1 as if that step had noise, as the authors do."""
    h = 1 / len(xs)
    adjoints = []
    for k in reversed(range(len(xs))):
        t_next = (k + 1) * h  # t_k + h
        _, vjp = torch.func.vjp(lambda x: base(observation, x, t_next), xs[k])
        adjoint = adjoint + h * (2 * vjp(adjoint)[0] - adjoint / t_next)
        adjoints.append(adjoint)
    return torch.stack(adjoints[::-1])


def flow_times(paths: Tensor) -> Tensor:
    """t_k = k h for paths [K, B, A] -> [K, 1, 1]."""
    steps = torch.arange(len(paths), dtype=paths.dtype, device=paths.device)
    return steps[:, None, None] / len(paths)


def velocity_difference(velocity: Velocity, base: Velocity, observation: Tensor,
                        xs: Tensor) -> Tensor:
    """(E9) Delta_k = v_policy - v_base at (s, x_k, t_k), on paths xs [K, B, A] -> [K, B, A]."""
    observation = observation.expand(len(xs), -1, -1)  # [K, B, O]
    with torch.no_grad():
        base_velocity = base(observation, xs, flow_times(xs))
    return velocity(observation, xs, flow_times(xs)) - base_velocity


def adjoint_matching_loss(delta: Tensor, adjoints: Tensor, temperature: Tensor | float) -> Tensor:
    """(E10) L_AM = mean_b sum_k ||2 Delta_k / sigma_k + sigma_k adjoint_k||^2, with sigma_k = g_k /
    sqrt(temperature): the control 2 Delta_k / sigma_k, regressed on -sigma_k adjoint_k. Its minimum
    is Delta_k = -g_k^2 adjoint_k / (2 temperature). From delta and adjoints [K, B, A]. (With few
    steps K, adjoint_{k+1} would be more exact: docs/algorithm.md.)"""
    sigma = (memoryless_g2(flow_times(delta), 1 / len(delta)) / temperature).sqrt()  # [K, 1, 1]
    return ((2 * delta / sigma + sigma * adjoints) ** 2).sum(dim=(0, 2)).mean()


def path_kl(delta: Tensor, chunk_length: int) -> Tensor:
    """(E11) TRQAM's Theorem 1 (Girsanov), discretised: KL = (1/c) mean_b sum_k (2h / g_k^2)
    ||Delta_k||^2, in nats per action, from delta [K, B, A]: that of Gaussian steps whose means
    differ by 2h Delta_k and whose variance is h g_k^2; k = K-1 counts as if it had noise."""
    h = 1 / len(delta)
    cost = (2 * h / memoryless_g2(flow_times(delta), h) * delta**2).sum(dim=(0, 2))  # [B]
    return cost.mean() / chunk_length


def closed_form_kl(adjoints: Tensor, temperature: Tensor | float, chunk_length: int) -> Tensor:
    """(E11) if delta were (E10)'s minimum on each path by itself, (1/c) mean_b sum_k h g_k^2
    ||adjoint_k||^2 / (2 temperature^2), from adjoints [K, B, A]: an upper estimate, only logged."""
    g2 = memoryless_g2(flow_times(adjoints), 1 / len(adjoints))  # [K, 1, 1]
    return path_kl(-g2 * adjoints / (2 * temperature), chunk_length)


def dual_descent(lam: Tensor, kl_ema: Tensor, kl: Tensor, kl_budget: Tensor | float,
                 eta_lambda: float = 0.01, kl_ema_coef: float = 0.1, kl_clip_coef: float = 2.0,
                 lambda_min: float = 0.01, lambda_max: float = 100.0):
    """(E12) D <- (1 - kappa) D + kappa min(KL, kl_clip_coef epsilon), lambda <- clip(lambda + eta
    (D - epsilon)): kl_ema is D, kl_ema_coef kappa, kl_budget epsilon. On scalar tensors, in place,
    as CUDA graphs need. A KL over its budget raises lambda, which pulls the policy back."""
    kl_ema.lerp_(kl.clamp(max=kl_clip_coef * kl_budget), kl_ema_coef)
    lam.add_(eta_lambda * (kl_ema - kl_budget)).clamp_(lambda_min, lambda_max)


# ---------------------------------------------------------------------------------------- networks
class VelocityField(nn.Module):
    """v(s, x, t), the flow policy: an MLP on [s, x, t]; tanh-GELU (and LayerNorm, if asked for),
    output unbounded."""

    def __init__(self, observation_dim: int, chunk_dim: int, hidden_dims: tuple[int, ...],
                 layer_norm: bool):
        super().__init__()
        layers, width = [], observation_dim + chunk_dim + 1
        for hidden_dim in hidden_dims:
            layers += [nn.Linear(width, hidden_dim), nn.GELU(approximate="tanh")]
            layers += [nn.LayerNorm(hidden_dim, eps=1e-6)] if layer_norm else []
            width = hidden_dim
        self.net = nn.Sequential(*layers, nn.Linear(width, chunk_dim))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, observation: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
        """observation [..., O], x [..., A], t in [0, 1] (a number, or broadcast to
        [..., 1]) -> [..., A]."""
        t = torch.zeros_like(x[..., :1]) + t  # [..., 1]
        return self.net(torch.cat([observation, x, t], dim=-1))


class Critic(nn.Module):
    """Q^e(s, a) for e = 1 ... E: independent MLPs on [s, a], tanh-GELU then LayerNorm, with their
    weights stacked."""

    def __init__(self, observation_dim: int, chunk_dim: int, hidden_dims: tuple[int, ...],
                 num_critics: int):
        super().__init__()
        self.num_critics = num_critics
        widths = [observation_dim + chunk_dim, *hidden_dims, 1]
        kernels = [torch.empty(num_critics, *in_out) for in_out in itertools.pairwise(widths)]
        for kernel in kernels:
            for member in kernel:
                nn.init.xavier_uniform_(member)
        # Each kernel is [E, in, out], each bias, scale and shift [E, 1, out].
        self.kernels = nn.ParameterList(kernels)
        self.biases = nn.ParameterList(torch.zeros(num_critics, 1, width) for width in widths[1:])
        self.norm_scales = nn.ParameterList(torch.ones(num_critics, 1, w) for w in hidden_dims)
        self.norm_biases = nn.ParameterList(torch.zeros(num_critics, 1, w) for w in hidden_dims)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """observation [B, O], action chunk [B, A] -> Q [E, B]."""
        x = torch.cat([observation, action], dim=-1).expand(self.num_critics, -1, -1)  # [E, B, in]
        *hidden, (last_kernel, last_bias) = zip(self.kernels, self.biases)
        for (kernel, bias), scale, shift in zip(hidden, self.norm_scales, self.norm_biases):
            x = F.gelu(torch.baddbmm(bias, x, kernel), approximate="tanh")  # [E, B, width]
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + shift
        return torch.baddbmm(last_bias, x, last_kernel).squeeze(-1)


class Agent(nn.Module):
    """The networks and the numbers of the dual descent."""

    def __init__(self, observation_dim: int, chunk_dim: int, args: Args):
        super().__init__()
        dims = observation_dim, chunk_dim, args.hidden_dims
        self.critic = Critic(*dims, args.num_critics)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        # The authors' names: actor_slow, target_actor_slow (the prior), actor_fast (what acts).
        self.clone = VelocityField(*dims, args.actor_layer_norm)
        self.base = copy.deepcopy(self.clone).requires_grad_(False)
        self.policy = copy.deepcopy(self.clone)
        self.noise_dim = chunk_dim  # of act's noise; QAM-E's edits take as much again
        self.register_buffer("lam", torch.tensor(1.0))  # lambda
        self.register_buffer("kl_ema", torch.tensor(0.0))  # D
        # A tensor, so that CUDA graphs see it change; not in checkpoints, so that the flag counts.
        self.register_buffer("kl_budget", torch.tensor(args.kl_budget), persistent=False)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def start_from_clone(self):
        """The base and the policy begin as the clone."""
        self.base.load_state_dict(self.clone.state_dict())
        self.policy.load_state_dict(self.clone.state_dict())

    def make_optimizer(self, args: Args) -> Optimizer:
        weights = self.trained_parameters()
        return Adam(weights, args.learning_rate, fused=True, capturable=weights[0].is_cuda)


# --------------------------------------------------------------------------------------- one update
class Noise(NamedTuple):
    """All randomness of one update."""

    next_action: Tensor  # [B, A] normal, x_0 of the next action in the critic's target
    flow_x0: Tensor  # [B, A] normal, x_0 of the behaviour-cloning pairs
    flow_t: Tensor  # [B, 1] uniform on [0, 1), their times
    sde_x0: Tensor  # [B, A] normal, x_0 of the memoryless rollout
    sde: Tensor  # [K, B, A] normal, scaled by sqrt(h) g_k in the rollout


def draw_noise(batch_size: int, chunk_dim: int, args: Args, generator: torch.Generator) -> Noise:
    """The noise of one update, from `generator`, on its device."""
    normal = functools.partial(torch.randn, generator=generator, device=generator.device)
    next_action, flow_x0, sde_x0 = normal(3, batch_size, chunk_dim)  # [B, A] each
    flow_t = torch.rand(batch_size, 1, generator=generator, device=generator.device)
    sde = normal(args.flow_steps, batch_size, chunk_dim)
    return Noise(next_action, flow_x0, flow_t, sde_x0, sde)


def policy_action(agent: Agent, observation: Tensor, noise: Tensor, args: Args) -> Tensor:
    """What acts: the policy's action chunks [n, A] at observation [n, O] from noise [n, A]."""
    return ode_sample(agent.policy, observation, noise, args.flow_steps)


def bc_update(agent: Agent, optimizer: Optimizer, batch: common.Batch, noise: Noise,
              args: Args) -> dict[str, Tensor]:
    """One update of the behaviour-cloning stage: (E4) alone, on the clone."""
    s, a, valid = batch.observation, batch.action, batch.valid  # [B, O], [B, A], [B]
    loss_bc = bc_loss(agent.clone, s, a, valid, noise.flow_x0, noise.flow_t)
    optimizer.zero_grad()
    loss_bc.backward()
    grad_norm = nn.utils.clip_grad_norm_(agent.trained_parameters(), args.max_grad_norm)
    optimizer.step()
    return {"losses/bc_loss": loss_bc.detach(), "losses/grad_norm": grad_norm}


def losses(agent: Agent, batch: common.Batch, noise: Noise,
           args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all networks together, and statistics without gradient. `common.Batch` says what
    valid and mask are; adjoint matching needs neither, as it uses only the chunk's s."""
    s, a, valid = batch.observation, batch.action, batch.valid  # [B, O], [B, A], [B]
    temperature = args.lam_scale * agent.lam
    with torch.no_grad():
        next_action = policy_action(agent, batch.next_observation, noise.next_action, args)
        next_q = agent.target_critic(batch.next_observation, next_action)  # [E, B]
        discount = args.gamma**args.chunk_length
        target = critic_target(next_q, batch.reward, batch.mask, discount, args.rho)  # [B]
        xs, x_final = memoryless_rollout(agent.policy, agent.base, s, noise.sde_x0, noise.sde)
        # torch.func differentiates in x even here; nothing of it is kept for backward().
        terminal = terminal_adjoint(agent.target_critic, s, x_final)  # [B, A]
        adjoints = lean_adjoint(agent.base, s, xs, terminal)  # [K, B, A]

    q = agent.critic(s, a)  # [E, B]
    delta = velocity_difference(agent.policy, agent.base, s, xs)  # [K, B, A]
    loss_q = critic_loss(q, target, valid)
    loss_bc = bc_loss(agent.clone, s, a, valid, noise.flow_x0, noise.flow_t)
    loss_am = adjoint_matching_loss(delta, adjoints, temperature)
    statistics = {
        "losses/target_q_mean": target.mean(),
        "losses/adjoint_abs_mean": terminal.abs().mean(),
        "losses/adjoint_abs_std": terminal.abs().std(correction=0),
        "losses/adjoint_abs_max": terminal.abs().max(),
        "losses/q_mean": q.mean(),
        "losses/q_min": q.min(),
        "losses/q_max": q.max(),
        "losses/critic_loss": loss_q,
        "losses/bc_loss": loss_bc,
        "losses/adjoint_matching_loss": loss_am,
        "trust_region/path_kl": path_kl(delta, args.chunk_length),
        "trust_region/closed_form_kl": closed_form_kl(adjoints, temperature, args.chunk_length),
    }
    return loss_q + loss_bc + loss_am, {name: value.detach() for name, value in statistics.items()}


def update(agent: Agent, optimizer: Optimizer, batch: common.Batch, noise: Noise, args: Args,
           loss_function: Callable = losses) -> dict[str, Tensor]:
    """One TRQAM update of agent and optimizer, without waiting for the device. loss_function:
    `losses`, or a compiled one. Returns statistics: scalars on the device."""
    loss, statistics = loss_function(agent, batch, noise, args)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(agent.trained_parameters(), args.max_grad_norm)
    with torch.no_grad():
        # The targets follow the weights that made this loss: those before the step.
        for average, trained in ((agent.target_critic, agent.critic), (agent.base, agent.clone)):
            # A private function, which torch's optimizers use too: one launch for all weights.
            torch._foreach_lerp_([*average.parameters()], [*trained.parameters()], args.tau)
        optimizer.step()
        dual_descent(agent.lam, agent.kl_ema, statistics["trust_region/path_kl"], agent.kl_budget,
                     args.eta_lambda, args.kl_ema_coef, args.kl_clip_coef, args.lambda_min,
                     args.lambda_max)
    return {
        **statistics,
        "losses/grad_norm": grad_norm,
        "trust_region/path_kl_ema": agent.kl_ema.clone(),  # the next update writes in place
        "trust_region/kl_budget": agent.kl_budget.clone(),
        "trust_region/lambda": agent.lam.clone(),
    }


def tell_end_of_range(agent: Agent, args: Args):
    """One line, if lambda is clipped to an end of its range, where it cannot hold the KL."""
    if args.lambda_min < args.lambda_max and agent.lam in (args.lambda_min, args.lambda_max):
        print(f"\nnote: lambda stands at {agent.lam:.3g}, an end of its range, and cannot hold the "
              "KL at its budget; docs/algorithm.md, at (E12), says what to turn")


# ------------------------------------------------------------------------------------------- acting
@torch.no_grad()
def act(agent: Agent, observation: Tensor, noise: Tensor, args: Args) -> Tensor:
    """The best, by the critic's mean Q, of `samples` action chunks at each observation [n, O], from
    noise [n, samples, noise_dim] -> [n, A]."""
    n, samples, _ = noise.shape
    observation = observation.repeat_interleave(samples, dim=0)  # [n * samples, O]
    action = policy_action(agent, observation, noise.flatten(0, 1), args)  # [n * samples, A]
    best = agent.critic(observation, action).mean(0).view(n, samples).argmax(1)  # [n]
    return action.view(n, samples, -1)[torch.arange(n, device=best.device), best]


def online_step(agent: Agent, dataset: common.ChunkDataset, environment: common.OnlineEnvironment,
                generator: torch.Generator, args: Args):
    """One environment step into the dataset: the next action of the chunk in execution, or, where
    nothing is left of it (an episode's end drops the rest), the first of a new one."""
    if not len(environment.chunk):
        size, device = (1, args.best_of_n, agent.noise_dim), generator.device
        noise = torch.randn(size, generator=generator, device=device)
        observation = torch.tensor(environment.observation, dtype=torch.float32, device=device)
        chunk = act(agent, observation[None], noise, args)  # [1, A]
        environment.chunk = chunk.view(args.chunk_length, -1).numpy(force=True)  # [c, d]
    action, environment.chunk = environment.chunk[0], environment.chunk[1:]
    dataset.append(*environment.step(action))


# --------------------------------------------------------------------------------------------- main
def main(args: Args):
    """Clone, fine-tune, go online. A resumed run skips what it has done. Of `run`,
    of common.py, `restore` names what checkpoints hold, `steps` yields a stage's steps that are
    left, and `after` logs, evaluates and saves, where that is due."""
    with common.Run(__file__, args) as run:
        torch.manual_seed(args.seed)  # of the initial weights; the rest draws from `generator`
        chunk_dim = args.chunk_length * run.action_dim
        agent = Agent(run.observation_dim, chunk_dim, args).to(run.device)
        optimizer = agent.make_optimizer(args)
        generator = torch.Generator(run.device).manual_seed(args.seed)
        acting = functools.partial(act, agent, args=args)
        run.restore(agent=agent, optimizer=optimizer, generator=generator)
        if args.bc_checkpoint and not run.done:  # else it is resumed
            run.load_clone(agent.clone)
        if args.eval_only:
            return run.evaluate_only(acting)

        dataset = run.load_dataset()
        environment = common.OnlineEnvironment(args.env_id, args.seed)
        dataset.make_room(args.online_steps)
        run.restore(dataset=dataset, environment=environment)

        def draw(sample=dataset.sample):
            batch = sample(args.batch_size, generator)
            return batch, draw_noise(args.batch_size, chunk_dim, args, generator)

        updates = args.offline_steps  # so many, compiling pays
        updates += args.utd_ratio * args.online_steps
        compiled = common.compiled(losses, args.compile, updates, run.device)
        bc_step = functools.partial(bc_update, agent, optimizer, args=args)
        train_step = functools.partial(update, agent, optimizer, args=args, loss_function=compiled)
        if args.cuda_graph and run.device.type == "cuda":
            bc_step = common.CudaGraph(bc_step)
            train_step = common.CudaGraph(train_step)

        # 1. Clone the behaviour in the data: what the base and the policy start from.
        for _ in run.steps("bc", 0 if args.bc_checkpoint else args.bc_steps):
            run.after(bc_step(*draw()))

        # 2. Fine-tune a copy of it on the data, at the KL budget.
        if run.enters("offline"):  # once, and not again where it is resumed
            agent.start_from_clone()
            optimizer.state.clear()  # Adam's moments and the noise begin anew, so that the stage
            generator.manual_seed(args.seed)  # is the same from --bc-checkpoint
            run.save_clone(agent.clone)
            run.evaluate_and_save(acting)  # the clone's score
        for _ in run.steps("offline", args.offline_steps):
            if run.after(train_step(*draw()), acting):
                tell_end_of_range(agent, args)

        # 3. Go online: each step adds a transition; after learning_starts, updates follow it.
        agent.kl_budget.fill_(args.kl_budget_online or args.kl_budget)
        sample = dataset.sample_balanced if args.balanced_sampling else dataset.sample
        for step in run.steps("online", args.online_steps):
            statistics = {}
            online_step(agent, dataset, environment, generator, args)
            for _ in range(args.utd_ratio if step > args.learning_starts else 0):
                statistics = train_step(*draw(sample))
            if run.after(statistics | environment.report(), acting):
                tell_end_of_range(agent, args)
        run.finish(acting)


if __name__ == "__main__":
    common.run_script(__file__, main, Args, settings)
