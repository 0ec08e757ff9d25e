"""Blocks that stand in several scripts are the same to the letter, and what differs is what is declared here."""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = {"trqam_online": "trqam_offline", "qam_baseline": "trqam_online"}  # script -> the one it is held beside
DIFFERS = {  # script -> definition that differs -> its lines that only the reference has: all others stand there too
    "trqam_online": {
        "Args": {"bc_checkpoint", "checkpoint"},  # fields that differ, or that only the reference has
        "QUICK": {"kl_budget=0.2,"},
        "settings": {'return {"preset": args.preset, **domain, **(QUICK if args.preset == "quick" else {})}'},
        "make_train_step": {"batch = dataset.sample(args.batch_size, generator)"},
        "main": {
            "total_steps = bc_steps + args.offline_steps",
            "fine_tuning = args.offline_steps",
            "run = common.Run(SCRIPT, args, sizes, agent.noise_dim, device)",
            "step = 0  # updates done, over both stages",
            'run.announce("fine-tuning", total_steps - max(step, bc_steps), make_train_step(*trial, "offline", args))',
            "if step == bc_steps == 0:",
            'run.evaluate("bc", 0, policy)',
            "run.tick(stage, stage_step, statistics)",
            "stage_ends = step in (bc_steps, total_steps)",
            "run.log(statistics)",
            "run.save(agent=agent.state_dict(), optimizer=optimizer.state_dict(), generator=generator.get_state())",
        },
    },
    "qam_baseline": {
        "Args": {
            "bc_checkpoint", "checkpoint", "online_steps", "kl_budget", "kl_budget_online", "lam_scale", "eta_lambda",
            "kl_ema_coef", "kl_clip_coef", "lambda_min", "lambda_max",
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
        "losses": {
            "temperature = args.lam_scale * agent.lam",
            "terminal = terminal_adjoint(agent.target_critic, s, x_final)  # [B, A]",
            "return loss_q + loss_bc + loss_am, {name: value.detach() for name, value in statistics.items()}",
        },
        "update": {
            '"""One TRQAM update, in place; a function of (agent, optimizer), batch and noise that never waits for the '
            "device.",
            'dual_descent(agent, statistics["trust_region/path_kl"], args)',
            '"trust_region/path_kl_ema": agent.kl_ema.clone(),',
            '"trust_region/kl_budget": args.kl_budget,',
            '"trust_region/lambda": agent.lam.clone(),',
        },
        "settings": {
            'start = {"offline_steps": 0} if args.bc_checkpoint else {}',
            'return {"preset": args.preset, **domain, **(QUICK if args.preset == "quick" else {}), **start}',
        },
        "make_train_step": {
            'if stage == "online" and args.kl_budget_online:',
            "args = replace(args, kl_budget=args.kl_budget_online)",
        },
        "main": {
            "run = common.Run(SCRIPT, args, sizes, agent.noise_dim, device, STARTS_FROM)",
            'if run.checkpoint["device"] == device.type:  # another kind\'s generator cannot go on here',
            'if run.checkpoint["kind"] == SCRIPT:',
            'if step >= bc_steps and not run.rows["eval.csv"]:',
            'run.evaluate("offline" if step > bc_steps else "bc", step - bc_steps, policy)',
        },
        "dual_descent": None,  # the reference's alone
        "STARTS_FROM": None,
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
    ours, reference = definitions(script), definitions(REFERENCE[script])
    for name in reference:
        if name in DIFFERS[script]:
            continue
        assert name in ours, f"{script}.py lacks {name}"
        for number, (a, b) in enumerate(zip(reference[name], ours[name])):
            assert a == b, f"{name}, line {number + 1}:\n{REFERENCE[script]}.py: {a}\n{script}.py: {b}"
        assert len(reference[name]) == len(ours[name]), (
            f"{name} is longer in one of {REFERENCE[script]}.py and {script}.py"
        )


@pytest.mark.parametrize("script", DIFFERS)
def test_what_differs_is_what_is_declared(script):
    ours, reference = definitions(script), definitions(REFERENCE[script])
    for name, only_in_reference in DIFFERS[script].items():
        if only_in_reference is None or name == "Args":
            continue
        strip = lambda lines: [line.strip() for line in lines]
        difference = difflib.ndiff(strip(reference[name]), strip(ours[name]))
        gone = [line[2:] for line in difference if line.startswith("- ")]
        undeclared = [line for line in gone if line not in only_in_reference]
        assert not undeclared, (
            f"{name}: {script}.py lacks, or has changed, {REFERENCE[script]}.py's line: {undeclared[0]}"
        )
        assert only_in_reference == set(gone), f"{name}: declared here as different, but the same in both scripts"
    ours, reference = fields(ours["Args"]), fields(reference["Args"])
    assert {name for name in reference if ours.get(name) != reference[name]} == DIFFERS[script]["Args"]


def test_the_scripts_import_only_what_they_may():
    for script in ("trqam_offline", *DIFFERS):
        imported = set()
        for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        standard = {"collections", "copy", "functools", "itertools", "math", "dataclasses", "pathlib", "typing"}
        assert imported - standard <= {"torch", "numpy", "tyro", "common"}
