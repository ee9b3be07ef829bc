"""latent_layer: the stack and all gradients of each kind, size and layout, against float64."""

import pytest
import torch

from fastsfvae.kernels._launch import DeviceLimits
from fastsfvae.ops._precision import rounded_to_tf32
from fastsfvae.ops.latent_layer import stack_latents, stack_latents_backward, takes_latents
from tests._triton import DEVICE, INTERPRETER, assert_as_good, requires_triton
from tests.kernels.test_tangent_activation import KINDS

# (B, m, F): whole blocks, parts of them, and more parts than are added up at a time.
SIZES = [(1, 1, 1), (9, 2, 5), (5, 33, 70), (3, 64, 66), (8, 16, 128), (67, 3, 4)]


def problem(B, m, F, dtype=torch.float32, seed=0):
    """(z, weight, bias, grad of the stack)."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, m), (F, m), (F,), (1 + m, B, F)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(DEVICE, dtype) for s in shapes]


def oracle(phi, z, weight, bias, grad):
    """The stack, its gradients by z, weight and bias, and the sums of absolute terms of each."""
    z, weight, bias = (t.detach().requires_grad_() for t in (z, weight, bias))
    a = z @ weight.T + bias
    out = phi(a)
    (slope,) = torch.autograd.grad(out.sum(), a, create_graph=True)
    stack = torch.cat([out[None], slope[None] * weight.T[:, None, :]])
    grads = torch.autograd.grad(stack, (z, weight, bias), grad, retain_graph=True)
    bend = torch.zeros_like(a)
    if slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.sum(), a)
    with torch.no_grad():
        z, w, g, slope = z.abs(), weight.abs(), grad.abs(), slope.abs()
        g_a = slope * g[0] + bend.abs() * (w.T[:, None, :] * g[1:]).sum(0)
        scales = (z @ w.T + bias.abs()).max(), (g_a @ w).max()
        of_weight = (slope * g[1:]).sum(1).T + g_a.T @ z
        return [stack.detach(), *grads], [*scales, of_weight.max(), g_a.sum(0).max()]


def run(kind, params, z, weight, bias, grad, needs=(True, True, True)):
    stack = stack_latents(z, weight, bias, kind, params)
    return [stack, *stack_latents_backward(grad, z, weight, bias, kind, params, needs)]


def assert_right(kind, inputs, dtype=torch.float32, ours=None):
    phi, params = KINDS[kind]
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        got = run(kind, params, *inputs) if ours is None else ours
    assert got[0].dtype == dtype
    assert all(g.dtype == t.dtype for g, t in zip(got[1:], inputs, strict=False))
    want, scales = oracle(phi, *(t.double() for t in inputs))
    plain, _ = oracle(phi, *(t.float() for t in inputs))
    for g, w, p, s in zip(got, want, plain, scales, strict=True):
        assert_as_good(g, w, p.to(g.dtype), s)


class TestKernel:
    pytestmark = requires_triton

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_kinds(self, kind, dtype, poisoned_empty):
        *parameters, grad = problem(6, 5, 70)
        assert_right(kind, [*parameters, grad.to(dtype)], dtype)

    @pytest.mark.parametrize("kind", ["relu", "tanh"])
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, size, kind, poisoned_empty):
        assert_right(kind, problem(*size))

    def test_what_tf32_products_read_is_rounded(self):
        inputs = problem(6, 5, 9)[:3]
        exact, rounded = (stack_latents(*inputs, "tanh", (), p) for p in ("tf32x3", "tf32"))
        assert torch.equal(rounded, rounded_to_tf32(exact)) and not torch.equal(rounded, exact)

    def test_half_parameters(self, poisoned_empty):
        phi, params = KINDS["silu"]
        inputs = problem(6, 5, 9, torch.bfloat16)
        assert_right("silu", inputs, torch.bfloat16, run("silu", params, *inputs))

    def test_any_layout_gives_the_same_bits_twice(self):
        z, weight, bias, grad = problem(6, 20, 9)
        dense = run("silu", (), z, weight, bias, grad)
        turned = [t.mT.contiguous().mT for t in (z, weight, grad)]
        spread = torch.stack([bias, bias], 1)[:, 0]
        other = run("silu", (), turned[0], turned[1], spread, turned[2])
        assert all(torch.equal(a, b) for a, b in zip(dense, other, strict=True))

    def test_without_a_bias(self):
        z, weight, bias, grad = problem(6, 5, 9)
        zero = run("tanh", (), z, weight, torch.zeros_like(bias), grad)
        none = run("tanh", (), z, weight, None, grad)
        assert none.pop() is None
        assert all(torch.equal(a, b) for a, b in zip(zero, none, strict=False))

    def test_only_what_is_wanted(self):
        inputs = problem(6, 5, 9)
        all_three = run("tanh", (), *inputs)[1:]
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            some = run("tanh", (), *inputs, needs)[1:]
            for got, want, need in zip(some, all_three, needs, strict=True):
                assert torch.equal(got, want) if need else got is None

    def test_what_does_not_fit_is_named(self):
        z, weight, bias, grad = problem(2, 3, 5)
        with pytest.raises(ValueError, match=r"z \(2, 3\) and weight \(3, 5\) do not fit"):
            stack_latents(z, weight.T, bias, "relu", ())
        with pytest.raises(ValueError, match=r"bias has shape \(2,\): give \(5,\)"):
            stack_latents(z, weight, bias[:2], "relu", ())
        with pytest.raises(ValueError, match=r"grad has shape \(3, 2, 5\)"):
            stack_latents_backward(grad[1:], z, weight, bias, "relu", ())
        with pytest.raises(ValueError, match="no float64 kernels"):
            stack_latents(z.double(), weight, bias, "relu", ())
        with pytest.raises(TypeError, match="weight has dtype torch.int64"):
            stack_latents(z, weight.long(), bias, "relu", ())


def test_which_sizes_are_taken():
    assert takes_latents(1, torch.float32) and takes_latents(64, torch.bfloat16)
    assert not takes_latents(65, torch.float32) and not takes_latents(3, torch.float64)


@pytest.mark.skipif(INTERPRETER, reason="launches are recorded, not interpreted")
def test_no_batch_compiles_anything_anew(monkeypatch):
    # Kernels first: with the interpreter named, they would be the interpreter's.
    from fastsfvae.kernels import latent_layer as latent_layer
    from fastsfvae.kernels._record import recorded

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with recorded(DeviceLimits(128, 89)) as launches:
        for B in (1, 5, 64):
            run("relu", (), *problem(B, 16, 256))
    assert len(launches) == 9 and len({launch.compilation for launch in launches}) == 3
