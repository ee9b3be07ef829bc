"""Behind a cut a chunk's last layers take few samples at a time: the same loss and gradients."""

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian.run import sweep
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.ops._gpu import Gpu
from tests._triton import DEVICE, requires_triton
from tests.jacobian.test_ending import decoder

pytestmark = requires_triton
B, M = 5, 3


def gradients(module, inputs, **settings):
    """The loss of weighted samples, and every gradient."""
    loss = sf.SamplingFreeLoss(
        module, noise_var=0.3, gamma=0.6, backend="triton", reduction="mean", **settings
    )
    with sf.fused_layers("always"):
        value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, [*inputs, *module.parameters()])]


def images_in_rows():
    """In front of the cut stands a view of a linear layer's features, whose channels come first."""
    torch.manual_seed(0)
    layers = [nn.Linear(M, 16 * 4), nn.ReLU(), nn.Unflatten(1, (16, 2, 2))]
    layers += [nn.ConvTranspose2d(16, 5, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(5, 3, 4, 2, 1))


def inputs_of(module):
    g = torch.Generator().manual_seed(1)
    shape = module(torch.zeros(B, M, device=DEVICE)).shape
    drawn = (torch.randn(s, generator=g).to(DEVICE) for s in (shape, (B, M), (B, M)))
    return [t.requires_grad_() for t in drawn]


@pytest.fixture
def few(monkeypatch):
    """A cache that is large, and holds the stacks of two samples; counts what it is asked."""
    asked = []

    def fit(stack, elements):
        asked.append((len(stack), elements))
        return 2

    monkeypatch.setattr(sweep, "divides_on", lambda device: True)
    monkeypatch.setattr(sweep, "samples_in_cache", fit)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "silu", "sigmoid", "images in rows"])
@pytest.mark.parametrize("chunk_size, rounds", [(None, 1), (3, 2)])
def test_the_same_loss_and_gradients(name, chunk_size, rounds, few, monkeypatch):
    module = (images_in_rows() if name == "images in rows" else decoder(name)).to(DEVICE)
    inputs = inputs_of(module)
    divided = gradients(module, inputs, chunk_size=chunk_size)
    again = gradients(module, inputs, chunk_size=chunk_size)
    # In front of the last layer: 5 channels of 4 x 4 pixels.
    assert few == 2 * rounds * [(1 + M, 5 * 16)]
    assert all(map(torch.equal, divided, again))
    monkeypatch.setattr(sweep, "divides_on", lambda device: False)
    for mine, whole in zip(divided, gradients(module, inputs, chunk_size=chunk_size), strict=True):
        assert (mine - whole).abs().max() <= 16 * torch.finfo(torch.float32).eps * max(
            1, float(whole.abs().max())
        )


@pytest.mark.slow
def test_autocast_casts_the_weights_of_both_halves_at_once(few, monkeypatch):
    cast, copy = [], torch._foreach_copy_

    def counted(results, weights):
        cast.append((*{r.dtype for r in results}, *{w.dtype for w in weights}, len(weights)))
        copy(results, weights)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    module = decoder().to(DEVICE)
    inputs = inputs_of(module)
    with torch.autocast(DEVICE, torch.bfloat16):
        gradients(module, inputs, chunk_size=3)
    layers = sum(isinstance(layer, nn.ConvTranspose2d) for layer in module)
    assert cast == [(torch.bfloat16, torch.float32, layers)]


def test_no_cut_where_another_layer_reads_what_is_in_front():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.widen = nn.Linear(M, 16), nn.ConvTranspose2d(4, 4, 4, 2, 1)
            self.last, self.short = nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Upsample(scale_factor=2)

        def forward(self, z):
            h = torch.relu(self.lift(z)).view(-1, 4, 2, 2)
            return self.last(torch.relu(self.widen(h) + self.short(h)))

    for module, divides in ((decoder(), True), (Skip(), False)):
        with sf.fused_layers("always"):
            plan = Linearizer(module.to(DEVICE), torch.zeros(B, M, device=DEVICE), backend="triton")
            assert (plan.plan(B).halves is not None) == divides
            assert plan.plan(B).to_tail is not None


def test_only_inside_of_a_graph_with_a_large_cache_and_where_it_pays_or_is_asked_for(monkeypatch):
    def divides(size, captures, setting="1", capability=120):
        if setting is None:
            monkeypatch.delenv("FASTSFVAE_DIVIDE", raising=False)
        else:
            monkeypatch.setenv("FASTSFVAE_DIVIDE", setting)
        gpu = Gpu("a card", capability, clocks=1e12, bandwidth=1e12)
        monkeypatch.setattr(sweep, "gpu_of", lambda device: gpu)
        monkeypatch.setattr(sweep, "cache_bytes", lambda device: size)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
        return sweep.divides_on(torch.device("cuda"))

    assert divides(72 * 10**6, True)
    assert not divides(72 * 10**6, False) and not divides(50 * 2**20, True)
    assert not divides(72 * 10**6, True, setting="0", capability=89)
    assert divides(72 * 10**6, True, setting=None, capability=89)
    assert not divides(72 * 10**6, True, setting=None)
    assert not divides(40 * 10**6, True, setting=None, capability=89)
    with pytest.raises(ValueError, match="FASTSFVAE_DIVIDE=few is not one of 0, 1"):
        divides(72 * 10**6, True, setting="few")


def test_a_power_of_two_samples_fill_three_quarters_of_the_cache(monkeypatch):
    monkeypatch.setattr(sweep, "cache_bytes", lambda device: 72 * 10**6)
    stack = torch.empty(17, 64, 32, 16, 16, dtype=torch.bfloat16)
    # celeba16: 17 slots of 32 x 32 x 32 numbers, 1.1 MB, with a gradient and J beside them.
    size = sweep.samples_in_cache(stack, 32**3)
    assert (
        size == 16 and 2.5 * size * 17 * 32**3 * 2 <= 0.75 * 72e6 < 2.5 * 2 * size * 17 * 2 * 32**3
    )
