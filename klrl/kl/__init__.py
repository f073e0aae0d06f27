"""KL and entropy of policies: exact divergences, control of coefficients, tracking of updates. Needs only torch."""

from klrl.kl.calibration import expected_calibration_error, temperature_scale
from klrl.kl.closed_form import categorical_kl, normal_kl
from klrl.kl.comparisons import (
    cross_entropy,
    entropy,
    jeffreys,
    js,
    mutual_information,
    pinsker_bound,
    renyi,
    total_variation,
)
from klrl.kl.control import Adaptive, Annealed, Bound, Coefficient, Dual, Fixed, Penalty, at_least, at_most
from klrl.kl.distillation import distillation_loss
from klrl.kl.divergence import NoClosedFormError, Product, joint, kl, reverse_kl
from klrl.kl.estimators import Estimate, StateEstimates, kl_estimate, mc_entropy, mc_kl
from klrl.kl.fisher import fisher_vector_product
from klrl.kl.hold import hold_states
from klrl.kl.limit import KLLimit, Move
from klrl.kl.measure import Direction, KLReport, measure, state_mean
from klrl.kl.parameters import concatenate, freeze, select
from klrl.kl.projection import geometric_mean, project_states
from klrl.kl.ranks import ALONE, Ranks
from klrl.kl.rules import PENALTIES, RATIO_RULES, SPO, STATE_RULES, Clip, Gate, Project, Reverse, Start, StateRule
from klrl.kl.tracking import track

__all__ = [
    "ALONE",
    "PENALTIES",
    "RATIO_RULES",
    "SPO",
    "STATE_RULES",
    "Adaptive",
    "Annealed",
    "Bound",
    "Clip",
    "Coefficient",
    "Direction",
    "Dual",
    "Estimate",
    "Fixed",
    "Gate",
    "KLLimit",
    "KLReport",
    "Move",
    "NoClosedFormError",
    "Penalty",
    "Product",
    "Project",
    "Ranks",
    "Reverse",
    "Start",
    "StateEstimates",
    "StateRule",
    "at_least",
    "at_most",
    "categorical_kl",
    "concatenate",
    "cross_entropy",
    "distillation_loss",
    "entropy",
    "expected_calibration_error",
    "fisher_vector_product",
    "freeze",
    "geometric_mean",
    "hold_states",
    "jeffreys",
    "joint",
    "js",
    "kl",
    "kl_estimate",
    "mc_entropy",
    "mc_kl",
    "measure",
    "mutual_information",
    "normal_kl",
    "pinsker_bound",
    "project_states",
    "renyi",
    "reverse_kl",
    "select",
    "state_mean",
    "temperature_scale",
    "total_variation",
    "track",
]
