"""The noise variance c learned with the weights: does it find the noise that is in the data?

    python examples/learned_noise_var.py

Draws data from a known model, x = g(z) + noise with three latents, 100 outputs and the noise
variance 0.05, and trains an encoder and a decoder from c = 1 on, with `learned_noise_var=True`.
`loss_fn.parameters()` holds c's logarithm and goes to the optimizer with the others. Printed are c
on its way, and that of PCA with as many directions, the best that a linear decoder can do. It needs
the library alone.
"""

import argparse

import torch
from torch import Tensor, nn

import fastsfvae as sf

M, N, NOISE_VAR = 3, 100, 0.05


def data(samples: int) -> Tensor:
    """Samples [B, n] of a smooth random manifold, with noise."""
    truth = nn.Sequential(nn.Linear(M, 32), nn.Tanh(), nn.Linear(32, N)).requires_grad_(False)
    nn.init.normal_(truth[0].weight, std=0.5)
    nn.init.normal_(truth[2].weight, std=0.3)
    return truth(torch.randn(samples, M)) + NOISE_VAR**0.5 * torch.randn(samples, N)


def main() -> None:
    parser = argparse.ArgumentParser(description="The noise variance learned with the weights.")
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    x = data(4096)
    encoder = nn.Sequential(nn.Linear(N, 64), nn.SiLU(), nn.Linear(64, 2 * M))
    decoder = nn.Sequential(nn.Linear(M, 64), nn.SiLU(), nn.Linear(64, N))
    loss_fn = sf.SamplingFreeLoss(
        decoder, likelihood="expected", noise_var=1.0, learned_noise_var=True
    )
    networks = [*encoder.parameters(), *decoder.parameters()]
    # c has a long way to go, and a larger step.
    groups = {"params": networks, "lr": 5e-3}, {"params": [*loss_fn.parameters()], "lr": 3e-2}
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps + 1):
        batch = x[torch.randint(len(x), (128,))]
        loss = loss_fn(batch, *encoder(batch).chunk(2, dim=1))
        if step % (steps // 8) == 0:
            print(f"step {step:4d}: c = {loss_fn.noise_var:.4f}, loss {loss:7.2f} nats")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    variances = torch.linalg.eigvalsh(x.T.cov())
    print(f"learned c      {loss_fn.noise_var:.4f}")
    print(f"in the data    {NOISE_VAR:.4f}")
    print(f"linear (PCA)   {variances[:-M].mean():.4f}")


if __name__ == "__main__":
    main()
