"""The kernel as users load it, and the marker by which kernel-builder's own runs choose tests."""

from pathlib import Path

import pytest

from kernels import get_local_kernel


def pytest_configure(config):
    """Declare the marker where no configuration of kernel-builder's does."""
    config.addinivalue_line("markers", "kernels_ci: a test for kernel-builder's own runs")


@pytest.fixture(scope="session")
def kernel():
    """The build for the installed PyTorch."""
    return get_local_kernel(Path(__file__).parents[1])
