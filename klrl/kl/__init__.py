"""KL and entropy of policies: exact divergences, control of coefficients, tracking of updates. Needs only torch."""

from klrl.kl.closed_form import categorical_kl, normal_kl
from klrl.kl.comparisons import cross_entropy, entropy, jeffreys, js, pinsker, renyi, total_variation
from klrl.kl.control import Annealed, Banded, Bound, Coefficient, Dual, Fixed, Penalty, at_least, at_most
from klrl.kl.divergence import NoClosedFormError, Product, concatenate, freeze, joint, kl, reverse_kl, select
from klrl.kl.estimators import Estimate, StateEstimates, kl_estimate, mc_entropy, mc_kl
from klrl.kl.fisher import fisher_vector_product
from klrl.kl.tracking import Direction, KLReport, Tracked, measure, track

__all__ = [
    "Annealed",
    "Banded",
    "Bound",
    "Coefficient",
    "Direction",
    "Dual",
    "Estimate",
    "Fixed",
    "KLReport",
    "NoClosedFormError",
    "Penalty",
    "Product",
    "StateEstimates",
    "Tracked",
    "at_least",
    "at_most",
    "categorical_kl",
    "concatenate",
    "cross_entropy",
    "entropy",
    "fisher_vector_product",
    "freeze",
    "jeffreys",
    "joint",
    "js",
    "kl",
    "kl_estimate",
    "mc_entropy",
    "mc_kl",
    "measure",
    "normal_kl",
    "pinsker",
    "renyi",
    "reverse_kl",
    "select",
    "total_variation",
    "track",
]
