"""Equations of motion from what they look like: a small SINDy autoencoder (Champion et al., 2019).

    python examples/sindy.py

Prey and predators, u' = u - uv and v' = uv - v, are seen through a nonlinear lift to 64 outputs x,
with their velocities x'. Encoder, decoder f and the equations z' = Xi^T Theta(z) are learned by
turns: what f shows of the latents' velocity, J(z) z' by `sf.jvp`, must be x'. Theta holds the
monomials up to degree two; least squares with sequential thresholding choose among them. Some
states are given with their z, which pins down the coordinates. It needs the library alone.
"""

import argparse

import torch
from torch import Tensor, nn

import fastsfvae as sf

TERMS, LABELLED, THRESHOLD = ("1", "u", "v", "u^2", "uv", "v^2"), 200, 0.25
TRUE = torch.tensor([[0, 1, 0, 0, -1, 0], [0, 0, -1, 0, 1, 0]]).float().T


def theta(z: Tensor) -> Tensor:
    """The monomials of z [B, 2], [B, 6]."""
    u, v = z.T
    return torch.stack([torch.ones_like(u), u, v, u * u, u * v, v * v], 1)


def states() -> Tensor:
    """Points z [B, 2] of orbits, by midpoint steps."""
    z, dt = torch.stack([torch.linspace(1.2, 3.0, 8), torch.ones(8)], 1), 0.05
    orbits: list[Tensor] = []
    for _ in range(140):
        z = z + dt * theta(z + dt / 2 * theta(z) @ TRUE) @ TRUE
        orbits.append(z)
    return torch.cat(orbits)


def fitted(decoder: nn.Module, z: Tensor, velocity: Tensor, kept: Tensor) -> Tensor:
    """Xi [6, 2] of the terms that are kept, by least squares of J(z) Xi^T Theta(z) = x'."""
    axes = torch.eye(2).repeat_interleave(6, 0)[:, None] * theta(z).T.repeat(2, 1)[:, :, None]
    columns = sf.jvp(decoder, z, axes)[1].flatten(1).T[:, kept.T.flatten()]
    return torch.zeros(2, 6).masked_scatter(kept.T, columns.pinverse() @ velocity.flatten()).T


def main() -> None:
    parser = argparse.ArgumentParser(description="A small SINDy autoencoder.")
    parser.add_argument("--steps", type=int, default=1600)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    lift = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 64)).requires_grad_(False)
    z = states()
    x, velocity = sf.jvp(lift, z, theta(z) @ TRUE)
    labelled = torch.randperm(len(z))[:LABELLED]
    encoder = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    decoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    xi, kept = torch.zeros(6, 2), torch.ones(6, 2, dtype=torch.bool)
    for step in range(1, steps + 1):
        rows = torch.randint(len(z), (128,))
        latents = encoder(x[rows])
        output, moved = sf.jvp(decoder, latents, theta(latents) @ xi)
        error, mismatch = (output - x[rows]).square(), (moved - velocity[rows]).square()
        labels = (encoder(x[labelled]) - z[labelled]).square()
        loss = error.mean() + mismatch.mean() * (step > 400) + labels.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 400 and step % 200 == 0:
            with torch.no_grad():
                xi = fitted(decoder, encoder(x), velocity, kept)
            kept = kept & (xi.abs() > THRESHOLD)
            print(f"step {step}: |x' - J z'|^2 {mismatch.mean():.1e}, {int(kept.sum())} terms")
    print(f"{'term':>5} {'u learned':>10} {'true':>6} {'v learned':>10} {'true':>6}")
    for name, (u, v), (true_u, true_v) in zip(TERMS, xi, TRUE, strict=True):
        print(f"{name:>5} {u:10.3f} {true_u:6.0f} {v:10.3f} {true_v:6.0f}")


if __name__ == "__main__":
    main()
