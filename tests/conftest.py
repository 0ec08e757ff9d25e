"""Makes the scripts importable from anywhere, and prints what the parity tests measured."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

parity_maxima: dict[str, tuple[str, float]] = {}  # file, script -> (worst quantity, its relative difference)


def pytest_terminal_summary(terminalreporter):
    for name, (quantity, difference) in parity_maxima.items():
        terminalreporter.write_line(f"parity {name}: largest relative difference {difference:.1e} ({quantity})")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:.*DISPLAY environment variable is missing")
