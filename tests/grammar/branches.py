"""Parts with branches of parameters, expanded to the batch or computed before they meet z."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from tests.grammar.part import Part, Shape, on_features, on_images, weights


@on_features
def tokens(rng: random.Random, size: int):
    """A learned token in front, positions added, attention over all."""

    def run(own, x):
        token = own.token.expand(x.shape[0], -1, -1)
        h = torch.cat([token, own.lift(x).view(-1, 2, 4)], 1) + own.positions
        h = h + own.attention(h, h, h, need_weights=False)[0]
        return h[:, 0] if first else h

    first = rng.random() < 0.5
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    parts = dict(token=weights(1, 1, 4), positions=weights(3, 4), attention=attention)
    return Part(run, lift=nn.Linear(size, 8), **parts)


@on_features
def queries(rng: random.Random, size: int):
    """Learned queries attend to what comes from z, or that to learned keys."""

    def run(own, x):
        learned = own.layer(own.learned).expand(x.shape[0], 1, 3, 4)
        given = own.lift(x).view(-1, 1, 2, 4)
        q, k = (learned, given) if asks else (given, learned)
        return F.scaled_dot_product_attention(q, k, torch.tanh(k))

    asks = rng.random() < 0.5
    return Part(run, lift=nn.Linear(size, 8), learned=weights(3, 4), layer=nn.Linear(4, 4))


@on_features
def decoder_layer(rng: random.Random, size: int):
    """PyTorch's decoder layer from learned targets to a memory that comes from z."""

    def run(own, x):
        targets = own.targets.unsqueeze(0).repeat(x.shape[0], 1, 1)
        return own.layer(targets, own.lift(x).view(-1, 3, 4))

    layer = nn.TransformerDecoderLayer(4, 2, 5, batch_first=True, norm_first=rng.random() < 0.5)
    return Part(run, lift=nn.Linear(size, 12), targets=weights(2, 4), layer=layer)


@on_features
def time_embedding(rng: random.Random, size: int):
    """Sines of a time, through layers of their own, scale and shift."""

    def run(own, x):
        time = torch.full((x.shape[0],), 0.3, dtype=x.dtype)
        angles = time[:, None] * own.frequencies
        h = own.second(F.silu(own.first(torch.cat([angles.sin(), angles.cos()], 1))))
        scale, shift = h.chunk(2, 1)
        return x * (1 + scale) + shift

    return Part(
        run,
        frequencies=torch.exp(torch.linspace(0, 2, 3)),
        first=nn.Linear(6, 5),
        second=nn.Linear(5, 2 * size),
    )


@on_features
def labelled(rng: random.Random, size: int):
    """One class for all samples, looked up in a table, through a layer."""

    def run(own, x):
        label = torch.full((x.shape[0],), 2, dtype=torch.long)
        return x + torch.tanh(own.layer(own.table(label)))

    return Part(run, table=nn.Embedding(4, 3), layer=nn.Linear(3, size))


@on_features
def computed_weights(rng: random.Random, size: int):
    """A weight computed from parameters: normalised, of low rank, masked, a mixture, bounded."""
    return Part(
        rng.choice(
            (
                lambda own, x: F.linear(x, F.normalize(own.weight, dim=1)),
                lambda own, x: x @ (own.left @ own.right),
                lambda own, x: F.linear(x, own.weight * own.mask, own.left[0, 0] * own.bias),
                lambda own, x: x @ (own.bank * own.mixture.softmax(0)[:, None, None]).sum(0),
                lambda own, x: x * own.mixture.exp()[0] / own.weight.norm(),
                lambda own, x: F.linear(x, own.weight / own.weight.std(), own.bias.cumsum(0)),
                lambda own, x: F.linear(x, torch.linalg.solve(own.square, own.weight.mT).mT),
                lambda own, x: F.linear(x, torch.cat([own.weight[:2], own.right[:, :size]])),
                lambda own, x: x @ torch.matrix_exp(0.3 * (own.square - own.square.mT)),
            )
        ),
        weight=weights(4, size),
        bias=weights(4),
        left=weights(size, 2),
        right=weights(2, size),
        mask=torch.rand(4, size) < 0.7,
        bank=weights(3, size, 4),
        mixture=weights(3),
        square=nn.Parameter(2 * torch.eye(size) + 0.1 * torch.randn(size, size)),
    )


@on_features
def parametrized(rng: random.Random, size: int):
    """An orthogonal weight, through one of PyTorch's maps."""
    way = rng.choice(("matrix_exp", "cayley", "householder"))
    return parametrizations.orthogonal(nn.Linear(size, size), orthogonal_map=way)


@on_features
def hypernetwork(rng: random.Random, size: int):
    """A layer's weights made from the input, its own inputs learned."""

    def run(own, x):
        made = own.lift(x).view(-1, 3, 4)
        learned = own.points.expand(x.shape[0], -1, -1)
        h = torch.sin(torch.bmm(learned, made)) if batched else torch.sin(own.points @ made)
        return h + own.bias

    batched = rng.random() < 0.5
    return Part(run, lift=nn.Linear(size, 12), points=weights(2, 3), bias=weights(4))


@on_features
def coordinates(rng: random.Random, size: int):
    """A network of constant points beside the latents of each sample."""

    def run(own, x):
        points = own.points.unsqueeze(0).expand(x.shape[0], -1, -1)
        beside = x[:, None].expand(-1, points.shape[1], -1)
        h = torch.cat([points, torch.sin(points), beside], -1)
        return own.out(torch.tanh(own.into(h)))

    points = torch.cartesian_prod(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 2))
    return Part(run, points=points, into=nn.Linear(4 + size, 5), out=nn.Linear(5, 2))


@on_features
def prompts(rng: random.Random, size: int):
    """Learned tokens through a layer norm and a linear layer of their own, joined at the end."""

    def run(own, x):
        learned = own.norm(own.layer(own.learned)).flatten()
        return torch.cat([x, learned.expand(x.shape[0], -1)], 1)

    return Part(run, learned=weights(2, 3), layer=nn.Linear(3, 3), norm=nn.LayerNorm(3))


@on_features
def constant_image(rng: random.Random, size: int):
    """A learned constant through a convolution, each channel scaled by a style."""

    def run(own, x):
        h = own.layer(own.constant.repeat(x.shape[0], 1, 1, 1))
        return F.leaky_relu(h * own.style(x)[:, :, None, None], 0.2)

    part = dict(constant=weights(1, 2, 3, 3), style=nn.Linear(size, 3))
    return Part(run, layer=nn.Conv2d(2, 3, 3, padding=1), **part)


@on_images
def learned_image(rng: random.Random, shape: Shape):
    """A learned image, or positions, added or joined as channels."""
    c, h, w = shape

    def run(own, x):
        if joined:
            return torch.cat([x, own.image.expand(x.shape[0], -1, -1, -1)], 1)
        return x + own.layer(own.image)

    joined = rng.random() < 0.5
    return Part(run, image=weights(1, c, h, w), layer=nn.Conv2d(c, c, 1))


@on_images
def modulated(rng: random.Random, shape: Shape):
    """A convolution whose weights a style scales per sample, as one of many groups or not."""
    c, h, w = shape
    out = rng.randint(1, 3)

    def style(own, x):
        return 1 + torch.tanh(own.affine(x.mean((2, 3))))

    def grouped(own, x):
        kernels = own.weight[None] * style(own, x)[:, None, :, None, None]
        kernels = kernels * (kernels.square().sum((2, 3, 4), keepdim=True) + 0.1).rsqrt()
        batch = x.shape[0]
        y = F.conv2d(x.reshape(1, batch * c, h, w), kernels.flatten(0, 1), padding=1, groups=batch)
        return y.view(batch, out, h, w)

    def scaled(own, x):
        y = F.conv2d(x * style(own, x)[:, :, None, None], own.weight, padding=1)
        return y + own.strength * own.noise

    return Part(
        rng.choice((grouped, scaled)),
        weight=weights(out, c, 3, 3),
        affine=nn.Linear(c, c),
        strength=weights(out, 1, 1),
        noise=torch.randn(h, w),
    )


@on_images
def gated_by_channels(rng: random.Random, shape: Shape):
    """Squeeze and excitation, a layer scale, an adaptive norm with learned conditions."""
    c, h, w = shape

    def run(own, x):
        gate = torch.sigmoid(own.layer(x.mean((2, 3))))[:, :, None, None]
        condition = own.table(torch.zeros(x.shape[0], dtype=torch.long))[:, :, None, None]
        return x + own.scale * F.group_norm(x * gate, 1) * (1 + condition)

    return Part(run, layer=nn.Linear(c, c), scale=weights(c, 1, 1), table=nn.Embedding(2, c))
