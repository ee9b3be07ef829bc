"""Equations of motion from what they look like: a small SINDy autoencoder (Champion et al., 2019).

    python examples/sindy.py

Prey and predators, u' = u - uv and v' = uv - v, are seen through a nonlinear lift to 64 outputs x,
with their velocities x'. Encoder, decoder f and the equations z' = Xi^T Theta(z) are learned at
once: what f shows of the latents' velocity, J(z) z' by `sf.jvp`, must be x'. Theta holds all
monomials up to degree two; every so often the terms with small coefficients are dropped. Forty
states are given with their z, which is what tells u and v from any other coordinates. Needs the
library alone.
"""

import argparse

import torch
from torch import Tensor, nn

import fastsfvae as sf

TERMS, LABELLED, THRESHOLD = ("1", "u", "v", "u^2", "uv", "v^2"), 40, 0.25
TRUE = torch.tensor([[0, 1, 0, 0, -1, 0], [0, 0, -1, 0, 1, 0]]).float().T


def theta(z: Tensor) -> Tensor:
    """The monomials of z [B, 2], [B, 6]."""
    u, v = z.T
    return torch.stack([torch.ones_like(u), u, v, u * u, u * v, v * v], 1)


def states() -> Tensor:
    """Points z [B, 2] of orbits, by Runge-Kutta steps."""
    z, dt = torch.stack([torch.linspace(1.2, 3.0, 8), torch.ones(8)], 1), 0.05
    orbits: list[Tensor] = []
    for _ in range(140):
        k1 = theta(z) @ TRUE
        k2 = theta(z + dt / 2 * k1) @ TRUE
        k3 = theta(z + dt / 2 * k2) @ TRUE
        k4 = theta(z + dt * k3) @ TRUE
        z = z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        orbits.append(z)
    return torch.cat(orbits)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small SINDy autoencoder.")
    parser.add_argument("--steps", type=int, default=1200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    lift = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 64)).requires_grad_(False)
    z = states()
    x, velocity = sf.jvp(lift, z, theta(z) @ TRUE)
    labelled = torch.randperm(len(z))[:LABELLED]

    encoder = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    decoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64))
    xi, kept = nn.Parameter(torch.zeros(6, 2)), torch.ones(6, 2)
    networks = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam([{"params": networks}, {"params": [xi], "lr": 1e-2}], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        rows = torch.randint(len(z), (128,))
        latents = encoder(x[rows])
        output, moved = sf.jvp(decoder, latents, theta(latents) @ (xi * kept))
        error, mismatch = (output - x[rows]).square(), (moved - velocity[rows]).square()
        calibration = (encoder(x[labelled]) - z[labelled]).square().mean()
        loss = error.mean() + 5 * mismatch.mean() + calibration
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // 8) == 0:
            # At first the coefficients are on their way.
            kept = kept * (xi.detach().abs() > THRESHOLD) if step > steps // 3 else kept
            print(f"step {step}: |x' - J z'|^2 {mismatch.mean():.1e}, {int(kept.sum())} terms")
    print(f"{'term':>5} {'u learned':>10} {'true':>6} {'v learned':>10} {'true':>6}")
    for name, (u, v), (true_u, true_v) in zip(TERMS, xi * kept, TRUE, strict=True):
        print(f"{name:>5} {u:10.3f} {true_u:6.0f} {v:10.3f} {true_v:6.0f}")


if __name__ == "__main__":
    main()
