"""Log-volumes and isometry losses with all gradients: `python -m bench.uses.volume`.

    log-volume   sf.log_volume against slogdet of J^T J, J by vmap(jacfwd) and by a vmap of jvp,
                 differentiated by autograd.
    isometry     sf.isometry_loss with one probe a sample against the code of its paper (a double
                 backward for J v, one more pass for J^T J v) with the same probes; and exactly, for
                 every latent, which that code does not do.

Every candidate is compared with float64 before it is timed, and all take turns. Peak memory is
measured in a process of its own for each.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastsfvae as sf
from bench.command import ROOT, make_parser
from bench.memory import rise
from bench.peers import Jacobian, vmap_jacfwd, vmap_jvp
from bench.problems import CHECKED, TOLERANCE, build_problem, relative_error
from bench.uses.table import Row, compare, publish

OURS, FEW, PUBLISHED = "fastsfvae", "fastsfvae, chunk_size=2", "published code"
# Workloads and batch sizes.
CASES = {"celeba16": 64, "tanh": 20}
# A value of the decoder at z.
Value = Callable[[nn.Module, Tensor], Tensor]


def ours(decoder: nn.Module, z: Tensor, **settings: Any) -> Tensor:
    return sf.log_volume(decoder, z, reduction="mean", **settings)


def slogdet(jacobian: Callable[[nn.Module], Jacobian], decoder: nn.Module, z: Tensor) -> Tensor:
    _, J = jacobian(decoder)(z)
    return 0.5 * torch.linalg.slogdet(J @ J.mT).logabsdet.mean()


def probes_of(z: Tensor) -> Tensor:
    """The same for every candidate."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(z.shape, generator=g).to(z.dtype)


def estimated(decoder: nn.Module, z: Tensor) -> Tensor:
    return sf.isometry_loss(decoder, z, probes=probes_of(z))


def published(decoder: nn.Module, z: Tensor) -> Tensor:
    """`relaxed_distortion_measure` as it stands in the paper's repository, eta = 0."""
    v, z = probes_of(z), z.view_as(z)
    Jv = torch.autograd.functional.jvp(decoder, z, v=v, create_graph=True)[1]
    trace = torch.sum(Jv.flatten(1) ** 2, dim=1).mean()
    JTJv = torch.autograd.functional.vjp(decoder, z, v=Jv, create_graph=True)[1].flatten(1)
    return torch.sum(JTJv**2, dim=1).mean() / trace**2


def isometry(jacobian: Callable[[nn.Module], Jacobian], decoder: nn.Module, z: Tensor) -> Tensor:
    _, J = jacobian(decoder)(z)
    G = J @ J.mT
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1).mean()
    return G.square().sum((-2, -1)).mean() / trace**2


PEERS = {"vmap(jacfwd)": vmap_jacfwd, "vmap(jvp)": vmap_jvp}
USES: dict[str, dict[str, Value]] = {
    "log-volume": {OURS: ours, FEW: partial(ours, chunk_size=2)}
    | {name: partial(slogdet, J) for name, J in PEERS.items()},
    "isometry, one probe": {OURS: estimated, PUBLISHED: published},
    "isometry, exact": {OURS: sf.isometry_loss}
    | {name: partial(isometry, J) for name, J in PEERS.items()},
}
# What each use is checked against, in float64.
ORACLES: dict[str, Value] = {
    "log-volume": partial(slogdet, vmap_jacfwd),
    "isometry, one probe": published,
    "isometry, exact": partial(isometry, vmap_jacfwd),
}


def gradients(value: Value, decoder: nn.Module, z: Tensor) -> list[Tensor]:
    """The value, and its gradients by z and every parameter."""
    found, leaves = value(decoder, z), [z, *decoder.parameters()]
    grads = torch.autograd.grad(found, leaves, allow_unused=True, materialize_grads=True)
    return [found.detach(), *grads]


def error_of(use: str, name: str, decoder: nn.Module, z: Tensor) -> float:
    """Against float64, of few samples.

    Raises:
        RuntimeError: where it is wrong.
    """
    small = z.detach()[:CHECKED].requires_grad_()
    exact = copy.deepcopy(decoder).double()
    want = gradients(ORACLES[use], exact, small.detach().double().requires_grad_())
    got = gradients(USES[use][name], decoder, small)
    # The last bias moves no Jacobian.
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if w.any()]
    error = relative_error(*map(list, zip(*pairs, strict=True)))
    if not error <= TOLERANCE["float32"]:
        raise RuntimeError(f"{use} of {name} is wrong by {error:.1e}")
    return error


def peak(use: str, case: str, name: str) -> int:
    """Bytes, measured in a child process.

    Raises:
        RuntimeError: where the child fails, with its last line.
    """
    command = [sys.executable, "-m", "bench.uses.volume", "--peak", use, case, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}: {(done.stderr.splitlines() or ['?'])[-1]}")
    return int(done.stdout)


def main() -> None:
    """Measure, print and write bench/results/uses/volume.csv."""
    parser = make_parser("uses.volume", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each candidate (default 5)")
    parser.add_argument("--peak", nargs=3, metavar=("USE", "CASE", "NAME"), help="one child's part")
    options = parser.parse_args()
    if options.peak:
        use, case, name = options.peak
        problem, value = build_problem(case, CASES[case]), USES[use][name]
        gradients(value, problem.decoder, problem.head(2).mean)
        print(rise(lambda: gradients(value, problem.decoder, problem.mean)))
        return
    rows: list[Row] = []
    for case, batch in CASES.items():
        problem = build_problem(case, batch)
        decoder, z = problem.decoder, problem.mean
        for use, values in USES.items():
            notes = {}
            for name in values:
                error = error_of(use, name, decoder, z)
                notes[name] = f"error {error:.1e}, peak {peak(use, case, name) / 1e6:.1f} MB"
            runs = {n: partial(gradients, v, decoder, z) for n, v in values.items()}
            label = f"{case}, B = {batch}"
            rows += [
                r._replace(note=notes[r.method]) for r in compare(label, use, runs, options.rounds)
            ]
    publish("volume", rows)


if __name__ == "__main__":
    main()
