"""A decoder's Jacobian by carrying m tangents through it."""

from fastsfvae.jacobian.api import (
    Pullback as Pullback,
)
from fastsfvae.jacobian.api import (
    decode_with_jacobian as decode_with_jacobian,
)
from fastsfvae.jacobian.api import (
    pullback as pullback,
)
