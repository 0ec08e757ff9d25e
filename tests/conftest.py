"""Makes the scripts importable from anywhere, and prints what the parity tests measured."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

parity_maxima: dict[str, tuple[str, float]] = {}  # file, script -> (worst quantity, its relative difference)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Two collected episodes: 2,000 transitions."""
    import common

    folder = tmp_path_factory.mktemp("pointmaze")
    return common.collect_dataset("pointmaze-medium-navigate-v0", 2, 0, str(folder))


def pytest_terminal_summary(terminalreporter):
    for name, (quantity, difference) in parity_maxima.items():
        terminalreporter.write_line(f"parity {name}: largest relative difference {difference:.1e} ({quantity})")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:.*DISPLAY environment variable is missing")
