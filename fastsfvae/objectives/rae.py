"""The regularised auto-encoder's objective."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fastsfvae import _checks
from fastsfvae.gram.pullback import pullback
from fastsfvae.likelihoods import gaussian_kl, wide
from fastsfvae.objectives.auto_encoder import AutoEncoder, check_weight
from fastsfvae.objectives.noise_variance import log_normalizer
from fastsfvae.objectives.terms import Terms, make_terms

Regularizer: TypeAlias = Literal["l2", "gradient-penalty", "spectral-norm"]
REGULARIZERS: tuple[Regularizer, ...] = get_args(Regularizer)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def spectrally_normalized(decoder: nn.Module) -> nn.Module:
    """Divide each layer's weight by its largest singular value, in place; return the decoder.

    By `torch.nn.utils.parametrizations.spectral_norm`: one step of a power iteration at each
    forward in training mode.

    Raises:
        ValueError: for a decoder without a linear or convolutional layer.
    """
    found = [layer for layer in decoder.modules() if isinstance(layer, (*_LAYERS, *_TRANSPOSED))]
    if not found:
        raise ValueError(
            f"regularizer='spectral-norm': {type(decoder).__name__} has no linear or convolutional "
            "layer, give l2 or gradient-penalty"
        )
    for layer in found:
        parametrizations.spectral_norm(layer)
    return decoder


class RegularizedAutoEncoder(AutoEncoder):
    """log N(x; f(z), cI) - w |z|^2 / 2 - lambda R at z = mean (Ghosh et al. 2020, RAE).

    R keeps the decoder smooth in place of a draw of the posterior: "l2", the sum of squares of its
    parameters; "gradient-penalty", |J|_F^2 / 2 of each image, as the trace of J^T J;
    "spectral-norm", for which R = 0 and the decoder is a `spectrally_normalized` one. There is no
    prior to draw from: images are generated from a density fitted to the latents afterwards,
    `fastsfvae.evaluate.fit_mixture`.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        weight: w of the latents' size, not negative.
        regularizer: R.
        regularizer_weight: lambda, not negative.
        backend: of the gradient penalty's tangents, as in `SamplingFreeLoss`.
        **settings: those of `AutoEncoder`.

    Raises:
        ValueError: for a setting out of range, or "spectral-norm" with a decoder that has none.
    """

    def __init__(
        self,
        decoder: nn.Module,
        *,
        weight: float,
        regularizer: Regularizer = "l2",
        regularizer_weight: float,
        backend: _checks.Backend = "auto",
        **settings: Any,
    ) -> None:
        super().__init__(decoder, **settings)
        _checks.choice("regularizer", regularizer, REGULARIZERS)
        check_weight("weight", weight)
        check_weight("regularizer_weight", regularizer_weight)
        if regularizer == "spectral-norm" and not any(
            parametrize.is_parametrized(layer) for layer in decoder.modules()
        ):
            raise ValueError(
                "regularizer='spectral-norm': the decoder's layers are not normalised, give "
                "spectrally_normalized(decoder)"
            )
        self.weight, self.regularizer, self.backend = weight, regularizer, backend
        self.regularizer_weight = regularizer_weight

    def __call__(
        self, x: Tensor, mean: Tensor, log_var: Tensor, *, generator: torch.Generator | None = None
    ) -> Terms:
        """Evaluate; see `Objective`. Draws nothing; `kl` is reported, not minimised."""
        _checks.latent(mean, log_var)
        penalty = 0.5 * self.weight * wide(mean).square().sum(-1)
        if self.regularizer == "gradient-penalty":
            return self._with_gradient_penalty(x, mean, log_var, penalty)
        if self.regularizer == "l2":
            assert isinstance(self.decoder, nn.Module)
            squares = torch.stack([p.square().sum() for p in self.decoder.parameters()])
            penalty = penalty + self.regularizer_weight * squares.sum()
        return self._evaluate(x, mean, log_var, penalty)

    def _with_gradient_penalty(
        self, x: Tensor, mean: Tensor, log_var: Tensor, penalty: Tensor
    ) -> Terms:
        # The reconstruction comes with the Gram matrix.
        found = pullback(self.decoder, mean, x, backend=self.backend)
        assert found.squared_error is not None
        c, constant = log_normalizer(x[0].numel(), self.noise_var)
        log_likelihood = -constant - found.squared_error / (2 * c)
        trace = found.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        objective = log_likelihood - penalty - 0.5 * self.regularizer_weight * trace
        return make_terms(
            objective, log_likelihood, gaussian_kl(mean, log_var), found.squared_error
        )
