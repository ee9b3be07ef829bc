"""log det C and C^-1 of C = G + cI, c = 0 allowed, with the float64 rescue of lost samples.

Its derivative is d log det C = tr(C^-1 dG) + tr(C^-1) dc. PyTorch gives a root of C^-1, by which a
gradient M J = R^T (R J) keeps in float32 what float64 has found: rounded, C^-1 itself has lost it
where the square of J's condition exceeds 1 / eps. The pivot rule and what is singular are
`fastsfvae.ops.woodbury`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsfvae._ranges import ranged
from fastsfvae.ops.elbo import Parts
from fastsfvae.ops.gram_project import full_products
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
def log_det_of_parts(parts: Parts, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log det C, C^-1, lost) on the Triton kernels, up to m = 64; nothing waits for the host.

    With a c one launch factorises all samples, and two more rescue. Without, PyTorch does, in about
    ten launches a pivot, for every sample in float32 and in float64. A sample is lost as well where
    float32 products with C^-1 would keep fewer than half of their digits: C_kk (C^-1)_kk, which no
    scaling of the latents changes, is above 1 / sqrt(eps).

    Args:
        parts: of G.
        c: > 0, 0-d float32; None for 0.
    """
    G, p, _ = parts.sums
    if c is not None:
        # h = 1: log det (I + G/c), and K = C^-1.
        ones, each = torch.ones_like(p[0]), c.expand(p.shape[1])
        solved = low_rank_of_partials(parts.sums, ones, each, None, parts.redo)
        value, inverse, lost = solved.first.log_det, solved.first.K, solved.first.lost
        value = value + p.shape[-1] * c.log()
        C_diag = solved.gram.diagonal(dim1=-2, dim2=-1) + c
    else:
        gram = G.sum(0)
        C_diag = gram.diagonal(dim1=-2, dim2=-1)
        value, root, lost = log_det_native(gram, None)
        if parts.redo is not None:
            again, _, _ = parts.redo(lost)
            # What was not lost is not in it.
            whole = torch.where(lost[:, None, None], again.sum(0), gram.double())
            redone = log_det_native(whole, None, dtype=gram.dtype)
            value = torch.where(lost, redone.value, value)
            root = torch.where(lost[:, None, None], redone.root, root)
            lost = lost & redone.lost
        with full_products(root):
            inverse = root.mT @ root
    inflated = inverse.diagonal(dim1=-2, dim2=-1) * C_diag
    return value, inverse, lost | (inflated > torch.finfo(G.dtype).eps ** -0.5).any(-1)


def _double(c: Tensor | None) -> Tensor | None:
    return None if c is None else c.double()
