"""Reports on runs in one file: HTML with figures, Markdown or JSON."""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from klrl.analysis import tables
from klrl.analysis.anomalies import find_anomalies
from klrl.analysis.scores import Group, group_runs, score_of
from klrl.config import Checked, flatten
from klrl.console import printable, warn
from klrl.errors import UsageError, needs, refusals
from klrl.rundir.folder import replace_file
from klrl.rundir.history import Column, History, read_history


@dataclass(frozen=True)
class ReportConfig(Checked):
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = ""
    """File to write; by default report.html in the run's folder, for several runs here; md and json are printed."""
    format: Literal["html", "md", "json"] = "html"
    """A page with figures (takes the extra "plot"), Markdown tables, or JSON."""


def report(paths: Sequence[str], config: ReportConfig) -> str:
    """Write the report on the runs at ``paths``, each a run's folder or one above some.

    Returns the file's name, or the text where it is to be printed. Raises UsageError where a path holds no run, and
    where the report cannot be written.
    """
    folders = {folder.resolve(): folder for path in paths for folder in _folders(path)}
    runs = _readable(list(folders.values()))
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of nans, which runs log and cut short
        return _write(runs, config)


def _readable(folders: list[Path]) -> list[History]:
    """The runs in ``folders``; of one that cannot be read, a line on stderr. Raises UsageError where none can be."""
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_history(folder))
        except UsageError as problem:
            problems.append(problem)
    if not runs:
        raise problems[0]
    for complaint in problems:
        warn(f"{complaint}; it is left out")
    return runs


def _write(runs: list[History], config: ReportConfig) -> str:
    groups = group_runs(runs)
    if config.format == "json":
        text = json.dumps(summary(groups), indent=2, default=str)
    elif config.format == "md":
        text = as_markdown(summary(groups))
    else:
        text = as_html(groups)
        if not config.output:
            path = (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
            replace_file(path, text)
            return str(path)
    if not config.output:
        return text
    with refusals(f"--output {config.output}"):
        Path(config.output).write_text(text, encoding="utf-8")
    return config.output


def _folders(path: str) -> list[Path]:
    if (Path(path) / "config.toml").is_file():
        return [Path(path)]
    found = sorted(file.parent for file in Path(path).rglob("metrics.jsonl") if (file.parent / "config.toml").exists())
    if not found:
        raise UsageError(f"{path} is not a run's folder, and holds none")
    return found


def summary(groups: Sequence[Group]) -> dict[str, Any]:
    """The report as plain data, with None for what is unknown, nan or infinite."""
    return {
        "groups": [
            {
                "letter": group.letter,
                "name": group.name,
                "score": None if (score := score_of(group.runs)) is None else score._asdict(),
                "runs": [_run_summary(run) for run in group.runs],
            }
            for group in groups
        ]
    }


def _run_summary(run: History) -> dict[str, Any]:
    of_limit = run["kl/of_limit"][~np.isnan(run["kl/of_limit"])]
    return {
        "folder": str(run.folder),
        "agent": run.agent,
        "env": run.env,
        "seed": run.seed,
        "state": run.state,
        "steps": run.steps,
        "total_timesteps": int(run.options["total_timesteps"]),
        "seconds": _number(run.last("wall")),
        "return": _number(run.final_return),
        "kl": {
            "limit": _number(run.last("kl/limit")),
            "mean": _number(run.last("kl/mean")),
            "median_of_limit": _number(float(np.median(of_limit))) if len(of_limit) else None,
            "updates_over_limit": int((of_limit > 1).sum()),
            "updates": len(run["step"]),
            "states": states_summary(run),
        },
        "reference": {
            "limit": _number(run.last("reference/limit")),
            "kl": _number(run.last("reference/kl")),
            "updates_over_limit": int((run["reference/of_limit"] > 1).sum()),
        },
        "critic": {"explained_variance": _number(_later_median(run["train/explained_variance"]))},
        "anomalies": [found._asdict() for found in find_anomalies(run)],
        "config": {key: _plain(value) for key, value in flatten(run.options).items()},
    }


def _later_median(values: Column) -> float:
    """The median over the later half of what was logged; nan where nothing was."""
    logged = values[np.isfinite(values)]
    return float(np.median(logged[len(logged) // 2 :])) if len(logged) else math.nan


def states_summary(run: History) -> dict[str, Any] | None:
    """What KL did in single states, as numbers and in a sentence; None where the run logged nothing of it."""
    largest, kl = run["kl/max"], run.options["kl"]
    if np.isnan(largest).all():
        return None
    at = int(np.nanargmax(largest))
    times = largest[at] / run["kl/mean"][at]
    over, held = run["kl/max_of_limit"], run.last("kl/held_states")
    reached = float(np.nanmax(over, initial=-math.inf))
    limit = run.last("kl/max_limit")
    words = f"The largest KL of a state was {f'{largest[at]:.3g} nats' if largest[at] < math.inf else 'infinite'}"
    if math.isfinite(times):
        words += f", {_times(times)} its update's mean"
    if reached >= 0:
        name = "reverse KL" if kl["direction"] == "reverse" else "KL"
        words += f"; the {name} of single states reached at most {_times(reached)} its limit of {limit:.3g}"
    if math.isfinite(held):
        words += f"; the rules held back {100 * held:.3g}% of the states in the last update"
    return {
        "largest": _number(float(largest[at])),
        "largest_at_step": int(run["step"][at]),
        "largest_of_mean": _number(float(times)),
        "limit": _number(limit),
        "largest_of_limit": _number(reached),
        "updates_over_limit": int((over > 1).sum()),
        "held": _number(held),
        "in_words": f"{words}.",
    }


def _times(factor: float) -> str:
    return f"{factor:,.0f} times" if factor >= 10 else f"{factor:.2g} times"


def _plain(value: Any) -> Any:
    """An option's value as JSON has it: infinity and nan as texts."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Of the critic's targets, which lead on from its own values: klrl compare has that of the returns themselves.
_EXPLAINED = "critic: explained variance, later half"
_SCORE_COLUMNS = ("", "setting", "runs", "mean", "std", "IQM", "95 % of IQM")
_RUN_COLUMNS = ("run", "seed", "state", "steps", "return", "KL / limit, median", "updates over limit", _EXPLAINED)


def _score_rows(data: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for group in data["groups"]:
        score = group["score"]
        numbers = ["-"] * 4
        if score is not None:
            numbers = [f"{score[key]:.1f}" for key in ("mean", "std", "iqm")]
            numbers.append(f"{score['low']:.1f} to {score['high']:.1f}")
            if len(group["runs"]) == 1:  # nothing to spread
                numbers[1] = numbers[3] = "-"
        ended = sum(run["state"] == "finished" for run in group["runs"])
        count = f"{ended} of {len(group['runs'])}" if 0 < ended < len(group["runs"]) else str(len(group["runs"]))
        yield group["letter"], group["name"], count, *numbers


def _run_rows(data: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for run in (run for group in data["groups"] for run in group["runs"]):
        kl = run["kl"]
        median = "-" if kl["median_of_limit"] is None else f"{kl['median_of_limit']:.2f}"
        over = "-" if kl["limit"] is None else f"{kl['updates_over_limit']} of {kl['updates']}"
        score = "-" if run["return"] is None else f"{run['return']:.1f}"
        steps = f"{run['steps']:,} of {run['total_timesteps']:,}"
        explained = run["critic"]["explained_variance"]
        critic = "-" if explained is None else f"{explained:.2f}"
        yield Path(run["folder"]).name, str(run["seed"]), run["state"], steps, score, median, over, critic


def as_markdown(data: dict[str, Any]) -> str:
    """The ``summary`` as tables in Markdown."""
    lines = ["# Final scores", "", *tables.as_markdown(_SCORE_COLUMNS, _score_rows(data))]
    lines += ["", "# Runs", "", *tables.as_markdown(_RUN_COLUMNS, _run_rows(data))]
    runs = [(tables.markdown(Path(run["folder"]).name), run) for group in data["groups"] for run in group["runs"]]
    states = [f"- {name}: {run['kl']['states']['in_words']}" for name, run in runs if run["kl"]["states"]]
    if states:
        lines += ["", "# KL over states", "", *states]
    found = [
        f"- {name}: {tables.markdown(anomaly['what'])}. Try: {anomaly['advice']}."
        for name, run in runs
        for anomaly in run["anomalies"]
    ]
    return "\n".join([*lines, "", "# Anomalies", "", *(found or ["None found."])])


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1240px; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem } h3 { font-size: .95rem }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 0 1.5rem;
  grid-auto-flow: dense } .wide { grid-column: 1 / -1 } .wide p { max-width: 30rem }
@media (min-width: 860px) { .wide { display: grid; grid-template-columns: 3fr 1fr; gap: 0 1.5rem }
  .wide figcaption { grid-column: 1 / -1 } }
figure { margin: .5rem 0 } figcaption { font-weight: 600; font-size: .9rem } img { width: 100% }
table { border-collapse: collapse; font-size: .9rem } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
  border-bottom: 1px solid #e4e4e4; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto } .anomaly { border-left: 3px solid #b3261e; padding: .2rem .8rem; margin: .5rem 0 }
.quiet { color: #666 } summary { cursor: pointer; margin: .5rem 0 }
"""


def as_html(groups: Sequence[Group]) -> str:
    """One self-contained page: tables, anomalies, figures, configs. Raises UsageError without matplotlib."""
    with needs("plot", "matplotlib"):
        from klrl.analysis.figures import KL_FIGURES, PANELS, STATE_FIGURES, TIME_FIGURES, as_data

    def draw(figures: Mapping[str, Callable[[Any], Any]], subject: Any, words: str = "") -> list[str]:
        """Draw the ``figures`` of ``subject``; where there are ``words``, across the page with these beside them."""
        drawn = [(escape(name), figure) for name, draw in figures.items() if (figure := draw(subject)) is not None]
        kind, said = (' class="wide"', f"<p>{escape(words)}</p>") if words else ("", "")
        image = '<figure{2}><figcaption>{0}</figcaption><img alt="{0}" src="{1}">{3}</figure>'
        return [image.format(name, as_data(figure), kind, said) for name, figure in drawn]

    def panels(cells: list[str]) -> str:
        return f'<div class="panels">{"".join(cells)}</div>'

    data, runs = summary(groups), [run for group in groups for run in group.runs]
    several = len(runs) > 1
    title = escape(printable(groups[0].name if len(groups) == 1 else f"{len(groups)} settings, {len(runs)} runs"))
    body = [f"<h1>{title}</h1>", tables.as_html(_RUN_COLUMNS, _run_rows(data))]
    if several:
        note = "Lines are means over the runs of a setting, bands the middle 95 % of 2000 bootstrapped means."
        body += ["<h2>Final scores</h2>", tables.as_html(_SCORE_COLUMNS, _score_rows(data))]
        body.append(f'<p class="quiet">{note}</p>')
        for env in dict.fromkeys(run.env for run in runs):
            there = [group for group in groups if group.runs[0].env == env]
            body += [f"<h2>{escape(printable(env))}</h2>", panels(draw(PANELS, there))]
        body.append("<h2>Run by run</h2>")
    for run in runs:
        shared, states = [] if several else draw(PANELS, groups), states_summary(run)
        own = draw(KL_FIGURES, run) + draw(STATE_FIGURES, run, states["in_words"] if states else "")
        figures = panels(shared[:1] + own + shared[1:] + draw(TIME_FIGURES, run))
        body.append(f"<details {'' if several else 'open'}>{_html_of_run(run, figures)}</details>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _html_of_run(run: History, figures: str) -> str:
    """A run's summary line, anomalies, figures and options."""
    anomalies = find_anomalies(run)
    heading = (
        f"{escape(printable(run.folder.name))}: {len(anomalies) or 'no'} anomal{'y' if len(anomalies) == 1 else 'ies'}"
    )
    found = "".join(
        f'<div class="anomaly">{escape(printable(what))}.<br><span class="quiet">Try: {escape(advice)}.</span></div>'
        for what, advice in anomalies
    )
    options = tables.as_html(("option", "value"), ((key, str(value)) for key, value in flatten(run.options).items()))
    return f"<summary>{heading}</summary>{found}{figures}<details><summary>config</summary>{options}</details>"
