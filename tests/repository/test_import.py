"""What `import fastsfvae` costs and touches."""

import statistics
import subprocess
import sys

HEAVY = ("triton", "matplotlib", "tyro", "rich", "sympy", "torch.fx.experimental.proxy_tensor")


def test_import_loads_nothing_heavy_beyond_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import fastsfvae; "
        f"new = set(sys.modules) - before; bad = [m for m in {HEAVY!r} if m in new]; "
        "assert not bad, bad; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
