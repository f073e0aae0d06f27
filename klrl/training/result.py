"""What a finished run is handed over as."""

import contextlib
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from klrl.agents.base import Agent
from klrl.config import Seed, convert
from klrl.envs.make import EnvFactory, env_name, make_vector
from klrl.errors import UsageError
from klrl.training.evaluation import Evaluation, evaluation_seed, run_episodes
from klrl.training.options import RunConfig


@dataclass(frozen=True, repr=False)
class Run:
    """A finished training run; a notebook shows its report."""

    agent: Agent
    folder: Path
    env: str | EnvFactory
    config: RunConfig
    score: Evaluation
    """The final evaluation; of no episodes and nan with ``final_episodes`` 0."""
    steps: int
    """Environment steps that were trained for, of all ranks."""

    def __repr__(self) -> str:
        score = f", return {self.score.mean:.1f}" if self.score.returns else ""
        return f"<klrl.Run {self.agent.name()} {env_name(self.env)}: {self.steps:,} steps{score}, {self.folder}>"

    def _repr_html_(self) -> str:
        try:
            page = self.report().read_text(encoding="utf-8")
        except (UsageError, OSError) as problem:  # without matplotlib, or the run's folder
            return f"<pre>{escape(f'{self!r}: {problem}')}</pre>"
        return f'<iframe srcdoc="{escape(page)}" sandbox width="100%" height="600" style="border: 0"></iframe>'

    def report(self) -> Path:
        """Write the report on the run, report.html in its folder, as ``klrl report`` does; the file.

        Raises UsageError without matplotlib (the extra "plot").
        """
        above: Any = import_module("klrl.analysis.report")  # by name, as no room imports from one above it
        return Path(above.report([str(self.folder)], above.ReportConfig()))

    def evaluate(self, episodes: int = 20, deterministic: bool = True, seed: int = 0) -> Evaluation:
        """Episodes with the trained agent that are not those of the final evaluation; another seed gives others."""
        number = convert(Seed, seed, "seed")
        width, chosen = min(episodes, self.config.n_envs), evaluation_seed("afterwards", self.config.seed, number)
        with contextlib.closing(make_vector(self.env, width, self.config.env)) as envs:
            return run_episodes(self.agent, envs, chosen, deterministic, episodes=episodes)
