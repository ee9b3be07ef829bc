"""Benchmarks of what else a decoder's Jacobian is used for."""
