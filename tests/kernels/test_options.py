"""Every compilation is told that a product and a sum are one instruction, whatever the default."""

import ast
from pathlib import Path

import pytest
import torch

from bench.launches import step
from fastsfvae.kernels import _launch, audit
from fastsfvae.kernels._launch import OPTIONS, DeviceLimits
from tests._triton import INTERPRETER

compiles = pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")
FUSED = {"enable_fp_fusion": True}
SOURCES = {path.stem: path.read_text() for path in Path(_launch.__file__).parent.glob("*.py")}


def launching():
    """Where a kernel is launched, `kernel[grid](...)`: module and function."""
    for module, source in SOURCES.items():
        for function in ast.walk(ast.parse(source if "import triton" in source else "")):
            if isinstance(function, ast.FunctionDef):
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                if any(isinstance(call.func, ast.Subscript) for call in calls):
                    yield module, function.name


def test_one_function_launches_and_two_modules_compile():
    assert list(launching()) == [("_launch", "launch")]
    compiling = [module for module, source in SOURCES.items() if "triton.compile(" in source]
    assert sorted(compiling) == ["_record", "audit"]
    assert FUSED.items() <= OPTIONS.items()


def test_that_function_hands_the_options_on(monkeypatch):
    seen = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.update(options)

    monkeypatch.setattr(_launch, "OPTIONS", {"enable_fp_fusion": "told"})
    _launch.launch(Kernel(), (1,), torch.zeros(1), num_warps=4)
    assert seen == {"enable_fp_fusion": "told", "num_warps": 4}


@compiles
def test_every_launch_of_a_step_has_them():
    launches = step("mnist2", "bfloat16", DeviceLimits(132, 90), batch=4).kernels
    assert launches
    assert not [x.name for x in launches if not FUSED.items() <= dict(x.options).items()]


@compiles
@pytest.mark.parametrize("default", ["0", "1"])
def test_the_audit_compiles_with_them(default, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    small = next(c for c in audit.configurations() if c.kernel.__name__ == "_round_tf32_kernel")
    assert audit._compiled(small, 86).metadata.enable_fp_fusion
    launch = step("mnist2", "bfloat16", DeviceLimits(132, 90), batch=4).kernels[0]
    assert launch.compile(90).metadata.enable_fp_fusion
