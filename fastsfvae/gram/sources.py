"""Where a chunk's Gram comes from, and its cotangents go to.

`Written` has J at hand. `Unwritten` has what goes into the decoder's last layer, which kernels take
together with the Gram, and so has `Contracted`, whose last layer is linear: the same functions, no
J. `ThroughLayer` makes J where `Contracted` would lose digits.
"""

from __future__ import annotations

from torch import Tensor

from fastsfvae.gram.contracted import Contracted, ThroughLayer
from fastsfvae.gram.tail import Unwritten
from fastsfvae.gram.written import Written
from fastsfvae.jacobian.plan.last_layer import LastLayer, Linear
from fastsfvae.jacobian.rules.jet import Jet

ChunkGram = Written | Unwritten | Contracted | ThroughLayer


def gram_of(result: Jet | LastLayer, x: Tensor | None, backend: str) -> ChunkGram:
    """The Gram of a chunk.

    Args:
        result: what its plan returned.
        x: data ``[b, *out]``; None for the decoder's own output, so that r = 0.
        backend: "torch" or "triton".
    """
    if not isinstance(result, LastLayer):
        return Written(result, x, backend)
    if isinstance(result.tail, Linear):
        contracted = Contracted(result.source, result.tail, x)
        return contracted if contracted.contracts else ThroughLayer(result.source, result.tail, x)
    return Unwritten(result.tail, x)
