"""Machine code is read and followed as a warp would run it, and its bounds are held to."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch
import triton

from fastsfvae.kernels import _code_gate, _record
from fastsfvae.kernels._code_gate import CARDS, CodeRow, broken, resident
from fastsfvae.kernels._launch import DeviceLimits, launch
from fastsfvae.kernels._machine_code import Code, count, disassemble, flops_of, parse
from fastsfvae.kernels._record import Launch, Memory
from fastsfvae.kernels._warp import Warp, signed
from fastsfvae.kernels._warp_arithmetic import step
from tests._triton import INTERPRETER

compiles = pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")

# A sum over c[0x0][0x168] // 32 steps of two tensor-core instructions each, as nvdisasm prints it.
LISTING = """
kernel:
        /*0000*/                   MOV R1, c[0x0][0x168] ;
        /*0010*/                   S2R R9, SR_CTAID.X ;
        /*0020*/                   IMAD.WIDE R2, R9, 0x100, c[0x0][0x160] ;
        /*0030*/                   CS2R R4, SRZ ;
.L_x_0:
        /*0040*/                   LDG.E.128 R12, [R2.64+0x10] ;
        /*0050*/                   LDS.64 R16, [R5] ;
        /*0060*/                   HMMA.16816.F32.BF16 R20, R12, R16, R20 ;
        /*0070*/                   IADD3 R4, R4, 0x20, RZ ;
        /*0080*/                   HMMA.16816.F32.BF16 R24, R12, R17, R24 ;
        /*0090*/                   ISETP.GE.AND P0, PT, R4, R1, PT ;
        /*00a0*/              @!P0 BRA `(.L_x_0) ;
        /*00b0*/                   LDG.E.U8 R6, [R20.64] ;
        /*00c0*/                   ISETP.EQ.AND P1, PT, R6, RZ, PT ;
        /*00d0*/               @P1 BRA `(.L_x_1) ;
        /*00e0*/                   STG.E.64 [R2.64], R20 ;
.L_x_1:
        /*00f0*/                   EXIT ;
.L_x_2:
        /*0100*/                   BRA `(.L_x_2) ;
"""


class Kernel:
    __name__ = "kernel"


def recorded(steps):
    """A launch of that listing."""
    return Launch(
        kernel=Kernel(),
        signature={"x_ptr": "*bf16", "n": "i32"},
        constants={},
        attributes={},
        options={"num_warps": 2},
        grid=(6,),
        values={"x_ptr": Memory((6, 128), "bfloat16", 1536, 0x7F0000000000), "n": 32 * steps},
    )


def test_a_listing_is_followed_by_hand():
    code = Code(parse(LISTING), registers=32, stack=0)
    assert code.loops == [(4, 10)]
    counts = count(code, recorded(5), 89)
    # Four before the loop, seven in it, five behind: the branch on loaded data goes straight on.
    assert counts.issued == 4 + 5 * 7 + 5 and counts.unknown == 1
    assert counts.tensor == {"HMMA.16816.F32.BF16": 10}
    assert (counts.loop, counts.loop_tensor, counts.trips) == (7, 2, 5)
    assert counts.round_trips == {"LDS.64": 1}
    assert counts.accesses == {"LDG.E.128": 5, "LDG.E.U8": 1, "STG.E.64": 1}
    assert counts.widths == {("x_ptr", "load"): 16, ("x_ptr", "store"): 8, ("?", "load"): 1}
    # Program 3 of 6.
    assert code.follow(recorded(5), 89).accesses[0].address == 0x7F0000000000 + 3 * 256 + 16


def test_what_an_instruction_waits_for_is_no_operand():
    told = re.sub(r" ;$", "        &req={1,2} &wr=0x0 ?WAIT5_END_GROUP;", LISTING, flags=re.M)
    assert told.count("?WAIT5") == 17 and parse(told) == parse(LISTING)


def test_flops_of_products():
    assert flops_of("HMMA.16816.F32.BF16") == 4096
    assert flops_of("HMMA.1688.F32.TF32") == 2048
    assert flops_of("HGMMA.64x32x16.F32.BF16") == 2 * 64 * 32 * 16 / 4
    assert flops_of("HGMMA.64x128x8.F32.TF32") == 2 * 64 * 128 * 8 / 4
    assert flops_of("FFMA") == flops_of("FFMA.FTZ") == 64
    assert flops_of("FADD") == 0


WORD = 2**32 - 1
PAIR = 2**64 - 1
# What an instruction makes of R2 = a, R3 = b, R4 = c, with R4:R5 = c + (d << 32) as a pair.
MEANINGS = {
    ("IMAD", "R2, R3, R4"): lambda a, b, c, d: a * b + c & WORD,
    ("IMAD.MOV.U32", "RZ, RZ, -R2"): lambda a, b, c, d: -a & WORD,
    ("IMAD.HI.U32", "R2, R3, R4"): lambda a, b, c, d: (a * b + (d << 32 | c)) >> 32 & WORD,
    ("IMAD.HI", "R2, R3, RZ"): lambda a, b, c, d: signed(a) * signed(b) >> 32 & WORD,
    ("IADD3", "R2, -R3, R4"): lambda a, b, c, d: a - b + c & WORD,
    ("LEA", "R2, R3, 0x3"): lambda a, b, c, d: 8 * a + b & WORD,
    ("LEA.HI", "R2, R3, RZ, 0x5"): lambda a, b, c, d: (a >> 27) + b & WORD,
    ("LEA.HI.SX32", "R2, R3, 0x1b"): lambda a, b, c, d: (signed(a) >> 5) + b & WORD,
    ("SHF.R.S32.HI", "RZ, 0x7, R2"): lambda a, b, c, d: signed(a) >> 7 & WORD,
    ("SHF.R.U32.HI", "RZ, 0x7, R2"): lambda a, b, c, d: a >> 7,
    ("SHF.L.U32", "R2, 0x7, RZ"): lambda a, b, c, d: a << 7 & WORD,
    ("SHF.L.U64.HI", "R2, 0x7, R3"): lambda a, b, c, d: (b << 32 | a) << 7 >> 32 & WORD,
    ("LOP3.LUT", "R2, R3, R4, 0x96, !PT"): lambda a, b, c, d: a ^ b ^ c,
    ("LOP3.LUT", "R2, 0xff, RZ, 0xc0, !PT"): lambda a, b, c, d: a & 255,
    ("IABS", "R2"): lambda a, b, c, d: abs(signed(a)) & WORD,
    ("SGXT", "R2, 0x9"): lambda a, b, c, d: signed(a & 511, 9) & WORD,
    ("SGXT.U32", "R2, 0x9"): lambda a, b, c, d: a & 511,
    ("PRMT", "R2, 0x5410, R3"): lambda a, b, c, d: a & 65535 | (b & 65535) << 16,
    ("IMNMX", "R2, R3, PT"): lambda a, b, c, d: min(signed(a), signed(b)) & WORD,
    ("VIMNMX.U32", "R2, R3, !PT"): lambda a, b, c, d: max(a, b),
    ("VIADDMNMX", "R2, R3, R4, PT"): lambda a, b, c, d: min(signed(a + b & WORD), signed(c)) & WORD,
}


@pytest.mark.parametrize("instruction", MEANINGS, ids=" ".join)
def test_integers_are_computed_as_written(instruction):
    opcode, inputs = instruction
    numbers = random.Random(0)
    for _ in range(200):
        values = [numbers.choice([numbers.getrandbits(32), numbers.getrandbits(5)]) for _ in "abcd"]
        warp = Warp(89, b"", (0, 0, 0), 32)
        for at, value in enumerate(values):
            warp.registers[f"R{2 + at}"] = value
        step(warp, True, opcode, ("R9", *inputs.split(", ")))
        assert warp.registers["R9"] == MEANINGS[instruction](*values), values


def test_a_sum_of_pairs_carries_and_a_comparison_of_pairs_reads_both_halves():
    numbers = random.Random(0)
    for _ in range(200):
        a, b = (numbers.choice([numbers.getrandbits(64), numbers.getrandbits(33)]) for _ in "ab")
        warp = Warp(89, b"", (0, 0, 0), 32)
        for name, value in (("R2", a), ("R4", b)):
            warp.set(name, value, 2)
        step(warp, True, "IADD3", ("R6", "P0", "R2", "-R4", "RZ"))
        step(warp, True, "IADD3.X", ("R7", "R3", "-R5", "RZ", "P0", "!PT"))
        assert warp.number("R6", wide=True) == a - b & PAIR
        step(warp, True, "ISETP.GE.U32.AND", ("P1", "PT", "R2", "R4", "PT"))
        step(warp, True, "ISETP.GE.AND.EX", ("P1", "PT", "R3", "R5", "PT", "P1"))
        assert warp.predicate("P1") == (signed(a, 64) >= signed(b, 64))


def test_what_is_not_known_stays_unknown():
    warp = Warp(89, b"", (0, 0, 0), 32)
    warp.registers |= {f"R{at}": at for at in range(8)}
    step(warp, True, "LDG.E.64", ("R4", "[R2.64]"))
    assert warp.number("R4") is None and warp.number("R5") is None and warp.number("R6") == 6
    step(warp, None, "MOV", ("R3", "R2"))
    assert warp.number("R3") is None
    step(warp, True, "ISETP.GE.AND", ("P0", "PT", "R4", "R2", "PT"))
    assert warp.predicate("P0") is None
    # What is false whatever the unknown is.
    step(warp, True, "ISETP.GE.AND", ("P0", "PT", "R4", "R2", "!PT"))
    assert warp.predicate("P0") is False


def test_predicates_that_are_kept_as_bits_of_an_unknown_register():
    warp = Warp(89, b"", (0, 0, 0), 32)
    warp.predicates |= {"P0": True, "P1": False}
    for predicate, bit in ((True, 1), (False, 2), (None, 4)):
        # Cleared, and set where the predicate holds.
        cleared = ("R2", "R2", hex(~bit & WORD), "RZ", "0xc0", "!PT")
        step(warp, True, "LOP3.LUT", cleared)
        step(warp, predicate, "LOP3.LUT", ("R2", "R2", hex(bit), "RZ", "0xfc", "!PT"))
    assert warp.number("R2") is None
    for bit, known in ((1, True), (2, False), (4, None), (8, None), (3, True), (6, None)):
        step(warp, True, "LOP3.LUT", ("P2", "RZ", "R2", hex(bit), "RZ", "0xc0", "!PT"))
        assert warp.predicate("P2") is known, bit
    step(warp, None, "LOP3.LUT", ("P2", "RZ", "R2", "0x1", "RZ", "0xc0", "!PT"))
    assert warp.predicate("P2") is None
    # All of them at once become a number; whatever is written next leaves no bit behind.
    step(warp, True, "LOP3.LUT", ("R3", "R2", "0x3", "RZ", "0xc0", "!PT"))
    assert warp.number("R3") == 1
    step(warp, True, "LDG.E", ("R2", "[R4.64]"))
    assert warp.bits("R2") == (0, 0)


def test_a_predicate_goes_to_the_uniform_ones_by_a_vote():
    warp = Warp(90, b"", (0, 0, 0), 32)
    for value in (True, False, None):
        warp.predicates = {"P0": value}
        step(warp, True, "VOTEU.ANY", ("UP1", "P0"))
        assert warp.predicate("UP1") is value


@compiles
@pytest.mark.parametrize("arch, size", [(80, 4096), (89, 4096), (90, 2 * 64 * 32 * 16 / 4)])
def test_a_matrix_product_issues_the_tensor_instructions_that_it_needs(arch, size):
    import tests.kernels.plain_product as plain

    rows, columns, inner = 256, 32, 320
    x, w = (torch.empty(s, dtype=torch.bfloat16) for s in ((rows, inner), (inner, columns)))
    y = torch.empty(rows, columns)
    with _record.recorded(DeviceLimits(4, arch)) as launches:
        options = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}
        launch(plain.product_kernel, (rows // 64,), x, w, y, inner, COLUMNS=columns, **options)
    (recorded_launch,) = launches
    assert recorded_launch.programs == 4 and recorded_launch.moved == sum(
        t.numel() * t.element_size() for t in (x, w, y)
    )
    code = disassemble(recorded_launch.compile(arch).asm["cubin"])
    counts = count(code, recorded_launch, arch)
    # Of a program's four warps one.
    assert sum(counts.tensor.values()) * size * 4 == 2 * 64 * columns * inner
    assert counts.flops * 4 == 2 * 64 * columns * inner
    assert counts.unknown == 0 and counts.trips == inner // 64 or arch == 90
    assert counts.widths["x_ptr", "load"] == 16


def row(**changes):
    plain = CodeRow(
        *("celeba16 bfloat16 kernel", 89, 10, 4, "HMMA.16816.F32.BF16", 5.0, 12.0, 8, 16),
        *({"LDG.E.64": 3}, {"LDS": 2}, 80, 1024, 0, 6, True, 120, 4096),
    )
    return replace(plain, **changes)


BOUNDS = {"89": {row().name: [row().tensor, *row().bound]}}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"loop": 5.1}, "loop 5.1 where 5 was counted"),
        ({"whole": 13.0}, "whole 13 where 12 was counted"),
        ({"load": 4}, "load 4 where 8 was counted"),
        ({"store": 8}, "store 8 where 16 was counted"),
        ({"registers": 81}, "registers 81 where 80 was counted"),
        ({"shared": 2048}, "shared 2048 where 1024 was counted"),
        ({"round_trips": {"LDS": 2, "STS": 1}}, "round_trips 3 where 2 was counted"),
        ({"stack": 8}, "8 bytes of spills"),
        ({"tensor": ""}, "no tensor-core instruction in place of HMMA.16816.F32.BF16"),
        ({"name": "another"}, "has no bounds yet: run --write-bounds"),
        ({"arch": 90}, "has no bounds yet: run --write-bounds"),
    ],
)
def test_a_bound_that_is_broken_is_named(changes, says):
    (line,) = broken([row(**changes)], BOUNDS)
    assert says in line


def test_what_is_within_its_bounds_passes():
    better = {"loop": 4.0, "whole": 11.0, "load": 16, "registers": 79, "round_trips": {}}
    assert broken([row(), row(**better)], BOUNDS) == []


def test_without_bounds_a_spill_alone_is_an_error():
    (line,) = broken([row(loop=99.0), row(stack=8, name="another")], None)
    assert line == "sm_89 another: 8 bytes of spills"


def test_bounds_are_written_a_step_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(_code_gate, "BOUNDS", tmp_path / "bounds.json")
    _code_gate.BOUNDS.write_text("{}")
    other, gone = "mnist2 bfloat16 kernel", "celeba16 bfloat16 gone"
    _code_gate.write_bounds([row(), row(name=other), row(name=gone), row(arch=90)])
    assert set(_code_gate.read_bounds()["89"]) == {row().name, other, gone}
    # The step of celeba16 was counted again, and has one launch less; mnist2's was not.
    _code_gate.write_bounds([row(loop=4.0)])
    bounds = _code_gate.read_bounds()
    assert set(bounds["89"]) == {row().name, other} and bounds["90"] == BOUNDS["89"]
    assert bounds["89"][row().name][1] == 4.0 and broken([row(loop=4.0)], bounds) == []


def test_flops_of_an_issued_instruction_are_those_of_all_layers_together(tmp_path):
    path = tmp_path / "issued.json"
    path.write_text('{"90": {"half": 1.0, "tf32": 2.0}}')
    name = "celeba16 bfloat16 tangent_product_kernel"
    rows = [
        row(name=name, arch=90, programs=10, flops=600, issued=3),
        row(name=name, arch=90, programs=30, flops=200, issued=2),
        row(name=name.replace("bfloat16", "float32"), flops=90, issued=9),
        row(name=name.replace("celeba16", "mnist2"), arch=90, flops=1, issued=1),
        row(arch=90, flops=1, issued=1),
        row(name=name, arch=90, flops=1, issued=1, followed=False),
    ]
    _code_gate.write_issued(rows, path)
    half = (10 * 600 + 30 * 200) / (10 * 3 + 30 * 2)
    assert json.loads(path.read_text()) == {
        "89": {"ieee": 10.0},
        "90": {"half": round(half, 1), "tf32": 2.0},
    }


def test_programs_of_an_sm_by_each_of_its_limits():
    # 65,536 registers over 80 * 128; 100 KiB over 32 + 1; 48 warps over 4; 24 programs.
    assert resident(89, 80, 1024, 4) == 6
    assert resident(89, 32, 32 * 1024, 4) == 3
    assert resident(89, 32, 0, 4) == 12
    assert resident(89, 16, 0, 1) == 24
    assert set(CARDS) == {80, 86, 89, 90, 120}


def test_triton_is_left_as_it_was():
    run = triton.runtime.jit.JITFunction.run
    with _record.recorded(DeviceLimits(4, 89)):
        assert triton.runtime.jit.JITFunction.run is not run
    assert triton.runtime.jit.JITFunction.run is run
