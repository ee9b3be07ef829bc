"""A loss whose last layer is linear and wide: its Gram through W^T W, against J in float64."""

import copy

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae import fused, reference
from fastsfvae.chunk_gram import Contracted
from fastsfvae.jacobian import tail
from fastsfvae.jacobian.jet import Jet, from_stack
from fastsfvae.jacobian.sweep import find_program
from fastsfvae.ops.woodbury import woodbury_native
from tests.test_fused import LIKELIHOODS, close, fused_settings, gradients

M, K, OUT = 3, 5, (1, 5, 8)
N = 40


def hidden(*layers):
    return nn.Sequential(nn.Linear(M, 6), nn.Tanh(), nn.Linear(6, K), nn.SiLU(), *layers)


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = hidden(nn.Linear(K, N, bias=False))

    def forward(self, z):
        return self.body(z).view(-1, N).unsqueeze(1).reshape(-1, *OUT)


class Tied(nn.Module):
    """The last layer's weight is another layer's, transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(M, N), nn.Linear(N, K)

    def forward(self, z):
        h = torch.tanh(self.second(torch.tanh(self.first(z))))
        return nn.functional.linear(h, self.second.weight.t())


def frozen():
    decoder = hidden(nn.Linear(K, N), nn.Unflatten(1, OUT))
    decoder[-2].weight.requires_grad_(False)
    return decoder


DECODERS = {
    "flat": lambda: hidden(nn.Linear(K, N)),
    "unflattened": lambda: hidden(nn.Linear(K, N), nn.Unflatten(1, OUT)),
    "reshaped_without_bias": Reshaped,
    "weight_norm": lambda: hidden(nn.utils.parametrizations.weight_norm(nn.Linear(K, N))),
    "frozen": frozen,
    "tied": Tied,
    "of_one_number": lambda: nn.Sequential(nn.Linear(M, 1), nn.Sigmoid(), nn.Linear(1, N)),
    "shared_tangents": lambda: nn.Sequential(nn.Linear(M, K), nn.Linear(K, N)),
}


def problem(name, batch=7, dtype=torch.float64):
    torch.manual_seed(0)
    decoder = DECODERS[name]()
    z, log_var = torch.randn(2, batch, M)
    x = torch.rand(decoder(z).shape)
    return decoder.to(dtype), [t.to(dtype).requires_grad_() for t in (x, z, log_var)]


def stops_at_linear(decoder, tensors):
    prepared = fused.prepare(decoder, *tensors, (), {}, fused_settings())
    problem, (z, _, _, _, _, *rest) = prepared
    along, whole = rest[: problem.along], rest[problem.along :]
    output = find_program(problem.program).body(Jet(z, torch.eye(M)[:, None]), along, whole, True)
    return isinstance(output, tail.LastLayer) and isinstance(output.tail, tail.Linear)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_values_and_gradients(name, likelihood):
    decoder, tensors = problem(name)
    assert stops_at_linear(*problem(name, dtype=torch.float32))
    want = gradients(decoder, tensors, backend="reference", likelihood=likelihood)
    for chunk_size in (1, 3, None):
        for reduction in ("sum", "none"):
            settings = {"chunk_size": chunk_size, "reduction": reduction}
            close(gradients(decoder, tensors, likelihood=likelihood, **settings), want)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_float32_is_as_good_as_through_the_jacobian(likelihood, monkeypatch):
    decoder, tensors = problem("unflattened")
    want = gradients(decoder, tensors, likelihood=likelihood)
    decoder, tensors = problem("unflattened", dtype=torch.float32)
    ours = gradients(decoder, tensors, likelihood=likelihood)
    monkeypatch.setattr(tail, "_metric_pays", lambda *_: False)
    again = copy.deepcopy(decoder)
    assert not stops_at_linear(again, tensors)
    theirs = gradients(again, tensors, likelihood=likelihood)
    for mine, other, exact in zip(ours, theirs, want, strict=True):
        bound = 2 * (other - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (mine - exact).abs().max() <= bound


def test_bfloat16_and_autocast():
    decoder, tensors = problem("unflattened")
    want = gradients(decoder, tensors, backend="reference")
    half, low = problem("unflattened", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(half, low)
    assert all(g.dtype == t.dtype for g, t in zip(ours[1:4], low, strict=True))
    close(ours, want, tolerance=0.02)
    half = half.bfloat16()
    loss = sf.SamplingFreeLoss(half, noise_var=0.3, gamma=0.6)
    value = loss(*(t.detach().bfloat16() for t in tensors))
    exact = sf.SamplingFreeLoss(decoder, noise_var=0.3, gamma=0.6)(*tensors)
    assert value.item() == pytest.approx(exact.item(), rel=0.02)
    value.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in half.parameters())


def test_images_in_float64_before_a_float32_decoder():
    decoder, tensors = problem("unflattened")
    want = gradients(decoder, tensors, backend="reference")
    decoder, (_, z, log_var) = problem("unflattened", dtype=torch.float32)
    ours = gradients(decoder, [tensors[0], z, log_var])
    assert ours[0].dtype == ours[1].dtype == torch.float64 and ours[2].dtype == torch.float32
    close(ours, want, tolerance=1e-5)


def test_a_compiled_loss():
    decoder, tensors = problem("unflattened")
    want = gradients(decoder, tensors)
    loss = sf.SamplingFreeLoss(decoder, noise_var=0.3, gamma=0.6, kl_weight=0.7, reduction="none")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    value = (compiled(*tensors) * weight).sum()
    leaves = [*tensors, *decoder.parameters()]
    close([value.detach(), *torch.autograd.grad(value, leaves)], [*want[:4], *want[6:]])


def chunk_of(a, T, W, x):
    metric = W.mT @ W
    return Contracted(from_stack(torch.cat([a[None], T])), tail.Linear(W, None, metric), x)


def solved_in_float64(a, T, W, x, h, c):
    a, T, W, x, h = (t.double() for t in (a, T, W, x, h))
    sums = reference.gram_project((T @ W.mT).transpose(0, 1), x - a @ W.mT)
    return woodbury_native(*sums, h, c.double())


def whole_numbers(B, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, K), (M, B, K), (N, K), (B, N)
    return [torch.randint(-3, 4, shape, generator=g).float() for shape in shapes]


def nearly_equal_tangents():
    """What tells two tangents apart is far below the rounding of a float32 Gram."""
    a, T, W, x = whole_numbers(3)
    T[0, 1] *= 2**7
    T[1, 1] = T[0, 1]
    T[1, 1, 0] += 1
    return a, T, W, x


def a_layer_that_cancels():
    """A tangent of which the layer leaves a millionth: W^T W has lost it, J has not."""
    a, T, W, x = whole_numbers(3)
    W[:, 1] = -W[:, 0]
    W[0, 1] += 2**-10
    T[0, 1] = torch.tensor([2.0**10, 2.0**10, 0, 0, 0])
    return a, T, W, x


@pytest.mark.parametrize("make", [nearly_equal_tangents, a_layer_that_cancels])
def test_a_sample_that_float32_cannot_hold_is_redone_in_float64(make):
    a, T, W, x = make()
    h, c = torch.full((3, M), 0.5), torch.full((3,), 0.3)
    want = solved_in_float64(a, T, W, x, h, c)
    ours = chunk_of(a, T, W, x).solve(h, c, 0.5 * h)
    assert not ours.lost.any()
    for name in ("log_det", "explained", "K", "y"):
        mine, exact = getattr(ours.first, name), getattr(want, name)
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
    # Without it the middle sample is marked, and it alone.
    chunk = chunk_of(a, T, W, x)
    chunk._rescues = False
    assert chunk.solve(h, c, None).lost.tolist() == [False, True, False]


def test_the_metric_is_taken_where_it_saves_work():
    assert tail._metric_pays(784, 200, 50) and tail._metric_pays(3072, 256, 16)
    # As wide as the images; and where W^T W itself would cost what it saves.
    assert not tail._metric_pays(784, 784, 16) and not tail._metric_pays(784, 512, 16)


def test_who_asks_for_the_jacobian_gets_it():
    decoder, (_, z, _) = problem("unflattened")
    output, jacobian = sf.decode_with_jacobian(decoder, z)
    assert torch.equal(output, decoder(z)) and jacobian.shape == (7, M, *OUT)
    report = sf.check_decoder(decoder, z)
    (last,) = (layer for layer in report.layers if layer.shape == (N,))
    assert "through W^T W" in last.choice.why and "through W^T W" in str(report)
