"""The loss on the Triton backend: which kernels a sweep calls, and what comes out."""

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian.rules import convolution
from fastsfvae.kernels import elbo, gram_project, tangent_activation
from tests._triton import DEVICE, requires_triton

pytestmark = requires_triton
M, B = 3, 4


def decoder(activation, channels_last=False):
    torch.manual_seed(0)
    layers = [nn.Linear(M, 10), activation, nn.Unflatten(1, (10, 1, 1))]
    layers += [nn.ConvTranspose2d(10, 6, 2), activation]
    layers += [nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1), activation]
    layers += [nn.Conv2d(5, 4, 3, padding=1, bias=False), activation, nn.Flatten()]
    layers += [nn.Linear(64, 7), activation, nn.Linear(7, 9), nn.Sigmoid()]
    return nn.Sequential(*layers)


def tensors(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    shapes = (B, 9), (B, M), (B, M)
    x, mean, log_var = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    return [t.to(DEVICE, dtype).requires_grad_() for t in (x, mean, log_var - 1)]


def gradients(module, inputs, backend, **settings):
    loss = sf.SamplingFreeLoss(module, noise_var=0.3, gamma=0.7, backend=backend, **settings)
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, [*inputs, *module.parameters()])]


@pytest.fixture
def calls(monkeypatch):
    """The launches and convolutions that happen, as (name, extent of the leading axis)."""
    seen = []

    def spy(module, name, leading):
        original = getattr(module, name)

        def recorded(*args, **kwargs):
            seen.append((name, leading(*args, **kwargs)))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, recorded)

    def tangents(a, T, *_, **options):
        return len(T), "biased" if options["bias"] is not None else "plain", a is options.get("out")

    spy(convolution, "convolve", lambda x, *_: len(x))
    spy(convolution, "convolve_backward", lambda grad, *_: len(grad))
    spy(tangent_activation, "tangent_activation_fwd", tangents)
    spy(tangent_activation, "tangent_activation_bwd", lambda a, *_, **__: len(a))
    for module, name in (
        (gram_project, "gram_project_partials"),
        (gram_project, "gram_project_fwd"),
        (gram_project, "gram_project_bwd"),
    ):
        spy(module, name, lambda *args, **_: len(args[0]))
    spy(elbo, "elbo", lambda sums, *_: sums[0].shape[1])
    return seen


@pytest.mark.parametrize("in_place", [True, False])
def test_each_layer_is_one_convolution_and_one_pass(calls, in_place):
    module = decoder(nn.ReLU() if in_place else nn.Tanh()).to(DEVICE)
    gradients(module, tensors(), "triton", chunk_size=B)
    pass_ = lambda bias: ("tangent_activation_fwd", (M, bias, False))  # noqa: E731
    layer = ("convolve", (1 + M) * B)
    back = ("tangent_activation_bwd", B)
    layer_back = ("convolve_backward", (1 + M) * B)
    assert calls == [
        *(pass_("biased"), layer, pass_("biased"), layer, pass_("biased"), layer, pass_("plain")),
        *(pass_("biased"), pass_("biased")),
        *(("gram_project_partials", B), ("elbo", B)),
        *(("gram_project_bwd", B), back, back),
        *(back, layer_back, back, layer_back, back, layer_back, back),
    ]


def test_library_layers_are_channels_last_both_ways(monkeypatch):
    weights = []

    def spy(name, place):
        original = getattr(convolution, name)

        def seen(*args):
            weights.append(args[place])
            return original(*args)

        monkeypatch.setattr(convolution, name, seen)

    spy("convolve", 1)
    spy("convolve_backward", 2)
    gradients(decoder(nn.ReLU()).to(DEVICE), tensors(), "triton", chunk_size=2)
    # Three layers, two chunks; the reordered weight is made once and serves both.
    assert len(weights) == 12
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert len({w.data_ptr() for w in weights}) == 3


def test_relu_overwrites_what_the_layer_wrote(monkeypatch):
    from fastsfvae.jacobian.rules import triton_activation

    given = []
    original = triton_activation.stack_activation

    def spy(a, T, kind, params, bias, axis, out):
        given.append((kind, out is not None and out.data_ptr() == a.data_ptr()))
        return original(a, T, kind, params, bias, axis, out)

    monkeypatch.setattr(triton_activation, "stack_activation", spy)
    gradients(decoder(nn.ReLU()).to(DEVICE), tensors(), "triton")
    # The first layer's tangents are its weight, which is not the sweep's to overwrite.
    assert given == [("relu", False), *[("relu", True)] * 4, ("sigmoid", False)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.2), nn.Hardtanh(-0.5, 0.4), nn.SiLU(), nn.ELU()],
    ids=lambda a: repr(a),
)
def test_gradients_against_float64(activation, chunk_size, channels_last):
    module = decoder(activation).to(DEVICE)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    ours = gradients(module, tensors(), "triton", chunk_size=chunk_size)
    plain = gradients(module, tensors(), "reference")
    exact = gradients(decoder(activation).to(DEVICE).double(), tensors(torch.float64), "reference")
    eps = torch.finfo(torch.float32).eps
    scale = max(truth.abs().max() for truth in exact[1:])
    for mine, peer, truth in zip(ours, plain, exact, strict=True):
        bound = 2 * (peer - truth).abs().max() + 16 * eps * max(scale, truth.abs().max())
        assert (mine - truth).abs().max() <= bound


def test_a_bias_stays_where_another_reads_the_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(M, 6), nn.Linear(6, 9)

        def forward(self, z):
            h = self.first(z)
            y = self.second(torch.relu(h))
            return torch.tanh(y) * y + h.sum(1, keepdim=True)

    torch.manual_seed(0)
    module = Twice().to(DEVICE)
    ours, plain = (gradients(module, tensors(), backend) for backend in ("triton", "torch"))
    for mine, want in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_two_runs_give_the_same_bits():
    module = decoder(nn.SiLU()).to(DEVICE)
    runs = [gradients(module, tensors(), "triton", chunk_size=2) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
