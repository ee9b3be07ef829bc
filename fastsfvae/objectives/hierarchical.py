"""The hierarchical importance-weighted bound: draws that know of each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsfvae._noise import noise_like
from fastsfvae.objectives.draws import Decoder, Drawn
from fastsfvae.objectives.iwae import ImportanceWeighted
from fastsfvae.objectives.noise_variance import NoiseVar

_HIDDEN = 64


class Coupling(nn.Module):
    """q(e_1, ..., e_K | e_0, x) and r(e_0 | e_k, x): what makes draws of one image differ.

    Both are diagonal Gaussians whose means and log-deviations a network of one hidden layer gives,
    for noise in units of the encoder's posterior. As it is made, both are standard normal: the
    draws are independent, and the bound is `ImportanceWeighted`'s.

    Args:
        latent_dim: m.
        samples: K.
    """

    def __init__(self, latent_dim: int, samples: int) -> None:
        super().__init__()
        self.latent_dim, self.samples = latent_dim, samples
        wide = 3 * latent_dim
        self.draws = _network(wide, 2 * latent_dim * samples)
        # Told which of the draws it looks at.
        self.reverse = _network(wide + samples, 2 * latent_dim)

    def forward(self, mean: Tensor, log_var: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Couple noise.

        Args:
            mean: of q(z|x), ``[B, m]``.
            log_var: the same.
            noise: standard normal, ``[1 + K, B, m]``.

        Returns:
            (e_k ``[K, B, m]``, log r(e_0|e_k) - log q(e_0) - log q(e_k|e_0) ``[K, B]``), the latter
            without the (2 pi)^(-m/2) of a standard normal density.
        """
        first, own = noise[0], noise[1:]
        about = torch.cat([mean, log_var], -1)
        given = self.draws(torch.cat([first, about], -1)).unflatten(-1, (self.samples, 2, -1))
        loc, log_std = given.movedim(1, 0).unbind(2)
        drawn = loc + log_std.exp() * own
        which = torch.eye(self.samples, dtype=mean.dtype, device=mean.device)
        which = which.unsqueeze(1).expand(-1, len(mean), -1)
        looked_at = torch.cat([drawn, about.expand(self.samples, -1, -1), which], -1)
        back_loc, back_log_std = self.reverse(looked_at).chunk(2, -1)
        back = (first - back_loc) / back_log_std.exp()
        log_ratio = first.square() - back.square() - 2 * back_log_std + own.square() + 2 * log_std
        return drawn, 0.5 * log_ratio.sum(-1)


class HierarchicalImportanceWeighted(ImportanceWeighted):
    """log 1/K sum_k p(x, z_k) r(z_0|z_k) / (q(z_k|z_0) q(z_0)) (Huang et al. 2019, H-IWAE).

    A lower bound of log p(x) in expectation, as each term's is p(x). The draws z_1, ..., z_K depend
    on each other through z_0, which they are told of by a `Coupling`, and may learn to share out
    the posterior; r is what that costs. Here all of it is in units of the encoder's q(z|x), z_k =
    mean + std e_k. q(z|x) itself is where the coupling starts; nothing keeps it a good posterior.

    Args:
        decoder: f, ``z [B, m] -> [B, *out]``.
        coupling: trained with the networks; its K is the number of draws.
        noise_var: c, as in `MonteCarlo`.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(self, decoder: Decoder, coupling: Coupling, *, noise_var: NoiseVar = 0.5) -> None:
        super().__init__(decoder, samples=coupling.samples, noise_var=noise_var)
        self.coupling = coupling

    def noise(self, mean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The noise that a call draws, ``[1 + K, B, m]``; the first is z_0's."""
        return torch.randn(1 + self.samples, *mean.shape, **noise_like(mean, generator))

    def _draw(self, mean: Tensor, log_var: Tensor, noise: Tensor) -> Drawn:
        # A density is no layer: autocast would leave eight bits of it.
        with torch.autocast(mean.device.type, enabled=False):
            drawn, log_ratio = self.coupling(mean, log_var, noise)
        z = mean + torch.exp(0.5 * log_var) * drawn
        # The (2 pi)^(m/2) of z's prior and of e_k's density cancel.
        return Drawn(z, log_ratio + 0.5 * (log_var - z.square()).sum(-1))


def _network(inputs: int, outputs: int) -> nn.Sequential:
    """A network of one hidden layer, whose output is 0 at first."""
    last = nn.Linear(_HIDDEN, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, _HIDDEN), nn.ELU(), last)
