"""The ways to train, and the settings of each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastsfvae import _checks
from fastsfvae._noise import Draws, check_draws
from fastsfvae.objectives.dreg import ORTHOGONAL_BIAS
from fastsfvae.objectives.iwae import TrainingProposal, check_proposal
from fastsfvae.objectives.rae import REGULARIZERS, Regularizer
from fastsfvae.objectives.vlae import BOUNDS, Bound

Method = Literal[
    "sampling-free",
    "sampling",
    "beta-vae",
    "auto-encoder",
    "iwae",
    "stl",
    "dreg",
    "vlae",
    "exact-marginal",
    "free-bits",
    "delta-vae",
    "householder",
    "hiwae",
    "rem",
    "rae",
    "wae-mmd",
    "swae",
    "cwae",
]
METHODS: tuple[Method, ...] = get_args(Method)

# They decode the mean alone: q(z|x) has no variance, and f(z) no density around it.
DETERMINISTIC: tuple[Method, ...] = ("auto-encoder", "rae", "wae-mmd", "swae", "cwae")
# Of these, what nothing draws to the prior: images come from a density fitted to the latents.
WITHOUT_PRIOR: tuple[Method, ...] = ("auto-encoder", "rae")
# What holds a batch's latents to the prior, and so takes a batch of two at least.
_OF_PAIRS = ("wae-mmd",)

_TAKE_KL_WEIGHT = ("sampling-free", "sampling", "beta-vae", "delta-vae", "householder")
_TAKE_DRAWS = (
    *("sampling", "beta-vae", "iwae", "stl", "dreg", "vlae"),
    *("free-bits", "delta-vae", "householder", "rem"),
)
# Each step of the others is the same program: `vlae` searches modes, `exact-marginal` pieces.
_FIXED = tuple(method for method in METHODS if method not in ("vlae", "exact-marginal"))
# The methods that a setting other than its default has a meaning for.
_TAKEN_BY = {
    "samples": (*_TAKE_DRAWS, "hiwae"),
    "draws": _TAKE_DRAWS,
    "kl_weight": _TAKE_KL_WEIGHT,
    "kl_weight_schedule": _TAKE_KL_WEIGHT,
    "gamma_schedule": ("sampling-free",),
    "learned_noise_var": _FIXED,
    "compile": _FIXED,
    # A factorisation of full covariances has not been captured yet.
    "cuda_graph": tuple(method for method in _FIXED if method != "householder"),
    "mode_steps": ("vlae",),
    "bound": ("vlae",),
    "proposal": ("iwae",),
    "free_bits": ("free-bits",),
    "min_rate": ("delta-vae",),
    "flows": ("householder",),
    "rem_version": ("rem",),
    "regularizer": ("rae",),
    "regularizer_weight": ("rae",),
    "latent_weight": ("rae", "wae-mmd", "swae", "cwae"),
    "projections": ("swae",),
    # What a start does not train would wait for its first gradient.
    "warm_start": tuple(method for method in METHODS if method != "hiwae"),
}
# What else a method's result depends on, beside the numbers that all of them are shown with.
_SETTINGS_OF: dict[str, tuple[str, ...]] = {
    "vlae": ("mode_steps", "bound"),
    "free-bits": ("free_bits",),
    "delta-vae": ("min_rate",),
    "householder": ("flows",),
    "rem": ("rem_version",),
    "rae": ("latent_weight", "regularizer", "regularizer_weight"),
    "wae-mmd": ("latent_weight",),
    "swae": ("latent_weight", "projections"),
    "cwae": ("latent_weight",),
}
# What the weights 0 stand for. At c = .5 the reconstruction is the squared error: wae-mmd's is the
# 10 of its code, which stands beside .05 of that; cwae's is its paper's, swae's its paper's for
# another reconstruction cost, and rae's were chosen on the digits by KID.
LATENT_WEIGHTS = {"rae": 1.0, "wae-mmd": 200.0, "swae": 10.0, "cwae": 1.0}
_REGULARIZER_WEIGHTS = {"l2": 1e-3, "gradient-penalty": 1e-3, "spectral-norm": 0.0}
# A decoder that cannot stretch needs latents that lie far apart.
_OF_SPECTRAL_NORM = 0.01


@dataclass(frozen=True)
class MethodSettings:
    """What a model is trained by."""

    method: Method = "sampling-free"
    """sampling-free: linearise the decoder at the posterior mean. sampling: the VAE; beta-vae: with
    --kl-weight. iwae: importance-weighted bound; stl: Sticking-the-Landing; dreg: doubly
    reparameterised; hiwae: hierarchical draws. vlae: variational Laplace. exact-marginal: log p(x)
    of a ReLU decoder of one latent. rem: reweighted expectation maximisation. free-bits, delta-vae:
    the ELBO with free bits, or posteriors of a minimum rate; householder: of a full covariance.
    Without a density of x: auto-encoder; rae: regularised; wae-mmd, swae, cwae: latents held to the
    prior by maximum mean discrepancy, sliced Wasserstein or Cramer-Wold distance."""

    gamma: float = 0.5
    """Weight of the low-rank precision in [0, 1], at the end of its schedule (sampling-free)."""

    gamma_schedule: str = "constant"
    """constant, or what comes before --gamma: steps:0.95,0.67 (the paper's Figure 1, in equal
    phases), linear:0.95, cosine:0.95 (sampling-free)."""

    likelihood: _checks.Likelihood = "precision"
    """Which reading of the objective (sampling-free)."""

    kl_weight: float = 1.0
    """Factor of the KL divergence, at the end of its schedule (sampling-free, sampling,
    beta-vae, delta-vae, householder)."""

    kl_weight_schedule: str = "constant"
    """constant, or what comes before --kl-weight, as in --gamma-schedule."""

    samples: int = 1
    """Draws of the posterior per image (sampling, beta-vae, iwae, stl, dreg, vlae, free-bits,
    delta-vae, householder, hiwae, rem)."""

    draws: Draws = "iid"
    """How the draws of an image hang together: not, in pairs around the mean, or in such pairs
    along orthogonal directions; --samples is then even (what takes --samples but hiwae; dreg takes
    no orthogonal ones)."""

    warm_start: str = ""
    """Train the first steps by a sampling-free likelihood, e.g. precision:100, and go on by
    --method with the same optimiser (not hiwae)."""

    mode_steps: int = 1
    """Steps from the encoder's mean to the posterior's mode (vlae)."""

    bound: Bound = "sampled"
    """What the decoder is trained by at the mode: sampled, or closed-form (vlae)."""

    proposal: TrainingProposal = "posterior"
    """What draws come from: the posterior, or that of the decoder linearised at its mean (iwae)."""

    free_bits: float = 0.1
    """Nats of KL divergence that each latent dimension has for nothing (free-bits)."""

    min_rate: float = 0.05
    """Nats of KL divergence that each latent dimension has at least (delta-vae)."""

    flows: int = 4
    """Householder reflections that turn the posterior (householder)."""

    rem_version: int = 2
    """What the decoder is trained by: draws of the posterior, 1, or of the proposal that is fitted
    to them, 2 (rem)."""

    regularizer: Regularizer = "l2"
    """What keeps the decoder smooth: the size of its weights, that of its Jacobian, or weights that
    are divided by their largest singular values (rae)."""

    regularizer_weight: float = 0.0
    """Factor of the regulariser; 0: 0.001, and spectral-norm has none (rae)."""

    latent_weight: float = 0.0
    """Factor of the distance between latents and prior, of rae of |z|^2 / 2; 0: 1 for rae, with
    spectral-norm 0.01, 200 for wae-mmd, 10 for swae, 1 for cwae."""

    projections: int = 50
    """Directions along which latents and prior are compared (swae)."""

    def _check_settings(self) -> None:
        """Refuse values out of range; what is another method's, `_check_method` does."""
        _checks.choice("method", self.method, METHODS)
        _checks.choice("likelihood", self.likelihood, _checks.LIKELIHOODS)
        _checks.choice("bound", self.bound, BOUNDS)
        _checks.choice("regularizer", self.regularizer, REGULARIZERS)
        _checks.gamma(self.gamma)
        _checks.kl_weight(self.kl_weight)
        for name in ("samples", "mode_steps", "flows", "projections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.rem_version not in (1, 2):
            raise ValueError(f"rem_version={self.rem_version} must be 1 or 2")
        if not 0 < self.min_rate < math.inf:
            raise ValueError(f"min_rate={self.min_rate!r} must be finite and positive (nats)")
        for name in ("free_bits", "regularizer_weight", "latent_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be finite and not negative")

    def _check_method(self, latent_dim: int, captured: bool) -> None:
        """Refuse settings that the method would leave unread, or that are another method's."""
        check_proposal(self.proposal, self.method, captured)
        self._check_taken()
        fixed = self.kl_weight_schedule == "constant"
        if self.kl_weight == 1 and fixed and self.method == "beta-vae":
            raise ValueError(
                "method='beta-vae' with kl_weight=1 is the sampling VAE: give --kl-weight, or "
                "--method sampling"
            )
        check_draws(self.draws, self.samples, latent_dim)
        if self.method == "dreg" and self.draws == "orthogonal":
            raise ValueError(f"method='dreg': {ORTHOGONAL_BIAS}")
        if self.regularizer == "spectral-norm" and self.regularizer_weight:
            raise ValueError(
                f"regularizer_weight={self.regularizer_weight:g} with regularizer='spectral-norm': "
                "it has no weight, leave it out"
            )

    def _check_taken(self) -> None:
        for name, methods in _TAKEN_BY.items():
            value = getattr(self, name)
            if value != getattr(type(self), name) and self.method not in methods:
                shown = f"{value:g}" if isinstance(value, float) else repr(value)
                raise ValueError(
                    f"{name}={shown} with method={self.method!r}: --{name.replace('_', '-')} is "
                    f"for {', '.join(methods)}"
                )

    def check_share(self, images: int) -> None:
        """Refuse a batch's share of one process that the method has no objective of."""
        if images < 2 and self.method in _OF_PAIRS:
            raise ValueError(
                f"method={self.method!r} compares pairs of a batch's images: give a --batch-size "
                "of at least 2 for each process"
            )

    @property
    def own_settings(self) -> dict[str, Any]:
        """What the method's result depends on, by its name, beside what all methods share."""
        weights = {"latent_weight": "weight_of_latents"}
        weights["regularizer_weight"] = "weight_of_regularizer"
        names = _SETTINGS_OF.get(self.method, ())
        return {name: getattr(self, weights.get(name, name)) for name in names}

    @property
    def weight_of_latents(self) -> float:
        """`latent_weight`, or what its 0 stands for."""
        own = LATENT_WEIGHTS[self.method]
        if self.method == "rae" and self.regularizer == "spectral-norm":
            own = _OF_SPECTRAL_NORM
        return self.latent_weight or own

    @property
    def weight_of_regularizer(self) -> float:
        """`regularizer_weight`, or what its 0 stands for."""
        return self.regularizer_weight or _REGULARIZER_WEIGHTS[self.regularizer]
