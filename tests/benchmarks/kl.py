"""klrl's exact KL against torch.distributions.kl_divergence on the same float32 inputs, in alternation.

    python tests/benchmarks/kl.py

Batch 4096, one thread: categoricals of 6 and 18 choices, diagonal normals of 6 and 17 dimensions, without gradient
(the function alone) and with one (forward and backward). Medians of 300 rounds, and the median of the paired ratios.
Then the error of both where the KL is small.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl import joint, kl

BATCH = 4096
Pair = Callable[[Tensor, Tensor], tuple[td.Distribution, td.Distribution]]


def categoricals(old: Tensor, new: Tensor) -> tuple[td.Distribution, td.Distribution]:
    return td.Categorical(logits=old, validate_args=False), td.Categorical(logits=new, validate_args=False)


def normals(old: Tensor, new: Tensor) -> tuple[td.Distribution, td.Distribution]:
    scale = torch.ones_like(old)
    pair = (td.Normal(old, scale, validate_args=False), td.Normal(new, 1.1 * scale, validate_args=False))
    return joint(pair[0]), joint(pair[1])


def compare(make: Pair, width: int, gradient: bool, rounds: int = 300) -> tuple[float, float, float]:
    """Median microseconds of klrl and of torch, and the median ratio."""
    torch.manual_seed(0)
    old, new = torch.randn(BATCH, width), torch.randn(BATCH, width, requires_grad=gradient)
    times: list[tuple[float, float]] = []
    for i in range(rounds + 20):
        pair = []
        for function in (kl, td.kl_divergence):
            distributions = make(old, new)
            start = time.perf_counter()
            value = function(*distributions)
            if gradient:
                value.sum().backward()
            pair.append((time.perf_counter() - start) * 1e6)
        if i >= 20:
            times.append((pair[0], pair[1]))
    mine, theirs = zip(*times, strict=True)
    return statistics.median(mine), statistics.median(theirs), statistics.median(a / b for a, b in times)


def accuracy() -> None:
    """How far off either is for policies as near as a small step leaves them: KL around 3e-8."""
    torch.manual_seed(0)
    old = torch.randn(100_000, 6)
    pair = categoricals(old, old + 3e-4 * torch.randn(100_000, 6))
    log_p, log_q = (torch.log_softmax(dist.logits.double(), -1) for dist in pair)  # type: ignore[attr-defined]
    exact = (log_p.exp() * (torch.expm1(log_q - log_p) - (log_q - log_p))).sum(-1)
    for name, function in (("klrl", kl), ("torch", td.kl_divergence)):
        value = function(*pair).double()
        error = ((value - exact).abs() / exact).median()
        negative = (value < 0).double().mean()
        line = f"median error {float(error):.1e}, negative {float(negative):.0%}"
        print(f"KL near {float(exact.median()):.0e}: {name:5} {line}")


def main() -> None:
    torch.set_num_threads(1)
    # glibc hands freed memory back to the system beyond twice the largest array freed so far. A process that trains has
    # freed larger ones than these; here the two sides would pay for each other's.
    torch.zeros(30 * 2**20, dtype=torch.uint8)
    for name, make, width in (
        ("categorical", categoricals, 6),
        ("categorical", categoricals, 18),
        ("diagonal normal", normals, 6),
        ("diagonal normal", normals, 17),
    ):
        for gradient in (False, True):
            with torch.set_grad_enabled(gradient):
                mine, theirs, ratio = compare(make, width, gradient)
            kind = "with gradient" if gradient else "without gradient"
            print(f"{name:16}{width:3} {kind:17} klrl {mine:7.0f} us   torch {theirs:7.0f} us   ratio {ratio:.2f}")
    accuracy()


if __name__ == "__main__":
    main()
