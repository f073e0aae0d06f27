"""The page of examples: each is short, is on the page, and runs."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_is_short_and_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in (EXAMPLES / name).read_text().splitlines() if line.strip()]
    assert len(lines) <= 30
    assert f"[{name}]({name})" in (EXAMPLES / "README.md").read_text()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out
