"""Checks for what looks wrong in a run, each with advice."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from klrl.rundir.history import History


class Anomaly(NamedTuple):
    """A sign of trouble in a run, and what to try."""

    what: str
    advice: str


def find_anomalies(run: History) -> list[Anomaly]:
    """The anomalies of ``run``, the most harmful first; none where it has logged nothing."""
    return [found for check in _CHECKS if len(run["step"]) for found in check(run)]


def _skipped(run: History) -> Iterator[Anomaly]:
    if count := np.nansum(run["health/skipped_updates"]):
        yield Anomaly(
            f"{count:.0f} updates met a nan or infinity and were skipped",
            "normalise or clip rewards, lower --learning-rate; look at observations that grow without bound",
        )


def _over(run: History, tag: str) -> str:
    """How often, and by how much, a KL was over its limit, as ``tag`` has its fraction; "" where it never was."""
    of_limit = run[tag]
    over, updates = int((of_limit > 1).sum()), int((~np.isnan(of_limit)).sum())
    if not over:
        return ""
    largest = np.nanmax(of_limit)
    return f"over its limit after {over} of {updates} updates ({over / updates:.0%}), at most {largest:.3g} times it"


def _over_limit(run: History) -> Iterator[Anomaly]:
    if said := _over(run, "kl/of_limit"):
        yield Anomaly(
            f"KL was {said}",
            "--kl.on-overshoot project holds the limit after every update; --kl.check minibatch stops earlier; "
            "fewer --n-epochs or a lower --learning-rate move less",
        )


def _states_over_limit(run: History) -> Iterator[Anomaly]:
    if said := _over(run, "kl/max_of_limit"):
        yield Anomaly(
            f"a single state's KL was {said}",
            "--kl.on-overshoot project holds the limit after every update; --kl.per-state reverse turns such states "
            "back while the update lasts",
        )


def _far_from_reference(run: History) -> Iterator[Anomaly]:
    if said := _over(run, "reference/of_limit"):
        yield Anomaly(
            f"the KL to the reference was {said}",
            "it is held on the states of each update, and new states and statistics move it: a smaller "
            "--reference.target, or a lower --learning-rate; a policy that begins far away first has to come near",
        )


def _standstill(run: History) -> Iterator[Anomaly]:
    row = run["health/undone_in_a_row"]
    rejected = any("/rejected_" in tag for tag in run.columns)  # TRPO's, which say more themselves
    if not rejected and (most := np.nanmax(row, initial=0)) >= 5:
        yield Anomaly(
            f"{most:.0f} updates in a row were taken back: nothing moves",
            "use a penalty (--kl.penalty adaptive) or a larger --kl.target; --kl.on-overshoot project keeps the part "
            "that is within the limit",
        )


def _idle_limit(run: History) -> Iterator[Anomaly]:
    late = _second_half(run, "kl/of_limit")
    if (_second_half(run, "kl/held_states") > 0).any():  # rules of single states hold the policy below the limit
        return
    if len(late) >= 5 and (median := np.median(late)) < 0.25:  # where --lr-schedule kl would raise its rate
        yield Anomaly(
            f"the KL limit does not act: in the second half, half of the updates reach under {median:.2g} of it",
            "the run behaves as without a limit; a lower --kl.target binds, a higher --learning-rate uses what is "
            "allowed",
        )


def _temperature(run: History) -> Iterator[Anomaly]:
    alpha = run["train/ent_coef"]
    if run.has("entropy/target") and (at_bound := int(((alpha <= 1.01e-6) | (alpha >= 0.99e6)).sum())):
        yield Anomaly(
            f"the temperature was at its bound after {at_bound} of {len(alpha)} updates",
            "the target entropy is out of reach or out of scale: set --target-entropy (or --target-entropy-fraction), "
            "or scale the rewards",
        )


def _coefficient(run: History) -> Iterator[Anomaly]:
    beta = _second_half(run, "kl/coef")
    maximum = max(1e4, run.options.get("kl", {}).get("coef", 1.0))
    if len(beta) and (share := np.mean(beta >= maximum)) >= 0.1:
        yield Anomaly(
            f"the KL penalty's coefficient is at its upper bound in {share:.0%} of the later updates",
            "the penalty alone cannot hold the limit: lower --learning-rate, or --kl.on-overshoot project",
        )


def _rejected(run: History) -> Iterator[Anomaly]:
    reasons = {tag.removeprefix("health/rejected_"): np.nansum(run[tag]) for tag in run.columns if "/rejected_" in tag}
    causes = ", ".join(f"{cause.replace('_', ' ')} {n:.0f}" for cause, n in reasons.items() if n)
    if causes:
        yield Anomaly(
            f"{sum(reasons.values()):.0f} of {len(run['step'])} TRPO steps were rejected ({causes})",
            "for curvature or nonfinite raise --cg-damping; for no improvement collect larger rollouts (--n-steps); "
            "for kl raise --line-search-max-iter",
        )


def _value(run: History) -> Iterator[Anomaly]:
    late = _second_half(run, "train/explained_variance")
    if len(late) >= 10 and (below := float(np.mean(late < 0))) >= 0.1:
        yield Anomaly(
            f"the critic explains less than nothing: explained variance below 0 in {below:.0%} of the later updates",
            "nothing, where returns hardly vary any more (a solved task); else more passes for the critic (--n-epochs, "
            "TRPO's --n-critic-updates), --normalize-reward, a higher --vf-coef or a lower --gamma",
        )


def _collapse(run: History) -> Iterator[Anomaly]:
    returns = run["rollout/ep_rew_mean"]
    returns = returns[~np.isnan(returns)]
    if len(returns) < 20:
        return
    tenth = len(returns) // 10
    best, last, first = np.quantile(returns, 0.95), returns[-tenth:].mean(), returns[:tenth].mean()
    if best > first and best - last > 0.5 * (best - first):
        yield Anomaly(
            f"the return fell late: from {best:.4g} to {last:.4g}",
            "klrl eval RUN --checkpoint best keeps the best policy; a lower --kl.target or --lr-schedule linear keeps "
            "it",
        )


def _restarted(run: History) -> Iterator[Anomaly]:
    if count := np.nansum(run["health/restarted_episodes"][-1:]):
        yield Anomaly(
            f"{count:.0f} episodes were cut off because the environment failed or could not be replayed",
            "each counts as truncated; the run's stderr says why",
        )


def _second_half(run: History, tag: str) -> np.ndarray:
    values = run[tag][run["step"] > run.steps / 2]
    return values[~np.isnan(values)]


_CHECKS: tuple[Callable[[History], Iterator[Anomaly]], ...] = (
    _skipped,
    _standstill,
    _collapse,
    _over_limit,
    _states_over_limit,
    _far_from_reference,
    _rejected,
    _temperature,
    _coefficient,
    _value,
    _idle_limit,
    _restarted,
)
