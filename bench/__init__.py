"""Benchmarks: one suite per operation, peers interleaved in the same run."""
