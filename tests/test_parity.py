"""The update against numbers recorded from the authors' program: losses, gradients, adjoints,
weights and lambda.

Reads every .npz of the folder that the environment variable PARITY_DIR names (default: parity/
beside this file), with sizes, settings and number of steps from each file's `meta`. The format is
described in docs/algorithm.md.
"""

import copy
import functools
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import scripts_with
from torch.utils._python_dispatch import TorchDispatchMode

import common
import qam_baseline

FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "parity"))
FILES = sorted(FOLDER.glob("*.npz"))
SCRIPTS_OF = {  # algorithm -> the scripts that implement it
    "trqam": scripts_with("kl_budget"),
    "qam": scripts_with("inverse_temperature"),
}
COMPILED = ("trqam_chunk5",)  # held beside the compiled update too: compiling takes a minute or two
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()  # where the third update is replayed
NETWORKS = {  # the authors' names -> ours
    "critic": "critic",
    "target_critic": "target_critic",
    "actor_slow": "clone",
    "target_actor_slow": "base",
    "actor_fast": "policy",
    "edit_actor": "edit_policy",
}
aten = torch.ops.aten
# Relative, norm-wise: float32 rounding (6e-8), over sums of some hundred terms in another order,
# over
# three Adam steps. A GPU's kernels sum in yet another order, and an element whose second moment is
# near Adam's eps (1e-8) turns a difference of the gradient into one of the step: ten times as much.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}
SPECIFIED = dict(
    residual=False,
    clip_adj=True,
    use_target_grad=True,
    target_actor=True,
    value_layer_norm=True,
    bc_only=False,
    fql_alpha=0.0,
)


def test_there_is_something_to_compare_with():
    assert FILES, f"no .npz in {FOLDER}"


def parameters(network):
    """(parameter, its name in the recording, recorded array -> parameter's layout) for each
    parameter of a network."""
    if hasattr(
        network, "kernels"
    ):  # the critics: [E, in, out] in both; [E, width] here as [E, 1, width]
        for i, (kernel, bias) in enumerate(zip(network.kernels, network.biases, strict=True)):
            yield kernel, f"dense_{i}/kernel", lambda a: a
            yield bias, f"dense_{i}/bias", lambda a: a[:, None]
        for i, (scale, bias) in enumerate(
            zip(network.norm_scales, network.norm_biases, strict=True)
        ):
            yield scale, f"layernorm_{i}/scale", lambda a: a[:, None]
            yield bias, f"layernorm_{i}/bias", lambda a: a[:, None]
        return
    same = lambda a: a
    for head in ("mean", "log_std"):  # of the edit policy
        if hasattr(network, head):
            yield getattr(network, head).weight, f"{head}/kernel", lambda a: a.T
            yield getattr(network, head).bias, f"{head}/bias", same
    dense = torch.nn.Linear, "dense", "kernel", lambda a: a.T
    for kind, name, weight, layout in (dense, (torch.nn.LayerNorm, "layernorm", "scale", same)):
        for i, layer in enumerate(layer for layer in network.net if isinstance(layer, kind)):
            yield layer.weight, f"{name}_{i}/{weight}", layout
            yield layer.bias, f"{name}_{i}/bias", same


def named_parameters(agent):
    """(parameter, its name in the recording, recorded array -> its layout) of an agent's."""
    for theirs, ours in NETWORKS.items():
        if hasattr(agent, ours):
            for parameter, name, layout in parameters(getattr(agent, ours)):
                yield parameter, f"{theirs}/{name}", layout
    if hasattr(agent, "edit_policy"):
        yield agent.edit_policy.log_alpha, "edit_alpha/log_value", lambda a: a


class Recording:
    """One file: its settings, its arrays as tensors, and the differences found so far."""

    def __init__(self, path, device):
        self.device = device
        self.arrays = dict(np.load(path))
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.config = self.meta["config"]
        self.differences = {}

    def __getitem__(self, key):
        return torch.from_numpy(np.asarray(self.arrays[key])).to(self.device)

    def __contains__(self, key):
        return key in self.arrays

    def compare(self, name, ours, recorded, scale=None):
        ours, recorded = (
            torch.as_tensor(values).detach().double().cpu() for values in (ours, recorded)
        )
        assert ours.shape == recorded.shape, (
            f"{name}: shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)}"
        )
        norm = float(recorded.norm() if scale is None else scale)
        difference = (
            float((ours - recorded).norm()) / norm if norm else float((ours - recorded).norm())
        )
        self.differences[name] = max(difference, self.differences.get(name, 0.0))

    def check(self, name, tolerance, record_property):
        worst = max(self.differences, key=self.differences.get)
        found = f"at most {self.differences[worst]:.1e} ({worst})"
        record_property(f"parity {name}", found)  # told at the end
        assert not {
            what: found for what, found in self.differences.items() if not found <= tolerance
        }

    def args(self, script):
        meta, config = self.meta, self.config
        names = dict(discount="gamma", lr="learning_rate", inv_temp="inverse_temperature")
        names |= dict(edit_target_entropy_multiplier="entropy_scale")
        fields = script.Args.__dataclass_fields__
        settings = {
            names.get(key, key): value
            for key, value in config.items()
            if names.get(key, key) in fields
        }
        settings |= dict(
            hidden_dims=tuple(meta["hidden"]),
            num_critics=meta["num_critics"],
            chunk_length=meta["chunk"],
        )
        settings |= dict(
            flow_steps=meta["flow_steps"],
            actor_layer_norm=meta["actor_layer_norm"],
            batch_size=meta["batch"],
        )
        return script.Args(
            **settings, max_grad_norm=1.0 if config.get("clip_grad", True) else math.inf
        )

    def batch(self, step):
        get = lambda key: self[f"step{step}/batch/{key}"]
        return common.Batch(
            observation=get("observations"),
            action=get("actions").flatten(1),
            reward=get("rewards")[:, -1],
            mask=get("masks")[:, -1],
            next_observation=get("next_observations")[:, -1],
            valid=get("valid")[:, -1],
        )

    def noise(self, script, step):
        get = lambda key: self[f"step{step}/noise/{key}"]
        noise = script.Noise(
            next_action=get("next_action_noise"),
            flow_x0=get("flow_x0"),
            flow_t=get("flow_t"),
            sde_x0=get("sde_x0"),
            sde=get("sde_noise"),
        )
        if not self.config.get("edit_scale"):
            return noise
        next_action = torch.cat([noise.next_action, get("next_edit_noise")], dim=-1)
        return noise._replace(
            next_action=next_action, edit_x0=get("edit_flow_x0"), edit=get("edit_noise")
        )


def cases():
    """(recording, script that implements its algorithm, whether compiled, device) for each file."""
    for path in FILES:
        algo = json.loads(str(np.load(path)["meta"]))["algo"]
        scripts = SCRIPTS_OF.get(algo, [None])
        modes = [*((script, "off") for script in scripts)]
        modes += [(scripts[-1], "on")] if path.stem in COMPILED else []
        for (script, compile), device in itertools.product(modes, DEVICES):
            name = f"{path.stem}-{script.__name__ if script else 'no script'}"
            name += "-compiled" * (compile == "on") + "-cuda" * (device == "cuda")
            yield pytest.param(path, script, compile, device, id=name)


def compiles():
    """Whether torch.compile works here."""
    enough = common.WORTH_COMPILING
    return common.compiled(len, "auto", enough, torch.device("cpu")) is not len


@pytest.mark.parametrize("path, script, compile, device", list(cases()))
def test_update_makes_the_recorded_numbers(path, script, compile, device, record_property):
    recording = Recording(path, common.choose_device(device))
    if script is None:
        pytest.skip(f"no script implements {recording.meta['algo']!r}")
    if compile == "on" and not compiles():
        pytest.skip("torch.compile does not work here")
    config = recording.config
    other = {key: config[key] for key, x in SPECIFIED.items() if config.get(key, x) != x}
    if other:
        pytest.skip(f"recorded with {other}, which is not the published algorithm")
    train_as_recorded(recording, script, compile)
    name = f"{path.name}, {script.__name__}.py{', compiled' * (compile == 'on')}"
    recording.check(f"{name}{', GPU' * (device == 'cuda')}", TOLERANCE[device], record_property)


class RoundedProducts(TorchDispatchMode):
    """Rounds the factors of every matrix product to 10 bits of mantissa, as a GPU does with
    --tf32."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (
            aten.mm.default,
            aten.bmm.default,
            aten.addmm.default,
            aten.baddbmm.default,
        ):
            rounded = [
                ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
                for x in args[-2:]
            ]
            args = [*args[:-2], *rounded]
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_tf32_changes_an_update_by_less_than_a_hundredth(path, record_property):
    recording = Recording(path, torch.device("cpu"))
    script = SCRIPTS_OF[recording.meta["algo"]][0]
    with RoundedProducts():
        train_as_recorded(recording, script, "off")
    assert max(recording.differences.values()) > 100 * TOLERANCE["cpu"]  # it was rounded
    name = f"{path.name}, {script.__name__}.py, products rounded as in TF32"
    recording.check(name, 1e-2, record_property)


def train_as_recorded(recording, script, compile):
    """Start from the recorded weights, make the recorded updates, and note each difference."""
    args = recording.args(script)
    agent = script.Agent(
        recording.meta["obs_dim"], recording.meta["chunk"] * recording.meta["action_dim"], args
    )
    with torch.no_grad():
        for parameter, name, layout in named_parameters(agent):
            recorded = layout(recording[f"init/{name}"])
            assert parameter.shape == recorded.shape
            parameter.copy_(recorded)
    agent.to(recording.device)
    optimizer = agent.make_optimizer(args)
    losses = common.compiled(script.losses, compile, 0, recording.device)
    update = functools.partial(script.update, agent, optimizer, args=args, loss_function=losses)
    update = common.CudaGraph(update) if recording.device.type == "cuda" else update

    for step in range(recording.meta["steps"]):
        batch, noise = recording.batch(step), recording.noise(script, step)
        if f"step{step}/out/xs" in recording:
            compare_intermediate(recording, script, agent, batch, noise, args, step)
        compare_gradients(recording, script, agent, optimizer, batch, noise, args, step)
        compare_statistics(recording, update(batch, noise), step)

    for parameter, name, layout in named_parameters(agent):
        recording.compare(f"final/{name}", parameter, layout(recording[f"final/{name}"]))


@torch.no_grad()
def compare_intermediate(recording, script, agent, batch, noise, args, step):
    s = batch.observation
    xs, x_final = script.memoryless_rollout(agent.policy, agent.base, s, noise.sde_x0, noise.sde)
    adjoint = getattr(args, "inverse_temperature", 1.0) * script.terminal_adjoint(
        agent.target_critic, s, x_final
    )
    adjoints = script.lean_adjoint(agent.base, s, xs, adjoint)
    recording.compare("xs", xs, recording[f"step{step}/out/xs"])
    recording.compare("adjoints", adjoints, recording[f"step{step}/out/adjoints"])
    recording.compare(
        "ts", script.flow_times(xs).expand(-1, len(s), 1), recording[f"step{step}/out/ts"]
    )
    recording.compare("q", agent.critic(s, batch.action), recording[f"step{step}/out/q"])
    actions = script.ode_sample(agent.policy, s, noise.sde_x0, args.flow_steps)
    recording.compare("flow_actions_fast", actions, recording[f"step{step}/out/flow_actions_fast"])


def compare_gradients(recording, script, agent, optimizer, batch, noise, args, step):
    """Before clipping: an update of a copy, with no bound on the norm, leaves them in `.grad`."""
    twin = copy.deepcopy(agent)
    unclipped = copy.copy(args)
    unclipped.max_grad_norm = math.inf
    script.update(twin, twin.make_optimizer(args), batch, noise, unclipped)
    for parameter, name, layout in named_parameters(twin):
        if parameter.requires_grad:
            recording.compare(
                f"grad/{name}", parameter.grad, layout(recording[f"step{step}/grad/{name}"])
            )


def compare_statistics(recording, statistics, step):
    recorded = lambda key: recording[f"step{step}/out/{key}"]
    names = {
        "critic/critic_loss": "losses/critic_loss",
        "actor/flow_loss": "losses/bc_loss",
        "actor/adj_loss": "losses/adjoint_matching_loss",
        "actor/adj_mean": "losses/adjoint_abs_mean",
        "actor/adj_std": "losses/adjoint_abs_std",
        "actor/adj_max": "losses/adjoint_abs_max",
    }
    if recording.meta["algo"] == "trqam":
        names |= {
            "actor/path_kl": "trust_region/path_kl",
            "lambda_raw": "trust_region/lambda",
            "kl_ema": "trust_region/path_kl_ema",
        }
    terms = ["critic_loss", "bc_loss", "adjoint_matching_loss"]
    if recording.config.get("edit_scale"):
        names |= {f"actor/{name}": f"losses/{name}" for name in ("edit_alpha", "edit_entropy")}
        edit_terms = ["edit_q_loss", "edit_entropy_loss", "edit_alpha_loss"]
        names |= {f"actor/{name}": f"losses/{name}" for name in edit_terms}
        terms += edit_terms
    # A sum or a mean of terms of either sign can be near 0, so these are measured against the
    # terms' size.
    largest = max(abs(float(recorded("critic/q_min"))), abs(float(recorded("critic/q_max"))))
    sizes = {"actor/edit_q_loss": largest}
    for theirs, ours in names.items():
        recording.compare(theirs, statistics[ours], recorded(theirs), scale=sizes.get(theirs))
    total = sum(statistics[f"losses/{name}"] for name in terms)
    size = sum(float(statistics[f"losses/{name}"].abs()) for name in terms)
    recording.compare("total_loss", total, recorded("total_loss"), scale=size)
    for name in ("q_mean", "q_min", "q_max"):
        recording.compare(
            name, statistics[f"losses/{name}"], recorded(f"critic/{name}"), scale=largest
        )


def test_compiled_edits_train_as_plain_ones():
    """QAM-E's update, of few flow steps so that it compiles fast, from the same weights."""
    if not compiles():
        pytest.skip("torch.compile does not work here")
    script, device = qam_baseline, torch.device("cpu")
    args = script.Args(
        hidden_dims=(8,), num_critics=2, flow_steps=2, edit_scale=0.2, learning_rate=1e-2
    )
    torch.manual_seed(0)
    agent, generator = script.Agent(3, 4, args), torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator)
    ones = torch.ones(32)
    batch = common.Batch(
        normal(32, 3), normal(32, 4).clamp(-1, 1), normal(32), ones, normal(32, 3), ones
    )
    noises = [script.draw_noise(32, 4, args, generator) for _ in range(4)]
    trained = []
    for mode in ("off", "on"):
        twin, losses = copy.deepcopy(agent), common.compiled(script.losses, mode, 0, device)
        optimizer = twin.make_optimizer(args)
        values = [
            float(script.update(twin, optimizer, batch, noise, args, losses)["losses/edit_q_loss"])
            for noise in noises
        ]
        trained.append((twin, values))
    (plain, values), (compiled, same_values) = trained
    assert values == pytest.approx(same_values, rel=1e-4) and len(set(values)) == 4
    for before, ours, theirs in zip(agent.parameters(), plain.parameters(), compiled.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert not torch.equal(before, theirs)  # all of it was trained, or follows
    first, again, other = (float(losses(agent, batch, noises[i], args)[0]) for i in (0, 0, 1))
    assert first == again != other  # no randomness is frozen into the graph
