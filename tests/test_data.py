"""Batches, collected data and evaluation, against slow versions and OGBench's own code."""

import json
import shutil

import gymnasium
import numpy as np
import ogbench
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ogbench.relabel_utils import relabel_dataset

import common


def file_of_episodes(lengths, seed=0, observation_dim=3, action_dim=2):
    """Random rows in OGBench's file format: each episode's last row holds its final state."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    terminals = np.zeros(rows, dtype=bool)
    terminals[np.cumsum(lengths) - 1] = True
    return dict(
        observations=rng.normal(size=(rows, observation_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(rows, action_dim)).astype(np.float32),
        rewards=rng.choice([-2.0, -1.0, 0.0], size=rows).astype(np.float32),
        masks=rng.choice([0.0, 1.0], size=rows, p=[0.2, 0.8]).astype(np.float32),
        terminals=terminals,
    )


def slow_chunk(data, start, chunk_length, gamma, sparse):
    """One chunk by the definition, step after step, on transitions with their next observations
    stored."""
    last = data["terminals"].astype(bool)
    rows = np.flatnonzero(~last)  # a transition is a row that is not an episode's last
    is_end = last[rows + 1]
    rewards = data["rewards"][rows]
    if sparse:
        rewards = np.where(rewards != 0, -1.0, 0.0)
    ended, total, mask, next_observation = False, 0.0, 1.0, None
    for j in range(chunk_length):
        valid = not ended
        if valid:
            total += gamma**j * rewards[start + j]
            mask = min(mask, data["masks"][rows[start + j]])
            next_observation = data["observations"][rows[start + j] + 1]
        ended = ended or is_end[start + j]
    actions = (
        data["actions"][rows[start : start + chunk_length]].clip(-1 + 1e-5, 1 - 1e-5).reshape(-1)
    )
    return data["observations"][rows[start]], actions, total, mask, next_observation, float(valid)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("chunk_length", [1, 3, 5])
@pytest.mark.parametrize("lengths", [(40,), (2, 3, 4, 9, 2, 20), (7,) * 12])
def test_batches_are_those_of_the_slow_version(lengths, chunk_length, sparse):
    data = file_of_episodes(lengths)
    dataset = common.ChunkDataset(**data, chunk_length=chunk_length, gamma=0.9, sparse=sparse)
    assert dataset.size == sum(lengths) - len(lengths)
    starts = torch.arange(dataset.size - chunk_length + 1)  # all there are
    batch = dataset.chunks(starts)
    for i in starts.tolist():
        slow = slow_chunk(data, i, chunk_length, 0.9, sparse)
        for ours, expected in zip(batch, slow, strict=True):
            np.testing.assert_allclose(ours[i].numpy(), expected, rtol=1e-6, atol=1e-6)
    if chunk_length > 1 and len(lengths) > 1:
        assert 0 < batch.valid.mean() < 1  # ends inside chunks did occur


# ----------------------------------------------------------------------- transitions in the usual
# layout


@st.composite
def transitions(draw):
    """Random episodes as Gymnasium has them: N transitions, each with its own next observation."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    ends = [draw(st.sampled_from(["terminated", "truncated", "both"])) for _ in lengths]
    rng, rows = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), []
    for length, end in zip(lengths, ends):
        states = rng.normal(size=(length + 1, 3))
        for step in range(length):
            last = step == length - 1
            rows.append(
                (
                    states[step],
                    rng.uniform([-2, 0], [2, 5]),
                    rng.normal(),
                    states[step + 1],
                    last and end != "truncated",
                    last and end != "terminated",
                )
            )
    return [np.array(column) for column in zip(*rows)]


@settings(deadline=None, max_examples=60)
@given(transitions(), st.integers(1, 5), st.sampled_from([0.9, 1.0]), st.booleans())
def test_every_transition_comes_back(arrays, chunk_length, gamma, as_lists):
    """Against a loop over each episode: observations, actions, returns, masks and next
    observations."""
    s, a, r, following, terminated, truncated = arrays
    n = len(r)
    words = dict(
        low=np.array([-2, 0]), high=np.array([2, 5]), chunk_length=chunk_length, gamma=gamma
    )
    given_arrays = [array.tolist() for array in arrays] if as_lists else arrays
    ends = np.flatnonzero((terminated | truncated)[:-1])
    if chunk_length > np.diff([-1, *ends, n - 1]).max():
        with pytest.raises(ValueError, match="no episode holds a chunk"):
            common.ChunkDataset.from_transitions(*given_arrays, **words)
        return
    dataset = common.ChunkDataset.from_transitions(*given_arrays, **words)
    assert dataset.size == n
    batch = dataset.chunks(torch.arange(n - chunk_length + 1))
    scaled = ((a - [-2, 0]) / [4, 5] * 2 - 1).clip(-1 + 1e-5, 1 - 1e-5)
    for i in range(n - chunk_length + 1):
        total, mask, last, valid = 0.0, 1.0, i, 1.0
        for j in range(chunk_length):
            total, mask, last = total + gamma**j * r[i + j], mask * (not terminated[i + j]), i + j
            if (terminated | truncated)[i + j]:
                valid = float(j == chunk_length - 1)
                break
        np.testing.assert_allclose(batch.observation[i], s[i], rtol=1e-6)
        np.testing.assert_allclose(batch.action[i], scaled[i : i + chunk_length].ravel(), atol=1e-6)
        np.testing.assert_allclose(batch.reward[i], total, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batch.next_observation[i], following[last], rtol=1e-6)
        assert batch.mask[i] == mask and batch.valid[i] == valid


def usual(**changes):
    """Two episodes of three transitions, the second of which terminates, with arrays replaced."""
    states = np.arange(8.0).reshape(8, 1)
    arrays = dict(
        observations=states[[0, 1, 2, 4, 5, 6]],
        actions=np.zeros((6, 2)),
        rewards=np.array([0, 0, 0, 0, 0, 1.0]),
        next_observations=states[[1, 2, 3, 5, 6, 7]],
        terminated=np.arange(6) == 5,
        truncated=np.arange(6) == 2,
        low=-1,
        high=1,
        chunk_length=2,
        gamma=0.9,
    )
    return arrays | changes


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(actions=np.full((6, 2), 1.5)), r"not in \[-1, 1\]: scale them"),
        (dict(rewards=np.zeros((6, 1))), r"rewards must be \[N\]"),
        (dict(actions=np.zeros(6)), r"actions must be \[N, ...\]"),
        (dict(observations=np.zeros((5, 1))), "observations must be"),
        (dict(terminated=np.zeros(6)[:4]), "terminated must be"),
        (dict(truncated=np.zeros(6)), r"next_observations\[2\] is not the row after it"),
        (dict(low=2), "must be below high"),
        (dict(high=np.inf), "both finite"),
        (dict(rewards=np.full(6, np.nan)), "rewards is not finite"),
        (dict(observations=np.full((6, 1), np.nan)), "^observations is not finite"),
        (dict(terminated=np.arange(6) * 255 == 5 * 255, truncated=[0, 0, 255, 0, 0, 0]), "0 or 1"),
        (dict(next_observations=np.zeros((6, 2))), "next_observations must be"),
        (dict(low=[-1, -1, -1]), "low and high must be numbers or"),
        (dict(rewards=np.zeros(4)), r"for each of N rewards, here \[4\]"),
        (dict(chunk_length=4), "no episode holds a chunk of length 4: the longest has 3"),
    ],
)
def test_transitions_that_cannot_be_meant_are_refused(change, words):
    common.ChunkDataset.from_transitions(**usual())
    with pytest.raises(ValueError, match=words):
        common.ChunkDataset.from_transitions(**usual(**change))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(terminals=np.zeros(15)), "marks no episode's end"),
        (
            dict(masks=1.0 - (np.arange(15) % 5 == 4)),
            "every mask 0 stands at an episode's last row",
        ),
        (
            dict(rewards=1.0 * (np.arange(15) % 5 == 4)),
            "every reward stands at an episode's last row",
        ),
        (dict(observations=np.full((15, 3), np.inf)), "observations is not finite"),
        (dict(actions=np.full((15, 2), -1.01)), "from_transitions does"),
        (dict(actions=np.zeros(15)), r"actions must be \[M, ...\]"),
        (dict(rewards=np.zeros((15, 1))), "rewards must be"),
        (dict(masks=np.ones(14)), "masks must be"),
        (dict(observations=np.zeros((14, 3))), "observations must be"),
    ],
)
def test_arrays_that_cannot_be_meant_are_refused(change, words):
    arrays = file_of_episodes((5, 5, 5))
    common.ChunkDataset(**arrays, chunk_length=2, gamma=0.9)
    with pytest.raises(ValueError, match=words):
        common.ChunkDataset(**(arrays | change), chunk_length=2, gamma=0.9)


def test_lists_and_tensors_are_as_good_as_arrays():
    arrays = file_of_episodes((6, 5))
    first, *others = (
        common.ChunkDataset(
            **{key: make(x) for key, x in arrays.items()}, chunk_length=2, gamma=0.9
        )
        for make in (np.asarray, np.ndarray.tolist, torch.from_numpy)
    )
    for other in others:
        ours, theirs = (dataset.chunks(torch.arange(8)) for dataset in (first, other))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert not arrays["terminals"][-2] and arrays["terminals"][-1]  # what was given is not changed


# ----------------------------------------------------------------------------------- a dataset that
# grows


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("stop", [1, 4, 5, 11, 12])  # within, and at the end of, online episodes
def test_a_dataset_that_grew_equals_one_of_the_same_rows(stop, sparse):
    offline, online = file_of_episodes((6, 9)), file_of_episodes((5, 2, 8), seed=1)
    words = dict(chunk_length=3, gamma=0.9, sparse=sparse)
    for data in (offline, online):
        data["actions"] = data["actions"].clip(
            -0.9, 0.9
        )  # a dataset's are clipped, online ones kept
    grown = common.ChunkDataset(**offline, **words)
    grown.make_room(12)
    transitions = []
    for row in np.flatnonzero(~online["terminals"]):
        rows = [online[key][row] for key in ("observations", "actions", "rewards", "masks")]
        transitions.append((*rows, online["observations"][row + 1], online["terminals"][row + 1]))
    for transition in transitions[:stop]:
        grown.append(*transition)
    appended = (
        np.flatnonzero(~online["terminals"])[stop - 1] + 2
    )  # rows of the file that are there now
    data = {key: np.concatenate([offline[key], online[key][:appended]]) for key in offline}
    same = common.ChunkDataset(**data, **words)
    assert grown.size == same.size == 13 + stop
    starts = torch.arange(same.size - 2)
    for ours, expected in zip(grown.chunks(starts), same.chunks(starts), strict=True):
        assert torch.equal(ours, expected)

    copy = common.ChunkDataset(**offline, **words)
    copy.make_room(12)
    copy.load_state_dict(grown.state_dict())
    assert (copy.size, copy.episodes) == (grown.size, grown.episodes)
    if stop < len(transitions):
        for dataset in (copy, grown):  # both go on alike
            dataset.append(*transitions[stop])
        batches = zip(copy.chunks(starts + 1), grown.chunks(starts + 1))
        assert all(torch.equal(a, b) for a, b in batches)


def test_room_is_made_even_for_episodes_of_one_step():
    dataset = common.ChunkDataset(**file_of_episodes((6,)), chunk_length=1, gamma=0.9)
    dataset.make_room(4)
    for value in range(4):
        dataset.append(
            np.full(3, value), np.zeros(2), -1.0, 1.0, np.full(3, value + 0.5), done=True
        )
    batch = dataset.chunks(torch.arange(5, 9))
    assert batch.observation[:, 0].tolist() == [0, 1, 2, 3]
    assert batch.next_observation[:, 0].tolist() == [0.5, 1.5, 2.5, 3.5]


def test_a_state_whose_episodes_do_not_follow_each_other_is_refused():
    dataset = common.ChunkDataset(**file_of_episodes((6,)), chunk_length=1, gamma=0.9)
    dataset.make_room(4)
    for _ in range(3):
        dataset.append(np.zeros(3), np.zeros(2), -1.0, 1.0, np.zeros(3), done=True)
    state = dataset.state_dict()
    for damaged in ({"ends": state["ends"].flip(0)}, {"masks": state["masks"][:-1]}):
        with pytest.raises((ValueError, RuntimeError)):
            dataset.load_state_dict(state | damaged)


def test_balanced_batches_are_half_of_each_part():
    buffer = common.ChunkDataset(**file_of_episodes((50,)), chunk_length=3, gamma=0.9)
    buffer.make_room(5)
    for value in range(5):
        buffer.append(np.full(3, 100.0 + value), np.zeros(2), 0.0, 1.0, np.zeros(3), done=False)
    first = buffer.sample_balanced(1001, torch.Generator().manual_seed(0)).observation[:, 0]
    assert (first < 50).sum() == 500
    assert set(first[first > 50].tolist()) == {
        100.0,
        101.0,
        102.0,
    }  # whole chunks of the online part
    uniform = buffer.sample(1000, torch.Generator().manual_seed(0)).observation[:, 0]
    assert 30 < (uniform > 50).sum() < 110  # 3 starts of 52


def test_a_played_again_episode_is_the_same(capsys):
    env_id = "pointmaze-medium-navigate-singletask-task1-v0"
    first, second = (common.OnlineEnvironment(env_id, seed) for seed in (3, 3))
    actions = np.random.default_rng(0).uniform(-1, 1, (30, 2)).astype(np.float32)
    for action in actions[:20]:
        first.step(action)
    second.load_state_dict(first.state_dict())
    for action in actions[20:]:
        ours, theirs = first.step(action), second.step(action)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))
    assert not np.array_equal(first.observation, common.OnlineEnvironment(env_id, 4).observation)
    first.chunk = np.ones((2, 2), np.float32)
    state = first.state_dict()
    second.load_state_dict(state)
    assert len(second.chunk) == 2 and "note" not in capsys.readouterr().out
    second.load_state_dict(
        state | {"observation": state["observation"] + 1e-9}
    )  # as another processor might play it
    assert (
        len(second.chunk) == 0 and "plays the running episode otherwise" in capsys.readouterr().out
    )


def towards_the_goal(base):
    """An action that brings a point maze's point nearer to the goal; in other environments, no
    movement."""
    if not hasattr(base, "get_oracle_subgoal"):
        return np.zeros(5)
    way = base.get_oracle_subgoal(base.get_xy(), base.cur_goal_xy)[0] - base.get_xy()
    return way / np.linalg.norm(way)


def reach(base, everything):
    """Put everything where the task wants it; else only one of two cubes, half of the buttons, or
    the drawer."""
    qpos, cubes = base.data.qpos.copy(), getattr(base, "_num_cubes", 0)
    for cube in range(cubes if everything else 1 if cubes > 1 else 0):
        qpos[14 + 7 * cube : 17 + 7 * cube] = base.data.mocap_pos[cube]
    if not hasattr(base, "_cur_button_states"):
        return base.set_state(qpos, base.data.qvel)
    if cubes:
        sliders = [base._target_drawer_pos, base._target_window_pos][: 1 + everything]
        qpos[14 + 7 + base._num_buttons :][: len(sliders)] = sliders
    buttons = base._target_button_states.copy()
    if not everything:
        buttons[: len(buttons) // 2] = base._cur_button_states[: len(buttons) // 2]
    base.set_state(qpos, base.data.qvel, buttons)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "domain, task, levels",
    [
        ("cube-double-play", "task2", 3),
        ("scene-play", "task3", 3),
        ("puzzle-3x3-play", "task4", 3),
        ("pointmaze-medium-navigate", "task1", 2),
    ],
)
def test_online_rewards_are_those_that_ogbench_gives_the_same_states(domain, task, levels, sparse):
    environment = common.OnlineEnvironment(f"{domain}-singletask-{task}-v0", 0)
    base, maze = environment.env.unwrapped, "maze" in domain
    offline = file_of_episodes(
        (9,), 0, len(environment.observation), *environment.env.action_space.shape
    )
    buffer = common.ChunkDataset(**offline, chunk_length=1, gamma=1.0, sparse=sparse)
    buffer.make_room(500)
    states, done = {"qpos": [], "button_states": []}, False
    while not done:
        if not maze and len(states["qpos"]) in (5, 10):
            reach(base, everything=len(states["qpos"]) == 10)
            environment.env.step(
                np.zeros(5)
            )  # OGBench notes a success at the end of a step, for the next one
        states["qpos"].append(base.data.qpos.copy())
        states["button_states"].append(getattr(base, "_cur_button_states", np.zeros(0)).copy())
        *transition, done = environment.step(towards_the_goal(base))
        buffer.append(*transition, done)
    assert done and len(states["qpos"]) < 400  # it ended because the task was done
    data = {key: np.array(rows) for key, rows in states.items()}
    relabel_dataset(environment.env.spec.id, environment.env, data)
    assert (
        len(np.unique(data["rewards"])) == levels
        and data["masks"][-1] == 0
        and data["masks"][:-1].all()
    )
    batch = buffer.chunks(torch.arange(8, buffer.size))
    np.testing.assert_array_equal(
        batch.reward.numpy(), np.where(data["rewards"] != 0, -1, 0) if sparse else data["rewards"]
    )
    np.testing.assert_array_equal(batch.mask.numpy(), data["masks"])


def test_chunk_starts_are_uniform_over_all_transitions():
    dataset = common.ChunkDataset(**file_of_episodes((6, 5)), chunk_length=3, gamma=1.0)
    batch = dataset.sample(70_000, torch.Generator().manual_seed(0))
    starts = dataset.chunks(torch.arange(dataset.size - 2)).observation  # 0 ... N - c
    counts = (batch.observation[:, None] == starts).all(-1).sum(0)
    assert counts.sum() == 70_000
    assert (counts - 10_000).abs().max() < 5 * np.sqrt(10_000)


def test_batches_repeat_with_the_generator():
    dataset = common.ChunkDataset(**file_of_episodes((50, 50)), chunk_length=5, gamma=0.99)
    first, second, other = (
        dataset.sample(16, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first.action, other.action)


# -------------------------------------------------------------------------------------------------
# collected data


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """One training and one validation episode of the scene, from two workers."""
    folder = tmp_path_factory.mktemp("data")
    return common.collect_dataset("scene-play-v0", 1, 7, str(folder), workers=2)


def test_collected_file_is_in_ogbench_format(collected):
    for path, episodes in ((collected, 1), (collected.with_name(f"{collected.stem}-val.npz"), 1)):
        file = np.load(path, allow_pickle=False)
        assert set(file.files) == {
            "observations",
            "actions",
            "terminals",
            "qpos",
            "qvel",
            "button_states",
        }
        assert (
            file["observations"].shape == (1001 * episodes, 40)
            and file["observations"].dtype == np.float32
        )
        assert file["actions"].shape == (1001 * episodes, 5) and file["actions"].dtype == np.float32
        assert np.abs(file["actions"]).max() <= 1
        assert file["terminals"].dtype == bool and file["button_states"].dtype == np.int64
        np.testing.assert_array_equal(np.flatnonzero(file["terminals"]), [1000])
    origin = json.loads(collected.with_suffix(".json").read_text())
    assert (
        origin["origin"] == "collected" and origin["collect_seed"] == 7 and origin["episodes"] == 1
    )
    assert origin["sha256"] == common.file_hash(collected)
    assert not list(collected.parent.glob("*.partial"))


def test_collected_file_loads_through_ogbench_with_the_same_rewards(collected):
    env_id = "scene-play-singletask-task1-v0"
    env, theirs, _ = ogbench.make_env_and_datasets(env_id, dataset_path=str(collected))
    ours, info = common.load_dataset(env_id, chunk_length=1, gamma=1.0, dataset_path=str(collected))
    batch = ours.chunks(torch.arange(ours.size))
    assert ours.size == len(theirs["observations"]) == 1000
    for name, key in (
        ("observation", "observations"),
        ("reward", "rewards"),
        ("mask", "masks"),
        ("next_observation", "next_observations"),
    ):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), theirs[key])
    np.testing.assert_allclose(batch.action.numpy(), theirs["actions"], atol=1.1e-5)
    assert len(np.unique(theirs["rewards"])) > 1
    assert info["origin"] == "collected" and info["transitions"] == 1000
    assert "not the official" in common.describe_dataset(info)
    env.close()


def test_a_folder_of_shards_is_one_dataset(collected, tmp_path):
    file = dict(np.load(collected))
    for name, rows in (
        ("a-000.npz", slice(0, 400)),
        ("a-001.npz", slice(400, 1001)),
        ("a-000-val.npz", slice(0, 9)),
    ):
        np.savez(tmp_path / name, **{key: array[rows] for key, array in file.items()})
    env_id, settings = "scene-play-singletask-task1-v0", dict(chunk_length=5, gamma=0.99)
    sharded, info = common.load_dataset(env_id, **settings, dataset_path=str(tmp_path))
    whole, _ = common.load_dataset(env_id, **settings, dataset_path=str(collected))
    assert info["origin"] == "path" and len(info["files"]) == 2 and info["episodes"] == 2
    # The first shard's end ends an episode, so its last row is a final state and no transition.
    assert sharded.size == 399 + 600
    for first, same in ((0, 0), (300, 300), (399, 400), (900, 901)):
        ours, expected = sharded.chunks(torch.tensor([first])), whole.chunks(torch.tensor([same]))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected))
    assert sharded.chunks(torch.tensor([396])).valid == 0


def test_data_that_the_device_cannot_hold_lies_in_the_hosts_memory(collected, monkeypatch, capsys):
    """The device called "meta" stands in for a GPU: it holds no numbers, so none may come from
    it."""
    env_id = "scene-play-singletask-task1-v0"
    words = dict(chunk_length=5, gamma=0.99, dataset_path=str(collected))
    whole, _ = common.load_dataset(env_id, **words)
    free = {"meta": 1000, "cpu": 10**9}
    monkeypatch.setattr(common, "free_memory", lambda device: free[device.type])
    dataset, _ = common.load_dataset(env_id, **words, device="meta")
    assert "it lies in the host's memory" in capsys.readouterr().out
    ours, theirs = (x.sample(16, torch.Generator().manual_seed(0)) for x in (dataset, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert dataset.chunks(torch.arange(3, device="cpu")).reward.device.type == "cpu"
    free["cpu"] = 1000
    with pytest.raises(common.UserError, match="--dataset-path"):
        common.load_dataset(env_id, **words, device="meta")


def test_collecting_again_with_one_worker_or_after_a_stop_gives_the_same_bytes(collected, tmp_path):
    arguments = ("scene-play-v0", 1, 7, str(tmp_path))
    path = common.collected_path(*arguments)
    partial = path.with_suffix(".partial")
    partial.mkdir()
    common.write_episode(
        "scene-play-v0", 7, "val", 0, partial / "val-00000.npz"
    )  # what a stopped collection leaves
    made = (partial / "val-00000.npz").stat().st_mtime_ns
    kept = []
    remove, shutil.rmtree = (
        shutil.rmtree,
        lambda folder: kept.append((folder / "val-00000.npz").stat().st_mtime_ns),
    )
    try:
        common.collect_dataset(*arguments, workers=1)
    finally:
        shutil.rmtree = remove
    assert kept == [made]  # the finished episode was not collected again
    for name in (path.name, f"{path.stem}-val.npz"):
        ours, theirs = np.load(tmp_path / name), np.load(collected.parent / name)
        for key in ours.files:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_episodes_differ_by_seed_and_index():
    first, other_seed, other_index = (
        common.collect_episode("pointmaze-medium-navigate-v0", seed, "train", index)
        for seed, index in ((0, 0), (1, 0), (0, 1))
    )
    assert first["observations"].shape == (1001, 2)
    assert not np.array_equal(first["observations"], other_seed["observations"])
    assert not np.array_equal(first["observations"], other_index["observations"])
    # The oracle's points do get around: every episode crosses several cells of 4 x 4.
    assert len(np.unique(np.round(first["observations"] / 4), axis=0)) >= 5


def test_episodes_in_which_the_cube_is_lost_are_made_again(monkeypatch):
    """As OGBench does: by the cube's y and z, numbers 15 and 16 of qpos."""
    cases = iter(
        [(0.3, 0.02), (-0.31, 0.02), (-0.31, 0.09), (-0.31, 0.07)]
    )  # the last is in the drawer

    def recipe(env, dataset_name, seed):
        place = next(cases)
        yield np.zeros(3)
        while True:
            env.place = place
            yield np.zeros(5)

    class Scene:
        def step(self, action):
            qpos = np.zeros(25)
            qpos[15:17] = self.place
            info = dict(prev_qpos=qpos, prev_qvel=np.zeros(3))
            return np.zeros(3), 0.0, False, True, info

    monkeypatch.setattr(common, "play_actions", recipe)
    monkeypatch.setattr(common, "collection_env", lambda name: Scene())
    episode = common.collect_episode("scene-play-v0", 0, "train", 0)
    assert episode["qpos"][0, 15] == np.float32(-0.31) and episode["qpos"][0, 16] == np.float32(
        0.07
    )


# --------------------------------------------------------------------------------------------------
# --- environments


def test_ids_split_into_environment_and_dataset():
    assert common.split_env_id("scene-play-singletask-task1-v0") == (
        "scene-singletask-task1-v0",
        "scene-play-v0",
    )
    assert common.split_env_id("antmaze-large-navigate-singletask-v0") == (
        "antmaze-large-singletask-v0",
        "antmaze-large-navigate-v0",
    )
    assert common.domain_of("cube-double-play-singletask-task3-v0") == "cube-double-play"
    with pytest.raises(common.UserError, match="did you mean 'scene-play-singletask-task1-v0'"):
        common.split_env_id("scene-ply-singletask-task1-v0")


@pytest.mark.parametrize(
    "env_id",
    ["cube-single-play-singletask-task2-v0", "pointmaze-medium-navigate-singletask-task1-v0"],
)
def test_a_seed_decides_the_whole_episode(env_id):
    first, second = common.make_env(env_id), common.make_env(env_id)
    first.reset(seed=1)
    np.random.seed(None)
    starts = [env.reset(seed=5)[0] for env in (first, second)]
    np.testing.assert_array_equal(*starts)
    action = np.full(first.action_space.shape, 0.3)
    for _ in range(20):
        steps = [env.step(action)[0] for env in (first, second)]
    np.testing.assert_array_equal(*steps)
    assert not np.array_equal(first.reset(seed=6)[0], starts[0])


class Countdown(gymnasium.Env):
    """Episodes of 1 to 9 steps, as the seed has it; the shorter ones succeed. Return: -1 a step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.steps = seed % 9 + 1, 0
        return np.array([self.length, 0.0]), {}

    def step(self, action):
        assert self.steps < self.length, "stepped after its end"
        assert action == self.steps % 3 / 10, (
            "the chunk is executed in order, and drawn anew at its end"
        )
        self.steps += 1
        done = self.steps == self.length
        success = (
            float(self.length <= 4) if done else 1.0 - float(self.length <= 4)
        )  # only the last step's counts
        return (
            np.array([self.length, self.steps]),
            -1.0,
            done and self.length % 2 == 0,
            done and self.length % 2 == 1,
            {"success": success},
        )


def make_countdown(**_):
    return Countdown()


@pytest.fixture
def countdown(monkeypatch):
    """A task of one's own."""
    monkeypatch.setitem(common.TASKS, "countdown", (make_countdown, None))


@pytest.mark.parametrize("episodes", [1, 3, 23])
def test_evaluation_counts_every_episode_once(countdown, episodes):
    evaluator = common.Evaluator("countdown", 3, episodes=episodes, seed=11, noise_dim=3)
    lengths = np.array([seed % 9 + 1 for seed in evaluator.seeds])
    chunks = torch.tensor([[0.0, 0.1, 0.2]])
    for _ in range(2):  # the same episodes again
        scores = evaluator.evaluate(lambda s, noise: chunks.expand(len(s), -1), samples=2)
        success = (lengths <= 4).astype(float)
        assert scores["episodes"] == episodes
        assert scores["success"] == pytest.approx(success.mean())
        assert scores["length"] == pytest.approx(lengths.mean())
        assert scores["return"] == pytest.approx(-lengths.mean())
        assert ("success_stderr" in scores) == (episodes > 1)
        if episodes > 1:
            error = success.std(ddof=1) / np.sqrt(episodes)
            assert scores["success_stderr"] == pytest.approx(error)
    evaluator.close()
    if episodes == 23:
        assert len(set(lengths)) > 4 and 0 < success.mean() < 1


def test_evaluation_noise_belongs_to_the_episode(countdown, monkeypatch):
    drawn = []
    for cores in (1, 4):
        monkeypatch.setattr(common, "cores", lambda cores=cores: cores)
        evaluator = common.Evaluator("countdown", 3, episodes=9, seed=2, noise_dim=3)
        seen = {}

        def policy(observation, noise):
            assert noise.shape[1:] == (1, 3)
            for o, z in zip(observation.tolist(), noise):
                seen.setdefault(tuple(o), []).append(z)
            return torch.tensor([[0.0, 0.1, 0.2]]).expand(len(observation), -1)

        evaluator.evaluate(policy)
        evaluator.close()
        drawn.append(
            {
                key: torch.stack(sorted(values, key=lambda z: float(z.sum())))
                for key, values in seen.items()
            }
        )
    assert drawn[0].keys() == drawn[1].keys()
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])
