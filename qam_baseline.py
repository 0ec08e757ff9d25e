"""QAM, Q-learning with Adjoint Matching, and QAM-E, offline and then online: the baselines, in this one file.

A flow policy is a velocity field v(s, x, t) that carries noise x at t = 0 to an action at t = 1. It is pretrained by
behaviour cloning, and goes on being cloned: that is the prior. QAM fine-tunes a copy of it towards actions of higher
Q, as far from the prior as one fixed inverse temperature lets it go:

1. roll the copy out as a memoryless SDE, from noise to an action                                memoryless_rollout
2. carry the critic's action gradient, times the inverse temperature, back along that path       lean_adjoint
3. regress the velocity onto what this adjoint asks for: no gradient runs through the sampler    adjoint_matching_loss
4. QAM-E (--edit-scale > 0): a second, Gaussian policy edits the flow's action within a box      EditPolicy, edit_loss

    python qam_baseline.py quick                                       # a small task on a laptop, within 15 minutes
    python qam_baseline.py --env-id scene-play-singletask-task1-v0     # full size: for a GPU
    python qam_baseline.py --env-id puzzle-3x3-play-singletask-task4-v0 --edit-scale 0.1 --online-steps 500000

Papers: QAM and QAM-E, Li and Levine, 2026, arXiv 2601.14234; TRQAM, Dong et al., 2026, arXiv 2605.27079; Adjoint
Matching, Domingo-Enrich et al., 2024, arXiv 2409.08861. The numbers (E1) to (E15) are those of docs/algorithm.md.

Shapes: B batch, O observation, d one action, c actions in a chunk, A = c*d a flattened chunk, E critics, K flow steps.
Time runs over t_k = k*h, h = 1/K. common.py holds data, evaluation and run files, and nothing of the algorithm.
What several scripts hold is the same in each to the letter, so a diff of two is their algorithms' difference alone.
"""

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import common


@dataclass
class Args:
    preset: tyro.conf.Positional[Literal["full", "quick"]] = "full"
    """`full`: full size, with the settings of the environment's domain; `quick`: a small task and network"""
    env_id: str = "scene-play-singletask-task1-v0"
    """OGBench single-task environment, with the dataset's type in its name"""
    seed: int = 0
    """seed of the networks, batches, noise and evaluation episodes"""
    run_dir: str = ""
    """folder of the run's files; default runs/{env_id}__{script}__{seed}__{time}"""
    resume: bool = False
    """continue the run in --run-dir from its checkpoint, with the settings stored there"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; `auto` takes the GPU when there is one"""
    num_threads: int = 0
    """CPU threads of torch; 0: as many as torch chooses"""
    compile: Literal["auto", "on", "off"] = "auto"
    """make the update's losses one compiled graph; `auto`: where the run is long enough to win the time back"""
    cuda_graph: bool = True
    """on a GPU, record what an update launches, once, and from then on launch all of it together"""
    tf32: bool = False
    """on a GPU, multiply float32 matrices in TF32: faster, with 10 bits of mantissa"""
    dataset_path: str = ""
    """an OGBench .npz file, or a folder of them, to train on instead of the official file"""
    max_data_gb: float = 0.0
    """GiB of data on the device at once: several files beyond it take turns, 1,000 updates each; 0: what is free"""
    dataset_dir: str = "~/.ogbench/data"
    """where official files are kept or downloaded to, and collected ones written"""
    collect_episodes: int = 0
    """> 0: train on this many episodes collected here with OGBench's own scripted oracle; 0: on the official file"""
    collect_seed: int = 0
    """seed of the collected dataset"""
    bc_checkpoint: str = ""
    """a bc_checkpoint.pt of the same domain, or the authors' params_*.pkl; skips the behaviour-cloning stage"""
    eval_only: bool = False
    """evaluate --checkpoint (and film it, with --capture-video) instead of training"""
    checkpoint: str = ""
    """the checkpoint.pt that --eval-only reads"""
    eval_interval: int = 50_000
    """fine-tuning steps between evaluations"""
    eval_episodes: int = 50
    """episodes of one evaluation"""
    log_interval: int = 1_000
    """steps between rows of train.csv"""
    checkpoint_interval: int = 10_000
    """steps between checkpoints; one is also written at each evaluation"""
    capture_video: bool = False
    """film the first episodes of the last evaluation (mp4; needs EGL)"""
    track: bool = False
    """log to Weights & Biases as well (needs `pip install wandb`)"""

    # Algorithm specific arguments
    bc_steps: int = 300_000
    """updates of the behaviour-cloning stage"""
    offline_steps: int = 1_000_000
    """updates of the offline fine-tuning stage"""
    online_steps: int = 0
    """environment steps of the online stage that follows; 0: none"""
    learning_starts: int = 5_000
    """online steps that only collect, before updates begin"""
    utd_ratio: int = 1
    """updates for each online step"""
    balanced_sampling: bool = False
    """online, draw half of each batch from the dataset and half from what was collected; else uniformly from both"""
    batch_size: int = 256
    """chunks in a batch, B"""
    learning_rate: float = 3e-4
    """learning rate of Adam, for all networks"""
    max_grad_norm: float = 1.0
    """global norm to which the gradient of all networks together is clipped"""
    gamma: float = 0.995
    """discount per environment step"""
    tau: float = 0.005
    """rate at which target networks follow the online ones"""
    chunk_length: int = 5
    """actions predicted and executed at once, c"""
    sparse_reward: bool = False
    """train on reward -1 wherever the environment's is not 0"""
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """widths of the hidden layers of every network"""
    actor_layer_norm: bool = False
    """LayerNorm in the velocity fields too (critics always have it)"""
    num_critics: int = 10
    """members of the critic ensemble, E"""
    rho: float = 0.5
    """pessimism: the target is the ensemble's mean minus rho times its standard deviation"""
    flow_steps: int = 10
    """Euler steps from noise to an action, K"""
    best_of_n: int = 1
    """action chunks drawn when acting; the one of highest mean Q is executed"""
    inverse_temperature: float = 1.0
    """how much the critic's gradient counts against the prior: the QAM paper's tau, which is not --tau"""
    edit_scale: float = 0.0
    """QAM-E: largest change an edit makes to an action, in [0, 1]; 0: QAM, without edits"""
    entropy_scale: float = 0.5
    """QAM-E: the edit's target entropy is minus this for each of its A numbers, in nats"""


WIDE = dict(hidden_dims=(1024,) * 4, actor_layer_norm=True)
DOMAINS = {  # what differs from the defaults above; every flag given on the command line wins over it
    "scene-play": dict(sparse_reward=True),
    "puzzle-3x3-play": dict(sparse_reward=True, inverse_temperature=3.0),
    "puzzle-4x4-play": dict(sparse_reward=True, inverse_temperature=30.0, **WIDE),
    "cube-double-play": dict(),
    "cube-triple-play": dict(inverse_temperature=3.0, **WIDE),
    "cube-quadruple-play": dict(**WIDE),
    "antmaze-large-navigate": dict(chunk_length=1, inverse_temperature=10.0),
    "antmaze-giant-navigate": dict(chunk_length=1, inverse_temperature=3.0, **WIDE),
    "humanoidmaze-medium-navigate": dict(chunk_length=1, gamma=0.999, rho=0.0, inverse_temperature=3.0),
    "humanoidmaze-large-navigate": dict(chunk_length=1, gamma=0.999, rho=0.0, inverse_temperature=3.0),
}
# QAM-E's own inverse temperature, where it is not QAM's. Its edit_scale: 0.9 in puzzle-4x4, 0 in scene and cube-double,
# 0.1 in all others.
EDIT_TEMPERATURES = {
    "puzzle-3x3-play": 1.0, "puzzle-4x4-play": 0.1, "cube-quadruple-play": 3.0,
    "antmaze-large-navigate": 1.0, "antmaze-giant-navigate": 10.0,
}  # fmt: skip
QUICK = dict(
    env_id="cube-single-play-singletask-task2-v0", collect_episodes=100,
    bc_steps=8_000, offline_steps=4_000, eval_interval=1_000, log_interval=100, checkpoint_interval=1_000,
    learning_rate=1e-3, gamma=0.98, tau=0.02, hidden_dims=(128,) * 4, num_critics=2, flow_steps=5,
    inverse_temperature=1.0, learning_starts=500, balanced_sampling=True,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- networks
class VelocityField(nn.Module):
    """v(s, x, t), the flow policy: an MLP on [s, x, t]; tanh-GELU (and LayerNorm, if asked for), output unbounded."""

    def __init__(self, observation_dim: int, chunk_dim: int, hidden_dims: tuple[int, ...], layer_norm: bool):
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
        """observation [..., O], x [..., A], t in [0, 1] (a number or [..., 1]) -> velocity [..., A]."""
        t = torch.zeros_like(x[..., :1]) + t  # [..., 1]
        return self.net(torch.cat([observation, x, t], dim=-1))


class Critic(nn.Module):
    """Q^e(s, a) for e = 1 ... E: independent MLPs on [s, a], tanh-GELU then LayerNorm, with their weights stacked."""

    def __init__(self, observation_dim: int, chunk_dim: int, hidden_dims: tuple[int, ...], num_critics: int):
        super().__init__()
        self.num_critics = num_critics
        widths = [observation_dim + chunk_dim, *hidden_dims, 1]
        kernels = [torch.empty(num_critics, *in_out) for in_out in itertools.pairwise(widths)]
        for kernel in kernels:
            for member in kernel:
                nn.init.xavier_uniform_(member)
        self.kernels = nn.ParameterList(kernels)  # [E, in, out] each
        self.biases = nn.ParameterList(torch.zeros(num_critics, 1, width) for width in widths[1:])
        self.norm_scales = nn.ParameterList(torch.ones(num_critics, 1, width) for width in hidden_dims)
        self.norm_biases = nn.ParameterList(torch.zeros(num_critics, 1, width) for width in hidden_dims)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """observation [B, O], action chunk [B, A] -> Q [E, B]."""
        x = torch.cat([observation, action], dim=-1).expand(self.num_critics, -1, -1)  # [E, B, O + A]
        *hidden, (last_kernel, last_bias) = zip(self.kernels, self.biases)
        for (kernel, bias), norm_scale, norm_bias in zip(hidden, self.norm_scales, self.norm_biases):
            x = F.gelu(torch.baddbmm(bias, x, kernel), approximate="tanh")  # [E, B, width]
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * norm_scale + norm_bias
        return torch.baddbmm(last_bias, x, last_kernel).squeeze(-1)


class EditPolicy(nn.Module):
    """QAM-E's pi(edit | s, a_flow), a tanh-Gaussian, and its entropy's price alpha."""

    def __init__(self, observation_dim: int, chunk_dim: int, hidden_dims: tuple[int, ...], edit_scale: float):
        super().__init__()
        self.edit_scale = edit_scale
        layers, width = [], observation_dim + chunk_dim
        for hidden_dim in hidden_dims:
            layers += [nn.Linear(width, hidden_dim), nn.GELU(approximate="tanh")]
            width = hidden_dim
        self.net = nn.Sequential(*layers)
        self.mean, self.log_std = nn.Linear(width, chunk_dim), nn.Linear(width, chunk_dim)
        for layer in (*self.net, self.mean, self.log_std):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def forward(self, observation: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(E13) a = clip(a_flow + edit_scale edit), edit in (-1, 1), at observation [B, O] from a_flow and normal noise
        [B, A] -> a [B, A], log pi(edit) [B]."""
        hidden = self.net(torch.cat([observation, action], dim=-1))
        log_std = self.log_std(hidden).clamp(-20, 2)
        u = self.mean(hidden) + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), without its cancellation
        return (action + self.edit_scale * u.tanh()).clamp(-1, 1), (log_normal - log_slope).sum(-1)


class Agent(nn.Module):
    """The networks, all of which a checkpoint holds."""

    def __init__(self, observation_dim: int, chunk_dim: int, args: Args):
        super().__init__()
        self.critic = Critic(observation_dim, chunk_dim, args.hidden_dims, args.num_critics)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        # v_slow, cloned all along; v_base, its moving average: the prior; v_fast, the fine-tuned policy: what acts
        self.actor_slow = VelocityField(observation_dim, chunk_dim, args.hidden_dims, args.actor_layer_norm)
        self.target_actor_slow = copy.deepcopy(self.actor_slow).requires_grad_(False)
        self.actor_fast = copy.deepcopy(self.actor_slow)
        self.noise_dim = chunk_dim  # normal numbers behind one action chunk of the policy
        if args.edit_scale:
            self.edit_actor = EditPolicy(observation_dim, chunk_dim, args.hidden_dims, args.edit_scale)
            self.noise_dim = 2 * chunk_dim

    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def start_from_clone(self):
        """The base and the fine-tuned policy begin as the behaviour-cloned one."""
        self.target_actor_slow.load_state_dict(self.actor_slow.state_dict())
        self.actor_fast.load_state_dict(self.actor_slow.state_dict())

    def make_optimizer(self, args: Args) -> Optimizer:
        return Adam(self.trained_parameters(), lr=args.learning_rate, eps=1e-8, fused=True, capturable=args.cuda_graph)


# ------------------------------------------------------------------------------------------------- the mathematics
class Noise(NamedTuple):
    """All randomness of one update."""

    next_action: Tensor  # [B, A] normal, x_0 of the next action in the critic's target; [B, 2A] with its edit's noise
    flow_x0: Tensor  # [B, A] normal, x_0 of the behaviour-cloning pairs
    flow_t: Tensor  # [B, 1] uniform on [0, 1), their times
    sde_x0: Tensor  # [B, A] normal, x_0 of the memoryless rollout
    sde: Tensor  # [K, B, A] normal, its increments (the last is not used: that step has no noise)
    edit_x0: Tensor | None = None  # [B, A] normal, x_0 of the actions that the edit policy is trained on
    edit: Tensor | None = None  # [B, A] normal, of their edits


def draw_noise(batch_size: int, chunk_dim: int, args: Args, generator: torch.Generator) -> Noise:
    """The noise of one update, from `generator`, on its device."""
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=generator.device)
    next_action, flow_x0, sde_x0 = normal(3, batch_size, chunk_dim)  # [B, A] each
    flow_t = torch.rand(batch_size, 1, generator=generator, device=generator.device)
    noise = Noise(next_action, flow_x0, flow_t, sde_x0, sde=normal(args.flow_steps, batch_size, chunk_dim))
    if not args.edit_scale:
        return noise
    next_edit, edit_x0, edit = normal(3, batch_size, chunk_dim)
    return noise._replace(next_action=torch.cat([next_action, next_edit], dim=-1), edit_x0=edit_x0, edit=edit)


def ode_sample(velocity: VelocityField, observation: Tensor, x: Tensor, flow_steps: int) -> Tensor:
    """(E1) The policy's action: K Euler steps from noise x [B, A] at observation [B, O] -> [B, A] in [-1, 1]."""
    h = 1 / flow_steps
    for k in range(flow_steps):
        x = x + h * velocity(observation, x, k * h)
    return x.clamp(-1, 1)


def policy_action(agent: Agent, observation: Tensor, noise: Tensor, args: Args) -> Tensor:
    """What acts: actor_fast, at observation [n, O] from noise [n, A] -> action chunks [n, A] in [-1, 1]; with QAM-E's
    edits of them, from noise [n, 2A]."""
    if not args.edit_scale:
        return ode_sample(agent.actor_fast, observation, noise, args.flow_steps)
    flow_noise, edit_noise = noise.chunk(2, dim=-1)
    action = ode_sample(agent.actor_fast, observation, flow_noise, args.flow_steps)
    return agent.edit_actor(observation, action, edit_noise)[0]


def critic_target(agent: Agent, batch: common.Batch, next_action_noise: Tensor, args: Args) -> Tensor:
    """(E2) y = R + gamma^c m Q'(s', a'), with Q' = mean_e Q^e - rho std_e Q^e of the target critic -> [B]."""
    next_action = policy_action(agent, batch.next_observation, next_action_noise, args)  # [B, A]
    next_q = agent.target_critic(batch.next_observation, next_action)  # [E, B]
    next_q = next_q.mean(0) - args.rho * next_q.std(0, correction=0)  # [B]
    return batch.reward + args.gamma**args.chunk_length * batch.mask * next_q


def critic_loss(q: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """(E3) L_Q = mean_{e,b} valid (Q^e(s, a) - y)^2, from q [E, B], target [B], valid [B]."""
    return (valid * (q - target) ** 2).mean()


def bc_loss(velocity: VelocityField, batch: common.Batch, x0: Tensor, t: Tensor) -> Tensor:
    """(E4) Flow matching: L_BC = mean_b valid mean_A (v(s, (1-t) x0 + t a, t) - (a - x0))^2."""
    x_t = (1 - t) * x0 + t * batch.action  # [B, A]
    error = velocity(batch.observation, x_t, t) - (batch.action - x0)  # [B, A]
    return (batch.valid * (error**2).mean(-1)).mean()


def memoryless_g2(t: float | Tensor, h: float) -> float | Tensor:
    """(E5) g_k^2 = 2 (1 - t_k + h) / (t_k + h): the noise under which a path's end forgets its beginning. In continuous
    time it is 2 (1 - t) / t; the shift by h keeps it finite at t = 0 and positive at the last step."""
    return 2 * (1 - t + h) / (t + h)


def memoryless_rollout(
    velocity: VelocityField, base: VelocityField, observation: Tensor, x: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """(E6) Paths of the memoryless SDE from x [B, A], with noise [K, B, A] -> x_0 ... x_{K-1} [K, B, A] and x_K [B, A].
    The last step is a noiseless one of the base."""
    h = 1 / len(noise)
    xs = [x]
    for k in range(len(noise) - 1):
        t = k * h
        drift = 2 * velocity(observation, x, t) - x / (t + h)
        x = x + h * drift + math.sqrt(h * memoryless_g2(t, h)) * noise[k]
        xs.append(x)
    return torch.stack(xs), x + h * base(observation, x, 1 - h)


def terminal_adjoint(critic: Critic, observation: Tensor, x: Tensor) -> Tensor:
    """(E7) adjoint_K = -grad_x mean_e Q^e(s, clip(x, -1, 1)) at the path's end x [B, A] -> [B, A]. Not pessimistic."""
    return -torch.func.grad(lambda x: critic(observation, x.clamp(-1, 1)).mean(0).sum())(x)


def lean_adjoint(base: VelocityField, observation: Tensor, xs: Tensor, adjoint: Tensor) -> Tensor:
    """(E8) adjoint_k = adjoint_{k+1} + h (db_k/dx)^T adjoint_{k+1}, b_k(x) = 2 v_base(s, x, t_k + h) - x / (t_k + h),
    backwards from adjoint_K [B, A] along xs [K, B, A] -> k = 0 ... K-1 [K, B, A]. "Lean": only the base's Jacobian
    enters. The base is taken at t_k + h, not at t_k, and at k = K-1 as if that step had noise, as the authors do."""
    h = 1 / len(xs)
    adjoints = []
    for k in reversed(range(len(xs))):
        t_next = (k + 1) * h
        _, vjp = torch.func.vjp(lambda x: base(observation, x, t_next), xs[k])
        adjoint = adjoint + h * (2 * vjp(adjoint)[0] - adjoint / t_next)
        adjoints.append(adjoint)
    return torch.stack(adjoints[::-1])


def flow_times(paths: Tensor) -> Tensor:
    """t_k = k h for paths [K, B, A] -> [K, 1, 1]."""
    return torch.arange(len(paths), dtype=paths.dtype, device=paths.device)[:, None, None] / len(paths)


def velocity_difference(velocity: VelocityField, base: VelocityField, observation: Tensor, xs: Tensor) -> Tensor:
    """(E9) Delta_k = v_fast(s, x_k, t_k) - v_base(s, x_k, t_k) on paths xs [K, B, A]; gradient through v_fast alone."""
    observation = observation.expand(len(xs), -1, -1)  # [K, B, O]
    with torch.no_grad():
        base_velocity = base(observation, xs, flow_times(xs))
    return velocity(observation, xs, flow_times(xs)) - base_velocity


def adjoint_matching_loss(delta: Tensor, adjoints: Tensor, temperature: Tensor) -> Tensor:
    """(E10) L_AM = mean_b sum_k ||2 Delta_k / sigma_k + sigma_k adjoint_k||^2, sigma_k = g_k / sqrt(temperature),
    from delta and adjoints [K, B, A]. Its minimum is Delta_k = -g_k^2 adjoint_k / (2 temperature)."""
    sigma = (memoryless_g2(flow_times(delta), 1 / len(delta)) / temperature).sqrt()  # [K, 1, 1]
    return ((2 * delta / sigma + sigma * adjoints) ** 2).sum(dim=(0, 2)).mean()


def path_kl(delta: Tensor, chunk_length: int) -> Tensor:
    """(E11) Theorem 1, discretised: KL = (1/c) mean_b sum_k (2h / g_k^2) ||Delta_k||^2, in nats per action."""
    h = 1 / len(delta)
    return (2 * h / memoryless_g2(flow_times(delta), h) * delta**2).sum(dim=(0, 2)).mean() / chunk_length


def closed_form_kl(adjoints: Tensor, temperature: Tensor, chunk_length: int) -> Tensor:
    """(E11) at the minimum of (E10): KL(lambda) = (1/c) mean_b sum_k h g_k^2 ||adjoint_k||^2 / (2 temperature^2)."""
    h = 1 / len(adjoints)
    cost = (h * memoryless_g2(flow_times(adjoints), h) * adjoints**2).sum(dim=(0, 2)).mean()
    return cost / (2 * temperature**2) / chunk_length


def edit_loss(agent: Agent, observation: Tensor, noise: Noise, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """(E14) - mean Q(s, a) + alpha mean log pi(edit), for the edits alone; (E15) alpha (entropy - target), for alpha
    alone -> their sum, and its statistics."""
    with torch.no_grad():
        action = ode_sample(agent.actor_fast, observation, noise.edit_x0, args.flow_steps)  # [B, A]
    action, log_prob = agent.edit_actor(observation, action, noise.edit)  # [B, A], [B]
    frozen = {name: parameter.detach() for name, parameter in agent.critic.named_parameters()}
    loss_q = -torch.func.functional_call(agent.critic, frozen, (observation, action)).mean()
    alpha, entropy = agent.edit_actor.log_alpha.exp(), -log_prob.mean()
    loss_entropy = -alpha.detach() * entropy
    loss_alpha = alpha * (entropy.detach() + args.entropy_scale * action.shape[-1])
    statistics = dict(q_loss=loss_q, entropy_loss=loss_entropy, alpha_loss=loss_alpha, entropy=entropy, alpha=alpha)
    statistics = {f"losses/edit_{name}": value.detach() for name, value in statistics.items()}
    return loss_q + loss_entropy + loss_alpha, statistics


def update_targets(agent: Agent, tau: float):
    """target <- (1 - tau) target + tau online."""
    for target, online in ((agent.target_critic, agent.critic), (agent.target_actor_slow, agent.actor_slow)):
        torch._foreach_lerp_([*target.parameters()], [*online.parameters()], tau)


# ------------------------------------------------------------------------------------------------------ one update
def bc_update(agent: Agent, optimizer: Optimizer, batch: common.Batch, noise: Noise, args: Args) -> dict[str, Tensor]:
    """One update of the behaviour-cloning stage: (E4) alone, on actor_slow."""
    loss_bc = bc_loss(agent.actor_slow, batch, noise.flow_x0, noise.flow_t)
    optimizer.zero_grad()
    loss_bc.backward()
    grad_norm = nn.utils.clip_grad_norm_(agent.trained_parameters(), args.max_grad_norm)
    optimizer.step()
    return {"losses/bc_loss": loss_bc.detach(), "losses/grad_norm": grad_norm}


def losses(agent: Agent, batch: common.Batch, noise: Noise, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all networks together, and its statistics: scalars without gradient, named as in TensorBoard, in the
    order they arise, so that the first one that is not finite is where it began."""
    s = batch.observation  # [B, O]
    temperature = torch.ones_like(batch.reward[0])  # lambda_eff = 1: tau multiplies the terminal adjoint instead
    with torch.no_grad():
        target = critic_target(agent, batch, noise.next_action, args)  # [B]
        xs, x_final = memoryless_rollout(agent.actor_fast, agent.target_actor_slow, s, noise.sde_x0, noise.sde)
        terminal = args.inverse_temperature * terminal_adjoint(agent.target_critic, s, x_final)  # [B, A]
        adjoints = lean_adjoint(agent.target_actor_slow, s, xs, terminal)  # [K, B, A]

    q = agent.critic(s, batch.action)  # [E, B]
    delta = velocity_difference(agent.actor_fast, agent.target_actor_slow, s, xs)  # [K, B, A]
    loss_q = critic_loss(q, target, batch.valid)
    loss_bc = bc_loss(agent.actor_slow, batch, noise.flow_x0, noise.flow_t)
    loss_am = adjoint_matching_loss(delta, adjoints, temperature)
    loss_edit, edit_statistics = edit_loss(agent, s, noise, args) if args.edit_scale else (0.0, {})
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
        **edit_statistics,
    }
    return loss_q + loss_bc + loss_am + loss_edit, {name: value.detach() for name, value in statistics.items()}


@functools.cache
def compiled(function: Callable) -> Callable:
    """`function` as one graph, made into fast code at its first call, within a minute or so."""
    by_exp = {"cpp.use_decompose_tanh": True}  # GELU's tanh is, on a CPU, the largest part after matrix products
    return torch.compile(function, fullgraph=True, options=by_exp)


def update(agent: Agent, optimizer: Optimizer, batch: common.Batch, noise: Noise, args: Args) -> dict[str, Tensor]:
    """One QAM(-E) update, in place; a function of (agent, optimizer), batch and noise that never waits for the device.

    Returns its statistics: scalars on the device, to be read only when they are logged.
    """
    loss, statistics = (compiled(losses) if args.compile == "on" else losses)(agent, batch, noise, args)
    optimizer.zero_grad()
    loss.backward()
    grad_norms = {  # of each network alone
        f"gradients/{name}": nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        for name, network in agent.named_children()
        if not name.startswith("target")
    }
    grad_norm = nn.utils.clip_grad_norm_(agent.trained_parameters(), args.max_grad_norm)  # of all networks together
    with torch.no_grad():
        update_targets(agent, args.tau)  # before the step: the targets follow the weights that made this loss
        optimizer.step()
    return {
        **statistics,
        **grad_norms,
        "losses/grad_norm": grad_norm,
    }


# ---------------------------------------------------------------------------------------------------------- acting
@torch.no_grad()
def act(agent: Agent, observation: Tensor, noise: Tensor, args: Args) -> Tensor:
    """Action chunks [n, A] at observation [n, O]: of those from noise [n, samples, noise_dim], the one of highest Q."""
    n, samples, _ = noise.shape
    observation = observation.repeat_interleave(samples, dim=0)  # [n * samples, O]
    action = policy_action(agent, observation, noise.flatten(0, 1), args)  # [n * samples, A]
    best = agent.critic(observation, action).mean(0).view(n, samples).argmax(1)  # [n]
    return action.view(n, samples, -1)[torch.arange(n, device=best.device), best]


def online_step(
    agent: Agent, dataset: common.ReplayBuffer, environment: common.OnlineEnvironment, generator, args: Args
):
    """One environment step into the dataset: the next action of the chunk in execution, or, where nothing is left of
    it (an episode's end drops the rest), the first of a new one."""
    if not len(environment.chunk):
        noise = torch.randn(1, args.best_of_n, agent.noise_dim, generator=generator, device=generator.device)
        observation = torch.as_tensor(environment.observation, dtype=torch.float32, device=noise.device)[None]
        chunk = act(agent, observation, noise, args)  # [1, A]
        environment.chunk = chunk.view(args.chunk_length, -1).numpy(force=True)  # [c, d]
    action, environment.chunk = environment.chunk[0], environment.chunk[1:]
    dataset.append(*environment.step(action))


# ------------------------------------------------------------------------------------------------------------ main
SCRIPT = Path(__file__).stem


def settings(args: Args) -> dict:
    """What the preset and the environment's domain set, where no flag does."""
    domain = DOMAINS.get(common.domain_of(args.env_id), {})
    if args.edit_scale and common.domain_of(args.env_id) in EDIT_TEMPERATURES:
        domain = domain | {"inverse_temperature": EDIT_TEMPERATURES[common.domain_of(args.env_id)]}
    return {"preset": args.preset, **domain, **(QUICK if args.preset == "quick" else {})}


def make_train_step(
    agent: Agent, optimizer: Optimizer, dataset: common.ReplayBuffer, generator, stage: str, args: Args
) -> Callable[[], dict[str, Tensor]]:
    """A function that draws a batch and all noise, and updates with them; on a GPU the update is one launch."""
    balanced = stage == "online" and args.balanced_sampling
    sample = dataset.sample_balanced if balanced else dataset.sample
    update_once = functools.partial(bc_update if stage == "bc" else update, agent, optimizer, args=args)
    if args.cuda_graph and generator.device.type == "cuda":
        update_once = common.CudaGraph(update_once)

    def train_step() -> dict[str, Tensor]:
        batch = sample(args.batch_size, generator)
        return update_once(batch, draw_noise(*batch.action.shape, args, generator))

    return train_step


def main(args: Args):
    common.check_settings(args)
    device = common.choose_device(args.device, args.num_threads, args.tf32)
    domain = common.domain_of(args.env_id)
    observation_dim, action_dim = common.environment_sizes(args.env_id)
    sizes = dict(domain=domain, observation_dim=observation_dim, action_dim=action_dim)
    sizes |= {name: getattr(args, name) for name in ("chunk_length", "hidden_dims", "actor_layer_norm")}
    torch.manual_seed(args.seed)
    agent = Agent(observation_dim, args.chunk_length * action_dim, args).to(device)
    policy = lambda observation, noise: act(agent, observation.to(device), noise.to(device), args)
    bc_steps = 0 if args.bc_checkpoint else args.bc_steps
    offline_end = bc_steps + args.offline_steps
    total_steps = offline_end + args.online_steps

    if args.eval_only:
        checkpoint = common.load_checkpoint(args.checkpoint, SCRIPT, "--checkpoint", sizes)
        with common.restoring(args):
            agent.load_state_dict(checkpoint["agent"])
        if checkpoint["step"] < bc_steps:
            agent.start_from_clone()
        return common.evaluate_checkpoint(args, agent.noise_dim, policy)

    run = common.Run(SCRIPT, args, sizes, agent.noise_dim, device)
    optimizer = agent.make_optimizer(args)
    generator = torch.Generator(device).manual_seed(args.seed)
    environment = common.OnlineEnvironment(args.env_id, args.seed)
    step = 0  # updates done, over all stages; online, environment steps
    with common.restoring(args, run.resumes):
        if run.checkpoint:
            agent.load_state_dict(run.checkpoint["agent"])
            common.restore_optimizer(optimizer, run.checkpoint["optimizer"])
            generator.set_state(run.checkpoint["generator"])
            environment.load_state_dict(run.checkpoint["environment"])
            step = run.checkpoint["step"]
        elif args.bc_checkpoint:
            prior = common.load_checkpoint(args.bc_checkpoint, "bc", "--bc-checkpoint", sizes)
            agent.actor_slow.load_state_dict(prior["actor_slow"])
            agent.start_from_clone()
    fine_tuning = args.offline_steps + args.utd_ratio * args.online_steps
    args = run.args = replace(args, compile=common.choose_compile(args.compile, device, fine_tuning))
    with run:
        dataset = run.load_dataset()
        known = "settings of the domain" if domain in DOMAINS else "no published settings, so the general defaults"
        print(f"preset {args.preset}; {domain}: {known}; flags win over both")

        twin = copy.deepcopy(agent)  # is timed, and thrown away
        trial = twin, twin.make_optimizer(args), copy.copy(dataset), torch.Generator(device)
        run.announce("bc", bc_steps - step, make_train_step(*trial, "bc", args))
        online_updates = args.utd_ratio * max(0, total_steps - max(step, offline_end + args.learning_starts))
        updates_left = max(0, offline_end - max(step, bc_steps)) + online_updates
        run.announce("fine-tuning", updates_left, make_train_step(*trial, "offline", args))
        twin = trial = None

        run.begin(step, total_steps)
        if step == bc_steps == 0:
            run.evaluate("bc", 0, policy)
        while step < total_steps:
            stage, stage_start = ("bc", 0) if step < bc_steps else ("offline", bc_steps)
            updates, statistics = 1, {}
            if step >= offline_end:
                stage, stage_start = "online", offline_end
                online_step(agent, dataset, environment, generator, args)
                updates = args.utd_ratio if step - offline_end >= args.learning_starts else 0
            if stage != run.stage:
                train_step = make_train_step(agent, optimizer, dataset, generator, stage, args)
            for _ in range(updates):
                statistics = train_step()
            step += 1
            stage_step = step - stage_start
            run.tick(stage, stage_step, statistics, updates)
            stage_ends = step in (bc_steps, offline_end, total_steps)
            if stage_ends or stage_step % args.log_interval == 0:
                run.log({**statistics, **environment.report()})
            if step == bc_steps:  # fine-tuning starts afresh, and so the same as one from --bc-checkpoint
                agent.start_from_clone()
                optimizer = agent.make_optimizer(args)
                generator.manual_seed(args.seed)
                run.save_bc(agent.actor_slow.state_dict())
            evaluation_due = stage_ends or (stage != "bc" and stage_step % args.eval_interval == 0)
            if evaluation_due:
                run.evaluate(stage, stage_step, policy)
            if evaluation_due or stage_step % args.checkpoint_interval == 0 or run.stopping:
                run.save(
                    agent=agent.state_dict(), optimizer=optimizer.state_dict(), generator=generator.get_state(),
                    replay=dataset.save(run.path / "replay.bin"), environment=environment.state_dict(),
                )  # fmt: skip
        run.finish(policy)


if __name__ == "__main__":
    common.run_script(main, Args, settings, SCRIPT)
