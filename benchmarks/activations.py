"""How many bytes does a layer keep for its backward pass: on bigtrain's kernels, on its torch backend, and on plain torch?

    python benchmarks/activations.py [--width 256] [--heads 8] [--kv-heads 2] [--mlp-width 704] [--length 128] [--dtype bf16]

Counted from the tensors that autograd saves in one block's forward pass, each storage once, weights not. The kernels run
in Triton's interpreter, so this needs no GPU, and the sizes are small; bytes grow with the tokens and the widths (and, for
plain torch's attention, with the square of the length).
"""

from __future__ import annotations

import argparse
import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bigtrain.config import Model
from bigtrain.model import layers
from bigtrain.model.initialise import initialise
from bigtrain.model.layers import Context
from bigtrain.model.transformer import Transformer
from bigtrain_kernels import ops, reference


class PlainOps:
    """The operators as one writes them in torch, for autograd to take apart: what `ops` offers, from reference.py."""

    @staticmethod
    def rms_norm(x, weight, eps, *, residual=None, backend):
        total = x if residual is None else x + residual
        normed = reference.rms_norm(total, weight, eps)
        return normed if residual is None else (normed, total)

    @staticmethod
    def rope(q, k, cos, sin, *, backend):
        return reference.rope(q, cos, sin), reference.rope(k, cos, sin)

    @staticmethod
    def attention(q, k, v, *, causal, document_BT, mask, backend):
        return reference.attention(q, k, v, causal=causal)

    @staticmethod
    def glu(gate, up, kind, *, backend):
        return reference.glu(gate, up, kind)


def kept(block: nn.Module, x: torch.Tensor, context: Context) -> int:
    """Bytes that autograd keeps of one forward pass of `block`, its weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x, context)
    del out
    return sum(storages.values())


def measure(config: Model, length: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a token of one layer, by who computes it."""
    found = {}
    context = Context(ops.rope_angles(torch.arange(length)[None], config.head_dim_, config.rope_theta), None, None, None)
    for name, backends in (
        ("plain torch", ops.resolve_backends("cpu", "torch")),
        ("bigtrain, torch backend", ops.resolve_backends("cpu", "torch")),
        ("bigtrain, Triton kernels", ops.resolve_backends("cpu", "triton")),
        ("the same, the MLP fused", ops.resolve_backends("cpu", "triton", {"mlp": "fused"})),
    ):
        model = Transformer(config, config.vocab_size, backends)
        initialise(model, seed=0)
        x = torch.randn(1, length, config.width).to(dtype).requires_grad_()
        layers.ops = PlainOps if name == "plain torch" else ops
        try:
            found[name] = kept(model.to(dtype).layers[0], x, context) / length
        finally:
            layers.ops = ops
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--mlp-width", type=int, default=704)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    config = Model(
        vocab_size=64, layers=1, width=options.width, heads=options.heads, kv_heads=options.kv_heads, mlp_width=options.mlp_width,
        max_positions=options.length,
    )  # fmt: skip
    found = measure(config, options.length, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    table = Table(
        title=f"Kept for backward by a layer: {options.width} wide, {options.length} positions, {options.dtype}", title_justify="left"
    )
    for heading in ("", "bytes a token", "in widths", "of plain torch's"):
        table.add_column(heading, justify="right" if heading else "left")
    size = options.width * (2 if options.dtype == "bf16" else 4)
    for name, count in found.items():
        table.add_row(name, f"{count:,.0f}", f"{count / size:.1f}", f"{count / found['plain torch']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
