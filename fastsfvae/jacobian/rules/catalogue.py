"""All tangent rules: importing this module fills the registry."""

from fastsfvae.jacobian.rules import activation as activation
from fastsfvae.jacobian.rules import arithmetic as arithmetic
from fastsfvae.jacobian.rules import arrange as arrange
from fastsfvae.jacobian.rules import attention as attention
from fastsfvae.jacobian.rules import complex as complex
from fastsfvae.jacobian.rules import constant as constant
from fastsfvae.jacobian.rules import convolution as convolution
from fastsfvae.jacobian.rules import determinant as determinant
from fastsfvae.jacobian.rules import distance as distance
from fastsfvae.jacobian.rules import elementwise as elementwise
from fastsfvae.jacobian.rules import factorize as factorize
from fastsfvae.jacobian.rules import fourier as fourier
from fastsfvae.jacobian.rules import indexing as indexing
from fastsfvae.jacobian.rules import linalg as linalg
from fastsfvae.jacobian.rules import linear as linear
from fastsfvae.jacobian.rules import matrix_function as matrix_function
from fastsfvae.jacobian.rules import norm as norm
from fastsfvae.jacobian.rules import pair as pair
from fastsfvae.jacobian.rules import pieces as pieces
from fastsfvae.jacobian.rules import piecewise as piecewise
from fastsfvae.jacobian.rules import pool as pool
from fastsfvae.jacobian.rules import reduction as reduction
from fastsfvae.jacobian.rules import scan as scan
from fastsfvae.jacobian.rules import scatter as scatter
from fastsfvae.jacobian.rules import shape as shape
from fastsfvae.jacobian.rules import softmax as softmax
from fastsfvae.jacobian.rules import special as special
from fastsfvae.jacobian.rules import spectrum as spectrum

# Operations whose results carry no tangent, although they are floating point: piecewise constant,
# cut off on purpose, or made from the shape alone.
NOT_DIFFERENTIABLE = frozenset(
    """
    detach detach_copy floor ceil round trunc fix sign heaviside bernoulli floor_divide
    zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full
    new_empty new_empty_strided one_hot nan_to_num_mask histc bincount
    """.split()
)

# Operations whose rules and adjoints are right for complex values as well; any other one is refused
# where a complex value carries tangents.
COMPLEX: frozenset[str] = frozenset()
