"""The pullback metric and its derivative against torch.func: `python -m bench.uses.geometry`.

    G        G = J^T J at some points
    dG       G and its derivative in z. "vmap jacrev of jacfwd" and "vmap jacfwd of jacfwd"
             differentiate one point's G; "vmap Hessian" makes the decoder's Hessian H and
             dG_ijl = sum_k H_kil J_kj + J_ki H_kjl of it.

Ours lead the table, and ratios are to their time. Before it is timed every candidate is compared
with float64, which reverse mode over reverse mode confirms at one point; all take turns. Both
decoders are of operations whose derivatives torch.func has right; behind layer norm and instance
norm its dG is wrong (docs/geometry.md).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastsfvae as sf
from bench.command import make_parser
from bench.uses.table import Row, compare, publish

# Latents with the points at which they are tried.
SIZES = ((2, 1), (2, 64), (8, 16), (16, 8))
OURS, REVERSE = "sf.metric", "vmap jacrev of jacfwd"
# Of float32 entries, by the largest, against float64.
TOLERANCE = 1e-5
Entries = Callable[[Tensor], Tensor]


def decoders(m: int) -> dict[str, nn.Module]:
    """Two smooth ones of 784 outputs, drawn at random."""
    torch.manual_seed(0)
    up = {"kernel_size": 4, "stride": 2, "padding": 1}
    mlp = nn.Linear(m, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 784)
    lift = nn.Linear(m, 32 * 49), nn.SiLU(), nn.Unflatten(1, (32, 7, 7))
    layers = nn.ConvTranspose2d(32, 16, **up), nn.SiLU(), nn.ConvTranspose2d(16, 1, **up)
    made = {
        f"MLP {m}-256-256-784": nn.Sequential(*mlp, nn.Sigmoid()),
        f"conv {m}-32x7x7-1x28x28": nn.Sequential(*lift, *layers, nn.Sigmoid()),
    }
    # What is recorded of parameters would be for nothing; under no_grad torch.func has no second
    # forward derivative of SiLU.
    return {name: decoder.requires_grad_(False) for name, decoder in made.items()}


def of_one(decoder: nn.Module) -> Entries:
    """A point's output as a vector."""
    return lambda s: decoder(s[None])[0].flatten()


def gram_of_one(decoder: nn.Module, jac: Callable = torch.func.jacfwd) -> Entries:
    """A point's G, with J by torch.func."""

    def gram(s: Tensor) -> Tensor:
        J = jac(of_one(decoder))(s)
        return J.mT @ J

    return gram


def hessian_of_one(decoder: nn.Module) -> Entries:
    """A point's dG by the Hessian of the decoder."""

    def derivative(s: Tensor) -> Tensor:
        J = torch.func.jacfwd(of_one(decoder))
        half = torch.einsum("kil,kj->ijl", torch.func.jacfwd(J)(s), J(s))
        return half + half.transpose(0, 1)

    return derivative


def grams(decoder: nn.Module) -> dict[str, Entries]:
    """What makes G."""
    return {OURS: sf.metric(decoder), "vmap jacfwd": torch.func.vmap(gram_of_one(decoder))}


def derivatives(decoder: nn.Module) -> dict[str, Entries]:
    """What makes dG."""
    metric, one = sf.metric(decoder), gram_of_one(decoder)
    return {
        OURS: lambda z: metric(z, derivative=True)[1],
        REVERSE: torch.func.vmap(torch.func.jacrev(one)),
        "vmap jacfwd of jacfwd": torch.func.vmap(torch.func.jacfwd(one)),
        "vmap Hessian": torch.func.vmap(hessian_of_one(decoder)),
    }


def exact(decoder: nn.Module, z: Tensor) -> dict[str, Tensor]:
    """G and dG in float64: by forward mode, which reverse mode confirms at the first point.

    Raises:
        RuntimeError: the two do not agree.
    """
    decoder, z = copy.deepcopy(decoder).double(), z.double()
    forward, reverse = gram_of_one(decoder), gram_of_one(decoder, torch.func.jacrev)
    # Few entries at a time: each holds the backward of every output.
    first = {"G": reverse, "dG": torch.func.jacrev(reverse, chunk_size=8)}
    found = {"G": torch.func.vmap(forward)(z), "dG": torch.func.vmap(hessian_of_one(decoder))(z)}
    for key, value in found.items():
        check(lambda one, key=key: first[key](one[0])[None], z[:1], value[:1], 1e-10)
    return found


def check(run: Entries, z: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest error of an entry, by the largest entry.

    Raises:
        RuntimeError: above `tolerance`.
    """
    error = float((run(z) - want).abs().max() / want.abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"wrong by {error:.1e}")
    return error


def measure(m: int, points: int, rounds: int) -> list[Row]:
    """The rows of all decoders with m latents."""
    rows = []
    for name, decoder in decoders(m).items():
        z = torch.randn(points, m)
        want, case = exact(decoder, z), f"{name}, {points} points"
        for quantity, candidates in (("G", grams(decoder)), ("dG", derivatives(decoder))):
            errors = {n: check(run, z, want[quantity]) for n, run in candidates.items()}
            runs = {n: functools.partial(run, z) for n, run in candidates.items()}
            found = compare(case, quantity, runs, rounds)
            rows += [row._replace(value=errors[row.method], note="error") for row in found]
    return rows


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = make_parser("uses.geometry", __doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    publish("geometry", [row for m, points in SIZES for row in measure(m, points, rounds)])


if __name__ == "__main__":
    main()
