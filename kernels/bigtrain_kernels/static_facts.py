"""What did the compiler decide? Facts about a compiled kernel, read from its machine code (SASS or AMDGCN) and its metadata."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton


class Processor(NamedTuple):
    """One multiprocessor (NVIDIA) or compute unit (AMD) and its GPU, as far as a kernel's budget depends on them."""

    gpu: str
    shared_per_block: int
    """Bytes of shared memory (LDS) that one block may ask for."""
    shared: int
    reserved: int
    """Bytes of shared memory that the system takes for each resident block."""
    registers: int
    """32-bit registers of all lanes together."""
    register_unit: int
    """Registers of a warp are handed out in multiples of this."""
    warps: int
    blocks: int
    tensor_tflops: float
    """Dense bf16 peak, TFLOP/s."""
    vector_tflops: float
    """float32 peak without tensor cores."""
    terabytes: float
    """Memory bandwidth, TB/s."""


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; register unit of 256 a warp: the
# toolkit's cuda_occupancy.h. A block may have 163 KiB on an A100, but 99 on sm_86, sm_89 and sm_120, which take its entries.
# AMD: CDNA3 ISA guide: 512 registers a lane in each of four SIMDs, in units of 8, eight waves each. Peaks: the data sheets of
# the GPU named.
PROCESSORS = {
    "sm_80": Processor("A100 SXM 80 GB", 99 << 10, 164 << 10, 1 << 10, 65536, 256, 64, 32, 312, 19.5, 2.04),
    "sm_90": Processor("H100 SXM", 227 << 10, 228 << 10, 1 << 10, 65536, 256, 64, 32, 989, 66.9, 3.35),
    "sm_100": Processor("B200", 227 << 10, 228 << 10, 1 << 10, 65536, 256, 64, 32, 2250, 75, 8.0),
    "gfx942": Processor("MI300X", 64 << 10, 64 << 10, 0, 4 * 512 * 64, 8 * 64, 32, 32, 1307, 163, 5.3),
}
TENSOR_MEMORY = 512
"""Columns of Blackwell's tensor memory in a multiprocessor."""
WIDE = 16
"""Bytes of the widest ordinary load, 128 bits a thread."""


class Loads(NamedTuple):
    """Global loads in the code, by how they go."""

    wide: int = 0
    """Of 128 bits a thread or more."""
    asynchronous: int = 0
    """Past the registers: cp.async, TMA, loads into LDS."""
    narrow: int = 0
    narrow_share: float = 0.0
    """Of the bytes of one execution of each load, the part that the narrow ones bring."""


class Facts(NamedTuple):
    registers: int
    """A thread's. AMD: vector and accumulation registers together."""
    accumulation_registers: int
    """AMD's AGPRs, part of `registers`."""
    spilled_bytes: int
    """Bytes a thread stores to and loads from its spill slots, counted once for each instruction."""
    stack_bytes: int
    shared_bytes: int
    tensor_core: dict[str, int]
    """Matrix instructions by kind: HMMA, HGMMA, UTCHMMA, MFMA."""
    loads: Loads
    """On the hot path: the main loop where that loads at all, otherwise the kernel."""
    float64: int
    atomics: int
    """Read-modify-write instructions on global memory."""
    instructions: int
    loop_instructions: int
    """Of the main loop: the innermost one with the most matrix instructions (without them, the longest); 0 without a loop."""
    loop_tensor_core: int
    loop_matrix_flops: int
    """Floating-point operations of the main loop's matrix instructions, one warp's share; 0 where the code does not say (tcgen05)."""
    loop_waits: int
    """Of the main loop: waits for HGMMA. As many as HGMMAs: the assembler let none overlap the next (its advisory C7515 and others)."""
    resident_warps: int
    """What a multiprocessor can hold at a time."""
    tall_matmuls: int
    """16-bit matrix products of 64 rows or more in the source."""
    short_matmuls: int
    """16-bit matrix products of fewer rows."""

    @property
    def loop_ratio(self) -> float | None:
        """Instructions of the main loop for each matrix instruction in it."""
        return round(self.loop_instructions / self.loop_tensor_core, 2) if self.loop_tensor_core else None

    @property
    def loop_cost(self) -> float | None:
        """Instructions of the main loop for each million operations of its matrix instructions: what compares unlike tiles."""
        return round(1e6 * self.loop_instructions / self.loop_matrix_flops, 1) if self.loop_matrix_flops else None


def facts(compiled: Any, architecture: str) -> Facts:
    """Of a CompiledKernel of Triton's, compiled for one of launch.ARCHITECTURES."""
    return _nvidia(compiled, architecture) if "cubin" in compiled.asm else _amd(compiled, architecture)


class Instruction(NamedTuple):
    name: str
    """With its modifiers: LDG.E.128, v_mfma_f32_32x32x8_bf16_1k."""
    text: str
    target: str | None = None
    """The label that it may jump to."""
    falls_through: bool = True


def sass(cubin: bytes) -> list[Instruction | str]:
    """Instructions and labels (as str) of an NVIDIA binary, in order."""
    line = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
    code: list[Instruction | str] = []
    for row in _tool(triton.knobs.nvidia.nvdisasm.path, "-c", cubin).splitlines():
        if match := line.match(row):
            predicate, name, operands = match.groups()
            jump = re.search(r"`\((\.L_x_\d+)\)", operands) if name.startswith(("BRA", "WARPSYNC", "JMP")) else None
            always = not predicate and (name.split(".")[0] in ("EXIT", "RET", "BRX") or (jump and operands.strip() == jump[0]))
            code.append(Instruction(name, operands, jump and jump[1], not always))
        elif label := re.match(r"^(\.L_x_\d+):", row):
            code.append(label[1])
    return code


def amdgcn(text: str) -> list[Instruction | str]:
    """Instructions and labels (as str) of AMD's assembly text, in order."""
    code: list[Instruction | str] = []
    for row in text.partition(".section\t.AMDGPU")[0].splitlines():
        if label := re.match(r"^(\.LBB\w+):", row):
            code.append(label[1])
        elif match := re.match(r"^\t([a-z]\w+)\s*([^;]*)", row):
            name, operands = match.groups()
            jump = operands.strip() if name.startswith(("s_branch", "s_cbranch")) else None
            code.append(Instruction(name, operands, jump, name not in ("s_branch", "s_endpgm", "s_setpc_b64")))
    return code


def loops(code: Sequence[Instruction | str]) -> list[list[Instruction]]:
    """The natural loops of the control-flow graph, each as its instructions, inner loops within those of outer ones.

    A jump back to a block that dominates it closes a loop (Aho et al., Compilers, 9.6), so blocks that the compiler has moved
    out of the way belong to the loop that they are part of.
    """
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for item in code:
        if blocks[-1] and (isinstance(item, str) or blocks[-1][-1].target or not blocks[-1][-1].falls_through):
            blocks.append([])
        if isinstance(item, str):
            labels[item] = len(blocks) - 1
        else:
            blocks[-1].append(item)
    after: list[set[int]] = [set() for _ in blocks]
    for i, block in enumerate(blocks):
        last = block[-1] if block else None
        if last and last.target in labels:
            after[i].add(labels[last.target])
        if i + 1 < len(blocks) and (last is None or last.falls_through):
            after[i].add(i + 1)
    reached, queue = {0}, [0]
    while queue:
        block = queue.pop()
        queue += after[block] - reached
        reached |= after[block]
    before = [{b for b in reached if i in after[b]} for i in range(len(blocks))]
    everything = (1 << len(blocks)) - 1
    dominators = [1] + [everything] * (len(blocks) - 1)  # sets of blocks, as bits
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            found = everything
            for b in before[i]:
                found &= dominators[b]
            found |= 1 << i
            changed, dominators[i] = changed or found != dominators[i], found
    found_loops = []
    for header in sorted(reached):
        queue = [b for b in before[header] if dominators[b] >> header & 1]
        body = {header, *queue}
        closes = bool(queue)
        while queue:
            block = queue.pop()
            if block != header:
                queue += before[block] - body
                body |= before[block]
        if closes:
            found_loops.append([x for i in sorted(body) for x in blocks[i]])
    return found_loops


def main_loop(code: Sequence[Instruction | str], is_matrix: Any) -> list[Instruction]:
    """The innermost loop with the most matrix instructions, or without any the longest innermost one; [] without a loop.

    Of two alike (a masked and an unmasked one) the shorter.
    """
    found = loops(code)
    matrix = {id(body): sum(map(is_matrix, body)) for body in found}
    if any(matrix.values()):
        found = [body for body in found if matrix[id(body)]]
    members = [set(map(id, body)) for body in found]
    inner = [body for body, ids in zip(found, members) if not any(other < ids for other in members)]
    return max(inner, key=lambda body: (matrix[id(body)], -len(body) if matrix[id(body)] else len(body)), default=[])


def _nvidia(compiled: Any, architecture: str) -> Facts:
    cubin, ptx, meta = compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata
    usage = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    code = [x for x in sass(cubin) if isinstance(x, str) or x.name != "NOP"]  # what pads the end

    def is_matrix(x: Instruction) -> bool:
        return x.name.split(".")[0].endswith("MMA")

    def load(x: Instruction) -> tuple[str, int] | None:
        base, *modifiers = x.name.split(".")
        if base in ("UBLKCP", "UTMALDG"):
            return "asynchronous", WIDE
        if base in ("LDG", "LDGSTS"):
            size = _sass_bytes(modifiers)
            return ("asynchronous" if base == "LDGSTS" else "wide" if size >= WIDE else "narrow"), size
        return None

    instructions = [x for x in code if isinstance(x, Instruction)]
    names = Counter(x.name.split(".")[0] for x in instructions)
    loop = main_loop(code, is_matrix)
    warps = int(re.search(r"\.(?:req|max)ntid (\d+)", ptx)[1]) // 32
    return Facts(
        registers=registers,
        accumulation_registers=0,
        spilled_bytes=sum(_sass_bytes(x.name.split(".")[1:]) for x in instructions if x.name.split(".")[0] in ("LDL", "STL")),
        stack_bytes=stack,
        shared_bytes=meta.shared,
        tensor_core={name: count for name, count in sorted(names.items()) if name.endswith("MMA")},
        loads=_loads(load, loop, instructions),
        float64=len(re.findall(r"\.f64\b", ptx)),
        atomics=sum(names[name] for name in ("ATOM", "ATOMG", "RED", "REDG")),
        instructions=len(instructions),
        loop_instructions=len(loop),
        loop_tensor_core=sum(map(is_matrix, loop)),
        loop_matrix_flops=sum(matrix_flops(x.name) for x in loop),
        loop_waits=sum(x.name == "WARPGROUP.DEPBAR.LE" for x in loop),
        resident_warps=resident_warps(architecture, registers, meta.shared, warps, getattr(meta, "tmem_size", None) or 0),
        **_matmuls(compiled.asm["ttir"]),
    )


def matrix_flops(name: str) -> int:
    """Operations of a matrix instruction, one warp's share: HMMA.16816, HGMMA.64x128x16 (of four warps), v_mfma_f32_32x32x8; 0: unknown."""
    if shape := re.match(r"HMMA\.16(8)(8|16)", name):
        return 2 * 16 * int(shape[1]) * int(shape[2])
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) // 4
    if shape := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", name):
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3])
    return 0


def _sass_bytes(modifiers: Sequence[str]) -> int:
    """Bytes a thread that a load or store moves, from its modifiers: LDG.E.128 moves 16."""
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[m] for m in modifiers if m in sizes), 4)


def _amd(compiled: Any, architecture: str) -> Facts:
    text, meta = compiled.asm["amdgcn"], compiled.metadata

    def figure(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

    def is_matrix(x: Instruction) -> bool:
        return x.name.startswith("v_mfma")

    def load(x: Instruction) -> tuple[str, int] | None:
        if not re.match(r"(global|buffer|flat)_load_", x.name):
            return None
        size = _amd_bytes(x.name)
        return ("asynchronous" if "_lds_" in x.name or x.text.endswith(" lds") else "wide" if size >= WIDE else "narrow"), size

    code = amdgcn(text)
    instructions = [x for x in code if isinstance(x, Instruction)]
    loop = main_loop(code, is_matrix)
    matrix = sum(map(is_matrix, instructions))
    # On this family vgpr_count is the whole of the unified file that a lane gets, accumulation registers included.
    registers = figure("vgpr_count")
    return Facts(
        registers=registers,
        accumulation_registers=figure("agpr_count"),
        spilled_bytes=sum(_amd_bytes(x.name) for x in instructions if x.name.startswith("scratch_")),
        stack_bytes=figure("private_segment_fixed_size"),
        shared_bytes=meta.shared,
        tensor_core={"MFMA": matrix} if matrix else {},
        loads=_loads(load, loop, instructions),
        float64=sum("_f64" in x.name for x in instructions),
        atomics=sum(bool(re.match(r"(global|buffer|flat)_atomic_", x.name)) for x in instructions),
        instructions=len(instructions),
        loop_instructions=len(loop),
        loop_tensor_core=sum(map(is_matrix, loop)),
        loop_matrix_flops=sum(matrix_flops(x.name) for x in loop),
        loop_waits=0,
        resident_warps=resident_warps(architecture, registers, meta.shared, meta.num_warps),
        **_matmuls(compiled.asm["ttir"]),
    )


def _amd_bytes(name: str) -> int:
    if words := re.search(r"_dwordx(\d)", name):
        return 4 * int(words[1])
    return 4 if "_dword" in name else 1 if "byte" in name else 2


def _loads(load: Any, loop: Sequence[Instruction], instructions: Sequence[Instruction]) -> Loads:
    found = [x for x in map(load, loop) if x] or [x for x in map(load, instructions) if x]
    number, size = Counter(kind for kind, _ in found), Counter()
    for kind, width in found:
        size[kind] += width
    return Loads(**number, narrow_share=round(size["narrow"] / size.total(), 3) if found else 0.0)


def _matmuls(ttir: str) -> dict[str, int]:
    """16-bit matrix products in Triton's IR, by rows of the left operand."""
    rows = [int(n) for n in re.findall(r"= tt\.dot .*: tensor<(?:\d+x)?(\d+)x\d+x(?:bf16|f16)> \*", ttir)]
    return {"tall_matmuls": sum(n >= 64 for n in rows), "short_matmuls": sum(n < 64 for n in rows)}


def resident_warps(architecture: str, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """Warps that a multiprocessor holds at a time: as many blocks as registers, shared memory, tensor memory and warp slots allow."""
    p = PROCESSORS[architecture]
    lanes = 64 if architecture.startswith("gfx") else 32
    of_warp = -(-max(registers, 1) * lanes // p.register_unit) * p.register_unit
    # A warp's registers lie in one of the four parts of the multiprocessor.
    by_registers = 4 * (p.registers // 4 // of_warp) // warps
    by_shared = p.shared // (shared + p.reserved) if shared + p.reserved else p.blocks
    by_tensor_memory = TENSOR_MEMORY // tensor_memory if tensor_memory else p.blocks
    return warps * min(by_registers, by_shared, by_tensor_memory, p.warps // warps, p.blocks)


def _tool(path: str, option: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout
