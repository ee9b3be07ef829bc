"""Fours by their exact log-likelihood, beside a sampling VAE: one latent, a small ReLU decoder.

Both are trained on the digits of label 4 for as many steps, the first by log p(x) itself. Printed
of either, for held-out fours: the exact log p(x) and ELBO, and how far the importance sampler is
off with a hundred draws. It needs the library alone.

    python examples/exact_marginal.py --steps 2000 --hidden 32

is the size of docs/exact.md; without options it is over in seconds.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from fastsfvae import evaluate
from fastsfvae.data import digits
from fastsfvae.objectives import ExactMarginal, Objective, Sampling

NOISE_VAR, BATCH = 0.05, 64


def train(
    method: type[ExactMarginal] | type[Sampling], x: Tensor, steps: int, hidden: int
) -> tuple[nn.Module, nn.Module, float]:
    """An encoder, a decoder, and the seconds that they took."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 2))
    decoder = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
    decoder.append(nn.Linear(hidden, 784))
    objective: Objective = method(decoder, noise_var=NOISE_VAR)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    start = time.perf_counter()
    for _ in range(steps):
        batch = x[torch.randint(len(x), (BATCH,))]
        loss = objective(batch, *encoder(batch).chunk(2, dim=1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder, decoder, time.perf_counter() - start


@torch.no_grad()
def judge(encoder: nn.Module, decoder: nn.Module, x: Tensor) -> None:
    """Print what is exact of the held-out digits, and what is estimated."""
    mean, log_var = encoder(x).chunk(2, dim=1)
    exact = evaluate.exact_log_marginal_likelihood(decoder, x, noise_var=NOISE_VAR)
    elbo = evaluate.exact_elbo(decoder, x, mean, log_var, noise_var=NOISE_VAR).elbo
    print(f"  exact log p(x)  {exact.mean():.2f} nats, ELBO {(exact - elbo).mean():.2f} below")
    for proposal in ("posterior", "defensive"):
        found = evaluate.log_marginal_likelihood(
            decoder, x, mean, log_var, noise_var=NOISE_VAR, samples=100, proposal=proposal
        )
        off = found.estimate - exact
        print(f"  100 draws, {proposal}: {off.mean():+.3f} on average, worst {off.min():+.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fours by their exact log-likelihood.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=16, help="width of both hidden layers")
    options = parser.parse_args()
    # Pixels in [0, 1], [N, 784].
    splits = digits("train"), digits("test")
    fours, test = (images[labels == 4].flatten(1) / 255 for images, labels in splits)
    for method in (ExactMarginal, Sampling):
        encoder, decoder, seconds = train(method, fours, options.steps, options.hidden)
        print(f"{method.__name__}: {options.steps} steps of {seconds / options.steps:.4f} s")
        judge(encoder, decoder, test)


if __name__ == "__main__":
    main()
