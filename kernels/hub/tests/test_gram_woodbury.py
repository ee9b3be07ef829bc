"""Values and gradients against the formulas in float64; on a GPU, or with TRITON_INTERPRET=1."""

import os

import pytest
import torch

pytestmark = pytest.mark.kernels_ci
DEVICE = "cuda" if torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ else "cpu"
# (B, m, n): one of everything, odd ones, whole tiles, and more rows than columns.
SIZES = [(1, 1, 1), (3, 5, 37), (2, 16, 64), (1, 33, 20)]


def problem(B, m, n, dtype=torch.float32, scale=1.0):
    """J, r, h and c, of which the last sample has two rows and two columns of J alike."""
    g = torch.Generator().manual_seed(B + m + n)
    J = scale * torch.randn(B, m, n, generator=g)
    J[-1, m // 2], J[-1, :, n // 2] = J[-1, 0], J[-1, :, 0]
    r = torch.randn(B, n, generator=g)
    h = 0.1 + torch.rand(B, m, generator=g)
    h[0, 0] = 0
    c = 0.2 + torch.rand(B, generator=g)
    return [t.to(DEVICE) for t in (J.to(dtype), r.to(dtype), h, c)]


def formulas(J, r, h, c):
    """G, p, rr, and by matrices as large as the data log det and quadratic form of the density."""
    gram, projection, rr = J @ J.mT, torch.einsum("bmn,bn->bm", J, r), r.square().sum(1)
    n = J.shape[-1]
    covariance = c[:, None, None] * torch.eye(n, dtype=J.dtype, device=J.device)
    covariance = covariance + torch.einsum("bmi,bm,bmj->bij", J, h, J)
    log_det = torch.linalg.slogdet(covariance).logabsdet - n * c.log()
    explained = rr - c * (r * torch.linalg.solve(covariance, r)).sum(1)
    return gram, projection, rr, log_det, explained


def of_system(gram, projection, h, c):
    """Log det(I + G H / c) and p^T H (cI + G H)^-1 p."""
    eye = torch.eye(h.shape[1], dtype=gram.dtype, device=gram.device)
    GH = gram * h[:, None, :]
    log_det = torch.linalg.slogdet(eye + GH / c[:, None, None]).logabsdet
    y = torch.linalg.solve(c[:, None, None] * eye + GH, projection)
    return log_det, (projection * h * y).sum(1)


def by_cholesky(gram, projection, h, c):
    """The same as PyTorch does it best for a symmetric G, where no h is 0."""
    s = h.sqrt()
    eye = torch.eye(h.shape[1], dtype=gram.dtype, device=gram.device)
    L = torch.linalg.cholesky(s[:, :, None] * gram * s[:, None] + c[:, None, None] * eye)
    log_det = (L.diagonal(dim1=1, dim2=2).square() / c[:, None]).log().sum(1)
    v = torch.linalg.solve_triangular(L, (s * projection)[:, :, None], upper=False)
    return log_det, v.square().sum((1, 2))


def with_gradients(function, inputs, cotangents, dtype=None):
    """A function's results and, under cotangents, its gradients, computed with in `dtype`."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*(t.to(dtype or t.dtype) for t in leaves))
    given = [g.to(y.dtype) for g, y in zip(cotangents, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, given)]


def cotangents_like(outputs):
    """A random one for each output."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(y.shape, generator=g).to(y.device) for y in outputs]


def compare(run, formula, inputs, plain=None, cancelled=None):
    """A kernel's results and gradients with a formula's in float64, and plain ones in float32.

    Errors may be twice those of plain PyTorch in the same dtype, plus a few roundings of what is
    added up, where that is more than the result: `cancelled` says so by an output's index.
    """
    with torch.no_grad():
        cotangents = cotangents_like(run(*inputs))
    got = with_gradients(run, inputs, cotangents)
    want = with_gradients(formula, [t.double() for t in inputs], cotangents)
    plain = with_gradients(plain or formula, inputs, cotangents, torch.float32)
    for i, (g, w, p) in enumerate(zip(got, want, plain, strict=True)):
        assert g.shape == w.shape
        error, of_plain = ((t.double() - w).abs().max().item() for t in (g, p))
        scale = max(1.0, w.abs().max().item(), (cancelled or {}).get(i, 0.0))
        allowed = 2 * of_plain + 8 * torch.finfo(g.dtype).eps * scale
        assert error <= allowed, f"{i}: error {error:.2e} above {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B, m, n", [*SIZES, (1, 70, 9)])
def test_gram_project(kernel, B, m, n, dtype):
    """The sums and both gradients, in J's dtype; above 64 rows in more than one tile."""
    J, r, *_ = problem(B, m, n, dtype)
    formula = lambda J, r: (J @ J.mT, (J * r[:, None]).sum(2), r.square().sum(1))  # noqa: E731
    compare(kernel.gram_project, formula, (J, r))


@pytest.mark.parametrize("B, m, n", SIZES)
def test_woodbury(kernel, B, m, n):
    """Both results and the gradients of G, p, h and c."""
    J, r, h, c = problem(B, m, n)
    gram, projection, rr = kernel.gram_project(J, r)
    run = lambda *args: kernel.woodbury(*args[:2], rr, *args[2:])[:2]  # noqa: E731
    compare(run, of_system, (gram, projection, h + 0.01, c), plain=by_cholesky)


@pytest.mark.parametrize("B, m, n", SIZES)
def test_low_rank_terms(kernel, B, m, n):
    """All three results and the gradients of J, r, h and c, by covariances as large as the data."""
    inputs = problem(B, m, n)
    formula = lambda *args: [formulas(*args)[i] for i in (3, 4, 2)]  # noqa: E731
    # Where h is 0, d log_det / dh = (G - G K G)_ii / c, of which both terms are at most G_ii / c.
    of_h = (inputs[0].square().sum(2) / inputs[3][:, None]).max().item()
    compare(lambda *args: kernel.low_rank_terms(*args)[:3], formula, inputs, cancelled={5: of_h})


def test_what_float32_loses_is_marked_and_found_in_float64(kernel):
    """Two rows alike, 100 times as large: no float32 Gram can tell their difference from noise."""
    inputs = problem(3, 5, 37, scale=100)
    J, r, h, c = inputs
    sums = kernel.gram_project(J, r)
    assert kernel.woodbury(*sums, h, c).lost.tolist() == [False, False, True]
    terms = kernel.low_rank_terms(*inputs)
    assert not terms.lost.any()
    log_det, explained = of_system(*formulas(*(t.double() for t in inputs))[:2], h, c)
    torch.testing.assert_close(terms.log_det.double(), log_det, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.explained.double(), explained, rtol=1e-5, atol=0)


def test_a_noise_variance_for_all_samples(kernel):
    """A number and a 0-d tensor are one for each sample; a tensor's gradient is their sum."""
    J, r, h, _ = problem(3, 5, 37)
    one = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    each = one.detach().expand(3).clone().requires_grad_()
    results = [kernel.low_rank_terms(J, r, h, c).log_det for c in (0.3, one, each)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    (of_one,), (of_each,) = (
        torch.autograd.grad(y.sum(), c) for y, c in zip(results[1:], (one, each), strict=True)
    )
    torch.testing.assert_close(of_one, of_each.sum())


def test_backends_agree(kernel):
    """Plain twins take any device and dtype: float64 agrees with itself, and float32 with it."""
    J, r, h, c = problem(3, 5, 37)
    doubles = [t.double() for t in (J, r, h, c)]
    sums = kernel.gram_project(*doubles[:2], backend="torch")
    found = [kernel.woodbury(*sums, *doubles[2:], backend=b)[:2] for b in ("torch", "reference")]
    found += [kernel.low_rank_terms(*doubles, backend=b)[:2] for b in ("torch", "reference")]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        kernel.low_rank_terms(J, r, h, c)[:2],
        tuple(t.float() for t in found[0]),
        rtol=1e-5,
        atol=1e-5,
    )


def test_gradients_of_woodbury_in_float64(kernel):
    """The adjoint by finite differences, of symmetric changes of G."""
    J, r, h, c = (t.double() for t in problem(2, 3, 7))
    gram, projection, rr = kernel.gram_project(J, r, backend="torch")

    def run(gram, projection, h, c):
        gram = (gram + gram.mT) / 2
        return kernel.woodbury(gram, projection, rr, h, c, backend="torch")[:2]

    inputs = [t.detach().requires_grad_() for t in (gram, projection, h + 0.1, c)]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    "name, change, error, words",
    [
        ("gram_project", {"jacobian": lambda J: J.int()}, TypeError, "jacobian has dtype .*int32"),
        ("gram_project", {"jacobian": lambda J: J.double()}, ValueError, "no float64 kernels"),
        ("gram_project", {"residual": lambda r: r.double()}, TypeError, "r has dtype .*float64"),
        ("gram_project", {"residual": lambda r: r[:, 1:]}, ValueError, r"residual \(2, 6\) do not"),
        ("gram_project", {"jacobian": lambda J: J[0]}, ValueError, r"give jacobian \[B, m, n\]"),
        ("gram_project", {"backend": "cuda"}, ValueError, "backend='cuda' is not one of 'triton'"),
        ("low_rank_terms", {"noise_var": -1.0}, ValueError, "noise_var=-1.0 must be finite and"),
        (
            "low_rank_terms",
            {"noise_var": lambda c: c[:1]},
            ValueError,
            r"noise_var \(1,\) do not fit",
        ),
        ("woodbury", {"gram": lambda G: G.bfloat16()}, TypeError, "give all three in float32"),
        ("woodbury", {"latent_var": lambda h: h[:, :2]}, ValueError, "do not fit together"),
        ("woodbury", {"m": 65}, ValueError, "m=65 does not fit the registers"),
    ],
)
def test_refuses_in_one_line(kernel, name, change, error, words):
    """What was given, and what to do."""
    J, r, h, c = problem(2, change.pop("m", 3), 7)
    backend = change.pop("backend", "triton")
    gram, projection, rr = kernel.gram_project(J, r)
    arguments = {
        "gram_project": {"jacobian": J, "residual": r},
        "low_rank_terms": {"jacobian": J, "residual": r, "latent_var": h, "noise_var": c},
        "woodbury": {"gram": gram, "projection": projection, "squared_error": rr}
        | {"latent_var": h, "noise_var": c},
    }[name]
    for argument, new in change.items():
        arguments[argument] = new(arguments[argument]) if callable(new) else new
    with pytest.raises(error, match=words) as raised:
        getattr(kernel, name)(**arguments, backend=backend)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["gram_project", "woodbury", "low_rank_terms"])
def test_a_second_derivative_is_refused(kernel, name):
    """Never silently incomplete."""
    J, r, h, c = problem(2, 3, 7)
    sums = kernel.gram_project(J, r)
    inputs = {"gram_project": (J, r), "woodbury": (*sums, h, c)}.get(name, (J, r, h, c))
    leaf = inputs[0].detach().requires_grad_()
    outputs = getattr(kernel, name)(leaf, *inputs[1:])
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(outputs[0].sum(), leaf, create_graph=True)


def test_compiles_into_one_graph(kernel):
    """At two batch sizes, gradients included."""
    run = lambda J, r: kernel.gram_project(J, r)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (2, 5):
        inputs = problem(B, 3, 7)[:2]
        cotangents = cotangents_like(run(*inputs))
        found = [with_gradients(f, inputs, cotangents) for f in (compiled, run)]
        torch.testing.assert_close(*found, rtol=0, atol=0)


def test_operators_are_this_builds_own(kernel):
    """Several versions can be loaded into one process."""
    own = getattr(torch.ops, kernel.__name__)
    torch.library.opcheck(own.gram_project.default, problem(2, 3, 7)[:2])
    assert kernel.__name__.startswith("_gram_woodbury_")
    assert not hasattr(torch.ops.fastsfvae, "gram_project")
