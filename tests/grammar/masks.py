"""Parts with masks, conditions, values asked of buffers, and writes into views."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

from tests.grammar.part import Part, Shape, on_features, on_images, weights


def _some(size: int) -> torch.Tensor:
    """A mask of which at least one entry is set, and one is not if there are two."""
    mask = torch.rand(size) < 0.5
    mask[0], mask[-1] = False, True
    return mask


@on_features
def masked(rng: random.Random, size: int):
    """What a mask of constants hides, keeps, or replaces."""
    return Part(
        rng.choice(
            (
                lambda own, x: x.masked_fill(own.mask, 0.5),
                lambda own, x: x * own.mask,
                lambda own, x: x[:, own.mask],
                lambda own, x: x[..., own.mask.nonzero()[:, 0]],
                lambda own, x: torch.where(own.mask, x, own.other(x)),
                lambda own, x: torch.where(own.mask, x, own.weight),
                lambda own, x: x.masked_fill(own.mask, -torch.inf).softmax(1) if size > 1 else x,
                lambda own, x: x.masked_scatter(own.mask, own.other(x)[:, own.mask]),
                lambda own, x: (x * own.mask).sum(1, keepdim=True) / own.mask.sum() + x,
            )
        ),
        mask=_some(size),
        other=nn.Linear(size, size),
        weight=weights(size),
    )


@on_features
def conditional(rng: random.Random, size: int):
    """Conditions on values that depend on z."""
    return Part(
        rng.choice(
            (
                lambda own, x: torch.where(x > 0, own.first(x), own.second(x)),
                lambda own, x: torch.where(x > own.bound, x, own.bound),
                lambda own, x: x * (x > 0).type_as(x) + own.first(x),
                lambda own, x: x.masked_fill(x < own.bound, 0.25),
                lambda own, x: torch.maximum(x, own.bound),
                lambda own, x: torch.minimum(own.first(x), own.second(x)),
                lambda own, x: x.clamp(-0.5, 1) + own.first(x),
                lambda own, x: x.clamp(min=own.bound.detach()),
                lambda own, x: (x > x.mean(1, keepdim=True)).to(x.dtype) * own.first(x),
                lambda own, x: x + torch.zeros_like(x).masked_fill_(x > 0, 2.0) * x,
                lambda own, x: torch.where((x.abs() > 1).any(1, keepdim=True), x.tanh(), x),
            )
        ),
        first=nn.Linear(size, size),
        second=nn.Linear(size, size),
        bound=weights(size),
    )


@on_features
def triangular(rng: random.Random, size: int):
    """The triangles of matrices."""
    rows, columns = torch.tril_indices(3, 3)
    run = rng.choice(
        (
            lambda h: h.tril() @ h.triu(1),
            lambda h: h.tril(-1) - h.triu(1).mT,
            lambda h: h[:, rows, columns],
            lambda h: h.triu().diagonal(dim1=1, dim2=2).exp(),
        )
    )
    return Part(lambda own, x: run(own.lift(x).tanh().view(-1, 3, 3)), lift=nn.Linear(size, 9))


@on_features
def masked_attention(rng: random.Random, size: int):
    """Attention under a mask: of booleans, of numbers, causal, or written out."""
    attend = F.scaled_dot_product_attention

    def written_out(own, q, k, v):
        scores = q @ k.mT / 2
        return scores.masked_fill(~own.allowed, float("-inf")).softmax(-1) @ v

    spelling = rng.choice(
        (
            lambda own, q, k, v: attend(q, k, v, attn_mask=own.allowed),
            lambda own, q, k, v: attend(q, k, v, attn_mask=own.bias),
            lambda own, q, k, v: attend(q, k, v, is_causal=True),
            written_out,
        )
    )
    allowed = torch.rand(3, 3) < 0.5
    allowed.fill_diagonal_(True)

    def run(own, x):
        q, k, v = own.lift(x).view(-1, 2, 3, 3, 2).unbind(3)
        return spelling(own, q, k, v)

    bias = torch.randn(3, 3)
    return Part(run, lift=nn.Linear(size, 36), allowed=allowed, bias=bias)


@on_features
def transformer(rng: random.Random, size: int):
    """PyTorch's own layers, under a mask that is a buffer."""
    first = rng.random() < 0.5
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, norm_first=first)
    layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    mask = nn.Transformer.generate_square_subsequent_mask(3)

    def run(own, x):
        return own.layers(own.lift(x).view(-1, 3, 4), mask=own.mask)

    return Part(run, lift=nn.Linear(size, 12), layers=layers, mask=mask)


@on_features
def asked(rng: random.Random, size: int):
    """Values of buffers decide what is computed."""

    def flagged(own, x):
        return torch.tanh(own.first(x)) if own.started else x

    def counted(own, x):
        for _ in range(int(own.count)):
            x = torch.tanh(own.first(x))
        return x

    def asserted(own, x):
        assert own.mask.any(), "an empty mask"
        return x * own.mask.sum().item()

    def measured(own, x):
        return x[:, : int(own.mask.sum())] * float(own.count)

    def distributed(own, x):
        noise = torch.distributions.Normal(own.first(x), own.spread, validate_args=False)
        return noise.mean + noise.stddev

    def prior(own, x):
        values = torch.distributions.Categorical(probs=own.spread / own.spread.sum())
        return x * values.entropy()

    return Part(
        rng.choice((flagged, counted, asserted, measured, distributed, prior)),
        first=nn.Linear(size, size),
        started=torch.tensor(rng.random() < 0.5),
        count=torch.tensor(rng.randint(0, 3)),
        mask=_some(size),
        spread=torch.rand(size) + 0.1,
    )


@on_features
def written(rng: random.Random, size: int):
    """In-place writes: into a copy, into views of it, into zeros, into what a layer gave."""
    half = (size + 1) // 2

    def slices(own, x):
        y = x.clone()
        y[:, :half] = torch.tanh(own.first(x))[:, :half]
        return y

    def through_views(own, x):
        y = own.first(x).clone()
        left = y[:, :half]
        left.mul_(2).add_(x[:, :half])
        y.view(-1)[0:0].zero_()
        return y * x

    def filled(own, x):
        y = x.new_zeros(x.shape[0], size + 2)
        y[:, 1:-1] = x
        y[:, 0] = own.weight[0]
        return y

    def columns(own, x):
        y = torch.empty_like(x)
        for i in range(size):
            y[:, i] = x[:, i] * own.weight[i]
        return y

    def activations(own, x):
        y = own.first(x)
        y += x
        y.sub_(own.weight).mul_(2)
        return y.relu_()

    def coupled(own, x):
        y = own.first(x)
        y[:, half:] *= torch.exp(torch.tanh(own.second(x)))[:, half:]
        y[:, :half] += y[:, half : half + 1].sum(1, keepdim=True)
        return y

    def masked_write(own, x):
        y = x.clone()
        y[y < 0] = 0.25
        y[:, own.mask] = own.second(x)[:, own.mask]
        return y

    def transposed(own, x):
        y = own.first(x).unsqueeze(1).repeat(1, 2, 1)
        y.transpose(1, 2)[:, :, 0].copy_(x)
        y.diagonal(dim1=1, dim2=2).mul_(own.weight[: min(2, size)])
        return y

    return Part(
        rng.choice(
            (
                slices,
                through_views,
                filled,
                columns,
                activations,
                coupled,
                masked_write,
                transposed,
            )
        ),
        first=nn.Linear(size, size),
        second=nn.Linear(size, size),
        weight=weights(size),
        mask=_some(size),
    )


@on_images
def masked_image(rng: random.Random, shape: Shape):
    """Pixels behind a mask replaced: by a number, by a learned value, by another branch."""
    c, h, w = shape
    return Part(
        rng.choice(
            (
                lambda own, x: x.masked_fill(own.mask, 0.5),
                lambda own, x: torch.where(own.mask, own.token, x),
                lambda own, x: own.layer(x) * own.mask + x * ~own.mask,
                lambda own, x: x.flatten(2)[..., own.mask.flatten()],
            )
        ),
        mask=_some(h * w).view(h, w),
        token=weights(c, 1, 1),
        layer=nn.Conv2d(c, c, 1),
    )


@on_images
def painted(rng: random.Random, shape: Shape):
    """Pixels written in place: every second row, a border, a convolution of masked weights."""
    c, h, w = shape

    def rows(own, x):
        y = x.clone()
        y[:, :, ::2] = own.layer(x)[:, :, ::2]
        return y

    def border(own, x):
        y = own.layer(x)
        y[:, :, 0] = 0
        y[..., -1:] += own.token
        return y

    def causal(own, x):
        kernel = own.layer3.weight * torch.ones(3, 3).tril()
        return F.conv2d(x, kernel, own.layer3.bias, padding=1)

    return Part(
        rng.choice((rows, border, causal)),
        layer=nn.Conv2d(c, c, 1),
        layer3=nn.Conv2d(c, c, 3),
        token=weights(c, 1, 1),
    )
