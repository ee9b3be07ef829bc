"""Training objectives: one file each, one call, one result type."""

from __future__ import annotations

from fastsfvae.objectives.auto_encoder import AutoEncoder as AutoEncoder
from fastsfvae.objectives.cwae import CramerWoldAutoEncoder as CramerWoldAutoEncoder
from fastsfvae.objectives.delta_vae import MinimumRate as MinimumRate
from fastsfvae.objectives.dreg import DoublyReparameterized as DoublyReparameterized
from fastsfvae.objectives.exact import ExactMarginal as ExactMarginal
from fastsfvae.objectives.free_bits import FreeBits as FreeBits
from fastsfvae.objectives.hierarchical import Coupling as Coupling
from fastsfvae.objectives.hierarchical import (
    HierarchicalImportanceWeighted as HierarchicalImportanceWeighted,
)
from fastsfvae.objectives.householder import Householder as Householder
from fastsfvae.objectives.iwae import ImportanceWeighted as ImportanceWeighted
from fastsfvae.objectives.noise_variance import NoiseVariance as NoiseVariance
from fastsfvae.objectives.rae import RegularizedAutoEncoder as RegularizedAutoEncoder
from fastsfvae.objectives.rae import spectrally_normalized as spectrally_normalized
from fastsfvae.objectives.rem import (
    ReweightedExpectationMaximization as ReweightedExpectationMaximization,
)
from fastsfvae.objectives.sampling import Sampling as Sampling
from fastsfvae.objectives.sampling_free import SamplingFree as SamplingFree
from fastsfvae.objectives.stl import StickingTheLanding as StickingTheLanding
from fastsfvae.objectives.swae import (
    SlicedWassersteinAutoEncoder as SlicedWassersteinAutoEncoder,
)
from fastsfvae.objectives.terms import Objective as Objective
from fastsfvae.objectives.terms import Terms as Terms
from fastsfvae.objectives.vlae import VariationalLaplace as VariationalLaplace
from fastsfvae.objectives.wae import WassersteinAutoEncoder as WassersteinAutoEncoder
