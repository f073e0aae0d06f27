"""The rules of the house, read off the syntax trees: imports run one way, files stay short, packages are listed."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Lowest first; a room may import from those above it in this list, and from itself.
LAYERS = [
    {"klrl.errors", "klrl.spelling", "klrl.kl"},
    {"klrl.config", "klrl.console", "klrl.sb3"},
    {"klrl.policies"},
    {"klrl.buffers", "klrl.rundir", "klrl.envs"},
    {"klrl.agents"},
    {"klrl.training"},
    {"klrl.analysis"},
    {"klrl.sweep"},
    {"klrl.cli"},
    {"klrl.__main__"},
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (("klrl", "klrl"), ("agents", "klrl.agents"), ("envs", "klrl.envs")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "klrl" and parts[0] in ("agents", "envs"):
                continue  # the symlinks
            name = ".".join((package, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "klrl"
                else {node.module or ""}
            )
    return names


@pytest.mark.parametrize("module", sorted(set(modules()) - {"klrl"}))
def test_imports_run_one_way(module: str) -> None:
    for name in imports(modules()[module]):
        if name.startswith("klrl.") and room(name) in HEIGHT and room(name) != room(module):
            assert HEIGHT[room(name)] < HEIGHT[room(module)] or (room(name) == "klrl.errors"), (
                f"{module} imports {name}"
            )


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = {name: path for name, path in modules().items() if name != "klrl"}  # which names others on first use
    arrows: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):  # of a module, or of a name in one
                whole = {f"{node.module}.{alias.name}": node.module for alias in node.names}
                arrows[name] |= {part if part in known else str(module) for part, module in whole.items()}
    while ends := {name for name, targets in arrows.items() if not targets & arrows.keys() - {name}}:
        arrows = {name: targets for name, targets in arrows.items() if name not in ends}
    assert not arrows


def test_every_room_has_its_layer() -> None:
    assert {room(module) for module in modules()} - {"klrl"} == set(HEIGHT)


def test_the_heart_needs_only_torch() -> None:
    for module, path in modules().items():
        if room(module) == "klrl.kl":
            outside = {name.split(".")[0] for name in imports(path)} - {"klrl"}
            assert outside <= {"torch", *sys.stdlib_module_names}


def test_no_code_asks_which_algorithm_it_is_in() -> None:
    for module, path in modules().items():
        if room(module) not in ("klrl.agents", "klrl.cli.main", "klrl"):
            constants = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
            assert not {"ppo", "trpo", "sac"} & {value for value in constants if isinstance(value, str)}, module


def test_files_stay_short() -> None:
    for path in [*modules().values(), *ROOT.glob("tests/*.py")]:
        assert len(path.read_text().splitlines()) <= 350, f"{path} needs a reason at its top, or two files"


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    here = {m for m, path in modules().items() if path.name == "__init__.py"}
    assert listed == here


def test_import_klrl_does_not_import_torch() -> None:
    code = "import sys, klrl; assert 'torch' not in sys.modules; klrl.PPO; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_agent_asks_for_the_kind_of_its_actions_and_kl_for_no_attribute() -> None:
    for module, path in modules().items():
        text = path.read_text()
        assert ".continuous" not in text, module
        assert room(module) != "klrl.kl" or "hasattr(" not in text, module


def test_the_help_of_the_command_needs_no_torch() -> None:
    code = "import sys; from klrl.cli.main import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# What is read to understand one update of PPO, from PPO.update down; networks and distributions are ordinary PyTorch.
PATH = {
    "agents/ppo.py": "policy_loss PPO.update PPO._learn PPO._critic_step PPO._step PPO._gradient "
    "PPO._gradient_by_autograd",
    "agents/on_policy.py": "Batch value_loss OnPolicyAgent.make_batch OnPolicyAgent.estimates OnPolicyAgent.hold "
    "OnPolicyAgent.take_step OnPolicyAgent.diagnostics OnPolicyAgent.end_update OnPolicyAgent._learned "
    "OnPolicyAgent.snapshot OnPolicyAgent.undo",
    "klrl/kl/limit.py": "KLLimit Move",
    "klrl/policies/parameters.py": "FlatParameters gradients adam_step clip_",
    "klrl/buffers/returns.py": "gae RewardScale",
}


def test_one_update_of_ppo_is_read_in_five_files_and_650_lines() -> None:
    counts = {}
    for name, wanted in PATH.items():
        tree = ast.parse((ROOT / name).read_text())
        known: dict[str, Any] = {node.name: node for node in tree.body if hasattr(node, "name")}
        known |= {f"{c}.{m.name}": m for c, node in known.items() for m in node.body if hasattr(m, "name")}
        counts[name] = sum(known[one].end_lineno - known[one].lineno + 1 for one in wanted.split())
    assert sum(counts.values()) <= 650, counts
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"| `{name}` | {count} |" in listed for name, count in counts.items()), counts


def test_nothing_is_pickled() -> None:
    for module, path in modules().items():
        assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "cloudpickle", "joblib"}, module
