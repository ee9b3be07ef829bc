"""Training objectives: one file each, one call, one result type."""

from __future__ import annotations

from fastsfvae.objectives.auto_encoder import AutoEncoder as AutoEncoder
from fastsfvae.objectives.dreg import DoublyReparameterized as DoublyReparameterized
from fastsfvae.objectives.exact import ExactMarginal as ExactMarginal
from fastsfvae.objectives.iwae import ImportanceWeighted as ImportanceWeighted
from fastsfvae.objectives.noise_variance import NoiseVariance as NoiseVariance
from fastsfvae.objectives.sampling import Sampling as Sampling
from fastsfvae.objectives.sampling_free import SamplingFree as SamplingFree
from fastsfvae.objectives.stl import StickingTheLanding as StickingTheLanding
from fastsfvae.objectives.terms import Objective as Objective
from fastsfvae.objectives.terms import Terms as Terms
from fastsfvae.objectives.vlae import VariationalLaplace as VariationalLaplace
