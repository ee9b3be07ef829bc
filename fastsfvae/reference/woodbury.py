"""Log-determinant and explained error of the low-rank Gaussian, from m x m quantities only.

With A = S G S, C = cI + A and S = diag(sqrt h), the similarity S^-1 C S = cI + G H gives, without a
square root (whose derivative is infinite at h = 0),

    log_det   = logdet(I + G H / c)
    explained = p^T (cI + H G)^-1 H p
"""

import torch
from torch import Tensor


def woodbury(gram: Tensor, projection: Tensor, latent_var: Tensor, noise_var: Tensor):
    """Return ``(log_det [B], explained [B])``.

    Args:
        gram: G, ``[B, m, m]``.
        projection: p, ``[B, m]``.
        latent_var: h, ``[B, m]``.
        noise_var: c, ``[B]``.
    """
    m = gram.shape[-1]
    eye = torch.eye(m, dtype=gram.dtype, device=gram.device)
    c = noise_var[:, None, None]
    hg = latent_var.unsqueeze(-1) * gram
    log_det = torch.linalg.slogdet(eye + hg / c).logabsdet
    hp = latent_var * projection
    y = torch.linalg.solve(c * eye + hg, hp)
    return log_det, (projection * y).sum(-1)
