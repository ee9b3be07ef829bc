"""Parts that go step by step: recurrent layers and cells, scans, loops, what feeds itself."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

from tests.grammar.part import Part, Shape, on_features, on_images, weights


@on_features
def recurrent_layer(rng: random.Random, size: int):
    """GRU, LSTM or RNN, of one or two layers, in one or both directions."""
    kind = rng.choice((nn.GRU, nn.LSTM, nn.RNN))
    options = dict(
        num_layers=rng.randint(1, 2), bidirectional=rng.random() < 0.5, bias=rng.random() < 0.8
    )
    if kind is nn.RNN:
        options["nonlinearity"] = rng.choice(("tanh", "relu"))
    batch_first, last = rng.random() < 0.7, rng.random() < 0.3

    def run(own, x):
        steps = own.lift(x).view(-1, 3, 2)
        results, state = own.layer(steps if batch_first else steps.transpose(0, 1))
        if last:
            state = state[0] if isinstance(state, tuple) else state
            return state.transpose(0, 1)
        return results if batch_first else results.transpose(0, 1)

    layer = kind(2, 3, batch_first=batch_first, **options)
    return Part(run, lift=nn.Linear(size, 6), layer=layer)


@on_features
def started_from_z(rng: random.Random, size: int):
    """A recurrent layer whose first state comes from z and whose inputs are learned."""
    kind = rng.choice((nn.GRU, nn.LSTM))

    def run(own, x):
        state = own.lift(x).unsqueeze(0)
        steps = own.steps.expand(x.shape[0], -1, -1)
        given = (state, torch.tanh(state)) if kind is nn.LSTM else state
        return own.layer(steps, given)[0]

    layer = kind(2, 3, batch_first=True)
    return Part(run, lift=nn.Linear(size, 3), steps=weights(1, 3, 2), layer=layer)


@on_features
def cells(rng: random.Random, size: int):
    """A cell in a loop that feeds its own output back."""
    kind = rng.choice((nn.GRUCell, nn.LSTMCell, nn.RNNCell))

    def run(own, x):
        state = torch.tanh(own.lift(x))
        memory, step, results = torch.zeros_like(state), own.start.expand(x.shape[0], -1), []
        for _ in range(3):
            if kind is nn.LSTMCell:
                state, memory = own.cell(step, (state, memory))
            else:
                state = own.cell(step, state)
            step = own.out(state)
            results.append(step)
        return torch.cat(results, 1)

    return Part(
        run, lift=nn.Linear(size, 3), start=weights(1, 2), cell=kind(2, 3), out=nn.Linear(3, 2)
    )


@on_features
def scanned(rng: random.Random, size: int):
    """Running sums and products."""
    return Part(
        rng.choice(
            (
                lambda own, x: x.cumsum(1),
                lambda own, x: torch.cumprod(1 + 0.3 * torch.tanh(x), 1),
                lambda own, x: torch.cumprod(x[:, :4], 1) + x[:, :1],
                lambda own, x: x.flip(1).cumsum(1).flip(1) * own.weight,
                lambda own, x: (1 + 0.3 * torch.tanh(x)).prod(1, keepdim=True) * x,
            )
        ),
        weight=weights(size),
    )


@on_features
def log_scanned(rng: random.Random, size: int):
    """Running log-sums, alone or as a recurrence of gates computed at once.

    PyTorch's second derivative is NaN where the incoming gradient of one of them is zero.
    """

    def plain_scan(x):
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return x[:, None].masked_fill(hidden, -torch.inf).logsumexp(2)

    def gates(own, x, scan):
        gate, candidate = own.lift(x).chunk(2, 1)
        decay = F.logsigmoid(gate).cumsum(1)
        values = F.logsigmoid(-gate) + torch.tanh(candidate)
        return torch.exp(decay + scan(values - decay))

    def alone(own, x, scan):
        return scan(x)

    kind = rng.choice((gates, alone))
    return Part(
        lambda own, x: kind(own, x, lambda h: torch.logcumsumexp(h, 1)),
        lambda own, x: kind(own, x, plain_scan),
        lift=nn.Linear(size, 6),
    )


@on_features
def looped(rng: random.Random, size: int):
    """A Python loop: a filter, a differential equation, a fixed point, Sinkhorn's steps."""

    def filtered(own, x):
        state, results = torch.zeros_like(x[:, 0]), []
        for column in x.unbind(1):
            state = torch.sigmoid(own.decay) * state + column
            results.append(state)
        return torch.stack(results, 1)

    def euler(own, x):
        for step in range(3):
            x = x + 0.2 * torch.tanh(own.field(x)) * (step + 1)
        return x

    def runge_kutta(own, x):
        k1 = torch.tanh(own.field(x))
        k2 = torch.tanh(own.field(x + 0.25 * k1))
        k3 = torch.tanh(own.field(x + 0.25 * k2))
        k4 = torch.tanh(own.field(x + 0.5 * k3))
        return x + (k1 + 2 * k2 + 2 * k3 + k4) / 12

    def fixed_point(own, x):
        y = torch.zeros_like(x)
        for _ in range(4):
            y = torch.tanh(0.5 * own.field(y) + x)
        return y

    def sinkhorn(own, x):
        scores = own.lift(x).view(-1, 3, 3)
        for _ in range(2):
            scores = scores - scores.logsumexp(1, keepdim=True)
            scores = scores - scores.logsumexp(2, keepdim=True)
        return scores.exp()

    def autoregressive(own, x):
        seen = x[:, :1]
        for i in range(1, min(size, 5)):
            seen = torch.cat(
                [seen, torch.tanh(seen @ own.triangle[:i, None, i] + x[:, i : i + 1])], 1
            )
        return seen

    def momentum(own, x):
        y, velocity = x, torch.zeros_like(x)
        for rate in own.rates:
            velocity = 0.5 * velocity - rate * (own.field(y) - x)
            y = y + velocity
        return y

    return Part(
        rng.choice((filtered, euler, runge_kutta, fixed_point, sinkhorn, autoregressive, momentum)),
        decay=weights(),
        field=nn.Linear(size, size),
        lift=nn.Linear(size, 9),
        triangle=weights(5, 5),
        rates=weights(3, scale=0.1),
    )


@on_images
def convolutional_recurrence(rng: random.Random, shape: Shape):
    """A gated convolution of an image and a state, a few times."""
    c, h, w = shape

    def run(own, x):
        state = torch.zeros_like(x)
        for _ in range(2):
            gate, new = own.layer(torch.cat([x, state], 1)).chunk(2, 1)
            gate = torch.sigmoid(gate)
            state = gate * state + (1 - gate) * torch.tanh(new)
        return state

    return Part(run, layer=nn.Conv2d(2 * c, 2 * c, 1))


@on_images
def rows_one_by_one(rng: random.Random, shape: Shape):
    """A recurrent layer along the rows' pixels."""
    c, h, w = shape

    def run(own, x):
        rows = x.permute(0, 2, 3, 1).reshape(-1, w, c)
        return own.layer(rows)[0].view(-1, h, w, c).permute(0, 3, 1, 2)

    return Part(run, layer=nn.GRU(c, c, batch_first=True))
