"""``klrl plot``: the figures are files, and what they show is so."""

import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributions as td

from klrl.analysis.plots import BIMODAL, FIGURES, PlotConfig, distribution, families, fit_normal
from klrl.cli import main as cli
from klrl.errors import UsageError


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_written_as_png_and_as_svg(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plot", name])
    cli.main(["plot", name, "--output", "figure.svg"])
    assert capsys.readouterr().out.split() == [f"{name}.png", "figure.svg"]
    assert Path(f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert ET.parse("figure.svg").getroot().tag.endswith("svg")


def test_the_forward_fit_has_the_targets_moments_and_the_reverse_fits_seek_its_modes() -> None:
    for start in (-4.0, 0.0, 4.0):
        covering = fit_normal(BIMODAL, "forward", start)
        assert covering.mean == pytest.approx(float(BIMODAL.mean), abs=1e-4)
        assert covering.std == pytest.approx(float(BIMODAL.stddev), abs=1e-4)
    left, right = (fit_normal(BIMODAL, "reverse", start) for start in (-2.0, 2.5))
    # Far apart, each is nearly the mode itself, and its KL nearly the logarithm of what it leaves out.
    assert left.mean == pytest.approx(-2.0, abs=0.05)
    assert right.mean == pytest.approx(2.5, abs=0.05)
    assert left.divergence == pytest.approx(-math.log(0.6), abs=0.02)
    assert right.divergence == pytest.approx(-math.log(0.4), abs=0.02)


def test_bars_have_the_lengths_of_the_divergences() -> None:
    figure = families(distribution(("normal", "0", "1"), "--old"), distribution(("normal", "-1", "1"), "--new"))
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    # For equal widths: d^2/2 both ways, twice that, d^2/8 * 2 alpha, and 2 Phi(d/2) - 1.
    total_variation = math.erf(0.5 / math.sqrt(2))
    assert widths[:4] == pytest.approx([0.5, 0.5, 1.0, 0.25], rel=1e-5)
    assert widths[5] == pytest.approx(total_variation, rel=1e-4)
    assert widths[4] < math.log(2)


@pytest.mark.parametrize(
    ("old", "new", "exact"),
    [
        (("normal", "0", "1"), ("normal", "0", "1e-4"), (-2 * math.log(math.sqrt(2e-4 / (1 + 1e-8))), None)),
        (("beta", "0.1", "1"), ("beta", "0.2", "1"), (-2 * math.log(math.sqrt(0.02) / 0.15), 0.25)),
    ],
)
def test_narrow_and_steep_densities_are_measured_too(old: Any, new: Any, exact: tuple[float, float | None]) -> None:
    figure = families(distribution(old, "--old"), distribution(new, "--new"))
    renyi, _, total_variation = [bar.get_width() for bar in figure.axes[0].patches][3:]
    assert renyi == pytest.approx(exact[0], rel=1e-3)
    if exact[1] is not None:
        assert total_variation == pytest.approx(exact[1], rel=1e-3)


def test_an_infinite_divergence_is_labelled_so() -> None:
    figure = families(distribution(("bernoulli", "0.5"), "--old"), distribution(("bernoulli", "1"), "--new"))
    assert figure.axes[0].texts[0].get_text() == "inf"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plot"], "plot needs one of kl-gaussian, kl-2d, fit, families"),
        (["plot", "fot"], "did you mean 'fit'"),
        (["plot", "fit", "--output", "no/such/folder.png"], "a folder that exists"),
        (["plot", "fit", "--output", "figure.txt"], "end in .png or .svg"),
        (["plot", "families", "--old", "cauchy", "0", "1"], "--old must begin with one of normal"),
        (["plot", "families", "--old", "normal", "0"], "needs normal MEAN STD"),
        (["plot", "families", "--old", "normal", "0", "-1"], "needs normal MEAN STD"),
        (["plot", "families", "--old", "normal", "inf", "1"], "needs normal MEAN STD"),
        (["plot", "families", "--old", "categorical", "0.7", "0.7"], "needs categorical P1 P2 ... summing to 1"),
        (["plot", "families", "--new", "normal", "0", "1"], "two of one family"),
        (["plot", "families", "--new", "categorical", "0.5", "0.5"], "2: give as many probabilities"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(Path().iterdir())


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import sys

    real = builtins.__import__

    def absent(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.delitem(sys.modules, "klrl.analysis.plots")
    monkeypatch.delattr("klrl.analysis.plots")
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match="klrl\\[plot\\]"):
        cli._dispatch(["plot", "fit"])


def test_defaults_are_of_one_family() -> None:
    config = PlotConfig()
    old, new = distribution(config.old, "--old"), distribution(config.new, "--new")
    assert isinstance(old, td.Categorical)
    assert isinstance(new, td.Categorical)
    assert torch.allclose(old.probs.sum(), new.probs.sum())
