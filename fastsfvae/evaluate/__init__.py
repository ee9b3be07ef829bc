"""Statistics of a trained VAE that any pair of callables can be judged by.

Everything here takes a decoder ``z [B, m] -> [B, *out]``, data ``x [N, *out]`` and its posterior
N(mean, diag(exp(log_var))), both ``[N, m]``. The model is z ~ N(0, I), x | z ~ N(f(z), cI) with
c = noise_var; log-densities hold the constant -(n/2) log(2 pi c).

Results are per image. Two uncertainties must be kept apart: a `standard_error` field is the Monte
Carlo error of one image's estimate, and `mean_over_images` adds the spread over images.
"""

from fastsfvae.evaluate.collapse import PosteriorCollapse, posterior_collapse
from fastsfvae.evaluate.conditioning import Conditioning, conditioning
from fastsfvae.evaluate.exact import ExactElbo, exact_elbo, exact_log_marginal_likelihood
from fastsfvae.evaluate.frechet import FrechetDistance, Inception, frechet_distance
from fastsfvae.evaluate.log_densities import (
    LogMarginalLikelihood,
    ObjectiveGap,
    SampledElbo,
    log_marginal_likelihood,
    objective_gap,
    sampled_elbo,
    squared_error_at_mean,
)
from fastsfvae.evaluate.mixture import GaussianMixture, fit_mixture
from fastsfvae.evaluate.monte_carlo import (
    GradientError,
    GradientPart,
    gradient_error,
    gradient_errors,
)
from fastsfvae.evaluate.proposals import PROPOSALS
from fastsfvae.evaluate.summary import ImageMean, mean_over_images, monte_carlo_error
from fastsfvae.evaluate.taylor import PAPER_SAMPLES, Agreement, TaylorQuality, taylor_quality

__all__ = [
    "Agreement",
    "Conditioning",
    "ExactElbo",
    "FrechetDistance",
    "GaussianMixture",
    "GradientError",
    "GradientPart",
    "ImageMean",
    "Inception",
    "LogMarginalLikelihood",
    "ObjectiveGap",
    "PAPER_SAMPLES",
    "PROPOSALS",
    "PosteriorCollapse",
    "SampledElbo",
    "TaylorQuality",
    "conditioning",
    "exact_elbo",
    "exact_log_marginal_likelihood",
    "fit_mixture",
    "frechet_distance",
    "gradient_error",
    "gradient_errors",
    "log_marginal_likelihood",
    "mean_over_images",
    "monte_carlo_error",
    "objective_gap",
    "posterior_collapse",
    "sampled_elbo",
    "squared_error_at_mean",
    "taylor_quality",
]


def __dir__() -> list[str]:
    return __all__
