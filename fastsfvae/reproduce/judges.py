"""What the paper's neighbours are judged by: of each method all that means something for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsfvae import evaluate
from fastsfvae.objectives.draws import draw
from fastsfvae.objectives.wae import maximum_mean_discrepancy
from fastsfvae.reproduce.extractor import FEATURES, classifier_of
from fastsfvae.reproduce.measures import PIXELS, images_of
from fastsfvae.results.samples import encode, sample_latents
from fastsfvae.training.methods import DETERMINISTIC, WITHOUT_PRIOR
from fastsfvae.training.run import Run, evaluation_generator

_BATCH = 250
LOG_ML, ELBO, KL = "log ML", "sampled ELBO", "KL"
AT_MEAN, SAMPLED = "error at the mean", "error, sampled"
COLLAPSED, ACTIVE = "collapsed", "active"
MISMATCH = "latents against prior"
FID, KID = "FID", "KID"
QUANTITIES = (LOG_ML, ELBO, KL, AT_MEAN, SAMPLED, ACTIVE, COLLAPSED, MISMATCH, FID, KID)
# Why a cell of the table is empty.
BLANKS = {
    f"{LOG_ML}, {ELBO}, {KL}, {SAMPLED}, {COLLAPSED}": "a deterministic auto-encoder "
    f"({', '.join(DETERMINISTIC)}) has no variance of q(z|x), and no density of x that it was "
    "trained by",
    MISMATCH: f"{' and '.join(WITHOUT_PRIOR)} have no prior: their images come from a mixture of "
    "Gaussians that is fitted to the latents afterwards",
}


@dataclass(frozen=True)
class Judges:
    """Densities where there are some; errors, active dimensions, latents and samples of all.

    Attributes:
        samples: importance weights per image.
        images: test images for the densities and errors.
        generated: samples for FID and KID, against as many test images.
        extractor_steps: training of the network that their features come from.
    """

    samples: int = 500
    images: int = 250
    generated: int = 1000
    extractor_steps: int = 1000

    @property
    def conventions(self) -> dict[str, str]:
        """See `Measure`."""
        return PIXELS | {
            "images": f"the first {self.images:,} test images",
            LOG_ML: f"{self.samples:,} importance weights per image, proposal defensive; holds "
            "-(n/2) log(2 pi c)",
            ELBO: "10 draws of q(z|x) per image; holds the constant",
            KL: "KL(q(z|x) || N(0, I)) in nats",
            AT_MEAN: "|x - f(mean)|^2, summed over pixels",
            SAMPLED: "the same at 10 draws of q(z|x)",
            ACTIVE: "latent dimensions whose mean varies by more than .01 over images",
            COLLAPSED: "epsilon = .05 nats, delta = .01; of a full covariance by its marginals",
            MISMATCH: f"squared maximum mean discrepancy, unbiased and so 0 on average where they "
            f"are alike, between latents of {self.generated:,} test images (a draw of q(z|x), of a "
            "deterministic encoder the mean) and as many draws of N(0, I)",
            f"{FID}, {KID}": f"{self.generated:,} images f(z), no observation noise, z from N(0, I)"
            f" or for {' and '.join(WITHOUT_PRIOR)} from 10 Gaussians fitted to the training "
            f"latents; against as many test images, in the {FEATURES} features of a classifier "
            f"that is trained here on the training labels for {self.extractor_steps:,} steps, seed "
            "0: NOT comparable with published FID or KID",
        }

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """See `Measure`."""
        x = images_of(run, "test", self.images)
        mean, log_var = encode(run.encoder, x)
        generator = evaluation_generator(run.config, run.device)
        collapse = evaluate.posterior_collapse(mean, log_var)
        numbers = {} if run.config.method in DETERMINISTIC else self._densities(run, x, generator)
        numbers[AT_MEAN] = float(evaluate.squared_error_at_mean(run.decoder, x, mean).mean())
        numbers[ACTIVE] = float(collapse.active)
        test = images_of(run, "test", self.generated)
        if run.config.method not in WITHOUT_PRIOR:
            numbers[MISMATCH] = _mismatch(run, test, generator)
        return numbers | self._distances(run, test, generator)

    def _densities(self, run: Run, x: Tensor, generator: torch.Generator) -> dict[str, float]:
        mean, log_var = encode(run.encoder, x)
        given, c = (run.decoder, x, mean, log_var), run.noise_var
        log_ml = evaluate.log_marginal_likelihood(
            *given, samples=self.samples, noise_var=c, generator=generator
        )
        elbo = evaluate.sampled_elbo(*given, samples=10, noise_var=c, generator=generator)
        return {
            LOG_ML: float(log_ml.estimate.mean()),
            "median effective samples": float(log_ml.effective_samples.median()),
            ELBO: float(elbo.elbo.mean()),
            KL: float(elbo.kl.mean()),
            SAMPLED: float(elbo.squared_error.mean()),
            COLLAPSED: float(evaluate.posterior_collapse(mean, log_var).collapsed),
        }

    def _distances(self, run: Run, test: Tensor, generator: torch.Generator) -> dict[str, float]:
        z, _ = sample_latents(run.config, run.encoder, len(test), generator)
        # Beside the runs, which have one extractor for all.
        extractor = classifier_of(run.config, self.extractor_steps, run.folder.parent)
        distance = evaluate.frechet_distance(
            test.split(_BATCH),
            (run.decoder(part) for part in z.split(_BATCH)),
            extractor.to(run.device),
        )
        return {FID: distance.fid, KID: distance.kid}


def _mismatch(run: Run, test: Tensor, generator: torch.Generator) -> float:
    z, log_var = encode(run.encoder, test)
    noise = torch.randn(2, *z.shape, generator=generator, device=z.device)
    if run.config.method not in DETERMINISTIC:
        z = draw(z, log_var, noise[:1]).z[0]
    return float(maximum_mean_discrepancy(z.double(), noise[1].double()))
