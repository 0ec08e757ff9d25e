"""What stands in several scripts is the same to the letter: they may only differ where it is
said."""

import ast
import difflib
import inspect

import pytest
from conftest import SCRIPTS

import qam_baseline
import trqam_offline
import trqam_online

# Of qam_baseline.py beside trqam_online.py: what is QAM's own. All else is the same.
QAM_OWN = {
    "EditPolicy",
    "edit_loss",
    "Agent",
    "Noise",
    "draw_noise",
    "policy_action",
    "losses",
    "update",
    "settings",
    "DOMAINS",
    "QUICK",
    "main",
    "Args",
}
TRQAM_ALONE = {"dual_descent", "tell_end_of_range"}
SAME_SETTINGS = {"kl_budget", "online_steps"}  # whose defaults or words may differ


def without_docstrings(text):
    """Lines of source, but for docstrings and the imports' blank lines."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        for field in ast.iter_child_nodes(node):
            if isinstance(field, ast.Expr) and isinstance(field.value, ast.Constant):
                for number in range(field.lineno - 1, field.end_lineno):
                    lines[number] = ""
    return [line for line in lines if line.strip()]


def definitions(script):
    """Name -> source, of each function, class and constant at the top level."""
    text, found = inspect.getsource(script), {}
    for node in ast.parse(text).body:
        names = (
            [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", [])]
        )
        found |= {name: ast.get_source_segment(text, node) for name in names}
    return found


def test_online_only_adds_to_offline():
    ours, theirs = (without_docstrings(inspect.getsource(x)) for x in (trqam_offline, trqam_online))
    removed = [line for line in difflib.ndiff(ours, theirs) if line.startswith("- ")]
    assert not removed and len(theirs) > len(ours) + 20


def test_qam_differs_from_trqam_where_it_says():
    ours, theirs = definitions(trqam_online), definitions(qam_baseline)
    assert {name for name in ours.keys() - theirs.keys()} == TRQAM_ALONE
    differing = {name for name in theirs if theirs[name] != ours.get(name)}
    assert differing == QAM_OWN


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_of_one_name_have_one_default(script):
    first, own = trqam_online.Args.__dataclass_fields__, script.Args.__dataclass_fields__
    shared = (first.keys() & own.keys()) - SAME_SETTINGS
    assert {name: own[name].default for name in shared} == {
        name: first[name].default for name in shared
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_qam_has_of_trqams_functions_is_theirs(script):
    """The lines of QAM's own update and losses that are not its own stand in TRQAM too."""
    ours, theirs = definitions(trqam_online), definitions(script)
    for name in ("losses", "update", "main", "Agent"):
        lines = without_docstrings(theirs[name])
        kept = sum(line in without_docstrings(ours[name]) for line in lines)
        assert kept >= 0.8 * len(lines), name
