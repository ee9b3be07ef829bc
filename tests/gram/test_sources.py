"""A chunk whose Jacobian is never written, against the same chunk with J at hand, in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastsfvae import reference
from fastsfvae.gram.heads import HEADS
from fastsfvae.gram.tail import Unwritten
from fastsfvae.gram.written import Written
from fastsfvae.jacobian.plan.last_layer import stop_at
from fastsfvae.jacobian.rules.jet import from_stack
from fastsfvae.ops.gram_tail import Tail, tail_partials, tail_values
from fastsfvae.ops.tangent_layer import Layer
from fastsfvae.ops.woodbury import Woodbury, woodbury_native, woodbury_triton
from tests._triton import DEVICE, assert_as_good, poisoned_empty, requires_triton
from tests.kernels.stack_layers import moved
from tests.kernels.test_gram_tail import GEOMETRY, function, named, problem

# pytest finds the fixture by its name in this module.
_ = poisoned_empty
pytestmark = requires_triton
LIKELIHOODS = ("precision", "mixture", "normalized", "expected")
C, GAMMA, KL_WEIGHT = 0.3, 0.6, 0.7


def settings(m, B, dtype):
    g = torch.Generator().manual_seed(1)
    log_var = (0.1 + torch.rand(B, m, generator=g)).log()
    mean, cotangents = torch.randn(B, m, generator=g), torch.randn(6, B, generator=g)
    given = mean, log_var, *map(torch.tensor, (C, GAMMA, KL_WEIGHT)), cotangents
    return [t.to(DEVICE, dtype) for t in given]


def latent_variance(m, B):
    return settings(m, B, torch.float32)[1].exp()


def plainly(tail, x, likelihood, dtype, known):
    """Terms and gradients by autograd over J."""
    *given, cotangents = settings(len(tail.stack) - 1, len(x), dtype)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*tail[1:4], x, *given)]
    stack, weight, bias, x, *given = leaves
    y = moved(function(tail.layer.kind), stack)
    y = F.conv_transpose2d(y.flatten(0, 1), weight, None, 2, 1).unflatten(0, stack.shape[:2])
    y = moved(function(tail.behind), torch.cat([y[:1] + bias.view(-1, 1, 1), y[1:]]))
    J, r = y[1:].transpose(0, 1).flatten(2), (x - y[0]).flatten(1)
    terms = torch.stack(HEADS[likelihood].plain(y[0], J, r, given, "reference"))
    if known:
        cotangents[1:] = 0
    return [
        terms.detach(),
        *torch.autograd.grad(terms, leaves, cotangents, allow_unused=True, materialize_grads=True),
    ]


def unwritten(tail, x, likelihood, known):
    *given, cotangents = settings(len(tail.stack) - 1, len(x), torch.float32)
    last = stop_at(Layer(GEOMETRY, *tail.layer[1:]), tail.behind, tail.behind_params)
    chunk = Unwritten(last(from_stack(tail.stack), tail.weight, tail.bias).tail, x)
    head = HEADS[likelihood]
    cotangents = cotangents[:1] if known else cotangents
    found = head.find(chunk, given, cotangents if known else None)
    pulled, of_inputs = head.pull(chunk, found, given, cotangents)
    (weight, d_weight), (bias, d_bias) = pulled.others
    assert weight is tail.weight and bias is tail.bias
    terms = torch.stack(found.outputs)
    return [terms, pulled.jet.stack, d_weight, d_bias, pulled.x, *of_inputs]


@pytest.mark.parametrize("kind, behind", [("relu", "none"), ("silu", "sigmoid")])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("known", [False, True], ids=["any cotangents", "weights"])
def test_terms_and_gradients(likelihood, kind, behind, known):
    tail, x, _ = problem(3, 5, 6, 3, 3, 4, kind, behind)
    got = unwritten(tail, x, likelihood, known)
    want = plainly(tail, x, likelihood, torch.float64, known)
    plain = plainly(tail, x, likelihood, torch.float32, known)
    for g, w, p in zip(got, want, plain, strict=True):
        assert_as_good(g, w, p, 8 * w.abs().max())


def test_tangents_that_all_samples_share():
    tail, x, _ = problem(3, 4, 5, 2, 2, 3, "none")
    shared = tail.stack[1:, :1]
    stack = torch.cat([tail.stack[:1], shared.expand(-1, 3, -1, -1, -1)])
    jet = from_stack(tail.stack)._replace(tangent=shared, stack=None)
    last = stop_at(Layer(GEOMETRY))(jet, tail.weight, tail.bias)
    assert torch.equal(last.tail.stack, stack) and last.source is jet


def nearly_equal_rows(B, m, Ci, Co, H, W, front, behind, dtype=torch.float32):
    """A tail of whole numbers, whose J float32 holds; its first and last sample make no trouble.

    In the others two rows of J are large and almost equal: what tells them apart is far below the
    rounding of a float32 Gram, and the one factorisation with a pivot beside c.
    """
    g = torch.Generator().manual_seed(B + m)

    def draw(*shape):
        return torch.randint(-3, 4, shape, generator=g).to(DEVICE, dtype)

    stack, weight, bias = draw(1 + m, B, Ci, H, W), draw(Ci, Co, 4, 4).float(), draw(Co).float()
    harmless = stack.clone()
    large = slice(1, B - 1)
    stack[1, large] = 2**5 * stack[1, large]
    stack[m, large] = stack[1, large]
    stack[m, large, 0, 0, 0] += 1
    stack[0, large, 0, 0, 0] = 1
    x = draw(B, Co, 2 * H, 2 * W).float()
    tails = (Tail(Layer(GEOMETRY, *front), t, weight, bias, *behind) for t in (stack, harmless))
    return *tails, x


def solve(tail, x, h, second_var=None):
    last = stop_at(tail.layer, tail.behind, tail.behind_params)
    chunk = Unwritten(last(from_stack(tail.stack), tail.weight, tail.bias).tail, x)
    return chunk.solve(h, torch.full((len(x),), C, device=DEVICE), second_var)


def written_float64(tail, x, h):
    """The same factorisation in float64, J at hand."""
    stack = moved(function(tail.layer.kind), tail.stack.double())
    y = F.conv_transpose2d(stack.flatten(0, 1), tail.weight.double(), None, 2, 1)
    y = y.unflatten(0, stack.shape[:2])
    y = torch.cat([y[:1] + tail.bias.double().view(-1, 1, 1), y[1:]])
    if tail.behind != "none":
        y = moved(lambda x: F.leaky_relu(x, *tail.behind_params), y)
    J, r = y[1:].transpose(0, 1).flatten(2), (x.double() - y[0]).flatten(1)
    return woodbury_native(*reference.gram_project(J, r), h.double(), h.new_full((len(x),), C))


EXACT = [
    # B, m, Ci, Co, H, W, in front, behind
    (4, 3, 5, 3, 3, 4, ("relu", ()), ("none", ())),
    (3, 17, 18, 2, 5, 3, ("none", ()), ("leaky_relu", (0.5,))),
    (3, 33, 12, 4, 4, 3, ("leaky_relu", (0.25,)), ("none", ())),
]


@pytest.mark.slow
@pytest.mark.parametrize("B, m, Ci, Co, H, W, front, behind", EXACT)
def test_lost_samples_are_redone(B, m, Ci, Co, H, W, front, behind, poisoned_empty):
    tail, harmless, x = nearly_equal_rows(B, m, Ci, Co, H, W, front, behind)
    h = latent_variance(m, B)
    solved, clean = solve(tail, x, h, 0.5 * h), solve(harmless, x, h, 0.5 * h)
    assert not solved.lost.any() and not clean.lost.any()
    assert (solved.first.explained <= solved.squared_error).all()
    for mine, variance in ((solved.first, h), (solved.second, 0.5 * h)):
        want = written_float64(tail, x, variance)
        for name, g, w in zip(Woodbury._fields[:-1], mine, want, strict=False):
            error = (g.double() - w)[1:-1].abs().max()
            assert error <= 2**-21 * w.abs().max().clamp(min=1), name
    # What was not lost keeps its bits, and the others were wrong by far more before.
    partials = tail_partials(tail, tail_values(tail, x))
    alone = woodbury_triton(*(part.sum(0) for part in partials), h, h.new_full((B,), C))
    assert alone.lost.tolist() == [False, *[True] * (B - 2), False]
    kept = ~alone.lost
    assert torch.equal(solved.first.log_det[kept], clean.first.log_det[kept])
    want = written_float64(tail, x, h)
    assert (alone.log_det - want.log_det)[alone.lost].abs().min() > 1e-4


def test_half_precision_tangents_stay_lost():
    tail, _, x = nearly_equal_rows(*EXACT[0][:6], *EXACT[0][6:], dtype=torch.bfloat16)
    solved = solve(tail, x, latent_variance(3, 4))
    assert solved.lost.tolist() == [False, True, True, False]
    assert solved.first.log_det.isfinite().all()
    values = tail_values(tail, x)
    with pytest.raises(TypeError, match="T has dtype torch.bfloat16: rounded tangents cannot be"):
        tail_partials(tail, values, solved.lost)
    with pytest.raises(ValueError, match=r"lost \(3,\) does not fit: give a flag for each of 4"):
        full = tail._replace(stack=tail.stack.float())
        tail_partials(full, tail_values(full, x), solved.lost[:3])


def test_written_and_unwritten_agree_on_the_norms():
    tail, x, _ = problem(2, 3, 4, 3, 2, 3, "relu", "sigmoid")
    last = stop_at(Layer(GEOMETRY, *named("relu")), tail.behind, tail.behind_params)
    chunk = Unwritten(last(from_stack(tail.stack), tail.weight, tail.bias).tail, x)
    y = moved(torch.relu, tail.stack)
    y = F.conv_transpose2d(y.flatten(0, 1), tail.weight, None, 2, 1).unflatten(0, (4, 2))
    y = moved(torch.sigmoid, torch.cat([y[:1] + tail.bias.view(-1, 1, 1), y[1:]]))
    whole = Written(from_stack(y.contiguous()), x, "torch")
    for mine, theirs in zip(chunk.norms(torch.float32), whole.norms(torch.float32), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.max().item())
    assert chunk.n == whole.n
