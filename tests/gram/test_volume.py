"""log_volume on the operator: values and gradients against reverse mode in float64."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastsfvae as sf
from fastsfvae.gram import operator, query
from fastsfvae.gram.contracted import Contracted, ThroughLayer
from fastsfvae.gram.heads import HEADS
from fastsfvae.gram.operator import gram_of
from fastsfvae.gram.tail import Unwritten
from fastsfvae.gram.written import Written
from fastsfvae.jacobian.rules.jet import from_stack
from tests._triton import DEVICE, requires_triton
from tests.decoders import M, batch, build
from tests.gram import test_contracted, test_sources
from tests.gram.test_operator import close
from tests.gram.test_pullback import BUILD, TRANSFORMS, of_gradient, refuse
from tests.loss.test_compose import Conditional

DAMPING = [0.0, 0.03]


def reverse_mode(decoder, z, *args, **kwargs):
    """J ``[B, n, m]`` with a graph, one output at a time."""
    output = decoder(z, *args, **kwargs).flatten(1)
    rows = [torch.autograd.grad(column.sum(), z, create_graph=True)[0] for column in output.T]
    return torch.stack(rows, 1)


def oracle(decoder, z, damping, *args, **kwargs):
    """By the eigenvalues' product, through autograd's determinant."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J = reverse_mode(decoder, z, *args, **kwargs)
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return 0.5 * torch.linalg.slogdet(J.mT @ J + damping * eye).logabsdet


def results(value, leaves):
    """A value ``[B]`` or its sum, and gradients of it weighted."""
    weight = torch.linspace(0.5, 2, value.numel()).to(value) if value.dim() else 1
    grads = torch.autograd.grad(
        (weight * value).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    return [value.detach(), *grads]


def near(ours, theirs, tolerance=1e-10):
    """Each within a share of its own largest entry, or of the largest of all where that is 0."""
    least = 1e-3 * max(t.abs().max() for t in theirs)
    for mine, want in zip(ours, theirs, strict=True):
        assert (mine - want).abs().max() <= tolerance * want.abs().max().clamp(min=least)


def latents(decoder, size=5, dtype=torch.float64):
    return batch(decoder, size, dtype)[1]


@pytest.mark.parametrize("number", DAMPING)
@pytest.mark.parametrize(
    "name", ["tanh", "residual", "layer_norm", "higgins", "weight_norm", "attention", "wide"]
)
def test_values_and_gradients(name, number, monkeypatch):
    decoder = BUILD[name]()
    z = latents(decoder)
    damping, leaves = number, [z, *decoder.parameters()]
    if number:
        damping = torch.tensor(number, dtype=torch.float64, requires_grad=True)
        leaves.append(damping)
    want = results(oracle(decoder, z, damping), leaves)
    total = results(oracle(decoder, z, damping).sum(), leaves)
    mean = results(oracle(decoder, z, damping).mean(), leaves)
    monkeypatch.setattr(query, "recomputed", refuse)
    for chunk_size in (None, 1, 2):
        settings = {"damping": damping, "chunk_size": chunk_size, "backend": "torch"}
        near(results(sf.log_volume(decoder, z, **settings), leaves), want)
        near(results(sf.log_volume(decoder, z, reduction="sum", **settings), leaves), total)
        near(results(sf.log_volume(decoder, z, reduction="mean", **settings), leaves), mean)


def test_a_damping_far_below_the_gram():
    decoder = build("tanh")
    z = latents(decoder)
    leaves = [z, *decoder.parameters()]
    want = results(sf.log_volume(decoder, z), leaves)
    for damping in (1e-30, 1e-14):
        near(results(sf.log_volume(decoder, z, damping=damping), leaves), want, 1e-7)
    close([sf.log_volume(decoder, z, damping=1e-30)], [oracle(decoder, z, 1e-30)])
    close([sf.log_volume(decoder, z, damping=1e30)], [oracle(decoder, z, 1e30)])


@pytest.mark.parametrize("damping", DAMPING)
def test_further_inputs(damping):
    decoder = Conditional().double()
    z = torch.randn(5, M, dtype=torch.float64, requires_grad=True)
    label, gain = torch.tensor([0, 2, 1, 1, 0]), torch.tensor(1.3, dtype=torch.float64)
    shift = torch.randn(6, dtype=torch.float64)
    leaves = [z, gain.requires_grad_(), shift.requires_grad_(), *decoder.parameters()]
    want = results(oracle(decoder, z, damping, label, gain, shift=shift), leaves)
    value = sf.log_volume(decoder, z, label, gain, shift=shift, damping=damping, chunk_size=2)
    near(results(value, leaves), want)


class Bent(nn.Module):
    """Two of its latents move the output almost alike: a condition of 2e4."""

    def __init__(self):
        super().__init__()
        self.lift, self.out = nn.Linear(M, 6), nn.Linear(6, 9)
        with torch.no_grad():
            self.lift.weight[:, 1] = self.lift.weight[:, 0] + 2.0**-14 * torch.randn(6)

    def forward(self, z):
        return self.out(torch.tanh(self.lift(z)))


@pytest.mark.parametrize("damping", [0.0, 1e-12])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_float32_that_only_float64_resolves(damping, reduction):
    torch.manual_seed(0)
    decoder = Bent()
    z = torch.randn(5, M, requires_grad=True)
    exact, wide = copy.deepcopy(decoder).double(), z.detach().double().requires_grad_()
    J = reverse_mode(exact, wide)
    condition = torch.linalg.cond(J).max()
    assert condition > 1e4
    want = oracle(exact, wide, damping)
    right = results(want if reduction == "none" else want.mean(), [wide, *exact.parameters()])
    value, lost = sf.log_volume(decoder, z, damping=damping, reduction=reduction, return_lost=True)
    mine = results(value, [z, *decoder.parameters()])
    # J itself is rounded: its pseudoinverse, which is dJ, keeps eps times its condition.
    eps = torch.finfo(torch.float32).eps
    near(mine[:1], right[:1], 2 * eps * condition / right[0].abs().max())
    near(mine[1:], right[1:], 2 * eps * condition)
    assert lost.dtype == torch.bool and lost.shape == (5,)
    by_float32 = 0.5 * torch.linalg.slogdet((J.mT @ J).float()).logabsdet
    assert (by_float32 - want).abs().min() > 0.1


class Dead(nn.Module):
    """Its units are off where all latents are negative."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(M, 7)

    def forward(self, z):
        return self.out(torch.relu(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_singular_samples(dtype, reduction, backend):
    torch.manual_seed(0)
    decoder = Dead().to(dtype)
    z = (0.1 + torch.rand(4, M)).to(dtype)
    z[1], z[2, 0] = -z[1], -1
    leaves = [z.requires_grad_(), *decoder.parameters()]
    settings = {"reduction": reduction, "backend": backend}
    value, lost = sf.log_volume(decoder, z, return_lost=True, **settings)
    assert lost.tolist() == [False, True, True, False]
    assert (value if reduction == "sum" else value[1:3]).eq(-torch.inf).all()
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    others = z[::3].detach().requires_grad_()
    alone = sf.log_volume(decoder, others, reduction="sum", backend=backend)
    want = torch.autograd.grad(alone, [others, *decoder.parameters()], allow_unused=True)
    assert not grads[0][1:3].any()
    close([grads[1]], [want[1]], 16 * torch.finfo(dtype).eps)
    damped = sf.log_volume(decoder, z, damping=0.25, backend=backend)
    close([damped[1]], [torch.tensor(M / 2).to(dtype) * torch.tensor(0.25).log()], 1e-6)


@pytest.mark.parametrize("damping", DAMPING)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_nan_spoils_its_own_sample_only(damping, backend):
    decoder = build("tanh")
    z = latents(decoder).detach()
    want = sf.log_volume(decoder, z, damping=damping)
    z[1, 0] = torch.nan
    value, lost = sf.log_volume(decoder, z, damping=damping, backend=backend, return_lost=True)
    assert value.isnan().tolist() == lost.tolist() == [False, True, False, False, False]
    close([value[2:]], [want[2:]])


def whole(gram, damping):
    """Values and gradients of a chunk, its last weight's own and that of W^T W together."""
    head = HEADS["damped_log_volume" if damping else "log_volume"]
    inputs = [torch.tensor(damping).to(gram.output)] * bool(damping)
    found = head.find(gram, inputs)
    g = torch.linspace(0.5, 2, len(found.outputs[0])).to(gram.output)
    pulled = head.pull(gram, found, inputs, [g], [False] * len(inputs)).gram
    (weight, d_weight), *rest = pulled.others
    for _, gradient in rest:
        d_weight = d_weight + weight.to(gradient) @ (gradient + gradient.mT)
    return *found.outputs, pulled.jet.stack, d_weight


EDGES = [
    test_contracted.harmless,
    test_contracted.nearly_equal_tangents,
    test_contracted.a_layer_that_cancels,
]


@pytest.mark.parametrize("damping", [0.0, 2.0**-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", EDGES)
def test_a_last_layer_whose_metric_loses_digits(make, dtype, damping):
    a, T, W, _ = make()
    last = test_contracted.last_layer
    gram = gram_of(last(*(t.to(dtype) for t in (a, T, W))), None, "torch")
    cancels = make is test_contracted.a_layer_that_cancels
    assert isinstance(gram, ThroughLayer if cancels else Contracted)
    exact = ThroughLayer(*last(*(t.double() for t in (a, T, W))), None)
    value, lost, *grads = whole(gram, damping)
    right, _, *right_grads = whole(exact, damping)
    assert not lost.any()
    J = (T.double() @ W.double().mT).transpose(0, 1)
    condition = torch.linalg.cond(J).max()
    eps, wide = torch.finfo(dtype).eps, torch.finfo(torch.float64).eps
    # A Gram in float64 keeps eps times the square.
    resolved = 16 * wide * condition**2
    assert (value - right).abs().max() <= resolved + 4 * eps * right.abs().max()
    near(grads, right_grads, resolved + 16 * eps * condition)


@pytest.mark.parametrize("damping", [0.0, 1e-8])
def test_a_metric_that_keeps_too_few_digits(damping):
    """T is large in a direction that W takes to 0: T H T^T is a small rest, J an ordinary one."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(40, 5, generator=g, dtype=torch.float64)
    T = torch.randn(3, 2, 5, generator=g, dtype=torch.float64)
    W[:, 1] = W[:, 0]
    T += 3000 * torch.tensor([1.0, -1.0, 0, 0, 0])
    gram = gram_of(test_contracted.last_layer(T[0], T, W), None, "torch")
    assert isinstance(gram, Contracted)
    J = (T @ W.mT).transpose(0, 1)
    assert torch.linalg.cond(J).max() < 10
    right = torch.linalg.svdvals(J).square().add(damping).log().sum(-1) / 2
    eye = torch.eye(3, dtype=torch.float64)
    by_metric = 0.5 * torch.linalg.slogdet(gram.sums()[0] + damping * eye).logabsdet
    assert (by_metric - right).abs().max() > 1e-10
    value, lost, *grads = whole(gram, damping)
    assert not lost.any() and (value - right).abs().max() < 1e-12
    exact = ThroughLayer(*test_contracted.last_layer(T[0], T, W), None)
    _, _, *right_grads = whole(exact, damping)
    near(grads, right_grads)


@pytest.mark.parametrize("damping", DAMPING)
@pytest.mark.parametrize("name", ["tanh", "wide"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_second_order(name, chunk_size, damping):
    decoder = BUILD[name]()
    z = latents(decoder, 3)

    def second(value):
        return of_gradient(value.square(), z, z)

    mine = second(sf.log_volume(decoder, z, damping=damping, chunk_size=chunk_size))
    near([mine], [second(oracle(decoder, z, damping))])


def test_second_order_in_everything():
    decoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    z = torch.randn(2, 2, dtype=torch.float64)
    damping = torch.tensor(0.2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (z, damping, *decoder.parameters())]

    def outputs(z, damping, *parameters):
        names = [name for name, _ in decoder.named_parameters()]
        with torch.nn.utils.stateless._reparametrize_module(
            decoder, dict(zip(names, parameters, strict=True))
        ):
            return sf.log_volume(decoder, z, damping=damping), sf.log_volume(decoder, z)

    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)
    loss = sf.log_volume(decoder, z, reduction="mean")
    (first,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match='give reduction="none"'):
        torch.autograd.grad(first.square().sum(), z)


@pytest.mark.parametrize("damping", DAMPING)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name, damping):
    decoder = build("tanh")
    z = latents(decoder).detach()
    eye = torch.eye(M, dtype=torch.float64)

    def plain(z):
        gram = sf.pullback(decoder, z, backend="reference").gram
        value = 0.5 * torch.linalg.slogdet(gram + damping * eye).logabsdet
        return [value.sin(), value]

    def mine(z):
        value = sf.log_volume(decoder, z, damping=damping, chunk_size=2)
        return [value.sin(), value]

    close([TRANSFORMS[name](mine, z)], [TRANSFORMS[name](plain, z)])


@pytest.mark.filterwarnings("ignore:.*has no tangent rule")
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_decoder_without_adjoints(reduction):
    class Digamma(nn.Linear):
        def forward(self, z):
            return super().forward(z).exp().digamma()

    torch.manual_seed(0)
    decoder = Digamma(M, 6).double()
    z = latents(decoder)
    leaves = [z, *decoder.parameters()]
    want = oracle(decoder, z, 0)
    mine = sf.log_volume(decoder, z, reduction=reduction, chunk_size=2)
    near(results(mine, leaves), results(want if reduction == "none" else want.sum(), leaves))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("damping", DAMPING)
@pytest.mark.parametrize("name", ["tanh", "residual", "weight_norm"])
def test_compile_in_one_graph_for_all_batch_sizes(name, damping, reduction):
    torch._dynamo.reset()
    decoder = build(name)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, z):
            value = sf.log_volume(self.decoder, z, damping=damping, reduction=reduction)
            return (3 * value + z.square().sum(-1)).mean()

    module = Loss()
    module(latents(decoder))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for size in (5, 7, 9):
        z = latents(decoder, size)
        leaves = [z, *(p for p in decoder.parameters())]
        near(results(compiled(z), leaves), results(module(z), leaves), 1e-12)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_exported_graph_outlives_the_process(reduction):
    decoder = build("tanh")
    z = latents(decoder).detach()

    class Volume(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder

        def forward(self, z):
            return sf.log_volume(self.decoder, z, reduction=reduction)

    module = Volume()
    module(z)
    exported = torch.export.export(module, (z,), strict=False)
    assert not any("fastsfvae" in str(node.target) for node in exported.graph.nodes)
    close([exported.module()(z + 1)], [module(z + 1)], 1e-12)


def test_autocast():
    decoder, exact = build("higgins", torch.float32), build("higgins")
    z = latents(decoder, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = sf.log_volume(decoder, z, damping=1e-3)
    assert value.dtype == torch.float32
    assert (value - oracle(exact, z.detach().double().requires_grad_(), 1e-3)).abs().max() < 0.1


def test_errors_are_one_line_and_say_what_to_do():
    decoder = build("tanh")
    z = latents(decoder)
    for wrong, match in (
        ({"damping": -1.0}, "damping=-1.0 must be finite and not negative"),
        ({"damping": float("nan")}, "damping=nan must be finite"),
        ({"damping": torch.ones(2)}, r"damping has shape \(2,\): give a number or a 0-d tensor"),
        ({"damping": 1e-320}, "damping=1e-320 is no normal number of torch.float64"),
        ({"reduction": "max"}, "reduction='max' is not one of 'mean', 'sum', 'none'"),
        ({"chunk_size": 0}, "chunk_size must be None or an int >= 1"),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            sf.log_volume(decoder, z, **wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="damping='1' is not a number"):
        sf.log_volume(decoder, z, damping="1")
    flat = nn.Linear(M, 3).double()
    for backend in ("torch", "reference"):
        for reduction in ("none", "mean"):
            with pytest.raises(ValueError, match="m = 4 latents and n = 3 outputs.*give damping"):
                sf.log_volume(flat, z, backend=backend, reduction=reduction)
        found = sf.log_volume(flat, z, damping=0.1, backend=backend)
        close([found], [oracle(flat, z, 0.1)])


class TestKernels:
    pytestmark = requires_triton

    @pytest.mark.parametrize("damping", DAMPING)
    @pytest.mark.parametrize("m", [1, 5, 18])
    def test_a_written_jacobian(self, m, damping, monkeypatch):
        grams = []
        monkeypatch.setattr(operator, "gram_of", lambda *a: grams.append(gram_of(*a)) or grams[-1])
        torch.manual_seed(m)
        decoder = nn.Sequential(nn.Linear(m, 24), nn.SiLU(), nn.Linear(24, 30)).to(DEVICE)
        self.agree(decoder, m, damping)
        assert {type(gram) for gram in grams} == {Written}

    @pytest.mark.slow
    @pytest.mark.parametrize("damping", DAMPING)
    def test_a_jacobian_that_is_never_written(self, damping, monkeypatch):
        grams = []
        monkeypatch.setattr(operator, "gram_of", lambda *a: grams.append(gram_of(*a)) or grams[-1])
        torch.manual_seed(0)
        layers = [nn.Linear(M, 12), nn.ReLU(), nn.Unflatten(1, (3, 2, 2))]
        layers += [nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1), nn.SiLU()]
        layers += [nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1)]
        with sf.fused_layers("always"):
            self.agree(nn.Sequential(*layers).to(DEVICE), M, damping)
        assert {type(gram) for gram in grams} == {Unwritten}

    @staticmethod
    def agree(decoder, m, damping):
        z = torch.randn(3, m).to(DEVICE).requires_grad_()
        exact, wide = copy.deepcopy(decoder).double(), z.detach().double().requires_grad_()
        condition = torch.linalg.cond(reverse_mode(exact, wide)).max()
        right = results(oracle(exact, wide, damping), [wide, *exact.parameters()])
        mean = results(oracle(exact, wide, damping).mean(), [wide, *exact.parameters()])
        eps = torch.finfo(torch.float32).eps
        for settings, want in (({}, right), ({"reduction": "mean", "chunk_size": 2}, mean)):
            value = sf.log_volume(decoder, z, damping=damping, backend="triton", **settings)
            mine = results(value, [z, *decoder.parameters()])
            assert (mine[0] - want[0]).abs().max() <= 16 * m * eps * (
                condition + want[0].abs().max()
            )
            scale = max(w.abs().max() for w in want[1:])
            for g, w in zip(mine[1:], want[1:], strict=True):
                assert (g - w).abs().max() <= 64 * eps * condition * scale

    @pytest.mark.parametrize("damping", DAMPING)
    def test_lost_samples_of_a_jacobian_that_is_never_written(self, damping):
        case = test_sources.EXACT[0]
        tail, _, _ = test_sources.nearly_equal_rows(*case)
        last = test_sources.stop_at(tail.layer, tail.behind, tail.behind_params)
        chunk = Unwritten(last(from_stack(tail.stack), tail.weight, tail.bias).tail, None)
        head = HEADS["damped_log_volume" if damping else "log_volume"]
        inputs = [torch.tensor(damping, device=DEVICE)] * bool(damping)
        value, lost = head.find(chunk, inputs).outputs
        stack = test_sources.moved(test_sources.function(tail.layer.kind), tail.stack.double())
        y = nn.functional.conv_transpose2d(
            stack.flatten(0, 1), tail.weight.double(), None, 2, 1
        ).unflatten(0, stack.shape[:2])
        J = y[1:].transpose(0, 1).flatten(2)
        C = J @ J.mT + damping * torch.eye(3, dtype=torch.float64, device=DEVICE)
        right = 0.5 * torch.linalg.slogdet(C).logabsdet
        # Their gradients would be wrong.
        assert lost.tolist() == [False, True, True, False]
        assert (value - right).abs().max() <= 2**-20 * right.abs().max()
        G = (J @ J.mT).float()
        assert (0.5 * torch.linalg.slogdet(G).logabsdet - right).abs().max() > 1e-4

    def test_second_order_is_refused_with_the_way_out(self):
        decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 5)).to(DEVICE)
        z = torch.randn(3, 2, device=DEVICE, requires_grad=True)
        value = sf.log_volume(decoder, z, backend="triton")
        with pytest.raises(RuntimeError, match='backend="torch"'):
            torch.autograd.grad(value.sum(), z, create_graph=True)
