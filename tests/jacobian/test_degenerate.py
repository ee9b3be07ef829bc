"""Points at which a derivative is a choice: ties, bounds, kinks, zeros, rows that are masked out.

What PyTorch chooses depends on its version: the oracle is reverse mode of the installed one. Second
derivatives do not exist there; a loss's gradients are finite all the same.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsfvae.jacobian.api import decode_with_jacobian
from fastsfvae.jacobian.run.cache import Linearizer
from tests.jacobian.exactness import loss_and_gradients

ZEROS, EQUAL, TIES = [0.0] * 4, [2.0] * 4, [3.0, 1.0, 3.0, 1.0]
BOUNDS, KINKS = [-1.0, 0.0, 1.0, 2.0], [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0]
ORDERS = (0, 0.5, 1, 1.5, 2, 3, math.inf)
vector_norm = torch.linalg.vector_norm


def _first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def _constant(*values):
    return torch.tensor(values, dtype=torch.float64)


def _masked(h, *hidden):
    return h.masked_fill(_constant(*hidden).bool(), -math.inf)


def _points(h):
    return h.view(-1, 2, 2)


def _attention(h):
    """The second row sees nothing."""
    mask = _constant([1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]).bool()
    words = h[:, None, :, None]
    return F.scaled_dot_product_attention(words, words, words, mask)


CASES = {
    # Equal numbers and zero vectors.
    "std": (lambda h: h.std(1), EQUAL),
    "std_biased": (lambda h: h.std(1, correction=0), EQUAL),
    "std_of_all_but_the_batch": (lambda h: h / (h.std(1, keepdim=True) + 1), ZEROS),
    "var": (lambda h: h.var(1), EQUAL),
    "std_mean": (lambda h: sum(torch.std_mean(h, 1)), EQUAL),
    "layer_norm": (lambda h: F.layer_norm(h, (4,)), EQUAL),
    "group_norm": (lambda h: F.group_norm(h, 2), EQUAL),
    "normalize": (F.normalize, ZEROS),
    "cosine_both": (lambda h: F.cosine_similarity(h[:, :2], h[:, 2:]), ZEROS),
    "cosine_one": (lambda h: F.cosine_similarity(h[:, :2], h[:, 2:]), [0.0, 0.0, 1.0, 2.0]),
    "renorm": (lambda h: h.renorm(2, 0, 1.0), ZEROS),
    **{f"norm_{p}": (lambda h, p=p: vector_norm(h, p, 1), ZEROS) for p in (*ORDERS, -math.inf)},
    **{
        f"norm_{p}_of_some": (lambda h, p=p: vector_norm(h, p, 1), [0.0, 3.0, -3.0, 1.0])
        for p in (*ORDERS, -math.inf)
    },
    **{
        f"pairwise_distance_{p}": (
            lambda h, p=p: F.pairwise_distance(h[:, :2], h[:, 2:], p, 0.0),
            [1.0, 2.0, 1.0, 2.0],
        )
        for p in ORDERS
    },
    **{
        f"cdist_{p}": (
            lambda h, p=p: torch.cdist(_points(h), _points(h).flip(1) * _constant(1, 2), p),
            [1.0, 0.0, 1.0, 3.0],
        )
        for p in ORDERS
    },
    "cdist_by_product": (
        lambda h: torch.cdist(_points(h), torch.zeros(30, 2, dtype=h.dtype)),
        [0.0, 0.0, 1.0, 2.0],
    ),
    # The origin.
    "atan2": (lambda h: torch.atan2(h, h.flip(1)), ZEROS),
    "atan2_axis": (lambda h: torch.atan2(h, _constant(0, 0, 0, 0)), BOUNDS),
    "hypot_axis": (lambda h: torch.hypot(h, h + 1), BOUNDS),
    **{f"pow_{p}": (lambda h, p=p: h**p, BOUNDS) for p in (0, 1, 2, 3)},
    "pow_1.5": (lambda h: h.abs() ** 1.5, BOUNDS),
    "pow_of_tensor": (lambda h: h ** _constant(0, 1, 2, 3), ZEROS),
    "pow_by_value": (lambda h: 0 ** h.abs(), BOUNDS),
    "xlogy": (lambda h: torch.xlogy(h, _constant(0, 0, 1, 2)), ZEROS),
    "sinc": (torch.sinc, BOUNDS),
    **{f: (getattr(torch.special, f), BOUNDS) for f in "i0 i0e i1 i1e".split()},
    # Masked out.
    "logsumexp_some": (lambda h: _masked(h, 1, 1, 0, 0).logsumexp(1), BOUNDS),
    "logsumexp_all": (lambda h: _masked(h, 1, 1, 1, 1).logsumexp(1).exp(), BOUNDS),
    "softmax_some": (lambda h: _masked(h, 1, 0, 1, 0).softmax(1), BOUNDS),
    "log_softmax_some": (lambda h: _masked(h, 1, 0, 1, 0).log_softmax(1)[:, 1::2], BOUNDS),
    "logcumsumexp": (lambda h: _masked(h, 0, 1, 1, 0).logcumsumexp(1), BOUNDS),
    "attention": (_attention, BOUNDS),
    "where": (lambda h: torch.where(h > 0, torch.where(h > 0, h, 1.0).sqrt(), 0.0), BOUNDS),
    "nansum": (lambda h: torch.where(h == 1, math.nan, h).nansum(1), BOUNDS),
    "nanmean": (lambda h: torch.where(h == 1, math.nan, h).nanmean(1), BOUNDS),
    # Zeros in products.
    **{
        f"{f}_{zeros}": (lambda h, f=f: getattr(h, f)(1), point)
        for f in ("prod", "cumprod")
        for zeros, point in {
            "one": [2.0, 0.0, 1.0, 3.0],
            "two": [2.0, 0.0, 0.0, 3.0],
            "all": ZEROS,
        }.items()
    },
    # Ties.
    **{
        f"{f}_ties": (lambda h, f=f: _first(getattr(torch, f)(h, 1)), TIES)
        for f in "max min amax amin median nanmedian mode cummax cummin sort".split()
    },
    "kthvalue_ties": (lambda h: h.kthvalue(2, 1)[0], TIES),
    "topk_ties": (lambda h: h.topk(3, 1)[0], TIES),
    "max_pool_ties": (lambda h: F.max_pool1d(h[:, None], 3, 1), TIES),
    "adaptive_max_pool_ties": (lambda h: F.adaptive_max_pool1d(h[:, None], 1), TIES),
    "maximum": (lambda h: torch.maximum(h, h.flip(1)), EQUAL),
    "minimum": (lambda h: torch.minimum(h, _constant(1, 1, 1, 1)), BOUNDS),
    "fmax": (lambda h: torch.fmax(h, _constant(1, 0, 1, math.nan)), BOUNDS),
    "fmin": (lambda h: torch.fmin(h, h.flip(1)), EQUAL),
    # Bounds.
    "clamp": (lambda h: h.clamp(0, 1), BOUNDS),
    "clamp_from_below": (lambda h: h.clamp(min=0), BOUNDS),
    "clamp_from_above": (lambda h: h.clamp(max=1), BOUNDS),
    "clamp_to_one_number": (lambda h: h.clamp(1, 1), BOUNDS),
    "clamp_crossed": (lambda h: h.clamp(1, 0), BOUNDS),
    "clamp_tensors": (lambda h: h.clamp(_constant(-1, 0, 0, 2), _constant(1, 1, 1, 2)), BOUNDS),
    "clamp_tensors_crossed": (
        lambda h: h.clamp(_constant(1, 1, 1, 3), _constant(-1, 1, 0, 2)),
        BOUNDS,
    ),
    "clamp_tensor_below": (lambda h: h.clamp(min=_constant(-1, 1, 1, 0)), BOUNDS),
    "clamp_between_values": (lambda h: torch.clamp(_constant(0, 0, 1, 3), h, h + 1), BOUNDS),
    "clamp_of_equal_bounds": (lambda h: torch.clamp(_constant(-2, 0, 1, 3), h, h * 1), BOUNDS),
    "clamp_min_of_values": (lambda h: torch.clamp_min(_constant(0, 0, 1, 3), h), BOUNDS),
    "clamp_max_of_values": (lambda h: torch.clamp_max(_constant(0, 0, 1, 3), h), BOUNDS),
    # Kinks and jumps.
    **{
        f: (getattr(F, f), KINKS)
        for f in (
            "relu relu6 hardtanh hardswish hardshrink softshrink leaky_relu elu selu celu "
            "softsign softplus rrelu silu mish gelu logsigmoid"
        ).split()
    },
    **{
        f: (lambda h, f=f: h + getattr(torch, f)(h), KINKS)
        for f in "abs sign sgn frac trunc floor ceil round nan_to_num".split()
    },
    "hardtanh_own": (lambda h: F.hardtanh(h, 0.0, 6.0), KINKS),
    "threshold": (lambda h: F.threshold(h, 0.5, 0.1), KINKS),
    "prelu": (lambda h: F.prelu(h, _constant(0.3)), KINKS),
    "remainder": (lambda h: torch.remainder(h, 0.5), KINKS),
    "remainder_by_value": (lambda h: torch.remainder(_constant(1), h + 0.25), KINKS),
    "fmod": (lambda h: torch.fmod(h, 0.5), KINKS),
    "copysign": (lambda h: torch.copysign(h, -h), KINKS),
    "l1": (lambda h: F.l1_loss(h, torch.zeros_like(h), reduction="none"), KINKS),
    "logit_at_eps": (lambda h: torch.logit(h, 0.5 - 1e-9), [0.5 - 1e-9, 0.5 + 1e-9, 0.0, 1.0]),
}
# The first derivative is infinite, or no number, as PyTorch's.
INFINITE = {
    "sqrt": (torch.sqrt, ZEROS),
    "rsqrt": (torch.rsqrt, ZEROS),
    "pow_0.5": (lambda h: h**0.5, ZEROS),
    "pow_-1": (lambda h: h**-1, ZEROS),
    "log": (torch.log, ZEROS),
    "asin": (torch.asin, [1.0, -1.0]),
    "acosh": (torch.acosh, [1.0, 1.0]),
    "atanh": (torch.atanh, [1.0, -1.0]),
    "entr": (torch.special.entr, ZEROS),
    "hypot": (lambda h: torch.hypot(h, h.flip(1)), ZEROS),
    "reciprocal": (torch.reciprocal, ZEROS),
    "lgamma": (torch.lgamma, [0.0, -1.0]),
    "logit": (torch.logit, [0.0, 1.0]),
}


class At(nn.Module):
    """A function of z times a weight of ones."""

    def __init__(self, function, m):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(m, dtype=torch.float64))

    def forward(self, z):
        h = self.function(z * self.weight)
        return h if h.ndim > 1 else h[:, None]


def derivatives(function, point):
    """Our (value, J) and reverse mode's, of two samples at the point."""
    z = torch.tensor([point, point], dtype=torch.float64)
    decoder = At(function, len(point))
    with torch.no_grad():
        ours = decode_with_jacobian(decoder, z, backend="torch")
    with sdpa_kernel(SDPBackend.MATH):
        # [1, *out, 1, m]
        moved = torch.autograd.functional.jacobian(decoder, z[:1])
    jacobian = moved[0, ..., 0, :].movedim(-1, 0)
    return ours, (decoder(z).detach(), jacobian.expand(2, *jacobian.shape))


@pytest.mark.parametrize("name", [*CASES, *INFINITE])
def test_derivative(name):
    ours, exact = derivatives(*(CASES | INFINITE)[name])
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert (name in CASES) == bool(torch.isfinite(exact[1]).all())


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_loss_are_finite(name):
    function, point = CASES[name]
    z = torch.tensor([point, point], dtype=torch.float64)
    decoder = At(function, len(point))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Linearizer(decoder, z).plan(2).obstacles == []
        for chunk_size in (None, 1):
            loss, gradients = loss_and_gradients(decoder, z, "torch", chunk_size=chunk_size)
            assert all(torch.isfinite(t).all() for t in (loss, *gradients))


@pytest.mark.parametrize("name", CASES)
def test_second_order_is_finite(name):
    """J's own gradients, through autograd."""
    function, point = CASES[name]
    decoder = At(function, len(point))
    z = torch.tensor([point, point], dtype=torch.float64, requires_grad=True)
    jacobian = decode_with_jacobian(decoder, z, backend="torch")[1]
    gradients = torch.autograd.grad(
        jacobian.square().sum(), [z, decoder.weight], allow_unused=True, materialize_grads=True
    )
    assert all(torch.isfinite(g).all() for g in gradients)


def test_hardsigmoid():
    """PyTorch's own derivative is a sixth in single precision."""
    z = torch.tensor([KINKS, KINKS], dtype=torch.float64)
    ours = decode_with_jacobian(At(F.hardsigmoid, len(KINKS)), z, backend="torch")
    exact = derivatives(lambda h: F.relu6(h + 3) / 6, KINKS)[1]
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
