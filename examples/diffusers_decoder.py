"""The decoder of diffusers' AutoencoderKL, whose latents are images [B, 4, h, w].

    pip install 'fastsfvae[examples]'
    python examples/diffusers_decoder.py

The library differentiates by latents [B, m]: a small adapter folds them. A small model of random
weights stands for a pretrained one, as AutoencoderKL.from_pretrained would load it. Printed are the
largest singular values of the decoder's Jacobian beside those that autograd's reverse mode finds,
and the falling loss of a few steps on shrunken digits, by random probes in place of all m tangents.
"""

import argparse
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae.data import digits

SHAPE, M = (4, 4, 4), 64


class FlatDecoder(nn.Module):
    """The decoder as a function of latents [B, m], m = 4 h w."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, z: Tensor) -> Tensor:
        """Means of pixels [B, 3, H, W]."""
        images: Tensor = self.model.decode(z.view(-1, *SHAPE)).sample
        return images


def main() -> None:
    parser = argparse.ArgumentParser(description="The Jacobian of a diffusers decoder.")
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    # Any, as its annotations say tuple[str] where it takes as many as there are blocks.
    build: Any = AutoencoderKL
    model = build(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
    )
    decoder, z = FlatDecoder(model.eval()), torch.randn(2, M)
    values = sf.singular_directions(decoder, z, 4).values
    print("largest singular values of J, and of autograd's")
    for one, found in zip(z, values, strict=True):
        image = torch.autograd.functional.jacobian(decoder, one[None])
        wanted: Tensor = torch.linalg.svdvals(image.view(-1, M))[:4]
        print(" ".join(f"{value:.4f}" for value in found), end="  |  ")
        print(" ".join(f"{value:.4f}" for value in wanted), end="  |  ")
        print(f"relative difference {float((found / wanted - 1).abs().max()):.0e}")

    # 8 x 8 pixels in three channels; the encoder's means and log-variances are folded as well.
    images = nn.functional.interpolate(digits("train").images[:64] / 255, (8, 8), mode="area")
    x = images.expand(-1, 3, -1, -1).contiguous()
    loss_fn = sf.SamplingFreeLoss(decoder, likelihood="expected", noise_var=0.05, probes=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        posterior = model.encode(x).latent_dist
        loss = loss_fn(x, posterior.mean.flatten(1), posterior.logvar.flatten(1))
        if step % 3 == 0:
            print(f"step {step:2d}: loss {loss:.1f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
