"""Launches that overlap: each kernel waits for the one in front before it reads or writes."""

import ast
from pathlib import Path

import pytest

from bench.launches import step
from fastsfvae.kernels import _launch
from fastsfvae.kernels._launch import DeviceLimits, overlaps
from fastsfvae.kernels._machine_code import disassemble
from tests._triton import INTERPRETER

H100, RTX_4090 = DeviceLimits(132, 90), DeviceLimits(128, 89)
compiles = pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")


def kernels():
    """Every kernel's name and the statements of its body, read from the sources."""
    for path in sorted(Path(_launch.__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield node.name, node.body


def test_every_kernel_takes_its_turn_first():
    found = dict(kernels())
    assert len(found) >= 15
    late = [name for name, body in found.items() if ast.unparse(body[0]) != "begin()"]
    assert not late, f"call begin() first in {', '.join(late)}"


@compiles
def test_nothing_is_read_or_written_before_the_wait(monkeypatch):
    monkeypatch.setenv("FASTSFVAE_PDL", "1")
    launches = step("mnist2", "bfloat16", H100, batch=4).kernels
    for launch in {launch.compilation: launch for launch in launches}.values():
        assert launch.options["launch_pdl"]
        codes = [i.opcode for i in disassemble(launch.compile(90).asm["cubin"]).instructions]
        wait = codes.index("ACQBULK")
        moves = [at for at, code in enumerate(codes) if code.startswith(("LDG", "STG", "ATOM"))]
        assert moves and wait < min(moves), launch.name
        assert wait < codes.index("PREEXIT"), launch.name


@compiles
@pytest.mark.parametrize("setting, limits", [("0", H100), ("1", RTX_4090)])
def test_nothing_changes_where_it_is_off_or_the_card_has_none(setting, limits, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_PDL", setting)
    launches = step("mnist2", "bfloat16", limits, batch=4).kernels
    assert launches and not any("launch_pdl" in launch.options for launch in launches)


def test_an_unknown_setting_is_named(monkeypatch):
    monkeypatch.setenv("FASTSFVAE_PDL", "yes")
    with pytest.raises(ValueError, match="FASTSFVAE_PDL=yes is not one of 0, 1"):
        overlaps(90)
