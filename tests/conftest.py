"""The scripts that all tests run on, a small dataset, and the end of the report: parity.

A variant of a script is tested by all that applies to it once it stands in `SCRIPTS`.
"""

import inspect
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks, in processes side by side

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common
import qam_baseline
import trqam_offline
import trqam_online

# Hundreds of short processes are forked from one whose imports are done.
common.PRELOADED += ["mujoco", "ogbench.locomaze.maze", "torch._dynamo", "trqam_online"]
SCRIPTS = [trqam_offline, trqam_online, qam_baseline]


def algorithm(script) -> dict[str, str]:
    """Source of the functions and networks of a script, but for what runs them."""
    own = (x for x in vars(script).values() if getattr(x, "__module__", "") == script.__name__)
    skipped = ("Args", "settings", "online_step", "main")
    return {x.__name__: inspect.getsource(x) for x in own if x.__name__ not in skipped}


# One of each algorithm: what is the same to the letter need not be trained twice.
DISTINCT = [x for i, x in enumerate(SCRIPTS) if algorithm(x) not in map(algorithm, SCRIPTS[:i])]


def scripts_with(setting: str) -> list:
    """Those whose `Args` have a setting: `kl_budget` tells a trust region, `online_steps` a
    stage."""
    return [script for script in SCRIPTS if hasattr(script.Args, setting)]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Two collected episodes: 2,000 transitions; one file for all of pytest-xdist's processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "pointmaze"
    return common.collect_dataset("pointmaze-medium-navigate-v0", 2, 0, str(folder))


def pytest_configure(config):
    config.addinivalue_line("markers", "whole_episodes: evaluations are not cut short")


def pytest_collection_modifyitems(items):
    """The longest first, so that pytest-xdist's other process does not wait for it at the end."""
    items.sort(key=lambda item: "node_die" not in item.name)


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, words in report.user_properties:
            terminalreporter.write_line(f"{name}: {words}")
