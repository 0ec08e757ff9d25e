"""The authors' pickles: read as arrays alone, into a clone that the scripts take."""

import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_runs import ENV, TINY, Hostile, start

import common
import trqam_offline

sys.path.insert(0, str(ROOT / "examples"))
import authors_checkpoint


def flax_policy(policy, wrap=lambda array: array):
    """A velocity field as the authors' checkpoints nest it: kernels [in, out], a dict a layer."""

    def arrays(layer):
        return layer.weight.detach().numpy(), wrap(layer.bias.detach().numpy())

    def of_kind(kind):
        return enumerate(map(arrays, (x for x in policy.net if isinstance(x, kind))))

    mlp = {
        f"Dense_{i}": dict(kernel=wrap(w.T.copy()), bias=b)
        for i, (w, b) in of_kind(torch.nn.Linear)
    }
    for i, (weight, bias) in of_kind(torch.nn.LayerNorm):
        mlp[f"LayerNorm_{i}"] = dict(scale=wrap(weight), bias=bias)
    params = dict(modules_critic={}, modules_actor_slow=dict(mlp=mlp))
    network = dict(step=np.int32(300_000), params=params)
    return dict(agent=dict(rng=np.zeros(2, np.uint32), network=network))


class JaxArray:
    """Pickles as jax.Array does."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        return reconstruct, (*self.array.__reduce__(), dict(weak_type=False))


def reconstruct(*parts):
    """Named as JAX's own."""


reconstruct.__module__, reconstruct.__qualname__ = "jax._src.array", "_reconstruct_array"


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("wrap", [lambda array: array, JaxArray], ids=["numpy", "jax"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_authors_cloned_policies_are_read(wrap, layer_norm, protocol, tmp_path, monkeypatch):
    for name in ("jax", "jax._src", "jax._src.array"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["jax._src.array"]._reconstruct_array = reconstruct
    policy = trqam_offline.VelocityField(2, 8, (16, 24), layer_norm)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    (tmp_path / "params_1.pkl").write_bytes(pickle.dumps(flax_policy(policy, wrap), protocol))
    monkeypatch.delitem(sys.modules, "jax")  # reading needs none of it
    copy = trqam_offline.VelocityField(2, 8, (16, 24), layer_norm)
    copy.load_state_dict(authors_checkpoint.read_policy(tmp_path / "params_1.pkl"))
    s, x = torch.randn(5, 2), torch.randn(5, 8)
    assert torch.equal(copy(s, x, 0.3), policy(s, x, 0.3))


def test_a_run_starts_from_the_authors_cloned_policy(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = trqam_offline.VelocityField(2, 40, (16, 16), False)
    Path("params_1.pkl").write_bytes(pickle.dumps(flax_policy(policy)))
    words = authors_checkpoint.Args(Path("params_1.pkl"), Path("bc.pt"), ENV)
    authors_checkpoint.main(words)
    flags = [*TINY, "--dataset-path", dataset, "--run-dir", "run", "--offline-steps", 0]
    assert start(trqam_offline, monkeypatch, *flags, "--bc-checkpoint", "bc.pt") is None
    agent = torch.load("run/checkpoint.pt", weights_only=True)["state"]["agent"]
    assert torch.equal(agent["base.net.0.weight"], policy.net[0].weight)


@pytest.mark.parametrize(
    "hostile, named",
    [
        (Hostile(os.system, "touch harmed"), "posix.system"),
        (dict(agent=[Hostile(eval, "open('harmed', 'w')")]), "builtins.eval"),
        (Hostile(getattr, Path, "touch"), "builtins.getattr"),
        (Hostile(np.load, "x.npy"), "numpy.load"),
        (Hostile(np.ndarray, (3,)), "is none of"),
        (np.array([Hostile(os.system, "touch harmed")], dtype=object), "an array of type O8"),
        (np.zeros(3, dtype="datetime64[s]"), "an array of type M8"),
        (dict(agent=3), "is none of"),
        ("text", "is none of"),
    ],
)
def test_a_hostile_or_foreign_pickle_runs_nothing(hostile, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("params_1.pkl").write_bytes(pickle.dumps(hostile))
    with pytest.raises(common.UserError, match=named):
        authors_checkpoint.read_policy(Path("params_1.pkl"))
    assert [path.name for path in Path().iterdir()] == ["params_1.pkl"]
