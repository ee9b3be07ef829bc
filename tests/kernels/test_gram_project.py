"""gram_project: the kernels and their autograd boundary, against float64."""

import pytest
import torch

from fastsfvae import reference
from fastsfvae.ops import _library
from fastsfvae.ops.gram_project import gram_project, gram_project_backward, gram_project_forward
from tests._triton import DEVICE, INTERPRETER, assert_as_good, requires_triton

SHAPES = [(1, 1, 1), (5, 2, 7), (3, 5, 784), (2, 16, 784), (1, 33, 7), (1, 64, 784), (2, 100, 70)]
DTYPES = [torch.float32, torch.bfloat16]


def problem(B, m, n, dtype=torch.float32, seed=0):
    """J as a transposed view of [m, B, n], r, and cotangents of G, p and rr."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g).to(DEVICE)  # noqa: E731
    J = draw(m, B, n).to(dtype).transpose(0, 1)
    return J, draw(B, n), draw(B, m, m), draw(B, m), draw(B)


def pullback(J, r, g_G, g_p, g_rr):
    """The formulas of dJ and dr, in the dtype of the arguments."""
    dJ = (g_G + g_G.mT) @ J + g_p.unsqueeze(-1) * r.unsqueeze(-2)
    dr = (g_p.unsqueeze(-2) @ J).squeeze(-2) + 2 * g_rr.unsqueeze(-1) * r
    return dJ, dr


def scales(formula, tensors):
    """Largest sums of absolute terms: the formula on absolute values."""
    return [t.max() for t in formula(*(t.double().abs() for t in tensors))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
class TestKernel:
    pytestmark = requires_triton

    def test_forward(self, shape, dtype, poisoned_empty):
        J, r, *_ = problem(*shape, dtype)
        got = gram_project_forward(J, r, "triton")
        want = reference.gram_project(J.double(), r.double())
        plain = reference.gram_project(J.float(), r)
        for g, w, p, s in zip(
            got, want, plain, scales(reference.gram_project, (J, r)), strict=True
        ):
            assert g.dtype == torch.float32
            assert_as_good(g, w, p, s)

    def test_backward_writes_where_it_is_told(self, shape, dtype, monkeypatch):
        J, r, g_G, g_p, g_rr = problem(*shape, dtype)
        given = J, r, g_G + g_G.mT, g_p, g_rr, "triton"
        want = gram_project_backward(*given)
        B, m, n = shape
        out = torch.full((m, B, n), float("nan"), dtype=dtype, device=DEVICE).transpose(0, 1)
        # J is what there is most of: no other memory of its size, and no copy from there.
        monkeypatch.setattr(torch, "empty_like", None)
        got = gram_project_backward(*given, out)
        assert got[0] is out and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def test_backward(self, shape, dtype, poisoned_empty):
        J, r, g_G, g_p, g_rr = inputs = problem(*shape, dtype)
        got = gram_project_backward(J, r, g_G + g_G.mT, g_p, g_rr, "triton")
        want = pullback(*(t.double() for t in inputs))
        plain = [t.to(g.dtype) for t, g in zip(pullback(J.float(), *inputs[1:]), got, strict=True)]
        assert got[0].dtype == dtype and got[0].stride() == J.stride()
        for g, w, p, s in zip(got, want, plain, scales(pullback, inputs), strict=True):
            assert_as_good(g, w, p, s)

    def test_two_runs_give_the_same_bits(self, shape, dtype):
        J, r, g_G, g_p, g_rr = problem(*shape, dtype)
        M = g_G + g_G.mT
        runs = [
            (
                *gram_project_forward(J, r, "triton"),
                *gram_project_backward(J, r, M, g_p, g_rr, "triton"),
            )
            for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class TestLayouts:
    pytestmark = requires_triton

    @pytest.mark.parametrize("layout", ["contiguous", "sliced", "n_strided", "expanded"])
    def test_any_strides(self, layout):
        J, r, g_G, g_p, g_rr = problem(3, 5, 40)
        if layout == "contiguous":
            J = J.contiguous()
        elif layout == "sliced":
            J, r = J[:, :, 3:20], r[:, 3:20]
        elif layout == "n_strided":
            J, r = J[..., ::2], r[:, ::2]
        else:
            J, r = J[:1].expand(3, 5, 40), torch.zeros(1, 1, device=DEVICE).expand(3, 40)
        for g, w in zip(
            gram_project_forward(J, r, "triton"),
            reference.gram_project(J.double(), r.double()),
            strict=True,
        ):
            torch.testing.assert_close(g, w.float(), rtol=1e-5, atol=1e-5)
        got = gram_project_backward(J, r, g_G + g_G.mT, g_p, g_rr, "triton")
        want = pullback(*(t.double() for t in (J, r, g_G, g_p, g_rr)))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w.float(), rtol=1e-5, atol=1e-5)

    def test_several_splits_agree_with_one(self):
        from fastsfvae.kernels.gram_project import gram_project_fwd, gram_project_partials

        J, r, *_ = problem(1, 5, 2000)
        parts = gram_project_partials(J, r)
        assert parts[0].shape[0] > 1
        for part, whole in zip(parts, gram_project_fwd(J, r), strict=True):
            torch.testing.assert_close(part.sum(0), whole, rtol=1e-6, atol=1e-6 * whole.abs().max())

    def test_a_nan_stays_in_its_sample(self):
        J, r, *_ = problem(3, 4, 50)
        r[1, 7] = float("nan")
        clean = torch.tensor([0, 2], device=DEVICE)
        G, p, rr = gram_project_forward(J, r, "triton")
        assert G.isfinite().all() and p[clean].isfinite().all() and rr[clean].isfinite().all()
        assert p[1].isnan().all() and rr[1].isnan()

    def test_half_residual_takes_its_own_dtype_back(self):
        J, r, g_G, g_p, g_rr = problem(2, 3, 64, torch.bfloat16)
        dJ, dr = gram_project_backward(J, r.bfloat16(), g_G + g_G.mT, g_p, g_rr, "triton")
        want = pullback(*(t.double() for t in (J, r.bfloat16(), g_G, g_p, g_rr)))
        assert dJ.dtype == dr.dtype == torch.bfloat16
        torch.testing.assert_close(dr.double(), want[1], rtol=2**-7, atol=2**-7)


class TestBoundary:
    pytestmark = requires_triton

    def test_gradients_under_random_cotangents(self):
        J, r, *cotangents = problem(3, 5, 100)
        got, want = (
            torch.autograd.grad(
                gram_project(*leaves, backend),
                leaves,
                [c.to(leaves[1].dtype) for c in cotangents],
            )
            for backend, leaves in (
                ("triton", [t.clone().requires_grad_() for t in (J, r)]),
                ("reference", [t.double().requires_grad_() for t in (J, r)]),
            )
        )
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w.float(), rtol=1e-5, atol=1e-5)

    def test_compiled_whole_at_several_batch_sizes(self):
        compiled = torch.compile(
            lambda J, r: gram_project(J, r, "triton"),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        for B in (2, 5):
            J, r, *cotangents = problem(B, 3, 20)
            leaves = J.clone().requires_grad_(), r.clone().requires_grad_()
            got = torch.autograd.grad(compiled(*leaves), leaves, cotangents)
            want = torch.autograd.grad(gram_project(*leaves, "torch"), leaves, cotangents)
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)

    def test_second_order_is_refused(self):
        J, r, *_ = problem(1, 2, 5)
        J.requires_grad_()
        G = gram_project(J, r, "triton")[0]
        with pytest.raises(RuntimeError, match='use backend="torch" for the second'):
            torch.autograd.grad(G.sum(), J, create_graph=True)

    def test_opcheck(self):
        J, r, g_G, g_p, g_rr = problem(2, 3, 9)
        torch.library.opcheck(_library.gram_project, (J, r))
        torch.library.opcheck(_library.gram_project_bwd, (J, r, g_G, g_p, g_rr))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torch_twin(dtype):
    J, *others = (t.cpu() for t in problem(3, 5, 70, dtype))
    wide = torch.promote_types(dtype, torch.float32)
    J, r, g_G, g_p, g_rr = inputs = [J, *(t.to(wide) for t in others)]
    got = gram_project_forward(J, r, "torch") + gram_project_backward(
        J, r, g_G + g_G.mT, g_p, g_rr, "torch"
    )
    doubles = [t.double() for t in inputs]
    want = reference.gram_project(*doubles[:2]) + pullback(*doubles)
    assert got[3].dtype == dtype and got[3].stride() == J.stride()
    for g, w in zip(got, want, strict=True):
        eps = torch.finfo(g.dtype).eps
        torch.testing.assert_close(g.double(), w, rtol=8 * eps, atol=70 * eps)


def test_torch_twin_has_second_derivatives():
    J, r, *_ = (t.cpu().double() for t in problem(2, 3, 4))
    J, r = J.clone().requires_grad_(), r.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda J, r: gram_project(J, r, "torch"), (J, r))


def test_torch_twin_ignores_autocast():
    J, r, *_ = (t.cpu() for t in problem(2, 3, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        G = gram_project_forward(J, r, "torch")[0]
    torch.testing.assert_close(G, reference.gram_project(J, r)[0])


@pytest.mark.parametrize(
    "dtype, kind, words",
    [
        (torch.float64, ValueError, "no float64 kernels"),
        pytest.param(
            torch.float32,
            RuntimeError,
            "needs CUDA tensors.*TRITON_INTERPRET=1",
            marks=pytest.mark.skipif(INTERPRETER, reason="the interpreter takes CPU tensors"),
        ),
    ],
)
def test_triton_says_why_it_cannot_run(dtype, kind, words):
    J, r, *_ = (t.cpu().to(dtype) for t in problem(1, 2, 3))
    with pytest.raises(kind, match=words):
        gram_project(J, r, "triton")
