"""`qam_baseline.py` with what the studies change in it: settings of its own, all else the same.

    python benchmarks/variant_qam.py quick --inverse-temperature 10 --penalty-budget 0.2

The external penalty is QAM's loss plus b KL, KL the path KL (E11) of the batch, with b >= 0 moved
by the dual descent that moves TRQAM's lambda, at a rate of its own: b <- b + 5 (D - budget). At the
regression's optimum it divides QAM's inverse temperature by 1 + b h / (2 c).
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from variant_trqam import scale_rewards

import common
import qam_baseline as script
from trqam_offline import dual_descent


@dataclass
class Args(script.Args):
    penalty_budget: Annotated[float, common.NotNegative] = 0.0
    """path KL, in nats per action, that an external penalty holds; 0: no penalty"""
    reward_scale: Annotated[float, common.Positive] = 1.0
    """factor of the dataset's rewards"""


def penalise(budget: float):
    """Give the script's loss the penalty, whose state is in the agent, and so in checkpoints."""
    matching_loss, update = script.adjoint_matching_loss, script.update

    class Agent(script.Agent):
        def __init__(self, observation_dim: int, chunk_dim: int, args: Args):
            super().__init__(observation_dim, chunk_dim, args)
            self.register_buffer("penalty", torch.tensor(0.0))  # b
            self.register_buffer("kl_ema", torch.tensor(0.0))  # D

            def penalised(delta, *words):
                kl = script.path_kl(delta, args.chunk_length)
                return matching_loss(delta, *words) + self.penalty * kl

            script.adjoint_matching_loss = penalised

    def penalised_update(agent, *words, **settings):
        statistics = update(agent, *words, **settings)
        with torch.no_grad():
            dual_descent(agent.penalty, agent.kl_ema, statistics["trust_region/path_kl"], budget,
                         eta_lambda=5.0, lambda_min=0, lambda_max=math.inf)
        return statistics | {"trust_region/path_kl_ema": agent.kl_ema.clone(),
                             "trust_region/penalty": agent.penalty.clone()}

    script.Agent, script.update = Agent, penalised_update


def main(args: Args):
    """`qam_baseline.main`, changed as the settings say."""
    if args.penalty_budget:
        penalise(args.penalty_budget)
    scale_rewards(args.reward_scale)
    script.main(args)


if __name__ == "__main__":
    common.run_script(script.__file__, main, Args, script.settings)
