"""A decoder that begins with a normalising flow (zuko), trained by the sampling-free loss.

    pip install 'fastsfvae[flows]'
    python examples/flow_decoder.py --steps 300

The flow T bends N(0, I) before an MLP decodes it: f(z) = g(T(z)), which is a VAE with the learned
prior T(z) on g's inputs. The loss takes it as any other decoder; the same MLP without a flow is
trained beside it.
"""

import argparse

import torch
import zuko
from torch import Tensor, nn

import fastsfvae as sf
from fastsfvae.data import digits

M, PIXELS = 16, 784


class Flow(nn.Module):
    """T: a coupling flow of zuko's in the direction from noise to samples."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = zuko.flows.RealNVP(M, transforms=3, hidden_features=(32,))

    def forward(self, z: Tensor) -> Tensor:
        """Map z ``[B, m]`` to T(z) ``[B, m]``."""
        bent: Tensor = self.flow().transform.inv(z)
        return bent


def train(first: type[nn.Module], images: Tensor, test: Tensor, steps: int) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, 2 * M))
    decoder = nn.Sequential(first(), nn.Linear(M, 256), nn.ReLU(), nn.Linear(256, PIXELS))
    loss_fn = sf.SamplingFreeLoss(decoder, likelihood="expected")
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(steps):
        x = images[torch.randint(len(images), (64,))]
        loss = loss_fn(x, *encoder(x).chunk(2, dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        mean, log_var = encoder(test).chunk(2, dim=1)
    model = decoder, test, mean, log_var
    elbo = sf.evaluate.sampled_elbo(*model, noise_var=0.5, samples=10)
    log_ml = sf.evaluate.log_marginal_likelihood(*model, noise_var=0.5, samples=200)
    name = "an MLP behind a flow" if first is Flow else "the MLP alone"
    print(
        f"{name}: {sum(p.numel() for p in decoder.parameters()):,} weights, sampled ELBO "
        f"{elbo.elbo.mean():.1f}, log ML {log_ml.estimate.mean():.1f} nats on {len(test)} digits"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A decoder that begins with a flow.")
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    images, test = (digits(split).images.flatten(1) / 255 for split in ("train", "test"))
    print(f"{steps} steps by the likelihood 'expected', m = {M}, c = 0.5:")
    for first in (nn.Identity, Flow):
        train(first, images, test[:100], steps)


if __name__ == "__main__":
    main()
