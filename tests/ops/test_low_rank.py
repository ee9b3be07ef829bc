"""The primitive (J, r, h, c) -> (log_det, explained, rr): values and gradients against oracles."""

import contextlib
from types import SimpleNamespace

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

import fastsfvae as sf
from fastsfvae import reference
from fastsfvae.likelihoods import likelihood_terms
from fastsfvae.ops.gram_project import full_products
from fastsfvae.ops.low_rank import low_rank_terms

LIKELIHOODS = ("precision", "mixture", "normalized", "expected")
SIZES = [1, 2, 5, 16, 33, 64, 200]


def problem(B, m, n, *, dtype=torch.float64, seed=0, log_h=(-3.0, 1.0)):
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(B, m, n, generator=g, dtype=torch.float64) / n**0.5
    r = torch.randn(B, n, generator=g, dtype=torch.float64)
    low, high = log_h
    h = torch.exp(low + (high - low) * torch.rand(B, m, generator=g, dtype=torch.float64))
    c = 0.3 + torch.rand(B, generator=g, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (J, r, h, c))


def gradients(terms, inputs, cotangents):
    pairs = [(t, g.to(t.dtype)) for t, g in zip(terms, cotangents, strict=True)]
    total = sum((t * g).sum() for t, g in pairs)
    return torch.autograd.grad(total, inputs)


def error(got, want):
    """Largest error in units of the oracle's largest entry."""
    got, want = got.detach().double(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("n", [1, 7, 784, 12288])
@pytest.mark.parametrize("m", SIZES)
def test_values_and_gradients_match_the_float64_oracle(m, n, largest_error):
    B = 1 if n * m > 500_000 else 3
    inputs64 = problem(B, m, n, seed=m * n)
    cotangents = torch.randn(3, B, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = reference.low_rank_terms(*inputs64)
    want_grads = gradients(want, inputs64, cotangents)

    got64 = low_rank_terms(*inputs64)[:3]
    grads64 = gradients(got64, inputs64, cotangents)
    for got, oracle in zip((*got64, *grads64), (*want, *want_grads), strict=True):
        assert error(got, oracle) < 1e-11

    # float32 J, r, h, c: within twice what the plain formulas lose in float32, plus a few eps; an
    # m x m factorisation and its inverse add up to m roundings (Higham's gamma_m).
    inputs32 = tuple(t.detach().float().requires_grad_() for t in inputs64)
    exact = tuple(t.detach().double().requires_grad_() for t in inputs32)
    want = reference.low_rank_terms(*exact)
    want_grads = gradients(want, exact, cotangents)
    plain = reference.low_rank_terms(*inputs32)
    plain_grads = gradients(plain, inputs32, cotangents)
    got = low_rank_terms(*inputs32)[:3]
    grads = gradients(got, inputs32, cotangents)
    eps = torch.finfo(torch.float32).eps
    names = ["log_det", "explained", "squared error", *(f"gradient in {x}" for x in "Jrhc")]
    for name, mine, peer, oracle in zip(
        names, (*got, *grads), (*plain, *plain_grads), (*want, *want_grads), strict=True
    ):
        largest_error("the primitive, float32, of the largest entry", name, error(mine, oracle))
        assert error(mine, oracle) <= 2 * error(peer, oracle) + (16 + m) * eps


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("m", SIZES)
def test_every_likelihood_and_its_gradients(likelihood, m):
    J, r, h, c = problem(2, m, 784, seed=m)
    c = c[0].detach().requires_grad_()
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def run(backend):
        terms = likelihood_terms(
            J, r, h, noise_var=c, gamma=gamma, likelihood=likelihood, backend=backend
        )
        wanted = (J, r, h, c) + (() if likelihood == "expected" else (gamma,))
        grads = torch.autograd.grad((terms.log_likelihood * cotangent).sum(), wanted)
        return (terms.log_likelihood, terms.log_det, terms.squared_error, *grads)

    for got, want in zip(run("torch"), run("reference"), strict=True):
        assert error(got, want) < 1e-11


def dense(J, r, h, c):
    cov = J.T @ torch.diag(h) @ J + c * torch.eye(J.shape[1], dtype=J.dtype)
    return cov, MultivariateNormal(torch.zeros_like(r), cov).log_prob(r)


def test_likelihoods_equal_their_definitions_with_dense_covariances():
    J, r, h, c = (t.detach() for t in problem(3, 4, 9, seed=5))
    c, gamma = c[0], 0.6
    eye = torch.eye(9, dtype=torch.float64)

    def log_prob(likelihood):
        return sf.low_rank_log_prob(
            r, J, h, noise_var=c, gamma=gamma, likelihood=likelihood, backend="torch"
        )

    for i in range(3):
        cov, full = dense(J[i], r[i], h[i], c)
        noise = MultivariateNormal(torch.zeros(9, dtype=torch.float64), c * eye).log_prob(r[i])
        precision = gamma * cov.inverse() + (1 - gamma) / c * eye
        mixed = MultivariateNormal(
            torch.zeros(9, dtype=torch.float64), precision_matrix=precision
        ).log_prob(r[i])
        eq21 = -0.5 * (
            9 * torch.log(torch.tensor(2 * torch.pi)) + cov.logdet() + r[i] @ precision @ r[i]
        )
        expected = noise - (h[i] * J[i].square().sum(-1)).sum() / (2 * c)
        assert torch.allclose(log_prob("precision")[i], eq21, rtol=1e-7)
        assert torch.allclose(log_prob("mixture")[i], gamma * full + (1 - gamma) * noise)
        assert torch.allclose(log_prob("normalized")[i], mixed)
        assert torch.allclose(log_prob("expected")[i], expected)
    at_one = sf.low_rank_log_prob(r, J, h, noise_var=c)
    assert torch.allclose(at_one[0], dense(J[0], r[0], h[0], c)[1])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4), st.integers(1, 40), st.integers(1, 60), st.integers(0, 10_000),
    st.floats(-40, 9), st.floats(0, 9),
)  # fmt: skip
def test_any_shape_and_latent_scale_stays_close_to_float64(B, m, n, seed, low, width):
    J, r, h, c = problem(B, m, n, seed=seed, log_h=(low, min(low + width, 9.2)))
    want = reference.low_rank_terms(J, r, h, c)
    got = low_rank_terms(*(t.detach().float() for t in (J, r, h, c)))
    # Rounding the inputs and forming C in float32 perturbs log_det by at most eps times the trace
    # of C^-1 A, which is at most m, times a factor that grows with the length of the sums.
    eps = torch.finfo(torch.float32).eps
    ratio = 1 + h.amax() * J.detach().square().sum((-1, -2)).amax() / c.amin()
    tolerance = float(16 * eps * m * (1 + ratio.log()).detach() * 8) + 1e-6 * (m > n) * float(
        ratio.detach()
    )
    assert float((got.log_det.double() - want[0].detach()).abs().max()) <= tolerance
    assert bool((got.explained >= 0).all() and (got.explained <= got.squared_error).all())


def extreme_problem(kind, m, n, top, seed):
    """float32 (J, r, h, c) whose U U^T has eigenvalues up to `top` times c."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, max(m, 1), generator=g, dtype=torch.float64))
    spectrum = torch.logspace(0, -6, q.shape[1], dtype=torch.float64)
    mix, _ = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))
    J = mix[:, : q.shape[1]] @ torch.diag(spectrum) @ q.T
    if kind == "repeated columns":
        J[m // 2 :] = J[: m - m // 2].clone()
    r = torch.randn(n, generator=g, dtype=torch.float64)
    h = torch.logspace(-20, 4, m, dtype=torch.float64)[torch.randperm(m, generator=g)]
    if kind != "wide h":
        h = torch.full((m,), 1e4, dtype=torch.float64)
    c = torch.tensor(0.5, dtype=torch.float64)
    J = J * (top * c / 1e4).sqrt()
    return tuple(t.float()[None] for t in (J, r, h, c))


def exact_terms(J, r, h, c):
    """log_det and explained in 60-digit arithmetic, from the stored float32 numbers."""
    with mpmath.workdps(60):
        J, r = mpmath.matrix(J.double().tolist()), mpmath.matrix(r.double().tolist())
        h, c = [mpmath.mpf(v) for v in h.double().tolist()], mpmath.mpf(float(c))
        m = J.rows
        S = mpmath.diag([mpmath.sqrt(v) for v in h])
        C = S * (J * J.T) * S + c * mpmath.eye(m)
        v = S * (J * r)
        L = mpmath.cholesky(C)
        log_det = 2 * sum(mpmath.log(L[i, i]) for i in range(m)) - m * mpmath.log(c)
        w = mpmath.lu_solve(C, v)
        return float(log_det), float((v.T * w)[0])


@pytest.mark.parametrize("kind", ["graded", "repeated columns", "wide h"])
@pytest.mark.parametrize("top", [1e6, 1e9, 1e12])
@pytest.mark.parametrize(("m", "n"), [(2, 7), (5, 30), (16, 50), (16, 7), (33, 40), (40, 12)])
def test_extreme_spectra_are_finite_and_rescued(kind, top, m, n, largest_error):
    inputs = extreme_problem(kind, m, n, top, seed=m + n)
    J, r, h, c = (t.requires_grad_() for t in inputs)
    terms = low_rank_terms(J, r, h, c)
    grads = gradients(terms[:3], (J, r, h, c), torch.ones(3, 1))
    assert all(bool(torch.isfinite(t).all()) for t in (*terms[:3], *grads))
    log_det, explained = exact_terms(*(t.detach()[0] for t in inputs))
    scale = float(terms.squared_error)
    err_ld = abs(float(terms.log_det) - log_det) / max(1.0, abs(log_det))
    err_ex = abs(float(terms.explained) - explained) / scale
    largest_error("extreme spectra, float32", "log_det (relative)", err_ld)
    largest_error("extreme spectra, float32", "explained (of rr)", err_ex)
    assert 0 <= float(terms.explained) <= scale
    # Beyond what float64 resolves, what its rounding of the Gram costs: m eps64 lambda_max / c.
    tolerance = 5e-4 + 8 * m * torch.finfo(torch.float64).eps * top
    assert err_ld <= tolerance and err_ex <= tolerance


def test_a_lost_sample_is_finite_without_the_rescue_and_marked():
    # A float64 Gram that float64 itself cannot resolve: eigenvalue ratio 1e20, repeated columns.
    J = torch.ones(1, 3, 5, dtype=torch.float64)
    r = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = torch.full((1, 3), 1e20, dtype=torch.float64)
    terms = low_rank_terms(J, r, h, torch.tensor([0.5], dtype=torch.float64))
    assert bool(terms.lost[0])
    assert bool(torch.isfinite(terms.log_det[0]))
    assert 0 <= float(terms.explained) <= float(terms.squared_error)
    easy = low_rank_terms(J, r, h * 1e-20, torch.tensor([0.5], dtype=torch.float64))
    assert not bool(easy.lost[0])


def test_gradient_at_tiny_and_zero_latent_variance():
    J, r, _, c = problem(1, 4, 12, seed=9)
    h = torch.tensor([[0.0, 1e-20, 1e-12, 1.0]], dtype=torch.float64, requires_grad=True)
    want = gradients(reference.low_rank_terms(J, r, h, c), (h,), torch.ones(3, 1))[0]
    got = gradients(low_rank_terms(J, r, h, c)[:3], (h,), torch.ones(3, 1))[0]
    assert torch.allclose(got, want, rtol=1e-9)


def test_second_order_and_gradcheck():
    inputs = problem(2, 3, 5, seed=2)
    second = (inputs[2].detach() * 0.4).requires_grad_()

    def f(J, r, h, c, h2):
        t = low_rank_terms(J, r, h, c, h2)
        return t.log_det, t.explained, t.squared_error, t.second_log_det

    assert torch.autograd.gradcheck(f, (*inputs, second))
    assert torch.autograd.gradgradcheck(f, (*inputs, second))


def test_a_nan_spoils_its_own_sample_only():
    for name in ("J", "r", "h"):
        J, r, h, c = (t.detach().float() for t in problem(4, 5, 20))
        {"J": J, "r": r, "h": h}[name][2] = float("nan")
        terms = low_rank_terms(J, r, h, c)
        for t in (terms.log_det, terms.explained):
            assert bool(torch.isfinite(t[[0, 1, 3]]).all())
        total = terms.log_det + terms.explained + terms.squared_error
        assert bool(total[2].isnan())


def test_strided_jacobian_gives_the_same_result_and_the_same_bits_twice():
    J, r, h, c = (t.detach().float() for t in problem(3, 6, 50))
    strided = J.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    first, again = low_rank_terms(strided, r, h, c), low_rank_terms(strided, r, h, c)
    plain = low_rank_terms(J, r, h, c)
    for a, b, p in zip(first[:3], again[:3], plain[:3], strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, p, rtol=1e-5)


def rounded(device, mode):
    """Values and gradients under a mode, and without it; one latent variance is 0."""
    J, r, h, c = (t.detach().float().to(device) for t in problem(3, 40, 300))
    h[:, 0] = 0
    found = []
    for around in (mode, contextlib.nullcontext()):
        inputs = [t.clone().requires_grad_() for t in (J, r, h, c)]
        with around:
            terms = low_rank_terms(*inputs, 0.5 * inputs[2])[:4]
            found.append([*terms, *torch.autograd.grad(sum(t.sum() for t in terms), inputs)])
    return zip(*found, strict=True)


def test_autocast_does_not_round_the_factorisation():
    for under, plain in rounded("cpu", torch.autocast("cpu", torch.bfloat16)):
        assert torch.equal(under, plain)


def test_a_compiler_follows_full_products_on_a_gpu():
    of_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))

    def product(J):
        with full_products(of_gpu):
            return J @ J.mT

    compiled, J = torch.compile(product, fullgraph=True, backend="eager"), torch.rand(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(J), product(J))


@pytest.mark.gpu
def test_tf32_does_not_round_the_factorisation(monkeypatch):
    @contextlib.contextmanager
    def tf32():
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
            yield

    for under, plain in rounded("cuda", tf32()):
        assert torch.equal(under, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_whole_on_a_gpu(backend):
    inputs = [t.detach().float().cuda().requires_grad_() for t in problem(3, 40, 300)]

    def gradients(terms):
        found = terms(*inputs, backend=backend)[:3]
        return [*found, *torch.autograd.grad(sum(t.sum() for t in found), inputs)]

    compiled = torch.compile(low_rank_terms, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled), gradients(low_rank_terms), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dependent", ["through h", "through r"])
def test_a_gradient_with_a_graph_is_the_gradient(dependent):
    # The second variance of "normalized" depends on the first; here h depends on r as well.
    g = torch.Generator().manual_seed(0)
    J, r, log_var = (
        torch.randn(s, generator=g, dtype=torch.float64).requires_grad_()
        for s in ((2, 3, 5), (2, 5), (2, 3))
    )
    leaves = [J, r, log_var] if dependent == "through h" else [J, r]

    def first(backend, create_graph):
        h = (log_var if dependent == "through h" else r[:, :3]).exp()
        value = sf.low_rank_log_prob(
            r, J, h, noise_var=0.5, gamma=0.7, likelihood="normalized", backend=backend
        )
        return torch.autograd.grad(value.sum(), leaves, create_graph=create_graph)

    want = first("reference", True)
    for found in (first("torch", False), first("torch", True)):
        for mine, right in zip(found, want, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)
    second, right = (
        torch.autograd.grad(sum(t.square().sum() for t in grads), leaves)
        for grads in (first("torch", True), want)
    )
    torch.testing.assert_close(second, right, rtol=1e-9, atol=1e-10)


def test_a_graph_where_one_term_depends_on_nothing():
    h = torch.rand(2, 3, dtype=torch.float64).requires_grad_()
    r, J = torch.randn(2, 5).double(), torch.randn(2, 3, 5).double()
    grads = [
        torch.autograd.grad(
            sf.low_rank_log_prob(r, J, h, noise_var=0.5, backend=backend).sum(),
            h,
            create_graph=True,
        )[0]
        for backend in ("torch", "reference")
    ]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
