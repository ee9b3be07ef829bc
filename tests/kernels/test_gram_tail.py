"""gram_tail: a last layer taken with the Gram of its Jacobian, against float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastsfvae.gram.tail import Unwritten
from fastsfvae.kernels import _gram_tail_residual
from fastsfvae.kernels._launch import DeviceLimits, pretend
from fastsfvae.ops import gram_tail as ops
from fastsfvae.ops._geometry import Geometry
from fastsfvae.ops._precision import rounded_to_tf32
from fastsfvae.ops.gram_tail import (
    Tail,
    empty_rows,
    largest_batch,
    tail_backward,
    tail_output,
    tail_partials,
    tail_values,
    with_dense,
)
from fastsfvae.ops.partial_sums import PartialSums
from fastsfvae.ops.tangent_layer import Layer
from tests._triton import DEVICE, assert_as_good, requires_triton
from tests.kernels.stack_layers import moved
from tests.kernels.test_tangent_activation import KINDS

GEOMETRY = Geometry((2, 2), (1, 1), (1, 1), 1, True, (0, 0))
# B, m, Ci, Co, H, W
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 3, 5, 3),
    (3, 16, 17, 2, 4, 4),
    (1, 17, 20, 4, 2, 6),
    (1, 33, 3, 3, 3, 5),
    (1, 2, 70, 3, 5, 9),
    (1, 64, 16, 3, 3, 4),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("G", "p", "rr", "stack", "weight", "bias", "x")


def problem(B, m, Ci, Co, H, W, kind="relu", behind="none", dtype=torch.float32):
    """A tail, data, and cotangents of G, p and rr."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(DEVICE)

    stack, weight, bias = draw(1 + m, B, Ci, H, W), draw(Ci, Co, 4, 4), draw(Co)
    # In half precision the layer's tensors are rounded as the stack is.
    stack, weight, bias = stack.to(dtype), weight.to(dtype).float(), bias.to(dtype).float()
    layer = Layer(GEOMETRY, *named(kind))
    tail = Tail(layer, stack, weight, bias, *named(behind))
    return tail, draw(B, Co, 2 * H, 2 * W), (draw(B, m, m), draw(B, m), draw(B))


def named(kind):
    return kind, () if kind == "none" else KINDS[kind][1]


def function(kind):
    return (lambda x: 1 * x) if kind == "none" else KINDS[kind][0]


def oracle(tail, x, cotangents, dtype):
    """Values and gradients by autograd on plain operations."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*tail[1:4], x)]
    stack, weight, bias, x = leaves
    moved_in = moved(function(tail.layer.kind), stack)
    y = F.conv_transpose2d(moved_in.flatten(0, 1), weight, None, 2, 1).unflatten(0, stack.shape[:2])
    y = torch.cat([y[:1] + bias.view(-1, 1, 1), y[1:]])
    y = moved(function(tail.behind), y)
    J, r = y[1:].transpose(0, 1).flatten(2), (x - y[0]).flatten(1)
    values = J @ J.mT, (J @ r.unsqueeze(-1)).squeeze(-1), r.square().sum(-1)
    grads = torch.autograd.grad(values, leaves, [c.to(dtype) for c in cotangents])
    return [*(v.detach() for v in values), *grads]


def run(tail, x, cotangents):
    values, Z = tail_values(tail, x), empty_rows(tail)
    sums = [part.sum(0) for part in tail_partials(tail, values, Z=Z)]
    g_G, g_p, g_rr = cotangents
    return [*sums, *tail_backward(tail, values, Z, g_G + g_G.mT, g_p, g_rr)]


def applied(tail):
    """The same tail on a stack behind the activation in front of it."""
    stack = moved(function(tail.layer.kind), tail.stack).to(tail.stack.dtype)
    return tail._replace(stack=stack, layer=tail.layer._replace(applied=True))


def check(tail, x, cotangents, eps=None, behind=False):
    """Compare with float64, and return the results by name.

    Operands are rounded to `eps`, float32 ones not at all by default; `behind`: the kernels are
    given what lies behind the activation.
    """
    got = run(applied(tail) if behind else tail, x, cotangents)
    want = oracle(tail, x, cotangents, torch.float64)
    plain = oracle(tail, x, cotangents, torch.float32)
    if eps is None and tail.stack.dtype != torch.float32:
        eps = torch.finfo(tail.stack.dtype).eps
    for name, g, w, p in zip(NAMES, got, want, plain, strict=True):
        scale = w.abs().max().clamp(min=1e-3)
        if eps is None:
            assert_as_good(g, w, p, 8 * scale)
        else:
            # Rounded by half an eps each: phi' T, the values (which reach all but G through r,
            # and there behind a cancelling difference), and dZ.
            assert (g.double() - w).abs().max() <= 8 * eps * scale, name
    return dict(zip(NAMES, got, strict=True))


# The two halves take the same way, but for their conversions.
@pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, dtype) for shape in SHAPES for dtype in DTYPES[:2]), (SHAPES[1], DTYPES[2])],
)
class TestShapes:
    pytestmark = requires_triton

    @pytest.mark.slow
    def test_values_and_gradients(self, shape, dtype, poisoned_empty):
        check(*problem(*shape, dtype=dtype))


class TestKernel:
    pytestmark = requires_triton

    # Each in front and each behind; the two are applied in different places.
    @pytest.mark.parametrize(
        "kind, behind",
        [
            *(("none", "none"), ("leaky_relu", "none"), ("silu", "none"), ("none", "hardtanh")),
            *(("none", "sigmoid"), ("leaky_relu", "hardtanh"), ("tanh", "sigmoid")),
        ],
    )
    def test_activations_in_front_and_behind(self, kind, behind, poisoned_empty):
        check(*problem(2, 3, 5, 3, 3, 5, kind, behind))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind, behind", [("relu", "none"), ("leaky_relu", "sigmoid")])
    def test_a_stack_behind_the_activation(self, kind, behind, dtype, poisoned_empty):
        check(*problem(2, 3, 16, 3, 3, 5, kind, behind, dtype), behind=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES[:2])
    def test_more_work_than_programs_at_sizes_that_are_used(self, dtype, poisoned_empty):
        with pretend(DeviceLimits(sm_count=1)):
            check(*problem(2, 16, 32, 3, 8, 8, dtype=dtype), behind=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("m", [16, 33])
    def test_tf32(self, m):
        tail, *given = problem(1, m, 32, 3, 4, 6, "silu", "sigmoid")
        tail = tail._replace(layer=tail.layer._replace(product="tf32"))
        # Ten bits behind the point.
        check(tail, *given, eps=2.0**-10)

    @pytest.mark.parametrize("behind", ["none", "sigmoid"])
    def test_what_tf32_products_read_of_the_values_gradient_is_rounded(self, behind, monkeypatch):
        tail, *given = problem(1, 3, 16, 3, 4, 4, "relu", behind)
        tail = tail._replace(layer=tail.layer._replace(product="tf32"))
        read, original = [], ops.stack_layer_backward

        def spy(layer, grad, *args, **kwargs):
            read.append(grad)
            return original(layer, grad, *args, **kwargs)

        monkeypatch.setattr(ops, "stack_layer_backward", spy)
        run(tail, *given)
        (grad,) = read
        assert torch.equal(grad[0], rounded_to_tf32(grad[0])) and grad.count_nonzero()

    def test_the_gram_is_as_exact_as_float32_where_tangents_are_rounded(self):
        # Nothing in front rounds them again: all of J's 24 bits count.
        tail, x, cotangents = problem(2, 16, 8, 3, 5, 4, "none", dtype=torch.bfloat16)
        G = run(tail, x, cotangents)[0]
        want, plain = (oracle(tail, x, cotangents, t)[0] for t in (torch.float64, torch.float32))
        assert_as_good(G, want, plain, want.abs().max())

    @pytest.mark.slow
    def test_any_strides(self):
        tail, x, cotangents = problem(2, 3, 8, 3, 4, 4, "tanh", "sigmoid")
        last = torch.channels_last
        stack = tail.stack.repeat_interleave(2, 0)[::2]
        dense = tail.stack.flatten(0, 1).contiguous(memory_format=last).unflatten(0, (4, 2))
        for changed in (stack, dense):
            weight = tail.weight.contiguous(memory_format=last)
            other = tail._replace(stack=changed, weight=weight)
            pairs = zip(run(tail, x, cotangents), run(other, x, cotangents), strict=True)
            assert all(torch.equal(first, again) for first, again in pairs)

    @pytest.mark.slow
    @pytest.mark.parametrize("behind", ["none", "sigmoid"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_weights_gradient_lies_as_the_weight_does(self, channels, behind, poisoned_empty):
        tail, *given = problem(2, 2, 4, channels, 2, 3, "relu", behind, torch.bfloat16)
        found = []
        for order in (torch.contiguous_format, torch.channels_last):
            weight = tail.weight.contiguous(memory_format=order)
            one = tail._replace(weight=weight, bias=torch.zeros_like(tail.bias))
            found.append(check(one, *given, behind=True))
            assert found[-1]["weight"].stride() == torch.empty_like(weight).stride()
            # Without a bias the same.
            without = run(applied(one._replace(bias=None)), *given)
            assert without[NAMES.index("bias")] is None
            for name, got in zip(NAMES, without, strict=True):
                assert name == "bias" or torch.equal(got, found[-1][name])
        assert all(torch.equal(found[0][name], found[1][name]) for name in NAMES)

    # Channels of the data last, first and neither; a layer whose activation is not applied yet.
    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES[:2])
    @pytest.mark.parametrize("channels, kind", [(1, "none"), (3, "none"), (4, "relu")])
    def test_the_residual_of_what_is_not_written(self, channels, kind, dtype, monkeypatch):
        tail, x, _ = problem(3, 2, 5, channels, 3, 5, kind, dtype=dtype)
        tail = applied(tail) if kind == "relu" else tail
        output = tail_output(tail)
        assert output.std() > 0.5
        launches = []
        for name in ("residual", "product"):
            whole = getattr(_gram_tail_residual, name)
            told = partial(lambda run, name, *a, **k: launches.append(name) or run(*a, **k), whole)
            monkeypatch.setattr(_gram_tail_residual, name, partial(told, name))
        turned = x.mT.contiguous().mT
        for data in (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16(), x.half()):
            values = tail_values(tail, data)
            assert values.r.dtype == torch.float32 and torch.equal(values.r, data - output)
            assert values.r.is_contiguous(memory_format=torch.channels_last)
            assert values.output is None
            assert torch.equal(Unwritten(tail, data).output, output)
        assert launches == 8 * ["residual", "product"]
        for lone, data in ((tail, turned), (tail, x.double()), (tail, None)):
            values = tail_values(lone, data)
            assert torch.equal(values.output, output)
            want = torch.zeros_like(output) if data is None else (data - output).float()
            assert torch.equal(values.r, want)
        assert len(launches) == 16

    def test_without_the_datas_gradient(self, poisoned_empty):
        tail, x, (M, u, g_rr) = problem(2, 3, 4, 3, 3, 3)
        pulled = []
        for of_data in (True, False):
            chunk = Unwritten(tail, x, of_data=of_data)
            chunk.sums()
            pulled.append(chunk.pull(M, u, g_rr))
        assert pulled[1].x is None and torch.equal(*(p.jet.stack for p in pulled))
        pairs = zip(*(p.others for p in pulled), strict=True)
        assert all(torch.equal(first[1], again[1]) for first, again in pairs)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES[:2])
    def test_the_weight_is_read_where_it_is_dense(self, dtype):
        tail, x, cotangents = problem(2, 2, 4, 3, 2, 2, dtype=dtype)
        want = run(tail, x, cotangents)
        of_nothing = tail._replace(dense=torch.zeros_like(with_dense(tail).dense))
        for given, found in (
            (with_dense(tail), want),
            (of_nothing._replace(dense=None), want),
            (of_nothing, run(tail._replace(weight=torch.zeros_like(tail.weight)), x, cotangents)),
        ):
            pairs = zip(run(given, x, cotangents), found, strict=True)
            assert all(torch.equal(first, again) for first, again in pairs)
        if dtype == torch.float32:
            # But not where lost samples are rescued.
            values, lost = tail_values(tail, x), torch.ones(2, dtype=torch.bool, device=DEVICE)
            pair = (tail_partials(t, values, lost)[0] for t in (tail, of_nothing))
            assert torch.equal(*pair)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", DTYPES[:2])
    def test_two_runs_give_the_same_bits(self, dtype):
        given = problem(1, 5, 32, 3, 8, 8, "silu", "sigmoid", dtype)
        assert all(torch.equal(a, b) for a, b in zip(run(*given), run(*given), strict=True))

    def test_a_nan_stays_in_its_sample(self):
        tail, x, cotangents = problem(3, 2, 4, 3, 3, 3)
        x[1, 0, 2, 2] = float("nan")
        G, p, rr = (part.sum(0) for part in tail_partials(tail, tail_values(tail, x)))
        assert G.isfinite().all() and p[[0, 2]].isfinite().all() and rr[[0, 2]].isfinite().all()
        assert p[1].isnan().all() and rr[1].isnan()
        stack = run(tail, x, cotangents)[NAMES.index("stack")]
        assert stack[:, [0, 2]].isfinite().all() and stack[:, 1].isnan().any()

    def test_a_gradient_that_nobody_had_announced(self):
        tail, x, (M, u, g_rr) = problem(2, 3, 4, 3, 3, 3)
        pulled = []
        for kept in (True, False):
            chunk = Unwritten(tail, x, kept)
            chunk.sums()
            pulled.append(chunk.pull(M, u, g_rr))
        assert torch.equal(*(p.jet.stack for p in pulled)) and torch.equal(*(p.x for p in pulled))

    def test_refuses_what_does_not_fit(self):
        from fastsfvae.kernels.gram_tail import gram_tail_partials
        from fastsfvae.kernels.gram_tail_backward import gram_tail_bwd

        tail, r, _ = problem(1, 2, 3, 3, 2, 2, "none")
        T, weight, wide = tail.stack[1:], tail.weight, torch.zeros(3, 5, 4, 4, device=DEVICE)
        for arguments in (
            (T, wide, r),
            (T, weight[..., :3], r),
            (T, weight, r[..., 1:]),
            (T.expand(2, 1, 3, 2, 2).repeat(33, 1, 1, 1, 1), weight, r),
        ):
            with pytest.raises(ValueError, match=r"do not fit: give T \[m <= 64, B, Ci, H, W\]"):
                gram_tail_partials(*arguments)
        with pytest.raises(ValueError, match="do not fit"):
            gram_tail_partials(T, weight, r, a=tail.stack[0])
        with pytest.raises(ValueError, match=r"kind='tanh', applied=True do not fit"):
            gram_tail_partials(T, weight, r, a=tail.stack[0], kind="tanh", applied=True)
        M, u = T.new_zeros(1, 2, 2), T.new_zeros(1, 2)
        with pytest.raises(ValueError, match="is not what the forward has filled for T"):
            gram_tail_bwd(T, weight, r, T, M, u, u[:, 0], rooms=PartialSums().rooms(weight))


def test_largest_batch_names_what_the_kernels_take():
    def asked(slots=17, x=(32, 32, 32), weight=(32, 3, 4, 4), dtype=torch.float32, **changes):
        kind = changes.pop("kind", "relu")
        return largest_batch(Layer(GEOMETRY._replace(**changes), kind), slots, x, weight, dtype)

    # Positions of a stack are counted in int32: (2 * 32 + 1)^2 a slot.
    assert asked() == (2**31 - 2**16 - 1) // (17 * 65**2)
    assert asked(kind="none") and asked(slots=65) and asked(dtype=torch.bfloat16)
    refused = [
        {"slots": 66},
        {"weight": (32, 5, 4, 4)},
        {"weight": (32, 3, 3, 3)},
        {"dtype": torch.float64},
        {"stride": (1, 1)},
        {"padding": (0, 0)},
        {"output_padding": (1, 1)},
        {"groups": 2},
        {"transposed": False},
        {"kind": "mish"},
    ]
    assert not any(asked(**changes) for changes in refused)
    assert largest_batch(Layer(), 17, (32,), (32, 3), torch.float32) == 0
