"""A chunk whose Jacobian is never written, against the same chunk with J at hand, in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastsfvae import likelihood_adjoint
from fastsfvae.chunk_gram import Unwritten, Written
from fastsfvae.jacobian.jet import from_stack
from fastsfvae.jacobian.tail import stop_at
from fastsfvae.likelihood import likelihood_terms
from fastsfvae.ops.tangent_layer import Layer

from ._triton import DEVICE, assert_as_good, requires_triton
from .stack_layers import moved
from .test_kernel_gram_tail import GEOMETRY, function, named, problem

pytestmark = requires_triton
LIKELIHOODS = ("precision", "mixture", "normalized", "expected")
C, GAMMA = 0.3, 0.6


def settings(m, B, dtype):
    g = torch.Generator().manual_seed(1)
    h = (0.1 + torch.rand(B, m, generator=g)).to(DEVICE, dtype)
    cotangents = torch.randn(4, B, generator=g).to(DEVICE, dtype)
    return h, *(torch.tensor(v, device=DEVICE, dtype=dtype) for v in (C, GAMMA)), cotangents


def plainly(tail, x, likelihood, dtype):
    """Terms and gradients by autograd over J."""
    h, c, gamma, cotangents = settings(len(tail.stack) - 1, len(x), dtype)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*tail[1:4], x, h, c, gamma)]
    stack, weight, bias, x, h, c, gamma = leaves
    y = moved(function(tail.layer.kind), stack)
    y = F.conv_transpose2d(y.flatten(0, 1), weight, None, 2, 1).unflatten(0, stack.shape[:2])
    y = moved(function(tail.behind), torch.cat([y[:1] + bias.view(-1, 1, 1), y[1:]]))
    terms = torch.stack(
        likelihood_terms(
            *(y[1:].transpose(0, 1).flatten(2), (x - y[0]).flatten(1), h),
            noise_var=c, gamma=gamma, likelihood=likelihood, backend="reference",
        )[:4]
    )  # fmt: skip
    return [
        terms.detach(),
        *torch.autograd.grad(terms, leaves, cotangents, allow_unused=True, materialize_grads=True),
    ]


def unwritten(tail, x, likelihood):
    *variances, cotangents = settings(len(tail.stack) - 1, len(x), torch.float32)
    last = stop_at(Layer(GEOMETRY, *tail.layer[1:]), *tail[4:])
    chunk = Unwritten(last(from_stack(tail.stack), tail.weight, tail.bias), x)
    found = likelihood_adjoint.evaluate(chunk, *variances, likelihood)
    pulled = likelihood_adjoint.pull(found, chunk, tuple(variances), cotangents, likelihood)
    (weight, d_weight), (bias, d_bias) = pulled.chunk.others
    assert weight is tail.weight and bias is tail.bias
    return [found.terms, pulled.chunk.jet.stack, d_weight, d_bias, pulled.chunk.x, *pulled[1:]]


@pytest.mark.parametrize("kind, behind", [("relu", "none"), ("silu", "sigmoid")])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_terms_and_gradients(likelihood, kind, behind):
    tail, x, _ = problem(3, 5, 6, 3, 3, 4, kind, behind)
    got = unwritten(tail, x, likelihood)
    want = plainly(tail, x, likelihood, torch.float64)
    plain = plainly(tail, x, likelihood, torch.float32)
    for g, w, p in zip(got, want, plain, strict=True):
        assert_as_good(g, w, p, 8 * w.abs().max())


def test_tangents_that_all_samples_share():
    tail, x, _ = problem(3, 4, 5, 2, 2, 3, "none")
    shared = tail.stack[1:, :1]
    stack = torch.cat([tail.stack[:1], shared.expand(-1, 3, -1, -1, -1)])
    jet = from_stack(tail.stack)._replace(tangent=shared, stack=None)
    last = stop_at(Layer(GEOMETRY))(jet, tail.weight, tail.bias)
    assert torch.equal(last.tail.stack, stack) and last.source is jet


def test_a_lost_sample_stays_lost_and_its_neighbours_keep_their_bits():
    tail, x, _ = problem(3, 4, 5, 3, 3, 3)
    last = stop_at(Layer(GEOMETRY, *named("relu")))
    h, c, _, _ = settings(4, 3, torch.float32)
    before = Unwritten(last(from_stack(tail.stack), tail.weight, tail.bias), x)
    stack = tail.stack.clone()
    # Two equal rows of J, large beside c: what tells them apart is below a float32 Gram's rounding.
    stack[2, 1] = stack[1, 1] = 1e4 * stack[1, 1]
    after = Unwritten(last(from_stack(stack), tail.weight, tail.bias), x)
    solved, clean = (chunk.solve(h, c.expand(3), None) for chunk in (after, before))
    assert solved.lost.tolist() == [False, True, False] and not clean.lost.any()
    assert solved.first.log_det.isfinite().all()
    kept = [0, 2]
    assert torch.equal(solved.first.log_det[kept], clean.first.log_det[kept])


def test_written_and_unwritten_agree_on_the_norms():
    tail, x, _ = problem(2, 3, 4, 3, 2, 3, "relu", "sigmoid")
    last = stop_at(Layer(GEOMETRY, *named("relu")), *tail[4:])
    chunk = Unwritten(last(from_stack(tail.stack), tail.weight, tail.bias), x)
    y = moved(torch.relu, tail.stack)
    y = F.conv_transpose2d(y.flatten(0, 1), tail.weight, None, 2, 1).unflatten(0, (4, 2))
    y = moved(torch.sigmoid, torch.cat([y[:1] + tail.bias.view(-1, 1, 1), y[1:]]))
    whole = Written(from_stack(y.contiguous()), x, "torch")
    for mine, theirs in zip(chunk.norms(torch.float32), whole.norms(torch.float32), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.max().item())
    assert chunk.n == whole.n
