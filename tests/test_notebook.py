"""In a notebook: one live line while a run goes on, and a run that shows its report."""

import html
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import QUICK

import klrl
from klrl.errors import UsageError


def page_of(shown: str) -> str:
    (page,) = re.findall(r'srcdoc="(.*?)"', shown, re.DOTALL)
    return html.unescape(page)


def test_a_run_is_shown_in_a_line_and_by_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    run = klrl.train("ppo", "CartPole-v1", **QUICK)
    assert repr(run) == (f"<klrl.Run ppo CartPole-v1: {run.steps:,} steps, return {run.score.mean:.1f}, {run.folder}>")
    shown = run._repr_html_()
    page = page_of(shown)
    assert page == (run.folder / "report.html").read_text()
    assert page.count("data:image/svg+xml") > 5
    assert not re.findall(r"(?:src|href)=.?https?:", page), "it loads nothing"
    assert len(shown) < 500_000

    for name in [name for name in sys.modules if name.startswith(("matplotlib", "klrl.analysis.figures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "&lt;klrl.Run ppo CartPole-v1" in run._repr_html_()
    assert "klrl[plot]" in run._repr_html_()
    with pytest.raises(UsageError, match="needs matplotlib"):
        run.report()
    moved = replace(run, folder=Path("nowhere"))
    assert "nowhere is not a run" in moved._repr_html_()


def test_a_run_without_a_final_evaluation_has_no_return_to_show() -> None:
    def task() -> Any:
        import gymnasium

        return gymnasium.make("CartPole-v1")

    run = klrl.train("ppo", task, **QUICK | {"final_episodes": 0})
    assert repr(run) == f"<klrl.Run ppo task: {run.steps:,} steps, {run.folder}>"


def test_a_kernel_shows_one_line_and_the_report() -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    code = "import klrl\nklrl.train('ppo', 'CartPole-v1', total_timesteps=1000, n_envs=4, n_steps=64, final_episodes=2)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120).execute()
    lines = [out["data"]["text/plain"] for out in notebook.cells[0].outputs if out.output_type == "display_data"]
    (result,) = [out["data"] for out in notebook.cells[0].outputs if out.output_type == "execute_result"]
    printed = "".join(out["text"] for out in notebook.cells[0].outputs if out.output_type == "stream")
    assert len(lines) == 1
    assert re.match(r"100% 0:00 left  1,\d+ steps  .*  return \d", lines[0])
    assert " steps " not in printed
    assert printed.startswith("evaluation  ")
    assert result["text/plain"].startswith("<klrl.Run ppo CartPole-v1: 1,")
    assert result["text/html"].startswith("<iframe")
