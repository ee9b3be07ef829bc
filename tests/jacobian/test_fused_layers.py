"""The sweep on the fused layer kernels: what it launches, its value and all its gradients."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsfvae as sf
from fastsfvae.jacobian import check
from fastsfvae.jacobian.rules import convolution, fused_layer
from fastsfvae.jacobian.rules.tape import Tape
from fastsfvae.jacobian.run.cache import Linearizer
from fastsfvae.kernels import (
    _gram_tail_residual,
    latent_layer,
    tangent_activation,
    tangent_conv,
    tangent_conv_transpose,
    tangent_linear,
)
from fastsfvae.ops import _precision, tangent_layer
from fastsfvae.ops.tangent_layer import Layer
from tests._triton import DEVICE, INTERPRETER, requires_triton
from tests.decoders import DECODERS, M, batch

pytestmark = requires_triton


class TwoUsers(nn.Module):
    """An activation that two layers read."""

    def __init__(self):
        super().__init__()
        self.lift, self.widen = nn.Linear(M, 5), nn.Linear(5, 6)
        self.first, self.second = nn.Linear(6, 7), nn.Linear(6, 7, bias=False)

    def forward(self, z):
        h = F.silu(self.widen(torch.tanh(self.lift(z))))
        return self.first(h) * self.second(h)


class Skip(nn.Module):
    """A residual that reads what goes into the activation, which is written to be in place."""

    def __init__(self):
        super().__init__()
        self.lift, self.widen = nn.Linear(M, 8), nn.ConvTranspose2d(2, 3, 4, 2, 1)
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, z):
        h = self.widen(self.lift(z).relu_().view(-1, 2, 2, 2))
        h = h + self.first(F.leaky_relu(h, 0.3))
        return self.second(F.hardtanh_(h, -0.6, 0.6))


def paper():
    """The paper's convolutional decoder, in small."""
    layers = [nn.Linear(M, 6), nn.ReLU(), nn.Unflatten(1, (6, 1, 1))]
    layers += [nn.ConvTranspose2d(6, 5, 2), nn.ReLU()]
    layers += [nn.ConvTranspose2d(5, 4, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(4, 3, 4, 2, 1))


def strided():
    layers = [nn.Linear(M, 2 * 36), nn.ReLU(), nn.Unflatten(1, (2, 6, 6))]
    layers += [nn.Conv2d(2, 3, 4, stride=2, padding=1), nn.Tanh()]
    layers += [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(36, 5), nn.Sigmoid())


def grouped():
    layers = [nn.Linear(M, 4 * 4), nn.ReLU(), nn.Unflatten(1, (4, 2, 2))]
    layers += [nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=2), nn.SiLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(4, 3, 4, 2, 1))


BUILDERS = {
    **DECODERS,
    "paper": paper,
    "two users": TwoUsers,
    "skip": Skip,
    "strided": strided,
    "grouped": grouped,
}
NO_J = "the loss takes its Gram at once and writes no J"
# Of one chunk's forward: layers on fused kernels, passes of an activation, library convolutions.
# An activation keeps its pass that has several readers or none, or is the first one and no linear
# layer of the latents is in front of it.
LAUNCHES = {
    "paper": (4, 0, 0),
    "tanh": (3, 0, 0),
    "residual": (2, 1, 0),
    "shared": (3, 0, 0),
    "frozen": (3, 0, 0),
    "weight_norm": (2, 0, 0),
    "upsampled": (2, 1, 0),
    "layer_norm": (2, 1, 0),
    "pixel_shuffle": (3, 0, 0),
    "two users": (4, 1, 0),
    "skip": (4, 0, 0),
    "strided": (4, 1, 0),
    "grouped": (2, 0, 1),
}


def build(name):
    torch.manual_seed(sum(map(ord, name)))
    return BUILDERS[name]().to(DEVICE)


def build_of(make):
    torch.manual_seed(0)
    return make().to(DEVICE)


def tensors(module, size=3, dtype=torch.float32):
    cpu = copy.deepcopy(module).cpu().double()
    return [t.detach().to(DEVICE, dtype).requires_grad_() for t in batch(cpu, size)]


def gradients(module, inputs, backend="triton", autocast=None, **settings):
    """The loss, and its gradients by x, mean, log_var and every trained parameter."""
    loss = sf.SamplingFreeLoss(module, noise_var=0.3, gamma=0.7, backend=backend, **settings)
    mode = contextlib.nullcontext() if autocast is None else torch.autocast(DEVICE, autocast)
    with mode:
        value = loss(*inputs)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, [*inputs, *trained])]


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32 on a GPU: float32's own rounding is what the bounds are made of."""
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [s.fp32_precision for s in settings]
    for s in settings:
        s.fp32_precision = "ieee"
    yield
    for s, value in zip(settings, before, strict=True):
        s.fp32_precision = value


@pytest.fixture
def launches(monkeypatch):
    """How often each launcher and the library's convolution were called."""
    seen = {}

    def spy(module, name, kind):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            seen[kind] = seen.get(kind, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for module in (latent_layer, tangent_conv, tangent_conv_transpose, tangent_linear):
        for half in ("fwd", "bwd"):
            spy(module, f"{module.__name__.rpartition('.')[2]}_{half}", f"layer {half}")
    # A last layer's values, where they are subtracted from the data at once.
    spy(_gram_tail_residual, "residual", "layer fwd")
    for half in ("fwd", "bwd"):
        spy(tangent_activation, f"tangent_activation_{half}", f"activation {half}")
    spy(convolution, "convolve", "library fwd")
    spy(convolution, "convolve_backward", "library bwd")

    def counts(half):
        return tuple(seen.get(f"{kind} {half}", 0) for kind in ("layer", "activation", "library"))

    return counts


def assert_as_good(ours, plain, exact, dtype=torch.float32):
    """Errors within twice plain PyTorch's, plus a few roundings of the largest entry."""
    scale = max(truth.abs().max() for truth in exact[1:])
    for mine, peer, truth in zip(ours, plain, exact, strict=True):
        slack = 16 * torch.finfo(dtype).eps * max(scale, truth.abs().max())
        assert (mine - truth).abs().max() <= 2 * (peer - truth).abs().max() + slack


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_layer_runs_fused_and_right(name, launches):
    module = build(name)
    inputs = tensors(module)
    with sf.fused_layers("always"):
        ours = gradients(module, inputs, chunk_size=3)
    assert launches("fwd") == launches("bwd") == LAUNCHES[name]
    plain = gradients(module, inputs, "reference")
    exact = copy.deepcopy(module).double()
    assert_as_good(ours, plain, gradients(exact, tensors(module, dtype=torch.float64), "reference"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "layer_norm"])
def test_chunks_of_which_the_last_is_smaller(name, launches):
    module = build(name)
    inputs = tensors(module, 5)
    with sf.fused_layers("always"):
        runs = [gradients(module, inputs, chunk_size=2) for _ in range(2)]
    # Two runs of chunks of 2, 2 and 1 samples.
    assert launches("fwd") == tuple(6 * count for count in LAUNCHES[name])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    plain = gradients(module, inputs, "reference")
    exact, doubles = copy.deepcopy(module).double(), tensors(module, 5, torch.float64)
    assert_as_good(runs[0], plain, gradients(exact, doubles, "reference"))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", ["paper", "two users"])
def test_bfloat16(name, autocast, launches):
    module = build(name)
    exact = copy.deepcopy(module).double()
    dtype = torch.float32 if autocast else torch.bfloat16
    mode = torch.bfloat16 if autocast else None
    module = module.to(dtype)
    inputs = tensors(module, dtype=dtype)
    with sf.fused_layers("always"):
        ours = gradients(module, inputs, autocast=mode)
    assert launches("fwd") == LAUNCHES[name]
    assert all(g.dtype == t.dtype for g, t in zip(ours[1:4], inputs, strict=True))
    plain = gradients(module, inputs, "torch", mode)
    want = gradients(exact, tensors(module, dtype=torch.float64), "reference")
    assert_as_good(ours, plain, want, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "strided"])
def test_never_and_on_the_cpu_auto_are_the_library(name, launches, monkeypatch):
    module = build(name)
    inputs = tensors(module)
    with sf.fused_layers("never"):
        never = gradients(module, inputs)
    assert launches("fwd")[0] == 0
    if INTERPRETER:
        auto = gradients(module, inputs)
        assert launches("fwd")[0] == 0
        assert all(torch.equal(a, b) for a, b in zip(never, auto, strict=True))
    # The same decoder and shapes: the setting is part of what finds its plan.
    monkeypatch.setenv("FASTSFVAE_FUSED", "always")
    gradients(module, inputs)
    assert launches("fwd")[0] == LAUNCHES[name][0]


def test_no_gradients_for_what_is_frozen(monkeypatch):
    wanted = []
    original = tangent_linear.tangent_linear_bwd

    def spy(*args, needs, **kwargs):
        wanted.append(needs)
        return original(*args, needs=needs, **kwargs)

    monkeypatch.setattr(tangent_linear, "tangent_linear_bwd", spy)
    module = build("frozen")
    with sf.fused_layers("always"):
        gradients(module, tensors(module))
    assert wanted == [(True, True, True), (True, False, False)]


@pytest.mark.slow
def test_a_weight_is_laid_out_once_for_all_chunks(monkeypatch):
    given = []

    def spy(module, name):
        original = getattr(module, name)

        def noted(stack, weight, *args, **kwargs):
            given.append(weight)
            return original(stack, weight, *args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    spy(tangent_conv_transpose, "tangent_conv_transpose_fwd")
    spy(_gram_tail_residual, "residual")
    module = build("paper")
    with sf.fused_layers("always"):
        gradients(module, tensors(module), chunk_size=2)
    own = {parameter.data_ptr() for parameter in module.parameters()}
    assert len(given) == 6 and own.isdisjoint(weight.data_ptr() for weight in given)
    assert len({weight.data_ptr() for weight in given}) == 3
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in given)


@pytest.mark.parametrize("product, autocast", [("tf32", None), ("ieee", torch.bfloat16)])
def test_weights_made_together_are_those_made_one_by_one(product, autocast, monkeypatch):
    shapes, last = ((3, 5, 4, 4), (7, 2), (1, 3, 1, 1)), torch.channels_last
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    weights.append(torch.randn(6, 4, 3, 3, device=DEVICE).contiguous(memory_format=last))
    layer, stack = Layer(product=product), torch.empty(1, dtype=autocast, device=DEVICE)
    alone = [fused_layer.dense_weight(weight, stack, layer) for weight in weights]
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None), Tape([]):
        fused_layer.prepare_weights([(weight, layer) for weight in weights])
        monkeypatch.setattr(torch.Tensor, "to", None)
        for weight, want in zip(weights, alone, strict=True):
            got = fused_layer.dense_weight(weight, stack, layer)
            assert torch.equal(got, want) and got.dtype == want.dtype
            assert got.ndim == 2 or got.is_contiguous(memory_format=last)
            assert got.data_ptr() % 64 == 0


def test_weights_that_are_what_kernels_take_are_not_copied(monkeypatch):
    monkeypatch.setattr(torch, "_foreach_copy_", None)
    half = torch.empty(2, 2, dtype=torch.bfloat16, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16), Tape([]):
        fused_layer.prepare_weights([(half, Layer(product="tf32"))])
    with Tape([]):
        fused_layer.prepare_weights([(half.float(), Layer())])


@pytest.mark.parametrize("name", ["paper", "strided", "skip"])
def test_a_jacobian_outside_of_a_sweep(name):
    module = build(name)
    exact = copy.deepcopy(module).double()

    def evaluate(module, dtype, backend):
        z = tensors(module, dtype=dtype)[1]
        output, jacobian = sf.decode_with_jacobian(module, z, backend=backend)
        value = output.square().sum() + (jacobian * jacobian.detach().cos()).sum()
        return [value.detach(), output, jacobian, *torch.autograd.grad(value, module.parameters())]

    with sf.fused_layers("always"):
        ours = evaluate(module, torch.float32, "triton")
    plain = evaluate(module, torch.float32, "torch")
    assert_as_good(ours, plain, evaluate(exact, torch.float64, "reference"))


def test_a_plan_ends_where_the_kernels_cannot_count(monkeypatch):
    # Of the three layers the last has the most positions: 5 slots of (2 * 4 + 1)^2 a sample.
    monkeypatch.setattr(tangent_layer, "_COUNTED", 5 * 9**2 * 3 + 1)
    module = build("paper")
    z = tensors(module, 5)[1].detach()
    with sf.fused_layers("always"):
        linearizer = Linearizer(module, z[:3], backend="triton")
        plan = linearizer.plan(3)
        assert plan.accepts(2) and plan.accepts(3) and not plan.accepts(4)
        assert [s.choice.how for s in plan.steps if s.op == "conv_transpose2d"] == ["fused"] * 3
        plan = Linearizer(module, z, backend="triton").plan(5)
    assert [s.choice[:2] for s in plan.steps if s.op == "conv_transpose2d"] == [
        ("fused", "fused_layers('always')"),
        ("fused", "fused_layers('always')"),
        ("library", "no kernel for its geometry, dtype or size"),
    ]


def test_the_report_names_each_choice(monkeypatch):
    monkeypatch.setattr(check, "resolve_backend", lambda *_: "triton")
    module = build("grouped")
    z = tensors(module)[1].detach()
    monkeypatch.setenv("FASTSFVAE_FUSED", "always")
    report = sf.check_decoder(module, z)
    assert report.ok
    rows = [line.split(maxsplit=6) for line in str(report).splitlines()[1:6]]
    assert [(row[1], row[4], *row[6:]) for row in rows] == [
        ("linear", "triton", "fused: FASTSFVAE_FUSED=always"),
        ("relu", "triton", "fused: in the layer in front of it"),
        ("conv_transpose2d", "torch", "library: no kernel for its geometry, dtype or size"),
        ("silu", "triton", "fused: in the layer behind it"),
        ("conv_transpose2d", "triton", f"fused: FASTSFVAE_FUSED=always; {NO_J}"),
    ]


class Lifted(nn.Module):
    """Two layers of the latents, one of them read twice, and an activation that two layers read."""

    def __init__(self):
        super().__init__()
        self.twice, self.once = nn.Linear(M, 5, bias=False), nn.Linear(M, 5)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(5, 6)

    def forward(self, z):
        h, y = torch.tanh(self.once(z)), self.twice(z)
        return self.first(h) * self.second(h + torch.sigmoid(y) * y)


def test_which_layers_of_the_latents_take_their_activation_in(launches):
    module = build_of(Lifted)
    z = tensors(module)[1].detach()
    with sf.fused_layers("always"):
        steps = Linearizer(module, z, backend="triton").plan(3).steps
    found = {(s.path, s.op): s.choice for s in steps}
    assert found["once", "linear"] == ("fused", "fused_layers('always')", "ieee")
    assert found["", "tanh"][:2] == ("fused", "in the layer in front of it")
    assert found["twice", "linear"][:2] == ("library", "in front of the first activation")
    assert found["", "sigmoid"] is None
    inputs = tensors(module)
    with sf.fused_layers("always"):
        ours = gradients(module, inputs)
    exact = copy.deepcopy(module).double()
    want = gradients(exact, tensors(module, dtype=torch.float64), "reference")
    assert_as_good(ours, gradients(module, inputs, "reference"), want)
    # The layers that read what lies behind the activation have none in front, so are the library's
    # unless the kernels are asked for.
    assert launches("fwd") == launches("bwd") == (3, 1, 0)


@pytest.mark.parametrize(
    "latents, setting, choice",
    [
        (64, "always", ("fused", "fused_layers('always')")),
        (65, "always", ("library", "no kernel for its dtype or size")),
        (64, "never", ("library", "fused_layers('never')")),
    ],
)
def test_the_choice_for_a_layer_of_the_latents(latents, setting, choice):
    module = nn.Sequential(nn.Linear(latents, 4), nn.Unflatten(1, (4, 1)), nn.Tanh()).to(DEVICE)
    with sf.fused_layers(setting):
        plan = Linearizer(module, torch.zeros(3, latents, device=DEVICE), backend="triton").plan(3)
    assert plan.steps[0].choice[:2] == choice


@pytest.mark.slow
@pytest.mark.parametrize("make, product", [(paper, "tf32"), (Lifted, "ieee")])
def test_a_layer_of_the_latents_knows_how_its_reader_multiplies(make, product, monkeypatch):
    given, original = [], latent_layer.latent_layer_fwd

    def spy(*args, product, **kwargs):
        given.append(product)
        return original(*args, product=product, **kwargs)

    monkeypatch.setattr(latent_layer, "latent_layer_fwd", spy)
    monkeypatch.setattr(_precision, "allows_tf32", lambda operation: True)
    module = build_of(make)
    with sf.fused_layers("always"):
        gradients(module, tensors(module))
    # Two layers read the other one's result.
    assert given == [product]


def test_a_layer_of_the_latents_whose_activation_is_the_result(launches):
    module = build_of(lambda: nn.Sequential(nn.Linear(M, 7), nn.Unflatten(1, (7, 1)), nn.Sigmoid()))
    inputs = tensors(module)
    with sf.fused_layers("always"):
        ours = gradients(module, inputs)
    assert launches("fwd") == launches("bwd") == (1, 0, 0)
    exact = copy.deepcopy(module).double()
    want = gradients(exact, tensors(module, dtype=torch.float64), "reference")
    assert_as_good(ours, gradients(module, inputs, "reference"), want)
