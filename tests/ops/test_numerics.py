"""Hostile numbers and layouts: the primitive against 150-digit arithmetic."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import fastsfvae as sf
from fastsfvae import reference
from fastsfvae.jacobian.run.cache import chunk_bounds
from fastsfvae.ops.gram_project import gram_project_forward
from fastsfvae.ops.low_rank import low_rank_terms
from fastsfvae.ops.woodbury import woodbury_native, woodbury_triton
from tests._triton import DEVICE, requires_triton
from tests.decoders import batch, build
from tests.hostile import (
    EPS,
    GAMMAS,
    Cotangents,
    bounds,
    dtype_name,
    exact_terms,
    gram_rounding,
    primitive_inputs,
)

NAMES = ("log_det", "explained", "gradient in J", "gradient in r", "gradient in log h")
G = Cotangents(log_det=0.7, explained=-1.3, rr=0.4)


def test_the_primitive_stays_within_its_error_bound(request, largest_error, tally):
    count = request.config.getoption("--examples")

    @settings(deadline=None, max_examples=count, derandomize=True, database=None)
    @given(primitive_inputs())
    def run(inputs):
        _check(largest_error, tally, inputs)

    run()


def _check(largest_error, tally, inputs):
    J, r, h, c = (t[None].clone().requires_grad_() for t in inputs)
    terms = low_rank_terms(J, r, h, c)
    total = G.log_det * terms.log_det + G.explained * terms.explained + G.rr * terms.squared_error
    in_J, in_r, in_h = (g[0] for g in torch.autograd.grad(total, (J, r, h)))
    got = terms.log_det, terms.explained, in_J, in_r, in_h.double() * inputs.h.double()
    subject = f"hostile inputs to the primitive, {dtype_name(inputs.J)}"
    tally(subject, "cases")
    tally(subject, "NaNs", sum(int(t.isnan().any()) for t in got))
    assert all(bool(t.isfinite().all()) for t in got)
    assert 0 <= terms.explained.item() <= terms.squared_error.item()

    exact = exact_terms(inputs, G)
    of_gram = gram_rounding(inputs, exact.lost_share)
    if of_gram is None:
        # Where exact arithmetic keeps a few digits more than float64, rounding decides.
        assert exact.lost_share < 4 / EPS[torch.float64] ** 0.5 or terms.lost.all()
        tally(subject, "beyond float64: flagged")
        return
    want = *exact[:4], exact.in_h * inputs.h.double()
    allowed = bounds(inputs, exact.C_inv, G, of_gram)
    tiny = torch.finfo(inputs.J.dtype).tiny
    for name, mine, truth, bound in zip(NAMES, got, want, allowed, strict=False):
        error = (mine.detach().double() - truth).abs()
        assert bool((error <= bound + tiny).all()), (name, error, bound)
        if name == "log_det":
            largest_error(subject, f"{name} (relative, or nats)", error / truth.abs().clamp(min=1))
        elif name == "explained":
            largest_error(subject, f"{name} (of rr)", error / terms.squared_error.detach())
        else:
            largest_error(subject, f"{name} (of its bound)", (error / (bound + tiny)).max())


BACKENDS = ["torch", pytest.param("triton", marks=requires_triton)]


def _device(backend):
    return DEVICE if backend == "triton" else "cpu"


def _problem(B, m, n, J=1.0, h=1.0, c=0.5, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(B, m, n, generator=generator, dtype=torch.float64) * J
    residual = torch.randn(B, n, generator=generator, dtype=torch.float64)
    tensors = jacobian, residual, torch.full((B, m), h), torch.full((B,), c)
    return tuple(t.to(device, dtype).requires_grad_() for t in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "scales",
    [{"J": 1e19}, {"J": 1e30}, {"h": 1e38}, {"h": 1e30, "c": 1e-8}],
    ids=lambda scales: " ".join(f"{k}={v}" for k, v in scales.items()),
)
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_a_gram_beyond_float32_is_formed_again_in_float64(scales, backend):
    inputs = _problem(2, 4, 9, **scales, device=_device(backend))
    terms = low_rank_terms(*inputs, backend=backend)
    grads = torch.autograd.grad(sum(t.sum() for t in terms[:3]), inputs)
    want = reference.low_rank_terms(*(t.detach().double() for t in inputs))
    assert not terms.lost.any() and all(bool(g.isfinite().all()) for g in grads)
    eps = EPS[torch.float32]
    for got, exact in zip(terms[:3], want, strict=True):
        assert bool(((got - exact).abs() <= 16 * eps * exact.abs()).all())


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rescued_sample_explains_no_more_than_its_squared_error(backend):
    # With m > n and a small c all is explained, and |r|^2 is rounded another way.
    problem = _problem(256, 3, 2, J=1e4, c=1.0, device=_device(backend))
    J, r, h, c = (t.detach() for t in problem)
    solve = woodbury_triton if backend == "triton" else woodbury_native
    # In some orders of summation a sample's pivots come out above their floor.
    lost = solve(*gram_project_forward(J, r, backend), h, c).lost
    assert lost.sum() >= 250
    terms = low_rank_terms(J, r, h, c, backend=backend)
    assert bool((terms.explained <= terms.squared_error).all())
    exact = reference.low_rank_terms(*(t.double() for t in (J, r, h, c)))
    error = (terms.explained - exact[1]).abs()
    assert bool((error <= 2 * EPS[torch.float32] * exact[2])[lost].all())


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
@pytest.mark.parametrize("gamma", GAMMAS)
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
    """A function that lays the samples of a tensor 2^30 elements apart.

    On a GPU in 4 GiB of its memory, on the CPU in a file with holes.
    """

    def spread(t, axis=0):
        strides = [1] * t.ndim
        for inner in reversed(range(t.ndim - 1)):
            strides[inner] = strides[inner + 1] * t.shape[inner + 1]
        strides[axis] = 2**30
        size = 2**31 + 2**20
        if t.is_cuda:
            room = torch.empty(size, dtype=torch.float16, device=t.device)
        else:
            holes = np.memmap(tmp_path / "holes", np.float16, "w+", shape=(size,))
            room = torch.from_numpy(holes)
        return torch.as_strided(room, t.shape, strides).copy_(t)

    return spread


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=requires_triton)])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_offsets_beyond_two_to_the_31(backend, far_apart):
    # The last of three samples begins at element 2^31, which 32 bits cannot count.
    J, r, h, c = (t.detach() for t in _problem(3, 4, 40, device=_device(backend)))
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


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_offsets_beyond_two_to_the_31_through_the_chunk_loop(chunk_size, far_apart):
    decoder = build("higgins", torch.float32)
    x, mean, log_var = (t.detach() for t in batch(decoder, 3, torch.float32))
    near = x.half()
    far = far_apart(near)
    assert far[2:].storage_offset() == 2**31
    results = []
    for images in (near, far):
        leaves = [t.detach().requires_grad_() for t in (images, mean, log_var)]
        objective = sf.sampling_free_elbo(decoder, *leaves, chunk_size=chunk_size).elbo
        pulled = sf.pullback(decoder, mean, images, chunk_size=chunk_size)
        grads = torch.autograd.grad(objective.sum(), leaves)
        results.append((objective.detach(), *grads, *(t.detach() for t in pulled)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_chunks_of_a_batch_beyond_two_to_the_31():
    batch_size, size = 2**33 + 5, 2**31
    cuts = list(chunk_bounds(batch_size, size))
    assert cuts[0][0] == 0 and cuts[-1][1] == batch_size
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(cuts))
    assert max(stop - start for start, stop in cuts) <= size
    # A view that holds one number: nothing of its size is allocated.
    wide = torch.ones(1).expand(batch_size)
    assert [len(wide[start:stop]) for start, stop in cuts] == [b - a for a, b in cuts]
