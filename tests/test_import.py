"""What `import fastsfvae` costs and touches."""

import statistics
import subprocess
import sys
import time

HEAVY = ("triton", "matplotlib", "tyro", "rich", "sympy", "torch.fx.experimental.proxy_tensor")


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def test_import_loads_nothing_heavy_beyond_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import fastsfvae; "
        f"new = set(sys.modules) - before; bad = [m for m in {HEAVY!r} if m in new]; "
        "assert not bad, bad; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_adds_less_than_three_tenths_of_a_second(largest_error):
    pairs = [
        seconds("import torch, fastsfvae") - seconds("import torch") for _ in range(5)
    ]
    added = statistics.median(pairs)
    largest_error("seconds that the import adds", added)
    assert added < 0.3
