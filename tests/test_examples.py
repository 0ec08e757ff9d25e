"""The examples do what they say, in small."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_runs import load, rows, start

import common
import trqam_offline

sys.path.insert(0, str(ROOT / "examples"))
import mathematics_only
import own_task


@pytest.fixture
def pendulum(tmp_path, monkeypatch):
    """The example's data, made on the spot by Minari."""
    pytest.importorskip("minari")
    pytest.importorskip("jax")  # which Minari's collector needs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return own_task.load_arrays(episodes=2)


def test_a_minari_dataset_becomes_one_of_chunks(pendulum):
    dataset = common.ChunkDataset.from_transitions(
        **pendulum, low=-2, high=2, chunk_length=3, gamma=0.9
    )
    assert dataset.size == 400 and dataset.episodes == 2
    np.testing.assert_allclose(
        dataset.actions[:200].numpy(), pendulum["actions"][:200] / 2, atol=1e-4
    )


def test_a_registered_task_trains_resumes_and_is_evaluated(pendulum, monkeypatch, capsys):
    """Actions are rescaled to the environment's range; where no success is told, return leads."""
    monkeypatch.setitem(common.TASKS, own_task.ENV_ID, (own_task.make_env, lambda: pendulum))
    env = common.make_env(own_task.ENV_ID)
    assert env.action_space.high == 1 and env.unwrapped.action_space.high == 2
    flags = ["--env-id", own_task.ENV_ID, "--run-dir", "run", "--hidden-dims", 8]
    flags += ["--num-critics", 2, "--batch-size", 8, "--bc-steps", 6, "--offline-steps", 6]
    flags += ["--eval-interval", 3, "--eval-episodes", 2, "--log-interval", 3, "--num-threads", 1]
    assert start(trqam_offline, monkeypatch, *flags) is None
    more = ["--resume", "--run-dir", "run", "--offline-steps", 9]
    assert start(trqam_offline, monkeypatch, *more) is None
    found = rows("run/eval.csv")
    assert [row["step"] for row in found] == ["6", "3", "6", "9"]
    assert "success" not in found[0] and float(found[0]["return"]) < 0
    assert load("run")["data"]["origin"] == "own"
    evaluate = ["--eval-only", "--checkpoint", "run/checkpoint.pt", "--eval-episodes", 2]
    assert start(trqam_offline, monkeypatch, *evaluate) is None
    said = capsys.readouterr().out
    assert "nan" not in said and "return " in said.splitlines()[-1]


def test_spaces_that_are_no_box_of_one_dimension_are_refused(monkeypatch):
    import gymnasium

    monkeypatch.setitem(common.TASKS, "own", (lambda **_: gymnasium.make("CartPole-v1"), None))
    with pytest.raises(common.UserError, match="must be a Box of one dimension"):
        common.make_env("own")


def test_the_mathematics_alone_moves_the_policy_up_the_reward():
    torch.manual_seed(0)
    base, policy, temperature, kl = mathematics_only.train(temperature=0.3, updates=150, steps=10)
    condition, noise = torch.zeros(4000, 1), (torch.randn(4000, 2), torch.randn(10, 4000, 2))
    with torch.no_grad():
        before, after = (
            mathematics_only.critic(
                condition, trqam_offline.memoryless_rollout(v, v, condition, *noise)[1]
            ).mean()
            for v in (base, policy)
        )
    assert temperature == pytest.approx(0.3) and kl > 0.01 and after > before + 0.02


def recipe(name):
    """A function of docs/copying.md, as it stands there."""
    blocks = (ROOT / "docs/copying.md").read_text().split("```python\n")[1:]
    source = next(block.split("```")[0] for block in blocks if f"def {name}(" in block)
    assert len(source.splitlines()) <= 12
    found = dict(np=np, h5py=pytest.importorskip("h5py"))
    exec(source, found)
    return found[name]


def test_robomimics_layout_becomes_transitions(tmp_path):
    h5py, rng = pytest.importorskip("h5py"), np.random.default_rng(0)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for number, length in enumerate((3, 4, 2)):
            demo = file.create_group(f"data/demo_{number}")
            for key, width in (("robot0_eef_pos", 3), ("object", 2)):
                states = rng.normal(size=(length + 1, width))
                demo[f"obs/{key}"], demo[f"next_obs/{key}"] = states[:-1], states[1:]
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            demo["rewards"] = demo["dones"] = np.arange(length) == length - 1
    arrays = recipe("robomimic")(tmp_path / "x.hdf5", ["robot0_eef_pos", "object"])
    words = dict(low=-1, high=1, chunk_length=2, gamma=1.0)
    dataset = common.ChunkDataset.from_transitions(**arrays, **words)
    assert dataset.size == 9 and dataset.episodes == 3 and dataset.observations.shape[1] == 5
    batch = dataset.chunks(torch.arange(8))
    assert batch.valid.tolist() == [1, 1, 0, 1, 1, 1, 0, 1]
    assert batch.mask.tolist() == [1, 0, 0, 1, 1, 0, 0, 0] and batch.reward.sum() == 5


def test_d4rls_layout_becomes_transitions(tmp_path):
    h5py = pytest.importorskip("h5py")
    states = np.arange(9.0)[:, None] * [1, 10]
    with h5py.File(tmp_path / "x.hdf5", "w") as file:  # a timeout after 4 rows, a terminal after 3
        file["observations"], file["actions"] = states, np.zeros((9, 1))
        file["rewards"] = np.arange(9.0)
        file["timeouts"], file["terminals"] = np.arange(9) == 3, np.arange(9) == 6
    arrays = recipe("d4rl")(tmp_path / "x.hdf5")
    words = dict(low=-1, high=1, chunk_length=1, gamma=1.0)
    dataset = common.ChunkDataset.from_transitions(**arrays, **words)
    batch = dataset.chunks(torch.arange(dataset.size))
    assert batch.observation[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert batch.next_observation[:, 0].tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert batch.mask.tolist() == [1, 1, 1, 1, 1, 0, 1] and batch.reward[5] == 6
