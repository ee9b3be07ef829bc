"""What this device can do at most, measured: copy bandwidth and the rate of a matrix product.

Random data on purpose: products of zeros run faster than any real ones.
"""

from __future__ import annotations

import torch

from bench.gpu_measure import Case, Context, products

# float32, with TF32 products, and bfloat16: the names that other rows carry as their dtype.
PRODUCTS = ("float32", "tf32", "bfloat16")


def section(context: Context) -> None:
    """Measure the copy and the three products."""
    context.run(_copy(context))
    for name in PRODUCTS:
        with products(name):
            context.run(_product(context, name))


def _copy(context: Context) -> Case:
    numel = 2**16 if context.quick else 2**28

    source = torch.randn(numel, device=context.device)
    target = torch.full_like(source, float("nan"))
    return Case(
        *("ceiling", "copy_", "forward", f"n={numel}", "float32"),
        lambda: [lambda: (target.copy_(source),)],
        lambda outputs: 0.0 if torch.equal(outputs[0], source) else float("nan"),
        bytes=2 * 4 * numel,
    )


def _product(context: Context, name: str) -> Case:
    size = 128 if context.quick else 8192
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    g = torch.Generator(context.device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=g, device=context.device).to(dtype) for _ in range(2))

    def error(outputs):
        want = a[:64].double() @ b.double()
        return float((outputs[0][:64] - want).norm() / want.norm())

    return Case(
        *("ceiling", "mm", "forward", f"{size}x{size}x{size}", name),
        lambda: [lambda: (torch.mm(a, b),)],
        error,
        flops=2 * size**3,
    )
