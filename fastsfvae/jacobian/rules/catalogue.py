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
from fastsfvae.jacobian.rules import order as order
from fastsfvae.jacobian.rules import pair as pair
from fastsfvae.jacobian.rules import pieces as pieces
from fastsfvae.jacobian.rules import piecewise as piecewise
from fastsfvae.jacobian.rules import places as places
from fastsfvae.jacobian.rules import pool as pool
from fastsfvae.jacobian.rules import recurrent as recurrent
from fastsfvae.jacobian.rules import reduction as reduction
from fastsfvae.jacobian.rules import sampling as sampling
from fastsfvae.jacobian.rules import scan as scan
from fastsfvae.jacobian.rules import scatter as scatter
from fastsfvae.jacobian.rules import scatter_reduce as scatter_reduce
from fastsfvae.jacobian.rules import shape as shape
from fastsfvae.jacobian.rules import softmax as softmax
from fastsfvae.jacobian.rules import special as special
from fastsfvae.jacobian.rules import spectrum as spectrum
from fastsfvae.jacobian.rules import spelling as spelling
from fastsfvae.jacobian.rules import unpool as unpool

# Operations whose results carry no tangent, although they are floating point: piecewise constant,
# cut off on purpose, or made from the shape alone.
NOT_DIFFERENTIABLE = frozenset(
    """
    detach detach_copy floor ceil round trunc fix sign heaviside bernoulli floor_divide
    zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full
    new_empty new_empty_strided one_hot histc bincount
    """.split()
)

# Operations whose rules and adjoints are right for complex values as well; any other one is refused
# where a complex value carries tangents.
COMPLEX = frozenset(
    """
    abs absolute acos add addcdiv addcmul addmm adjoint alias angle arccos arcsin arcsinh arctan
    arctanh asin asinh atan atanh atleast_1d atleast_2d atleast_3d baddbmm bmm broadcast_to cat
    channel_shuffle chunk clone col2im complex concat concatenate conj_physical constant_pad_nd
    contiguous copy cos cosh cumprod cumsum diag_embed diagonal diagonal_scatter div divide einsum
    exp exp2 expand expand_as expm1 fill flatten flip gather im2col imag index index_add index_copy
    index_fill index_put index_select lerp linalg_matmul linalg_vector_norm linear log log10 log1p
    log2 mH mT masked_fill matmul matrix_H mean mm moveaxis movedim mul multiply mv narrow neg
    negative numpy_T pad permute pixel_shuffle pixel_unshuffle polar positive pow prod ravel real
    reciprocal repeat repeat_interleave reshape reshape_as resolve_conj resolve_neg roll rot90 rsqrt
    rsub scatter scatter_add select select_scatter sgn sigmoid sin sinc sinh slice slice_scatter
    special_exp2 special_expit special_expm1 special_log1p split split_with_sizes sqrt square
    squeeze stack std std_mean sub subtract sum swapaxes swapdims t take_along_dim tan tanh
    tensor_split tile to transpose tril triu true_divide type_as unbind unflatten unfold
    unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze var var_mean view view_as
    view_as_complex view_as_real where zero _conj _conj_physical _fft_c2c _fft_c2r _fft_r2c
    _unsafe_view
    """.split()
)
