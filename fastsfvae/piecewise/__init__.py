"""Exact Gaussian integrals of piecewise affine decoders with one or two latents."""
