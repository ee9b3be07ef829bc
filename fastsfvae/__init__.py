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

from fastsfvae.elbo import Elbo as Elbo
from fastsfvae.elbo import check_settings as check_settings
from fastsfvae.elbo import sampling_free_elbo
from fastsfvae.gram.pullback import Pullback as Pullback
from fastsfvae.gram.pullback import pullback
from fastsfvae.ground.provenance import VERSION
from fastsfvae.jacobian.api import decode_with_jacobian, jvp, vjp
from fastsfvae.likelihoods import low_rank_log_prob
from fastsfvae.loss import SamplingFreeLoss
from fastsfvae.ops.dispatch import fused_layers

__version__ = VERSION

# Imported on first use: the loss needs none of them.
_LATE = {
    "DecoderReport": "fastsfvae.jacobian.check",
    "Fit": "fastsfvae.fit",
    "GraphedStep": "fastsfvae.graphed",
    "LinearizedGaussian": "fastsfvae.distributions",
    "StepComparison": "fastsfvae.step_comparison",
    "check_decoder": "fastsfvae.jacobian.check",
    "compare_step": "fastsfvae.step_comparison",
    "evaluate": "fastsfvae.evaluate",
    "fit_latents": "fastsfvae.fit",
    "isometry_loss": "fastsfvae.gram.isometry",
    "kalman_update": "fastsfvae.distributions",
    "load": "fastsfvae.training.checkpoint",
    "log_volume": "fastsfvae.gram.volume",
    "make_graphed_step": "fastsfvae.graphed",
    "metric": "fastsfvae.geometry",
    "singular_directions": "fastsfvae.gram.singular",
}

if TYPE_CHECKING:
    from fastsfvae import evaluate
    from fastsfvae.distributions import LinearizedGaussian, kalman_update
    from fastsfvae.fit import Fit as Fit
    from fastsfvae.fit import fit_latents
    from fastsfvae.geometry import metric
    from fastsfvae.gram.isometry import isometry_loss
    from fastsfvae.gram.singular import singular_directions
    from fastsfvae.gram.volume import log_volume
    from fastsfvae.graphed import GraphedStep as GraphedStep
    from fastsfvae.graphed import make_graphed_step
    from fastsfvae.jacobian.check import DecoderReport as DecoderReport
    from fastsfvae.jacobian.check import check_decoder
    from fastsfvae.step_comparison import StepComparison as StepComparison
    from fastsfvae.step_comparison import compare_step
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


# What is called; the types of results can be imported from here as well.
__all__ = [
    "LinearizedGaussian",
    "SamplingFreeLoss",
    "check_decoder",
    "compare_step",
    "decode_with_jacobian",
    "evaluate",
    "fit_latents",
    "fused_layers",
    "isometry_loss",
    "jvp",
    "kalman_update",
    "load",
    "log_volume",
    "low_rank_log_prob",
    "make_graphed_step",
    "metric",
    "pullback",
    "sampling_free_elbo",
    "singular_directions",
    "vjp",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
