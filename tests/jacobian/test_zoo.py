"""Every pattern of the zoo against reverse mode, or refused in one line that says what to do."""

from __future__ import annotations

import pytest
import torch

import fastsfvae as sf
from tests.jacobian.exactness import assert_right
from tests.jacobian.zoo import ZOO
from tests.jacobian.zoo.pattern import B, M


def build(name, make=None):
    """The decoder in float64, latents and further arguments."""
    torch.manual_seed(0)
    made = (make or ZOO[name].make)()
    decoder, *args = made if isinstance(made, tuple) else (made,)
    training = decoder.training and ZOO[name].refused is not None
    decoder = decoder.double().train(training)
    args = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    return decoder, torch.randn(B, M, dtype=torch.float64), args


@pytest.mark.parametrize("name", [n for n, p in ZOO.items() if p.refused is None])
def test_right(name):
    decoder, z, args = build(name)
    make = ZOO[name].oracle
    oracle = build(name, make)[0] if make else None
    assert_right(decoder, z, *args, swept=ZOO[name].swept, oracle=oracle)


@pytest.mark.parametrize("name", [n for n, p in ZOO.items() if p.refused is not None])
def test_refused(name):
    decoder, z, args = build(name)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=ZOO[name].refused) as raised:
        sf.decode_with_jacobian(decoder, z, *args)
    assert "\n" not in str(raised.value)


def test_size():
    """The zoo is as large as is said of it."""
    assert len(ZOO) >= 60
