"""Data loading and evaluation for the TRQAM scripts. Nothing of the algorithm stands here.

Two functions are all a script needs for its data: `load_dataset(...)` gives a `ReplayBuffer`, a `ChunkDataset` that can
grow, and its `sample(batch_size, generator)` a `Batch`. To train on data of your own, replace those two.
The rest: OGBench environments, collecting data with OGBench's scripted oracles, evaluation in parallel
environments, what a run writes (settings, logs, checkpoints, curves, video), and how a GPU launches an update at once.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import difflib
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pickle
import platform
import re
import reprlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

warnings.filterwarnings("ignore", module="glfw")  # MuJoCo's window library warns where there is no screen
warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # `CudaGraph` captures it later
import gymnasium
import ogbench
from ogbench.relabel_utils import relabel_dataset

gymnasium.logger.min_level = gymnasium.logger.ERROR  # its checks of OGBench's spaces warn at each environment
PROGRESS = dict(dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 20)  # few lines in a log file


class UserError(Exception):
    """Something the user can mend; its text is one line that says what is wrong, where, and what to do."""


class NotFinite(UserError):
    """An array that holds a number that is not finite; `Run` adds what to do."""


def first_line(error: Exception) -> str:
    """What an error says, or else its type: it may stand within our own one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def require_finite(name: str, array: np.ndarray):
    """Raise NotFinite, with the array's name and the first bad place, where a number in it is not finite."""
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise NotFinite(f"{name} is not finite (number {bad[0].tolist()} is {array[tuple(bad[0])]})")


# ---------------------------------------------------------------------------------------------------- environments


def split_env_id(env_id: str) -> tuple[str, str]:
    """Check a single-task id such as `scene-play-singletask-task1-v0` -> (environment, dataset name).

    Here (`scene-singletask-task1-v0`, `scene-play-v0`). Raises UserError, with the nearest known id, for any other.
    """
    known = known_env_ids()
    if env_id not in known:
        nearest = difflib.get_close_matches(env_id, known, n=1, cutoff=0)[0]
        raise UserError(f"--env-id: unknown environment {env_id!r}; did you mean {nearest!r}?")
    name = re.fullmatch(r"(?P<env>.+)-(?P<type>[a-z]+)-(?P<task>singletask(-task\d)?)-(?P<version>v\d)", env_id)
    return f"{name['env']}-{name['task']}-{name['version']}", f"{name['env']}-{name['type']}-{name['version']}"


def domain_of(env_id: str) -> str:
    """`scene-play-singletask-task1-v0` -> `scene-play`: what the five tasks of a domain, and their prior, share."""
    return env_id.split("-singletask")[0]


@functools.cache
def known_env_ids() -> list[str]:
    """All state-based single-task OGBench ids, the types of dataset that OGBench publishes included."""
    types = {"maze": ("navigate", "stitch", "explore"), "soccer": ("navigate", "stitch")}
    ids = []
    for name in gymnasium.registry:
        if "-singletask-" in name and not name.startswith("visual-"):
            head, tail = name.split("-singletask-")
            kind = next((types[key] for key in types if key in head), ("play", "noisy"))
            ids += [f"{head}-{type_}-singletask-{tail}" for type_ in kind]
    return ids


class SeededReset(gymnasium.Wrapper):
    """Makes `reset(seed=...)` decide the whole episode.

    OGBench's resets also draw from NumPy's global generator, and take random steps from an action space that is made
    anew, unseeded, each time it is asked for.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        base = env.unwrapped
        self._space = base.action_space
        if isinstance(getattr(type(base), "action_space", None), property):
            base.__class__ = type(type(base).__name__, (type(base),), {"action_space": self._space})

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            np.random.seed(seed)
            self._space.seed(seed)
        return self.env.reset(seed=seed, options=options)


def make_env(env_id: str, **kwargs) -> gymnasium.Env:
    """The environment of a single-task id, with seeded resets."""
    env = gymnasium.make(split_env_id(env_id)[0], **kwargs)
    # OGBench clips actions itself and returns float64 observations: the checker has nothing to add but warnings.
    return SeededReset(env)


@functools.cache
def unplayed_env(env_id: str) -> gymnasium.Env:
    """One environment of a task, for its sizes and for relabelling data: making one takes a second or two."""
    return make_env(env_id)


# ------------------------------------------------------------------------------------------------- collecting data

STEPS_PER_EPISODE = {"pointmaze-giant": 2001}  # all others: 1,001, the last of which only holds the final state
EPISODES_OFFICIAL = {"cube-triple": 3000, "cube-quadruple": 5000, "pointmaze-giant": 500}  # all others: 1,000
STACKING = {
    "single": (0, 0),
    "double": (0, 0.25),
    "triple": (0.05, 0.35),
    "quadruple": (0.1, 0.5),
    "octuple": (0, 0.35),
}


def can_collect(dataset_name: str) -> bool:
    """Whether OGBench ships the oracle that made this dataset: `play` manipulation and pointmaze `navigate` data."""
    return bool(re.match(r"((cube|scene|puzzle)-(.+-)?play|pointmaze-\w+-navigate)-v0$", dataset_name))


def check_collection(dataset_name: str, dataset_dir: str):
    """Raise UserError where a dataset cannot be collected into `dataset_dir`, with what to do instead."""
    if not can_collect(dataset_name):
        way_out = f"use --collect-episodes 0 and {where_to_put(dataset_name, dataset_dir)}"
        raise UserError(f"--collect-episodes: OGBench ships no oracle for {dataset_name}; {way_out}")
    folder = Path(dataset_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dataset-dir: {folder} cannot be made ({error.strerror}); name another folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--dataset-dir: {folder} cannot be written to; name another folder")


def official_size(dataset_name: str) -> tuple[int, int]:
    """(training episodes, steps of each) of the official dataset that OGBench's generator makes."""
    name = next((key for key in {**EPISODES_OFFICIAL, **STEPS_PER_EPISODE} if dataset_name.startswith(key)), "")
    return EPISODES_OFFICIAL.get(name, 1000), STEPS_PER_EPISODE.get(name, 1001)


@functools.cache
def collection_env(dataset_name: str) -> gymnasium.Env:
    """One environment per worker process and dataset, in the mode OGBench's generator uses."""
    env_name = re.sub(r"-(play|navigate)-", "-", dataset_name)
    mode = {} if "maze" in env_name else {"mode": "data_collection"}
    steps = official_size(dataset_name)[1]
    return SeededReset(gymnasium.make(env_name, terminate_at_goal=False, max_episode_steps=steps, **mode))


def collect_play_episode(env: gymnasium.Env, dataset_name: str, seed: int) -> dict[str, list]:
    """One episode of OGBench's `play` recipe: scripted, noisy oracles pursue one random sub-task after the other."""
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    noise = dict(noise=0.1, noise_smoothing=0.5)
    if dataset_name.startswith("puzzle"):
        oracles = {"button": ButtonPlanOracle(env=env, gripper_always_closed=True, **noise)}
    else:
        kinds = {
            "cube": CubePlanOracle,
            "button": ButtonPlanOracle,
            "drawer": DrawerPlanOracle,
            "window": WindowPlanOracle,
        }
        oracles = {task: kind(env=env, **noise) for task, kind in kinds.items()}

    ob, info = env.reset(seed=seed)
    low, high = STACKING.get(dataset_name.split("-")[1], (0.5, 0.5)) if dataset_name.startswith("cube") else (0.5, 0.5)
    p_stack = np.random.uniform(low, high)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(ob, info)
    data = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel", "button_states")}
    done = False
    while not done:
        action = np.clip(oracle.select_action(ob, info), -1, 1)
        next_ob, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if oracle.done:
            ob_target, info_target = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[info_target["privileged/target_task"]]
            oracle.reset(ob_target, info_target)
        data["observations"].append(ob)
        data["actions"].append(action)
        data["terminals"].append(done)
        data["qpos"].append(info["prev_qpos"])
        data["qvel"].append(info["prev_qvel"])
        if "prev_button_states" in info:
            data["button_states"].append(info["prev_button_states"])
        ob = next_ob
    return data


def collect_maze_episode(env: gymnasium.Env, dataset_name: str, seed: int) -> dict[str, list]:
    """One episode of OGBench's pointmaze `navigate` recipe: noisy steps along the shortest way to one random goal
    after the other."""
    maze = env.unwrapped
    free = [tuple(cell) for cell in np.argwhere(maze.maze_map == 0)]
    # Goals lie on cells that are no corridor: those that a straight way does not merely pass through.
    goals = []
    for i, j in free:
        vertical = maze.maze_map[i - 1, j] == 0 and maze.maze_map[i + 1, j] == 0
        horizontal = maze.maze_map[i, j - 1] == 0 and maze.maze_map[i, j + 1] == 0
        walls_beside = maze.maze_map[i, j - 1] == 1 and maze.maze_map[i, j + 1] == 1
        walls_above = maze.maze_map[i - 1, j] == 1 and maze.maze_map[i + 1, j] == 1
        if not (vertical and walls_beside) and not (horizontal and walls_above):
            goals.append((i, j))

    rng = np.random.default_rng(seed)
    task = {"init_ij": free[rng.integers(len(free))], "goal_ij": goals[rng.integers(len(goals))]}
    ob, _ = env.reset(seed=seed, options={"task_info": task})
    data = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel")}
    done = False
    while not done:
        subgoal, _ = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)
        direction = subgoal - maze.get_xy()
        direction = direction / (np.linalg.norm(direction) + 1e-6)
        action = np.clip(direction + rng.normal(0, 0.5, size=2), -1, 1)
        next_ob, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if info["success"]:
            goal = maze.ij_to_xy(goals[rng.integers(len(goals))])
            maze.set_goal(goal_xy=maze.add_noise(goal))
        data["observations"].append(ob)
        data["actions"].append(action)
        data["terminals"].append(done)
        data["qpos"].append(info["prev_qpos"])
        data["qvel"].append(info["prev_qvel"])
        ob = next_ob
    return data


def cube_was_lost(qpos: np.ndarray) -> bool:
    """Whether the cube of a scene episode, qpos [T, .], was pushed out of reach: OGBench discards such episodes."""
    y, z = qpos[:, 15], qpos[:, 16]
    return bool(np.any(y >= 0.29) or np.any((y <= -0.3) & ((z < 0.06) | (z > 0.08))))


def collect_episode(dataset_name: str, seed: int, split: str, index: int) -> dict[str, np.ndarray]:
    """Episode `index` of a dataset's split ("train" or "val"): a function of these arguments alone.

    Returns arrays of T rows in OGBench's types: observations [T, O], actions [T, d], qpos, qvel float32, terminals
    bool, and button_states int64 where the environment has buttons. The last row holds the final state.
    """
    env = collection_env(dataset_name)
    collect = collect_maze_episode if "maze" in dataset_name else collect_play_episode
    for attempt in range(1000):
        entropy = np.random.SeedSequence([seed, ("train", "val").index(split), index, attempt])
        data = collect(env, dataset_name, int(entropy.generate_state(1)[0]))
        if not (dataset_name.startswith("scene") and cube_was_lost(np.array(data["qpos"]))):
            break
    types = {"terminals": bool, "button_states": np.int64}
    return {key: np.array(rows, dtype=types.get(key, np.float32)) for key, rows in data.items() if rows}


def collected_path(dataset_name: str, episodes: int, seed: int, dataset_dir: str) -> Path:
    """Where a collected dataset lies: its name says how it was made, so that it never passes for the official one."""
    name = dataset_name.removesuffix("-v0")
    return Path(dataset_dir).expanduser() / f"{name}-collected-{episodes}ep-seed{seed}-v0.npz"


def collect_dataset(dataset_name: str, episodes: int, seed: int, dataset_dir: str, workers: int | None = None) -> Path:
    """Collect `episodes` training and a tenth as many validation episodes with OGBench's scripted oracle.

    Writes `NAME.npz` and `NAME-val.npz` in OGBench's format, and `NAME.json` with their origin. The data depends on
    (dataset_name, episodes, seed) alone, not on `workers` (default: one per core). Finished episodes are kept in
    `NAME.partial` until all are there, so that a collection that was stopped goes on where it was. Returns the path
    of NAME.npz; at once if it is already there. Raises UserError where no oracle exists.
    """
    check_collection(dataset_name, dataset_dir)
    path = collected_path(dataset_name, episodes, seed, dataset_dir)
    if path.exists() and collection_of(path):
        return path
    partial = path.with_suffix(".partial")
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run that wants the same data waits for it here
        if path.exists() and collection_of(path):
            return path
        if path.exists() and not partial.exists():
            raise UserError(f"{path} was not written by a finished collection: move it away, to collect in its place")
        partial.mkdir(exist_ok=True)
        jobs = [("train", i) for i in range(episodes)] + [("val", i) for i in range(max(1, episodes // 10))]
        files = {job: partial / f"{job[0]}-{job[1]:05d}.npz" for job in jobs}
        missing = [job for job in jobs if not files[job].exists()]
        steps = official_size(dataset_name)[1]
        workers = min(workers or os.cpu_count(), len(missing)) or 1
        with (
            concurrent.futures.ProcessPoolExecutor(workers, mp_context=process_context()) as pool,
            tqdm(
                total=len(jobs) * steps,
                initial=(len(jobs) - len(missing)) * steps,
                unit="step",
                unit_scale=True,
                desc=f"collecting {dataset_name}",
                **PROGRESS,
            ) as bar,
        ):
            tasks = [pool.submit(write_episode, dataset_name, seed, *job, files[job]) for job in missing]
            try:
                for task in concurrent.futures.as_completed(tasks):
                    task.result()
                    bar.update(steps)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for split, target in (("val", path.with_name(f"{path.stem}-val.npz")), ("train", path)):
            episodes_of_split = [dict(np.load(files[job])) for job in jobs if job[0] == split]
            write_npz(target, {k: np.concatenate([e[k] for e in episodes_of_split]) for k in episodes_of_split[0]})
        origin = dict(
            origin="collected",
            dataset=dataset_name,
            episodes=episodes,
            collect_seed=seed,
            sha256=file_hash(path),
            recipe="OGBench scripted oracle",
            ogbench=version_of("ogbench"),
            mujoco=version_of("mujoco"),
        )
        write_atomically(path.with_suffix(".json"), json.dumps(origin, indent=1).encode())
        shutil.rmtree(partial)
    return path


def write_episode(dataset_name: str, seed: int, split: str, index: int, path: Path):
    """Collect one episode into its file (in a worker process)."""
    follow_the_parent()
    write_npz(path, collect_episode(dataset_name, seed, split, index))


# ------------------------------------------------------------------------------------------------------------ data


class Batch(NamedTuple):
    """B action chunks with their n-step returns, on the training device (float32)."""

    observation: torch.Tensor  # [B, O], s: where the chunk starts
    action: torch.Tensor  # [B, c*d], a: its c actions, flattened
    reward: torch.Tensor  # [B], R: their discounted sum of rewards
    mask: torch.Tensor  # [B], m: 0 where the task was done within the chunk, so that nothing follows
    next_observation: torch.Tensor  # [B, O], s': where the chunk ends
    valid: torch.Tensor  # [B], 0 where an episode ended before the chunk's last action


class ChunkDataset:
    """Transitions on one device, sampled as action chunks.

    Holds the rows of OGBench's files as they are, each episode's final state included, so that the next observation is
    the next row and is not stored twice. A *transition* is a row that is not an episode's last.

    Args:
        observations: [M, O], actions: [M, d], rewards: [M], masks: [M] (0 where the task is done), float32.
        terminals: [M] bool, True at each episode's last row (the file's last row ends an episode in any case).
        chunk_length: c, at least 1 and at most the number of transitions.
        gamma: discount per step, in (0, 1].
        sparse: replace every reward that is not 0 by -1.
        device: where the data lives and is sampled.
    """

    def __init__(
        self,
        observations,
        actions,
        rewards,
        masks,
        terminals,
        chunk_length: int,
        gamma: float,
        sparse: bool = False,
        device: torch.device | str = "cpu",
    ):
        last_rows = np.flatnonzero(
            np.concatenate([terminals[:-1].astype(bool), [True]])
        )  # [episodes], rows of the file
        on_device = lambda array, dtype=torch.float32: torch.as_tensor(array, dtype=dtype, device=device)
        self.observations = on_device(observations)
        self.actions = on_device(actions).clamp(-1 + 1e-5, 1 - 1e-5)
        self.rewards = on_device(np.where(np.asarray(rewards) != 0, -1.0, 0.0) if sparse else rewards)
        self.masks = on_device(masks)
        # Transitions are numbered without the final states; episode e's end at transition ends[e] - 1.
        self.ends = on_device(last_rows - np.arange(len(last_rows)), torch.int64)  # [episodes]
        self.size = len(observations) - len(last_rows)
        self.chunk_length = chunk_length
        self.gamma = gamma
        self.sparse = sparse
        self.steps = torch.arange(chunk_length, device=device)  # [c]

    def to(self, device: torch.device) -> "ChunkDataset":
        """Move it to a device, in place."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        return self

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """`batch_size` chunks whose first transition is uniform over 0 ... size - c."""
        return self.chunks(self.starts(0, self.size, batch_size, generator))

    def starts(self, first: int, stop: int, n: int, generator: torch.Generator) -> torch.Tensor:
        """n uniform first transitions of chunks that lie within the transitions first ... stop - 1 -> [n]."""
        high = stop - self.chunk_length + 1
        return torch.randint(first, high, (n,), generator=generator, device=generator.device)

    def chunks(self, start: torch.Tensor) -> Batch:
        """The chunks of c transitions that begin at transitions start [B] (int64)."""
        transition = start[:, None] + self.steps  # [B, c]
        episode = torch.searchsorted(self.ends, transition, right=True)  # [B, c]
        row = transition + episode  # [B, c]: each earlier episode holds one final state more
        inside = (episode == episode[:, :1]).float()  # [B, c]: the step is still in the episode the chunk began in
        discount = self.gamma**self.steps  # [c]
        reward = (discount * self.rewards[row] * inside).sum(-1)
        mask = torch.where(inside.bool(), self.masks[row], 1.0).amin(-1)
        steps_inside = inside.long().sum(-1)  # [B]
        return Batch(
            observation=self.observations[row[:, 0]],
            action=self.actions[row].flatten(1),
            reward=reward,
            mask=mask,
            next_observation=self.observations[row[:, 0] + steps_inside],
            valid=inside[:, -1],
        )


class ReplayBuffer(ChunkDataset):
    """A `ChunkDataset` that online transitions are appended to, as one row each and one more at each episode's end.

    Call `make_room` once, for all transitions that will come: nothing is ever overwritten.

    Attributes:
        offline_size, offline_rows: transitions and rows before the first online one.
        episodes: finished ones; the running episode, if any, has this number.
    """

    ROWS = ("observations", "actions", "rewards", "masks")

    def make_room(self, transitions: int):
        """Allocate rows for this many transitions more, and for the final states of episodes of 20 steps; where they
        are shorter, rows are added as they come."""
        self.offline_size, self.offline_rows = self.size, len(self.observations)
        self.episodes = len(self.ends)
        self.saved_rows, self.saved_crc32 = 0, 0
        self.spare_episodes = transitions // 20 + 1
        if transitions:  # otherwise nothing is copied
            self.add_rows(transitions + self.spare_episodes)

    def add_rows(self, rows: int):
        """Add empty rows, and room for the ends of `spare_episodes`."""
        room = lambda old, count, value: torch.cat([old, old.new_full((count, *old.shape[1:]), value)])
        for name in self.ROWS:
            setattr(self, name, room(getattr(self, name), rows, 0))
        self.ends = room(self.ends, self.spare_episodes, torch.iinfo(torch.int64).max)  # of one that has not ended

    def append(self, observation, action, reward: float, mask: float, next_observation, done: bool):
        """Add a transition of the running episode; done: it is the episode's last.

        observation, next_observation [O], action [d]: arrays; mask: 0 where the task is done.
        """
        row = self.size + self.episodes
        on_device = lambda array: torch.as_tensor(array, dtype=torch.float32, device=self.observations.device)
        self.observations[row], self.observations[row + 1] = on_device(observation), on_device(next_observation)
        self.actions[row] = on_device(action)
        self.rewards[row] = -float(reward != 0) if self.sparse else float(reward)
        self.masks[row] = float(mask)
        self.size += 1
        if done:
            self.ends[self.episodes] = self.size
            self.episodes += 1
            if self.episodes == len(self.ends):
                self.add_rows(self.spare_episodes)

    def sample_balanced(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Half of the chunks (rounded down) begin in the offline part, the others in the online one, which must hold a
        whole chunk."""
        half = batch_size // 2
        offline = self.starts(0, self.offline_size, half, generator)
        online = self.starts(self.offline_size, self.size, batch_size - half, generator)
        return self.chunks(torch.cat([offline, online]))

    def save(self, path: Path) -> dict[str, Any]:
        """Write the appended rows that are new since the last `save` into `path`, behind the older ones.

        Returns what a checkpoint must hold beside that file. Rows that a stopped run wrote after its last checkpoint
        are written over. Raises UserError where the disk is full or not writable.
        """
        new = slice(self.offline_rows + self.saved_rows, self.size + self.episodes)
        rows = torch.column_stack([getattr(self, name)[new] for name in self.ROWS]).numpy(force=True)  # [., O + d + 2]
        if len(rows):
            write_from(path, self.saved_rows * rows[0].nbytes, rows.tobytes())
        self.saved_rows += len(rows)
        self.saved_crc32 = zlib.crc32(rows.tobytes(), self.saved_crc32)
        state = {"rows": self.saved_rows, "crc32": self.saved_crc32, "size": self.size, "episodes": self.episodes}
        return state | {"ends": self.ends[: self.episodes].clone()}

    def load(self, path: Path, state: dict[str, Any]):
        """Append again what `save` wrote; `make_room` must have been called. Raises UserError where `path` is damaged.

        The running episode's newest observation is not in the file: the next `append` brings it.
        """
        widths = [self.observations.shape[1], self.actions.shape[1], 1, 1]
        rows, numbers, ends = state["rows"], state["rows"] * sum(widths), state["ends"]
        fits = state["size"] + state["episodes"] == self.offline_rows + rows and self.offline_size <= state["size"]
        fits = fits and ends.shape == (state["episodes"],)
        fits = fits and bool((ends.diff() > 0).all() and (0 < ends).all() and (ends <= state["size"]).all())
        fits = fits and 4 * numbers <= (path.stat().st_size if path.is_file() else 0)
        stored = np.fromfile(path, np.float32, numbers) if fits and rows else np.empty(0, np.float32)
        if not fits or zlib.crc32(stored) != state["crc32"]:
            raise UserError(f"--resume: {path} is damaged or missing, so this run cannot go on; start a new one")
        while len(self.ends) <= state["episodes"]:
            self.add_rows(self.spare_episodes)
        for name, column in zip(self.ROWS, torch.from_numpy(stored.reshape(-1, sum(widths))).split(widths, dim=1)):
            array = getattr(self, name)
            array[self.offline_rows :][:rows] = column.reshape(rows, *array.shape[1:])
        self.ends[: state["episodes"]] = ends
        self.size, self.episodes = state["size"], state["episodes"]
        self.saved_rows, self.saved_crc32 = rows, state["crc32"]


class RotatingShards:
    """A dataset of several files, of which one at a time is on the device, while the next is read in the background
    into the computer's own memory.

    Batch n is drawn from file n // 1000, counted round: a run that resumes needs to know n alone.

    Args:
        files: of the dataset, two or more.
        load: reads one of them.
        device: where batches are drawn.
        drawn: batches that were drawn before.

    Attributes:
        size: transitions of the file that is resident.
    """

    BATCHES_PER_FILE = 1_000

    def __init__(self, files: list[Path], load: Callable[[Path], ReplayBuffer], device: torch.device, drawn: int = 0):
        self.files, self.load_file, self.device, self.drawn = files, load, device, drawn
        self.reader = concurrent.futures.ThreadPoolExecutor(1)
        self.number = self.file_of(drawn)
        self.resident = load(files[self.number]).to(device)
        self.read_ahead()

    def file_of(self, batch: int) -> int:
        """Number of the file that a batch is drawn from."""
        return batch // self.BATCHES_PER_FILE % len(self.files)

    def read_ahead(self):
        """Begin to read the file after the resident one."""
        self.following = self.reader.submit(self.load_file, self.files[(self.number + 1) % len(self.files)])

    @property
    def size(self) -> int:
        return self.resident.size

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """As `ChunkDataset.sample`, of the file whose turn it is. Raises UserError where the next cannot be read."""
        if self.number != self.file_of(self.drawn):
            self.number, self.resident = self.file_of(self.drawn), None  # which makes room for the next
            self.resident = self.following.result().to(self.device)
            self.read_ahead()
        self.drawn += 1
        return self.resident.sample(batch_size, generator)

    def make_room(self, transitions: int):
        """Nothing can be appended. Raises UserError where anything is to be."""
        if transitions:
            raise UserError(
                f"--online-steps: an online stage needs all data on the device, and these {len(self.files)} files take "
                "turns there; raise --max-data-gb, or name fewer with --dataset-path"
            )

    def save(self, path: Path) -> dict[str, Any]:
        """As `ReplayBuffer.save`: there is nothing to save."""
        return {}


class OnlineEnvironment:
    """The environment that a policy collects in, one step at a time.

    Episode i is decided by (seed, i) and the actions taken, so that a stopped run plays its running episode again.

    Attributes:
        observation: [O], the current one.
        chunk: [n, d], what is left of the action chunk in execution; the caller's, and kept in the state.
        last_episode: return, length and success of the newest finished one; empty before.
        taken: steps, over all episodes.
    """

    def __init__(self, env_id: str, seed: int):
        self.env, self.seed, self.last_episode = make_env(env_id), seed, {}
        self.taken = 0
        self.steps, self.seconds = 0, 0.0  # since the last report
        self.begin(0)

    def begin(self, episode: int):
        """Start an episode."""
        self.episode, self.rewards, self.actions = episode, [], []
        self.chunk = np.empty((0, *self.env.action_space.shape), dtype=np.float32)
        # SeedSequence takes missing numbers as 0: the 2 tells this episode from the one that is evaluated.
        seed = np.random.SeedSequence([self.seed, episode, 2]).generate_state(1)[0]
        self.observation, _ = self.env.reset(seed=int(seed))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float, np.ndarray, bool]:
        """Execute an action [d]; an episode that ends drops its chunk, and is followed by the next at once.

        Returns the transition as `ReplayBuffer.append` takes it. Its mask is 0 where the episode terminated, and 1
        where only its time was up.
        """
        start, observation = time.perf_counter(), self.observation
        self.taken += 1
        require_finite(f"the action of online step {self.taken}", action)
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        require_finite(f"the observation after online step {self.taken}", self.observation)
        require_finite(f"the reward of online step {self.taken}", np.array(reward))
        self.rewards.append(float(reward))
        self.actions.append(action)
        transition = observation, action, float(reward), 1.0 - terminated, self.observation, terminated or truncated
        if terminated or truncated:
            self.last_episode = {
                "charts/online_return": sum(self.rewards),
                "charts/online_length": len(self.rewards),
                "charts/online_success": float(info["success"]),
            }
            self.begin(self.episode + 1)
        self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - start
        return transition

    def report(self) -> dict[str, float]:
        """Steps per second of the environment alone since the last report, if there were any, and `last_episode`."""
        speed = {"charts/environment_SPS": self.steps / self.seconds} if self.steps else {}
        self.steps, self.seconds = 0, 0.0
        return speed | self.last_episode

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        actions = torch.from_numpy(np.array(self.actions, np.float32).reshape(-1, *self.env.action_space.shape))
        state = {"episode": self.episode, "actions": actions, "chunk": torch.from_numpy(self.chunk.copy())}
        state |= {"observation": torch.as_tensor(self.observation), "last_episode": self.last_episode}
        return state | {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]):
        """Return to a state, by playing its running episode again from its start. Says so where that ends elsewhere."""
        for name in ("actions", "chunk"):
            if state[name].shape[1:] != self.env.action_space.shape:
                raise ValueError(f"{name} of another environment")
        self.begin(state["episode"])
        for action in state["actions"].numpy():
            if self.step(action)[-1]:
                break  # it ended, which it had not
        self.last_episode, self.taken = state["last_episode"], state["taken"]
        if np.array_equal(self.observation, state["observation"].numpy()):
            self.chunk = state["chunk"].numpy()
        else:
            print("note: this machine plays the running episode otherwise, so the run will not end as if never stopped")
        self.report()  # steps that are played again do not count


def where_to_put(dataset_name: str, dataset_dir: str) -> str:
    """How to come by a dataset that OGBench's oracles cannot make, in words."""
    folder = Path(dataset_dir).expanduser()
    return (
        f"put {dataset_name}.npz (from OGBench's host or a mirror) into {folder}, or name the file with --dataset-path"
    )


def official_file(dataset_name: str, dataset_dir: str) -> Path:
    """The official training file, downloaded by ogbench where it is not in `dataset_dir` yet.

    Raises UserError, which says how to go on without it, when it cannot be downloaded.
    """
    path = Path(dataset_dir).expanduser() / f"{dataset_name}.npz"
    if path.exists():
        return path
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        ogbench.download_datasets([dataset_name], str(path.parent))
    except Exception as error:
        size = official_size(dataset_name)[0]
        way_out = (
            f"collect it with OGBench's own oracle: --collect-episodes {size} (100 are enough for a try)"
            if can_collect(dataset_name)
            else f"no oracle for it exists, so {where_to_put(dataset_name, dataset_dir)}"
        )
        raise UserError(f"the official {dataset_name}.npz could not be downloaded ({error}); {way_out}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


MOST_COMPRESSED = 100  # times its size that a file's arrays may take: real ones take a few times theirs


def unreadable(path: Path, error: Exception) -> UserError:
    """For a dataset file."""
    return UserError(f"{path} cannot be read as .npz ({error}); it may be damaged: fetch or collect it again")


def npz_shapes(path: Path, keys: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of arrays of an OGBench .npz file, by their headers.

    Raises UserError where it is none, lacks a key, or declares more than it can hold: nothing of it is unpacked.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as archive:
            missing = [key for key in keys if f"{key}.npy" not in archive.namelist()]
            if missing:
                raise UserError(f"{path} is no OGBench dataset: it has no {', '.join(missing)}")
            shapes = {}
            for key in keys:
                with archive.open(f"{key}.npy") as file:
                    version = np.lib.format.read_magic(file)
                    read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                    shape, _, dtype = read(file)
                    header = file.tell()
                declared, unpacked = math.prod(shape) * dtype.itemsize, archive.getinfo(f"{key}.npy").file_size - header
                if declared != unpacked and not dtype.hasobject:
                    raise ValueError(f"its {key} declares {declared:,} bytes and has {unpacked:,}")
                shapes[key] = shape
            total = sum(archive.getinfo(f"{key}.npy").file_size for key in keys)
            if total > MOST_COMPRESSED * path.stat().st_size:
                raise ValueError(f"it would unpack to {total / path.stat().st_size:,.0f} times its size")
            return shapes
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise unreadable(path, error) from error


def read_npz(path: Path, keys: Collection[str]) -> dict[str, np.ndarray]:
    """Arrays of an OGBench .npz file. Raises UserError as `npz_shapes`, or where the data is damaged."""
    npz_shapes(path, keys)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys}
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise unreadable(path, error) from error


def bytes_on_device(path: Path) -> int:
    """That the rows of a dataset file will take, by its header. Raises UserError where it has none."""
    shapes = npz_shapes(path, ("observations", "actions"))
    try:
        (rows, observation_dim), (_, action_dim) = shapes.values()
    except ValueError as error:
        raise UserError(f"{path}: observations and actions must be tables, not of shapes {shapes}") from error
    return 4 * rows * (observation_dim + action_dim + 2)  # a reward and a mask for each row


def free_memory(device: torch.device) -> int:
    """Bytes that data may take there: most of what is free on a GPU, half of it where the system lives too."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    try:
        return 512 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def read_dataset_file(path: Path, env: gymnasium.Env) -> dict[str, np.ndarray]:
    """Rows of one file, with OGBench's rewards and masks of the environment's task; checked against its sizes."""
    shapes = {
        "observations": env.observation_space.shape,
        "actions": env.action_space.shape,
        "terminals": (),
        "qpos": (env.unwrapped.model.nq,),
    }
    if hasattr(env.unwrapped, "_cur_button_states"):
        shapes["button_states"] = env.unwrapped._cur_button_states.shape
    data = read_npz(path, shapes)
    rows = len(data["observations"]) if data["observations"].ndim else 0
    if not data["observations"].size:
        raise UserError(f"{path} holds no rows; collect or fetch the file again")
    for key, array in data.items():
        if array.shape != (rows, *shapes[key]):
            raise UserError(f"{path}: {key} has shape {array.shape}, but {env.spec.id} needs {(rows, *shapes[key])}")
        if array.dtype.kind in "fiub":
            held = np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
            with np.errstate(all="ignore"):  # too large a number is infinite, and refused below
                data[key] = array = array.astype(held, copy=False)
        if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
            raise UserError(f"{path}: {key} holds values that are not finite numbers; collect or fetch the file again")
    relabel_dataset(env.spec.id, env, data)
    return data


def load_dataset(
    env_id: str,
    *,
    chunk_length: int,
    gamma: float,
    sparse: bool = False,
    device: torch.device | str = "cpu",
    dataset_path: str = "",
    dataset_dir: str = "~/.ogbench/data",
    collect_episodes: int = 0,
    collect_seed: int = 0,
    max_data_gb: float = 0.0,
    rotating: bool | None = None,
    drawn: int = 0,
) -> tuple[ReplayBuffer | RotatingShards, dict[str, Any]]:
    """The training data of a single task -> (data on `device`, what it is and where it comes from).

    Several files that take more than `max_data_gb` GiB together (0: than is free) become `RotatingShards`, from batch
    `drawn` on; `rotating`, where it is not None, decides that instead.

    `dataset_path` (a file, or a folder of shards) if given; else `collect_episodes` collected episodes if > 0; else
    the official file. Rewards and masks are OGBench's own for the task. Raises UserError for a file that is missing,
    damaged, of other dimensions, not finite or shorter than one chunk.
    """
    env_name, dataset_name = split_env_id(env_id)
    if dataset_path:
        given = Path(dataset_path).expanduser()
        files = sorted(p for p in given.glob("*.npz") if not p.stem.endswith("-val")) if given.is_dir() else [given]
        if not given.exists() or not files:
            raise UserError(f"--dataset-path: {given} {'holds no .npz file' if given.exists() else 'does not exist'}")
        info = {"origin": "path"}
    elif collect_episodes:
        files = [collect_dataset(dataset_name, collect_episodes, collect_seed, dataset_dir)]
    else:
        files, info = [official_file(dataset_name, dataset_dir)], {"origin": "official"}

    device = torch.device(device)

    def load(paths: list[Path], env: gymnasium.Env) -> ReplayBuffer:
        arrays = {key: [] for key in ("observations", "actions", "rewards", "masks", "terminals")}
        for path in paths:
            data = read_dataset_file(path, env)
            data["terminals"][-1] = True  # a file's end ends an episode
            for key, parts in arrays.items():
                parts.append(data[key])
        arrays = {key: np.concatenate(parts) if len(parts) > 1 else parts[0] for key, parts in arrays.items()}
        dataset = ReplayBuffer(**arrays, chunk_length=chunk_length, gamma=gamma, sparse=sparse)
        if dataset.size < chunk_length:
            raise UserError(f"{paths[0]}: {dataset.size} transitions are fewer than one chunk of {chunk_length}")
        return dataset

    if rotating is None:
        most = max_data_gb * 2**30 or free_memory(device)
        rotating = len(files) > 1 and sum(bytes_on_device(path) for path in files) > most
    shards = [[path] for path in files] if rotating else [files]
    transitions = episodes = solved = 0
    for shard in shards:  # each is read once before any work, so that a damaged one is found now
        dataset = None  # which makes room for the next
        dataset = load(shard, unplayed_env(env_id))
        transitions, episodes = transitions + dataset.size, episodes + len(dataset.ends)
        solved += int((dataset.masks == 0).sum())
    if rotating:
        env = make_env(env_id)  # the background reader's alone
        dataset = RotatingShards(files, lambda path: load([path], env), device, drawn)
    else:
        dataset.to(device)
    hashes = [file_hash(path) for path in files]
    made = collection_of(files[0]) if len(files) == 1 else None
    if made and made["sha256"] == hashes[0]:
        info = made
        if made["dataset"] != dataset_name:
            raise UserError(f"{files[0]} was collected as {made['dataset']}, but {env_id} needs {dataset_name}")
    elif collect_episodes and not dataset_path:
        raise UserError(f"{files[0]} is no longer the file that was collected: remove it, to collect it again")
    info |= dict(
        dataset=dataset_name,
        files=[str(path) for path in files],
        transitions=transitions,
        episodes=episodes,
        success_fraction=solved / (transitions + episodes),
        rotating=rotating,
        sha256=hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
    )
    return dataset, info


def collection_of(path: Path) -> dict[str, Any] | None:
    """What `collect_dataset` noted beside the file it wrote; None for any other file."""
    try:
        made = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    parts = dict(sha256=str, dataset=str, origin=str, collect_seed=int)
    return made if isinstance(made, dict) and all(isinstance(made.get(k), v) for k, v in parts.items()) else None


def describe_dataset(info: dict[str, Any]) -> str:
    """A dataset's origin in one line, for a plot or the terminal."""
    origin = {"official": "official OGBench file", "path": f"file {info['files'][0]}"}.get(
        info["origin"], f"collected here with OGBench's oracle (seed {info.get('collect_seed')}), not the official file"
    )
    return f"{info['dataset']}: {origin}, {info['transitions']:,} transitions, sha256 {info['sha256'][:12]}"


# ------------------------------------------------------------------------------------------------------ evaluation


class ChunkedEpisode(gymnasium.Wrapper):
    """Executes an action chunk [c*d] open loop in one `step`, up to the episode's end; after it, steps do nothing."""

    def __init__(self, env: gymnasium.Env, chunk_length: int):
        super().__init__(env)
        self.chunk_length = chunk_length
        self.action_space = gymnasium.spaces.Box(-1, 1, (chunk_length * env.action_space.shape[0],), np.float32)
        self.result = None

    def reset(self, **kwargs):
        observation, _ = self.env.reset(**kwargs)
        self.result = (observation, 0.0, False, False, {"success": 0.0, "steps": 0})
        return observation, {}

    def step(self, chunk: np.ndarray):
        observation, _, terminated, truncated, info = self.result
        total, steps = 0.0, 0
        for action in chunk.reshape(self.chunk_length, -1):
            if terminated or truncated:
                break
            observation, reward, terminated, truncated, info = self.env.step(action)
            total, steps = total + float(reward), steps + 1
        self.result = (observation, total, terminated, truncated, {"success": float(info["success"]), "steps": steps})
        return self.result


def make_chunked_env(env_id: str, chunk_length: int) -> gymnasium.Env:
    """The environment of a worker process of `Evaluator`."""
    follow_the_parent()
    if multiprocessing.parent_process():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a cluster sends to all: the evaluation is finished first
    return ChunkedEpisode(make_env(env_id), chunk_length)


class Evaluator:
    """Plays whole episodes of one task in parallel processes, which it keeps from one evaluation to the next.

    Args:
        env_id: single-task id.
        chunk_length: actions per policy call, c.
        episodes: episodes of one evaluation, N. Episode i is the same one each time: its start, and the noise of its
            policy, come from (seed, i). All N are played to their end, so short ones do not count more.
        seed: of the episodes.
        noise_dim: random numbers that the policy takes for a chunk.
    """

    def __init__(self, env_id: str, chunk_length: int, episodes: int, seed: int, noise_dim: int):
        self.env_id, self.chunk_length, self.episodes, self.noise_dim = env_id, chunk_length, episodes, noise_dim
        self.seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(episodes)]
        process_context()
        makers = [functools.partial(make_chunked_env, env_id, chunk_length)] * min(episodes, 4 * os.cpu_count())
        self.envs = gymnasium.vector.AsyncVectorEnv(makers, context="forkserver", autoreset_mode="Disabled")
        self.filmed = {}  # episode -> its chunks, for the first episodes of the last evaluation

    def evaluate(
        self, policy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], samples: int = 1
    ) -> dict[str, float]:
        """Mean and standard error of success (at each episode's last step), return and length over the N episodes.

        policy: (observation [n, O], noise [n, samples, noise_dim], standard normal, both float32 on the CPU)
            -> action chunks [n, c*d], for n environments at once.
        """
        slots = np.full(self.envs.num_envs, -1)  # the episode each environment plays, -1: none
        waiting = list(range(self.episodes))[::-1]
        noise = [np.random.default_rng([seed, 1]) for seed in self.seeds]
        results = {key: np.zeros(self.episodes) for key in ("success", "return", "length")}
        self.filmed = {episode: [] for episode in range(min(3, self.episodes))}
        action_dim = self.envs.single_action_space.shape[0]
        while True:
            start = np.zeros(len(slots), dtype=bool)
            for slot in np.flatnonzero(slots < 0)[: len(waiting)]:
                slots[slot], start[slot] = waiting.pop(), True
            if start.any():
                seeds = [self.seeds[episode] for episode in slots]
                observation, _ = self.envs.reset(seed=seeds, options={"reset_mask": start})
            playing = np.flatnonzero(slots >= 0)
            if not len(playing):
                break
            draws = [noise[e].standard_normal((samples, self.noise_dim), dtype=np.float32) for e in slots[playing]]
            observation = torch.from_numpy(observation[playing].astype(np.float32))
            chunks = np.zeros((len(slots), action_dim), dtype=np.float32)
            chunks[playing] = policy(observation, torch.from_numpy(np.stack(draws))).numpy(force=True)
            require_finite("an action in the evaluation", chunks)
            observation, reward, terminated, truncated, info = self.envs.step(chunks)
            require_finite("an observation in the evaluation", observation[playing])
            for slot in playing:
                episode = slots[slot]
                results["return"][episode] += reward[slot]
                results["length"][episode] += info["steps"][slot]
                results["success"][episode] = info["success"][slot]
                if episode in self.filmed:
                    self.filmed[episode].append(chunks[slot])
                if terminated[slot] or truncated[slot]:
                    slots[slot] = -1
        means = {key: float(values.mean()) for key, values in results.items()}
        spread = {key: values.std(ddof=1) if self.episodes > 1 else float("nan") for key, values in results.items()}
        errors = {f"{key}_stderr": float(spread[key] / np.sqrt(self.episodes)) for key in results}
        return {**means, **errors, "episodes": self.episodes}

    def film(self, folder: Path):
        """Write the first episodes of the last evaluation as mp4 files; where that fails, say so in one line.

        Films in a process of its own, which plays the recorded chunks again: a renderer that is missing, or that
        crashes, does no harm to the run.
        """
        before = os.environ.get("MUJOCO_GL")
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        episodes = [(self.seeds[episode], np.stack(chunks)) for episode, chunks in self.filmed.items()]
        process = context.Process(target=film_episodes, args=(self.env_id, self.chunk_length, episodes, folder, sender))
        process.start()
        sender.close()
        try:
            message = receiver.recv()
        except EOFError:
            message = "the renderer crashed"
        process.join()
        if before is None:
            os.environ.pop("MUJOCO_GL", None)
        print(
            f"video: {folder}"
            if message is None
            else f"no video: {message} (MuJoCo needs EGL, e.g. libegl1, or a screen)"
        )

    def close(self, at_once: bool = False):
        """End the worker processes; at_once: in the middle of what they do."""
        if at_once:
            for process in self.envs.processes:
                process.kill()
                process.join()
            self.envs.closed = True
        self.envs.close()


def film_episodes(env_id: str, chunk_length: int, episodes: list[tuple[int, np.ndarray]], folder: Path, sender):
    """Play recorded episodes, (seed, chunks [n, c*d]) each, and write them as mp4; sends None, or what went wrong."""
    try:
        import imageio.v3

        env = make_env(env_id, render_mode="rgb_array", width=240, height=240)
        folder.mkdir(parents=True, exist_ok=True)
        for number, (seed, chunks) in enumerate(episodes):
            env.reset(seed=seed)
            frames, done = [env.render()], False
            for action in chunks.reshape(len(chunks) * chunk_length, -1):
                if not done:
                    _, _, terminated, truncated, _ = env.step(action)
                    done = terminated or truncated
                    frames.append(env.render())
            imageio.v3.imwrite(folder / f"episode_{number}.mp4", np.stack(frames), fps=20, macro_block_size=16)
        sender.send(None)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {first_line(error)}")


# -------------------------------------------------------------------------------------------------------- run files


def process_context() -> multiprocessing.context.BaseContext:
    """How worker processes start: forked from a small server that imported this module and never touched the GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["common"])
    # The server finds this folder, and keeps quiet about the missing screen, through its environment alone.
    environment = {"PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "ignore"}
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    multiprocessing.forkserver.ensure_running()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})
    return context


def follow_the_parent():
    """In a worker process: leave Ctrl-C, which reaches all processes at once, to the parent, and end when that ends,
    even if it is killed."""
    parent = multiprocessing.parent_process()
    if parent and not getattr(parent, "is_followed", False):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        parent.is_followed = True


def version_of(package: str) -> str:
    """Of an installed package."""
    return importlib.metadata.version(package)


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes | Callable[[Any], None], previous: Path | None = None):
    """Write a file so that at any moment `path` holds the whole old content or the whole new one.

    content: the bytes, or a function that writes them to an open binary file. previous: where the old content is kept;
    for a moment it is there alone. Raises UserError where the disk is full or not writable; the old content is then
    still there, under one of its names.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} could not be written ({error.strerror}); what was there before is unchanged"
        ) from error


def write_from(path: Path, offset: int, content: bytes):
    """Write `content` into a file from byte `offset` on; what stands before it is not touched. Raises UserError where
    the disk is full or not writable."""
    try:
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.seek(offset)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}); --resume goes on from the checkpoint"
        ) from error


def write_npz(path: Path, arrays: dict[str, np.ndarray]):
    """Write arrays in OGBench's file format, atomically."""
    write_atomically(path, lambda file: np.savez(file, **arrays))


class PickledType:
    """In place of numpy.dtype: the type of plain numbers that a pickle names."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or not re.fullmatch(r"[fiub]\d", code):
            raise pickle.UnpicklingError(f"an array of type {code[:20] if isinstance(code, str) else '?'!r}")
        self.numbers = np.dtype(code)

    def __setstate__(self, state):
        self.numbers = self.numbers.newbyteorder(">" if state[1] == ">" else "<")


class PickledArray:
    """What arrays are made into: `array` is made of a pickle's bytes, and of nothing that it could call."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, type_, fortran, content = state
        if not isinstance(type_, PickledType) or not isinstance(content, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array that is not a plain one")
        numbers = np.frombuffer(content, type_.numbers)
        self.array = numbers.reshape(shape, order="F" if fortran else "C")


class ArraysOnly(pickle.Unpickler):
    """Reads a pickle of plain containers and NumPy or JAX arrays, each as a `PickledArray`.

    Raises UnpicklingError, with its name, for any other global: nothing that a file names is ever called.
    """

    @staticmethod
    def jax_array(function, arguments, state, _) -> PickledArray:
        """A JAX array, which is pickled as a NumPy array's three parts and something about its type."""
        array = PickledArray()
        array.__setstate__(state)
        return array

    @staticmethod
    def from_buffer(content, type_, shape, order) -> PickledArray:
        """A NumPy array as pickle's protocol 5 has it."""
        array = PickledArray()
        array.__setstate__((1, shape, type_, order == "F", content))
        return array

    def find_class(self, module: str, name: str) -> Any:
        admitted = {
            "numpy.core.multiarray._reconstruct": PickledArray,
            "numpy._core.multiarray._reconstruct": PickledArray,
            "numpy.core.numeric._frombuffer": self.from_buffer,
            "numpy._core.numeric._frombuffer": self.from_buffer,
            "numpy.core.multiarray.scalar": PickledArray,  # of which nothing is read
            "numpy._core.multiarray.scalar": PickledArray,
            "numpy.ndarray": "ndarray",
            "numpy.dtype": PickledType,
            "jax._src.array._reconstruct_array": self.jax_array,
            "collections.OrderedDict": dict,
            "flax.core.frozen_dict.FrozenDict": dict,
        }
        if f"{module}.{name}" not in admitted:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of arrays needs")
        return admitted[f"{module}.{name}"]


@np.errstate(all="ignore")  # too large a number becomes infinite, and is refused
def load_flax_actor(path: Path, flag: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The cloned policy of one of the authors' own checkpoints (params_300000.pkl), as `load_checkpoint` gives ours.

    Its domain is not in it, and is taken to be the right one. Raises UserError where it holds anything but arrays, or
    no policy of these sizes.
    """
    try:
        with open(path, "rb") as file:
            tree = ArraysOnly(file).load()
        for key in ("agent", "network", "params", "modules_actor_slow", "mlp"):
            tree = tree[key]
        layers = {"Dense": ("kernel", "bias"), "LayerNorm": ("scale", "bias")}
        count = {kind: sum(name.startswith(f"{kind}_") for name in tree) for kind in layers}
        found = [tree[f"Dense_{i}"]["kernel"].array.shape for i in range(count["Dense"])]
        chunk_dim = sizes["chunk_length"] * sizes["action_dim"]
        widths = [sizes["observation_dim"] + chunk_dim + 1, *sizes["hidden_dims"], chunk_dim]
        if found != list(itertools.pairwise(widths)) or bool(count["LayerNorm"]) != sizes["actor_layer_norm"]:
            norm = "with" if count["LayerNorm"] else "without"
            raise UserError(
                f"{flag}: {path} holds a policy of layers {found} {norm} LayerNorm, which this run's is not"
            )
        state, position = {}, 0
        for i in range(count["Dense"]):  # Linear, GELU and LayerNorm, where there is one, follow each other in `net`
            for kind in layers if i < count["LayerNorm"] else ["Dense"]:
                weight, bias = (
                    torch.from_numpy(tree[f"{kind}_{i}"][key].array.astype(np.float32)) for key in layers[kind]
                )
                state |= {f"net.{position}.weight": weight.T.contiguous() if kind == "Dense" else weight}
                state |= {f"net.{position}.bias": bias}
                position += 2 if kind == "Dense" else 1
        if not all(torch.isfinite(value).all() for value in state.values()):
            raise UserError(f"{flag}: {path} holds numbers that are not finite; use another")
        return dict(kind="bc", sizes=sizes, actor_slow=state)
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        raise UserError(
            f"{flag}: {path} is not ours, and cannot be read as one of the authors' ({first_line(error)}); use another"
        ) from error


def read_checkpoint(path: Path) -> Any:
    """What `torch.save` wrote, as plain data and tensors on the CPU. A damaged file can raise nearly anything."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with zipfile.ZipFile(path) as archive:
        if any(entry.file_size > entry.compress_size for entry in archive.infolist()):
            raise ValueError("it is compressed, which ours are not")
        damaged = archive.testzip()  # torch reads a flipped bit as a number
    if damaged:
        raise ValueError(f"the checksum of its {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_tensors(tensors: dict[str, Any], *dtypes: torch.dtype):
    """Raise ValueError where one is no finite tensor of one of these types, or larger than the bytes it holds."""
    for name, tensor in tensors.items():
        plain = isinstance(name, str) and type(tensor) is torch.Tensor and tensor.dtype in dtypes
        plain = plain and tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not plain or tensor.untyped_storage().nbytes() < tensor.nbytes:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"its {name} is no plain {kinds} tensor")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"its {name} is not finite")


def check_parts(checkpoint: dict[str, Any]):
    """Raise an error that says what is wrong where a checkpoint is not made as ours are, as far as can be told without
    the networks and the data: where a part is missing, of another type, or holds what no run writes."""
    cloned = checkpoint["kind"] == "bc"
    online = not cloned and "online_steps" in checkpoint["args"]
    if cloned:
        types = dict(sizes=dict, actor_slow=dict)
    else:
        types = dict(sizes=dict, args=dict, agent=dict, optimizer=dict, generator=torch.Tensor, step=int, rows=dict)
        types |= dict(device=str, seconds=float, dataset=dict)
        types |= dict(replay=dict, environment=dict) if online else {}
    for part, type_ in types.items():
        if part not in checkpoint:
            raise ValueError(f"it lacks {part}")
        if not isinstance(checkpoint[part], type_):
            raise ValueError(f"its {part} is of a wrong type")
    if cloned:
        return check_tensors(checkpoint["actor_slow"], torch.float32)
    rows, args, dataset = checkpoint["rows"], checkpoint["args"], checkpoint["dataset"]
    if set(rows) != {"train.csv", "eval.csv"}:  # they name files
        raise ValueError("its rows are those of other tables")
    counts = [checkpoint["step"], *rows.values(), args["bc_steps"], args["offline_steps"]]
    tensors = dict(checkpoint["agent"])
    for i, moments in checkpoint["optimizer"]["state"].items():
        tensors |= {f"{name} {i} of Adam": moments[name] for name in ("step", "exp_avg", "exp_avg_sq")}
    if online:
        environment, replay = checkpoint["environment"], checkpoint["replay"]
        counts += [environment["episode"], environment["taken"]]
        tensors |= {name: environment[name] for name in ("actions", "chunk")}
        check_tensors({"observation": environment["observation"]}, torch.float32, torch.float64)
        last = environment["last_episode"]
        reported = {"charts/online_return", "charts/online_length", "charts/online_success"} if last else set()
        if set(last) != reported or not all(type(x) in (int, float) and abs(x) < NEVER for x in last.values()):
            raise ValueError("its last_episode is of a wrong type")
        if not dataset["rotating"]:
            counts += [replay[name] for name in ("rows", "crc32", "size", "episodes")]
            check_tensors({"ends": replay["ends"]}, torch.int64)
    if any(type(count) is not int or not 0 <= count < NEVER for count in counts):
        raise ValueError("its steps or rows are no counts")
    if type(dataset["rotating"]) is not bool:
        raise ValueError("its dataset is of a wrong type")
    describe_dataset(dataset)
    check_tensors(tensors, torch.float32)


def load_checkpoint(path: str | Path, kind: str, flag: str, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint, and check all that is checked without the networks.

    kind: the program that must have written it, or "bc". sizes: what its sizes, and domain, must be.
    Raises UserError, naming `flag` and both sides, where it cannot be read or is another one.
    """
    path = Path(path)
    if kind == "bc" and path.suffix == ".pkl" and path.is_file():
        return load_flax_actor(path, flag, sizes)
    try:
        checkpoint = read_checkpoint(path)
    except FileNotFoundError as error:
        raise UserError(f"{flag}: {path} does not exist") from error
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{flag}: {path} is damaged or not a checkpoint ({first_line(error)}); use another") from error
    found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    if not isinstance(found, str) or found != kind:
        found = found if isinstance(found, str) else "foreign"
        raise UserError(f"{flag}: {path} is a {found[:40]} checkpoint, but one of {kind} is needed here")
    try:
        check_parts(checkpoint)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if of_memory(error):
            raise
        missing = "it lacks " if isinstance(error, KeyError) else ""
        raise UserError(f"{flag}: {path} is damaged: {missing}{first_line(error)}; use another") from error
    for key, value in (sizes or {}).items():
        found = checkpoint["sizes"].get(key)
        if type(found) is not type(value):
            raise UserError(f"{flag}: {path} is damaged: its {key} is of a wrong type; use another")
        if found != value:
            raise UserError(f"{flag}: {path} has {key} {found}, but this run has {key} {value}")
    return checkpoint


def of_memory(error: Exception) -> bool:
    """Whether there was too little of it; on the CPU torch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def restoring(args: Any, resumes: bool = False):
    """For the block that takes over what a checkpoint holds: UserError, with its name, where that does not fit.

    resumes: it is one of the run itself.
    """
    try:
        yield
    except (NotFinite, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        if of_memory(error):
            raise
        flag, path = ("--checkpoint", args.checkpoint) if args.checkpoint else ("--bc-checkpoint", args.bc_checkpoint)
        flag, path = ("--resume", args.run_dir) if resumes else (flag, path)
        raise UserError(
            f"{flag}: the weights or numbers in {path} do not fit this run's networks or environment; use another"
        ) from error


def restore_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]):
    """Take over Adam's moments; its settings stay this run's. Raises ValueError where they are not of its parameters'
    shapes: torch itself would write past their ends."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, moments in stored["state"].items():
        if not moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameters[i].shape or moments["step"].dim():
            raise ValueError(f"moments {i} of Adam are of another shape")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": stored["state"]})


CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")  # the newest, and the one before it


def load_newest(kept: list[Path], kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The newest of a run's checkpoints. Raises UserError where it is damaged, and names the older one, if whole."""
    try:
        return load_checkpoint(kept[0], kind, "--resume", sizes)
    except UserError as error:
        for older in kept[1:]:
            try:
                step = load_checkpoint(older, kind, "--resume", sizes)["step"]
            except UserError:
                continue
            raise UserError(
                f"{error}: {older}, of step {step}, is whole; to go on from there, rename it to {kept[0].name}"
            ) from error
        raise


def environment_sizes(env_id: str) -> tuple[int, int]:
    """(O, d): numbers in an observation and in one action. Raises UserError for an unknown id."""
    env = unplayed_env(env_id)
    return env.observation_space.shape[0], env.action_space.shape[0]


def choose_device(device: str, num_threads: int, tf32: bool = False) -> torch.device:
    """`auto`, `cpu` or `cuda` -> the device, set to `num_threads` (0: torch's choice), and, a GPU, to TF32 products or
    exact ones. Raises UserError where CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch finds no CUDA GPU here; use --device cpu or install a CUDA build of torch"
        )
    if num_threads:
        torch.set_num_threads(num_threads)
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return torch.device("cuda")


def choose_compile(choice: str, device: torch.device, updates: int) -> str:
    """Whether the update is compiled: `on` or `off`, of `auto` what pays within so many updates and works here.

    Raises UserError where it is asked for and does not work.
    """
    if choice == "off" or choice == "auto" and updates < WORTH_COMPILING:
        return "off"
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # no compiler, none of its headers, no Triton: each fails in its own way
        if choice == "on":
            raise UserError(
                f"--compile on: torch.compile does not work here ({first_line(error)}); install a C++ compiler "
                "(on a GPU: Triton), or use --compile off"
            ) from error
        print(f"not compiled, so slower: torch.compile does not work here ({first_line(error)})")
        return "off"
    print("the update is compiled, which takes a minute or two before the first one (--compile off: none)")
    return "on"


class CudaGraph:
    """An update whose many small launches on a GPU become a single one: it is recorded once, and then replayed.

    The first two calls run as they are, which compiles what is compiled, and makes the optimizer's moments; the third
    one's launches are recorded. All of them read the same copies of what they are given, as a recorded launch must.

    Args:
        update: takes named tuples of tensors (or None), of the same shapes each time, and gives named tensors or
            numbers. It must not wait for the device or draw random numbers, and must change what it changes in place.
    """

    def __init__(self, update: Callable[..., dict[str, Any]]):
        self.update, self.calls = update, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *inputs: tuple[torch.Tensor | None, ...]) -> dict[str, Any]:
        """What `update` gives; its tensors are overwritten by the next call."""
        self.calls += 1
        if self.calls == 1:
            self.inputs = [type(group)(*(x if x is None else x.clone() for x in group)) for group in inputs]
        for held, given in zip(itertools.chain(*self.inputs), itertools.chain(*inputs)):
            if given is not None:
                held.copy_(given)
        if self.calls <= 2:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.results = self.update(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return self.results
        if self.calls == 3:
            gc.collect()  # nothing that was compiled may be unloaded in the midst of recording
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.results = self.update(*self.inputs)
        self.graph.replay()
        return self.results


def flag_of(field: str) -> str:
    """`kl_budget` -> `--kl-budget`."""
    return "--" + field.replace("_", "-")


LARGEST = 10**9  # of any setting
MOST = dict(  # tighter bounds, still far beyond any use
    seed=2**32 - 1, collect_seed=2**32 - 1, num_threads=os.cpu_count() or 1, eval_episodes=10**5, best_of_n=10**5,
    collect_episodes=10**6, utd_ratio=10**4, flow_steps=10**4, num_critics=10**4, chunk_length=10**4,
    hidden_dims=10**6, batch_size=10**7,
)  # fmt: skip
NEVER = 2**62  # a step that no run reaches
WORTH_COMPILING = 10_000  # updates, within which a minute and a half of compiling is won back at every size measured

POSITIVE = set(
    "batch_size chunk_length num_critics flow_steps best_of_n hidden_dims learning_rate max_grad_norm kl_budget "
    "lam_scale lambda_min lambda_max kl_clip_coef eval_interval eval_episodes log_interval checkpoint_interval "
    "inverse_temperature utd_ratio".split()
)
NOT_NEGATIVE = set(
    "seed num_threads collect_episodes collect_seed bc_steps offline_steps online_steps learning_starts rho eta_lambda "
    "entropy_scale kl_budget_online max_data_gb".split()
)
FRACTION = {"gamma", "tau", "kl_ema_coef"}


def check_settings(args: Any):
    """Raise UserError for a setting out of its range, before any work is done."""
    for names, words, fine in (
        (POSITIVE, "greater than 0", lambda x: x > 0),
        (NOT_NEGATIVE, "0 or greater", lambda x: x >= 0),
        (FRACTION, "greater than 0 and at most 1", lambda x: 0 < x <= 1),
        ({"edit_scale"}, "between 0 and 1", lambda x: 0 <= x <= 1),
    ):
        for field in dataclasses.fields(args):
            value = getattr(args, field.name)
            values = value if isinstance(value, tuple) else (value,)
            if field.name in names and not (values and all(fine(x) and abs(x) < math.inf for x in values)):
                raise UserError(f"{flag_of(field.name)} must be {words}, not {value}")
    for field in dataclasses.fields(args):
        value, most = getattr(args, field.name), MOST.get(field.name, LARGEST)
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, (int, float)) and x > most:
                raise UserError(f"{flag_of(field.name)} must be at most {most:,}, not {x}")
            if isinstance(x, str) and (x.encode(errors="replace").decode() != x or "\0" in x):
                raise UserError(f"{flag_of(field.name)} holds bytes that are no text; rename that path")
        if typing.get_origin(field.type) is typing.Literal and value not in typing.get_args(field.type):
            raise UserError(
                f"{flag_of(field.name)} must be one of {', '.join(typing.get_args(field.type))}, not {value}"
            )
    if hasattr(args, "lambda_min") and args.lambda_min > args.lambda_max:
        raise UserError(f"--lambda-min {args.lambda_min} is greater than --lambda-max {args.lambda_max}: swap them")
    if getattr(args, "online_steps", 0) and args.learning_starts >= args.online_steps:
        raise UserError(
            f"--learning-starts {args.learning_starts} leaves no update in --online-steps {args.online_steps}: lower it"
        )
    if getattr(args, "balanced_sampling", False) and args.learning_starts < args.chunk_length:
        raise UserError(
            f"--learning-starts {args.learning_starts} leaves no whole chunk for --balanced-sampling: at least "
            f"{args.chunk_length} steps must come before the first update"
        )


def quiet_cli(args_class: type, default: Any) -> Any:
    """tyro's command line, with its boxed error messages as one line. Raises UserError for a malformed one."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            return tyro.cli(args_class, default=default)
        except SystemExit as stop:
            if not stop.code:
                raise
    lines = [line.strip("│ ") for line in stderr.getvalue().splitlines() if line.startswith("│")]
    rules = [i for i, line in enumerate(lines) if set(line) == {"─"}] + [len(lines)]
    hint = next(
        (f"; did you mean {lines[i + 1].split()[0]}?" for i, x in enumerate(lines) if "erhaps you meant" in x), ""
    )
    raise UserError(" ".join(lines[: rules[0]]) + hint + f" (see {Path(sys.argv[0]).name} --help)")


RESUME_MAY_CHANGE = set(
    "run_dir resume dataset_path dataset_dir offline_steps online_steps learning_starts utd_ratio balanced_sampling "
    "kl_budget_online device num_threads compile cuda_graph capture_video track".split()
)
EVALUATION_MAY_CHANGE = set(
    "eval_only checkpoint eval_episodes seed best_of_n device num_threads compile cuda_graph tf32 capture_video "
    "run_dir resume".split()
)
OF_ONE_SITTING = set(
    "run_dir resume eval_only checkpoint device num_threads compile cuda_graph capture_video track".split()
)
CHECKPOINT_DECIDES = set(
    "env_id sparse_reward bc_checkpoint bc_steps chunk_length hidden_dims actor_layer_norm num_critics".split()
)


def parse_args(
    args_class: type, settings: Callable[[Any], dict[str, Any]], script: str, starts_from: str | None = None
) -> Any:
    """Command line -> `args_class`. A flag that is given wins over `settings(args)`, and those over the defaults.

    settings: given the arguments so far, the values to use where no flag says otherwise (by preset and domain).
    With --resume or --eval-only the settings are those stored with the run; with a --checkpoint of `starts_from`, the
    script whose runs may go on in this one, its settings win over `settings`. Raises UserError.
    """
    args = quiet_cli(args_class, args_class())
    if args.resume and not args.run_dir:
        raise UserError("--resume needs --run-dir, the folder of the run to continue")
    if args.eval_only and not args.checkpoint or args.checkpoint and not (args.eval_only or starts_from):
        raise UserError("--eval-only and --checkpoint go together: the one evaluates the other's policy")
    if args.resume:
        config = Path(args.run_dir).expanduser() / "config.json"
        if not config.is_file():
            raise UserError(
                f"--resume: {args.run_dir} holds no run (no config.json); leave out --resume to start one there"
            )
        try:
            stored = json.loads(config.read_text())
            stored_script, stored_args = stored["script"], dict(stored["args"])
            if not isinstance(stored.get("resumed", []), list) or not isinstance(stored.get("started_from", {}), dict):
                raise ValueError("its history is of a wrong type")
            if stored_script != script:
                raise UserError(f"--resume: the run in {args.run_dir} is one of {stored_script}.py, not of {script}.py")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"--resume: {config} is damaged ({error!r}); start a new run in another folder") from error
        return override(args_class, stored_args, RESUME_MAY_CHANGE, f"--resume: the run in {args.run_dir}")
    if args.eval_only:
        stored = load_checkpoint(args.checkpoint, script, "--checkpoint")["args"]
        return override(args_class, stored, EVALUATION_MAY_CHANGE, f"--checkpoint: {args.checkpoint}")
    fields, inherited = {field.name for field in dataclasses.fields(args_class)}, {}
    if args.checkpoint:
        if args.bc_checkpoint:
            raise UserError("--checkpoint and --bc-checkpoint: a run starts from one of them; leave out the other")
        stored = load_checkpoint(args.checkpoint, starts_from, "--checkpoint")["args"]
        inherited = {key: value for key, value in stored.items() if key in fields - OF_ONE_SITTING}
        args = override(args_class, inherited, fields - CHECKPOINT_DECIDES, f"--checkpoint: {args.checkpoint}")
    for _ in range(2):  # the preset decides the environment, the environment its domain's settings
        args = quiet_cli(args_class, with_tuples(args_class, {**settings(args), **inherited}))
    split_env_id(args.env_id)
    return args


def stored_settings(args: Any) -> dict[str, Any]:
    """Settings as they are stored, and come back from JSON: with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(args)))


def with_tuples(args_class: type, stored: dict[str, Any]) -> Any:
    """Settings that were stored as JSON, which knows no tuples."""
    return args_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()})


def is_like(value: Any, default: Any) -> bool:
    """Whether a stored setting is of its default's type. JSON knows no tuples; an int may stand for a float."""
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and all(type(x) is int for x in value)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def override(args_class: type, stored: dict[str, Any], may_change: set[str], whose: str) -> Any:
    """Stored settings with the command line's on top. Raises UserError for one that may not change."""
    defaults = {field.name: field.default for field in dataclasses.fields(args_class)}
    for key, value in stored.items():
        if key not in defaults or not is_like(value, defaults[key]):
            raise UserError(f"{whose} holds the setting {key!r} as {reprlib.repr(value)}: it is damaged; use another")
    base = with_tuples(args_class, stored)
    args = quiet_cli(args_class, base)
    for key, value in dataclasses.asdict(base).items():
        if key not in may_change and getattr(args, key) != value:
            raise UserError(
                f"{whose} has {flag_of(key)} {value}, which {getattr(args, key)} cannot replace; leave that flag out"
            )
    return args


def run_script(
    main: Callable[[Any], None],
    args_class: type,
    settings: Callable[[Any], dict[str, Any]],
    script: str,
    starts_from: str | None = None,
):
    """Parse the command line (see `parse_args`) and run `main`; a UserError ends the program with its one line and
    exit status 1."""
    try:
        main(parse_args(args_class, settings, script, starts_from))
    except UserError as error:
        sys.exit("error: " + " ".join(str(error).split("\n")))
    except OSError as error:
        sys.exit(
            f"error: {error.filename or 'a file'}: {error.strerror or error}; check the path, its rights and the disk"
        )
    except (MemoryError, RuntimeError) as error:
        if "home directory" in str(error):  # of a user that a path names
            sys.exit("error: a path begins with ~ and a user that this machine does not know; write it out")
        if not of_memory(error):
            raise
        sys.exit(
            "error: out of memory; use smaller --hidden-dims, --batch-size, --num-critics, --flow-steps, "
            "--chunk-length, --best-of-n or --online-steps, or less data"
        )
    except KeyboardInterrupt:
        sys.exit(130)


EVAL_COLUMNS = ("stage", "step", "success", "success_stderr", "return", "length", "episodes")


class Run:
    """The folder and files of one training run, as a context manager.

    Args:
        script: name of the program, without `.py`.
        args: its settings.
        sizes: domain and sizes of its networks, by which its checkpoints are told from others.
        noise_dim: random numbers that its policy takes for a chunk.
        device: where it trains.
        starts_from: the script that must have written args.checkpoint, where that is set.

    Raises UserError where the folder already holds files and args.resume is not set.

    Attributes:
        path: the folder.
        checkpoint: what `save` wrote last, when resuming; else what args.checkpoint holds, the end of another script's
            run that goes on in this one; else None.
        rows: of eval.csv and train.csv so far, those of that other run included.
        stopping: the number of the signal, SIGINT or SIGTERM, that asks to save and stop; 0: none does.
    """

    def __init__(
        self,
        script: str,
        args: Any,
        sizes: dict[str, Any],
        noise_dim: int,
        device: torch.device,
        starts_from: str | None = None,
    ):
        self.script, self.args, self.sizes, self.noise_dim, self.device = script, args, sizes, noise_dim, device
        name = f"{args.env_id}__{script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.path = Path(args.run_dir or Path("runs") / name).expanduser()
        if self.path.exists() and not args.resume:
            # A run that was killed at once leaves only its lock, and perhaps a hidden file half written.
            if not self.path.is_dir() or any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise UserError(
                    f"--run-dir: {self.path} is not empty; name another folder, or continue its run with --resume"
                )
        if args.track and importlib.util.find_spec("wandb") is None:
            raise UserError("--track needs Weights & Biases: pip install wandb")
        kept, self.checkpoint = [self.path / name for name in CHECKPOINTS if (self.path / name).exists()], None
        self.resumes = args.resume and bool(kept)
        if self.resumes:
            self.checkpoint = load_newest(kept, script, sizes)
            self.check_steps("--resume")
            for key, value in stored_settings(args).items():
                if key not in RESUME_MAY_CHANGE and self.checkpoint["args"].get(key, value) != value:
                    raise UserError(
                        f"--resume: {self.path / 'config.json'} is damaged: it has {flag_of(key)} {value}, but the "
                        f"checkpoint {reprlib.repr(self.checkpoint['args'][key])}; put that back"
                    )
            there = self.checkpoint["device"]
            if there != device.type:
                raise UserError(
                    f"--resume: the run began on {there}, and only there goes on exactly; use --device {there}"
                )
        elif args.checkpoint:
            self.checkpoint = load_checkpoint(args.checkpoint, starts_from, "--checkpoint", sizes)
            self.check_steps("--checkpoint")
        self.evaluator = self.writer = self.bar = self.lock = None
        self.config, self.stopping = {}, 0
        self.started = time.perf_counter()
        self.steps_since_log = self.updates_since_log = self.stage_step = 0
        self.watched, self.bad_since, self.stage = [], None, ""  # names of statistics, their first bad steps
        self.seconds = self.checkpoint["seconds"] if self.resumes else 0.0  # of earlier sittings
        self.columns = {"train.csv": ["stage", "step", "charts/SPS"], "eval.csv": list(EVAL_COLUMNS)}
        self.rows = {"train.csv": [], "eval.csv": []}
        tables = self.path if self.resumes or not self.checkpoint else Path(args.checkpoint).parent
        for name, count in (self.checkpoint["rows"] if self.checkpoint else {}).items():
            if not self.resumes and not (tables / name).exists():
                continue  # another run's checkpoint may come without its tables
            columns, rows = read_csv(tables / name)
            needed = EVAL_COLUMNS[1:] if name == "eval.csv" else ("step",)
            if len(rows) < count or not all(is_row(row, needed) for row in rows[:count]):
                raise UserError(
                    f"{tables / name} is damaged: the {count} rows that its checkpoint was written with are not all "
                    "there; start a new run in another folder"
                )
            if count:  # rows written after the checkpoint will be written again
                self.columns[name], self.rows[name] = columns, rows[:count]

    def check_steps(self, flag: str):
        """Raise UserError where the steps asked for are fewer than those done, or make one stage's steps another's."""
        args, done, stored = self.args, self.checkpoint["step"], self.checkpoint["args"]
        bc_steps = 0 if args.bc_checkpoint else args.bc_steps
        ended, ends = bc_steps + stored["offline_steps"], bc_steps + args.offline_steps
        if max(0, done - ended) != max(0, done - ends) or ends + getattr(args, "online_steps", 0) < done:
            online = f" and {done - ended} online" if done > ended else ""
            raise UserError(
                f"{flag}: the run has done {min(done, ended) - bc_steps} offline{online} steps, which the numbers of "
                "steps asked for now do not hold; ask for at least as many, and change --offline-steps only before "
                "going online"
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback):
        if self.evaluator:
            self.evaluator.close(at_once=kind is not None)
        with contextlib.suppress(OSError if error else ()):  # of a full disk, which has been told
            for part in (self.bar, self.lock, self.writer):
                if part:
                    part.close()
        self.restore_signals()
        if (kind is KeyboardInterrupt or self.stopping) and self.writer:
            print(f"\nstopped; continue with --run-dir {self.path} --resume", file=sys.stderr)
        if isinstance(error, OSError) and self.writer:
            raise UserError(
                f"{error.filename or self.path}: {error.strerror or error}; mend that, and continue with --run-dir "
                f"{self.path} --resume"
            ) from error
        if kind is NotFinite:
            self.check_finite({})  # an update that was not finite before is the cause, and named instead
            raise UserError(f"{error}: training diverged, or the simulation did; {self.way_out()}") from error

    def open(self):
        """Make the folder, with config.json, or open the one to resume: from here on the run can be resumed."""
        if self.writer:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--run-dir: {self.path} cannot be made ({error.strerror}); name another folder") from error
        self.lock = open(self.path / ".lock", "a")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"--run-dir: another process is running in {self.path}; wait for it, or name another"
            ) from error
        sitting = dict(
            command=" ".join(sys.argv),
            git_commit=git_commit(),
            versions={p: version_of(p) for p in ("torch", "numpy", "ogbench", "gymnasium", "mujoco")}
            | {"python": platform.python_version()},
            hardware=dict(
                cpu=cpu_name(),
                cores=os.cpu_count(),
                threads=torch.get_num_threads(),
                platform=platform.platform(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            ),
        )
        config = self.path / "config.json"
        settings = dataclasses.asdict(self.args)
        done = self.checkpoint["step"] if self.checkpoint else 0
        if config.exists():
            self.config = json.loads(config.read_text())
            started = self.config.get("started_from")
            if started and not self.resumes and started["sha256"] != file_hash(Path(self.args.checkpoint)):
                raise UserError(f"--resume: {self.args.checkpoint} has changed since the run began from it; start anew")
            self.record(args=settings, resumed=[*self.config.get("resumed", []), dict(step=done, **sitting)])
        else:
            if self.checkpoint:
                start = Path(self.args.checkpoint)
                sitting |= dict(started_from=dict(checkpoint=str(start), step=done, sha256=file_hash(start)))
            self.record(script=self.script, args=settings, dataset=None, **sitting)

        for name in self.rows:
            self.write_table(name)
        if self.args.track:
            import wandb

            wandb.init(project="trqam", name=self.path.name, config=settings, sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard's own thread fails where the disk is full, and so does then what calls it: that one says so.
        threading.excepthook = lambda fault: isinstance(fault.exc_value, OSError) or threading.__excepthook__(fault)
        self.writer = SummaryWriter(str(self.path), purge_step=done + 1 if self.args.resume else None)
        if not self.resumes:
            table = "\n".join(f"|{key}|{value}|" for key, value in settings.items())
            self.writer.add_text("hyperparameters", f"|setting|value|\n|-|-|\n{table}")

    def record(self, **facts):
        """Add facts to config.json."""
        self.config |= facts
        write_atomically(self.path / "config.json", json.dumps(self.config, indent=1).encode())

    def load_dataset(self) -> ReplayBuffer:
        """`load_dataset` with this run's settings; its origin goes into config.json, and both are printed."""
        args = self.args
        if args.collect_episodes and not args.dataset_path:
            dataset_name = split_env_id(args.env_id)[1]
            transitions = args.collect_episodes * (official_size(dataset_name)[1] - 1)
            if max(args.batch_size, args.chunk_length) > transitions:
                raise UserError(
                    f"--batch-size and --chunk-length must be at most the {transitions} transitions collected"
                )
            check_collection(dataset_name, args.dataset_dir)
            if not collected_path(dataset_name, args.collect_episodes, args.collect_seed, args.dataset_dir).exists():
                self.open()  # collecting is long; data that is there is read, and checked, before a folder is made
        dataset, origin = load_dataset(
            args.env_id,
            chunk_length=args.chunk_length,
            gamma=args.gamma,
            sparse=args.sparse_reward,
            device=self.device,
            dataset_path=args.dataset_path,
            dataset_dir=args.dataset_dir,
            collect_episodes=args.collect_episodes,
            collect_seed=args.collect_seed,
            max_data_gb=args.max_data_gb,
            rotating=self.checkpoint["dataset"].get("rotating") if self.resumes else None,
            drawn=self.checkpoint["step"] if self.resumes else 0,
        )
        dataset.make_room(getattr(args, "online_steps", 0))
        if args.batch_size > dataset.size:
            raise UserError(f"--batch-size {args.batch_size} is larger than the dataset's {dataset.size} transitions")
        began = self.checkpoint["dataset"] if self.resumes else origin
        if began["sha256"] != origin["sha256"]:
            raise UserError(
                f"--resume: the run began on {describe_dataset(began)}, and this is {describe_dataset(origin)}"
            )
        if self.resumes and self.checkpoint.get("replay"):
            dataset.load(self.path / "replay.bin", self.checkpoint["replay"])
        self.open()
        self.record(dataset=origin)
        print(f"run: {self.path}")
        print("settings: " + ", ".join(f"{key} {value}" for key, value in self.config["args"].items() if value != ""))
        if origin["rotating"]:
            print(f"{len(origin['files'])} files take turns on the device, {dataset.BATCHES_PER_FILE:,} batches each")
        print(f"data: {describe_dataset(origin)}; the task is done in {origin['success_fraction']:.2%} of its rows")
        if origin["success_fraction"] == 0:
            print("note: no row of the data solves this task, so its reward is never the highest; training goes on")
        return dataset

    def announce(self, stage: str, steps: int, one_update: Callable[[], dict[str, torch.Tensor]]):
        """Time a few updates and print how long the `steps` that are left will take."""
        if steps <= 0:
            return
        for _ in range(4):  # the last one counts
            start = time.perf_counter()
            float(next(iter(one_update().values())))  # reading a statistic waits for the device
            seconds = time.perf_counter() - start
        print(
            f"{stage}: {steps:,} updates, about {duration(steps * seconds)} ({1 / seconds:.1f}/s) without evaluations"
        )

    def begin(self, step: int, total: int):
        """Show progress from `step` to `total`; from here on, a first Ctrl-C or SIGTERM only asks to save and stop."""
        self.step = step
        self.bar = tqdm(total=total, initial=step, unit="step", desc="training", **PROGRESS)
        self.last_log = time.perf_counter()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.ask_to_stop)

    def ask_to_stop(self, number: int, frame: Any):
        """Note a signal, and let the next one end the program at once."""
        self.stopping = number
        self.restore_signals()
        # Not print, which the signal may have interrupted.
        os.write(2, b"\nstopping after this step, or this evaluation; once more ends at once\n")

    def restore_signals(self):
        """Ctrl-C or SIGTERM end the program."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)

    def tick(self, stage: str, step: int, statistics: dict[str, Any], updates: int = 1):
        """Count one step, `step` of `stage`: an update, or, online, a step in the environment with its updates.

        Records on the device, without waiting for it, the first step at which each statistic was not finite.
        """
        self.step += 1
        self.stage, self.stage_step = stage, step
        self.steps_since_log += 1
        self.updates_since_log += updates
        tensors = {key: value for key, value in statistics.items() if isinstance(value, torch.Tensor)}
        if tensors:
            finite = torch.isfinite(torch.stack([*tensors.values()]))  # [n]
            if self.watched != [*tensors]:
                self.watched, self.bad_since = [*tensors], torch.full(finite.shape, NEVER, device=finite.device)
            self.bad_since = torch.where(finite, self.bad_since, self.bad_since.clamp(max=self.step))
        self.bar.update()

    def check_finite(self, weights: dict[str, torch.Tensor]):
        """Raise UserError, with its name and step, for the first statistic that was not finite, or else for the first
        of `weights`. Waits for the device."""
        steps = self.bad_since.tolist() if self.watched else []
        finite = torch.stack([torch.isfinite(weight).all() for weight in weights.values()]).tolist() if weights else []
        bad = next((name for name, fine in zip(weights, finite) if not fine), None)
        step = self.stage_step
        if min(steps, default=NEVER) < NEVER:
            bad = self.watched[steps.index(min(steps))]
            step -= self.step - min(steps)
        if bad:
            raise UserError(f"{bad} is not finite at step {step} of {self.stage}: training diverged; {self.way_out()}")

    def way_out(self) -> str:
        """What to do after something was not finite, in words."""
        kept = self.path / CHECKPOINTS[0]
        before = f"{kept} is" if kept.exists() else "no checkpoint is"
        return f"try a lower --learning-rate in a new run ({before} from before it)"

    def log(self, statistics: dict[str, Any]):
        """Write a row of train.csv, and to TensorBoard, for the newest step. Waits for the device."""
        self.check_finite({})
        row = {key: float(value) for key, value in statistics.items()}
        seconds = time.perf_counter() - self.last_log
        row["charts/SPS"] = self.steps_since_log / seconds
        if "charts/environment_SPS" in row:
            seconds -= self.steps_since_log / row["charts/environment_SPS"]
            row["charts/update_SPS"] = self.updates_since_log / seconds
        for key, value in row.items():
            self.writer.add_scalar(key, value, self.step)
        self.append("train.csv", {"stage": self.stage, "step": self.stage_step, **row})
        self.last_log, self.steps_since_log, self.updates_since_log = time.perf_counter(), 0, 0

    def evaluate(
        self, stage: str, step: int, policy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> dict[str, float]:
        """Evaluate a policy (see `Evaluator`), write a row of eval.csv and redraw the learning curve."""
        paused = time.perf_counter()
        self.check_finite({})
        if self.evaluator is None:
            self.start_evaluator()
        try:
            scores = self.evaluator.evaluate(policy, self.args.best_of_n)
        except NotFinite as error:
            raise NotFinite(f"at step {step} of {stage}, {error}") from error
        self.append("eval.csv", {"stage": stage, "step": step, **{key: scores[key] for key in EVAL_COLUMNS[2:]}})
        for key, value in scores.items():
            self.writer.add_scalar(
                f"charts/{key}" if key.startswith("success") else f"charts/episodic_{key}", value, self.step
            )
        self.bar.set_postfix(success=f"{scores['success']:.2f}")
        self.draw()
        self.last_log += time.perf_counter() - paused  # updates per second leave evaluations out
        return scores

    def start_evaluator(self):
        args = self.args
        self.evaluator = Evaluator(args.env_id, args.chunk_length, args.eval_episodes, args.seed, self.noise_dim)

    def append(self, name: str, row: dict[str, Any]):
        """Add a row to a table; a column it has not had before is added to the earlier rows too, empty."""
        new = [key for key in row if key not in self.columns[name]]
        self.columns[name] += new
        self.rows[name].append({key: str(value) for key, value in row.items()})
        if new:
            self.write_table(name)
            return
        try:
            with open(self.path / name, "a", newline="") as file:
                file.write(csv_text(self.columns[name], self.rows[name][-1:], header=False))
        except OSError as error:
            raise UserError(
                f"{self.path / name} could not be written ({error.strerror}); --resume goes on from the checkpoint"
            ) from error

    def write_table(self, name: str):
        write_atomically(self.path / name, csv_text(self.columns[name], self.rows[name]).encode())

    def save(self, **state):
        """Write checkpoint.pt: `state`, which `self.checkpoint` gives back after a restart, and what the logs need.

        Ends the program where a signal asked for that.
        """
        self.check_finite(state["agent"])
        buffer = io.BytesIO()
        rows = {name: len(rows) for name, rows in self.rows.items()}
        torch.save(
            dict(
                kind=self.script,
                sizes=self.sizes,
                args=stored_settings(self.args),
                step=self.step,
                device=self.device.type,
                rows=rows,
                seconds=self.elapsed(),
                dataset=self.config["dataset"],
                **state,
            ),
            buffer,
        )
        newest, previous = (self.path / name for name in CHECKPOINTS)
        write_atomically(newest, buffer.getvalue(), previous)
        if self.stopping:
            sys.exit(128 + self.stopping)

    def save_bc(self, actor_slow: dict[str, torch.Tensor]):
        """Write bc_checkpoint.pt: the behaviour-cloned policy, for all tasks of the domain and all scripts."""
        self.check_finite(actor_slow)
        buffer = io.BytesIO()
        torch.save(
            dict(kind="bc", sizes=self.sizes, steps=self.step, dataset=self.config["dataset"], actor_slow=actor_slow),
            buffer,
        )
        write_atomically(self.path / "bc_checkpoint.pt", buffer.getvalue())

    def elapsed(self) -> float:
        """Seconds this run has taken, all sittings together."""
        return self.seconds + time.perf_counter() - self.started

    def draw(self):
        """learning_curve.png, over fine-tuning: success, path KL (against its budget, where there is one), and lambda,
        where it moves."""
        from matplotlib.figure import Figure

        evals, train = ([row for row in self.rows[name] if row["stage"] != "bc"] for name in ("eval.csv", "train.csv"))
        prior = [row for row in self.rows["eval.csv"] if row["stage"] == "bc"][-1:]
        moves = any(row.get("trust_region/lambda") for row in train)
        figure = Figure(figsize=(13, 3.6), layout="constrained")
        success, kl, *lam = axes = figure.subplots(1, 2 + moves)
        online_from = self.args.offline_steps
        steps_of = lambda rows: [int(row["step"]) + online_from * (row["stage"] == "online") for row in rows]
        x = [0] * len(prior) + steps_of(evals)
        y, e = (np.array([float(row[key]) for row in prior + evals]) for key in ("success", "success_stderr"))
        method = "QAM-E" if getattr(self.args, "edit_scale", 0) else self.script.split("_")[0].upper()
        success.plot(x, y, marker="o", ms=3, label=method)
        success.fill_between(x, y - e, y + e, alpha=0.25, lw=0)
        if prior:
            success.axhline(float(prior[-1]["success"]), color="0.4", ls="--", label="behaviour cloning")
        success.set(title=f"success, {self.args.eval_episodes} episodes (band: standard error)", ylim=(-0.03, 1.03))
        for axis, key, style in (
            (kl, "path_kl", dict(color="C0", lw=0.8, alpha=0.4, label="realised, single batches")),
            (kl, "path_kl_ema", dict(color="C0", label="realised (average)")),
            (kl, "closed_form_kl", dict(color="C2", lw=0.8, label="closed form")),
            (kl, "kl_budget", dict(color="C3", ls="--", label="budget")),
            *((axis, "lambda", dict(color="C1")) for axis in lam),
        ):
            logged = [row for row in train if row.get(f"trust_region/{key}")]
            if logged:
                axis.plot(steps_of(logged), [float(row[f"trust_region/{key}"]) for row in logged], **style)
        kl.set(title="path-space KL to the prior, nats per action", yscale="log")
        for axis in lam:
            axis.set(title="lambda", yscale="log")
        for axis in axes:
            if axis.get_legend_handles_labels()[1]:
                axis.legend(fontsize=8)
            if any(row["stage"] == "online" for row in train + evals):
                axis.axvline(online_from, color="0.4", ls=":")
                axis.annotate(" online", (online_from, 0.01), xycoords=("data", "axes fraction"), fontsize=8)
            axis.set_xlabel("fine-tuning steps")
            axis.grid(alpha=0.3)
        figure.suptitle(
            f"{self.args.env_id}, seed {self.args.seed}\n{describe_dataset(self.config['dataset'])}", fontsize=9
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        write_atomically(self.path / "learning_curve.png", buffer.getvalue())

    def finish(self, policy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        """Film the last evaluation, if asked for, and print what the run came to."""
        self.restore_signals()
        self.bar.close()
        if self.args.capture_video:
            if self.evaluator is None:  # resumed after its last evaluation
                self.start_evaluator()
                self.evaluator.evaluate(policy, self.args.best_of_n)
            self.evaluator.film(self.path / "videos")
        print(f"\n{self.args.env_id}, seed {self.args.seed}; {describe_dataset(self.config['dataset'])}")
        print(f"{'':24}{'success':>16}{'return':>10}{'length':>9}")
        last = {row["stage"]: row for row in self.rows["eval.csv"]}  # of each stage
        for row in last.values():
            label = "behaviour cloning" if row["stage"] == "bc" else f"{row['stage']} {int(row['step']):,}"
            score = f"{float(row['success']):.2f} ± {float(row['success_stderr']):.2f}"
            print(f"{label:24}{score:>16}{float(row['return']):>10.1f}{float(row['length']):>9.1f}")
        newest = next((row for row in self.rows["train.csv"][::-1] if row.get("trust_region/path_kl")), {})
        value = lambda key: float(newest[f"trust_region/{key}"])
        if newest.get("trust_region/kl_budget"):
            budget, lam = value("kl_budget"), value("lambda")
            print(f"path KL {value('path_kl_ema'):.3f} (average) against a budget of {budget:.3f}; lambda {lam:.3f}")
        elif newest:
            print(f"path KL {value('path_kl'):.3f} in the last batch; nothing bounds it")
        online = [row for row in self.rows["train.csv"] if row.get("charts/environment_SPS")]
        if online:
            environment, updates = (
                f"{float(online[-1][f'charts/{key}_SPS']):.1f}" for key in ("environment", "update")
            )
            print(
                f"online: {environment} steps/s in the environment alone, {updates} updates/s in the rest of the time"
            )
        print(f"{self.elapsed() / 60:.1f} minutes; curve: {self.path / 'learning_curve.png'}")


def evaluate_checkpoint(args: Any, noise_dim: int, policy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
    """Evaluate a finished policy and print the result; with args.capture_video, film it beside its checkpoint."""
    evaluator, finished = Evaluator(args.env_id, args.chunk_length, args.eval_episodes, args.seed, noise_dim), False
    try:
        scores = evaluator.evaluate(policy, args.best_of_n)
        words = ", ".join(
            f"{key} {scores[key]:.3f} ± {scores[key + '_stderr']:.3f}" for key in ("success", "return", "length")
        )
        print(f"{args.env_id}, {scores['episodes']} episodes: {words}")
        if args.capture_video:
            evaluator.film(Path(args.checkpoint).parent / "videos")
        finished = True
    except NotFinite as error:
        raise UserError(f"--checkpoint: {args.checkpoint}: {error}; use another") from error
    finally:
        evaluator.close(at_once=not finished)


def csv_text(columns: list[str], rows: Iterable[dict[str, Any]], header: bool = True) -> str:
    """Rows as csv; a column that a row lacks stays empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows) of a table; both empty where there is none."""
    try:
        table = csv.DictReader(io.StringIO(path.read_text() if path.is_file() else ""))
        return list(table.fieldnames or []), list(table)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); start a new run in another folder") from error


def is_row(row: dict[str, str], needed: Iterable[str]) -> bool:
    """Whether a table's row has a stage, these numbers, and nothing else but numbers."""
    try:
        numbers = [*needed, *(key for key in row if key != "stage" and row[key])]
        return (
            bool(row["stage"])
            and row["step"].isdigit()
            and int(row["step"]) < NEVER
            and all(math.isfinite(float(row[key])) or key.endswith("stderr") for key in numbers)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def duration(seconds: float) -> str:
    """In words, in the unit that fits."""
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"


def git_commit() -> str | None:
    """Commit of the code that runs, with "+changes" where the tree differs from it; None outside a git checkout."""
    git = lambda *words: subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True
    )
    try:
        commit = git("rev-parse", "HEAD").stdout.strip()
        return commit and commit + ("+changes" if git("status", "--porcelain", "-uno").stdout.strip() else "") or None
    except OSError:
        return None


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()
