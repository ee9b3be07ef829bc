"""From a configuration to its objectives."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from fastsfvae._checks import Likelihood
from fastsfvae.objectives.auto_encoder import AutoEncoder
from fastsfvae.objectives.cwae import CramerWoldAutoEncoder
from fastsfvae.objectives.dreg import DoublyReparameterized
from fastsfvae.objectives.exact import ExactMarginal
from fastsfvae.objectives.free_bits import FreeBits
from fastsfvae.objectives.hierarchical import Coupling, HierarchicalImportanceWeighted
from fastsfvae.objectives.iwae import ImportanceWeighted
from fastsfvae.objectives.noise_variance import NoiseVar, NoiseVariance
from fastsfvae.objectives.rae import RegularizedAutoEncoder
from fastsfvae.objectives.rem import ReweightedExpectationMaximization
from fastsfvae.objectives.sampling import Sampling
from fastsfvae.objectives.sampling_free import SamplingFree
from fastsfvae.objectives.stl import StickingTheLanding
from fastsfvae.objectives.swae import SlicedWassersteinAutoEncoder
from fastsfvae.objectives.terms import Objective
from fastsfvae.objectives.vlae import VariationalLaplace
from fastsfvae.objectives.wae import WassersteinAutoEncoder
from fastsfvae.training.config import TrainConfig
from fastsfvae.training.methods import LATENT_WEIGHTS


def learned_modules(config: TrainConfig) -> nn.ModuleDict:
    """What is trained beside the two networks, by its name in a checkpoint."""
    learned = nn.ModuleDict()
    if config.learned_noise_var:
        learned["noise_var"] = NoiseVariance(config.noise_var)
    if config.method == "hiwae":
        learned["coupling"] = Coupling(config.latent_dim, config.samples)
    return learned


def make_objective(
    config: TrainConfig,
    decoder: nn.Module,
    learned: Mapping[str, Any] = MappingProxyType({}),
    **scheduled: Tensor,
) -> Objective:
    """Build the objective of a configuration's method.

    Args:
        config: names it and its settings.
        decoder: f, ``z [B, m] -> [B, *out]``.
        learned: the `learned_modules`.
        **scheduled: 0-d tensors for the settings that change while training, gamma and kl_weight.
    """
    noise_var: NoiseVar = learned.get("noise_var", config.noise_var)
    drawn: dict[str, Any] = {"samples": config.samples, "draws": config.draws}
    matched: dict[str, Any] = {"noise_var": noise_var}
    if config.method in LATENT_WEIGHTS:
        matched["weight"] = config.weight_of_latents
    match config.method:
        case "sampling" | "beta-vae" | "delta-vae" | "householder":
            beta = scheduled.get("kl_weight", config.kl_weight)
            return Sampling(decoder, noise_var=noise_var, kl_weight=beta, **drawn)
        case "auto-encoder":
            return AutoEncoder(decoder, noise_var=noise_var)
        case "iwae":
            proposal: dict[str, Any] = {"proposal": config.proposal, "backend": config.backend}
            return ImportanceWeighted(decoder, noise_var=noise_var, **proposal, **drawn)
        case "stl":
            return StickingTheLanding(decoder, noise_var=noise_var, **drawn)
        case "dreg":
            return DoublyReparameterized(decoder, noise_var=noise_var, **drawn)
        case "vlae":
            return VariationalLaplace(
                decoder,
                noise_var=config.noise_var,
                mode_steps=config.mode_steps,
                bound=config.bound,
                backend=config.backend,
                **drawn,
            )
        case "exact-marginal":
            return ExactMarginal(decoder, noise_var=config.noise_var)
        case "free-bits":
            return FreeBits(decoder, free_bits=config.free_bits, noise_var=noise_var, **drawn)
        case "hiwae":
            coupling = learned["coupling"]
            return HierarchicalImportanceWeighted(decoder, coupling, noise_var=noise_var)
        case "rem":
            version = config.rem_version
            return ReweightedExpectationMaximization(
                decoder, version=version, noise_var=noise_var, **drawn
            )
        case "rae":
            return RegularizedAutoEncoder(
                decoder,
                regularizer=config.regularizer,
                regularizer_weight=config.weight_of_regularizer,
                backend=config.backend,
                **matched,
            )
        case "wae-mmd":
            return WassersteinAutoEncoder(decoder, **matched)
        case "swae":
            return SlicedWassersteinAutoEncoder(decoder, projections=config.projections, **matched)
        case "cwae":
            return CramerWoldAutoEncoder(decoder, **matched)
    return _sampling_free(config, config.likelihood, decoder, noise_var, scheduled)


def make_start(
    config: TrainConfig,
    decoder: nn.Module,
    learned: Mapping[str, Any] = MappingProxyType({}),
    **scheduled: Tensor,
) -> Objective:
    """Build the objective of a configuration's warm start; the arguments are `make_objective`'s.

    Its noise variance, gamma and weight of the KL divergence are the run's.
    """
    noise_var: NoiseVar = learned.get("noise_var", config.noise_var)
    return _sampling_free(config, config.start.likelihood, decoder, noise_var, scheduled)


def _sampling_free(
    config: TrainConfig,
    likelihood: Likelihood,
    decoder: nn.Module,
    noise_var: NoiseVar,
    scheduled: dict[str, Tensor],
) -> SamplingFree:
    weights = {"gamma": config.gamma, "kl_weight": config.kl_weight} | scheduled
    settings = {"likelihood": likelihood, "backend": config.backend}
    return SamplingFree(decoder, noise_var=noise_var, **weights, **settings)
