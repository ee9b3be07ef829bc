"""log det C and C^-1 of C = G + cI, c = 0 allowed, with the float64 rescue of lost samples.

Its derivative is d log det C = tr(C^-1 dG) + tr(C^-1) dc. The pivot rule and what is singular are
`fastsfvae.ops.woodbury`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae._ranges import ranged
from fastsfvae.ops.elbo import Parts
from fastsfvae.ops.low_rank import Redo, low_rank_of_partials
from fastsfvae.ops.woodbury import LogDet, log_det_native


@ranged("solve")
def log_det_of_sums(
    gram: Tensor, c: Tensor | None, scale: Tensor | None, redo: Redo | None
) -> LogDet:
    """By PyTorch. Lost samples are rescued on the CPU alone: see `low_rank_of_sums`.

    Args:
        gram: G, ``[B, m, m]``.
        c: > 0, 0-d; None for 0.
        scale: as in `log_det_native`.
        redo: as in `low_rank_of_sums`.
    """
    found = log_det_native(gram, c, scale)
    if redo is None or not gram.is_cpu or not bool(found.lost.any()):
        return found
    lost = found.lost.nonzero().squeeze(-1)
    again, _, _ = redo(lost)
    for whole, part in zip(found, log_det_native(again, _double(c), dtype=gram.dtype), strict=True):
        whole[lost] = part
    return found


@ranged("solve")
def log_det_of_parts(parts: Parts, c: Tensor | None) -> LogDet:
    """On the Triton kernels, up to m = 64; nothing waits for the host.

    With a c one launch factorises all samples, and two more rescue. Without, PyTorch does, in about
    ten launches a pivot, for every sample in float32 and in float64.

    Args:
        parts: of G.
        c: > 0, 0-d float32; None for 0.
    """
    G, p, _ = parts.sums
    if c is not None:
        # h = 1: log det (I + G/c), and K = C^-1.
        ones, each = torch.ones_like(p[0]), c.expand(p.shape[1])
        solved = low_rank_of_partials(parts.sums, ones, each, None, parts.redo).first
        return LogDet(solved.log_det + p.shape[-1] * c.log(), solved.K, solved.lost)
    gram = G.sum(0)
    found = log_det_native(gram, None)
    if parts.redo is None:
        return found
    again, _, _ = parts.redo(found.lost)
    # What was not lost is not in it.
    marked = found.lost[:, None, None]
    whole = torch.where(marked, again.sum(0), gram.double())
    value, inverse, lost = log_det_native(whole, None, dtype=gram.dtype)
    return LogDet(
        torch.where(found.lost, value, found.value),
        torch.where(marked, inverse, found.inverse),
        found.lost & lost,
    )


def _double(c: Tensor | None) -> Tensor | None:
    return None if c is None else c.double()
