"""Parts with products of several tensors, linear algebra, distances and samples of a grid."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.grammar.part import Part, Shape, on_features, on_images, weights


@on_features
def solved(rng: random.Random, size: int):
    """Linear algebra of 3 x 3 matrices that a diagonal keeps far from singular."""
    linalg = torch.linalg

    def matrix(own, x):
        return 0.6 * torch.tanh(own.lift(x)).view(-1, 3, 3) + 2 * torch.eye(3, dtype=x.dtype)

    def positive(own, x):
        a = matrix(own, x) / 2
        return a @ a.mT + torch.eye(3, dtype=x.dtype)

    def spread(own, x):
        a = 0.3 * torch.tanh(own.lift(x)).view(-1, 3, 3)
        return a + a.mT + torch.diag(torch.tensor([-3.0, 0.0, 3.0], dtype=x.dtype))

    def skew(own, x):
        a = torch.tanh(own.lift(x)).view(-1, 3, 3)
        return a - a.mT

    unit = torch.eye(3)
    return Part(
        rng.choice(
            (
                lambda own, x: linalg.solve(matrix(own, x), own.right),
                lambda own, x: linalg.solve(own.square, matrix(own, x)),
                lambda own, x: linalg.solve(matrix(own, x), own.lift(x)[:, :3]),
                lambda own, x: linalg.inv(matrix(own, x)),
                lambda own, x: linalg.det(matrix(own, x))[:, None] * x,
                lambda own, x: linalg.slogdet(matrix(own, x)).logabsdet[:, None] + x,
                lambda own, x: torch.logdet(positive(own, x))[:, None] + x,
                lambda own, x: linalg.cholesky(positive(own, x)),
                lambda own, x: torch.cholesky_solve(own.right, linalg.cholesky(positive(own, x))),
                lambda own, x: linalg.solve_triangular(
                    matrix(own, x).tril(), own.right.expand(x.shape[0], 3, 2), upper=False
                ),
                lambda own, x: torch.matrix_exp(0.5 * matrix(own, x)),
                lambda own, x: linalg.solve(own.unit + skew(own, x), own.unit - skew(own, x)),
                lambda own, x: linalg.eigvalsh(spread(own, x)),
                lambda own, x: linalg.svdvals(spread(own, x) + own.unit),
                lambda own, x: linalg.qr(matrix(own, x)).R,
                lambda own, x: linalg.matrix_power(matrix(own, x) / 2, 3),
                lambda own, x: linalg.pinv(matrix(own, x)),
                lambda own, x: linalg.norm(matrix(own, x), dim=(1, 2))[:, None] * x,
                lambda own, x: linalg.lu(positive(own, x))[2],
                lambda own, x: torch.cross(own.lift(x)[:, :3], own.lift(x)[:, 3:6], dim=1),
                lambda own, x: torch.kron(own.unit[:2, :2], own.right) @ own.lift(x)[:, :4, None],
                lambda own, x: (
                    linalg.multi_dot([own.right.mT, own.square, own.right]) * x[:, :1, None]
                ),
            )
        ),
        lift=nn.Linear(size, 9),
        right=weights(3, 2),
        square=nn.Parameter(2 * torch.eye(3) + 0.2 * torch.randn(3, 3)),
        unit=unit,
    )


@on_features
def products(rng: random.Random, size: int):
    """Bilinear and trilinear products, of z alone and with parameters."""

    def factors(own, x):
        return own.lift(x).view(-1, 3, 4)

    return Part(
        rng.choice(
            (
                lambda own, x: torch.einsum("bij,bkj,jl->bikl", *[factors(own, x)] * 2, own.core),
                lambda own, x: torch.einsum("bij,bij->bi", factors(own, x), factors(own, x).sin()),
                lambda own, x: torch.einsum("bi,bj->bij", x[:, :3], x[:, -3:]),
                lambda own, x: torch.einsum("b...i,oi->b...o", factors(own, x), own.core.mT),
                lambda own, x: torch.einsum("bii->bi", own.lift(x)[:, :9].view(-1, 3, 3)),
                lambda own, x: own.bilinear(x, x.flip(1)),
                lambda own, x: torch.baddbmm(
                    own.bias, factors(own, x), factors(own, x).mT, beta=2, alpha=0.5
                ),
                lambda own, x: torch.addmm(own.core[:1, :2], own.lift(x)[:, :4], own.core, beta=2),
                lambda own, x: torch.tensordot(factors(own, x), own.core, dims=([2], [0])),
                lambda own, x: torch.addcmul(x, x.sin(), x.cos(), value=0.5),
                lambda own, x: torch.lerp(own.lift(x)[:, :4], own.lift(x)[:, 4:8], 0.3),
                lambda own, x: torch.lerp(
                    own.lift(x)[:, :4], own.lift(x)[:, 4:8], torch.sigmoid(own.core[:, 0])
                ),
                lambda own, x: torch.softmax(factors(own, x) @ factors(own, x).mT, -1),
                lambda own, x: own.lift(x).view(-1, 4, 3).mT @ own.core,
                lambda own, x: own.core.mT @ own.lift(x).view(-1, 4, 3),
            )
        ),
        lift=nn.Linear(size, 12),
        core=weights(4, 2),
        bias=weights(3),
        bilinear=nn.Bilinear(size, size, 3),
    )


@on_features
def statistics(rng: random.Random, size: int):
    """Sums and moments along the features, and what is made of them."""
    return Part(
        rng.choice(
            (
                lambda own, x: x / (x.std(1, keepdim=True, correction=0) + 1),
                lambda own, x: x - x.logsumexp(1, keepdim=True),
                lambda own, x: x / (1 + x.norm(dim=1, keepdim=True)),
                lambda own, x: F.normalize(own.lift(x), dim=1),
                lambda own, x: x.log_softmax(1),
                lambda own, x: (
                    (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1)
                ),
                lambda own, x: torch.atan2(x, x.square() + 1),
                lambda own, x: torch.hypot(x, own.weight + 2),
                lambda own, x: torch.logaddexp(x, own.weight),
                lambda own, x: torch.xlogy(own.weight.sigmoid(), x.exp() + 1),
                lambda own, x: torch.lgamma(F.softplus(x) + 1) + torch.erf(x),
                lambda own, x: torch.sinc(1 + torch.tanh(x) / 4) + torch.expm1(torch.tanh(x)),
                lambda own, x: x.sigmoid().pow(own.weight.exp()),
                lambda own, x: torch.linalg.vector_norm(x, 3, dim=1, keepdim=True) + x,
                lambda own, x: (x.abs() + 0.1).sqrt(),
                lambda own, x: torch.remainder(x, 1.7) * x + torch.frac(x),
                lambda own, x: F.softmin(x, 1),
            )
        ),
        lift=nn.Linear(size, 4),
        weight=weights(size),
    )


@on_features
def distances(rng: random.Random, size: int):
    """Distances and similarities to learned centres, and radial functions of them.

    PyTorch 2.11 has no second derivative of cdist.
    """

    def apart(own, x):
        return own.lift(x)[:, None] - own.centres

    def cdist(own, x):
        return torch.cdist(own.lift(x), own.centres)

    def cdist_plain(own, x):
        return apart(own, x).square().sum(-1).sqrt()

    def batched(own, x):
        points = own.points(x).view(-1, 2, 3)
        return torch.cdist(points, own.centres.expand(x.shape[0], -1, -1)).square()

    def batched_plain(own, x):
        points = own.points(x).view(-1, 2, 1, 3)
        return (points - own.centres).square().sum(-1)

    def manhattan(own, x):
        return torch.cdist(own.lift(x), own.centres, p=1.0)

    def manhattan_plain(own, x):
        return apart(own, x).abs().sum(-1)

    run, plain = rng.choice(
        (
            (cdist, cdist_plain),
            (batched, batched_plain),
            (manhattan, manhattan_plain),
            (lambda own, x: torch.exp(-apart(own, x).square().sum(-1)), None),
            (lambda own, x: F.pairwise_distance(own.lift(x)[:, None], own.centres), None),
            (lambda own, x: F.cosine_similarity(own.lift(x)[:, None], own.centres, dim=-1), None),
        )
    )
    return Part(
        run, plain, lift=nn.Linear(size, 3), points=nn.Linear(size, 6), centres=weights(4, 3)
    )


@on_features
def sequences(rng: random.Random, size: int):
    """Convolutions and pools along one axis."""

    def signal(own, x):
        return own.lift(x).view(-1, 2, 6)

    def causal(own, x):
        return own.causal(F.pad(signal(own, x), (2, 0)))

    return Part(
        rng.choice(
            (
                lambda own, x: own.same(signal(own, x)),
                lambda own, x: own.up(signal(own, x)),
                causal,
                lambda own, x: F.max_pool1d(signal(own, x), 2),
                lambda own, x: F.avg_pool1d(signal(own, x), 3, 2),
                lambda own, x: F.interpolate(signal(own, x), scale_factor=1.5, mode="linear"),
                lambda own, x: F.adaptive_avg_pool1d(signal(own, x), 4),
                lambda own, x: F.lp_pool1d(signal(own, x).exp(), 2, 2),
                lambda own, x: F.glu(signal(own, x), -1),
                lambda own, x: own.volume(own.lift(x).view(-1, 1, 2, 2, 3)),
            )
        ),
        lift=nn.Linear(size, 12),
        same=nn.Conv1d(2, 3, 3, padding="same"),
        up=nn.ConvTranspose1d(2, 1, 4, 2, 1),
        causal=nn.Conv1d(2, 2, 3),
        volume=nn.Conv3d(1, 2, 2, padding=1, stride=(1, 1, 2)),
    )


@on_images
def sampled(rng: random.Random, shape: Shape):
    """An image sampled bilinearly at points: constant, learned, or an affine map made from it.

    PyTorch 2.11 has no second derivative of grid_sample.
    """
    padding = rng.choice(("zeros", "border"))
    kind = rng.choice(("constant", "learned", "affine"))
    c, h, w = shape

    def grid(own, x):
        batch = x.shape[0]
        if kind == "affine":
            moved = torch.tanh(own.affine(x.mean((2, 3)))).view(batch, 2, 3)
            return F.affine_grid(0.3 * moved + own.unit, (batch, c, 2, 3), align_corners=False)
        points = own.points if kind == "learned" else own.points.detach()
        return points.expand(batch, -1, -1, -1)

    def run(own, x):
        return F.grid_sample(x, grid(own, x), padding_mode=padding, align_corners=False)

    def plain(own, x):
        return bilinear(x, grid(own, x), padding)

    return Part(
        run,
        plain,
        points=nn.Parameter(torch.empty(2, 2, 2).uniform_(-0.9, 0.9)),
        affine=nn.Linear(c, 6),
        unit=torch.eye(2, 3),
    )


def bilinear(image: Tensor, grid: Tensor, padding: str) -> Tensor:
    """grid_sample of [B, C, H, W] at [B, h, w, 2] in operations that differentiate twice."""
    h, w = image.shape[2:]
    x, y = (((grid[..., i] + 1) * n - 1) / 2 for i, n in ((0, w), (1, h)))
    if padding == "border":
        x, y = x.clamp(0, w - 1), y.clamp(0, h - 1)
    left, top = x.detach().floor(), y.detach().floor()
    total = torch.zeros((), dtype=image.dtype)
    for column, row in ((0, 0), (1, 0), (0, 1), (1, 1)):
        i, j = left + column, top + row
        weight = (1 - (x - i).abs()) * (1 - (y - j).abs())
        inside = (i >= 0) & (i < w) & (j >= 0) & (j < h)
        places = (j.clamp(0, h - 1) * w + i.clamp(0, w - 1)).long().flatten(1)
        values = image.flatten(2).gather(2, places[:, None].expand(-1, image.shape[1], -1))
        total = total + (weight * inside)[:, None] * values.unflatten(2, i.shape[1:])
    return total


@on_images
def pooled(rng: random.Random, shape: Shape):
    """Pools, norms and resizing that the layers of the plain grammar lack."""
    c, h, w = shape
    choices = [
        lambda own, x: F.adaptive_max_pool2d(x, 1),
        lambda own, x: F.local_response_norm(x, 2),
        lambda own, x: F.interpolate(x, (2, 3), mode="bilinear", align_corners=True),
        lambda own, x: F.interpolate(x, (2, 2), mode="area"),
        lambda own, x: F.softmax(x.flatten(2), -1).view_as(x) * x,
        lambda own, x: x / (x.square().mean(1, keepdim=True) + 0.5).sqrt() * own.weight,
        lambda own, x: x / (x.std((1, 2, 3), keepdim=True, correction=0) + 0.5),
        lambda own, x: torch.logsumexp(x, (2, 3)),
        lambda own, x: own.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        lambda own, x: x.amax((2, 3), keepdim=True) + x,
        lambda own, x: F.cosine_similarity(x, own.weight[None], dim=1, eps=1e-3),
    ]
    if min(h, w) > 1:
        choices += [
            lambda own, x: F.lp_pool2d(x.exp(), 2, 2),
            lambda own, x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
            lambda own, x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False),
        ]
    return Part(rng.choice(choices), weight=weights(c, 1, 1), norm=nn.LayerNorm(c))
