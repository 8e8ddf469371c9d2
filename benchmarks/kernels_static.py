"""What does the compiler make of our kernels, and of those that one would install instead?

    pip install liger-kernel fla-core einops
    python benchmarks/kernels_static.py [--arch sm_80 sm_90] [--only attention norm] [--tutorial 06-fused-attention.py]

Needs no GPU: both sides go through their own host functions and are compiled in place of being launched, at the same shapes,
with the launch options that their projects choose for that GPU; `bigtrain_kernels.static` says what the columns mean. A peer that is
not installed is left out. Triton's tutorial of fused attention comes in no package: `--tutorial` takes its file from Triton's
repository, compiled with blocks of 128 x 64 and four warps, the first configuration with those of the ones that it tunes over, and
in our tiles; it is fp16, so ours are compiled in fp16 too, and once more in its tiles. Instructions for each tensor-core instruction
compare kernels of one tile, those per MFLOP compare any; the last column has every innermost loop with matrix instructions.

Statically verified, not benchmarked: fewer instructions, registers and spills are reasons for speed, not speed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from bigtrain_kernels import attention, static, static_facts
from bigtrain_kernels.launch import ARCHITECTURES, Case, Launch
from bigtrain_kernels.static_compile import AbsentGpu
from bigtrain_kernels.static_facts import PROCESSORS

BF16 = torch.bfloat16
OURS = {
    "attention": ("attention d64 bf16 causal", "attention d128 bf16 causal"),
    "norm": ("norm rms_norm 4096 bfloat16",),
    "rope": ("rope d128 bfloat16 half",),
    "mlp": ("mlp glu swiglu bfloat16",),
    "cross_entropy": ("cross_entropy bfloat16",),
}
"""Words of our cases for each group of rows."""
OURS_TUTORIAL = ("attention d64 fp16 causal", "attention d128 fp16 causal")
"""The same beside the tutorial, whose kernels are fp16."""
TILES_TUTORIAL = (
    (attention.FORWARD, Launch({"BLOCK_M": 128, "BLOCK_N": 64}, 4, 2)),
    (attention.BACKWARD_KV, Launch({"BLOCK_M": 32, "BLOCK_N": 128}, 4, 5)),
    (attention.BACKWARD_Q, Launch({"BLOCK_M": 128, "BLOCK_N": 32}, 4, 5)),
)
"""Its launches, as entries of our tables."""


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


class Peer(NamedTuple):
    """Somebody's kernels: the cases of one group, and what tells their code which GPU it is for."""

    package: str
    group: str
    cases: Callable[[], Iterator[Case]]
    on: Callable[[str], contextlib.AbstractContextManager]


def liger_norm() -> Iterator[Case]:
    from liger_kernel.ops import fused_add_rms_norm as ops

    N, E = 16384, 4096
    x, residual, grad, grad_residual = (empty(N, E) for _ in range(4))
    weight, rstd = empty(E), empty(N, dtype=torch.float32)
    block, warps = ops.calculate_settings(E)
    yield Case("rms_norm forward 4096", lambda: ops.fused_add_rms_norm_forward(x, residual, weight, 1e-5, 0.0, "llama"), 0, 8 * N * E)
    llama = ops._CASTING_MODE_LLAMA.value
    yield Case(
        "rms_norm backward 4096",
        lambda: ops.fused_add_rms_norm_backward(grad, grad_residual, x, weight, rstd, 0.0, llama, block, warps, 2, False),
        0, 8 * N * E,
    )  # fmt: skip


def liger_rope() -> Iterator[Case]:
    from liger_kernel.ops.rope import rope_backward, rope_forward

    q, k = empty(4, 4096, 32, 128).transpose(1, 2), empty(4, 4096, 8, 128).transpose(1, 2)
    cos, sin = (empty(4, 4096, 128, dtype=torch.float32) for _ in range(2))
    moved = 4 * (q.numel() + k.numel()) + 8 * cos.numel()
    yield Case("rope d128", lambda: rope_forward(q, k, cos, sin), 0, moved)
    yield Case("rope d128 backward", lambda: rope_backward(q, k, cos, sin), 0, moved)


def liger_mlp() -> Iterator[Case]:
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

    gate, up, grad = (empty(8192, 14336) for _ in range(3))
    yield Case("swiglu forward", lambda: swiglu_forward(gate, up), 0, 3 * gate.nbytes)
    yield Case("swiglu backward", lambda: swiglu_backward(gate, up, grad), 0, 5 * gate.nbytes)


def liger_cross_entropy() -> Iterator[Case]:
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    # Its fused linear cross entropy calls cuBLAS for the logits of a chunk of tokens, then this kernel, then cuBLAS twice.
    logits, target = empty(1024, 128256).requires_grad_(), torch.zeros(1024, dtype=torch.int64)
    run = lambda: cross_entropy_forward(logits, target, None, -100, 0.0, 0.0, "mean", None, False)  # noqa: E731
    yield Case("cross entropy of a chunk of logits", run, 0, 2 * logits.nbytes)


@contextlib.contextmanager
def liger_on(architecture: str) -> Iterator[None]:
    from liger_kernel.ops import cross_entropy, swiglu

    family = {"sm_80": "ampere_ada", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna3"}[architecture]
    hip = architecture.startswith("gfx")
    with contextlib.ExitStack() as stack:
        for module in (cross_entropy, swiglu):
            stack.enter_context(mock.patch.object(module, "infer_device_arch", lambda: family))
        stack.enter_context(mock.patch.object(cross_entropy, "is_hip", lambda: hip))
        yield


def fla_attention() -> Iterator[Case]:
    from fla.ops.attn.parallel import parallel_attn_bwd, parallel_attn_fwd

    B, T, H, G = 4, 4096, 16, 4
    for D in (64, 128):
        q, out, grad = (empty(B, T, H, D) for _ in range(3))
        k, v = (empty(B, T, G, D) for _ in range(2))
        lse = empty(B, T, H, dtype=torch.float32)
        flops, moved = 2 * B * H * T * T * D, 4 * (q.numel() + k.numel())
        forward = lambda q=q, k=k, v=v, s=D**-0.5: parallel_attn_fwd(q, k, v, None, None, s)  # noqa: E731
        yield Case(f"attention forward d{D} causal", forward, flops, moved)
        backward = lambda q=q, k=k, v=v, o=out, g=grad, e=lse, s=D**-0.5: parallel_attn_bwd(q, k, v, o, None, e, g, scale=s)  # noqa: E731
        yield Case(f"attention backward d{D} causal", backward, 7 * flops // 2, 2 * moved)


def fla_on(architecture: str) -> contextlib.AbstractContextManager:
    from fla.ops.attn import parallel

    shared = {"hopper": 232448, "ampere": 166912}  # its Backend.get_shared_memory
    limit = PROCESSORS[architecture].shared_per_block
    return mock.patch.object(parallel, "check_shared_mem", lambda family, device=0: limit >= shared[family])


PEERS = [
    Peer("liger_kernel", "norm", liger_norm, liger_on),
    Peer("liger_kernel", "rope", liger_rope, liger_on),
    Peer("liger_kernel", "mlp", liger_mlp, liger_on),
    Peer("liger_kernel", "cross_entropy", liger_cross_entropy, liger_on),
    Peer("fla", "attention", fla_attention, fla_on),
]


class Tutorial:
    """Triton's fused attention from its file: fp16, and as many key heads as query heads, which is all that it knows.

    In its own tiles and in ours. In ours its forward pass does without the assertion that a block has no more keys than a head has
    dimensions; its backward kernel is our two in one, and a row shows one loop: so it is compiled in our tile for dK and dV, and again
    in that for dQ, with the other loop's as small as it can be.
    """

    def __init__(self, path: str):
        self.source = Path(path).read_text(encoding="utf-8").replace("tl.static_assert(BLOCK_N <= HEAD_DIM)", "pass")

    @contextlib.contextmanager
    def on(self, architecture: str) -> Iterator[None]:
        self.architecture, gpu = architecture, AbsentGpu(architecture)
        gpu.get_active_torch_device = lambda: torch.device("meta")
        number = int(architecture.strip("smgfx_"))
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: divmod(number, 10)))
            file = Path(folder, "tutorial.py")
            file.write_text(self.source, encoding="utf-8")
            spec = importlib.util.spec_from_file_location("tutorial", file)
            self.module = importlib.util.module_from_spec(spec)
            with mock.patch.object(triton.runtime.driver, "_active", gpu):  # it asks for the GPU when it is imported
                spec.loader.exec_module(self.module)
            yield

    def ours(self) -> Iterator[Case]:
        """Our kernels in its tiles."""

        def in_its_tiles(case: Case, D: int) -> None:
            with contextlib.ExitStack() as stack:
                for table, tile in TILES_TUTORIAL:
                    stack.enter_context(mock.patch.dict(table, {(self.architecture, D, 2, False): tile}))
                case.run()

        for D, words in zip((64, 128), OURS_TUTORIAL):
            for job in static.jobs([self.architecture], [words]):
                case = static.family_cases(job.family, job.architecture)[job.index]
                if "row sums" not in case.name:
                    name = f"{case.name}, the tutorial's tile"
                    yield case._replace(name=name, run=functools.partial(in_its_tiles, case, D))

    def tiles(self, D: int) -> Iterator[tuple[str, Launch | None, dict[str, int]]]:
        """Names, with what launches the forward pass (None: its own) and which options of the backward kernel to replace."""
        tables = attention.FORWARD, attention.BACKWARD_KV, attention.BACKWARD_Q
        forward, kv, q = (table[self.architecture, D, 2, False] for table in tables)
        yield "its tiles", None, {}
        M, N = kv.blocks.values()
        blocks = {"BLOCK_M1": M, "BLOCK_N1": N, "BLOCK_M2": N, "BLOCK_N2": 16, "BLK_SLICE_FACTOR": 1}
        yield "our tiles, dK and dV", forward, {**blocks, "num_warps": kv.warps, "num_stages": kv.stages}
        M, N = q.blocks.values()
        blocks = {"BLOCK_M1": 16, "BLOCK_N1": M, "BLOCK_M2": M, "BLOCK_N2": N, "BLK_SLICE_FACTOR": 1}
        yield "our tiles, dQ", forward, {**blocks, "num_warps": q.warps, "num_stages": q.stages}

    def cases(self) -> Iterator[Case]:
        for D in (64, 128):
            q, k, v = (empty(4, 16, 4096, D, dtype=torch.float16).requires_grad_() for _ in range(3))
            flops, moved = 2 * 4 * 16 * 4096**2 * D, 8 * q.numel()
            for name, *tile in self.tiles(D):

                def run(inputs: Any = (q, k, v), scale: float = D**-0.5, tile: Any = tile) -> None:
                    with launched_with(*tile):
                        self.module.attention(*inputs, True, scale, False).sum().backward()

                yield Case(f"attention d{D} causal, forward and backward, {name}", run, 9 * flops // 2, 3 * moved)


@contextlib.contextmanager
def launched_with(forward: Launch | None, backward: dict[str, int]) -> Iterator[None]:
    """Within it the tutorial's autotuned kernel is launched with one configuration, and its backward kernel with these options."""
    launch = JITFunction.run

    def one_config(tuner: Autotuner, *args: Any, **options: Any) -> Any:
        tile = {"BLOCK_M": 128, "BLOCK_N": 64}
        config = next(c for c in tuner.configs if tile.items() <= c.kwargs.items() and c.num_warps == 4)
        chosen = config.all_kwargs() | (forward.arguments() if forward else {})
        if config.pre_hook is not None:
            config.pre_hook({**dict(zip(tuner.arg_names, args)), **options, **chosen})
        return tuner.fn.run(*args, **options, **chosen)

    def with_options(kernel: JITFunction, *args: Any, **options: Any) -> Any:
        return launch(kernel, *args, **(options | backward if backward.keys() <= options.keys() else options))

    with mock.patch.object(Autotuner, "run", one_config), mock.patch.object(JITFunction, "run", with_options):
        yield


def compare(architecture: str, groups: dict[str, Sequence[str]], peers: Sequence[Peer]) -> Iterator[tuple[str, static.Row, str]]:
    """(whose, row, its loops): ours by the words of each group, then the peers'."""
    for group, words in groups.items():
        for job in static.jobs([architecture], words):
            yield from compiled("bigtrain", architecture, static.family_cases(job.family, architecture)[job.index])
        for peer in peers:
            if peer.group == group:
                with peer.on(architecture):
                    for case in peer.cases():
                        yield from compiled(peer.package, architecture, case)


def compiled(whose: str, architecture: str, case: Case) -> Iterator[tuple[str, static.Row, str]]:
    print(f"{architecture} {whose} {case.name}", file=sys.stderr)
    kernels: list[Any] = []

    def facts_of(kernel: Any, architecture: str) -> static_facts.Facts:
        kernels.append(kernel)
        return static_facts.facts(kernel, architecture)

    with mock.patch.object(static, "facts", facts_of):
        rows = static.rows_of(architecture, case)
    for row, kernel in zip(rows, kernels, strict=True):
        yield whose, row, matrix_loops(kernel)


def matrix_loops(kernel: Any) -> str:
    """The innermost loops with matrix instructions, in the order of the code: instructions / matrix instructions."""
    nvidia = "cubin" in kernel.asm
    code = static_facts.sass(kernel.asm["cubin"]) if nvidia else static_facts.amdgcn(kernel.asm["amdgcn"])

    def matrix(loop: Sequence[static_facts.Instruction]) -> int:
        return sum(x.name.split(".")[0].endswith("MMA") or x.name.startswith("v_mfma") for x in loop)

    found = [loop for loop in static_facts.loops([x for x in code if isinstance(x, str) or x.name != "NOP"]) if matrix(loop)]
    members = [set(map(id, loop)) for loop in found]
    inner = [loop for loop, ids in zip(found, members) if not any(other < ids for other in members)]
    return ", ".join(f"{len(loop)}/{matrix(loop)}" for loop in inner) or "-"


COLUMNS = (
    "", "case", "kernel", "warps", "stages", "regs", "spilled B", "shared KiB", "resident warps", "matrix instr.", "instr.", "in loop",
    "per matrix", "per MFLOP", "wide", "async", "narrow", "f64", "atomics",
    "matrix loops",
)  # fmt: skip


def table(rows: Sequence[tuple[str, static.Row, str]]) -> str:
    """One part for each architecture, in Markdown."""
    lines = []
    for architecture in dict.fromkeys(row.architecture for _, row, _ in rows):
        lines += [f"{architecture} ({PROCESSORS[architecture].gpu}), triton {triton.__version__}: {static.LABEL}", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        for whose, row, loops in rows:
            if row.architecture == architecture:
                found = dict(zip(static.COLUMNS, static.cells(row)))
                lines.append("| " + " | ".join([whose, *(found[name] for name in COLUMNS[1:-1]), loops]) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--tutorial", metavar="FILE", help="06-fused-attention.py of Triton's repository")
    options = parser.parse_args(argv)
    peers = [peer for peer in PEERS if importlib.util.find_spec(peer.package)]
    for missing in sorted({peer.package for peer in PEERS} - {peer.package for peer in peers}):
        print(f"{missing} is not installed: left out", file=sys.stderr)
    groups = {name: OURS[name] for name in options.only}
    if options.tutorial and "attention" in groups:
        tutorial = Tutorial(options.tutorial)
        groups["attention"] += OURS_TUTORIAL
        peers += [Peer("bigtrain", "attention", tutorial.ours, tutorial.on), Peer("tutorial", "attention", tutorial.cases, tutorial.on)]
    print(table([row for architecture in options.arch for row in compare(architecture, groups, peers)]))


if __name__ == "__main__":
    main()
