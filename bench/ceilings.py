"""What this device can do at most, measured: copy bandwidth and the rate of a matrix product.

Random data on purpose: products of zeros run faster than any real ones.
"""

from __future__ import annotations

import torch

from bench.measure import Case, Context, Prepared
from bench.problems import products, relative_error

# float32, with TF32 products, and bfloat16: the names that other rows carry as their dtype.
PRODUCTS = ("float32", "tf32", "bfloat16")


def part(context: Context) -> None:
    """Measure the copy and the three products."""
    context.run(copy_case(context.device, context.quick))
    for name in PRODUCTS:
        with products(name):
            context.run(product_case(context.device, context.quick, name))


def copy_case(device: str, quick: bool) -> Case:
    """A tensor far larger than any cache into another."""
    numel = 2**16 if quick else 2**28 if device == "cuda" else 2**26

    def prepare() -> Prepared:
        source = torch.randn(numel, device=device)
        target = torch.full_like(source, float("nan"))
        return Prepared(
            [lambda: (target.copy_(source),)],
            lambda outputs: 0.0 if torch.equal(outputs[0], source) else float("nan"),
        )

    labels = "ceiling", "copy_", "forward", f"n={numel}", "float32"
    return Case(*labels, prepare, bytes=2 * 4 * numel)


def product_case(device: str, quick: bool, name: str) -> Case:
    """A square product, large enough that its arithmetic alone counts."""
    size = 128 if quick else 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32

    def prepare() -> Prepared:
        g = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(size, size, generator=g, device=device).to(dtype) for _ in range(2))

        def error(outputs):
            want = a[:64].double() @ b.double()
            return relative_error([outputs[0][:64]], [want])

        return Prepared([lambda: (torch.mm(a, b),)], error)

    labels = "ceiling", "mm", "forward", f"{size}x{size}x{size}", name
    return Case(*labels, prepare, flops=2 * size**3)


def compared(rows):
    return []
