"""Operands of other dtypes than the latents': no slope is rounded to a coarser one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.jacobian.exactness import assert_right
from tests.jacobian.test_rules import compare

B, M = 4, 3
COUNTS = torch.tensor([1, 3, 7, 3, 9, 11])


class Decoder(nn.Module):
    def __init__(self, function, dtype):
        super().__init__()
        self.lift, self.function, self.dtype = nn.Linear(M, 6), function, dtype
        self.register_buffer("counts", COUNTS)

    def forward(self, z):
        counts = self.counts / 3 if self.dtype.is_floating_point else self.counts
        return self.function(self.lift(z), counts.to(self.dtype))


FUNCTIONS = {
    "div": lambda h, n: h / n,
    "div by": lambda h, n: n / (h.square() + 1),
    "addcdiv": lambda h, n: torch.addcdiv(h, h.sin(), n),
    "pow": lambda h, n: (h.square() + 1) ** n,
    "pow of": lambda h, n: n**h,
    "mul": lambda h, n: (h * n).sin(),
    "atan2": lambda h, n: torch.atan2(h, n),
    "hypot": lambda h, n: torch.hypot(h, n.to(torch.float32)),
    "remainder": lambda h, n: torch.remainder(3 * h, n) * h,
    "xlogy": lambda h, n: torch.xlogy(n, h.square() + 1),
    "where": lambda h, n: torch.where(n > 3, h, n) * h,
    "maximum": lambda h, n: torch.maximum(h, n / 7) * h,
    "sub": lambda h, n: torch.sub(h, n, alpha=2).sin(),
    "lerp": lambda h, n: torch.lerp(h, h.sin(), n.to(h.dtype) / 3),
}


# PyTorch squares these operands in their own dtype, so its derivative is the rounded one: the
# oracle gets the same numbers in float64.
ROUNDED = {("addcdiv", torch.float32), ("atan2", torch.float32)}
DTYPES = (torch.int64, torch.int32, torch.float32)
# addcdiv takes no integers.
PAIRS = [(n, d) for n in FUNCTIONS for d in DTYPES if n != "addcdiv" or d.is_floating_point]


@pytest.mark.parametrize("name, dtype", PAIRS)
def test_right(name, dtype):
    torch.manual_seed(0)
    decoder = Decoder(FUNCTIONS[name], dtype).double()
    oracle = None
    if (name, dtype) in ROUNDED:
        oracle = Decoder(lambda h, n: FUNCTIONS[name](h, n.double()), dtype).double()
        oracle.load_state_dict(decoder.state_dict())
    assert_right(decoder, torch.randn(B, M, dtype=torch.float64), oracle=oracle)


class Parts(nn.Module):
    """Complex numbers behind one real column: their gradients begin at odd places of memory."""

    def __init__(self, apart):
        super().__init__()
        self.lift, self.apart = nn.Linear(M, 6, dtype=torch.float64), apart

    def forward(self, z):
        h = torch.tanh(self.lift(z))
        values = torch.complex(h[:, :3], h[:, 3:])
        return torch.cat([h[:, :1], self.apart(values * values).flatten(1)], 1)


def test_complex_behind_one_column():
    torch.manual_seed(0)
    decoder = Parts(torch.view_as_real)
    oracle = Parts(lambda c: torch.stack([c.real, c.imag], -1))
    oracle.lift = decoder.lift
    z = torch.randn(B, M, dtype=torch.float64)
    compare(decoder, z, oracle=oracle)
    assert_right(decoder, z, oracle=oracle)
