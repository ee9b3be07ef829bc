"""A loss whose last layer is linear and wide: its Gram through W^T W, against J in float64."""

import copy

import pytest
import torch
from torch import nn

import fastsfvae as sf
from fastsfvae.gram import operator
from fastsfvae.gram.contracted import Contracted, ThroughLayer
from fastsfvae.gram.heads import HEADS
from fastsfvae.gram.operator import gram_of
from fastsfvae.gram.query import prepare
from fastsfvae.jacobian.plan import ending
from fastsfvae.jacobian.plan.last_layer import LastLayer, Linear
from fastsfvae.jacobian.rules.jet import Jet, from_stack
from fastsfvae.jacobian.run.sweep import find_program
from tests.gram.test_operator import LIKELIHOODS, close, gradients, query

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
    problem, given = prepare(query(decoder, tensors))
    (z,), _, _, along, whole = problem.split(given)
    latents = Jet(z, torch.eye(M)[:, None])
    output = find_program(problem.program).body(latents, along, whole, to_tail=len(z))
    return isinstance(output, LastLayer) and isinstance(output.tail, Linear)


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
    monkeypatch.setattr(ending, "least_batch", lambda *_: 0)
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


def test_a_compiled_loss():
    decoder, tensors = problem("unflattened")
    want = gradients(decoder, tensors)
    loss = sf.SamplingFreeLoss(decoder, noise_var=0.3, gamma=0.6, kl_weight=0.7, reduction="none")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    value = (compiled(*tensors) * weight).sum()
    leaves = [*tensors, *decoder.parameters()]
    close([value.detach(), *torch.autograd.grad(value, leaves)], [*want[:4], *want[6:]])


def last_layer(a, T, W):
    return LastLayer(from_stack(torch.cat([a[None], T])), Linear(W, None, W.mT @ W))


def whole_numbers(B=3):
    g = torch.Generator().manual_seed(0)
    shapes = (B, K), (M, B, K), (N, K), (B, N)
    return [torch.randint(-3, 4, shape, generator=g).float() for shape in shapes]


def harmless():
    return whole_numbers()


def nearly_equal_tangents():
    """What tells two tangents apart is far below the rounding of a float32 Gram."""
    a, T, W, x = whole_numbers()
    T[0, 1] *= 2**7
    T[1, 1] = T[0, 1]
    T[1, 1, 0] += 1
    return a, T, W, x


def a_layer_that_cancels():
    """A tangent of which the layer leaves a millionth: W^T W has lost it, J has not."""
    a, T, W, x = whole_numbers()
    W[:, 1] = -W[:, 0]
    W[0, 1] += 2**-10
    T[0, 1] = torch.tensor([2.0**10, 2.0**10, 0, 0, 0])
    return a, T, W, x


def numbers_beyond_the_range():
    """W^T W underflows, and so would |T|^2 |W|^2 overflow; J is ordinary."""
    a, T, W, x = whole_numbers()
    return a, 2.0**80 * T, 2.0**-80 * W, x


def everything(gram, likelihood, W, dtype):
    """Terms, and the gradients of a and T, of W (of which W^T W is made), of x and of log h."""
    given = torch.zeros(3, M), torch.full((3, M), -0.7), *map(torch.tensor, (0.3, 0.5, 1.0))
    inputs = [t.to(dtype) for t in given]
    cotangents = torch.linspace(-1, 1, 18, dtype=dtype).view(6, 3)
    head = HEADS[likelihood]
    found = head.find(gram, inputs)
    pulled, (_, of_h, *_) = head.pull(gram, found, inputs, cotangents)
    (_, of_weight), *rest = pulled.others
    for _, gradient in rest:
        of_weight = of_weight + W.to(gradient.dtype) @ (gradient + gradient.mT)
    return torch.stack(found.outputs), pulled.jet.stack, of_weight, pulled.x, of_h


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(
    "make", [harmless, nearly_equal_tangents, a_layer_that_cancels, numbers_beyond_the_range]
)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64])
def test_values_and_gradients_at_the_edge_of_float32(make, likelihood, x_dtype):
    a, T, W, x = make()
    gram = gram_of(last_layer(a, T, W), x.to(x_dtype), "torch")
    contracts = make in (harmless, nearly_equal_tangents)
    assert isinstance(gram, Contracted if contracts else ThroughLayer)
    plain = ThroughLayer(*last_layer(a, T, W), x.to(x_dtype))
    exact = ThroughLayer(*last_layer(*(t.double() for t in (a, T, W))), x.double())
    results = (
        everything(gram, likelihood, W, x_dtype),
        everything(plain, likelihood, W, x_dtype),
        everything(exact, likelihood, W.double(), torch.float64),
    )
    for mine, by_jacobian, right in zip(*results, strict=True):
        if contracts:
            bound = 4 * (by_jacobian - right).abs().max() + 2e-5 * right.abs().max()
        else:
            bound = 1e-4 * right.abs().max()
        assert (mine - right).abs().max() <= bound


def test_images_in_float64_keep_their_digits():
    a, T, W, x = whole_numbers()
    x = x.double() + 1e-9
    rr, _ = gram_of(last_layer(a, T, W), x, "torch").norms(torch.float64)
    exact = (x - a.double() @ W.double().mT).square().sum(-1)
    torch.testing.assert_close(rr, exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("chunk_size", [1, None])
def test_a_decoder_whose_last_layer_cancels(chunk_size, monkeypatch):
    decoder, tensors = problem("flat")
    with torch.no_grad():
        # All of its inputs are equal, and its columns add up to a thousandth of one.
        last, before = decoder[-1], decoder[2]
        before.weight[:], before.bias[:] = before.weight[:1], before.bias[:1]
        last.weight[:, 1:] = last.weight[:, :1] * (2**-10 * torch.rand(N, 1) - 1) / (K - 1)
    decoder, tensors = decoder.float(), [t.detach().float().requires_grad_() for t in tensors]
    grams = []
    monkeypatch.setattr(operator, "gram_of", lambda *a: grams.append(gram_of(*a)) or grams[-1])
    ours = gradients(decoder, tensors, chunk_size=chunk_size)
    assert all(isinstance(gram, ThroughLayer) for gram in grams) and grams
    tensors = [t.detach().double().requires_grad_() for t in tensors]
    want = gradients(decoder.double(), tensors, backend="reference")
    for mine, right in zip(ours, want, strict=True):
        # Rounding of the layer's own terms, of which a thousandth is left.
        assert (mine - right).abs().max() <= 16 * 2**10 * 2**-23 * right.abs().max()


def test_where_the_metric_is_taken():
    # From so many samples on, the share of W^T W itself is small enough.
    assert ending.least_batch(784, 200, 50) == 5 and ending.least_batch(3072, 256, 16) == 15
    assert 1024 > ending.least_batch(784, 512, 16) > 64
    # As wide as the images; and so wide that every tangent would be told to cancel.
    assert not ending.least_batch(784, 1000, 50) and not ending.least_batch(12288, 2048, 16)
    decoder, tensors = problem("unflattened", dtype=torch.float32)
    assert stops_at_linear(decoder, tensors)
    assert not stops_at_linear(decoder, [t[:1] for t in tensors])


class Tokens(nn.Module):
    """Its last layer has several rows of a sample."""

    def __init__(self):
        super().__init__()
        self.lift, self.last = nn.Linear(M, 4 * K), nn.Linear(K, N)

    def forward(self, z):
        return self.last(torch.tanh(self.lift(z)).reshape(-1, K)).view(-1, 4 * N)


class BiasOfASample(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.last = nn.Linear(M, K), nn.Linear(K, N)

    def forward(self, z, label):
        return nn.functional.linear(torch.tanh(self.lift(z)), self.last.weight, label)


class OneNumber(nn.Module):
    """Its last weight is a vector."""

    def __init__(self):
        super().__init__()
        self.lift, self.weight = nn.Linear(M, K), nn.Parameter(torch.randn(K))

    def forward(self, z):
        return nn.functional.linear(torch.tanh(self.lift(z)), self.weight).reshape(-1, 1)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_layers_that_it_leaves_to_the_jacobian(batch):
    torch.manual_seed(0)
    cases = (Tokens(), 4 * N, 0), (BiasOfASample(), N, N), (OneNumber(), 1, 0)
    for decoder, out, labels in cases:
        z, log_var = torch.randn(2, batch, M).double()
        x, extra = torch.rand(batch, out).double(), [torch.randn(batch, N).double()] * (labels > 0)
        results, z = [], z.clone().requires_grad_()
        for backend in ("torch", "reference"):
            loss = sf.SamplingFreeLoss(decoder.double(), backend=backend)(x, z, log_var, *extra)
            leaves = [z, *(p for p in decoder.parameters())]
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            results.append([loss.detach(), *grads])
        close(*results)


def test_a_bias_of_one_row():
    decoder, tensors = problem("flat")
    decoder[-1].bias = nn.Parameter(decoder[-1].bias.detach()[None])
    close(gradients(decoder, tensors), gradients(decoder, tensors, backend="reference"))


def test_who_asks_for_the_jacobian_gets_it():
    decoder, (_, z, _) = problem("unflattened")
    output, jacobian = sf.decode_with_jacobian(decoder, z)
    assert torch.equal(output, decoder(z)) and jacobian.shape == (7, M, *OUT)
    report = sf.check_decoder(decoder, z)
    (last,) = (layer for layer in report.layers if layer.shape == (N,))
    assert "through W^T W" in last.choice.why and "through W^T W" in str(report)
