"""The two-dimensional pictures: what they take as exact against closed forms, and the trained
policies against the scripts and a brute-force dynamic programme."""

# ruff: noqa: E402 (imports need the path)

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in ("benchmarks", "examples"):
    sys.path.insert(0, str(ROOT / folder))

import grid
import stacked
import study_figures
import two_dimensions as pictures

import qam_baseline
import trqam_offline as script

RESULTS = ROOT / "benchmarks" / "results" / "two_dimensions"


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_priors_velocity_is_the_mean_of_action_minus_noise(t):
    """By quadrature over the actions a that pass x at t: then the noise is (x - t a) / (1 - t)."""
    actions = torch.linspace(-1.5, 1.5, 30_001).double()
    density = sum(torch.exp(-((actions - m) ** 2) / (2 * 0.1**2)) for m in (-0.5, 0.5))
    for x in (-0.7, 0.05, 0.4):
        noise = (x - t * actions) / (1 - t)
        weights = density * torch.exp(-(noise**2) / 2)
        expected = ((actions - noise) * weights).sum() / weights.sum()
        found = grid.two_modes(0.5, 0.1)(None, torch.tensor([x]).double(), t)
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_tilting_a_gaussian_by_a_line_shifts_it():
    """N(0, s^2) exp(x / T) is N(s^2 / T, s^2), at a KL of s^2 / (2 T^2): a gain of s sqrt(2 KL)."""
    prior = grid.density(0.0, 0.1)
    temperature = grid.at_kl(lambda t: grid.tilted(prior, grid.X, t)[1], 0.25)
    assert temperature == pytest.approx(0.1 / math.sqrt(2 * 0.25), rel=1e-2)
    tilted, kl = grid.tilted(prior, grid.X, temperature)
    assert float((tilted * grid.X).sum()) == pytest.approx(0.1 * math.sqrt(2 * kl), rel=1e-3)


def test_the_planes_cells_are_the_four_gaussians():
    mean = float((pictures.PRIOR * pictures.reward(pictures.CELL).double()).sum())
    # A Gaussian bump of width w under a Gaussian of deviation s: w^2 / (w^2 + s^2); the bumps of
    # other modes add 0.01.
    assert mean == pytest.approx(0.55 * 0.2**2 / (0.2**2 + 0.1**2), abs=0.02)
    prior = pictures.histogram(pictures.CELL, pictures.PRIOR)
    assert pictures.total_variation(prior, prior.flip(0)) < 1e-6  # symmetric
    assert float(prior.sum()) == pytest.approx(1)


def test_the_optimal_shift_is_the_adjoint_after_the_step():
    """A brute-force dynamic programme agrees with the regression on adjoint_{k+1}, up to the
    spacing of the shifts that it tries, and not with that on adjoint_k. For this the adjoint
    differentiates the rollout's own mean: the authors' takes the base at t_k + h."""
    problem, temperature = grid.Problem(0.5, 0.1, 5), 4.0
    growth = [grid.derivative(mean) for mean in (*problem.mean[:-1], problem.last)]
    best = problem.dynamic_programme(temperature)
    after, at = (problem.fixed_point(temperature, each, growth) for each in (True, False))
    p = torch.exp(-(grid.X**2) / 2)
    p = p / p.sum()
    for k in range(4):  # the last step is the base's
        norm = lambda delta: float((p * delta**2).sum().sqrt())
        assert norm(after[k] - best[k]) < 0.004 / (2 * problem.h), k
        if k >= 2:
            assert norm(after[k] - best[k]) < 0.06 * norm(best[k]), k
            assert norm(at[k] - best[k]) > 0.5 * norm(best[k]), k
        p = grid.scatter(problem.mean[k] + 2 * problem.h * best[k], p) @ problem.noise[k]


@pytest.mark.parametrize("after", [False, True])
def test_the_grids_fixed_point_is_where_the_scripts_regression_rests(after):
    """On paths of the scripts, Delta_k + g_k^2 adjoint / (2 T) has mean 0 at every step, also
    times x_k; and the path KL is the grid's."""
    torch.manual_seed(0)
    problem, temperature, n = grid.Problem(0.5, 0.1, 5), 1.0, 40_000
    deltas = problem.fixed_point(temperature, after)

    def policy(s, x, t):
        if isinstance(t, float):
            return problem.velocity(s, x, t) + grid.interpolate(deltas[round(5 * t)], x)
        return torch.stack([policy(s, each, k / 5) for k, each in enumerate(x)])

    s, x = torch.zeros(n, 1).double(), torch.randn(n, 1).double()
    noise = torch.randn(5, n, 1).double()
    critic = lambda s, a: a.sum(-1)[None]
    xs, x_final = script.memoryless_rollout(policy, problem.velocity, s, x, noise)
    terminal = script.terminal_adjoint(critic, s, x_final)
    adjoints = script.lean_adjoint(problem.velocity, s, xs, terminal)
    adjoints = torch.cat([adjoints[1:], terminal[None]]) if after else adjoints
    delta = script.velocity_difference(policy, problem.velocity, s, xs)
    g2 = script.memoryless_g2(script.flow_times(xs), 1 / 5)
    rest = delta + g2 * adjoints / (2 * temperature)
    for weight in (torch.ones_like(xs), xs):
        product = (rest * weight).squeeze(-1)
        assert (product.mean(1).abs() < 5 * product.std(1) / math.sqrt(n) + 0.01).all()
    expected = sum(problem.path_kl(deltas)[1])
    assert float(script.path_kl(delta, 1)) == pytest.approx(expected, rel=0.05)


def one_policy(**changed):
    torch.manual_seed(0)
    setting = stacked.DEFAULT | dict(budget=0.5, error=0.5) | changed
    agent, args = stacked.make_agent([setting], pictures.Prior())
    for weight in agent.policy.change.weights:
        torch.nn.init.normal_(weight, std=0.3)
    n = args.batch_size
    zeros = torch.zeros(n)
    batch = pictures.common.Batch(
        zeros[:, None], torch.zeros(n, 2), zeros, zeros, zeros[:, None], zeros
    )
    return agent, args, batch, script.draw_noise(n, 2, args, torch.Generator().manual_seed(1))


def policy_gradients(agent, loss):
    return torch.autograd.grad(loss, [*agent.policy.change.weights])


@pytest.mark.parametrize("tau", [None, 3.0])
def test_one_stacked_policy_has_the_scripts_gradient(tau):
    """TRQAM's, and QAM's at an inverse temperature."""
    agent, args, batch, noise = one_policy(tau=tau or 1.0, lam=1 / 3 if tau else 0.7)
    loss, found = stacked.stacked_losses(agent, batch, noise, args)
    ours = policy_gradients(agent, loss)
    module = qam_baseline if tau else script
    if tau:
        args.inverse_temperature, args.edit_scale = tau, 0.0
    loss, expected = module.losses(agent, batch, noise, args)
    for a, b in zip(ours, policy_gradients(agent, loss)):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    for name in ("path_kl", "closed_form_kl"):
        (theirs,) = (value for key, value in expected.items() if key.endswith(name))
        ours = found[f"trust_region/{name}"]
        torch.testing.assert_close(ours.squeeze(), theirs.squeeze(), rtol=1e-4, atol=0)


def test_stacked_policies_do_not_touch_each_other():
    """The first of two trains to the same weights beside either of two others, and each has its
    own lambda."""
    first = stacked.DEFAULT | dict(budget=0.5, updates=3)
    ends = []
    for other in (dict(scale=0.1, tau=2.0), dict(scale=50.0, budget=0.1)):
        torch.manual_seed(0)
        agent, _, history = stacked.fine_tune([first, first | other], pictures.Prior())
        ends.append([weight[0].detach() for weight in agent.policy.change.weights])
        assert history[0].shape == (3, 2)
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_grids_numbers_are_those_of_its_table():
    rows = study_figures.read(RESULTS / "grid.csv")
    assert {(row["case"], row["flow_steps"]) for row in rows} == {
        (c, k) for c in grid.CASES for k in grid.STEPS
    }
    found = grid.rows_of("four sharp modes", 5)
    for row in found:
        (kept,) = study_figures.where(rows, case=row["case"], flow_steps=5, index=row["index"])
        for name in ("share_sde", "share_ode", "last_step_share", "tv_sde"):
            assert row[name] == pytest.approx(kept[name], abs=2e-3), name


def test_the_studies_numbers_are_of_the_exact_answers():
    rows = study_figures.where(study_figures.read(RESULTS / "studies.csv"), study="theorem")
    reward = pictures.reward(pictures.CELL).double()
    for row in rows[::5]:
        _, kl = grid.tilted(pictures.PRIOR, reward, row["temperature"])
        assert row["tilted_kl"] == pytest.approx(kl, abs=1e-3)
        assert row["kl_sde"] < row["path_kl"] + 0.05  # Proposition 1, up to the histograms' error


def test_a_short_run_draws_the_method(tmp_path):
    agent, args, history = pictures.run(cloned=2, updates=2)
    assert len(history["trust_region/path_kl"]) == 2
    pictures.draw_one_update(agent, args, history, tmp_path / "picture.png", "test")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
