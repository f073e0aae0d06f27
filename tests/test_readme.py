"""README's Python, run as it stands, block after block; and its commands' names."""

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_in_order_and_are_short() -> None:
    assert len(BLOCKS) == 6
    names: dict[str, Any] = {}
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line]) <= 10
        exec(compile(block.replace("50_000", "5_000"), "README.md", "exec"), names)
    assert names["agent"].action_space == names["run"].agent.action_space
    assert names["report"].kl.mean >= 0
    assert names["update"].report.mean > 0
    assert names["divergence"].tolist() == [pytest.approx(3 * 0.1**2 / 2)] * 8


def test_the_section_on_kl_alone_is_short() -> None:
    section = README.split("## Use only the KL\n")[1].split("\n| what | for |")[0]
    assert section.count("```python") == 3
    assert len([line for line in section.splitlines() if line]) <= 25


def test_install_commands_are_those_that_ci_runs() -> None:
    ci = (Path(__file__).resolve().parent.parent / ".ci" / "run").read_text()
    command = 'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[dev]" && .venv/bin/pytest'
    assert f"$ {command}\n" in README
    assert f"\n{command}\n" in ci
