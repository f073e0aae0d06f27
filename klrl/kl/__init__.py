"""KL and entropy of policies: exact divergences, control of coefficients, tracking of updates. Needs only torch."""

from klrl.kl.closed_form import categorical_kl, normal_kl
from klrl.kl.comparisons import cross_entropy, entropy, jeffreys, js, pinsker_bound, renyi, total_variation
from klrl.kl.control import Adaptive, Annealed, Bound, Coefficient, Dual, Fixed, Penalty, at_least, at_most
from klrl.kl.divergence import NoClosedFormError, Product, concatenate, freeze, joint, kl, reverse_kl, select
from klrl.kl.estimators import Estimate, StateEstimates, kl_estimate, mc_entropy, mc_kl
from klrl.kl.fisher import fisher_vector_product
from klrl.kl.limit import RULES, KLLimit, Move
from klrl.kl.measure import Direction, KLReport, measure, state_mean
from klrl.kl.tracking import track

__all__ = [
    "RULES",
    "Adaptive",
    "Annealed",
    "Bound",
    "Coefficient",
    "Direction",
    "Dual",
    "Estimate",
    "Fixed",
    "KLLimit",
    "KLReport",
    "Move",
    "NoClosedFormError",
    "Penalty",
    "Product",
    "StateEstimates",
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
    "pinsker_bound",
    "renyi",
    "reverse_kl",
    "select",
    "state_mean",
    "total_variation",
    "track",
]
