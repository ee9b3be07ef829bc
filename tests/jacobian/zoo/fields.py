"""Functions of coordinates, operators, kernels, filters and differential equations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.jacobian.zoo.pattern import B, M, Parts, lifted, pattern, weights

POINTS = torch.cartesian_prod(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 3))


@pattern()
def siren():
    """Sines of coordinates, the phases moved by the latents."""

    def run(own, z):
        h = own.points.expand(z.shape[0], -1, -1)
        shift = own.shift(z).unsqueeze(1)
        h = torch.sin(5 * own.first(h) + shift)
        return own.out(torch.sin(5 * own.second(h) + shift))

    parts = dict(first=nn.Linear(2, 6), second=nn.Linear(6, 6), out=nn.Linear(6, 3))
    return Parts(run, points=POINTS, shift=nn.Linear(M, 6), **parts)


@pattern()
def positional_encoding():
    """NeRF's encoding of coordinates, the latents beside it, a skip in the middle."""

    def run(own, z):
        frequencies = 2.0 ** torch.arange(3, dtype=z.dtype) * math.pi
        angles = (own.points.unsqueeze(-1) * frequencies).flatten(1)
        encoded = torch.cat([own.points, angles.sin(), angles.cos()], -1)
        encoded = encoded.unsqueeze(0).repeat(z.shape[0], 1, 1)
        x = torch.cat([encoded, z.unsqueeze(1).repeat(1, encoded.shape[1], 1)], -1)
        h = F.relu(own.first(x))
        return torch.sigmoid(own.out(torch.cat([h, x], -1)))

    width = 2 + 12 + M
    return Parts(run, points=POINTS, first=nn.Linear(width, 6), out=nn.Linear(6 + width, 3))


@pattern()
def volume_rendering():
    """Densities along rays, transmitted by a product of what is left."""

    def run(own, z):
        x = torch.cat([own.rays.expand(z.shape[0], -1, -1, -1),
                       z[:, None, None].expand(-1, 3, 5, -1)], -1)  # fmt: skip
        density, colour = own.net(x).split([1, 3], -1)
        alpha = 1 - torch.exp(-F.softplus(density.squeeze(-1)) * own.steps)
        start = torch.ones(z.shape[0], 3, 1, dtype=z.dtype)
        left = torch.cumprod(torch.cat([start, 1 - alpha + 1e-10], -1), -1)[..., :-1]
        return ((alpha * left).unsqueeze(-1) * torch.sigmoid(colour)).sum(-2)

    net = nn.Sequential(nn.Linear(3 + M, 6), nn.Softplus(beta=10), nn.Linear(6, 4))
    return Parts(run, rays=torch.randn(3, 5, 3), steps=torch.rand(5), net=net)


@pattern()
def signed_distance():
    """DeepSDF, and a sphere's distance joined by a smooth minimum."""

    def run(own, z):
        x = own.points.expand(z.shape[0], -1, -1)
        h = own.net(torch.cat([x, z[:, None].expand(-1, x.shape[1], -1)], -1)).squeeze(-1)
        sphere = torch.linalg.vector_norm(x - z[:, None, :2], dim=-1) - z[:, 2:3].abs()
        return -torch.logsumexp(torch.stack([-5 * h, -5 * sphere]), 0) / 5

    net = nn.Sequential(nn.Linear(2 + M, 6), nn.Softplus(beta=100), nn.Linear(6, 1), nn.Tanh())
    return Parts(run, points=POINTS + 0.01, net=net)


@pattern()
def occupancy():
    """Features of a plane made from the latents, read at constant points."""

    def run(own, z):
        planes = own.lift(z).view(-1, 4, 3, 3)
        grid = own.points.view(1, -1, 1, 2).expand(z.shape[0], -1, -1, -1)
        h = F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=True)
        return torch.sigmoid(own.out(h.squeeze(-1).transpose(1, 2))).squeeze(-1)

    return Parts(run, points=0.9 * POINTS, lift=nn.Linear(M, 36), out=nn.Linear(4, 1))


@pattern()
def hash_grid():
    """Tables of features, looked up by whole numbers made from constant coordinates."""

    def run(own, z):
        scaled = (own.points + 1) * 3.5
        corner = scaled.floor().long()
        index = (corner[:, 0] ^ (corner[:, 1] * 2654435761)) % 8
        features = own.table(index) * (scaled - corner).prod(-1, keepdim=True)
        features = features.expand(z.shape[0], -1, -1)
        return own.net(torch.cat([features, z[:, None].expand(-1, 9, -1)], -1))

    net = nn.Sequential(nn.Linear(3 + M, 5), nn.ReLU(), nn.Linear(5, 1))
    return Parts(run, points=POINTS, table=nn.Embedding(8, 3), net=net)


@pattern()
def hypernetwork():
    """All weights of a small network from the latents."""

    def run(own, z):
        first, bias, second = own.weights(z).split([10, 5, 10], 1)
        h = own.points @ first.view(-1, 2, 5) + bias.unsqueeze(1)
        return torch.bmm(torch.sin(h), second.view(-1, 5, 2))

    return Parts(run, points=POINTS, weights=nn.Linear(M, 25))


@pattern()
def low_rank_weights():
    """A layer whose weight the latents change by a product of thin matrices."""

    def run(own, z):
        a, b = own.a(z).view(-1, 6, 2), own.b(z).view(-1, 2, 6)
        weight = own.base + a @ b
        return torch.baddbmm(own.bias.view(1, 1, 6), own.lift(z).view(-1, 3, 6), weight)

    parts = dict(a=nn.Linear(M, 12), b=nn.Linear(M, 12), base=weights(6, 6), bias=weights(6))
    return Parts(run, **parts, lift=nn.Linear(M, 18))


@pattern()
def deep_onet():
    def run(own, z):
        return torch.einsum("bp,np->bn", own.branch(z), own.trunk(own.points)) + own.bias

    branch = nn.Sequential(nn.Linear(M, 6), nn.Tanh(), nn.Linear(6, 5))
    trunk = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
    return Parts(run, points=POINTS, branch=branch, trunk=trunk, bias=weights(1))


@pattern()
def fourier_operator():
    """FNO: complex weights on the lowest frequencies, both corners written in place."""

    def run(own, z):
        h = own.lift(z).view(-1, 2, 6, 6)
        spectrum = torch.fft.rfft2(h)
        out = torch.zeros(h.shape[0], 2, 6, 4, dtype=spectrum.dtype)
        low, high = torch.view_as_complex(own.low), torch.view_as_complex(own.high)
        out[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :2, :2], low)
        out[:, :, -2:, :2] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -2:, :2], high)
        return F.gelu(torch.fft.irfft2(out, s=h.shape[-2:]) + own.skip(h))

    parts = dict(lift=nn.Linear(M, 72), skip=nn.Conv2d(2, 2, 1))
    return Parts(run, **parts, low=weights(2, 2, 2, 2, 2), high=weights(2, 2, 2, 2, 2))


@pattern()
def spectral_convolution():
    """One dimension, with a parameter that is complex itself."""

    def run(own, h):
        spectrum = torch.fft.rfft(h)[..., :3]
        mixed = torch.einsum("bix,iox->box", spectrum, own.weight)
        return h + torch.fft.irfft(mixed, n=h.shape[-1])

    return lifted(run, 2, 8, weight=nn.Parameter(0.5 * torch.randn(2, 2, 3, dtype=torch.cdouble)))


def distances(a, b):
    """What torch.cdist gives, whose second derivative PyTorch's vmap fails at."""
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1).sqrt()


def radial(distance):
    def run(own, z):
        return own.out(torch.exp(-own.gamma.exp() * distance(z, own.centres).square()))

    return Parts(run, centres=weights(5, M), gamma=weights(5), out=nn.Linear(5, 6))


@pattern(oracle=lambda: radial(distances))
def radial_basis():
    """Distances to learned centres."""
    return radial(torch.cdist)


@pattern(oracle=lambda: lifted(lambda h: distances(h, h + 1), 4, 3))
def pairwise_distances():
    """All distances between decoded points."""
    return lifted(lambda h: torch.cdist(h, h + 1), 4, 3)


@pattern()
def cosine_similarities():
    def run(own, h):
        near = F.cosine_similarity(h.unsqueeze(1), own.words, dim=-1)
        return torch.cat([near, F.pairwise_distance(h, own.words[0]).unsqueeze(1)], 1)

    return lifted(run, 4, words=weights(5, 4))


@pattern()
def splines():
    """KAN: B-splines by Cox and de Boor's recursion on a buffer of knots."""

    def bases(x, grid):
        x = x.unsqueeze(-1)
        b = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, 3):
            left = (x - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)])
            right = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:-k])
            b = left * b[..., :-1] + right * b[..., 1:]
        return b.contiguous()

    def run(own, z):
        base = F.linear(F.silu(z), own.base)
        spline = own.spline * own.scaler.unsqueeze(-1)
        return base + F.linear(bases(z, own.grid).view(z.shape[0], -1), spline.view(6, -1))

    grid = torch.linspace(-4, 4, 8).expand(M, -1).contiguous()
    return Parts(run, base=weights(6, M), spline=weights(6, M, 5), scaler=weights(6, M), grid=grid)


def kernel(a, b):
    return torch.exp(-0.5 * (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1))


@pattern()
def gaussian_process():
    """The mean at the latents, with a constant kernel matrix and its Cholesky factor."""

    def run(own, z):
        noise = F.softplus(own.noise) * torch.eye(5, dtype=z.dtype)
        factor = torch.linalg.cholesky(kernel(own.inputs, own.inputs) + noise)
        return kernel(z, own.inputs) @ torch.cholesky_solve(own.targets, factor)

    parts = dict(inputs=torch.randn(5, M), targets=weights(5, 3), noise=weights(1))
    return Parts(run, **parts)


@pattern()
def gaussian_process_of_latents():
    """The kernel matrix depends on the latents itself."""

    def run(own, h):
        K = kernel(h, h) + 0.5 * torch.eye(3, dtype=h.dtype)
        factor = torch.linalg.cholesky(K)
        white = torch.linalg.solve_triangular(
            factor, own.targets.expand(h.shape[0], -1, -1), upper=False
        )
        weight = torch.linalg.solve_triangular(factor.mT, white, upper=True)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.cat([(kernel(h + 1, h) @ weight).flatten(1), log_det.unsqueeze(1)], 1)

    return lifted(run, 3, 2, targets=weights(1, 3, 2))


@pattern()
def kalman_filter():
    """Gains by an inverse, a few steps of a linear system."""

    def run(own, h):
        state = torch.zeros(h.shape[0], 2, 1, dtype=h.dtype)
        P, states = torch.eye(2, dtype=h.dtype).expand(h.shape[0], 2, 2), []
        for t in range(3):
            state, P = own.A @ state, own.A @ P @ own.A.T + own.Q
            R = torch.diag_embed(F.softplus(h[:, t, 2:]))
            gain = P @ torch.linalg.inv(P + R)
            state = state + gain @ (h[:, t, :2, None] - state)
            P = (torch.eye(2, dtype=h.dtype) - gain) @ P
            states.append(state.squeeze(-1))
        return torch.stack(states, 1)

    return lifted(run, 3, 4, A=weights(2, 2), Q=0.1 * torch.eye(2))


@pattern()
def least_squares():
    """A ridge regression inside, solved in closed form."""

    def run(own, h):
        x, y = h.split([2, 1], -1)
        weight = torch.linalg.solve(
            x.mT @ x + own.ridge.exp() * torch.eye(2, dtype=h.dtype), x.mT @ y
        )
        return (own.queries @ weight).squeeze(-1)

    return lifted(run, 4, 3, ridge=weights(1), queries=torch.randn(5, 2))


@pattern()
def neural_ode():
    """Euler's steps, the time beside the state."""

    def run(own, z):
        h, dt = z, 0.25
        for k in range(4):
            t = torch.full_like(h[:, :1], k * dt)
            h = h + dt * own.field(torch.cat([h, t], 1))
        return own.out(h)

    field = nn.Sequential(nn.Linear(M + 1, 6), nn.Tanh(), nn.Linear(6, M))
    return Parts(run, field=field, out=nn.Linear(M, 3))


@pattern()
def runge_kutta():
    """Fourth order; the whole path is the output (latent ODE)."""

    def run(own, z):
        h, path = z, [z]
        for t0, t1 in zip(own.times[:-1], own.times[1:], strict=True):
            dt = t1 - t0
            k1 = own.field(h)
            k2 = own.field(h + dt / 2 * k1)
            k3 = own.field(h + dt / 2 * k2)
            h = h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + own.field(h + dt * k3))
            path.append(h)
        return own.out(torch.stack(path, 1))

    field = nn.Sequential(nn.Linear(M, 6), nn.Softplus(), nn.Linear(6, M))
    return Parts(run, field=field, times=torch.linspace(0, 1, 3), out=nn.Linear(M, 2))


@pattern()
def reaction_diffusion():
    """A simulation: finite differences by rolls, parameters of physics from the latents."""

    def run(own, z):
        u, rate = own.start.expand(z.shape[0], -1, -1), torch.sigmoid(z[:, 0, None, None])
        source = own.source(z).view(-1, 4, 4)
        for _ in range(3):
            laplacian = sum(torch.roll(u, s, d) for s in (1, -1) for d in (1, 2)) - 4 * u
            u = u + 0.1 * (rate * laplacian + source - u**3)
        return u

    return Parts(run, start=torch.randn(1, 4, 4), source=nn.Linear(M, 16))


@pattern()
def coordinates_as_argument():
    """Points that are given with each sample."""

    def run(own, z, points):
        h = torch.cat([points, z.unsqueeze(1).expand(-1, points.shape[1], -1)], -1)
        return own.net(h).squeeze(-1)

    net = nn.Sequential(nn.Linear(2 + M, 6), nn.ReLU(), nn.Linear(6, 1))
    return Parts(run, net=net), torch.randn(B, 5, 2)
