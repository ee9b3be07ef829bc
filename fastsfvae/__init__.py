"""Sampling-free Gaussian VAEs, fast.

    import fastsfvae as sf
    loss_fn = sf.SamplingFreeLoss(decoder)
    mean, log_var = encoder(x)
    loss_fn(x, mean, log_var).backward()

A decoder f is linearised at each latent mean and the posterior's Gaussian is pushed through it; the
log-likelihood then has a closed form. The README has a whole example and the method in a page.
"""

from fastsfvae import evaluate as evaluate
from fastsfvae.distributions import LinearizedGaussian as LinearizedGaussian
from fastsfvae.gram.pullback import Pullback as Pullback
from fastsfvae.gram.pullback import pullback as pullback
from fastsfvae.graphed import GraphedStep as GraphedStep
from fastsfvae.graphed import make_graphed_step as make_graphed_step
from fastsfvae.jacobian import DecoderReport as DecoderReport
from fastsfvae.jacobian import check_decoder as check_decoder
from fastsfvae.jacobian import decode_with_jacobian as decode_with_jacobian
from fastsfvae.loss import Elbo as Elbo
from fastsfvae.loss import SamplingFreeLoss as SamplingFreeLoss
from fastsfvae.loss import low_rank_log_prob as low_rank_log_prob
from fastsfvae.loss import sampling_free_elbo as sampling_free_elbo
from fastsfvae.ops.dispatch import fused_layers as fused_layers
from fastsfvae.training.checkpoint import load as load

__version__ = "0.1.0"
