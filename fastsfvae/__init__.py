"""Sampling-free Gaussian VAEs, fast.

    import fastsfvae as sf
    loss_fn = sf.SamplingFreeLoss(decoder)
    mean, log_var = encoder(x)
    loss_fn(x, mean, log_var).backward()

A decoder f is linearised at each latent mean and the posterior's Gaussian is pushed through it; the
log-likelihood then has a closed form. The README has a whole example and the method in a page.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastsfvae.gram.pullback import Pullback, pullback
from fastsfvae.ground.provenance import VERSION
from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.loss import Elbo, SamplingFreeLoss, low_rank_log_prob, sampling_free_elbo
from fastsfvae.ops.dispatch import fused_layers

__version__ = VERSION

# Imported on first use: the loss needs none of them.
_LATE = {
    "DecoderReport": "fastsfvae.jacobian.check",
    "GraphedStep": "fastsfvae.graphed",
    "LinearizedGaussian": "fastsfvae.distributions",
    "check_decoder": "fastsfvae.jacobian.check",
    "evaluate": "fastsfvae.evaluate",
    "load": "fastsfvae.training.checkpoint",
    "make_graphed_step": "fastsfvae.graphed",
    "metric": "fastsfvae.geometry",
}

if TYPE_CHECKING:
    from fastsfvae import evaluate
    from fastsfvae.distributions import LinearizedGaussian
    from fastsfvae.geometry import metric
    from fastsfvae.graphed import GraphedStep, make_graphed_step
    from fastsfvae.jacobian.check import DecoderReport, check_decoder
    from fastsfvae.training.checkpoint import load
else:
    # Not for a type checker, which would then believe in every name.
    def __getattr__(name: str) -> Any:
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(_LATE[name])
        found = module if name == "evaluate" else getattr(module, name)
        globals()[name] = found
        return found


__all__ = [
    "DecoderReport",
    "Elbo",
    "GraphedStep",
    "LinearizedGaussian",
    "Pullback",
    "SamplingFreeLoss",
    "check_decoder",
    "decode_with_jacobian",
    "evaluate",
    "fused_layers",
    "load",
    "low_rank_log_prob",
    "make_graphed_step",
    "metric",
    "pullback",
    "sampling_free_elbo",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
