"""What `import fastsfvae` costs and touches."""

import statistics
import subprocess
import sys
import types

import pytest

import fastsfvae as sf

HEAVY = ("triton", "matplotlib", "tyro", "rich", "sympy", "torch.fx.experimental.proxy_tensor")


def test_import_loads_nothing_heavy_beyond_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import fastsfvae; "
        f"new = set(sys.modules) - before; bad = [m for m in {HEAVY!r} if m in new]; "
        "assert not bad, bad; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tab_shows_the_interface_alone():
    for module in (sf, sf.evaluate):
        shown = {name for name in dir(module) if not name.startswith("__")}
        assert shown == set(module.__all__)
        assert not any(
            isinstance(getattr(module, n), types.ModuleType) for n in shown - {"evaluate"}
        )
    assert 15 <= len(sf.__all__) <= 20
    with pytest.raises(AttributeError, match="has no attribute 'SamplingFreeLos'"):
        sf.SamplingFreeLos  # noqa: B018


@pytest.mark.slow
def test_import_adds_less_than_three_tenths_of_a_second(largest_error):
    code = (
        "import time, torch; start = time.perf_counter(); import fastsfvae; "
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    added = statistics.median(
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(5)
    )
    largest_error("import", "seconds added", added)
    assert added < 0.3
