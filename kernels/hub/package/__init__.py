"""Gram matrices of batched Jacobians and the low-rank Gaussians that they belong to, in Triton.

Per sample, with a Jacobian J in rows (m tangents of n numbers, "tangent-major") and a residual r:

    gram_project      G = J J^T,  p = J r,  rr = r^T r
    woodbury          of S = diag(sqrt h) and C = cI + S G S:  log det (C / c)  and  p^T S C^-1 S p
    low_rank_terms    both in one, with float64 for samples that float32 cannot resolve

These are all that the density of r under N(0, cI + J^T diag(h) J) needs. First derivatives are
written by hand.
"""

from .functions import (
    GramProject,
    LowRankTerms,
    WoodburyTerms,
    gram_project,
    low_rank_terms,
    woodbury,
)

__all__ = [
    "GramProject",
    "LowRankTerms",
    "WoodburyTerms",
    "gram_project",
    "low_rank_terms",
    "woodbury",
]
