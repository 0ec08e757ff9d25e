"""A task of one's own: a Gymnasium environment and a Minari dataset, trained by trqam_offline.py as
it is. Needs `pip install "minari[create,hdf5]"`; `minari.load_dataset` loads published sets too.

    python examples/own_task.py        # 3 seeds, each a folder of runs/own_task
"""

import functools
import os
import sys
from pathlib import Path

import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import trqam_offline as trqam

ENV_ID = "Pendulum-v1"
make_env = functools.partial(gymnasium.make, ENV_ID)


def scripted(observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A torque: every other one is random; else pump energy until the pole is up, and hold it."""
    if rng.random() < 0.5:
        return rng.uniform(-2, 2, 1).astype(np.float32)
    angle, speed = np.arctan2(observation[1], observation[0]), observation[2]
    energy = speed**2 / 6 + 5 * (np.cos(angle) - 1)
    torque = -10 * angle - 2 * speed if abs(angle) < 0.4 else -np.sign(speed) * np.sign(energy) * 2
    return np.clip(torque + rng.normal(0, 0.3, 1), -2, 2).astype(np.float32)


def load_arrays(episodes: int = 60) -> dict[str, np.ndarray]:
    """The arguments of `ChunkDataset.from_transitions`, from a Minari dataset."""
    os.environ.setdefault("MINARI_DATASETS_PATH", str(Path("runs/minari").absolute()))
    import minari

    if "pendulum/noisy-v0" not in minari.list_local_datasets():
        env, rng = minari.DataCollector(make_env()), np.random.default_rng(0)
        for episode in range(episodes):
            (observation, _), done = env.reset(seed=episode), False
            while not done:
                observation, _, terminated, truncated, _ = env.step(scripted(observation, rng))
                done = terminated or truncated
        env.create_dataset("pendulum/noisy-v0", algorithm_name="scripted")
    parts = [dict(observations=x.observations[:-1], actions=x.actions, rewards=x.rewards,
                  next_observations=x.observations[1:], terminated=x.terminations,
                  truncated=x.truncations)
             for x in minari.load_dataset("pendulum/noisy-v0").iterate_episodes()]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


if __name__ == "__main__":
    common.register_task(ENV_ID, make_env, load_arrays)
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        trqam.main(trqam.Args(
            env_id=ENV_ID, seed=seed, run_dir=f"runs/own_task/seed{seed}", hidden_dims=(64, 64),
            bc_steps=2_000, offline_steps=2_000, num_critics=2, flow_steps=5, chunk_length=1,
            batch_size=128, learning_rate=1e-3, gamma=0.97, tau=0.02, rho=0.0, kl_budget=0.5,
            eval_interval=500, log_interval=50, checkpoint_interval=1_000, num_threads=1))
