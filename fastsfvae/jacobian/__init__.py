"""A decoder's Jacobian by carrying m tangents through it."""

from fastsfvae.jacobian.api import decode_with_jacobian as decode_with_jacobian
from fastsfvae.jacobian.backend import resolve_backend as resolve_backend
from fastsfvae.jacobian.check import DecoderReport as DecoderReport
from fastsfvae.jacobian.check import LayerReport as LayerReport
from fastsfvae.jacobian.check import check_decoder as check_decoder
from fastsfvae.jacobian.run.chunks import flatten_in_memory_order as flatten_in_memory_order
from fastsfvae.jacobian.run.chunks import map_chunks as map_chunks
