"""Decoders that ask for values of buffers, constants and parameters while they are traced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian.api import decode_with_jacobian
from tests.jacobian.exactness import assert_right

B, M = 4, 3


class Decoder(nn.Module):
    """A linear map, and what a function makes of its result and of this module."""

    def __init__(self, function, **buffers):
        super().__init__()
        self.lift, self.function, self.runs = nn.Linear(M, 8), function, 0
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, z, *args):
        return self.function(self, self.lift(z), *args).flatten(1)


def decoder(function, **buffers):
    torch.manual_seed(0)
    return Decoder(function, **buffers).double().eval()


def latents(batch=B):
    return torch.randn(batch, M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def encoded(own, h):
    return own.encoder(h.view(-1, 2, 4), mask=own.mask)


def with_encoder():
    module = decoder(encoded, mask=nn.Transformer.generate_square_subsequent_mask(2))
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    module.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return module.double().eval()


def checked(own, h):
    assert own.keep.any() and float(own.scale) > 0
    return h * own.scale.item()


def list_of_lists(own, h):
    return torch.cat([h[:, i : i + n].tanh() for i, n in own.parts.tolist()], 1)


EVEN = torch.arange(8) % 2 == 0
ASKS = {
    "flag": lambda: decoder(lambda own, h: h.tanh() if own.on else h, on=torch.tensor(1)),
    "flag off": lambda: decoder(lambda own, h: h.tanh() if own.on else h, on=torch.tensor(0)),
    "boolean mask": lambda: decoder(lambda own, h: h[:, own.keep], keep=EVEN),
    "mask of a computed value": lambda: decoder(lambda own, h: h[:, own.w > 0], w=torch.ones(8)),
    "nonzero": lambda: decoder(lambda own, h: h[:, own.keep.nonzero()[:, 0]], keep=EVEN),
    "masked write": lambda: decoder(lambda own, h: write(h.sin(), own.keep), keep=EVEN),
    "assertions": lambda: decoder(checked, keep=EVEN, scale=torch.tensor(0.5)),
    "numbers": lambda: decoder(list_of_lists, parts=torch.tensor([[0, 3], [2, 5]])),
    "repeats": lambda: decoder(
        lambda own, h: h.repeat_interleave(own.times, 1), times=torch.tensor([1, 0, 2, 1] * 2)
    ),
    "equal": lambda: decoder(
        lambda own, h: h.sin() if torch.equal(own.keep, own.keep) else h, keep=EVEN
    ),
    "parameter": lambda: decoder(lambda own, h: h.sin() if own.lift.weight.norm() > 0 else h),
    "constant": lambda: decoder(lambda own, h: h.sin() if torch.ones(3).sum() == 3 else h),
    "one hot": lambda: decoder(
        lambda own, h: h * nn.functional.one_hot(own.label).to(h.dtype)[0], label=torch.tensor([7])
    ),
    "distribution of constants": lambda: decoder(
        lambda own, h: h * torch.distributions.Normal(own.w, own.w, validate_args=True).mean,
        w=torch.ones(8),
    ),
    "attention mask": with_encoder,
    "size of the batch": lambda: decoder(whole_graph),
    "other shapes": lambda: decoder(
        lambda own, h: h if torch.equal(h, own.lift.weight) else h.sin()
    ),
    "autocast inside": lambda: decoder(in_full_precision),
}


def whole_graph(own, h):
    """The batch as one graph, whose edges are made from its size."""
    nodes = torch.arange(h.shape[0])
    edges = torch.stack([nodes, nodes])
    edges = edges[:, edges[0] == edges[1]]
    count = int(edges.max()) + 1
    return torch.zeros(count, 8, dtype=h.dtype).index_add(0, edges[1], h[edges[0]].sin())


def in_full_precision(own, h):
    with torch.autocast("cpu", enabled=False):
        scale = own.lift.weight.norm()
    return h / scale


def write(h, keep):
    h[:, keep] = 0.5
    return h


@pytest.mark.parametrize("name", ASKS)
def test_values_that_no_sample_changes(name):
    assert_right(ASKS[name](), latents())


def test_a_new_value_leads_to_a_new_plan():
    runs = []

    def run(own, h):
        runs.append(1)
        return (h.tanh() if own.on else h.sin())[:, own.keep]

    module, z = decoder(run, on=torch.tensor(1), keep=EVEN.clone()), latents()
    decode_with_jacobian(module, z)
    traces = len(runs)
    decode_with_jacobian(module, z)
    module.load_state_dict(module.state_dict())
    decode_with_jacobian(module, z)
    assert len(runs) == traces, "the same values led to another trace"
    for change in (lambda: module.on.zero_(), lambda: module.keep.logical_not_()):
        change()
        ours, theirs = (
            decode_with_jacobian(module, z, backend=b)[1] for b in ("torch", "reference")
        )
        torch.testing.assert_close(ours, theirs)


def test_a_further_input_without_a_batch_axis():
    module, z = decoder(lambda own, h, keep: h[:, keep]), latents()
    for keep in (EVEN, ~EVEN, EVEN.clone().fill_(True)):
        assert_right(module, z, keep)


def test_the_users_tensors_stay_as_they_are():
    def run(own, h):
        own.count.add_(1)
        return h.sin() if own.on else h

    module = decoder(run, on=torch.tensor(1), count=torch.tensor(0))
    decode_with_jacobian(module, latents())
    # A plan runs what a forward does once a call, as the forward itself would.
    assert int(module.count) == 1


def test_a_compiled_loss_notices_new_values():
    module, z = decoder(lambda own, h: h.tanh() if own.on else h, on=torch.tensor(1)), latents()
    loss, x, log_var = sf.SamplingFreeLoss(module), torch.rand(B, 8).double(), torch.zeros_like(z)
    compiled = torch.compile(lambda: loss(x, z, log_var), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), loss(x, z, log_var))
    module.on.zero_()
    with pytest.raises(RuntimeError, match="whose value the decoder asks for has changed"):
        compiled()


DEPENDS = {
    "branch": (lambda own, h: h if h.sum() > 0 else -h, "torch.where in place of a branch"),
    "number": (lambda own, h: h * h.detach().abs().max().item(), "tensors in place of Python"),
    "entries": (lambda own, h: h[h > 0].view(B, -1), "a fixed number of entries"),
    "validation": (
        lambda own, h: torch.distributions.Normal(h, 1.0, validate_args=True).mean,
        "validate_args=False",
    ),
}


@pytest.mark.parametrize("name", DEPENDS)
def test_values_that_depend_on_z(name):
    function, way_out = DEPENDS[name]
    with pytest.raises(RuntimeError, match="depends on the values") as caught:
        decode_with_jacobian(decoder(function), latents())
    line = str(caught.value)
    assert way_out in line and f"{__file__}:" in line and "\n" not in line
