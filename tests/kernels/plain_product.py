"""A matrix product of no other purpose than that its instructions can be counted by hand."""

import triton
import triton.language as tl


@triton.jit
def product_kernel(x_ptr, w_ptr, y_ptr, inner, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(0, inner, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + rows[:, None] * inner + k[None, :])
        w = tl.load(w_ptr + k[:, None] * COLUMNS + columns[None, :])
        total = tl.dot(x, w, total)
    tl.store(y_ptr + rows[:, None] * COLUMNS + columns[None, :], total)
