"""Parts that move elements by indices: constants, buffers, or places found in the values."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

from tests.grammar.part import Part, Shape, on_features, on_images, weights


@on_features
def routed(rng: random.Random, size: int):
    """The largest k, or what lies at their places in another tensor."""
    k = rng.randint(1, size)
    if rng.random() < 0.5:
        return Part(lambda own, x: x.topk(k, 1).values)
    return Part(lambda own, x: own.other(x).gather(1, x.topk(k, 1).indices),
                other=nn.Linear(size, size))  # fmt: skip


@on_features
def sparse_gates(rng: random.Random, size: int):
    """A softmax over the largest k, scattered to their places."""
    k = rng.randint(1, size)

    def run(own, x):
        values, places = x.topk(k, 1)
        return torch.zeros_like(x).scatter(1, places, values.softmax(1)) * own.experts(x)

    return Part(run, experts=nn.Linear(size, size))


@on_features
def ordered(rng: random.Random, size: int):
    """Sorted values with a weight each, and weights in their order."""
    descending = rng.random() < 0.5

    def run(own, x):
        values, places = x.sort(dim=1, descending=descending)
        return torch.cat([values * own.weight, x * own.weight[places]], 1)

    return Part(run, weight=weights(size))


@on_features
def selected(rng: random.Random, size: int):
    """Elements at the places that a buffer holds, in one of the spellings."""
    places = torch.randint(size, (rng.randint(1, 8),))
    return Part(
        rng.choice(
            (
                lambda own, x: x[:, own.places],
                lambda own, x: x.index_select(1, own.places),
                lambda own, x: x.gather(1, own.places.expand(x.shape[0], -1)),
                lambda own, x: torch.take_along_dim(x, own.places[None], 1),
                lambda own, x: F.embedding(own.places, x.mT).mT,
            )
        ),
        places=places,
    )


@on_features
def scattered(rng: random.Random, size: int):
    """Elements added or written at the places that a buffer holds."""
    order = torch.randperm(size)
    several = torch.randint(max(1, size // 2), (size,))

    def rows(own, x):
        return own.several.expand(x.shape[0], -1)

    return Part(
        rng.choice(
            (
                lambda own, x: torch.zeros_like(x).index_add(1, own.several, x),
                lambda own, x: own.lift(x).index_add(1, own.several, x, alpha=0.5),
                lambda own, x: own.lift(x).scatter_add(1, rows(own, x), x),
                lambda own, x: torch.zeros_like(x).scatter(1, own.order.expand_as(x), x),
                lambda own, x: own.lift(x).scatter(1, rows(own, x)[:, :1], 0.5),
                lambda own, x: own.lift(x).index_copy(1, own.order[:2], x[:, :2]),
                lambda own, x: own.lift(x).index_fill(1, own.several, 0.3),
                lambda own, x: own.lift(x).scatter_reduce(1, rows(own, x), x, "mean"),
                lambda own, x: own.lift(x).scatter_reduce(1, rows(own, x), x, "amax"),
                lambda own, x: own.lift(x).scatter_reduce(1, rows(own, x), 2 + x.tanh(), "prod"),
            )
        ),
        lift=nn.Linear(size, size),
        order=order,
        several=several,
    )


@on_features
def put(rng: random.Random, size: int):
    """Elements put by index, added up or not, in place or not."""
    order, several = torch.randperm(size), torch.randint(size, (size,))

    def written(own, x):
        y = own.lift(x).clone()
        y[:, own.order[:2]] = x[:, :2] * own.weight
        return y

    def added(own, x):
        y = torch.zeros_like(x)
        y[:, own.several[:1]] += x[:, :1]
        return y + own.lift(x)

    def accumulated(own, x):
        flat = torch.zeros(size, x.shape[0], dtype=x.dtype)
        return flat.index_put((own.several,), x.mT, accumulate=True).mT

    run = rng.choice((written, added, accumulated))
    width = min(2, size)
    return Part(
        run, lift=nn.Linear(size, size), weight=weights(width), order=order, several=several
    )


@on_features
def embedded(rng: random.Random, size: int):
    """A learned vector chosen by the values: the largest, the nearest, or a bucket."""
    table = weights(size, 4)
    run = rng.choice(
        (
            lambda own, x: own.table[x.argmax(1)] * own.lift(x),
            lambda own, x: F.embedding(x.argmin(1), own.table) + own.lift(x),
            lambda own, x: F.one_hot(x.argmax(1), size).to(x.dtype) @ own.table + own.lift(x),
            lambda own, x: (
                own.table[torch.bucketize(x[:, 0].contiguous(), own.bounds).clamp(max=size - 1)]
                + own.lift(x)
            ),
        )
    )
    bounds = torch.linspace(-1, 1, size)
    return Part(run, table=table, lift=nn.Linear(size, 4), bounds=bounds)


@on_features
def quantized(rng: random.Random, size: int):
    """The nearest code, passed straight through."""

    def run(own, x):
        y = own.lift(x)
        nearest = (y[:, None] - own.codes).square().sum(-1).argmin(1)
        code = own.codes[nearest]
        return torch.cat([y + (code - y).detach(), code * y], 1)

    return Part(run, lift=nn.Linear(size, 3), codes=weights(5, 3))


@on_features
def ranks(rng: random.Random, size: int):
    """Order statistics: median, k-th value, running and overall extremes."""
    k = rng.randint(1, size)
    return Part(
        rng.choice(
            (
                lambda own, x: x - x.median(1, keepdim=True).values,
                lambda own, x: x * x.kthvalue(k, 1, keepdim=True).values,
                lambda own, x: x.cummax(1).values,
                lambda own, x: x + x.cummin(1)[0],
                lambda own, x: x - x.max(1, keepdim=True)[0],
                lambda own, x: x - x.amin(1, keepdim=True),
                lambda own, x: x * x.max(1).indices[:, None],
                lambda own, x: x.mode(1, keepdim=True).values + x,
            )
        )
    )


@on_features
def moved(rng: random.Random, size: int):
    """Elements in another order or in windows."""
    width = rng.randint(1, size)
    return Part(
        rng.choice(
            (
                lambda own, x: x.roll(1, 1) * x,
                lambda own, x: x.flip(1) - x,
                lambda own, x: x.unfold(1, width, 1).mean(1),
                lambda own, x: torch.diff(x, dim=1, prepend=x[:, -1:]),
                lambda own, x: x.repeat_interleave(own.counts, 1),
                lambda own, x: torch.diag_embed(x[:, :3]).cumsum(1),
                lambda own, x: x.repeat(1, 2) * x.tile(2),
                lambda own, x: torch.stack([x, 2 * x], 1).movedim(1, 2),
            )
        ),
        counts=torch.randint(1, 3, (size,)),
    )


@on_features
def graph(rng: random.Random, size: int):
    """Messages along edges that are a buffer, with degrees counted from it."""

    def run(own, x):
        nodes = own.lift(x).view(-1, 4, 2)
        source, target = own.edges
        messages = torch.tanh(own.message(torch.cat([nodes[:, source], nodes[:, target]], -1)))
        summed = torch.zeros_like(nodes).index_add(1, target, messages)
        degrees = torch.bincount(target, minlength=4).clamp(min=1)
        return nodes + summed / degrees[:, None]

    edges = torch.randint(4, (2, 7))
    return Part(run, lift=nn.Linear(size, 8), message=nn.Linear(4, 2), edges=edges)


@on_images
def unpooled(rng: random.Random, shape: Shape):
    """The largest of windows put back at their places."""
    c, h, w = shape
    if min(h, w) < 2:
        return Part(lambda own, x: F.adaptive_max_pool2d(x, 1))

    def run(own, x):
        values, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(torch.tanh(values), places, 2, output_size=(h, w))

    return Part(run)


@on_images
def shifted_windows(rng: random.Random, shape: Shape):
    """Attention's shifted windows: rolled, cut into rows, put together."""

    def run(own, x):
        rows = x.roll((1, 1), (2, 3)).permute(0, 2, 3, 1).flatten(1, 2)
        mixed = rows.softmax(1) * own.weight[own.places]
        return mixed.transpose(1, 2).reshape(x.shape).roll((-1, -1), (2, 3))

    c, h, w = shape
    return Part(run, weight=weights(5, c), places=torch.randint(5, (h * w,)))


@on_images
def patches(rng: random.Random, shape: Shape):
    """Overlapping patches taken out, weighted and added back."""
    c, h, w = shape

    def run(own, x):
        taken = F.unfold(x, (1, 1) if min(h, w) < 2 else (2, 2))
        back = F.fold(torch.tanh(taken), (h, w), (1, 1) if min(h, w) < 2 else (2, 2))
        return back * own.weight

    return Part(run, weight=weights(c, 1, 1))


@on_images
def rearranged(rng: random.Random, shape: Shape):
    """Padding, cropping, shuffling and other movements of pixels."""
    c, h, w = shape
    choices = [
        lambda own, x: F.pad(x, (1, 0, 0, 0), mode="replicate"),
        lambda own, x: F.pad(x, (-1, 1, 0, 0)),
        lambda own, x: x.flip(2, 3),
        lambda own, x: x.transpose(2, 3).contiguous(),
        lambda own, x: torch.rot90(x, 1, (2, 3)),
        lambda own, x: F.pad(x, (1, 0, 1, 0), mode="circular"),
        lambda own, x: x.contiguous(memory_format=torch.channels_last) * own.weight,
    ]
    if min(h, w) > 1:
        choices.append(lambda own, x: F.pad(x, (1, 1, 0, 1), mode="reflect"))
    if h % 2 == w % 2 == 0:
        choices.append(lambda own, x: F.pixel_unshuffle(x, 2))
    if c % 2 == 0:
        choices += [lambda own, x: F.channel_shuffle(x, 2), lambda own, x: x[:, ::2] - x[:, 1::2]]
    return Part(rng.choice(choices), weight=weights(c, 1, 1))
