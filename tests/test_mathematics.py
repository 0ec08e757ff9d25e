"""The mathematics against closed forms: lean adjoint, Theorem 1, and the tilted Gaussian, in
float64."""

import math

import pytest
import torch
import torch.nn as nn
from conftest import DISTINCT, SCRIPTS, scripts_with

import common
import qam_baseline
import trqam_offline

TRQAM = scripts_with("kl_budget")
B, O, A, K = 6, 4, 3, 10
H = 1 / K


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def base_step(base, s, x, k):
    """One Euler step of the base drift that the adjoint differentiates: x + h b_k(x)."""
    return x + H * (2 * base(s, x, (k + 1) * H) - x / ((k + 1) * H))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_lean_adjoint_is_the_gradient_through_the_unrolled_base(script, layer_norm):
    base = script.VelocityField(O, A, (16, 16), layer_norm)
    critic = script.Critic(O, A, (16, 16), 3)
    s, x = torch.randn(B, O), 0.1 * torch.randn(B, A)
    xs, x = [x.requires_grad_()], x
    for k in range(K):
        x = base_step(base, s, x, k)
        xs.append(x)
    cost = -critic(s, xs[-1].clamp(-1, 1)).mean(0).sum()
    expected = torch.stack(torch.autograd.grad(cost, xs[:-1]))
    with torch.no_grad():
        a = script.terminal_adjoint(critic, s, xs[-1])
        found = script.lean_adjoint(base, s, torch.stack(xs[:-1]), a)
    assert a.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("script", SCRIPTS)
def test_lean_adjoint_is_the_finite_difference_of_one_step(script):
    base = script.VelocityField(O, A, (16, 16), False)
    s, xs, a = torch.randn(B, O), torch.randn(K, B, A), torch.randn(B, A)
    adjoints = torch.cat([script.lean_adjoint(base, s, xs, a), a[None]]).detach()
    epsilon = 1e-6
    for k in range(K):  # on any path, a_k . d is the change of a_{k+1} . step_k along d
        direction = torch.randn(B, A)
        with torch.no_grad():
            ahead, behind = (
                base_step(base, s, xs[k] + sign * epsilon * direction, k) for sign in (1, -1)
            )
        expected = ((ahead - behind) * adjoints[k + 1]).sum(-1) / (2 * epsilon)
        torch.testing.assert_close(
            (adjoints[k] * direction).sum(-1), expected, rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_terminal_adjoint_is_zero_where_the_action_is_clipped(script):
    critic = script.Critic(O, A, (16, 16), 3)
    x = torch.tensor([[0.5, 1.5, -2.0]])
    a = script.terminal_adjoint(critic, torch.randn(1, O), x)
    assert a[0, 0] != 0 and a[0, 1] == 0 and a[0, 2] == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_critic_that_gives_no_ensemble_is_refused(script):
    """The mean over a lone [B] would scale every sample's gradient by 1/B."""
    critic = script.Critic(O, A, (16, 16), 3)
    with pytest.raises(ValueError, match=r"the critic must give \[E, B\]"):
        script.terminal_adjoint(
            lambda s, a: critic(s, a).mean(0), torch.randn(B, O), torch.rand(B, A)
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_velocity_at_the_optimum_has_no_loss_and_the_closed_form_kl(script):
    adjoints, temperature = torch.randn(K, B, A), torch.tensor(1.7)
    g2 = script.memoryless_g2(script.flow_times(adjoints), H)
    optimum = -g2 * adjoints / (2 * temperature)
    assert script.adjoint_matching_loss(optimum, adjoints, temperature) < 1e-20
    for wrong in (-optimum, 2 * optimum, optimum / 2):
        assert script.adjoint_matching_loss(wrong, adjoints, temperature) > 1e-2
    closed = script.closed_form_kl(adjoints, temperature, chunk_length=5)
    torch.testing.assert_close(script.path_kl(optimum, chunk_length=5), closed)
    # Theorem 1 in the control u = 2 Delta / g, whose integral the KL is.
    energy = 0.5 * H * ((2 * optimum) ** 2 / g2).sum((0, 2)).mean() / 5
    torch.testing.assert_close(closed, energy)


@pytest.mark.parametrize("script", DISTINCT)
@pytest.mark.parametrize("seed", range(3))
def test_path_kl_is_the_expected_log_likelihood_ratio_of_the_paths(script, seed):
    """Theorem 1 for random linear drifts: KL = E log p_controlled(path) - log p_base(path),
    Gaussian transitions."""
    torch.manual_seed(seed)
    n, chunk_length = 20_000, 3
    base_matrix, difference, shift = (
        torch.randn(A, A) / 2,
        torch.randn(A, A) / 5,
        torch.randn(A) / 5,
    )
    base = lambda s, x, t: x @ base_matrix
    controlled = lambda s, x, t: x @ (base_matrix + difference) + shift * (1 - t)
    s = torch.zeros(n, 1)
    xs, _ = script.memoryless_rollout(controlled, base, s, torch.randn(n, A), torch.randn(K, n, A))

    def transition(velocity, k):  # mean and variance of x_{k+1} given x_k
        t = k * H
        return xs[k] + H * (2 * velocity(s, xs[k], t) - xs[k] / (t + H)), H * 2 * (1 - t + H) / (
            t + H
        )

    ratio = torch.zeros(n)
    for k in range(K):
        mean, variance = transition(controlled, k)
        # The rollout's last step has no noise, but the KL counts it as if it had: draw that one
        # here.
        following = xs[k + 1] if k + 1 < K else mean + math.sqrt(variance) * torch.randn(n, A)
        base_mean, _ = transition(base, k)
        ratio += ((following - base_mean) ** 2 - (following - mean) ** 2).sum(-1) / (2 * variance)

    delta = script.velocity_difference(controlled, base, s, xs)
    kl = script.path_kl(delta, chunk_length) * chunk_length
    standard_error = ratio.std() / math.sqrt(n)
    assert standard_error < 0.05 * kl  # precise enough to notice a factor of 1.2
    assert abs(ratio.mean() - kl) < 4 * standard_error


# The tilted Gaussian. The prior's actions are N(0, V I) and Q is quadratic, so the optimum at
# temperature T is the
# Gaussian  p(a) ~ N(0, V I) exp(Q(a) / T), and its path KL is KL(p || prior), since a memoryless
# path's end is
# independent of its beginning. The clip of actions at 1 plays no part: that is five standard
# deviations away.
# V is the exact variance of the K-step memoryless rollout, by recursion: 14 % over its limit S^2 at
# K = 50.
# Tolerance 5 %: what is left of the discretisation, and the noise of the last batches.

S = 0.2
STEPS = 50
TARGET, CURVATURE = (
    torch.tensor([0.15, -0.1], dtype=torch.float64),
    torch.tensor([25.0, 60.0], dtype=torch.float64),
)


def prior_slope(t):
    """The exact flow from N(0, I) to N(0, S^2 I) is linear: v(x, t) = E[a - x_0 | x_t = x] =
    slope(t) x."""
    return (t * S**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * S**2)


def prior_variance():
    h, variance = 1 / STEPS, 1.0
    for k in range(STEPS - 1):
        t = k * h
        variance = (1 + h * (2 * prior_slope(t) - 1 / (t + h))) ** 2 * variance + h * 2 * (
            1 - t + h
        ) / (t + h)
    return (1 + h * prior_slope(1 - h)) ** 2 * variance


class GaussianPrior(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, s, x, t):
        return prior_slope(t) * x + 0 * self.unused


class LinearPolicy(nn.Module):
    """The prior plus an affine map of x for each flow step: it can represent the optimum
    exactly."""

    def __init__(self):
        super().__init__()
        self.prior = GaussianPrior().requires_grad_(False)
        self.slope, self.offset = (
            nn.Parameter(torch.zeros(STEPS, 2)),
            nn.Parameter(torch.zeros(STEPS, 2)),
        )

    def forward(self, s, x, t):
        k = (
            ((torch.zeros_like(x[..., :1]) + t) * STEPS).round().long().squeeze(-1)
        )  # x's shape without its last
        return self.prior(s, x, t) + self.slope[k] * x + self.offset[k]


class QuadraticCritic(nn.Module):
    """Q(a) = -1/2 (a - TARGET)^T diag(CURVATURE) (a - TARGET), twice."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, s, action):
        q = -0.5 * (CURVATURE * (action - TARGET) ** 2).sum(-1) + 0 * self.unused
        return torch.stack([q, q])


def tilted(temperature):
    """Mean and variance (per dimension) of the optimum at this temperature, and its KL to the
    prior."""
    prior = prior_variance()
    variance = 1 / (1 / prior + CURVATURE / temperature)
    mean = variance * CURVATURE / temperature * TARGET
    kl = 0.5 * ((variance + mean**2) / prior - 1 - torch.log(variance / prior)).sum()
    return mean, variance, kl


def train_on_gaussian(script, args, updates):
    """Run `update` with the true Q and prior in place of networks; nothing but the policy (and
    lambda) can change."""
    agent = script.Agent(1, 2, args)
    agent.critic, agent.target_critic = QuadraticCritic(), QuadraticCritic().requires_grad_(False)
    agent.clone, agent.base = GaussianPrior(), GaussianPrior().requires_grad_(False)
    agent.policy = LinearPolicy()
    optimizer = agent.make_optimizer(args)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates, eta_min=1e-4)
    generator = torch.Generator().manual_seed(0)
    n = args.batch_size
    zeros = torch.zeros(n)
    batch = common.Batch(
        torch.zeros(n, 1), torch.zeros(n, 2), zeros, zeros, torch.zeros(n, 1), valid=zeros
    )
    history = []
    for _ in range(updates):
        noise = script.draw_noise(n, 2, args, generator)
        history.append(script.update(agent, optimizer, batch, noise, args))
        schedule.step()
    return agent, history


def fixed_temperature(script):
    """Settings that hold the temperature at 1.5."""
    if script in TRQAM:
        return dict(eta_lambda=0.0, lam_scale=1.5, kl_budget=1.0)
    return dict(inverse_temperature=1 / 1.5)


@pytest.mark.parametrize("script", DISTINCT)
def test_converges_to_the_tilted_gaussian_at_a_fixed_temperature(script):
    args = script.Args(
        hidden_dims=(4,),
        num_critics=2,
        flow_steps=STEPS,
        chunk_length=1,
        batch_size=512,
        max_grad_norm=1e6,
        learning_rate=0.1,
        **fixed_temperature(script),
    )
    agent, history = train_on_gaussian(script, args, updates=200)
    mean, variance, kl = tilted(temperature=1.5)
    n, s = 100_000, torch.zeros(100_000, 1)
    with torch.no_grad():
        noise = torch.randn(n, 2), torch.randn(STEPS, n, 2)
        _, prior_actions = script.memoryless_rollout(agent.base, agent.base, s, *noise)
        _, actions = script.memoryless_rollout(agent.policy, agent.policy, s, *noise)
    torch.testing.assert_close(
        prior_actions.var(0), torch.full((2,), prior_variance()), rtol=0.02, atol=0
    )
    torch.testing.assert_close(actions.mean(0), mean, rtol=0.05, atol=0)
    torch.testing.assert_close(actions.var(0), variance, rtol=0.05, atol=0)
    assert (prior_actions.var(0) / variance > 1.5).all()  # the prior itself is far from passing
    realised = torch.stack([row["trust_region/path_kl"] for row in history[-50:]]).mean()
    # The KL counts the last, noiseless step as if it had noise, and its first ones are the
    # coarsest: 8 %.
    torch.testing.assert_close(realised, kl, rtol=0.08, atol=0)


def test_lambda_settles_where_the_optimum_spends_the_budget():
    script = trqam_offline
    temperature = 2.0
    budget = float(tilted(temperature)[2]) / 4
    args = script.Args(
        hidden_dims=(4,),
        num_critics=2,
        flow_steps=STEPS,
        chunk_length=4,
        batch_size=256,
        max_grad_norm=1e6,
        learning_rate=0.1,
        eta_lambda=0.15,
        lam_scale=3.0,
        kl_budget=budget,
    )
    agent, history = train_on_gaussian(script, args, updates=350)
    lam = torch.stack([row["trust_region/lambda"] for row in history[-60:]])
    kl = torch.stack([row["trust_region/path_kl"] for row in history[-60:]])
    assert lam.max() / lam.min() < 1.05  # settled
    torch.testing.assert_close(kl.mean(), torch.tensor(budget), rtol=0.03, atol=0)
    # The 8 % more of the KL above are 4 % more of the temperature: the KL goes as 1 / its square.
    torch.testing.assert_close(
        args.lam_scale * lam.mean(), torch.tensor(temperature), rtol=0.06, atol=0
    )


@pytest.mark.parametrize("script", TRQAM)
@pytest.mark.parametrize("kl, expected", [(100.0, 1.1), (0.0, 0.9)])
def test_dual_descent_moves_lambda_towards_the_budget_and_stays_in_its_range(script, kl, expected):
    lam, kl_ema = torch.tensor(1.0), torch.tensor(0.0)
    numbers = dict(kl_budget=0.5, eta_lambda=1.0, lambda_min=0.9, lambda_max=1.1)
    script.dual_descent(lam, kl_ema, torch.tensor(kl), **numbers)
    average = 0.1 * min(kl, 2 * 0.5)  # D after one step from 0: a KL counts for two budgets at most
    torch.testing.assert_close(kl_ema, torch.tensor(average))
    for _ in range(50):
        script.dual_descent(lam, kl_ema, torch.tensor(kl), **numbers)
    torch.testing.assert_close(lam, torch.tensor(expected))


# QAM-E's edits.


def test_the_edits_density_is_that_of_a_squashed_gaussian():
    """log pi against the change of variables, with the Jacobian of noise -> edit by autograd."""
    edits = qam_baseline.EditPolicy(O, A, (16, 16), edit_scale=1.0)
    s, a, noise = torch.randn(B, O), torch.zeros(B, A), torch.randn(B, A)
    edit, log_prob = edits(s, a, noise)  # the edited action is the edit itself
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    of_one = lambda s, a, noise: edits(s[None], a[None], noise[None])[0][0]
    jacobian = torch.func.vmap(torch.func.jacrev(of_one, 2))(s, a, noise)  # [B, A, A]
    torch.testing.assert_close(log_prob, normal - torch.linalg.slogdet(jacobian)[1])
    assert (edit.abs() < 1).all()
    # Far out tanh is 1 to the last digit and its slope 0; the log-density still is finite.
    assert torch.isfinite(edits(s, a, 100 + noise)[1]).all()


def test_edits_stay_within_their_scale_and_the_action_space():
    args = qam_baseline.Args(hidden_dims=(16,), num_critics=2, edit_scale=0.25)
    agent = qam_baseline.Agent(O, A, args)
    s, noise = torch.randn(500, O), torch.randn(500, 2 * A)
    flow = qam_baseline.ode_sample(agent.policy, s, noise[:, :A], args.flow_steps)
    action = qam_baseline.policy_action(agent, s, noise, args)
    assert action.abs().max() <= 1 and 0.1 < (action - flow).abs().max() <= 0.25
    with_other_edits = qam_baseline.policy_action(
        agent, s, torch.cat([noise[:, :A], noise[:, A:] + 1], 1), args
    )
    assert not torch.equal(action, with_other_edits)


def test_edit_loss_trains_the_edits_alone_and_steers_their_entropy():
    args = qam_baseline.Args(
        hidden_dims=(16,), num_critics=2, edit_scale=0.25, entropy_scale=0.5, flow_steps=3
    )
    agent = qam_baseline.Agent(O, A, args)
    noise = qam_baseline.draw_noise(64, A, args, torch.Generator().manual_seed(0))
    loss, statistics = qam_baseline.edit_loss(agent, torch.randn(64, O), noise, args)
    loss.backward()
    trained = {name for name, parameter in agent.named_parameters() if parameter.grad is not None}
    assert trained == {
        name for name, _ in agent.named_parameters() if name.startswith("edit_policy.")
    }
    # d/d log alpha of alpha (entropy - target): alpha falls while the entropy is above -A/2, and
    # rises below it.
    expected = float(statistics["losses/edit_entropy"]) + 0.5 * A
    torch.testing.assert_close(float(agent.edit_policy.log_alpha.grad), expected)


def test_without_edits_all_scripts_draw_the_same_noise():
    """So that TRQAM and QAM with one seed see the same batches and the same noise."""
    ours, *others = (
        script.draw_noise(5, 3, script.Args(flow_steps=4), torch.Generator().manual_seed(1))
        for script in SCRIPTS
    )
    assert all(torch.equal(a, b) for theirs in others for a, b in zip(ours, theirs))
