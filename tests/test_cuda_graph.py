"""What a GPU asks of an update, and `common.CudaGraph`, without one.

A stand-in records each operation of an update, with the very tensors it was given, and replays them on the same memory,
as a CUDA graph does. What a graph would freeze or refuse shows here too.
"""

import contextlib
import copy
import dataclasses
import functools
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import qam_baseline
import trqam_offline
import trqam_online


def memories(values):
    """Address -> storage, of all tensors in nested values."""
    storages = [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    return {storage.data_ptr(): storage for storage in storages}


class Tape(TorchDispatchMode):
    """In place of a CUDAGraph. While it records, what is changed is remembered, and put back at the end: recording a
    graph computes nothing."""

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("it waits for the device")
        if torch.Tag.nondeterministic_seeded in operation.tags:
            raise RuntimeError("it draws random numbers")
        arguments = operation._schema.arguments
        given = dict(zip((argument.name for argument in arguments), args)) | (kwargs or {})
        for argument in arguments:
            if argument.alias_info and argument.alias_info.is_write:
                for place, memory in memories(given.get(argument.name)).items():
                    if place not in self.made:
                        self.before.setdefault(place, (memory, memory.clone()))
        results = operation(*args, **(kwargs or {}))
        self.made |= memories(results).keys() - memories(given).keys()
        self.operations.append((operation, args, kwargs or {}, results))
        return results

    def put_back(self):
        for memory, content in self.before.values():
            memory.copy_(content)

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, results in self.operations:
            for old, new in zip(tree_leaves(results), tree_leaves(operation(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


SMALL = dict(hidden_dims=(8, 8), num_critics=2, flow_steps=3, batch_size=16, chunk_length=2)


def random_dataset():
    """Two episodes of observations of 3 numbers and actions of 2, in chunks of 2."""
    rng = np.random.default_rng(0)
    rows = lambda *shape: rng.uniform(-1, 1, (60, *shape)).astype(np.float32)
    done = np.arange(60) == 29
    return common.ReplayBuffer(rows(3), rows(2), rows(), np.ones(60), done, chunk_length=2, gamma=0.9)


@contextlib.contextmanager
def recording(tape, stream):
    with tape:
        yield
    tape.put_back()


@pytest.fixture
def stand_in(monkeypatch):
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)


@pytest.mark.parametrize(
    "script, function, settings",
    [
        (trqam_offline, "update", {}),
        (trqam_offline, "bc_update", {}),
        (trqam_online, "update", dict(actor_layer_norm=True)),
        (qam_baseline, "update", {}),
        (qam_baseline, "update", dict(edit_scale=0.2)),
    ],
)
def test_a_replayed_update_is_the_update(stand_in, script, function, settings):
    """To the bit, over several: so no number (lambda, a step count, an average) and no input is frozen into it."""
    args = script.Args(**SMALL, learning_rate=1e-2, **settings)
    torch.manual_seed(0)
    agent, dataset, generator = script.Agent(3, 4, args), random_dataset(), torch.Generator().manual_seed(0)
    inputs = [(dataset.sample(16, generator), script.draw_noise(16, 4, args, generator)) for _ in range(6)]
    twin = copy.deepcopy(agent)
    optimizers = agent.make_optimizer(args), twin.make_optimizer(args)
    assert optimizers[0].param_groups[0]["capturable"]  # which torch asks for before a GPU records Adam
    plain, twins = (
        functools.partial(getattr(script, function), network, optimizer, args=args)
        for network, optimizer in zip((agent, twin), optimizers)
    )
    replayed = common.CudaGraph(twins)
    for number, given in enumerate(inputs):
        expected, found = plain(*given), replayed(*given)
        assert {name: float(value) for name, value in found.items()} == {
            name: float(value) for name, value in expected.items()
        }, f"call {number + 1}"
    for (name, ours), theirs in zip(agent.state_dict().items(), twin.state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert replayed.graph.operations, "nothing was replayed"


def test_all_calls_read_the_same_memory(stand_in):
    """In the same layout too: torch.compile would make its code anew for another one, in the midst of recording."""
    seen, dataset, generator = [], random_dataset(), torch.Generator().manual_seed(0)
    place = lambda x: (x.data_ptr(), x.stride(), x.storage_offset())
    graph = common.CudaGraph(lambda batch: seen.append([*map(place, batch)]) or {"sum": batch.reward.sum()})
    for _ in range(5):
        batch = dataset.sample(16, generator)
        assert graph(batch)["sum"] == batch.reward.sum()
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]


class Inputs(NamedTuple):
    x: torch.Tensor


@pytest.mark.parametrize(
    "wrong, why",
    [
        (lambda inputs: {"y": inputs.x * float(inputs.x.sum())}, "waits for the device"),
        (lambda inputs: {"y": inputs.x + torch.randn(2)}, "draws random numbers"),
    ],
)
def test_the_stand_in_refuses_what_a_graph_cannot_hold(stand_in, wrong, why):
    graph, inputs = common.CudaGraph(wrong), Inputs(torch.ones(2))
    graph(inputs), graph(inputs)
    with pytest.raises(RuntimeError, match=why):
        graph(inputs)


@pytest.mark.parametrize(
    "script, stages, settings",
    [
        (trqam_offline, ("bc", "offline"), {}),
        (trqam_online, ("offline", "online"), dict(balanced_sampling=True)),
        (qam_baseline, ("offline", "online"), dict(edit_scale=0.2)),
    ],
)
def test_a_step_of_training_stays_on_its_device(monkeypatch, script, stages, settings):
    """The device called "meta" holds no numbers: what waits for one fails, and so does what mixes it with the CPU,
    matrix products excepted."""
    device = torch.device("meta")
    empty = lambda *shape, **_: torch.empty(*shape, device=device)
    monkeypatch.setattr(torch, "randn", empty)
    monkeypatch.setattr(torch, "rand", empty)
    monkeypatch.setattr(torch, "randint", lambda low, high, n, **_: torch.empty(*n, dtype=torch.int64, device=device))
    monkeypatch.setattr(script, "Adam", lambda parameters, **_: torch.optim.SGD(parameters))  # the fused one has none
    args = script.Args(**SMALL, **settings)
    agent = script.Agent(3, 4, args).to(device)
    dataset = random_dataset().to(device)
    dataset.make_room(10)
    generator = types.SimpleNamespace(device=device)
    for stage in stages:
        statistics = script.make_train_step(agent, agent.make_optimizer(args), dataset, generator, stage, args)()
        assert {value.device for value in statistics.values() if isinstance(value, torch.Tensor)} == {device}
    noise = torch.empty(5, 2, agent.noise_dim, device=device)
    assert script.act(agent, torch.empty(5, 3, device=device), noise, args).shape == (5, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("script, settings", [(trqam_offline, {}), (qam_baseline, dict(edit_scale=0.2))])
def test_on_a_gpu_replayed_training_is_training(script, settings, compile):
    device = common.choose_device("cuda", 0)
    args = script.Args(**SMALL, compile=compile, **settings)
    agent, dataset = script.Agent(3, 4, args).to(device), random_dataset().to(device)
    trained = []
    for cuda_graph in (False, True):
        twin, chosen = copy.deepcopy(agent), dataclasses.replace(args, cuda_graph=cuda_graph)
        generator = torch.Generator(device).manual_seed(0)
        step = script.make_train_step(twin, twin.make_optimizer(chosen), dataset, generator, "offline", chosen)
        trained.append(([{name: float(value) for name, value in step().items()} for _ in range(8)], twin))
    (plain, weights), (replayed, same_weights) = trained
    for expected, found in zip(plain, replayed):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for ours, theirs in zip(weights.state_dict().values(), same_weights.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
