"""What is computed from parameters beside z: swept chunk by chunk, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.jacobian.exactness import assert_right

B, M, T = 5, 3, 4


class Decoder(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.lift, self.function = nn.Linear(M, 8), function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, z, *args):
        return self.function(self, self.lift(z), *args).flatten(1)


def decoder(function, **parts):
    torch.manual_seed(0)
    return Decoder(function, **parts).double().eval()


def latents():
    return torch.randn(B, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def weights(*shape):
    return nn.Parameter(torch.randn(*shape))


def with_token(own, h):
    tokens = own.token.expand(h.shape[0], T, 4)
    return own.layer(torch.cat([h.view(-1, 2, 4), tokens], 1))


def with_time(own, h):
    t = torch.full((h.shape[0],), 3.0, dtype=h.dtype)
    scale, shift = own.embed(t[:, None]).chunk(2, 1)
    return h * (1 + scale) + shift


def constant_image(own, h):
    image = own.constant.repeat(h.shape[0], 1, 1, 1)
    image = own.norm(F.relu(own.conv(image)))
    return image * h[:, :4, None, None]


def queries_time_first(own, h):
    queries = own.queries.unsqueeze(1).repeat(1, h.shape[0], 1)
    return own.decoder(queries, h.view(-1, 2, 4).transpose(0, 1)).transpose(0, 1)


def per_head(own, h):
    heads = own.queries.view(T, 2, 2).repeat(h.shape[0], 1, 1, 1).transpose(1, 2)
    q = heads.reshape(-1, T, 2).tanh() @ own.mix
    k = h.view(-1, 2, 2, 2).reshape(-1, 2, 2)
    return (q @ k).softmax(-1).view(h.shape[0], -1)


def detached(own, h):
    return own.layer(h.view(-1, 2, 4)).flatten(1) + F.linear(h.detach().sin(), own.square)


def without_gradient(own, h):
    with torch.no_grad():
        codes = h.sin()
    return h * F.linear(codes, own.square).tanh()


def split(own, h):
    a, b = own.token.expand(h.shape[0], 8).split(4, 1)
    return torch.cat([h[:, :4] * a, h[:, 4:] + b.square()], 1)


def zeros_first(own, h):
    state = torch.zeros(h.shape[0], 8, dtype=h.dtype)
    for _ in range(3):
        state = torch.tanh(own.square_layer(state) + h)
    return state


def labelled(own, h, label):
    return h * own.table(label).tanh() + own.token.expand(h.shape[0], 8)


LAYER = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
BRANCHES = {
    "mask token": (with_token, {"token": weights(1, 1, 4), "layer": LAYER}),
    "constant time": (
        with_time,
        {"embed": nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 16))},
    ),
    "constant image": (
        constant_image,
        {
            "constant": weights(1, 4, 3, 3),
            "conv": nn.Conv2d(4, 4, 3, padding=1),
            "norm": nn.GroupNorm(2, 4),
        },
    ),
    "queries, time first": (
        queries_time_first,
        {
            "queries": weights(T, 4),
            "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8), 1),
        },
    ),
    "heads folded into the batch": (per_head, {"queries": weights(T, 4), "mix": weights(2, 2)}),
    "detached": (detached, {"square": weights(8, 8), "layer": nn.Linear(4, 4)}),
    "no_grad": (without_gradient, {"square": weights(8, 8)}),
    "split": (split, {"token": weights(1, 8)}),
    "state of zeros": (zeros_first, {"square_layer": nn.Linear(8, 8)}),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_of_parameters(name):
    function, parts = BRANCHES[name]
    assert_right(decoder(function, **parts), latents())


def test_beside_a_label():
    module = decoder(labelled, table=nn.Embedding(6, 8), token=weights(1, 8))
    assert_right(module, latents(), torch.tensor([0, 5, 2, 2, 1]))


def test_in_place_on_views():
    def run(own, h):
        h = h.sin()
        h.view(-1, 2, 4)[:, 0] *= own.token[0, :4]
        h.view(-1, 2, 4).transpose(1, 2)[:, 1].add_(own.token[0, :2])
        h.view(-1, 2, 2, 2).permute(0, 3, 1, 2)[:, 1].mul_(2)
        h.narrow(1, 2, 3).neg_()
        h.view(-1, 2, 4).diagonal(0, 1, 2).mul_(3)
        return h.square()

    assert_right(decoder(run, token=weights(1, 8)), latents())
