"""Settings that Optuna proposes, from ranges and choices, by the returns of those before."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klrl.analysis.scores import score_of
from klrl.errors import UsageError, needs
from klrl.sweep.grid import Setting
from klrl.sweep.trial import Trial

_RANGE = re.compile(r"(log:)?([-+0-9.eE_]+)\.\.([-+0-9.eE_]+)")


def ranges_in(words: Sequence[str]) -> dict[str, Any]:
    """Optuna's distributions of the words that are ranges, ``learning_rate=log:1e-4..1e-2``, by option."""
    with needs("optuna", "optuna"):
        from optuna.distributions import FloatDistribution, IntDistribution
    found: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if (match := _RANGE.fullmatch(text)) is None:
            continue
        log, whole = match[1] is not None, all(re.fullmatch("[-+0-9_]+", end) for end in match.groups()[1:])
        try:
            ends: Any = [(int if whole else float)(end) for end in match.groups()[1:]]
            kind: Any = IntDistribution if whole else FloatDistribution
            found[name] = kind(*ends, log=log)
        except ValueError as problem:
            raise UsageError(f"--set {word}: {problem}") from None
    return found


class Proposals:
    """The study of a sweep, which lies in its folder and goes on where it was stopped."""

    def __init__(
        self, base: Callable[..., list[Setting]], choices: Mapping[str, Sequence[Any]], ranges: dict[str, Any]
    ) -> None:
        """``base``: ``expand`` with all but the choices."""
        from optuna.distributions import CategoricalDistribution

        self.expand, self.choices = base, choices
        # Optuna's choices are plain values: of others, lists of widths say, their number is proposed.
        places = {name: CategoricalDistribution(range(len(values))) for name, values in choices.items()}
        self.distributions: dict[str, Any] = {**places, **ranges}
        if not self.distributions:
            raise UsageError("--search optuna needs a --set to search in, such as learning_rate=log:1e-4..1e-2")

    def example(self) -> Setting:
        """A setting that may be proposed, to be checked before anything is written."""
        ends = {name: getattr(d, "high", 0) for name, d in self.distributions.items()}
        self._setting({name: getattr(d, "low", 0) for name, d in self.distributions.items()})
        return self._setting(ends)

    def search(self, folder: Path, count: int, run: Callable[[Sequence[Setting]], list[Trial]]) -> None:
        """Propose settings and ``run`` them, until there have been ``count``, those of an earlier search included."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
        study = optuna.create_study(storage=storage, study_name="klrl", direction="maximize", load_if_exists=True)
        for number in range(count):
            known = study.trials[number] if number < len(study.trials) else None
            if known is None:
                study.sampler = optuna.samplers.TPESampler(seed=number)  # as if it had never been stopped
                proposed = study.ask(self.distributions)
                number, values = proposed.number, proposed.params
            else:
                values = known.params
            trials = run([self._setting(values)])
            if known is None or known.state is TrialState.RUNNING:
                done = [trial.history for trial in trials if trial.status == "finished" and trial.history is not None]
                score = score_of(done)
                if score is None:
                    study.tell(number, state=TrialState.FAIL)
                else:
                    study.tell(number, score.mean)

    def _setting(self, values: Mapping[str, Any]) -> Setting:
        chosen = {name: self.choices[name][value] if name in self.choices else value for name, value in values.items()}
        few = {name: [self._short(name, value)] for name, value in chosen.items()}
        varied = [name for name in few if len(self.choices.get(name, ())) != 1]
        (setting,) = self.expand(few, named=varied)
        return setting

    def _short(self, name: str, value: Any) -> Any:
        """A fraction out of a range with five digits, still within it."""
        if not isinstance(value, float) or name in self.choices:
            return value
        ends = self.distributions[name]
        return min(max(float(f"{value:.5g}"), ends.low), ends.high)
