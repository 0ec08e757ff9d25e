"""Makes a bc_checkpoint.pt of the cloned policy in one of the authors' checkpoints, a Flax pickle.

    python examples/authors_checkpoint.py params_300000.pkl bc_checkpoint.pt \\
        --env-id scene-play-singletask-task1-v0
    python trqam_offline.py --env-id scene-play-singletask-task2-v0 --bc-checkpoint bc_checkpoint.pt

The pickle does not say of which domain it is: --env-id does, with any of its tasks. Nothing that it
names is ever called: arrays are made of its bytes alone.
"""

import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import tyro

import common


@dataclass
class Args:
    pickle: tyro.conf.Positional[Path]
    """the authors' params_*.pkl"""
    output: tyro.conf.Positional[Path]
    """the bc_checkpoint.pt to write"""
    env_id: str
    """a task of the domain that it was trained on"""


class Dtype:
    """In place of numpy.dtype: the type of plain numbers that a pickle names."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or not re.fullmatch(r"[fiub]\d", code):
            raise pickle.UnpicklingError(f"an array of type {str(code)[:20]}")
        self.numbers = np.dtype(code)

    def __setstate__(self, state):
        self.numbers = self.numbers.newbyteorder(">" if state[1] == ">" else "<")


class Array:
    """In place of numpy.ndarray and jax.Array: `array` is made of a pickle's bytes alone."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, Dtype) or not isinstance(content, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array that is not a plain one")
        self.array = np.frombuffer(content, dtype.numbers).reshape(
            shape, order="F" if fortran else "C"
        )


def array_of(state) -> Array:
    array = Array()
    array.__setstate__(state)
    return array


class ArraysOnly(pickle.Unpickler):
    """Reads plain containers and arrays; raises UnpicklingError, with its name, for all else."""

    ADMITTED = {
        "multiarray._reconstruct": Array,
        "multiarray.scalar": Array,  # of which nothing is read
        "numeric._frombuffer": lambda content, dtype, shape, order: array_of(
            (1, shape, dtype, order == "F", content)
        ),
        "numpy.ndarray": "ndarray",
        "numpy.dtype": Dtype,
        "jax._src.array._reconstruct_array": lambda make, arguments, state, _: array_of(state),
        "collections.OrderedDict": dict,
        "flax.core.frozen_dict.FrozenDict": dict,
    }

    def find_class(self, module: str, name: str):
        known = re.sub(r"^numpy\._?core\.", "", f"{module}.{name}")  # of either NumPy
        if known not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of arrays needs")
        return self.ADMITTED[known]


def read_policy(path: Path) -> dict[str, torch.Tensor]:
    """The state of a `VelocityField` from an authors' checkpoint. Raises UserError where it holds
    anything but arrays, or no cloned policy."""
    try:
        with open(path, "rb") as file, np.errstate(all="ignore"):  # too large is infinite: refused
            tree = ArraysOnly(file).load()
            for key in ("agent", "network", "params", "modules_actor_slow", "mlp"):
                tree = tree[key]
            state, position = {}, 0
            for i in range(sum(name.startswith("Dense_") for name in tree)):
                for kind, weight in (("Dense", "kernel"), ("LayerNorm", "scale")):
                    if layer := tree.get(f"{kind}_{i}"):
                        w, b = (layer[name].array.astype(np.float32) for name in (weight, "bias"))
                        state[f"net.{position}.weight"] = torch.from_numpy(w.T.copy())
                        state[f"net.{position}.bias"] = torch.from_numpy(b.copy())
                        position += 2 if kind == "Dense" else 1  # a GELU follows each Linear
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        raise common.UserError(
            f"{path} is none of the authors' checkpoints ({common.one_line(error)})"
        ) from error
    common.require(all(torch.isfinite(x).all() for x in state.values()), f"{path} is not finite")
    return state


def main(args: Args):
    common.split_env_id(args.env_id)
    content = dict(kind="bc", domain=common.domain_of(args.env_id), args=dict(env_id=args.env_id))
    content |= dict(data=None, state=read_policy(args.pickle))
    common.write_checkpoint(args.output, content)
    print(f"{args.output}: a cloned policy for {content['domain']}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except common.UserError as error:
        sys.exit(f"error: {common.one_line(error)}")
