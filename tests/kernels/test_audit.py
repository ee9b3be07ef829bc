"""The ahead-of-time audit: every configuration fits the cards, and a spill would be found."""

import json
import os
import subprocess
import sys

import pytest
import triton
from packaging.version import Version

from tests._triton import INTERPRETER


def run(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "fastsfvae.kernels.audit", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_interpreter_is_refused():
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETER, reason="compiles the same in either run of the suite")
@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.8"),
    reason="the tiles are chosen for Triton 3.8's compiler; older ones spill a few bytes of some",
)
def test_no_configuration_spills_or_overflows():
    done = run("--quick", "--json")
    rows = json.loads(done.stdout)
    # What sm_90's shared memory holds besides, the command checks.
    large = [row for row in rows if row["arch"] == 86 and row["shared_bytes"] > 99 * 1024]
    bad = [row for row in rows if row["stack_bytes"]] + large
    assert done.returncode == 0 and not bad, bad
    assert {row["arch"] for row in rows} == {86, 90}
    assert {row["kernel"] for row in rows} == {
        "_gram_project_fwd_kernel",
        "_gram_project_bwd_kernel",
        "_gram_project_sum_kernel",
        "_elbo_kernel",
        "_woodbury_fwd_kernel",
        "_round_tf32_kernel",
        "_sum_parts_kernel",
        "_gram_float64_kernel",
        "_tangent_activation_fwd_kernel",
        "_tangent_activation_bwd_kernel",
        "_latent_layer_fwd_kernel",
        "_latent_layer_bwd_kernel",
        "_latent_layer_sum_kernel",
        "_gram_tail_fwd_kernel",
        "_gram_tail_bwd_kernel",
        "tangent_doubling_kernel",
        "tangent_narrow_kernel",
        "tangent_product_kernel",
        "tangent_weight_kernel",
    }
    for row in rows:
        name, label = row["kernel"], row["configuration"]
        if "gram_project" in name and "J bf16" in label:
            assert row["tensor_core"] > 0, row
        if "gram_project" in name and "J " in label and "odd" not in label:
            assert row["load_bytes"] == 16, row
        if name in ("_gram_tail_fwd_kernel", "_gram_tail_bwd_kernel"):
            assert row["tensor_core"] > 0 or "ieee" in label, row
            # The forward copies eight bytes at a time, which go through L1.
            least = 8 if "fwd" in name else 16
            assert row["load_bytes"] >= least or "odd" in label, row
        if name in ("tangent_doubling_kernel", "tangent_product_kernel", "tangent_weight_kernel"):
            assert row["tensor_core"] > 0 or "ieee" in label, row
            # Windows and neighbours eight bytes at a time, which go through L1; the weight of a
            # product, or what tells its slope, by sixteen.
            least = 16 if name == "tangent_product_kernel" else 8
            assert row["load_bytes"] >= least or "C=3" in label, row


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETER, reason="compiles the same in either run of the suite")
@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.8"), reason="the bounds are of Triton 3.8's code"
)
def test_the_papers_workloads_keep_their_bounds():
    done = run("--code", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["arch"] for row in rows} == {86, 90}
    for row in rows:
        assert row["stack"] == 0 and row["followed"], row
        assert row["shared"] <= (99 if row["arch"] == 86 else 227) * 1024, row
    # Every product of two stacks, or of a stack and a weight, is on the tensor cores.
    assert all(row["tensor"] for row in rows if " tangent_" in row["name"])


@pytest.mark.skipif(INTERPRETER, reason="compiles the same in either run of the suite")
def test_a_spill_is_found(monkeypatch):
    from dataclasses import replace

    from fastsfvae.kernels import audit

    large = next(c for c in audit.configurations() if c.label == "m=64")
    one_warp = replace(large, num_warps=1)
    row = audit.compile_configuration(one_warp, 86)
    assert row.stack_bytes > 0 and not row.ok
    monkeypatch.setattr(audit, "audit", lambda *_, **__: [row])
    assert audit.main(["--arch", "86"]) == 1
    assert audit.compile_configuration(large, 86).ok
