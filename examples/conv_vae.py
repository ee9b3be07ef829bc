"""A convolutional VAE of one's own, trained by the sampling-free loss in one's own loop.

    python examples/conv_vae.py --steps 300 --out pictures

The decoder's transposed convolutions end in images [B, 1, 28, 28]. Prints what `check_decoder`
finds, the falling loss, and sampled ELBO and log ML of held-out digits before and after. --out
writes a picture as well, and needs matplotlib: pip install 'fastsfvae[train]'.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae.data import digits

M, NOISE_VAR = 8, 0.5


class Encoder(nn.Module):
    """The posterior's mean and log-variance."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(1, 16, 4, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.SiLU()
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 2 * M))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x [B, 1, 28, 28] to two [B, m]."""
        both: Tensor = self.layers(x)
        return both[:, :M], both[:, M:]


def judge(encoder: nn.Module, decoder: nn.Module, x: Tensor) -> None:
    model = decoder, x, *(t.detach() for t in encoder(x))
    elbo = sf.evaluate.sampled_elbo(*model, noise_var=NOISE_VAR, samples=10).elbo.mean()
    log_ml = sf.evaluate.log_marginal_likelihood(*model, noise_var=NOISE_VAR, samples=200)
    print(f"held-out digits: sampled ELBO {elbo:.1f}, log ML {log_ml.estimate.mean():.1f} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description="A convolutional sampling-free VAE.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="a folder for the picture")
    options = parser.parse_args()
    torch.manual_seed(0)
    images, test = (digits(split).images / 255 for split in ("train", "test"))
    # No BatchNorm: the decoder must treat its samples one by one.
    first = nn.Linear(M, 32 * 7 * 7), nn.Unflatten(1, (32, 7, 7)), nn.SiLU()
    last = nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)
    encoder, decoder = Encoder(), nn.Sequential(*first, *last)
    print(sf.check_decoder(decoder, encoder(images[:4])[0]))
    judge(encoder, decoder, test[:100])
    loss_fn = sf.SamplingFreeLoss(decoder, likelihood="expected", noise_var=NOISE_VAR)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    for step in range(options.steps):
        x = images[torch.randint(len(images), (64,))]
        loss = loss_fn(x, *encoder(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:4d}: loss {loss:.1f}")
    judge(encoder, decoder, test[:100])
    if options.out:
        from matplotlib import image

        shown = torch.cat([test[:10], decoder(encoder(test[:10])[0]), decoder(torch.randn(10, M))])
        picture = (
            shown.detach().view(3, 10, 28, 28).transpose(1, 2).reshape(3 * 28, 10 * 28).clamp(0, 1)
        )
        options.out.mkdir(parents=True, exist_ok=True)
        image.imsave(options.out / "conv_vae.png", picture.numpy(), cmap="gray_r")
        print(f"wrote {options.out / 'conv_vae.png'}: digits, reconstructions, samples")


if __name__ == "__main__":
    main()
