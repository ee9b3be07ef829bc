"""Hostile numbers and layouts: the primitive against 150-digit arithmetic."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsfvae as sf
from fastsfvae import reference
from fastsfvae.ops.low_rank import low_rank_terms
from tests._triton import requires_triton
from tests.decoders import batch, build

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
NAMES = ("log_det", "explained", "gradient in J", "gradient in r", "gradient in h")
# Cotangents of log_det, explained and rr.
G_LD, G_EX, G_RR = 0.7, -1.3, 0.4


@st.composite
def hostile(draw):
    """(J, r, h, c): float32 or float64, m > n and n = 1 among them, columns repeated or zero."""
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from(list(EPS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    J = normal(m, n) * 10 ** draw(st.floats(-8, 8))
    for row in range(1, m):
        kind = draw(st.sampled_from(["free"] * 4 + ["repeated", "nearly repeated", "zero"]))
        if kind == "zero":
            J[row] = 0
        elif kind != "free":
            J[row] = J[row - 1] * (1 + 1e-6 * (kind != "repeated"))
    r = normal(n) * 10 ** draw(st.floats(-4, 4))
    exponents = draw(st.lists(st.floats(-20, 8), min_size=m, max_size=m))
    h = torch.tensor([10**e for e in exponents], dtype=torch.float64)
    c = torch.tensor(10 ** draw(st.floats(-8, 4)), dtype=torch.float64)
    return tuple(t.to(dtype) for t in (J, r, h, c))


def _oracle(J, r, h, c):
    """From Sigma = J^T H J + cI, n x n: no formula of the library's.

    Returns:
        log_det, explained, the gradients in J, r and h of their sum with |r|^2 under the cotangents
        above, C^-1 [m, m], and the largest C_kk / d_k over the pivots d_k of C.
    """
    with mpmath.workdps(150):
        J, r = mpmath.matrix(J.double().tolist()), mpmath.matrix(r.double().tolist())
        h, c = mpmath.diag(h.double().tolist()), mpmath.mpf(float(c))
        m, n = J.rows, J.cols
        sigma = J.T * h * J + c * mpmath.eye(n)
        P = mpmath.inverse(sigma)
        a = P * r
        Ja = J * a
        log_det = mpmath.log(mpmath.det(sigma / c))
        explained = (r.T * r)[0] - c * (r.T * a)[0]
        in_J = 2 * G_LD * h * J * P + 2 * G_EX * c * h * Ja * a.T
        in_r = 2 * (G_EX + G_RR) * r - 2 * G_EX * c * a
        JPJ = J * P * J.T
        in_h = [G_LD * JPJ[i, i] + G_EX * c * Ja[i] ** 2 for i in range(m)]
        s = h.apply(mpmath.sqrt)
        C = s * J * J.T * s + c * mpmath.eye(m)
        L = mpmath.cholesky(C)
        lost_share = max(C[i, i] / L[i, i] ** 2 for i in range(m))
        # The Woodbury identity, so that no second matrix has to be inverted.
        C_inv = (mpmath.eye(m) - s * JPJ * s) / c

        def tensor(values, *shape):
            return torch.tensor([float(v) for v in values], dtype=torch.float64).view(shape)

        return (
            *(tensor([log_det]), tensor([explained]), tensor(in_J, m, n), tensor(in_r, n)),
            *(tensor(in_h, m), tensor(C_inv, m, m), float(lost_share)),
        )


def _allowed(J, r, h, c, C_inv, unit, rounding):
    """First-order bounds of the errors of what `NAMES` lists.

    C is formed and factorised with errors below E = unit (a a^T + diag C), a_i = s_i |J_i|; results
    are sums of at most n + m products that are rounded to `rounding` each.
    """
    J, r, h, c = (t.double() for t in (J, r, h, c))
    m, n = J.shape
    s, P = h.sqrt(), C_inv.abs()
    a, size = s * J.norm(dim=1), r.norm()
    E = unit * (torch.outer(a, a) + torch.diag(c + a.square()))
    w = (C_inv @ (s * (J @ r))).abs()
    d_v = unit * a * size
    d_P = P @ E @ P + rounding * P
    d_w = P @ d_v + P @ E @ w + rounding * w
    d_log_det = (P * E).sum() + rounding * (1 + (1 + a.square() / c).log().sum())
    d_explained = 2 * w @ d_v + w @ E @ w + rounding * size.square()
    count = n + m + 4
    K, d_K = s[:, None] * P * s, s[:, None] * d_P * s
    y, d_y = s * w, s * d_w
    J, r = J.abs(), r.abs()
    passed = y @ J
    d_J = G_LD * (d_K + count * rounding * K) @ J
    d_J += abs(G_EX) * (
        torch.outer(d_y, r + passed)
        + torch.outer(y, d_y @ J)
        + count * rounding * torch.outer(y, r + passed)
    )
    d_r = abs(G_EX) * ((d_y + count * rounding * y) @ J) + count * rounding * r
    A = torch.outer(a, a)
    by_sum = (P * A + d_P * A / unit).sum(1) * unit + count * rounding * (P * A).sum(1)
    by_complement = c * d_P.diagonal() + 2 * rounding
    d_q = torch.where(a.square() < c, by_sum, torch.maximum(by_sum, by_complement))
    d_h = G_LD * d_q / h + abs(G_EX) * c * (2 * w * d_w + count * rounding * w.square()) / h
    return d_log_det[None], d_explained[None], 2 * d_J, 2 * d_r, d_h


def test_the_primitive_stays_within_its_error_bound(request, largest_error, tally):
    count = request.config.getoption("--examples")

    @settings(deadline=None, max_examples=count, derandomize=True, database=None)
    @given(hostile())
    def run(inputs):
        _check(largest_error, tally, inputs)

    run()


def _check(largest_error, tally, inputs):
    J, r, h, c = (t[None].clone().requires_grad_() for t in inputs)
    dtype = J.dtype
    m, n = J.shape[1:]
    terms = low_rank_terms(J, r, h, c)
    total = G_LD * terms.log_det + G_EX * terms.explained + G_RR * terms.squared_error
    got = (terms.log_det, terms.explained, *(g[0] for g in torch.autograd.grad(total, (J, r, h))))
    tally("numerical cases")
    tally("NaNs", sum(int(t.isnan().any()) for t in got))
    assert all(bool(t.isfinite().all()) for t in got)
    assert 0 <= terms.explained.item() <= terms.squared_error.item()

    *want, C_inv, lost_share = _oracle(*inputs)
    rounding = EPS[dtype]
    # Fewer than half of the digits left: float64 takes over from float32, and gives up by itself.
    if lost_share > 4 / rounding**0.5:
        rounding_of_gram = EPS[torch.float64]
        if dtype == torch.float64 or lost_share > 0.25 / rounding_of_gram**0.5:
            assert lost_share < 4 / rounding_of_gram**0.5 or terms.lost.all()
            return
    else:
        rounding_of_gram = rounding
    unit = (n + m + 1) * rounding_of_gram
    tiny = torch.finfo(dtype).tiny
    allowed = _allowed(*inputs, C_inv, unit, rounding)
    for name, mine, exact, bound in zip(NAMES, got, want, allowed, strict=True):
        error = (mine.detach().double() - exact).abs()
        assert bool((error <= bound + tiny).all()), (name, error, bound)
        label = f"{str(dtype).removeprefix('torch.')} hostile inputs: {name}"
        if name == "log_det":
            largest_error(f"{label} (relative, or nats)", float(error / exact.abs().clamp(min=1)))
        if name == "explained":
            largest_error(f"{label} (of rr)", float(error) / terms.squared_error.item())


def _problem(B, m, n, J=1.0, h=1.0, c=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(B, m, n, generator=generator, dtype=torch.float64) * J
    residual = torch.randn(B, n, generator=generator, dtype=torch.float64)
    tensors = jacobian, residual, torch.full((B, m), h), torch.full((B,), c)
    return tuple(t.to(dtype).requires_grad_() for t in tensors)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=requires_triton)])
@pytest.mark.parametrize(
    "scales",
    [{"J": 1e19}, {"J": 1e30}, {"h": 1e38}, {"h": 1e30, "c": 1e-8}],
    ids=lambda scales: " ".join(f"{k}={v}" for k, v in scales.items()),
)
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_a_gram_beyond_float32_is_formed_again_in_float64(scales, backend):
    inputs = _problem(2, 4, 9, **scales)
    terms = low_rank_terms(*inputs, backend=backend)
    grads = torch.autograd.grad(sum(t.sum() for t in terms[:3]), inputs)
    want = reference.low_rank_terms(*(t.detach().double() for t in inputs))
    assert not terms.lost.any() and all(bool(g.isfinite().all()) for g in grads)
    eps = EPS[torch.float32]
    for got, exact in zip(terms[:3], want, strict=True):
        assert bool(((got - exact).abs() <= 16 * eps * exact.abs()).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_gram_beyond_every_dtype_at_hand_is_flagged(dtype):
    J, r, h, c = (t.detach() for t in _problem(4, 3, 7, dtype=torch.float64))
    J[2] *= 1e30 if dtype == torch.bfloat16 else 1e200
    terms = low_rank_terms(J.to(dtype), r.to(dtype), h.to(dtype), c.to(dtype))
    assert terms.lost.tolist() == [False, False, True, False]
    assert terms.log_det.isfinite().tolist() == [True, True, False, True]
    assert terms.explained.isfinite().tolist() == [True, True, False, True]


def _loss_and_gradients(decoder, x, mean, log_var, **settings):
    leaves = [t.detach().clone().requires_grad_() for t in (x, mean, log_var)]
    terms = sf.sampling_free_elbo(decoder, *leaves, **settings)
    return terms.elbo.detach(), *torch.autograd.grad(terms.elbo.sum(), leaves)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_sample_that_is_not_finite_spoils_only_itself(place, bad):
    decoder = build("residual")
    good = [t.detach() for t in batch(decoder)]
    given = [t.clone() for t in good]
    given[place][3] = bad
    kept = [0, 1, 2, 4]
    want = _loss_and_gradients(decoder, *good, chunk_size=2)
    got = _loss_and_gradients(decoder, *given, chunk_size=2)
    for mine, clean in zip(got, want, strict=True):
        assert torch.equal(mine[kept], clean[kept])
    # log_var = -inf is a latent variance of 0: only its divergence is infinite.
    assert not got[0][3].isfinite() or bad == 1e200


@pytest.mark.parametrize("likelihood", ["precision", "mixture", "normalized"])
@pytest.mark.parametrize("gamma", [0.0, 1e-6, 0.5, 0.99, 1.0])
@pytest.mark.filterwarnings("ignore:.*auto-encoder")
def test_every_gamma_with_extreme_variances(gamma, likelihood):
    decoder = build("tanh")
    x, mean, _ = (t.detach() for t in batch(decoder))
    log_var = torch.linspace(-46, 18, mean.numel(), dtype=torch.float64).view_as(mean)
    for noise_var in (1e-8, 1e4):
        settings = {"gamma": gamma, "likelihood": likelihood, "noise_var": noise_var}
        ours, want = (
            _loss_and_gradients(decoder, x, mean, log_var, backend=backend, **settings)
            for backend in ("torch", "reference")
        )
        # lambda_max / c is e^18 |J|^2 / c, up to 1e17 here: only its share of the digits is left.
        with torch.no_grad():
            top = sf.pullback(decoder, mean).gram.diagonal(dim1=1, dim2=2).max() * log_var.exp()
        digits = min(1.0, 64 * EPS[torch.float64] * float(1 + top.max() / noise_var))
        for mine, theirs in zip(ours, want, strict=True):
            assert bool(mine.isfinite().all())
            assert (mine - theirs).abs().max() <= (digits + 1e-11) * theirs.abs().max()


def _views(t):
    """The same values with an offset, strided, transposed and, where 4-d, channels-last."""
    room = torch.full((t.numel() + 3,), float("nan"), dtype=t.dtype)
    room[3:] = t.flatten()
    yield room[3:].view(t.shape)
    wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)
    wide[..., 1] = t
    yield wide[..., 1]
    yield t.transpose(0, -1).contiguous().transpose(0, -1)
    if t.ndim == 4:
        yield t.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["higgins", "tanh"])
def test_views_give_what_their_copies_give(name):
    decoder = build(name)
    x, mean, log_var = (t.detach() for t in batch(decoder))
    want = sf.sampling_free_elbo(decoder, x, mean, log_var, chunk_size=2).elbo
    for other in _views(x):
        for z, log_h in zip(_views(mean), _views(log_var), strict=True):
            assert not (other.is_contiguous() and other.storage_offset() == 0)
            got = sf.sampling_free_elbo(decoder, other, z, log_h, chunk_size=2).elbo
            assert torch.allclose(got, want, rtol=1e-13)
    # One image and one code for all samples, without a copy.
    first = [t[:1].expand(5, *t.shape[1:]) for t in (x, mean, log_var)]
    assert torch.allclose(sf.sampling_free_elbo(decoder, *first).elbo, want[0], rtol=1e-13)
    assert torch.allclose(
        sf.pullback(decoder, first[1], first[0]).gram, sf.pullback(decoder, mean, x).gram[0]
    )


@pytest.mark.parametrize("n", [1, 7])
def test_a_batch_of_4096_equals_its_samples(n):
    J, r, h, c = (t.detach().double() for t in _problem(4096, 5, n))
    whole = sf.low_rank_log_prob(r, J, h, noise_var=0.5)
    for row in (0, 1, 2047, 4095):
        one = slice(row, row + 1)
        alone = sf.low_rank_log_prob(r[one], J[one], h[one], noise_var=0.5)
        assert torch.allclose(whole[one], alone, rtol=1e-12)


@pytest.fixture
def far_apart(tmp_path):
    """A function that lays the samples of a tensor 2^30 elements apart, in a file with holes."""

    def spread(t, axis=0):
        strides = [1] * t.ndim
        for inner in reversed(range(t.ndim - 1)):
            strides[inner] = strides[inner + 1] * t.shape[inner + 1]
        strides[axis] = 2**30
        room = np.memmap(tmp_path / "holes", np.float16, "w+", shape=(2**31 + 2**20,))
        far = torch.as_strided(torch.from_numpy(room), t.shape, strides)
        return far.copy_(t)

    return spread


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=requires_triton)])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_offsets_beyond_two_to_the_31(backend, far_apart):
    # The last of three samples begins at element 2^31, which 32 bits cannot count.
    J, r, h, c = (t.detach() for t in _problem(3, 4, 40))
    near = J.half()
    far = far_apart(near)
    assert far.stride(0) * 2 == 2**31
    terms = []
    for tangents in (near.clone(), far):
        leaf = tangents.detach().requires_grad_()
        found = low_rank_terms(leaf, r, h, c, backend=backend)
        (grad,) = torch.autograd.grad(found.log_det.sum() + found.explained.sum(), leaf)
        terms.append((*(t.detach() for t in found[:3]), grad))
    for first, second in zip(*terms, strict=True):
        assert torch.equal(first, second)
