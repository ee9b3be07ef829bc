"""Fixtures of the kernels' tests."""

from tests._triton import poisoned_empty as poisoned_empty
