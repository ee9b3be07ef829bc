"""The log-density with J given against its peers: `python -m bench.loss_only`.

Every candidate computes the same values and the same gradients (checked against float64 before any
is timed) and all take turns in one run. `bench_low_rank.py` runs the same candidates under
pytest-benchmark.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastsfvae as sf
from bench import ledger
from bench.timing import interleave

# Workload "loss-only": (B, n, m).
SHAPES = {"m16": (64, 12288, 16), "m64": (64, 12288, 64), "m200": (1000, 784, 200)}
NOISE_VAR = 0.5


def inputs(shape: tuple[int, int, int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(J [B, m, n], r [B, n], h [B, m]) in float32, the size of a trained decoder's."""
    batch, n, m = shape
    g = torch.Generator().manual_seed(0)
    jacobian = torch.randn(batch, m, n, generator=g) / 50
    residual = torch.randn(batch, n, generator=g)
    latent_var = torch.rand(batch, m, generator=g) + 0.1
    return tuple(t.to(device).requires_grad_() for t in (jacobian, residual, latent_var))


def ours(jacobian: Tensor, residual: Tensor, latent_var: Tensor) -> Tensor:
    """This library, torch backend."""
    return sf.low_rank_log_prob(
        residual, jacobian, latent_var, noise_var=NOISE_VAR, backend="torch"
    )


def lowrank_mvn(jacobian: Tensor, residual: Tensor, latent_var: Tensor) -> Tensor:
    """torch.distributions, differentiated by autograd."""
    factor = (latent_var.sqrt().unsqueeze(-1) * jacobian).mT
    loc = torch.zeros_like(residual)
    noise = torch.full_like(residual, NOISE_VAR)
    return torch.distributions.LowRankMultivariateNormal(loc, factor, noise).log_prob(residual)


def plain_closed_form(jacobian: Tensor, residual: Tensor, latent_var: Tensor) -> Tensor:
    """The paper's formulas in plain torch, differentiated by autograd."""
    return sf.low_rank_log_prob(
        residual, jacobian, latent_var, noise_var=NOISE_VAR, backend="reference"
    )


def linear_operator(jacobian: Tensor, residual: Tensor, latent_var: Tensor) -> Tensor:
    """linear_operator's inv_quad_logdet of a low-rank root plus a constant diagonal (Woodbury)."""
    from linear_operator.operators import (
        ConstantDiagLinearOperator,
        LowRankRootAddedDiagLinearOperator,
        LowRankRootLinearOperator,
    )

    n = residual.shape[-1]
    factor = (latent_var.sqrt().unsqueeze(-1) * jacobian).mT
    noise = torch.full_like(residual[:, :1], NOISE_VAR)
    covariance = LowRankRootAddedDiagLinearOperator(
        LowRankRootLinearOperator(factor), ConstantDiagLinearOperator(noise, diag_shape=n)
    )
    inv_quad, log_det = covariance.inv_quad_logdet(residual.unsqueeze(-1), logdet=True)
    return -0.5 * (n * math.log(2 * math.pi) + log_det + inv_quad)


CANDIDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fastsfvae[torch]": ours,
    "LowRankMultivariateNormal": lowrank_mvn,
    "plain closed form": plain_closed_form,
    "linear_operator": linear_operator,
}


def run_both(candidate, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward and backward: (log_prob, dJ, dr, dh)."""
    log_prob = candidate(*tensors)
    return log_prob, *torch.autograd.grad(log_prob.sum(), tensors)


def worst_error(candidate, shape: tuple[int, int, int]) -> float:
    """Largest error of value and gradients against float64, relative to each one's largest entry.

    Checked on the first samples: float64 gradients of the whole batch would take longer than the
    run.
    """
    tensors = tuple(t.detach()[:4].requires_grad_() for t in inputs(shape))
    exact = tuple(t.detach().double().requires_grad_() for t in tensors)
    pairs = zip(run_both(candidate, tensors), run_both(plain_closed_form, exact), strict=True)
    pairs = [(got.detach(), want.detach()) for got, want in pairs]
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)


def main() -> None:
    """Print the table and append its rows to the ledger."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: m16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-ledger", action="store_true")
    options = parser.parse_args()
    for name in options.shape or ["m16"]:
        shape = SHAPES[name]
        candidates = {}
        for label, candidate in CANDIDATES.items():
            try:
                error = worst_error(candidate, shape)
            except ImportError as reason:
                print(f"{label}: not run ({reason})")
                continue
            if error > 1e-3:
                print(f"{label}: not timed, its error against float64 is {error:.1e}")
                continue
            candidates[label] = candidate
        tensors = inputs(shape)
        timings = interleave(
            {name: partial(run_both, f, tensors) for name, f in candidates.items()}, options.rounds
        )
        batch, n, m = shape
        print(
            f"\nB={batch} n={n} m={m} float32, forward+backward, {torch.get_num_threads()} threads"
        )
        best = timings["fastsfvae[torch]"].p50
        for label, t in timings.items():
            print(
                f"{label:28s} {t.p50:8.1f} ms  ({t.p20:.1f} to {t.p80:.1f})  {t.p50 / best:5.2f}x"
            )
        if not options.no_ledger:
            text = f"B={batch} n={n} m={m}"
            ledger.append(
                "low_rank_log_prob", "both", text, "float32", timings, ledger.device_name("cpu")
            )


if __name__ == "__main__":
    main()
