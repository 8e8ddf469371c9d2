"""The static gate: does it see what it must see? Small kernels whose faults are known, budgets that worsen, and the real tables."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernels_static

from bigtrain_kernels import attention, static, static_compile, static_facts
from bigtrain_kernels.launch import ARCHITECTURES, Case
from bigtrain_kernels.static_facts import Instruction, Loads, loops, main_loop, resident_warps, sass

NVIDIA = ARCHITECTURES[:3]


@triton.jit
def copy(X, Y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < n), mask=at < n)


@triton.jit
def too_large_a_tile(X, Y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Keeps a tile in registers that has no room there."""
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(X + at)
    for i in range(4):
        x = x + tl.sum(x * i, 1)[:, None] * x
        tl.store(Y + at + i * ROWS * COLUMNS, x)


@triton.jit
def doubled_in_float64(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, (tl.load(X + at).to(tl.float64) * 1.1).to(tl.float32))


@triton.jit
def summed_by_atomics(X, Y, BLOCK: tl.constexpr):
    tl.atomic_add(Y, tl.sum(tl.load(X + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))))


@triton.jit
def product(A, B, C, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(A + m[:, None] * K + start + k[None, :])
        b = tl.load(B + (start + k[:, None]) * BLOCK_N + n[None, :])
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(C + m[:, None] * BLOCK_N + n[None, :], total)


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def compiled(architecture, run):
    (row,) = static.rows_of(architecture, Case("case", run, flops=1000, bytes=100))
    return row


def product_row(architecture, M=64, N=64, K=64, dtype=torch.bfloat16, warps=4):
    a, b, c = empty(M, 4096, dtype=dtype), empty(4096, N, dtype=dtype), empty(M, N)
    return compiled(architecture, lambda: product[1,](a, b, c, 4096, M, N, K, num_warps=warps, num_stages=3))


def copy_row(architecture, aligned=True):
    x = empty(1 << 20)
    return compiled(architecture, lambda: copy[1024,](x, x if aligned else x[1:], 1 << 20, 1024, num_warps=4))


def broken(row, accepted=None):
    return [*static.broken_rules(row), *static.broken_choices(row, accepted or {})]


def with_facts(row, **changes):
    return row._replace(facts=row.facts._replace(**changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_good_kernel(architecture):
    row = copy_row(architecture)
    f = row.facts
    assert (f.spilled_bytes, f.stack_bytes, f.float64, f.atomics, f.tensor_core, f.loop_instructions) == (0, 0, 0, 0, {}, 0)
    # 1,024 floats of 128 threads (AMD: 256) at 16 bytes a load
    assert f.loads == Loads(wide=1 if architecture == "gfx942" else 2) and 0 < f.registers <= 40
    assert (row.kernel, row.grid, row.warps, row.constants) == ("copy", (1024,), 4, {"BLOCK": 1024})
    assert f.instructions > 10 and broken(row) == []


def test_unaligned_loads_are_narrow():
    @triton.jit
    def strided(X, Y, stride, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(Y + at, tl.load(X + at * stride))

    x = empty(1 << 20)
    row = compiled("sm_90", lambda: strided[1,](x, x, 3, 1024))
    assert row.facts.loads.narrow == 8 and row.facts.loads.narrow_share == 1
    assert "neither 128 bits at a time" in broken(row)[0]


def test_spills_are_what_the_assembler_says(tmp_path):
    x, y = empty(64, 128), empty(4, 64, 128)
    row = compiled("sm_80", lambda: too_large_a_tile[1,](x, y, 64, 128, num_warps=1))
    with static_compile.compile_only("sm_80") as launched:
        too_large_a_tile[1,](x, y, 64, 128, num_warps=1)
    (tmp_path / "x.ptx").write_text(launched[0].compiled.asm["ptx"])
    ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "-lineinfo", "--gpu-name=sm_80", tmp_path / "x.ptx", "-o", tmp_path / "x.cubin"]
    said = subprocess.run(ptxas, capture_output=True, text=True, check=True)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said.stdout + said.stderr)]
    assert row.facts.spilled_bytes == sum(spills) > 0 and row.facts.stack_bytes > 0
    assert row.facts.registers == int(re.search(r"Used (\d+) registers", said.stdout + said.stderr)[1])
    assert f"spills {row.facts.spilled_bytes} bytes" in broken(row)[0]
    assert broken(row, {row.key: {"bytes": row.facts.spilled_bytes, "reason": "a test"}}) == []
    assert "1 accepted" in broken(row, {row.key: {"bytes": 1, "reason": "a test"}})[0]


def test_spills_on_amd():
    x, y = empty(128, 256), empty(4, 128, 256)
    row = compiled("gfx942", lambda: too_large_a_tile[1,](x, y, 128, 256, num_warps=1))
    assert row.facts.spilled_bytes > 0 and row.facts.registers == 512


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_float64_and_atomics(architecture):
    x = empty(1024)
    row = compiled(architecture, lambda: doubled_in_float64[1,](x, x, 1024))
    assert row.facts.float64 > 0 and "float64" in broken(row)[0]
    row = compiled(architecture, lambda: summed_by_atomics[8,](x, x, 128))
    assert row.facts.atomics > 0 and "atomic" in broken(row)[0]


@pytest.mark.parametrize(
    "architecture, kind, count", [("sm_80", "HMMA", 32), ("sm_90", "HGMMA", 4), ("sm_100", "UTCHMMA", 4), ("gfx942", "MFMA", 8)]
)
def test_the_main_loop_of_a_product(architecture, kind, count):
    """64 x 64 x 64 on four warps: HMMA is 16 x 8 x 16 a warp, HGMMA and tcgen05 64 x 64 x 16, MFMA 32 x 32 x 8."""
    row = product_row(architecture)
    f = row.facts
    assert set(f.tensor_core) == {kind} and f.loop_tensor_core == count
    share = 2 * 64 * 64 * 64 // 4  # of one warp
    assert f.loop_matrix_flops == (0 if kind == "UTCHMMA" else share)
    assert 0 < f.loop_instructions < f.instructions and f.loop_ratio == round(f.loop_instructions / count, 2)
    assert (f.tall_matmuls, f.short_matmuls) == (1, 0) and broken(row) == []
    assert f.loads.narrow == 0 and (f.loads.wide if architecture == "gfx942" else f.loads.asynchronous) == (
        4 if architecture == "gfx942" else 8
    )


def test_products_that_miss_their_tensor_core():
    short = product_row("sm_90", M=32)
    assert set(short.facts.tensor_core) == {"HMMA"} and short.facts.short_matmuls == 1 and broken(short) == []
    tall = product_row("sm_90")
    assert "without HGMMA" in broken(with_facts(tall, tensor_core={"HMMA": 32}))[0]
    assert "without UTCHMMA" in broken(with_facts(tall, tensor_core={"HMMA": 32})._replace(architecture="sm_100"))[0]
    assert "without tensor cores" in broken(with_facts(tall, tensor_core={})._replace(architecture="gfx942"))[0]
    plain = product_row("sm_90", M=32, N=32, K=32, dtype=torch.float32)
    assert plain.facts.tensor_core == {} and plain.facts.loop_instructions > 0 and broken(plain) == []


MULTIPLY = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4].tnspB, R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def sass_of(*loop, after=()):
    """An sm_90 kernel whose main loop is these instructions, as NVIDIA's disassembler writes it."""
    rows = ["MOV R1, c[0x0][0x28]", ".L_x_0:", *loop, "@!P0 BRA `(.L_x_0)", *after, "EXIT"]
    return "\n".join(row if row.endswith(":") else f"        /*{16 * i:04x}*/                   {row} ;" for i, row in enumerate(rows))


@pytest.mark.parametrize(
    ("text", "waits", "multiplies", "refused"),
    [
        (sass_of("WARPGROUP.ARRIVE", *[MULTIPLY, WAIT] * 4), 4, 4, True),
        (sass_of("WARPGROUP.ARRIVE", *[MULTIPLY] * 4, WAIT), 1, 4, False),
        (sass_of("WARPGROUP.ARRIVE", *[MULTIPLY] * 4, after=[MULTIPLY, WAIT] * 4), 0, 4, False),  # they wait behind the loop
        (sass_of("WARPGROUP.ARRIVE", *[MULTIPLY, WAIT] * 2), 2, 2, False),  # a softmax between two products needs the first
    ],
    ids=["each", "all at once", "behind the loop", "two"],
)
def test_matrix_instructions_that_wait_for_each_other(good, monkeypatch, text, waits, multiplies, refused):
    monkeypatch.setattr(static_facts, "_tool", lambda path, option, cubin: text if option == "-c" else "REG:64 STACK:0")
    asm = {"cubin": b"", "ptx": ".reqntid 128", "ttir": ""}
    f = static_facts.facts(SimpleNamespace(asm=asm, metadata=SimpleNamespace(shared=0)), "sm_90")
    assert (f.loop_waits, f.loop_tensor_core) == (waits, multiplies)
    said = ["waits for each of the 4 HGMMA of its main loop before the next"] if refused else []
    assert broken(good._replace(facts=f)) == said


def test_shared_memory_beyond_the_limit():
    row = copy_row("sm_80")
    assert broken(with_facts(row, shared_bytes=99 << 10)) == []
    assert "101377 bytes of shared memory" in broken(with_facts(row, shared_bytes=(99 << 10) + 1))[0]


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_recompiling_gives_the_same_code(architecture, monkeypatch):
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    x = empty(1 << 20)
    codes = []
    for _ in range(2):
        copy.device_caches.clear()
        with static_compile.compile_only(architecture) as launched:
            copy[1024,](x, x, 1 << 20, 2048, num_warps=4)
        asm = launched[0].compiled.asm
        codes.append(asm["amdgcn"] if architecture == "gfx942" else sass(asm["cubin"]))
    assert codes[0] == codes[1]


def op(name, target=None, through=True):
    return Instruction(name, "", target, through)


def test_loops():
    code = [
        op("START"),
        "outer", op("O"),
        "inner", op("MMA"), op("WAIT", "retry"),
        "back", op("X"), op("BRA", "inner"),
        op("BRA", "outer"),
        op("EXIT", through=False),
        "retry", op("COLD"), op("BRA", "back", False),
        "pad", op("BRA", "pad", False),
    ]  # fmt: skip
    names = sorted([x.name for x in body] for body in loops(code))
    # The block that the compiler moved behind the exit belongs to both loops; the padding, which nothing reaches, is none.
    assert names == [["MMA", "WAIT", "X", "BRA", "COLD", "BRA"], ["O", "MMA", "WAIT", "X", "BRA", "BRA", "COLD", "BRA"]]
    assert main_loop(code, lambda x: x.name == "MMA")[0].name == "MMA"
    assert main_loop(code[:2], lambda x: True) == []


def test_resident_warps():
    """NVIDIA: the occupancy calculator's figures. AMD: those that its compiler writes as 'Occupancy' for one of four SIMDs."""
    assert [resident_warps("sm_90", registers, 0, 8) for registers in (32, 64, 96, 128, 168, 255)] == [64, 32, 16, 16, 8, 8]
    assert [resident_warps("sm_80", 40, 0, 4), resident_warps("sm_80", 16, 0, 1)] == [48, 32]
    assert [resident_warps("sm_80", 32, kib << 10, 4) for kib in (163, 81, 80, 40)] == [4, 8, 8, 16]
    assert [resident_warps("sm_100", 32, 0, 4, columns) for columns in (512, 256, 128)] == [4, 8, 16]
    assert [resident_warps("gfx942", n, 0, 4) for n in (64, 72, 128, 129, 200, 256, 278, 512)] == [32, 28, 16, 12, 8, 8, 4, 4]
    assert resident_warps("gfx942", 64, 64 << 10, 8) == 8


def test_resident_warps_as_amd_counts_them():
    """Its compiler notes how many waves a SIMD, one of four, holds."""
    x, product_of = empty(1 << 20), [empty(64, 64, dtype=torch.bfloat16) for _ in range(2)]
    with static_compile.compile_only("gfx942") as launched:
        copy[1024,](x, x, 1 << 20, 1024, num_warps=4)
        product[1,](*product_of, x, 64, 64, 64, 64, num_warps=4)
        product[1,](*product_of, x, 64, 128, 128, 64, num_warps=4)
    for launch in launched:
        f = static_facts.facts(launch.compiled, "gfx942")
        assert f.resident_warps == 4 * int(re.search(r"; Occupancy: (\d+)", launch.compiled.asm["amdgcn"])[1])


def budgets(*rows, **changes):
    return {"triton": triton.__version__, "accepted_spills": {}, "launches": {row.key: row.baseline() for row in rows}} | changes


@pytest.fixture(scope="module")
def good():
    return product_row("sm_90")


def test_a_baseline_holds(good):
    assert static.violations([good], budgets(good), complete=True) == []


@pytest.mark.parametrize("figure", ["registers", "shared_bytes", "loop_instructions"])
def test_a_worse_figure_fails(good, figure):
    before = getattr(good.facts, figure)
    worse, much_better, a_little = (with_facts(good, **{figure: int(before * factor)}) for factor in (1.1, 0.5, 1.02))
    (line,) = static.violations([worse], budgets(good))
    assert line.startswith(f"{good.key}: ") and "--update" in line
    assert static.violations([much_better, a_little], budgets(good)) == []
    assert static.violations([worse], static.update([worse], budgets(good), complete=False)) == []


def test_spills_are_not_let_in_by_an_update(good):
    spills = with_facts(good, spilled_bytes=8)
    assert "spills 8 bytes" in static.violations([spills], static.update([spills], budgets(good), complete=True))[0]


def test_baselines_come_and_go(good):
    other = good._replace(case="another")
    assert "no baseline" in static.violations([other], budgets(good))[0]
    assert "nothing launches it" in static.violations([other], budgets(good, other), complete=True)[0]
    assert static.update([other], budgets(good), complete=False)["launches"].keys() == {good.key, other.key}
    assert static.update([other], budgets(good), complete=True)["launches"].keys() == {other.key}


def test_another_triton_is_held_to_the_rules_alone(good):
    elsewhere = budgets(triton="0.0")
    assert static.violations([with_facts(good, registers=256, spilled_bytes=8)], elsewhere, complete=True) == []
    assert "float64" in static.violations([with_facts(good, float64=1)], elsewhere)[0]


def test_budgets_are_written_a_launch_a_line(good):
    text = static.dumps(budgets(good))
    assert json.loads(text) == budgets(good) and good.key in text.splitlines()[4]


def test_the_table(good):
    text = static.table([good, copy_row("sm_80")])
    head, columns, line = text.splitlines()[:3]
    assert head.startswith("sm_90 (H100 SXM)") and static.LABEL in head
    assert "per matrix" in columns and "4 HGMMA" in line and "M64 N64 K64" in line
    assert "0 in all rows: spilled B, stack B, wide, narrow, f64, atomics" in text
    document = good.document()
    assert document["intensity"] == 10 and document["facts"]["tensor_core"] == {"HGMMA": 4}
    assert json.loads(json.dumps(document))["key"] == good.key


def test_the_roofline():
    row = copy_row("sm_90")._replace(flops=10**9, bytes=335 * 10**7)
    assert row.floor_us == pytest.approx(1000)  # 3.35 GB at 3.35 TB/s
    assert product_row("sm_90")._replace(flops=989 * 10**9, bytes=1).floor_us == pytest.approx(1000)


def test_a_case_of_several_launches():
    x = empty(1 << 20)

    def run():
        for warps in (4, 8):
            copy[1024,](x, x, 1 << 20, 1024, num_warps=warps)

    first, second = static.rows_of("sm_80", Case("twice", run, 10, 10))
    assert (first.key, second.key) == ("sm_80 twice: copy", "sm_80 twice: copy 2")
    assert (first.warps, second.warps, first.bytes, second.bytes) == (4, 8, 10, None)
    static.table([first, second])


def test_names_are_unique_and_the_representative_exist():
    for architecture in ARCHITECTURES:
        names = [job.name for job in static.jobs([architecture])]
        assert len(names) == len(set(names))
    everything = static.jobs(ARCHITECTURES)
    for line in static.REPRESENTATIVE:
        assert any(set(line.split()) <= set(job.words().split()) for job in everything), line
    families = {job.family for job in static.jobs(ARCHITECTURES, representative=True)}
    assert families == set(static.FAMILIES)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(static, "BUDGETS", tmp_path / "budgets.json")
    static.BUDGETS.write_text(static.dumps(budgets()))
    command = ["--arch", "sm_80", "--kernel", "mlp swiglu bfloat16 forward", "--jobs", "1", "--json", str(tmp_path / "rows.json")]
    assert static.main(command) == 1
    assert "has no baseline" in capsys.readouterr().out
    assert static.main([*command, "--update"]) == 0
    assert "1 launches compiled, 0 violations" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["architecture"] == "sm_80" and row["facts"]["registers"] > 0
    written = json.loads(static.BUDGETS.read_text())
    written["launches"][row["key"]]["registers"] //= 2
    static.BUDGETS.write_text(static.dumps(written))
    assert static.main(command) == 1
    assert "registers went from" in capsys.readouterr().out
    static.BUDGETS.write_text(static.dumps(written | {"triton": "0.0"}))
    assert static.main([*command, "--update"]) == 2


def test_what_does_not_compile_is_a_line(monkeypatch):
    job = static.Job("sm_80", "no_such_family", 0, "case")
    rows, failures = static.measure_all([job], 1)
    assert rows == [] and "sm_80 case: does not compile: ModuleNotFoundError" in failures[0]


def test_the_interpreter_is_refused(tmp_path):
    command = [sys.executable, "-m", "bigtrain_kernels.static", "--arch", "sm_80"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip() == static_compile.INTERPRETED_HERE


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match="sm_70"), static_compile.compile_only("sm_70"):
        pass


def test_beside_peers():
    """The benchmark compiles both sides by the same code; a kernel of this file stands for a peer's."""
    x, here = empty(1 << 20), []
    cases = lambda: iter([Case("copied", lambda: copy[1024,](x, x, 1 << 20, 1024), 0, 8 << 20)])  # noqa: E731

    @contextlib.contextmanager
    def on(architecture):
        here.append(architecture)
        yield

    peers = [kernels_static.Peer("somebody", "mlp", cases, on), kernels_static.Peer("nobody", "norm", cases, on)]
    rows = list(kernels_static.compare("sm_90", {"mlp": ["mlp glu forward swiglu bfloat16"]}, peers))
    assert [(whose, loops) for whose, _, loops in rows] == [("bigtrain", "-"), ("somebody", "-")] and here == ["sm_90"]
    text = kernels_static.table(rows)
    assert static.LABEL in text and "| somebody | copied | copy | 4 |" in text


def test_matrix_loops(monkeypatch):
    a, b, c = empty(64, 4096, dtype=torch.bfloat16), empty(4096, 64, dtype=torch.bfloat16), empty(64, 64)
    case = Case("product", lambda: product[1,](a, b, c, 4096, 64, 64, 64, num_warps=4, num_stages=3), flops=1, bytes=1)
    ((_, row, found),) = kernels_static.compiled("somebody", "sm_90", case)
    assert found == f"{row.facts.loop_instructions}/{row.facts.loop_tensor_core}"

    plain, product_, back = Instruction("FADD", ""), Instruction("HMMA.16816", ""), lambda label: Instruction("BRA", label, label)
    waits = ["b", plain, back("b")]  # a loop without products in one with: the wait for a copy
    code = ["a", product_, *waits, back("a"), "c", product_, product_, back("c"), "d", plain, back("d"), Instruction("NOP", "")]
    monkeypatch.setattr(static_facts, "sass", lambda cubin: [x if isinstance(x, str) else Instruction(*x) for x in code])
    assert kernels_static.matrix_loops(SimpleNamespace(asm={"cubin": b""})) == "4/1, 3/2"


def test_our_kernels_in_the_tutorials_tiles():
    found = list(kernels_static.Tutorial.ours(SimpleNamespace(architecture="sm_90")))
    before = dict(attention.BACKWARD_Q)
    assert len(found) == 6 and all("fp16 causal" in case.name for case in found)
    (backward,) = (case for case in found if case.name == "attention backward q d64 fp16 causal, the tutorial's tile")
    (row,) = static.rows_of("sm_90", backward)
    assert (row.constants["BLOCK_M"], row.constants["BLOCK_N"], row.warps, row.stages) == (128, 32, 4, 5)
    assert before == attention.BACKWARD_Q


def test_the_representative_launches_hold_their_budgets():
    rows, failures = static.measure_all(static.jobs(ARCHITECTURES, representative=True), os.cpu_count())
    assert failures + static.violations(rows, json.loads(static.BUDGETS.read_text())) == []
