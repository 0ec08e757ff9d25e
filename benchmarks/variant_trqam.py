"""`trqam_offline.py` with what the studies change in it: settings of its own, all else the same.

    python benchmarks/variant_trqam.py quick --adjoint-after-step

An example of a variant, too: settings in a subclass of `Args`, functions replaced before `main`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import common
import trqam_offline as script


@dataclass
class Args(script.Args):
    adjoint_after_step: bool = False
    """regress in (E10) on the adjoint after step k, which the K-step problem's optimum has"""
    reward_scale: Annotated[float, common.Positive] = 1.0
    """factor of the dataset's rewards"""


def scale_rewards(factor: float):
    """Make `common.load_dataset` multiply the rewards by a factor."""
    load = common.load_dataset

    def load_scaled(*words, **settings):
        dataset, info = load(*words, **settings)
        dataset.rewards *= factor
        return dataset, info

    common.load_dataset = load_scaled


def main(args: Args):
    """`trqam_offline.main`, changed as the settings say."""
    if args.adjoint_after_step:
        before_steps = script.lean_adjoint

        def after_steps(base, observation, xs, terminal):
            adjoints = before_steps(base, observation, xs, terminal)
            return torch.cat([adjoints[1:], terminal[None]])  # [K, B, A], k + 1 = 1 ... K

        script.lean_adjoint = after_steps
    scale_rewards(args.reward_scale)
    script.main(args)


if __name__ == "__main__":
    common.run_script(script.__file__, main, Args, script.settings)
