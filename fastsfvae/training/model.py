"""Encoder, decoder and objective as one module: what is compiled, and what DDP wraps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsfvae._ranges import span
from fastsfvae.objectives import Objective, Terms


class Model(nn.Module):
    """Encoder, decoder and objective as one module, from images to loss.

    Attributes:
        encoder: x -> (mean, log_var).
        decoder: z -> x.
        objective: of the decoder.
        learned: what is trained beside the networks, such as the observation noise's variance.
        autocast: whether encoder and decoder run under bfloat16 autocast.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        objective: Objective,
        learned: nn.ModuleDict,
        autocast: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.objective = objective
        self.learned = learned
        self.autocast = autocast

    def forward(self, x: Tensor, generator: torch.Generator) -> Terms:
        """Evaluate the objective on images ``[B, C, H, W]``."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            with span("encode"):
                mean, log_var = self.encoder(x)
            # The posterior's density is no place for eight bits.
            return self.objective(x, mean.float(), log_var.float(), generator=generator)
