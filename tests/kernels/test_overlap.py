"""Launches that overlap: each kernel waits for the one in front before it reads or writes."""

import ast
from pathlib import Path

import pytest
import torch

import fastsfvae as sf
from bench.launches import step
from bench.peers import SETTINGS
from bench.problems import build_problem
from fastsfvae.ground.garbage import uncollected
from fastsfvae.kernels import _launch
from fastsfvae.kernels._launch import DeviceLimits, overlaps
from fastsfvae.kernels._machine_code import disassemble
from tests._triton import CUDA, INTERPRETER

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
@pytest.mark.parametrize(
    "workload, dtype",
    [("mnist2", "bfloat16"), pytest.param("celeba16", "tf32", marks=pytest.mark.slow)],
)
def test_nothing_is_read_or_written_before_the_wait(workload, dtype, monkeypatch):
    monkeypatch.setenv("FASTSFVAE_PDL", "1")
    launches = step(workload, dtype, H100, batch=4).kernels
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


@pytest.mark.gpu
@pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_capability() < (9, 0), reason="needs compute capability 9.0"
)
@pytest.mark.parametrize("captured", [False, True])
def test_the_same_bits_where_launches_overlap(captured, monkeypatch):
    problem = build_problem("celeba16", 16, device="cuda")

    def gradients(setting):
        monkeypatch.setenv("FASTSFVAE_PDL", setting)
        loss = sf.SamplingFreeLoss(problem.decoder, reduction="sum", backend="triton", **SETTINGS)
        wanted = problem.mean, problem.log_var, *problem.decoder.parameters()

        def step():
            value = loss(problem.x, problem.mean, problem.log_var)
            return value.detach(), *torch.autograd.grad(value, wanted)

        with sf.fused_layers("always"):
            if not captured:
                return step()
            for _ in range(3):
                step()
            graph = torch.cuda.CUDAGraph()
            with uncollected(), torch.cuda.graph(graph):
                results = step()
        # Again and again, each time right behind itself.
        for _ in range(20):
            graph.replay()
        return results

    apart, overlapping = gradients("0"), gradients("1")
    assert all(map(torch.equal, apart, overlapping))


def test_an_unknown_setting_is_named(monkeypatch):
    monkeypatch.setenv("FASTSFVAE_PDL", "yes")
    with pytest.raises(ValueError, match="FASTSFVAE_PDL=yes is not one of 0, 1"):
        overlaps(90)
