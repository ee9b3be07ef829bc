"""Statistics of a trained VAE that any pair of callables can be judged by.

Everything here takes a decoder ``z [B, m] -> [B, *out]``, data ``x [N, *out]`` and its posterior
N(mean, diag(exp(log_var))), both ``[N, m]``. The model is z ~ N(0, I), x | z ~ N(f(z), cI) with
c = noise_var; log-densities hold the constant -(n/2) log(2 pi c).

Results are per image. Two uncertainties must be kept apart: a `standard_error` field is the Monte
Carlo error of one image's estimate, and `mean_over_images` adds the spread over images.
"""

from fastsfvae.evaluate.collapse import PosteriorCollapse as PosteriorCollapse
from fastsfvae.evaluate.collapse import posterior_collapse as posterior_collapse
from fastsfvae.evaluate.conditioning import Conditioning as Conditioning
from fastsfvae.evaluate.conditioning import conditioning as conditioning
from fastsfvae.evaluate.frechet import FrechetDistance as FrechetDistance
from fastsfvae.evaluate.frechet import Inception as Inception
from fastsfvae.evaluate.frechet import frechet_distance as frechet_distance
from fastsfvae.evaluate.log_densities import LogMarginalLikelihood as LogMarginalLikelihood
from fastsfvae.evaluate.log_densities import ObjectiveGap as ObjectiveGap
from fastsfvae.evaluate.log_densities import SampledElbo as SampledElbo
from fastsfvae.evaluate.log_densities import log_marginal_likelihood as log_marginal_likelihood
from fastsfvae.evaluate.log_densities import objective_gap as objective_gap
from fastsfvae.evaluate.log_densities import sampled_elbo as sampled_elbo
from fastsfvae.evaluate.log_densities import squared_error_at_mean as squared_error_at_mean
from fastsfvae.evaluate.monte_carlo import GradientError as GradientError
from fastsfvae.evaluate.monte_carlo import gradient_error as gradient_error
from fastsfvae.evaluate.proposals import PROPOSALS as PROPOSALS
from fastsfvae.evaluate.summary import ImageMean as ImageMean
from fastsfvae.evaluate.summary import mean_over_images as mean_over_images
from fastsfvae.evaluate.summary import monte_carlo_error as monte_carlo_error
from fastsfvae.evaluate.taylor import PAPER_SAMPLES as PAPER_SAMPLES
from fastsfvae.evaluate.taylor import Agreement as Agreement
from fastsfvae.evaluate.taylor import TaylorQuality as TaylorQuality
from fastsfvae.evaluate.taylor import taylor_quality as taylor_quality
