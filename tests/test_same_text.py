"""Blocks that stand in several scripts are the same to the letter, and what differs is what is declared here."""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "trqam_offline"
DIFFERS = {  # script -> definition that differs -> its lines that only the reference has: all others stand there too
    "qam_baseline": {
        "Args": {  # fields; those of the same name are the same, docstrings included
            "kl_budget", "lam_scale", "eta_lambda", "kl_ema_coef", "kl_clip_coef", "lambda_min", "lambda_max",
        },
        "Agent": {
            '"""The networks and the two numbers of the dual descent, all of which a checkpoint holds."""',
            'self.register_buffer("lam", torch.tensor(1.0))  # lambda',
            'self.register_buffer("kl_ema", torch.tensor(0.0))  # D',
        },
        "Noise": {"next_action: Tensor  # [B, A] normal, x_0 of the next action in the critic's target"},
        "draw_noise": {
            "return Noise(next_action, flow_x0, flow_t, sde_x0, sde=normal(args.flow_steps, batch_size, chunk_dim))",
        },
        "policy_action": {
            '"""What acts: actor_fast, at observation [n, O] from noise [n, A] -> action chunks [n, A] in [-1, 1]."""',
        },
        "update": {
            '"""One TRQAM update, in place; a function of (agent, optimizer), batch and noise that never waits for the '
            "device.",
            "temperature = args.lam_scale * agent.lam",
            "terminal = terminal_adjoint(agent.target_critic, s, x_final)  # [B, A]",
            "(loss_q + loss_bc + loss_am).backward()",
            "dual_descent(agent, kl, args)",
            '"trust_region/path_kl_ema": agent.kl_ema.clone(),',
            '"trust_region/kl_budget": args.kl_budget,',
            '"trust_region/lambda": agent.lam.clone(),',
        },
        "settings": set(),
        "train_step": {"batch = dataset.sample(args.batch_size, generator)"},
        "main": {
            "total_steps = bc_steps + args.offline_steps",
            "step = 0  # updates done, over both stages",
            'run.announce("fine-tuning", total_steps - max(step, bc_steps), '
            'lambda: train_step(*trial, "offline", args))',
            "stage_ends = step in (bc_steps, total_steps)",
            "run.log(stage, stage_step, statistics)",
            "run.save(agent=agent.state_dict(), optimizer=optimizer.state_dict(), generator=generator.get_state())",
        },
        "dual_descent": None,  # the reference's alone
        "DOMAINS": None,
        "QUICK": None,
    },
}  # fmt: skip


def definitions(script):
    """Name -> source lines, of each function, class and constant at the top level of a script."""
    source = (ROOT / f"{script}.py").read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        names = [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", [])]
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        found |= {name: lines[first - 1 : node.end_lineno] for name in names}
    return found


def fields(lines):
    """Field -> its type, default and docstring, of a dataclass's source lines."""
    body = ast.parse("\n".join(lines)).body[0].body
    return {field.target.id: (ast.unparse(field), ast.unparse(doc)) for field, doc in zip(body[::2], body[1::2])}


@pytest.mark.parametrize("script", DIFFERS)
def test_shared_blocks_are_the_same_to_the_letter(script):
    ours, reference = definitions(script), definitions(REFERENCE)
    for name in reference:
        if name in DIFFERS[script]:
            continue
        assert name in ours, f"{script}.py lacks {name}"
        for number, (a, b) in enumerate(zip(reference[name], ours[name])):
            assert a == b, f"{name}, line {number + 1}:\n{REFERENCE}.py: {a}\n{script}.py: {b}"
        assert len(reference[name]) == len(ours[name]), f"{name} is longer in one of {REFERENCE}.py and {script}.py"


@pytest.mark.parametrize("script", DIFFERS)
def test_what_differs_is_what_is_declared(script):
    ours, reference = definitions(script), definitions(REFERENCE)
    for name, only_in_reference in DIFFERS[script].items():
        if only_in_reference is None or name == "Args":
            continue
        strip = lambda lines: [line.strip() for line in lines]
        difference = difflib.ndiff(strip(reference[name]), strip(ours[name]))
        gone = [line[2:] for line in difference if line.startswith("- ")]
        undeclared = [line for line in gone if line not in only_in_reference]
        assert not undeclared, f"{name}: {script}.py lacks, or has changed, {REFERENCE}.py's line: {undeclared[0]}"
        assert only_in_reference == set(gone), f"{name}: declared here as different, but the same in both scripts"
    ours, reference = fields(ours["Args"]), fields(reference["Args"])
    assert reference.keys() - ours.keys() == DIFFERS[script]["Args"]
    for name in reference.keys() & ours.keys():
        assert reference[name] == ours[name]


def test_the_scripts_import_only_what_they_may():
    for script in (REFERENCE, *DIFFERS):
        imported = set()
        for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        standard = {"copy", "itertools", "math", "dataclasses", "pathlib", "typing"}
        assert imported - standard <= {"torch", "numpy", "tyro", "common"}
