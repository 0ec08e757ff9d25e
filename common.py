"""What a run needs beside the algorithm, in five rooms: environments, data, collecting, evaluation,
run files. The scripts share this file and nothing else; nothing of the algorithm stands here.

To copy an algorithm into a project with data of its own, take `Batch` and `ChunkDataset`: they need
torch and NumPy alone. To train a script on a task of its own, call `register_task`.
"""

import sys

if sys.platform == "win32" or not (3, 11) <= sys.version_info:
    sys.exit("error: this needs Linux or macOS (on Windows: WSL), and Python 3.11 or newer")

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
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import typing
import urllib.request
import zipfile
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path, PosixPath
from typing import Annotated, Any, ClassVar, Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import tyro
from tqdm import tqdm

SHOWN = getattr(sys.stderr, "isatty", bool)()
PROGRESS = dict(dynamic_ncols=True, mininterval=0.5 if SHOWN else 20, disable=sys.stderr is None)


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do."""


class NotFinite(UserError):
    """A number that is not finite."""


def require(holds: Any, words: str):
    """Raise UserError, with these words, where something that must hold does not."""
    if not holds:
        raise UserError(words)


def require_finite(name: str, numbers: Any):
    """Raise NotFinite for an array, tensor or number that is not finite. Waits for the device."""
    if not torch.isfinite(torch.as_tensor(numbers)).all():
        raise NotFinite(f"{name} is not finite")


def one_line(error: BaseException) -> str:
    """What an error says, or else its type, to stand within our own one line."""
    said = getattr(error, "strerror", None) or error
    return " ".join(str(said).split())[:300] or type(error).__name__


@contextlib.contextmanager
def telling(what: str, way: str, kinds: type | tuple[type, ...] = Exception):
    """Errors of these kinds become a UserError: what failed, why, and the way out."""
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) and kinds is Exception:
            raise  # it says all that already
        raise UserError(f"{what} ({one_line(error)}); {way}") from error


# ------------------------------------------------------------------------------------ environments
# OGBench's single-task environments, and tasks of one's own, with resets that a seed decides.
# A copier needs `register_task`, and `make_env` to see what it makes.

TASKS: dict[str, tuple[Callable, Callable]] = {}  # env_id -> make_env, load_arrays


def register_task(env_id: str, make_env: Callable, load_arrays: Callable):
    """Let `--env-id env_id` name a task of one's own, with Box spaces of one dimension.

    make_env: takes gymnasium.make's keyword arguments (such as `render_mode`) -> gymnasium.Env.
        Actions are rescaled by Gymnasium's wrapper where their space is not [-1, 1].
    load_arrays: () -> dict of the arrays that `ChunkDataset.from_transitions` takes.
    """
    TASKS[env_id] = make_env, load_arrays
    unplayed_env.cache_clear()  # of another by that name


@functools.cache
def import_ogbench():
    """Gymnasium with OGBench's environments, which importing it registers -> both modules."""
    import gymnasium
    import ogbench

    gymnasium.logger.min_level = gymnasium.logger.ERROR  # its checks warn at each environment
    return gymnasium, ogbench


@functools.cache
def known_env_ids() -> list[str]:
    """All state-based single-task OGBench ids, for the types of dataset that OGBench publishes."""
    gymnasium, _ = import_ogbench()
    types = {"maze": ("navigate", "stitch", "explore"), "soccer": ("navigate", "stitch")}
    ids = []
    for name in gymnasium.registry:
        if "-singletask-" in name and not name.startswith("visual-"):
            head, tail = name.split("-singletask-")
            kinds = next((types[key] for key in types if key in head), ("play", "noisy"))
            ids += [f"{head}-{kind}-singletask-{tail}" for kind in kinds]
    return ids


def split_env_id(env_id: str) -> tuple[str, str]:
    """`scene-play-singletask-task1-v0` -> environment `scene-singletask-task1-v0`, dataset
    `scene-play-v0`. Raises UserError, with the nearest known id, for an unknown one."""
    if env_id not in known_env_ids():
        nearest = difflib.get_close_matches(env_id, known_env_ids(), n=1, cutoff=0)[0]
        raise UserError(f"--env-id: unknown environment {env_id!r}; did you mean {nearest!r}?")
    name = re.fullmatch(r"(.+)-([a-z]+)-(singletask(?:-task\d)?)-(v\d)", env_id)
    return f"{name[1]}-{name[3]}-{name[4]}", f"{name[1]}-{name[2]}-{name[4]}"


def domain_of(env_id: str) -> str:
    """`scene-play-singletask-task1-v0` -> `scene-play`: what its five tasks, and a prior, share."""
    return env_id.split("-singletask")[0]


def with_seeded_resets(env):
    """Make `reset(seed=...)` decide the whole episode: OGBench's resets also draw from NumPy's
    global generator, and take steps of an action space that is made anew, unseeded, each time."""
    import gymnasium

    base, space = env.unwrapped, env.unwrapped.action_space
    if isinstance(getattr(type(base), "action_space", None), property):
        # No attribute of an instance hides a property: only a class of its own can.
        base.__class__ = type("Seeded", (type(base),), {"action_space": space})

    class SeededReset(gymnasium.Wrapper):
        def reset(self, *, seed: int | None = None, options: dict | None = None):
            if seed is not None:
                np.random.seed(seed)
                space.seed(seed)
            return self.env.reset(seed=seed, options=options)

    return SeededReset(env)


def make_seeded(name: str, **kwargs):
    """OGBench's environment of that name -> gymnasium.Env. MuJoCo is told to load no renderer, so
    that none which a variable names can stop it, unless `kwargs` ask for a `render_mode`."""
    gymnasium, _ = import_ogbench()
    with patch.dict(os.environ, {} if "render_mode" in kwargs else {"MUJOCO_GL": "disable"}):
        return with_seeded_resets(gymnasium.make(name, **kwargs))


def make_env(env_id: str, own: Callable | None = None, **kwargs):
    """The environment of a task, actions in [-1, 1], seeded resets -> gymnasium.Env. own:
    makes a task that was registered, for worker processes, where it is not. Raises UserError for an
    unknown id, and for spaces that are no Box of one dimension."""
    import gymnasium

    own, _ = TASKS.get(env_id, (own, None))
    if not own:
        return make_seeded(split_env_id(env_id)[0], **kwargs)
    env = own(**kwargs)
    for space in (env.observation_space, env.action_space):
        require(isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1,
                f"{env_id} has the space {space}; it must be a Box of one dimension")
    require(env.action_space.is_bounded(), f"{env_id}: the Box of its actions must have bounds")
    if (env.action_space.low != -1).any() or (env.action_space.high != 1).any():
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return with_seeded_resets(env)


@functools.cache
def unplayed_env(env_id: str):
    """One environment of a task, for its sizes and for relabelling: making one takes a second."""
    return make_env(env_id)


class OnlineEnvironment:
    """The environment that a policy collects in, one step at a time. Episode i is decided by (seed,
    i) and the actions taken, so that a stopped run plays its running episode again.

    Attributes:
        observation: [O], the current one.
        chunk: [n, d], what is left of the action chunk in execution; the caller's.
    """

    def __init__(self, env_id: str, seed: int):
        self.env, self.seed, self.last_episode = make_env(env_id), seed, {}
        self.steps, self.seconds = 0, 0.0  # of this sitting
        self.begin(0)

    def begin(self, episode: int):
        """Start an episode."""
        self.episode, self.rewards, self.actions = episode, [], []
        self.chunk = np.empty((0, *self.env.action_space.shape), dtype=np.float32)
        # SeedSequence takes missing numbers as 0: the 2 tells this episode from an evaluated one.
        seed = np.random.SeedSequence([self.seed, episode, 2]).generate_state(1)[0]
        self.observation, _ = self.env.reset(seed=int(seed))

    def step(self, action: np.ndarray) -> tuple:
        """Execute an action [d]; an episode that ends drops its chunk, and is followed by the next.

        Returns the transition, as `ChunkDataset.append` takes it: its mask is 0 where the episode
        terminated, and 1 where only its time was up. Raises NotFinite.
        """
        start, observation = time.perf_counter(), self.observation
        require_finite("the environment's action", action)
        self.observation, reward, terminated, truncated, info = self.env.step(action)
        require_finite("the environment's observation", self.observation)
        require_finite("the environment's reward", float(reward))
        self.rewards.append(float(reward))
        self.actions.append(action)
        done = bool(terminated or truncated)
        transition = observation, action, float(reward), 1.0 - terminated, self.observation, done
        if done:
            episode = {"return": sum(self.rewards), "length": len(self.rewards)}
            episode |= {"success": float(info["success"])} if "success" in info else {}
            self.last_episode = {f"charts/online_{key}": value for key, value in episode.items()}
            self.begin(self.episode + 1)
        self.steps, self.seconds = self.steps + 1, self.seconds + time.perf_counter() - start
        return transition

    def report(self) -> dict[str, float]:
        """The newest finished episode, and the steps per second of the environment alone."""
        return {"charts/environment_SPS": self.steps / self.seconds, **self.last_episode}

    def state_dict(self) -> dict[str, Any]:
        actions = np.array(self.actions, np.float32).reshape(-1, *self.env.action_space.shape)
        arrays = dict(actions=actions, chunk=self.chunk, observation=self.observation)
        numbers = dict(episode=self.episode, last_episode=self.last_episode)
        return numbers | {name: torch.tensor(array) for name, array in arrays.items()}

    def load_state_dict(self, state: dict[str, Any]):
        """Return to a state, by playing its running episode again. Says so where that ends
        elsewhere, as on another processor."""
        self.begin(state["episode"])
        for action in state["actions"].numpy():
            if self.step(action)[-1]:
                break  # it ended, which it had not
        self.last_episode, self.steps, self.seconds = state["last_episode"], 0, 0.0
        if np.array_equal(self.observation, state["observation"].numpy()):
            self.chunk = state["chunk"].numpy()
        else:
            print("note: this machine plays the running episode otherwise; the run ends otherwise")


# -------------------------------------------------------------------------------------------- data
# Transitions on one device, sampled as action chunks, and where they come from. A copier needs
# `Batch` and `ChunkDataset` (`ChunkDataset.from_transitions` for the usual layout).


class Batch(NamedTuple):
    """B action chunks with their n-step returns, on the training device (float32)."""

    observation: torch.Tensor  # [B, O], s: where the chunk starts
    action: torch.Tensor  # [B, c*d], a: its c actions, flattened
    reward: torch.Tensor  # [B], R: their discounted sum of rewards
    mask: torch.Tensor  # [B], m: 0 where the task was done within the chunk: nothing follows
    next_observation: torch.Tensor  # [B, O], s': where the chunk ends
    valid: torch.Tensor  # [B], 0 where an episode ended before the chunk's last action


class ChunkDataset:
    """Transitions on one device, sampled as action chunks; online, more are appended.

    Holds the rows of OGBench's files as they are: each episode's final state is a row of its own,
    marked in `terminals`, so that the next observation is the next row and is not stored twice. A
    *transition* is a row that is not an episode's last. Transitions as Gymnasium, D4RL and Minari
    have them go through `from_transitions`.

    Args (arrays, lists or tensors):
        observations: [M, O], actions: [M, d] in [-1, 1], rewards: [M], masks: [M] (0 where the task
            is done, else 1), terminals: [M], true at each episode's last row, its final state.
        chunk_length: c, from 1 to the longest episode's transitions.
        gamma: discount per step, in (0, 1].
        sparse: replace every reward that is not 0 by -1.
        device: where the data lives; batches come to their generator's device.

    Raises ValueError, with the array's name and the way out, for what does not fit or cannot be
    meant. Attributes: size, the number of transitions; offline_size, those not appended.
    """

    ARRAYS = ("observations", "actions", "rewards", "masks")

    def __init__(self, observations, actions, rewards, masks, terminals, chunk_length: int,
                 gamma: float, sparse: bool = False, device: torch.device | str = "cpu"):
        arrays = observations, actions, rewards, masks, terminals
        arrays = [x if isinstance(x, torch.Tensor) else np.asarray(x) for x in arrays]
        arrays = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in arrays]
        check_arrays(dict(zip((*self.ARRAYS, "terminals"), arrays)))
        self.observations, self.actions, self.rewards, self.masks, terminals = arrays
        self.actions = self.actions.clamp(-1 + 1e-5, 1 - 1e-5)
        self.rewards = -(self.rewards != 0).float() if sparse else self.rewards
        terminals = terminals.clone()
        terminals[-1] = 1.0  # the last row of all ends an episode in any case
        final = terminals.nonzero().flatten()  # [episodes], rows
        # Transitions are numbered without the final states: episode e's last one is ends[e] - 1.
        self.ends = final - torch.arange(len(final), device=device)  # [episodes]
        self.episodes = self.offline_episodes = len(final)  # the running one has this number
        self.size = self.offline_size = len(terminals) - len(final)
        self.chunk_length, self.gamma, self.sparse = chunk_length, gamma, sparse
        longest = int(torch.diff(self.ends, prepend=self.ends.new_zeros(1)).max())
        if not 1 <= chunk_length <= longest:
            raise ValueError(f"no episode holds a chunk of length {chunk_length}: the longest has "
                             f"{longest} transitions")

    @classmethod
    def from_transitions(cls, observations, actions, rewards, next_observations, terminated,
                         truncated, *, low, high, chunk_length: int, gamma: float,
                         sparse: bool = False, device: torch.device | str = "cpu"):
        """A dataset from N transitions in their order.

        observations, next_observations [N, O], actions [N, d], rewards [N]; terminated [N]: the
        task ended there, and nothing follows; truncated [N]: the episode was cut there. The last
        row ends an episode in any case. low, high: numbers or [d], the action space's bounds, which
        are scaled to [-1, 1]. Raises ValueError, also where rows do not follow each other.
        """
        given = dict(
            observations=observations, actions=actions, next_observations=next_observations,
            rewards=rewards, terminated=terminated, truncated=truncated)
        given = {key: np.asarray(x) for key, x in given.items()}
        check_rows(given, "N")
        for key in ("terminated", "truncated"):
            if not np.isin(given[key], (0, 1)).all():
                raise ValueError(f"{key} must be 0 or 1, or booleans")
        s, a, following, rewards, terminated, truncated = given.values()
        if following.shape != s.shape:
            raise ValueError(f"next_observations must be {[*s.shape]}, not {[*following.shape]}")
        done = terminated.astype(bool) | truncated.astype(bool)
        done[-1:] = True
        breaks = ~done[:-1] & ~np.isclose(following[:-1], s[1:], atol=1e-4).all(-1)
        if breaks.any():
            raise ValueError(
                f"next_observations[{breaks.argmax()}] is not the row after it: keep rows in "
                "order, and mark each episode's end in terminated or truncated")
        low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
            raise ValueError(f"low {low} must be below high {high}, and both finite")
        if not {low.shape, high.shape} <= {(), (1,), a.shape[1:]}:
            raise ValueError(f"low and high must be numbers or {[a.shape[1]]}")
        # Each end is followed by a final state's row.
        row = np.arange(len(done)) + np.cumsum(done) - done
        final = row[done] + 1
        rows = len(row) + len(final)

        def spread(values, at_final):
            array = np.empty((rows, *values.shape[1:]), np.float32)
            array[row], array[final] = values, at_final
            return array

        return cls(
            spread(s, following[done]), spread(2 * (a - low) / (high - low) - 1, 0),
            spread(rewards, 0), spread(1 - terminated.astype(np.float32), 1),
            np.isin(np.arange(rows), final), chunk_length, gamma, sparse, device,
        )

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """`batch_size` chunks whose first transition is uniform over 0 ... size - c."""
        return self.chunks(self.starts(0, self.size, batch_size, generator))

    def sample_balanced(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Half of the chunks (rounded down) begin in the offline part, the others in what was
        appended, which must hold a whole chunk."""
        half = batch_size // 2
        offline = self.starts(0, self.offline_size, half, generator)
        online = self.starts(self.offline_size, self.size, batch_size - half, generator)
        return self.chunks(torch.cat([offline, online]))

    def starts(self, first: int, stop: int, n: int, generator: torch.Generator) -> torch.Tensor:
        """n uniform first transitions of chunks within transitions first ... stop - 1 -> [n]."""
        high = stop - self.chunk_length + 1
        return torch.randint(first, high, (n,), generator=generator, device=generator.device)

    def chunks(self, start: torch.Tensor) -> Batch:
        """The chunks that begin at transitions start [B] (int64), on its device."""
        device, start = start.device, start.to(self.ends.device)
        steps = torch.arange(self.chunk_length, device=start.device)  # [c]
        transition = start[:, None] + steps  # [B, c]
        episode = torch.searchsorted(self.ends, transition, right=True)  # [B, c]
        row = transition + episode  # [B, c]: each earlier episode holds one final state more
        inside = (episode == episode[:, :1]).float()  # [B, c]: still in the chunk's first episode
        batch = Batch(
            observation=self.observations[row[:, 0]],
            action=self.actions[row].flatten(1),
            reward=(self.gamma**steps * self.rewards[row] * inside).sum(-1),
            mask=torch.where(inside.bool(), self.masks[row], 1.0).amin(-1),
            next_observation=self.observations[row[:, 0] + inside.long().sum(-1)],
            valid=inside[:, -1],
        )
        return Batch(*(array.to(device) for array in batch))

    def make_room(self, transitions: int):
        """Allocate rows for so many that will be appended, even if each ends an episode."""
        for name in self.ARRAYS:
            array = getattr(self, name)
            empty = array.new_zeros(2 * transitions, *array.shape[1:])
            setattr(self, name, torch.cat([array, empty]))
        never = torch.iinfo(torch.int64).max  # the end of an episode that has not ended
        self.ends = torch.cat([self.ends, self.ends.new_full((transitions + 1,), never)])

    def append(self, observation, action, reward: float, mask: float, next_observation, done: bool):
        """Add a transition of the running episode, after `make_room`. observation, next_observation
        [O], action [d]: arrays; mask: 0 where the task is done; done: it is the episode's last."""
        row = self.size + self.episodes
        convert = functools.partial(torch.tensor, dtype=torch.float32, device=self.ends.device)
        self.observations[row] = convert(observation)
        self.observations[row + 1] = convert(next_observation)
        self.actions[row] = convert(action)
        self.rewards[row] = -float(reward != 0) if self.sparse else float(reward)
        self.masks[row] = float(mask)
        self.size += 1
        if done:
            self.ends[self.episodes] = self.size
            self.episodes += 1

    def state_dict(self) -> dict[str, Any]:
        """What was appended, but for the running episode's newest observation: the next `append`
        brings it."""
        rows = slice(self.offline_size + self.offline_episodes, self.size + self.episodes)
        ends = self.ends[self.offline_episodes : self.episodes].clone()
        return dict(ends=ends) | {name: getattr(self, name)[rows].clone() for name in self.ARRAYS}

    def load_state_dict(self, state: dict[str, Any]):
        """Append again what another of the same offline data had, after `make_room`."""
        first, ends = self.offline_size + self.offline_episodes, state["ends"]
        rows = len(state["masks"])
        for name in self.ARRAYS:
            getattr(self, name)[first : first + rows] = state[name]
        self.episodes = self.offline_episodes + len(ends)
        self.size = first + rows - self.episodes
        self.ends[self.offline_episodes : self.episodes] = ends
        if not (self.ends[1 : self.episodes + 1] > self.ends[: self.episodes]).all():
            raise ValueError("its episodes do not follow each other")


def check_rows(arrays: dict[str, Any], rows: str):
    """Raise ValueError for arrays (NumPy's or tensors) that have not a row for each of `rewards`,
    or are not finite."""
    count = arrays["rewards"].shape[:1]
    for name, array in sorted(arrays.items(), key=lambda item: item[0] != "rewards"):
        wide = name.endswith("ons")  # of observations and actions
        if array.ndim != 1 + wide or array.shape[:1] != count or 0 in array.shape:
            kind = f"[{rows}, ...]" if wide else f"[{rows}]"
            raise ValueError(f"{name} must be {kind}, a row for each of {rows} rewards, here "
                             f"{[*count]}, not {[*array.shape]}")
        if not (math.isfinite(array.min()) and math.isfinite(array.max())):
            raise ValueError(f"{name} is not finite: remove rows that hold NaN or infinity")


def check_arrays(arrays: dict[str, torch.Tensor]):
    """Raise ValueError for arrays that no `ChunkDataset` can be made of."""
    check_rows(arrays, "M")
    low, high = arrays["actions"].aminmax()
    if max(-low, high) > 1 + 1e-3:
        raise ValueError(f"actions lie in [{low:.3g}, {high:.3g}], not in [-1, 1]: scale them, as "
                         "from_transitions does, by the action space's low and high")
    if not ((arrays["masks"] == 0) | (arrays["masks"] == 1)).all():
        raise ValueError("masks must be 0, where the task is done, or 1")
    last = arrays["terminals"] != 0
    if not last.any():
        raise ValueError("terminals marks no episode's end: set it at each final state, or give "
                         "transitions to ChunkDataset.from_transitions")
    for name, where in (("mask 0", arrays["masks"] == 0), ("reward", arrays["rewards"] != 0)):
        if where.any() and not where[~last].any():
            raise ValueError(
                f"every {name} stands at an episode's last row, a final state, which is no "
                "transition: give transitions to ChunkDataset.from_transitions")


def read_npz(path: Path, keys) -> dict[str, np.ndarray]:
    """Arrays of an .npz file; nothing in it is executed. Raises UserError where it is damaged."""
    with telling(f"{path} cannot be read as .npz, and may be damaged or cut short",
                 "fetch or collect it again"), np.load(path, allow_pickle=False) as file:
        missing = [key for key in keys if key not in file]
        data = {key: file[key] for key in keys if key in file}
    require(not missing, f"{path} is no OGBench dataset: it has no {', '.join(missing)}")
    return data


@np.errstate(all="ignore")  # too large a number is infinite, and refused
def read_file(path: Path, env) -> dict[str, np.ndarray]:
    """Rows of an OGBench file, with OGBench's rewards and masks of the environment's task. Raises
    UserError where it is damaged or another environment's."""
    from ogbench.relabel_utils import relabel_dataset

    base = env.unwrapped
    shapes = dict(observations=env.observation_space.shape, actions=env.action_space.shape)
    shapes |= dict(terminals=(), qpos=(base.model.nq,))
    if hasattr(base, "_cur_button_states"):
        shapes["button_states"] = base._cur_button_states.shape
    data = read_npz(path, shapes)
    with np.load(path) as file:
        if "rewards" in file or "masks" in file:
            print(f"note: rewards and masks in {path} are not used, but OGBench's own for the task")
    rows = data["terminals"].size
    for key, array in data.items():
        require(array.shape == (rows, *shapes[key]) and rows, f"{path}: {key} has shape "
                f"{array.shape}, but {env.spec.id} needs {(rows, *shapes[key])}")
        require(array.dtype.kind in "fiub" and np.isfinite(array).all(), f"{path}: {key} holds "
                "values that are not finite numbers; fetch or collect it again")
        data[key] = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
    relabel_dataset(env.spec.id, env, data)
    final = data["terminals"] = data["terminals"].astype(bool)
    final[-1] = True  # a file's end ends an episode
    data["rewards"][final], data["masks"][final] = 0, 1  # those of final states mean nothing
    return data


def free_memory(device: torch.device) -> int:
    """Bytes that data may take there: most of what is free on a GPU, half of it in the host."""
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError):
        memory = Path("/proc/meminfo").read_text()
        return 512 * int(re.search(r"MemAvailable:\s+(\d+) kB", memory)[1])
    return total_memory() // 2


def choose_memory(device: torch.device, need: int) -> torch.device:
    """The device if it has so many bytes free, else the host. Raises UserError if neither has."""
    free = {x: free_memory(x) for x in (device, torch.device("cpu"))}
    chosen = next((x for x in free if need <= free[x]), None)
    words = ", ".join(f"{x} has {free[x] / 2**30:.1f} GiB free" for x in free)
    words = f"the data needs {need / 2**30:.1f} GiB, and {words}"
    require(chosen, f"{words}: name fewer files with --dataset-path")
    if chosen != device:
        print(f"note: {words}: it lies in the host's memory, and batches are copied from there")
    return chosen


PUBLISHED = {  # transitions behind published results, where those are not OGBench's own file
    "antmaze-giant-navigate": 10**7, "cube-triple-play": 10**7, "puzzle-4x4-play": 10**7,
    "cube-quadruple-play": 10**8}


def load_dataset(env_id: str, *, chunk_length: int, gamma: float, sparse: bool = False,
                 device: torch.device | str = "cpu", dataset_path: str = "",
                 dataset_dir: str = "~/.ogbench/data", collect_episodes: int = 0,
                 collect_seed: int = 0) -> tuple[ChunkDataset, dict[str, Any]]:
    """The training data of a task -> (the data, what it is and where it comes from).

    `dataset_path` (a file, or a folder whose files are one dataset) if given; else
    `collect_episodes` collected episodes if > 0; else the official file; for a task of one's own,
    its arrays. It lives on `device` where it fits, else in the host's memory. Raises UserError for
    data that is missing, damaged, of another environment, or fits nowhere.
    """
    device, env = torch.device(device), unplayed_env(env_id)
    settings = dict(chunk_length=chunk_length, gamma=gamma, sparse=sparse)
    if env_id in TASKS:
        own, load_arrays = TASKS[env_id]
        arrays, space, digest = load_arrays(), own().action_space, hashlib.sha256()
        for key in sorted(arrays):
            digest.update(np.ascontiguousarray(arrays[key]).tobytes())
        info = dict(origin="own", dataset=env_id, files=[], sha256=digest.hexdigest())
        make = functools.partial(ChunkDataset.from_transitions, low=space.low, high=space.high)
    else:
        name = split_env_id(env_id)[1]
        files, info = find_files(name, dataset_path, dataset_dir, collect_episodes, collect_seed)
        rows = [read_npz(path, ["terminals"])["terminals"].size for path in files]
        if can_collect(name) and sum(rows) != math.prod(official_size(name)):
            info["origin"] = info["origin"].replace("official", "path")  # its name alone says so
        widths = dict(observations=env.observation_space.shape, actions=env.action_space.shape)
        widths |= dict(rewards=(), masks=(), terminals=())
        need = 4 * sum(rows) * sum(map(math.prod, widths.values()))
        device = choose_memory(device, need)
        # The files are read one after another into place: one alone is ever held twice.
        arrays = {key: torch.empty(sum(rows), *x, device=device) for key, x in widths.items()}
        for path, *parts in zip(files, *(array.split(rows) for array in arrays.values())):
            data = read_file(path, env)
            if data["terminals"].sum() == 1:
                print(f"note: {path} marks no end of an episode: it is taken for a single one")
            for key, part in zip(arrays, parts):
                part.copy_(torch.from_numpy(data[key]))
        make = ChunkDataset
    way = "mend it, or see the arguments of ChunkDataset.from_transitions"
    with telling(f"the data of {env_id} cannot be used", way, (TypeError, ValueError)):
        dataset = make(**arrays, **settings, device=device)
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        (width,), there = space.shape, getattr(dataset, name).shape[1]
        require(there == width, f"the data's {name} have {there} numbers, and {env_id}'s {width}")
    info |= dict(transitions=dataset.size, episodes=dataset.episodes)
    info |= dict(published_transitions=PUBLISHED.get(domain_of(env_id), 0))
    return dataset, info | dict(success_fraction=float((dataset.masks == 0).float().mean()))


def find_files(dataset_name: str, dataset_path: str, dataset_dir: str, collect_episodes: int,
               collect_seed: int) -> tuple[list[Path], dict[str, Any]]:
    """The files of a dataset, collected or downloaded where that is needed, and their origin."""
    if dataset_path:
        given, origin = Path(dataset_path).expanduser(), "path"
        files = [given]
        if given.is_dir():
            files = sorted(x for x in given.glob("[!.]*.npz") if not x.stem.endswith("-val"))
        require(given.exists(), f"--dataset-path: {given} does not exist")
        require(files, f"--dataset-path: {given} holds no .npz file")
        for path in files:
            require(path.is_file(), f"--dataset-path: {path} is no file")
    elif collect_episodes:
        files = [collect_dataset(dataset_name, collect_episodes, collect_seed, dataset_dir)]
        origin = "collected"
    else:
        files, origin = [official_file(dataset_name, dataset_dir)], "official"
    hashes = [file_hash(path) for path in files]
    require(len({*hashes}) == len(files), f"--dataset-path: {dataset_path} holds a file twice")
    sha256 = hashes[0] if len(files) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    info = dict(origin=origin, dataset=dataset_name)
    named = {split_env_id(x)[1] for x in known_env_ids()} - {dataset_name}
    for path in files:
        if made := collection_of(path):
            require(made["dataset"] == dataset_name, f"{path} was collected as {made['dataset']}, "
                    f"but {dataset_name} is needed")
            info = made if len(files) == 1 else info
        if path.stem in named:
            print(f"note: {path} has the name of another dataset than {dataset_name}")
    return files, info | dict(files=[str(path) for path in files], sha256=sha256)


def official_file(dataset_name: str, dataset_dir: str) -> Path:
    """The official training file, downloaded by ogbench where it is not in `dataset_dir` yet.
    Raises UserError, which says how to go on without it, where it does not come whole."""
    path = Path(dataset_dir).expanduser() / f"{dataset_name}.npz"
    if path.exists():
        return path
    _, ogbench = import_ogbench()
    make_folder(path.parent, "--dataset-dir")
    way = f"put a mirror's or another machine's copy at {path}, or name it with --dataset-path"
    if can_collect(dataset_name):
        way += f"; or collect data: --collect-episodes {official_size(dataset_name)[0]}"
    in_time = functools.partial(urllib.request.urlopen, timeout=30)  # OGBench's waits for ever
    failed = f"the official {path.name} could not be downloaded whole"
    with (telling(failed, way, (Exception, UserError)),
          tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as work,
          patch.object(urllib.request, "urlopen", in_time)):
        ogbench.download_datasets([dataset_name], work)
        read_npz(Path(work, path.name), ["observations", "actions", "terminals"])
        os.replace(Path(work, path.name), path)
    return path


def collection_of(path: Path) -> dict[str, Any]:
    """What `collect_dataset` noted beside the file it wrote; {} for any other file."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        made = json.loads(path.with_suffix(".json").read_text())
        if made["sha256"] == file_hash(path):
            return made
    return {}


def describe_dataset(info: dict[str, Any]) -> str:
    """A dataset's origin in one line, for a plot or the terminal."""
    origin = dict(
        official="official OGBench file", own="a task of one's own",
        path=f"file {', '.join(info['files'][:1])}",
        collected=f"collected here with OGBench's oracle (seed {info.get('collect_seed')}), not "
                  "the official file")
    size = f"{info['transitions']:,} transitions, sha256 {info['sha256'][:12]}"
    if info["transitions"] < 0.99 * info.get("published_transitions", 0):
        size += f" (published results of the domain: {info['published_transitions']:,})"
    return f"{info['dataset']}: {origin[info['origin']]}, {size}"


# -------------------------------------------------------------------------------------- collecting
# Data like OGBench's own, by OGBench's scripted oracles and recipe, seeded and on all cores. A
# copier needs `collect_dataset` and, for one episode, `collect_episode`.

STEPS = {"pointmaze-giant": 2001}  # of an episode, its final state included; others: 1,001
EPISODES = {"cube-triple": 3000, "cube-quadruple": 5000, "pointmaze-giant": 500}  # others: 1,000
STACKING = {"cube-single": (0, 0), "cube-double": (0, 0.25), "cube-triple": (0.05, 0.35),
            "cube-quadruple": (0.1, 0.5), "cube-octuple": (0, 0.35)}


def can_collect(dataset_name: str) -> bool:
    """Whether OGBench ships its oracle: that of manipulation `play` and pointmaze `navigate`."""
    kinds = r"(cube|scene|puzzle)-(.+-)?play-v0|pointmaze-\w+-navigate-v0"
    return bool(re.fullmatch(kinds, dataset_name))


def official_size(dataset_name: str) -> tuple[int, int]:
    """(training episodes, steps of each) of the dataset that OGBench's generator makes."""
    key = "-".join(dataset_name.split("-")[:2])
    return EPISODES.get(key, 1000), STEPS.get(key, 1001)


@functools.cache
def collection_env(dataset_name: str):
    """One environment per worker process and dataset, in the mode OGBench's generator uses."""
    name = re.sub(r"-(play|navigate)-", "-", dataset_name)
    mode = {} if "maze" in name else {"mode": "data_collection"}
    steps = official_size(dataset_name)[1]
    return make_seeded(name, terminate_at_goal=False, max_episode_steps=steps, **mode)


def play_oracles(env, dataset_name: str) -> dict[str, Any]:
    """Sub-task -> OGBench's scripted oracle for it."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    settings = dict(env=env, noise=0.1, noise_smoothing=0.5)
    if dataset_name.startswith("puzzle"):
        return {"button": button_plan.ButtonPlanOracle(gripper_always_closed=True, **settings)}
    return {"cube": cube_plan.CubePlanOracle(**settings),
            "button": button_plan.ButtonPlanOracle(**settings),
            "drawer": drawer_plan.DrawerPlanOracle(**settings),
            "window": window_plan.WindowPlanOracle(**settings)}


def play_actions(env, dataset_name: str, seed: int):
    """OGBench's `play` recipe: noisy oracles pursue one random sub-task after the other. Yields
    actions, and is sent what `env.step` gave."""
    oracles = play_oracles(env, dataset_name)
    ob, info = env.reset(seed=seed)
    yield ob
    p_stack = np.random.uniform(*STACKING.get("-".join(dataset_name.split("-")[:2]), (0.5, 0.5)))
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(ob, info)
    while True:
        ob, _, _, _, info = yield np.clip(oracle.select_action(ob, info), -1, 1)
        if oracle.done:
            target_ob, target_info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[target_info["privileged/target_task"]]
            oracle.reset(target_ob, target_info)


def maze_actions(env, dataset_name: str, seed: int):
    """OGBench's pointmaze `navigate` recipe: noisy steps along the shortest way to one random goal
    after the other. Yields and is sent as `play_actions`."""
    maze, rng, wall = env.unwrapped, np.random.default_rng(seed), env.unwrapped.maze_map
    free = [tuple(cell) for cell in np.argwhere(wall == 0)]
    corridors = ([0, 0, 1, 1], [1, 1, 0, 0])  # above, below, left, right: a way merely passes there
    beside = [[wall[i - 1, j], wall[i + 1, j], wall[i, j - 1], wall[i, j + 1]] for i, j in free]
    goals = [cell for cell, walls in zip(free, beside) if walls not in corridors]
    start, goal = free[rng.integers(len(free))], goals[rng.integers(len(goals))]
    yield env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})[0]
    while True:
        way = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)[0] - maze.get_xy()
        direction = way / (np.linalg.norm(way) + 1e-6)
        *_, info = yield np.clip(direction + rng.normal(0, 0.5, size=2), -1, 1)
        if info["success"]:
            goal = maze.ij_to_xy(goals[rng.integers(len(goals))])
            maze.set_goal(goal_xy=maze.add_noise(goal))


def collect_episode(dataset_name: str, seed: int, split: str, index: int) -> dict[str, np.ndarray]:
    """Episode `index` of a dataset's split ("train" or "val"): a function of these arguments alone.

    Returns arrays of T rows in OGBench's types: observations [T, O], actions [T, d], qpos, qvel
    float32, terminals bool, and button_states int64 where the environment has buttons. The last row
    holds the final state.
    """
    env = collection_env(dataset_name)
    recipe = maze_actions if "maze" in dataset_name else play_actions
    types = {"terminals": bool, "button_states": np.int64}
    for attempt in range(1000):
        entropy = np.random.SeedSequence([seed, ("train", "val").index(split), index, attempt])
        actions = recipe(env, dataset_name, int(entropy.generate_state(1)[0]))
        ob, rows, done, step = next(actions), [], False, None
        while not done:
            action = actions.send(step)
            step = next_ob, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            states = {key[5:]: info[key] for key in ("prev_qpos", "prev_qvel", "prev_button_states")
                      if key in info}
            rows.append(dict(observations=ob, actions=action, terminals=done) | states)
            ob = next_ob
        data = {k: np.array([row[k] for row in rows], types.get(k, np.float32)) for k in rows[0]}
        if not dataset_name.startswith("scene"):
            break
        y, z = data["qpos"][:, 15], data["qpos"][:, 16]  # of the cube
        if not (y >= 0.29).any() and not ((y <= -0.3) & ((z < 0.06) | (z > 0.08))).any():
            break  # it was not pushed out of reach: OGBench discards such episodes
    return data


def write_episode(dataset_name: str, seed: int, split: str, index: int, path: Path):
    """Collect one episode into its file (in a worker process)."""
    arrays = collect_episode(dataset_name, seed, split, index)
    write_atomically(path, functools.partial(np.savez, **arrays))


def collected_path(dataset_name: str, episodes: int, seed: int, dataset_dir: str) -> Path:
    """Where a collected dataset lies. Its name never passes for the official one."""
    name = dataset_name.removesuffix("-v0")
    return Path(dataset_dir).expanduser() / f"{name}-collected-{episodes}ep-seed{seed}-v0.npz"


def collect_dataset(dataset_name: str, episodes: int, seed: int, dataset_dir: str,
                    workers: int | None = None) -> Path:
    """Collect `episodes` training and a tenth as many validation episodes with OGBench's oracle.

    Writes `NAME.npz` and `NAME-val.npz` in OGBench's format, and `NAME.json` with their origin. The
    data depends on (dataset_name, episodes, seed) alone, not on `workers` (default: one a core).
    Finished episodes are kept in `NAME.partial` until all are there: a collection that was stopped
    goes on where it was. Returns the path of NAME.npz; at once if it is there. Raises UserError
    where no oracle exists or nothing can be written.
    """
    path = collected_path(dataset_name, episodes, seed, dataset_dir)
    require(can_collect(dataset_name),
            f"--collect-episodes: OGBench ships no oracle for {dataset_name}; use 0, and "
            f"{dataset_name}.npz of OGBench's host or a mirror, by --dataset-path")
    if collection_of(path):
        return path
    make_folder(path.parent, "--dataset-dir")
    partial = path.with_suffix(".partial")
    with lock_file(path.with_suffix(".lock"), wait=True):  # a second run that wants it waits here
        if collection_of(path):
            return path
        require(partial.exists() or not path.exists(),
                f"{path} is not what a finished collection wrote: move it away")
        partial.mkdir(exist_ok=True)
        counts = {"train": episodes, "val": max(1, episodes // 10)}
        jobs = [(split, i) for split, count in counts.items() for i in range(count)]
        files = {(split, i): partial / f"{split}-{i:05d}.npz" for split, i in jobs}
        missing = [(*job, file) for job, file in files.items() if not file.exists()]
        steps = official_size(dataset_name)[1]
        bar = tqdm(total=len(jobs) * steps, initial=(len(jobs) - len(missing)) * steps, unit="step",
                   unit_scale=True, desc=f"collecting {dataset_name}", **PROGRESS)
        collect = functools.partial(write_episode, dataset_name, seed)
        with worker_context() as context:
            pool = ProcessPoolExecutor(workers or cores(), context, initializer=follow_the_parent)
            episodes_made = pool.map(collect, *zip(*missing))
        with worker_errors(), bar, pool, contextlib.closing(episodes_made):  # calls off the others
            for _ in episodes_made:
                bar.update(steps)
        for split, target in (("val", path.with_name(f"{path.stem}-val.npz")), ("train", path)):
            parts = [dict(np.load(files[split, i])) for i in range(counts[split])]
            arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            write_atomically(target, functools.partial(np.savez, **arrays))
        origin = dict(origin="collected", dataset=dataset_name, episodes=episodes,
                      collect_seed=seed, sha256=file_hash(path), **versions("ogbench", "mujoco"))
        write_atomically(path.with_suffix(".json"), json.dumps(origin, indent=1).encode())
        shutil.rmtree(partial)
    return path


# -------------------------------------------------------------------------------------- evaluation
# Whole episodes in parallel processes, each decided by a seed, none counted twice or cut short. A
# copier needs `Evaluator`, and `make_chunked_env` to see what a step of it is.

SCORES = ("success", "return", "length")


def make_chunked_env(env_id: str, chunk_length: int, own: Callable | None = None):
    """The environment of a worker process: one step executes a chunk [c*d] open loop, up to the
    episode's end; after it, steps do nothing. own: as for `make_env`."""
    import gymnasium

    follow_the_parent()
    if multiprocessing.parent_process():  # a cluster sends SIGTERM to all: evaluations end first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    class ChunkedEpisode(gymnasium.Wrapper):
        def reset(self, **kwargs):
            observation, _ = self.env.reset(**kwargs)
            self.result = observation, 0.0, False, False, {"success": math.nan}
            return observation, {}

        def step(self, chunk: np.ndarray):
            observation, _, terminated, truncated, info = self.result
            total, steps = 0.0, 0
            for action in chunk.reshape(chunk_length, -1):
                if terminated or truncated:
                    break
                observation, reward, terminated, truncated, info = self.env.step(action)
                total, steps = total + float(reward), steps + 1
            info = {"success": float(info.get("success", math.nan)), "steps": steps}
            self.result = observation, total, terminated, truncated, info
            return self.result

    env = ChunkedEpisode(make_env(env_id, own))
    env.action_space = gymnasium.spaces.Box(-1, 1, (chunk_length * env.action_space.shape[0],))
    return env


class Evaluator:
    """Plays whole episodes of one task in parallel processes, kept from one evaluation to the next.

    Episode i of N = `episodes` is the same one each time: its start, and the noise [noise_dim] of
    each of its policy's chunks of `chunk_length` actions, come from (seed, i). All are played to
    their end, so that short ones do not count more. `device` is the policy's.

    Attributes: played, the newest evaluation's episodes, (seed, executed chunks [n, c*d]) each.
    """

    def __init__(self, env_id: str, chunk_length: int, episodes: int, seed: int, noise_dim: int,
                 device: torch.device | str = "cpu"):
        import gymnasium

        self.noise_dim, self.device, self.played = noise_dim, device, []
        entropy = [np.random.SeedSequence([seed, i]) for i in range(episodes)]
        self.seeds = [int(sequence.generate_state(1)[0]) for sequence in entropy]
        own, _ = TASKS.get(env_id, (None, None))
        maker = functools.partial(make_chunked_env, env_id, chunk_length, own)
        makers = [maker] * max(1, min(episodes, 4 * cores(), total_memory() // 2**30))
        with worker_context():
            self.envs = gymnasium.vector.AsyncVectorEnv(
                makers, context="forkserver", autoreset_mode="Disabled")

    def evaluate(self, policy: Callable, samples: int = 1) -> dict[str, float]:
        """Mean, and standard error where N > 1, of success (at an episode's last step, where the
        environment tells it), return and length.

        policy: (observation [n, O], normal noise [n, samples, noise_dim]) on the device -> action
            chunks [n, c*d], for n environments at once. Raises NotFinite.
        """
        self.played, results, width = [], [], self.envs.num_envs
        for first in range(0, len(self.seeds), width):  # as many episodes as there are processes
            seeds = self.seeds[first : first + width]
            with worker_errors():
                results.append(self.play(policy, samples, seeds)[:, : len(seeds)])
        scores = {"episodes": len(self.seeds)}
        for key, values in zip(SCORES, np.concatenate(results, axis=1)):
            if np.isfinite(values).any():  # some environments tell success only where there is some
                values = np.nan_to_num(values)
                scores[key] = float(values.mean())
                if len(values) > 1:
                    scores[f"{key}_stderr"] = float(values.std(ddof=1) / np.sqrt(len(values)))
        return scores

    def play(self, policy: Callable, samples: int, seeds: list[int]) -> np.ndarray:
        """Play the episodes of some seeds, side by side -> success, return and length of each."""
        width, executed = self.envs.num_envs, []
        playing = np.arange(width) < len(seeds)
        noise = [np.random.default_rng([seed, 1]) for seed in seeds]
        filled = seeds + [0] * (width - len(seeds))  # for processes that are left out
        observation, _ = self.envs.reset(seed=filled, options={"reset_mask": playing.copy()})
        returns, lengths = np.zeros(width), np.zeros(width)
        send = functools.partial(torch.tensor, dtype=torch.float32, device=self.device)
        while playing.any():
            size = samples, self.noise_dim
            draws = [noise[i].standard_normal(size, np.float32) for i in np.flatnonzero(playing)]
            chunks = np.zeros(self.envs.action_space.shape, dtype=np.float32)
            actions = policy(send(observation[playing]), send(np.stack(draws)))
            chunks[playing] = actions.numpy(force=True)
            require_finite("an action in the evaluation", chunks)
            observation, reward, terminated, truncated, info = self.envs.step(chunks)
            require_finite("an observation in the evaluation", observation[playing])
            require_finite("a reward in the evaluation", reward[playing])
            executed.append(chunks)
            returns, lengths = returns + reward, lengths + info["steps"]
            playing &= ~(terminated | truncated)
        self.played += zip(seeds, np.stack(executed, axis=1))
        return np.stack([info["success"], returns, lengths])

    def close(self, at_once: bool = False):
        """End the worker processes; at_once: in the middle of what they do."""
        for process in self.envs.processes if at_once else ():
            process.kill()
            process.join()
        self.envs.closed |= at_once
        self.envs.close()


def film(env_id: str, chunk_length: int, episodes: list, folder: Path, prefix: str) -> str:
    """Play recorded episodes, (seed, chunks [n, c*d]) each, under Gymnasium's recorder -> "", or
    what went wrong. In a process of its own: a renderer that is missing or crashes does no harm."""
    import gymnasium

    own, _ = TASKS.get(env_id, (None, None))
    words = env_id, own, chunk_length, episodes, str(folder), prefix
    job = gymnasium.vector.utils.CloudpickleWrapper(functools.partial(film_here, *words))
    with worker_context() as context:
        pool = ProcessPoolExecutor(1, context)
        played = pool.submit(job)
    with pool:
        error = played.exception()
    return f"{type(error).__name__}: {one_line(error)}" if error else ""


def film_here(env_id: str, own: Callable | None, chunk_length: int, episodes, folder, prefix):
    """`film`, in its process. own: as for `make_env`."""
    import gymnasium

    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    # OGBench's manipulation does not note how it renders, which Gymnasium's checker minds.
    words = {} if own else dict(width=240, height=240, disable_env_checker=True)
    env = make_env(env_id, own, render_mode="rgb_array", **words)
    env.unwrapped.render_mode = "rgb_array"
    env = gymnasium.wrappers.RecordVideo(
        env, folder, episode_trigger=lambda _: True, name_prefix=prefix)
    for seed, chunks in episodes:
        env.reset(seed=seed)
        for action in chunks.reshape(len(chunks) * chunk_length, -1):
            if any(env.step(action)[2:4]):
                break
    env.close()


# --------------------------------------------------------------------------------------- run files
# Settings, and the folder of a run: checkpoint.pt is the one truth, all else in it is output. A
# copier needs `RunArgs` and `Run`, or none of it.


class Range(NamedTuple):
    """The numbers that a setting may have: `Annotated[float, Positive]`."""

    words: str
    holds: Callable[[float], bool]


MOST = 10**9  # of any setting: far beyond use, and before numbers overflow
Positive = Range(f"greater than 0, and at most {MOST:,}", lambda x: 0 < x <= MOST)
NotNegative = Range(f"0 or greater, and at most {MOST:,}", lambda x: 0 <= x <= MOST)
Fraction = Range("greater than 0 and at most 1", lambda x: 0 < x <= 1)
Share = Range("between 0 and 1", lambda x: 0 <= x <= 1)
Threads = Range("from 0 to the number of cores", lambda x: 0 <= x <= (os.cpu_count() or 1))
Seed = Range(f"between 0 and {2**32 - 1}", lambda x: 0 <= x < 2**32)


@dataclasses.dataclass
class RunArgs:
    """Settings of a run that are not the algorithm's: a script's `Args` adds those."""

    preset: tyro.conf.Positional[Literal["full", "quick"]] = "full"
    """`full`: the settings of the environment's domain; `quick`: a small task and network"""
    env_id: str = "scene-play-singletask-task1-v0"
    """OGBench single-task environment, with the dataset's type in its name"""
    seed: Annotated[int, Seed] = 0
    """seed of the networks, batches, noise and evaluation episodes"""
    run_dir: str = ""
    """folder of the run's files; default runs/{env_id}__{script}__{seed}__{time}-{process}"""
    resume: bool = False
    """continue the run in --run-dir from its checkpoint, with the settings stored there"""
    device: str = "auto"
    """cpu, cuda or cuda:N (CUDA_VISIBLE_DEVICES chooses too); auto: a GPU where there is one"""
    num_threads: Annotated[int, Threads] = 0
    """CPU threads of torch; 0: as many as torch chooses"""
    compile: Literal["auto", "on", "off"] = "auto"
    """make the update's losses one compiled graph; auto: where the run is long enough for it"""
    cuda_graph: bool = True
    """on a GPU, record an update's launches once, and from then on make all of them together"""
    tf32: bool = False
    """on a GPU, multiply float32 matrices in TF32: faster, with 10 bits of mantissa"""
    dataset_path: str = ""
    """an OGBench .npz file, or a folder of them, to train on instead of the official file"""
    dataset_dir: str = "~/.ogbench/data"
    """where official files are kept or downloaded to, and collected ones written"""
    collect_episodes: Annotated[int, NotNegative] = 0
    """> 0: train on so many episodes collected here with OGBench's own scripted oracle"""
    collect_seed: Annotated[int, Seed] = 0
    """seed of the collected dataset"""
    bc_checkpoint: str = ""
    """a bc_checkpoint.pt of the same domain, in place of the behaviour-cloning stage"""
    eval_only: bool = False
    """evaluate --checkpoint (and film it, with --capture-video) instead of training"""
    checkpoint: str = ""
    """a checkpoint.pt: to evaluate, or (trqam_online.py, one of trqam_offline.py) to start from"""
    eval_interval: Annotated[int, Positive] = 50_000
    """fine-tuning steps between evaluations"""
    eval_episodes: Annotated[int, Positive] = 50
    """episodes of one evaluation, in up to 4 processes a core and 1 a GiB of memory (they take 60
    MB each for pointmaze and 460 MB for cube)"""
    log_interval: Annotated[int, Positive] = 1_000
    """steps between rows of train.csv"""
    checkpoint_interval: Annotated[int, Positive] = 10_000
    """steps between checkpoints; one is also written at each evaluation"""
    capture_video: bool = False
    """film the first episodes of the last evaluation (mp4; needs EGL)"""
    track: bool = False
    """log to Weights & Biases as well (needs `pip install wandb`)"""

    starts_from: ClassVar[str] = ""  # another script, whose checkpoints can go on in this one

    def check(self):
        """Make paths absolute. Raise UserError for settings that are out of range."""
        for name in ("run_dir", "dataset_path", "dataset_dir", "bc_checkpoint", "checkpoint"):
            path = getattr(self, name)
            if not path or name == "dataset_dir" and self.dataset_path:
                continue  # it is not used
            setattr(self, name, str(expanded(path, flag_of(name))))
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for allowed in getattr(hint, "__metadata__", ()):
                if isinstance(allowed, Range) and value is not None:
                    numbers = value if isinstance(value, tuple) else (value,)
                    require(numbers and all(map(allowed.holds, numbers)),
                            f"{flag_of(name)} must be {allowed.words}, not {value}")
        require(re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device),
                f"--device must be auto, cpu, cuda or cuda:N, not {self.device}")
        if self.env_id not in TASKS:
            split_env_id(self.env_id)
        elif self.dataset_path or self.collect_episodes:
            raise UserError("--dataset-path and --collect-episodes: leave them out, because "
                            f"{self.env_id} has data of its own")


OF_A_SITTING = set("run_dir resume eval_only checkpoint device num_threads compile cuda_graph "
                   "capture_video track".split())
RESUME_MAY_CHANGE = OF_A_SITTING | set(
    "dataset_path dataset_dir offline_steps online_steps learning_starts utd_ratio "
    "balanced_sampling kl_budget_online".split())


def expanded(path: str, flag: str) -> Path:
    """An absolute path, `~` expanded. Raises UserError, with the flag it came by, for none."""
    with telling(f"{flag} {path[:200]!a}", "write another path"):
        path.encode()
        absolute = Path(path).expanduser().absolute()
        absolute.exists()  # which raises for a path that cannot be
        return absolute


def flag_of(field: str) -> str:
    """`kl_budget` -> `--kl-budget`."""
    return "--" + field.replace("_", "-")


def parse_args(script: str, args_class: type, settings: Callable) -> Any:
    """Command line -> `args_class`. A flag that is given wins over what a checkpoint holds or, in a
    new run, over `settings(args)` (of preset and domain), and those over the defaults. Raises
    UserError."""
    args = tyro.cli(args_class)
    if source := source_of(script, args):
        starts = not args.resume and not args.eval_only
        require(not (starts and args.bc_checkpoint),
                "--checkpoint and --bc-checkpoint: a run starts from one; leave one out")
        stored = read_checkpoint(*source)["args"]
        fields = {field.name for field in dataclasses.fields(args_class)}
        fields -= set() if args.resume else OF_A_SITTING
        kept = {key: stored[key] for key in fields & stored.keys()}
        # What a script that starts from another's checkpoint has of its own, its preset sets.
        own = settings(args_class(**kept)) if starts else {}
        return tyro.cli(args_class, default=args_class(**{**own, **kept}))
    for _ in range(2):  # the preset decides the environment, the environment its domain's settings
        args = tyro.cli(args_class, default=args_class(**{"preset": args.preset, **settings(args)}))
    return args


def source_of(script: str, args) -> tuple[Path, str, str] | None:
    """What `read_checkpoint` takes, where a run resumes, evaluates or starts from a checkpoint."""
    if args.resume:
        require(args.run_dir, "--resume needs --run-dir, the folder of the run to continue")
        require(not args.eval_only, "--resume and --eval-only: leave one out")
        newest, previous = (expanded(args.run_dir, "--run-dir") / name for name in CHECKPOINTS)
        require(newest.exists() or previous.exists(),
                f"--resume: {newest.parent} holds no run; leave it out to start one there")
        return newest if newest.exists() else previous, script, "--resume"
    if not args.eval_only and not args.checkpoint:
        return None
    kind = script if args.eval_only else type(args).starts_from
    require(args.checkpoint and kind,
            "--eval-only and --checkpoint go together: the one evaluates the other")
    return expanded(args.checkpoint, "--checkpoint"), kind, "--checkpoint"


def run_script(file: str, main: Callable, args_class: type, settings: Callable):
    """Parse the command line of a script (`__file__`) and run its `main`; what the user can mend
    ends the program with one line and exit status 1."""
    try:
        main(parse_args(Path(file).stem, args_class, settings))
        print(end="", flush=True)  # here, where a closed pipe is told
    except UserError as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit("error: what reads this program's output has ended; --resume goes on")
    except OSError as error:
        sys.exit(f"error: {error.filename or ''}: {error.strerror or error}".replace(" : ", " "))
    except (MemoryError, RuntimeError) as error:  # torch's own, on the CPU, is a plain RuntimeError
        memory = MemoryError, torch.OutOfMemoryError
        if not isinstance(error, memory) and "can't allocate memory" not in str(error):
            raise
        sys.exit("error: out of memory; use smaller networks, batches or data")
    except KeyboardInterrupt:
        sys.exit(130)


CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")  # the newest, and the one before it


def read_checkpoint(path: Path, kind: str, flag: str) -> dict[str, Any]:
    """A checkpoint as plain data and finite tensors on the CPU; nothing in it is executed. `kind`:
    the script that must have written it, or "bc". Raises UserError, naming `flag`, where it cannot
    be read or is another one, and says so where the one before it is whole."""
    require(path.exists(), f"{flag}: {path} does not exist")
    require(path.is_file(), f"{flag}: {path} is no file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch reads a flipped bit as a number
            require(not damaged, f"the checksum of its {damaged} is wrong")
        checkpoint = load_tensors(path)
        found, _ = checkpoint["kind"], checkpoint["args"].keys()
    except Exception as error:  # a damaged file can raise nearly anything
        older, way = path.with_name(CHECKPOINTS[1]), "use another"
        if path.name == CHECKPOINTS[0]:
            with contextlib.suppress(UserError):
                read_checkpoint(older, kind, flag)
                way = f"{older} is whole: to go on from there, rename it to {path.name}"
        words = f"{flag}: {path} is damaged or no checkpoint ({one_line(error)}); {way}"
        raise UserError(words) from error
    require(found == kind,
            f"{flag}: {path} is a checkpoint of {found!r}; one of {kind!r} is needed")
    return checkpoint


def load_tensors(file: Any) -> dict[str, Any]:
    """What torch.save wrote, of plain data, paths and finite tensors. Raises nearly anything."""
    with torch.serialization.safe_globals([PosixPath]):
        content = torch.load(file, map_location="cpu", weights_only=True)
    nested = [("content", content)]
    for name, value in nested:
        if isinstance(value, dict):
            nested += value.items()
        elif isinstance(value, torch.Tensor):
            plain = value.layout == torch.strided
            require(plain and value.untyped_storage().nbytes() >= value.nbytes,
                    f"its {name} is no plain tensor")
            require_finite(name, value)
    return content


def write_checkpoint(path: Path, content: dict[str, Any], previous: Path | None = None):
    """Write a checkpoint. Raises UserError for what could not be read back, and NotFinite."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    with telling(f"{path}: it could not be read back",
                 "checkpoints hold tensors, numbers, texts, paths and their containers"):
        load_tensors(buffer)
    write_atomically(path, buffer.getbuffer(), previous)


def restore_state(value: Any, state: Any, resumes: bool):
    """Return a network, optimizer or generator to a state. Raises where that does not fit. Its
    learning rates belong to an optimizer's state where the run `resumes`, else to the settings."""
    if isinstance(value, torch.Generator):
        value.set_state(state)
    elif isinstance(value, torch.optim.Optimizer):
        weights = [weight for group in value.param_groups for weight in group["params"]]
        for number, moments in state["state"].items():
            for moment in moments.values():  # torch would write past the end of a smaller one
                if moment.dim() and moment.shape != weights[number].shape:
                    raise ValueError(f"moment {number} is of another shape")
        value.load_state_dict(state if resumes else value.state_dict() | {"state": state["state"]})
    else:
        value.load_state_dict(state)


def fitting(what: str):
    """`telling` where what a checkpoint holds does not fit."""
    return telling(f"{what} is damaged, or does not fit this run's networks, data or environment",
                   "use another")


class Run:
    """The folder and files of one training run, as a context manager.

    file: the script's `__file__`, whose name stands in checkpoints; args: its settings. Raises
    UserError for settings that are out of range or do not go with a checkpoint's, and for a folder
    that holds files where args.resume is not set.

    Attributes:
        path: the folder. device: where it trains. observation_dim, action_dim: O, d.
        done: stage -> its steps so far, for the stages that have begun, in their order.
        stopping: the signal, SIGINT or SIGTERM, that asks to save and stop; 0: none does.
    """

    def __init__(self, file: str, args: Any):
        args.check()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # an ASCII terminal
        self.script, self.args = Path(file).stem, args
        self.device = choose_device(args.device, args.num_threads, args.tf32)
        env = unplayed_env(args.env_id)
        (self.observation_dim,) = env.observation_space.shape
        (self.action_dim,) = env.action_space.shape
        require(not args.track or importlib.util.find_spec("wandb"),
                "--track needs Weights & Biases: pip install wandb")
        self.objects, self.state, self.done, self.data = {}, {}, {}, None
        self.rows, self.sittings = {"train.csv": [], "eval.csv": []}, []
        self.writer = self.lock = self.wandb = self.wandb_id = None
        self.stopping, self.seconds, self.began = 0, 0.0, time.perf_counter()  # of this sitting
        self.handlers = {x: signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)}
        name = f"{args.env_id}__{self.script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        names = (f"{name}-{os.getpid()}" + f"-{n}" * bool(n) for n in itertools.count())
        numbered = (Path("runs", name).absolute() for name in names)
        self.path = Path(args.run_dir or next(path for path in numbered if not path.exists()))
        if source := source_of(self.script, args):
            self.go_on_from(*source)
        self.require_unused()

    def require_unused(self):
        """Raise UserError where a new run's folder is not empty."""
        used = any(self.path.glob("[!.]*"))  # a run that was killed at once leaves hidden files
        new = not self.args.resume and not self.args.eval_only
        require(not new or not used, f"--run-dir: {self.path} is not empty; name another folder, "
                "or continue its run with --resume")

    def go_on_from(self, path: Path, kind: str, flag: str):
        """Take over the checkpoint that this run resumes, starts from or evaluates."""
        stored, self.source = read_checkpoint(path, kind, flag), f"{flag}: {path}"
        resumes, given = self.args.resume, vars(self.args)
        with fitting(f"{self.source}: its content"):
            there = stored["args"]["env_id"]
            require(domain_of(there) == domain_of(self.args.env_id),
                    f"{self.source} is of {there}, not of {self.args.env_id}'s domain")
            for key, value in stored["args"].items():
                require(not resumes or key in RESUME_MAY_CHANGE or given.get(key, value) == value,
                        f"{self.source} has {flag_of(key)} {value}, which {given.get(key)} cannot "
                        "replace; leave that flag out")
            *over, _ = [*stored["done"]] or [""]
            for stage, steps in {} if self.args.eval_only else stored["done"].items():
                asked = given[f"{stage}_steps"]
                require(steps == asked or steps < asked and (stage not in over or not steps),
                        f"{self.source}: the run has done {steps} {stage} steps; ask for at least "
                        "as many, and for more only before the next stage")
            same = stored["device"] == self.device.type
            require(same or not resumes or not stored["state"],
                    f"{self.source}: the run began on {stored['device']}, and only there goes on "
                    f"exactly; use --device {stored['device']}")
            self.done, self.state, self.data = stored["done"], stored["state"], stored["data"]
            self.rows = {name: [dict(row) for row in stored["rows"][name]] for name in self.rows}
            if resumes:
                self.seconds, self.wandb_id = float(stored["seconds"]), stored["wandb_id"]
                self.sittings = stored["sittings"]
            elif not same:
                self.state.pop("generator", None)  # that of another kind cannot go on here

    def restore(self, **objects):
        """Name what checkpoints hold: objects with a state_dict, or generators; where the run goes
        on from a checkpoint, return them to its state. `agent` has a `noise_dim`."""
        self.objects |= objects
        for name, value in objects.items():
            if name in self.state:
                with fitting(f"{self.source}: its {name}"):
                    restore_state(value, self.state.pop(name), self.args.resume)

    def load_clone(self, clone: torch.nn.Module):
        """Take over the cloned policy of args.bc_checkpoint. Raises UserError."""
        source = f"--bc-checkpoint: {self.args.bc_checkpoint}"
        stored = read_checkpoint(Path(self.args.bc_checkpoint), "bc", "--bc-checkpoint")
        with fitting(f"{source}: its policy"):
            there, here = stored["domain"], domain_of(self.args.env_id)
            require(there == here, f"{source} is of domain {there}, but this run is of {here}")
            clone.load_state_dict(stored["state"])

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, _):
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.handlers.items():  # the caller's
                signal.signal(number, handler or signal.SIG_DFL)
        if "evaluator" in vars(self):
            self.evaluator.close(at_once=kind is not None)
        with contextlib.suppress(OSError if error else ()):  # of a full disk, which has been told
            for part in (self.writer, self.lock):
                if part:
                    part.close()
        if self.wandb:
            self.wandb.finish(exit_code=int(bool(error)))  # or the next run would go on in this one
        if kind is KeyboardInterrupt or self.stopping:
            way = f"--run-dir {self.path} --resume" if self.lock else "the same command"
            print(f"\nstopped; continue with {way}", file=sys.stderr)
        if isinstance(error, NotFinite):
            require(not self.args.eval_only,
                    f"--checkpoint: {self.args.checkpoint}: {error}; evaluate another")
            stage, step = self.newest()
            kept = self.path / CHECKPOINTS[0]
            before = f"{kept} is" if kept.exists() else "no checkpoint is"
            raise UserError(f"{error} at step {step} of {stage}: training diverged, or the "
                            "simulation; try a lower --learning-rate in a new run "
                            f"({before} from before it)")

    def open(self):
        """Make the folder, or open the one to resume: from here on the run can be resumed."""
        self.try_needs()
        make_folder(self.path, "--run-dir")
        self.lock = lock_file(self.path / ".lock", wait=False)
        self.require_unused()  # another process may have had it meanwhile
        program = sys.modules.get(type(self.args).__module__)
        commit = git_commit(getattr(program, "__file__", None) or "a notebook")
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else None
        hardware = dict(cpu=cpu_name(), cores=cores(), threads=torch.get_num_threads(), gpu=gpu)
        self.sittings.append(dict(command=sys.argv, began_at=dict(self.done), git_commit=commit,
                                  hardware=hardware))
        if not any((self.path / name).exists() for name in CHECKPOINTS):
            self.save()

    def begin(self):
        """Write what the run is, and say what is trained on what."""
        args = self.args
        if not self.lock:
            self.open()
        packages = versions("torch", "numpy", "ogbench", "gymnasium", "mujoco")
        packages |= dict(python=platform.python_version(), platform=platform.platform())
        config = dict(script=self.script, args=vars(args), dataset=self.data, **self.sittings[-1],
                      versions=packages, sittings=self.sittings)
        text = json.dumps(config, indent=1, default=str)
        write_atomically(self.path / "config.json", text.encode())
        for name in self.rows:
            self.write_table(name)  # which heals a damaged one, and drops rows that come again
        if args.track:
            import wandb

            environ = os.environ.get  # whose variables win
            with telling("--track: Weights & Biases cannot start", "try `wandb login`"):
                self.wandb = wandb.init(
                    project=environ("WANDB_PROJECT", "trqam"), id=self.wandb_id, resume="allow",
                    name=environ("WANDB_NAME", self.path.name), config=vars(args),
                    sync_tensorboard=True)
            self.wandb_id = self.wandb.id
        from torch.utils.tensorboard import SummaryWriter

        purge = sum(self.done.values()) + 1 if args.resume else None
        self.writer = SummaryWriter(str(self.path), purge_step=purge)
        self.writer.add_text("config.json", f"<pre>{text}</pre>")
        print(f"run: {self.path}")
        print("settings:", ", ".join(f"{key} {x}" for key, x in vars(args).items() if x != ""))
        share = self.data["success_fraction"]
        print(f"data: {describe_dataset(self.data)}; the task is done in {share:.2%} of its rows")
        if not share and args.env_id not in TASKS:
            print("note: no row of the data solves this task, so its reward is never the highest")

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        args = self.args
        return Evaluator(args.env_id, args.chunk_length, args.eval_episodes, args.seed,
                         self.objects["agent"].noise_dim, self.device)

    def try_needs(self):
        """Try what a run needs only later, before long work. Raises UserError."""
        parent = next(path for path in (self.path, *self.path.parents) if path.exists())
        make_folder(parent, "--run-dir")
        weights = self.objects["agent"].parameters()
        need = 8 * sum(x.numel() * x.element_size() for x in weights)  # two, each with moments
        require(shutil.disk_usage(parent).free > need, f"--run-dir: {parent} has no room for two "
                f"checkpoints of {need / 2**31:.1f} GiB; name another folder")
        if self.args.capture_video:
            one = 0, np.zeros((1, self.args.chunk_length * self.action_dim), np.float32)
            with tempfile.TemporaryDirectory() as folder:
                said = film(self.args.env_id, self.args.chunk_length, [one], Path(folder), "tried")
            require(not said, f"--capture-video: no renderer works here ({said}); install EGL "
                    "(libegl1) or leave it out")
        self.evaluator  # noqa: B018 (its worker processes start)

    def load_dataset(self) -> ChunkDataset:
        """`load_dataset` with this run's settings. Raises UserError."""
        args, began = self.args, self.data if self.args.resume else None
        if args.collect_episodes and not args.dataset_path and args.env_id not in TASKS:
            name = split_env_id(args.env_id)[1]
            steps = official_size(name)[1] - 1
            rows = args.collect_episodes * steps
            require(args.batch_size <= rows and args.chunk_length <= steps,
                    f"--batch-size must be at most the {rows} transitions that are collected, and "
                    f"--chunk-length at most an episode's {steps}")
            path = collected_path(name, args.collect_episodes, args.collect_seed, args.dataset_dir)
            if can_collect(name) and not path.exists():
                make_folder(path.parent, "--dataset-dir")
                self.open()  # collecting is long
        names = "chunk_length gamma dataset_path dataset_dir collect_episodes collect_seed".split()
        dataset, self.data = load_dataset(
            args.env_id, sparse=args.sparse_reward, device=self.device,
            **{name: getattr(args, name) for name in names})
        require(args.batch_size <= dataset.size, f"--batch-size {args.batch_size} is larger than "
                f"the dataset's {dataset.size} transitions")
        if began and began["sha256"] != self.data["sha256"]:
            raise UserError(f"--resume: the run began on {describe_dataset(began)}, and this is "
                            f"{describe_dataset(self.data)}")
        return dataset

    def enters(self, stage: str) -> bool:
        """Whether a stage begins now, and had not before this run was resumed."""
        begins = stage not in self.done
        self.done.setdefault(stage, 0)
        return begins

    def steps(self, stage: str, total: int):
        """The numbers of a stage's steps that are left, up to `total`; call `after` at the end of
        each. Meanwhile a first Ctrl-C or SIGTERM only asks to save and stop."""
        if not self.writer:
            self.begin()
        self.enters(stage)
        if stage != [*self.done][-1]:
            return  # it is over
        self.listen(True)
        self.stage, self.total, self.logged = stage, total, (time.perf_counter(), self.done[stage])
        left = range(self.done[stage] + 1, total + 1)
        with tqdm(left, stage, total, initial=self.done[stage], unit="step",
                  **PROGRESS | dict(disable=not left or PROGRESS["disable"])) as self.bar:
            for step in self.bar:
                self.done[stage] = step
                yield step

    def listen(self, on: bool):
        """Whether a first Ctrl-C or SIGTERM only asks to save and stop, or ends the program."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.ask_to_stop if on else signal.default_int_handler)

    def ask_to_stop(self, number: int, frame: Any):
        self.stopping = number
        self.listen(False)
        # Not print, which the signal may have interrupted.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step, or evaluation; once more ends at once\n")

    def after(self, statistics: dict[str, Any], policy: Callable | None = None) -> bool:
        """After a step: log, evaluate the policy and save, where that is due -> whether it was
        evaluated. Without a policy the stage's last step is not saved: what begins after it calls
        `evaluate_and_save`."""
        args, step, last = self.args, self.done[self.stage], self.done[self.stage] == self.total
        if last or step % args.log_interval == 0:
            for name, number in statistics.items():
                require_finite(name, number)
            (then, before), now = self.logged, time.perf_counter()
            self.logged = now, step
            rate = {"charts/SPS": (step - before) / (now - then)}
            self.append("train.csv", self.stage, step, statistics | rate)
        evaluates = policy and (last or step % args.eval_interval == 0)
        if evaluates:
            self.evaluate_and_save(policy)
        elif not last and (step % args.checkpoint_interval == 0 or self.stopping):
            self.save()
        return bool(evaluates)

    def append(self, name: str, stage: str, step: int, numbers: dict[str, Any]):
        """Add a row to a table and to TensorBoard; a new column stays empty in the earlier rows."""
        known = [*dict.fromkeys(itertools.chain(*self.rows[name]))]
        numbers = {key: float(f"{float(x):.6g}") for key, x in numbers.items()}  # as both files say
        for key, value in numbers.items():
            tag = key if "/" in key else f"charts/{'episodic_' * (key[:7] != SCORES[0])}{key}"
            self.writer.add_scalar(tag, value, sum(self.done.values()))
        self.rows[name].append(dict(stage=stage, step=step) | numbers)
        if numbers.keys() - known:
            return self.write_table(name)
        with open(self.path / name, "a", newline="") as file:
            csv.DictWriter(file, known, lineterminator="\n").writerow(self.rows[name][-1])

    def write_table(self, name: str):
        text, columns = io.StringIO(), dict.fromkeys(itertools.chain(*self.rows[name]))
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows[name])
        write_atomically(self.path / name, text.getvalue().encode())

    def newest(self) -> tuple[str, int]:
        """The newest stage that has made a step, or else cloning, and its steps."""
        stage = next((stage for stage, steps in reversed(self.done.items()) if steps), "bc")
        return stage, self.done.get(stage, 0)

    def evaluate_and_save(self, policy: Callable):
        """Evaluate a policy (see `Evaluator`) for eval.csv and the learning curve; save."""
        paused = time.perf_counter()
        scores = self.evaluator.evaluate(policy, self.args.best_of_n)
        self.append("eval.csv", *self.newest(), scores)
        self.bar.set_postfix({key: f"{scores[key]:.2f}" for key in SCORES[:2] if key in scores})
        try:
            with patch.dict(os.environ, MPLBACKEND="agg"):  # no screen's can stop it
                import matplotlib.style
            with matplotlib.style.context("default"):  # nor what a user's file sets
                self.draw()
        except Exception as error:  # nor does a run end for want of a picture
            print(f"note: the learning curve could not be drawn ({one_line(error)})")
        self.save()
        self.logged = self.logged[0] + time.perf_counter() - paused, self.logged[1]  # not in rates

    def evaluate_only(self, policy: Callable):
        """Evaluate args.checkpoint's policy, print the result, and film it, if asked for."""
        require(len(self.done) > 1, f"{self.source} is of a run that was still cloning: it holds "
                "no policy to evaluate yet")
        scores = self.evaluator.evaluate(policy, self.args.best_of_n)
        print(f"{self.args.env_id}, {scores['episodes']} episodes: {show(scores)}")
        if self.args.capture_video:
            self.film(Path(self.args.checkpoint).parent)

    def film(self, folder: Path):
        """Film the first episodes of the last evaluation, under a name that says of which step."""
        args, (stage, step), folder = self.args, self.newest(), folder / "videos"
        names = (f"{stage}-{step}-seed{args.seed}" + f"-{n}" * bool(n) for n in itertools.count())
        name = next(name for name in names if not [*folder.glob(f"{name}-episode*")])
        said = film(args.env_id, args.chunk_length, self.evaluator.played[:3], folder, name)
        print(f"no video: {said}" if said else f"video: {folder}/{name}*.mp4")

    def save(self):
        """Write checkpoint.pt: the state of all that `restore` was given, once a stage began. Ends
        the program where a signal asked for that."""
        state = {}
        for name, x in self.objects.items() if self.done else ():
            state[name] = x.get_state() if isinstance(x, torch.Generator) else x.state_dict()
        newest, previous = (self.path / name for name in CHECKPOINTS)
        content = dict(kind=self.script, args=vars(self.args), done=self.done, rows=self.rows,
                       data=self.data, device=self.device.type, seconds=self.elapsed(),
                       wandb_id=self.wandb_id, sittings=self.sittings, state=state)
        write_checkpoint(newest, content, previous)
        if self.stopping:
            sys.exit(128 + self.stopping)

    def save_clone(self, clone: torch.nn.Module):
        """Write bc_checkpoint.pt: the cloned policy, for all tasks of the domain, all scripts."""
        content = dict(kind="bc", domain=domain_of(self.args.env_id), args=vars(self.args),
                       data=self.data, state=clone.state_dict())
        write_checkpoint(self.path / "bc_checkpoint.pt", content)

    def elapsed(self) -> float:
        """Seconds this run has taken, all sittings together."""
        return self.seconds + time.perf_counter() - self.began

    def draw(self):
        """learning_curve.png: success (return, where there is none) of fine-tuning beside the
        clone's, and what was logged under trust_region/, by its name."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4), layout="constrained")
        score, region = figure.subplots(1, 2)
        start = {"offline": 0, "online": self.done.get("offline", 0)}  # cloning is at 0
        place = lambda row: start[row["stage"]] + row["step"] if row["stage"] in start else 0
        evals = self.rows["eval.csv"]
        train = [row for row in self.rows["train.csv"] if row["stage"] in start]
        key = next(key for key in SCORES if all(key in row for row in evals))
        values, errors = ([row.get(x, 0) for row in evals] for x in (key, f"{key}_stderr"))
        score.errorbar([*map(place, evals)], values, errors, fmt="o-", ms=3, label=self.script)
        score.axhline(values[0], color="0.4", ls="--", label="behaviour cloning")
        score.set(title=f"{key} ± standard error, {self.args.eval_episodes} episodes")
        regions = [(place(row), of_the_region(row)) for row in train]
        for key in sorted(set().union(*(numbers for _, numbers in regions))):
            points = [(x, numbers[key]) for x, numbers in regions if key in numbers]
            region.plot(*zip(*points), lw=1, label=key)
        region.set(title="trust region", yscale="log")
        for axis in (score, region):
            if "online" in self.done:
                axis.axvline(start["online"], color="0.4", ls=":", label="online from here")
            axis.legend(*axis.get_legend_handles_labels(), fontsize=8)
            axis.set_xlabel("fine-tuning steps")
            axis.grid(alpha=0.3)
        title = f"{self.args.env_id}, seed {self.args.seed}\n{describe_dataset(self.data)}"
        figure.suptitle(title, fontsize=9, parse_math=False)
        picture = functools.partial(figure.savefig, dpi=110, format="png")
        write_atomically(self.path / "learning_curve.png", picture)

    def finish(self, policy: Callable):
        """Film the last evaluation, if asked for, and print what the run came to."""
        self.listen(False)
        if self.args.capture_video:
            if not self.evaluator.played:  # resumed after its last evaluation
                self.evaluator.evaluate(policy, self.args.best_of_n)
            self.film(self.path)
        print(f"\n{self.args.env_id}, seed {self.args.seed}; {describe_dataset(self.data)}")
        for row in {row["stage"]: row for row in self.rows["eval.csv"]}.values():  # each one's last
            stage = {"bc": "behaviour cloning"}.get(row["stage"], f"{row['stage']} {row['step']:,}")
            print(f"{stage:20}{show(row)}")
        last = next((row for row in self.rows["train.csv"][::-1] if row["stage"] != "bc"), {})
        print(", ".join(f"{key} {x:.3g}" for key, x in of_the_region(last).items()))
        print(f"{self.elapsed() / 60:.1f} minutes; curve: {self.path / 'learning_curve.png'}")


def of_the_region(row: dict[str, Any]) -> dict[str, Any]:
    """What a row holds under trust_region/."""
    return {key[13:]: x for key, x in row.items() if key.startswith("trust_region/")}


def show(scores: dict[str, Any]) -> str:
    """Scores with their standard errors, where those are known, in words."""
    errors = {key: scores.get(f"{key}_stderr") for key in SCORES}
    words = {key: f" ± {error:.2f}" for key, error in errors.items() if error is not None}
    return ", ".join(f"{k} {scores[k]:.2f}{words.get(k, '')}" for k in SCORES if k in scores)


def choose_device(device: str, num_threads: int = 0, tf32: bool = False) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> the device, set to `num_threads` (0: torch's choice)
    and, a GPU, to TF32 products or exact ones. Raises UserError where it is absent."""
    if num_threads:
        torch.set_num_threads(num_threads)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(device.partition(":")[2] or 0)
    if device == "cpu" or device == "auto" and not count:
        return torch.device("cpu")
    require(number < count, f"--device {device}: torch finds {count} CUDA GPUs here; use --device "
            "cpu, or install a CUDA build of torch")
    torch.cuda.set_device(number)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return torch.device("cuda", number)


WORTH_COMPILING = 10_000  # updates, within which a minute and a half of compiling is won back


def compiled(function: Callable, choice: str, updates: int, device: torch.device) -> Callable:
    """`function` as one graph, made into fast code at its first call, within a minute or two, where
    choice is `on`, or `auto` and so many updates win that back and compiling works here. Raises
    UserError where it is `on` and does not work."""
    if choice == "off" or choice == "auto" and updates < WORTH_COMPILING:
        return function
    try:
        with telling("--compile: torch.compile does not work here", "install a C++ compiler"):
            torch.compile(torch.sin, fullgraph=True)(torch.ones(2, device=device))
    except UserError as error:  # no compiler, none of its headers, no Triton: each in its own way
        require(choice == "auto", str(error))
        print(f"not compiled, so slower: {error}")
        return function
    print("the update is compiled, a minute or two before the first one (--compile off: not)")
    by_exp = {"cpp.use_decompose_tanh": True}  # on a CPU, GELU's tanh costs most after the products
    return torch.compile(function, fullgraph=True, options=by_exp)


class CudaGraph:
    """An update whose many small launches on a GPU become a single one: recorded, then replayed.

    The first two calls run as they are, which compiles what is compiled and makes the optimizer's
    moments; the third one's launches are recorded. All read the same copies of what they are given.
    Where recording fails, it says so, and goes on launch by launch.

    update: takes named tuples of tensors (or None), of the same shapes each time, and gives named
    tensors. It must not wait for the device or draw random numbers, and changes things in place.
    """

    def __init__(self, update: Callable[..., dict[str, torch.Tensor]]):
        self.update, self.calls = update, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *inputs: tuple[torch.Tensor | None, ...]) -> dict[str, torch.Tensor]:
        """What `update` gives; its tensors are overwritten by the next call."""
        self.calls += 1
        if self.calls == 1:
            copies = [[None if x is None else x.clone() for x in group] for group in inputs]
            self.inputs = [type(group)(*copy) for group, copy in zip(inputs, copies)]
        for held, given in zip(self.inputs, inputs):
            pairs = [pair for pair in zip(held, given) if pair[1] is not None]
            torch._foreach_copy_(*map(list, zip(*pairs)))  # private, but one launch for all
        if self.calls == 3:
            self.record()
        if self.calls >= 3 and self.graph:
            self.graph.replay()
            return self.results
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.results = self.update(*self.inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return self.results

    def record(self):
        gc.collect()  # nothing that was compiled may be unloaded in the midst of recording
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.results = self.update(*self.inputs)
        except Exception as error:
            first = error.__context__ or error  # which the end of the recording hides
            print("note: the update is launched bit by bit, and so slower: recording it as a CUDA "
                  f"graph failed, {one_line(first)} (--no-cuda-graph: no attempt)")
            self.graph = None


def write_atomically(path: Path, content: Any, previous: Path | None = None):
    """Write bytes, or what a function writes to a binary file, so that at any moment `path` holds
    the whole old content or the whole new one. previous: where the old one is kept; for a moment it
    is there alone. Raises UserError where the disk is full or not writable."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with telling(f"{path} could not be written", "what was there before is unchanged", OSError):
            with open(temporary, "wb") as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path, flag: str):
    """Make a folder that can be written to. Raises UserError, naming the flag that it came by."""
    with telling(f"{flag}: {path} cannot be written to", "name another folder", OSError):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def lock_file(path: Path, wait: bool):
    """An open file, locked against other processes until it is closed. Says what it waits for."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        require(wait, f"--run-dir: another process is running in {path.parent}; wait for it, or "
                "name another folder")
        print(f"waiting for another process, which holds {path}", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        print(f"note: {path.parent} is on a file system without locks: see that one run uses it")
    return file


PRELOADED = ["common"]  # by the server that worker processes are forked from


@contextlib.contextmanager
def worker_context():
    """How worker processes start: from a small server that imported this module and never touched
    the GPU or a renderer, without running the user's own program again. Raises UserError where
    they cannot be started."""
    known = filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    # A file of the current folder may have the name of a module that they import.
    own = {"PYTHONPATH": os.pathsep.join(known), "PYTHONSAFEPATH": "1"}
    # A socket's path must be short, whatever TMPDIR is.
    short = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"
    # By these two names a worker would find the program that started it, and run it.
    unnamed = patch.dict(vars(sys.modules["__main__"]), __file__=None, __spec__=None)
    way = "free memory, raise `ulimit -n`, or do not start this from a worker of another pool"
    with (telling("worker processes cannot be started", way, (OSError, EOFError, AssertionError)),
          patch.dict(os.environ, own), patch.object(tempfile, "tempdir", short), unnamed):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
        yield context


def worker_errors():
    """`telling` where a worker process ends in the midst of its work."""
    return telling("a worker process has ended, as where memory is short", "free some; what was "
                   "saved goes on by --resume", (EOFError, ConnectionError, BrokenExecutor))


def follow_the_parent():
    """In a worker process: leave Ctrl-C, which reaches all processes at once, to the parent, and
    end when that ends, even if it is killed."""
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def cores() -> int:
    """Cores that this process may use, by its affinity and its container's limit."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for quota, period in limits_of("cpu.max"):
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def total_memory() -> int:
    """Bytes of memory of the machine, or of the container."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(int(limit) for [limit] in limits_of("memory.max"))])


def limits_of(name: str) -> list[list[str]]:
    """What a file of this process's control group, and of those above it, holds, but for "max"."""
    with contextlib.suppress(OSError, TypeError):
        own = re.search("^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.M)[1]
        root = Path("/sys/fs/cgroup")
        files = (root / group / name for group in (own, *map(str, Path(own).parents)))
        found = [file.read_text().split() for file in dict.fromkeys(files) if file.exists()]
        return [words for words in found if words[0] != "max"]
    return []


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages."""
    return {package: importlib.metadata.version(package) for package in packages}


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit(file: str | None = None) -> str | None:
    """Commit of the code that runs, with "+changes" where its tree differs from it or does not hold
    `file`, the program's (default: this one); None outside a git checkout."""
    # A hook's variables would name the repository that it was called in.
    own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    git = functools.partial(subprocess.run, cwd=Path(__file__).parent, env=own,
                            capture_output=True, text=True)
    with contextlib.suppress(OSError):
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        changes = git(["git", "status", "--porcelain", "-uno"]).stdout.strip()
        file = os.path.abspath(file or __file__)
        foreign = git(["git", "ls-files", "--error-unmatch", file]).returncode
        return commit + "+changes" * bool(changes or foreign) if commit else None


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()
