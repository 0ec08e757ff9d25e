"""What a GPU asks of an update, and `common.CudaGraph`, without one.

A stand-in records each operation of an update, with the very tensors it was given, and replays them
on the same memory,
as a CUDA graph does. What a graph would freeze or refuse shows here too.
"""

import contextlib
import copy
import functools
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import SCRIPTS
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
    """In place of a CUDAGraph. While it records, what is changed is remembered, and put back at the
    end: recording a
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


def random_dataset(device="cpu"):
    """Two episodes of observations of 3 numbers and actions of 2, in chunks of 2."""
    rng = np.random.default_rng(0)
    rows = lambda *shape: rng.uniform(-1, 1, (60, *shape)).astype(np.float32)
    done = np.arange(60) == 29
    return common.ChunkDataset(
        rows(3), rows(2), rows(), np.ones(60), done, chunk_length=2, gamma=0.9, device=device
    )


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
    """To the bit, over several: so no number (lambda, a step count, an average) and no input is
    frozen into it."""
    args = script.Args(**SMALL, learning_rate=1e-2, **settings)
    torch.manual_seed(0)
    agent, dataset, generator = (
        script.Agent(3, 4, args),
        random_dataset(),
        torch.Generator().manual_seed(0),
    )
    inputs = [
        (dataset.sample(16, generator), script.draw_noise(16, 4, args, generator)) for _ in range(6)
    ]
    twin = copy.deepcopy(agent)
    optimizers = agent.make_optimizer(args), twin.make_optimizer(args)
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
    """In the same layout too: torch.compile would make its code anew for another one, in the midst
    of recording."""
    seen, dataset, generator = [], random_dataset(), torch.Generator().manual_seed(0)
    place = lambda x: (x.data_ptr(), x.stride(), x.storage_offset())
    graph = common.CudaGraph(
        lambda batch: seen.append([*map(place, batch)]) or {"sum": batch.reward.sum()}
    )
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
def test_the_stand_in_refuses_what_a_graph_cannot_hold(stand_in, wrong, why, capsys):
    graph, inputs = common.CudaGraph(wrong), Inputs(torch.ones(2))
    for _ in range(3):
        graph(inputs)
    assert why in capsys.readouterr().out and graph.graph is None


def test_a_recording_that_fails_is_told_and_training_goes_on(stand_in, monkeypatch, capsys):
    """With the first error, which the end of a recording hides behind its own."""

    @contextlib.contextmanager
    def failing(tape, stream):
        try:
            yield
        finally:
            raise RuntimeError("the recording was ended by an error before")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    calls = []

    def update(inputs):
        calls.append(float(inputs.x.sum()))
        if len(calls) == 3:
            raise ValueError("no kernel for this\nand more")
        return {"y": inputs.x.sum()}

    graph = common.CudaGraph(update)
    found = [float(graph(Inputs(torch.full((2,), float(i))))["y"]) for i in range(6)]
    assert found == [2.0 * i for i in range(6)]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no kernel for this" in said and "--no-cuda-graph" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_of_training_stays_on_its_device(monkeypatch, script):
    """The device called "meta" holds no numbers: what waits for one fails, and so does what mixes
    it
    with the CPU, matrix products excepted."""
    device = torch.device("meta")

    def empty(*shape, **_):
        return torch.empty(*shape, device=device)

    monkeypatch.setattr(torch, "randn", empty)
    monkeypatch.setattr(torch, "rand", empty)
    whole = functools.partial(torch.empty, dtype=torch.int64, device=device)
    monkeypatch.setattr(torch, "randint", lambda low, high, n, **_: whole(*n))
    monkeypatch.setattr(script, "Adam", lambda weights, *_, **__: torch.optim.SGD(weights))  # fused
    args = script.Args(**SMALL, **({"edit_scale": 0.2} if hasattr(script, "EditPolicy") else {}))
    agent, dataset = script.Agent(3, 4, args).to(device), random_dataset()
    dataset.make_room(10)
    for name, value in vars(dataset).items():
        if isinstance(value, torch.Tensor):
            setattr(dataset, name, value.to(device))
    generator, optimizer = types.SimpleNamespace(device=device), agent.make_optimizer(args)
    for function in (script.bc_update, script.update):
        for sample in (dataset.sample, dataset.sample_balanced):
            batch, noise = sample(16, generator), script.draw_noise(16, 4, args, generator)
            statistics = function(agent, optimizer, batch, noise, args)
            assert {value.device for value in statistics.values()} == {device}
    noise = torch.empty(5, 2, agent.noise_dim, device=device)
    assert script.act(agent, torch.empty(5, 3, device=device), noise, args).shape == (5, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize(
    "script, settings", [(trqam_offline, {}), (qam_baseline, {"edit_scale": 0.2})]
)
def test_on_a_gpu_replayed_training_is_training_on_cuda(script, settings, compile):
    device = common.choose_device("cuda")
    args = script.Args(**SMALL, **settings)
    agent, dataset = script.Agent(3, 4, args).to(device), random_dataset(device)
    losses, trained = common.compiled(script.losses, compile, 0, device), []
    for launch in (lambda update: update, common.CudaGraph):
        twin, generator = copy.deepcopy(agent), torch.Generator(device).manual_seed(0)
        optimizer = twin.make_optimizer(args)
        words = dict(args=args, loss_function=losses)
        step = launch(functools.partial(script.update, twin, optimizer, **words))
        rows = []
        for _ in range(8):
            noise = script.draw_noise(16, 4, args, generator)
            found = step(dataset.sample(16, generator), noise)
            rows.append({name: float(value) for name, value in found.items()})
        trained.append((rows, twin))
    (plain, weights), (replayed, same_weights) = trained
    for expected, found in zip(plain, replayed):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for ours, theirs in zip(weights.state_dict().values(), same_weights.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
