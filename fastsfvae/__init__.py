"""Sampling-free Gaussian VAEs."""
__version__ = "0.1.0"
