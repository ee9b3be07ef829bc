"""gram_tail: the last layer fused with the Gram, against float64, J written there."""

import pytest
import torch
import torch.nn.functional as F

from fastsfvae.ops.gram_tail import gram_tail
from tests.test_kernel_tangent_activation import KINDS

from ._triton import DEVICE, assert_as_good, poisoned_empty, requires_triton

# pytest finds the fixture by its name in this module.
_ = poisoned_empty
pytestmark = requires_triton

# B, m, Ci, Co, H, W
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 3, 5, 3),
    (3, 16, 17, 2, 4, 4),
    (1, 17, 20, 4, 2, 6),
    (1, 33, 3, 3, 3, 5),
    (1, 2, 70, 3, 5, 9),
]
DTYPES = [torch.float32, torch.bfloat16]


def problem(B, m, Ci, Co, H, W, kind="relu", sloped=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(DEVICE)

    T, weight, r = draw(m, B, Ci, H, W).to(dtype), draw(Ci, Co, 4, 4), draw(B, Co, 2 * H, 2 * W)
    a = draw(B, Ci, H, W).to(dtype) if kind else None
    # In half precision the layer's weight is rounded as T is.
    weight = weight.to(dtype).float()
    slope = torch.rand(r.shape, generator=g).to(DEVICE) if sloped else None
    return [T, weight, r, a, slope], (draw(B, m, m), draw(B, m), draw(B))


def oracle(tensors, kind, params=()):
    """(G, p, rr) by plain operations, differentiable, in the dtype of T."""
    T, weight, r, a, slope = tensors
    m, B = T.shape[:2]
    if a is not None:
        phi = KINDS[kind][0]
        with torch.enable_grad():
            argument = a if a.requires_grad else a.detach().requires_grad_()
            (d1,) = torch.autograd.grad(phi(argument).sum(), argument, create_graph=True)
        T = T * d1
    J = F.conv_transpose2d(T.flatten(0, 1), weight, None, 2, 1).unflatten(0, (m, B))
    J = (J if slope is None else J * slope).transpose(0, 1).flatten(2)
    r = r.flatten(1)
    return J @ J.mT, (J @ r.unsqueeze(-1)).squeeze(-1), r.square().sum(-1)


def evaluate(function, tensors, cotangents, dtype=None):
    """Values and the gradients of every tensor given, zero where nothing flows."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype) for t in tensors]
    leaves = [None if t is None else t.clone().requires_grad_() for t in leaves]
    values = function(leaves)
    given = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(
        values, given, [c.to(v.dtype) for c, v in zip(cotangents, values, strict=True)],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return [*(v.detach() for v in values), *grads]


def kernel(kind, params=()):
    def run(tensors):
        T, weight, r, a, slope = tensors
        return gram_tail(T, weight, r, a, kind, params, slope)

    return run


def check(tensors, cotangents, kind):
    params = KINDS[kind][1] if kind else ()
    got = evaluate(kernel(kind, params), tensors, cotangents)
    want = evaluate(lambda t: oracle(t, kind), tensors, cotangents, torch.float64)
    plain = evaluate(lambda t: oracle(t, kind), tensors, cotangents, torch.float32)
    for g, w, p in zip(got, want, plain, strict=True):
        # Half-precision tangents round phi' T once, and dZ once, by half an eps each.
        half = tensors[0].dtype != torch.float32
        scale = w.abs().max().clamp(min=1e-3)
        if half:
            assert (g.double() - w).abs().max() <= 4 * torch.finfo(tensors[0].dtype).eps * scale
        else:
            assert_as_good(g, w, p, 8 * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, poisoned_empty):
    tensors, cotangents = problem(*shape, dtype=dtype)
    check(tensors, cotangents, "relu")


@pytest.mark.parametrize("kind", ["", "leaky_relu", "silu", "tanh"])
@pytest.mark.parametrize("sloped", [False, True])
def test_activations_in_front_and_behind(kind, sloped, poisoned_empty):
    tensors, cotangents = problem(2, 3, 5, 3, 3, 5, kind, sloped)
    check(tensors, cotangents, kind)


def test_any_strides():
    tensors, cotangents = problem(2, 3, 8, 3, 4, 4, "tanh", True)
    T, weight, r, a, slope = tensors
    last = torch.channels_last
    strided = [
        torch.empty(6, *T.shape[1:], device=DEVICE).copy_(T.repeat_interleave(2, 0))[::2],
        weight.contiguous(memory_format=last),
        *(t.contiguous(memory_format=last) for t in (r, a, slope)),
    ]
    first = evaluate(kernel("tanh"), tensors, cotangents)
    again = evaluate(kernel("tanh"), strided, cotangents)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_two_runs_give_the_same_bits():
    tensors, cotangents = problem(1, 5, 20, 3, 8, 8, "silu", True)
    runs = [evaluate(kernel("silu"), tensors, cotangents) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_a_nan_stays_in_its_sample():
    (T, weight, r, a, slope), _ = problem(3, 2, 4, 3, 3, 3)
    r[1, 0, 2, 2] = float("nan")
    G, p, rr = gram_tail(T, weight, r, a, "relu")
    assert G.isfinite().all() and p[[0, 2]].isfinite().all() and rr[[0, 2]].isfinite().all()
    assert p[1].isnan().all() and rr[1].isnan()


def test_second_order_is_refused():
    (T, weight, r, *_), _ = problem(1, 2, 3, 3, 2, 2, "")
    G, *_ = gram_tail(T.requires_grad_(), weight, r)
    with pytest.raises(RuntimeError, match='use backend="torch" for the second'):
        torch.autograd.grad(G.sum(), T, create_graph=True)


def test_refuses_what_does_not_fit():
    (T, weight, r, a, _), _ = problem(1, 2, 3, 3, 2, 2)
    wide = torch.zeros(3, 5, 4, 4, device=DEVICE)
    for arguments in (
        (T, wide, r),
        (T, weight[..., :3], r),
        (T, weight, r[..., 1:]),
        (T, weight, r, a),
        (T.expand(2, 1, 3, 2, 2).repeat(33, 1, 1, 1, 1), weight, r),
    ):
        with pytest.raises(ValueError, match=r"do not fit: give T \[m <= 64, B, Ci, H, W\]"):
            gram_tail(*arguments)
