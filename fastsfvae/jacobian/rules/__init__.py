"""Tangent rules, one per ATen operation; importing this package fills the registry."""

from fastsfvae.jacobian.rules import (
    activation,
    arithmetic,
    arrange,
    attention,
    convolution,
    elementwise,
    indexing,
    linear,
    norm,
    pieces,
    pool,
    reduction,
    scatter,
    shape,
    softmax,
)

# Operations whose results carry no tangent, although they are floating point: piecewise constant,
# cut off on purpose, or made from the shape alone.
NOT_DIFFERENTIABLE = frozenset(
    """
    detach detach_copy floor ceil round trunc fix sign sgn heaviside bernoulli floor_divide
    zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full
    new_empty new_empty_strided one_hot nan_to_num_mask histc bincount
    """.split()
)

__all__ = [
    "NOT_DIFFERENTIABLE",
    "activation",
    "arithmetic",
    "arrange",
    "attention",
    "convolution",
    "elementwise",
    "indexing",
    "linear",
    "norm",
    "pieces",
    "pool",
    "reduction",
    "scatter",
    "shape",
    "softmax",
]
