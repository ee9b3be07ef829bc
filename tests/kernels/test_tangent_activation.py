"""tangent_activation: each kind, layout and sharing, against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastsfvae.kernels._contract import PARAMETERS
from fastsfvae.ops.tangent_activation import (
    activation_bwd_op,
    activation_op,
    reads_result,
    stack_activation,
    stack_activation_backward,
    tangent_activation,
)
from tests._triton import DEVICE, assert_as_good, requires_triton

pytestmark = requires_triton

# Parameters are dyadic: the kernel's float32 and the oracle's float64 put a kink at the same place.
KINDS = {
    "relu": (F.relu, ()),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.25), (0.25,)),
    "elu": (lambda x: F.elu(x, 1.25), (1.25,)),
    "selu": (F.selu, ()),
    "silu": (F.silu, ()),
    "gelu": (F.gelu, ()),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), ()),
    "tanh": (torch.tanh, ()),
    "sigmoid": (torch.sigmoid, ()),
    "softplus": (lambda x: F.softplus(x, 2.0, 20.0), (2.0, 20.0)),
    "hardtanh": (lambda x: F.hardtanh(x, -0.75, 1.25), (-0.75, 1.25)),
}
SPECIAL = [
    0.0,
    -0.75,
    1.25,
    1e-4,
    -1e-5,
    1e-30,
    10.0,
    -10.0,
    30.0,
    -30.0,
    89.0,
    -89.0,
    500.0,
    -500.0,
]


def oracle(phi, a, T, g_out=None, g_T=None):
    """Values and gradients by autograd, in the dtype of a: (phi, phi' T, g_a, g_T_in)."""
    a, T = a.detach().requires_grad_(), T.detach().requires_grad_()
    out = phi(a)
    (slope,) = torch.autograd.grad(out, a, torch.ones_like(out), create_graph=True)
    out_T = slope * T
    if g_out is None:
        return out.detach(), out_T.detach()
    grads = torch.autograd.grad((out, out_T), (a, T), (g_out, g_T))
    return out.detach(), out_T.detach(), *grads


def problem(shape, m, shared, fmt=torch.contiguous_format, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    B = shape[0]

    def draw(*lead):
        flat = torch.randn(*lead, *shape[1:], generator=g).flatten(0, -len(shape))
        dense = flat.to(DEVICE, dtype).contiguous(memory_format=fmt)
        return dense.unflatten(0, lead)

    a, g_out = 2 * draw(B), draw(B)
    return a, draw(m, 1 if shared else B), g_out, draw(m, B)


def test_the_table_is_complete():
    assert KINDS.keys() == PARAMETERS.keys()
    assert all(len(KINDS[kind][1]) == len(names) for kind, names in PARAMETERS.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_derivatives(kind, dtype, poisoned_empty):
    phi, params = KINDS[kind]
    a, T, g_out, g_T = problem((1, 600), 2, False, dtype=dtype)
    a[0, : len(SPECIAL)] = torch.tensor(SPECIAL).to(a)
    a, T = a.requires_grad_(), T.requires_grad_()
    outputs = tangent_activation(a, T, kind, params)
    got = [*outputs, *torch.autograd.grad(outputs, (a, T), (g_out, g_T))]
    inputs = (a, T, g_out, g_T)
    want = oracle(phi, *(t.double() for t in inputs))
    plain = [t.to(dtype) for t in oracle(phi, *(t.float() for t in inputs))]
    # phi itself is compared where it is of the order of 1: at 500 it would hide everything.
    small = (a.detach().abs() < 4).squeeze(0)
    scale = [4.0, *(t.abs().max() for t in want[1:])]
    for g, w, p, s in zip(got, want, plain, scale, strict=True):
        assert g.dtype == dtype and g.isfinite().all()
        assert_as_good(g[..., small], w[..., small], p[..., small], s)
        assert_as_good(g[..., ~small], w[..., ~small], p[..., ~small], w.abs().max())


@pytest.mark.parametrize("kind", ["tanh", "leaky_relu"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "shape, fmt",
    [
        ((1, 1), torch.contiguous_format),
        ((5, 7), torch.contiguous_format),
        ((3, 4, 5, 5), torch.contiguous_format),
        ((3, 4, 5, 5), torch.channels_last),
        ((2, 3, 2, 3, 4), torch.channels_last_3d),
        ((3,), torch.contiguous_format),
    ],
)
def test_layouts(kind, shared, shape, fmt):
    phi, params = KINDS[kind]
    a, T, g_out, g_T = problem(shape, 3, shared, fmt)
    a, T = a.requires_grad_(), T.requires_grad_()
    outputs = tangent_activation(a, T, kind, params)
    assert outputs[0].is_contiguous(memory_format=fmt)
    assert outputs[1][0].is_contiguous(memory_format=fmt)
    got = [*outputs, *torch.autograd.grad(outputs, (a, T), (g_out, g_T))]
    for g, w in zip(got, oracle(phi, *(t.double() for t in (a, T, g_out, g_T))), strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-5, atol=2e-6)


def test_mismatched_layouts_are_brought_together():
    a, T, g_out, g_T = problem((3, 4, 5, 5), 2, False, torch.channels_last)
    T, g_out = T.contiguous(), g_out.contiguous()
    g_T = g_T[:, :1, :1].expand_as(T)
    a, T = a.transpose(2, 3)[:, :, ::2].requires_grad_(), T[:, :, :, ::2].requires_grad_()
    g_out, g_T = g_out[:, :, ::2], g_T[:, :, :, ::2]
    outputs = tangent_activation(a, T, "silu")
    got = [*outputs, *torch.autograd.grad(outputs, (a, T), (g_out, g_T))]
    for g, w in zip(got, oracle(F.silu, *(t.double() for t in (a, T, g_out, g_T))), strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-5, atol=2e-6)


def test_in_place():
    from fastsfvae.kernels.tangent_activation import tangent_activation_fwd

    a, T, *_ = problem((3, 20), 4, False)
    want = oracle(torch.tanh, a.double(), T.double())
    out, out_T = tangent_activation_fwd(a, T, "tanh", out=a, out_T=T)
    assert out.data_ptr() == a.data_ptr() and out_T.data_ptr() == T.data_ptr()
    for g, w in zip((a, T), want, strict=True):
        torch.testing.assert_close(g, w.float(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="out_T has shape .* give one in a's memory order"):
        tangent_activation_fwd(a, T, "tanh", out_T=T[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape, fmt, axis",
    [
        ((5, 7), torch.contiguous_format, -1),
        ((2, 3, 4, 5), torch.contiguous_format, 1),
        ((2, 3, 4, 5), torch.channels_last, 1),
        ((2, 3, 4, 5), torch.contiguous_format, 3),
    ],
)
def test_stack_with_bias(kind, shape, fmt, axis, dtype, poisoned_empty):
    phi, params = KINDS[kind]
    a, T, g_out, g_T = problem(shape, 3, False, fmt, dtype)
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(shape[axis], generator=g).to(DEVICE)
    tail = [1] * (len(shape) - 1 - axis % len(shape))
    shifted = (a.float() + bias.view(-1, *tail)).to(dtype)
    want = oracle(phi, *(t.double() for t in (shifted, T, g_out, g_T)))
    plain = [t.to(dtype) for t in oracle(phi, *(t.float() for t in (shifted, T, g_out, g_T)))]
    stack = stack_activation(a, T, kind, params, bias, axis)
    assert stack[0].is_contiguous(memory_format=fmt)
    result = (stack[0], None, None) if reads_result(kind, params) else (a, T, bias)
    options = kind, params, result[2], axis
    grads = stack_activation_backward(*result[:2], g_out, g_T, *options)
    for g, w, p in zip((*split(stack), *split(grads)), want, plain, strict=True):
        assert g.dtype == dtype
        assert_as_good(g, w, p, w.abs().max())
    # A stack in the result's order is overwritten with the same; one in another is left alone.
    mine = torch.empty_like(stack)
    mine[0], mine[1:] = g_out, g_T
    other = mine.transpose(1, -1).contiguous().transpose(1, -1)
    before = other.clone()
    for given in (mine, other):
        again = stack_activation_backward(*result[:2], *split(given), *options, given)
        assert torch.equal(again, grads) and (again is given) == (given is mine)
    assert torch.equal(other, before)


def split(stack):
    return stack[0], stack[1:]


def test_stack_in_place_and_of_shared_tangents():
    a, T, *_ = problem((3, 20), 4, True)
    stack = stack_activation(a, T, "relu", ())
    want = oracle(F.relu, a.double(), T.double().expand(4, 3, 20))
    for _ in range(2):
        # ReLU of its own result changes nothing but the tangents where it is 0, which are 0.
        for g, w in zip(split(stack), want, strict=True):
            torch.testing.assert_close(g, w.float(), rtol=0, atol=0)
        assert stack_activation(stack[0], stack[1:], "relu", (), out=stack) is stack


@pytest.mark.parametrize("kind", ["relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_arguments_slope(kind, dtype):
    params = KINDS[kind][1]
    tiny = torch.finfo(dtype).smallest_normal
    a = torch.tensor([[0.0, -0.0, tiny, -tiny, 1.0, -1.0]], device=DEVICE, dtype=dtype)
    ones = torch.ones_like(a)
    stack = stack_activation(a, ones[None], kind, params)
    assert reads_result(kind, params)
    grads = stack_activation_backward(stack[0], None, ones, ones.clone()[None], kind, params)
    assert torch.equal(grads[1:], stack[1:])
    assert not reads_result("leaky_relu", (-0.25,)) and not reads_result("hardtanh", (-1.0, 1.0))


def test_a_bias_that_does_not_fit_is_refused():
    a, T, *_ = problem((3, 4, 2, 2), 2, False)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\): give one number .* axis 1 of a"):
        stack_activation(a, T, "relu", (), torch.zeros(3, device=DEVICE))


def test_a_nan_stays_where_it_is():
    a, T, *_ = problem((3, 20), 2, False)
    a[1, 4] = float("nan")
    for kind, (_, params) in KINDS.items():
        out, _ = tangent_activation(a, T, kind, params)
        assert torch.equal(out.isnan(), a.isnan()), kind


def test_two_runs_give_the_same_bits():
    a, T, g_out, g_T = problem((3, 300), 5, False)
    runs = [
        (
            *activation_op(a, T, "gelu", ()),
            *activation_bwd_op(a, T, g_out, g_T, "gelu", ()),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_compiled_whole_at_several_batch_sizes():
    compiled = torch.compile(
        lambda a, T: tangent_activation(a, T, "silu"),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for B in (2, 5):
        a, T, g_out, g_T = problem((B, 4), 3, True)
        leaves = a.requires_grad_(), T.requires_grad_()
        got = torch.autograd.grad(compiled(*leaves), leaves, (g_out, g_T))
        want = oracle(F.silu, *(t.double() for t in (a, T, g_out, g_T)))[2:]
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w.float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["tanh", "hardtanh"])
def test_second_order_is_refused(kind):
    a, T, *_ = problem((2, 3), 2, False)
    out, _ = tangent_activation(a.requires_grad_(), T, kind, KINDS[kind][1])
    with pytest.raises(RuntimeError, match='use backend="torch" for the second'):
        torch.autograd.grad(out.sum(), a, create_graph=True)


@pytest.mark.parametrize("kind", ["tanh", "hardtanh"])
def test_opcheck(kind):
    a, T, g_out, g_T = problem((2, 3, 4, 4), 2, True, torch.channels_last)
    params = KINDS[kind][1]
    torch.library.opcheck(activation_op, (a, T, kind, params))
    torch.library.opcheck(activation_bwd_op, (a, T, g_out, g_T, kind, params))


def test_refuses_what_does_not_fit():
    a, T, g_out, g_T = problem((3, 4), 2, False)
    for arguments, words in [
        ((a, T, "mish", ()), "kind='mish' is not one of relu"),
        ((a, T, "elu", ()), r"takes the parameters \('alpha',\), got \(\)"),
        ((a, T[:, :2], "relu", ()), r"a \(3, 4\) and T \(2, 2, 4\) do not fit"),
        ((a, T, "relu", (), "torch"), "no backend 'torch'"),
    ]:
        with pytest.raises(ValueError, match=words):
            tangent_activation(*arguments)
    with pytest.raises(ValueError, match="has a second derivative"):
        activation_bwd_op(a, None, g_out, g_T, "tanh", ())
