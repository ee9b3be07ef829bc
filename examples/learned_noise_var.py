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
    first, offset, second = torch.randn(M, 32) / 2, torch.randn(32) / 2, torch.randn(32, N) / 3
    clean = torch.tanh(torch.randn(samples, M) @ first + offset) @ second
    return clean + torch.randn(samples, N).mul(NOISE_VAR**0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="The noise variance learned with the weights.")
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    x = data(4096)
    encoder = nn.Sequential(nn.Linear(N, 128), nn.SiLU(), nn.Linear(128, 2 * M))
    decoder = nn.Sequential(nn.Linear(M, 128), nn.SiLU(), nn.Linear(128, N))
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
        if step % 100 == 0:
            print(f"step {step:4d}: c = {loss_fn.noise_var:.4f}, loss {loss:7.2f} nats")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    print(f"learned c      {loss_fn.noise_var:.4f}")
    print(f"in the data    {NOISE_VAR:.4f}")
    print(f"linear (PCA)   {torch.linalg.eigvalsh(x.T.cov())[:-M].mean():.4f}")


if __name__ == "__main__":
    main()
