"""docs/kernels.md says what budgets.json says.

Its table is written again by:

    python -m bigtrain_kernels.static --json rows.json
    python tests/kernels/test_kernel_docs.py rows.json
"""

import json
import re
import sys
from pathlib import Path

import pytest

from bigtrain_kernels import static
from bigtrain_kernels.launch import ARCHITECTURES

DOCUMENT = Path(__file__).parents[2] / "docs/kernels.md"
BEGIN, END = "<!-- written by tests/kernels/test_kernel_docs.py -->\n", "<!-- end -->\n"
HEAD = (
    "", "registers sm_80", "sm_90", "sm_100", "gfx942", "shared KiB", "tensor cores", "main loop / of them", "cost", "FLOP per byte",
    "floor, microseconds",
)  # fmt: skip
LAUNCHES = {
    **{
        f"attention d{D}, {name}": f"attention {case} d{D} bf16 causal: {kernel}"
        for D in (64, 128)
        for name, case, kernel in (
            ("forward", "forward", "forward"),
            ("dQ", "backward q", "backward_q"),
            ("dK and dV", "backward kv", "backward_kv"),
        )
    },
    "RMSNorm 4096 with residual, forward": "rms_norm forward 4096 bfloat16: _forward",
    "RMSNorm 4096 with residual, backward": "rms_norm backward 4096 bfloat16: _backward",
    "RoPE d128": "rope d128 bfloat16 half: _rope",
    "SwiGLU, forward": "glu forward swiglu bfloat16: _forward",
    "SwiGLU, backward": "glu backward swiglu bfloat16: _backward",
    "gate and up with SwiGLU, forward": "gated_linear forward swiglu bfloat16: _forward",
    "gate and up with SwiGLU, backward": "gated_linear backward swiglu bfloat16: _backward",
    "loss, log-sum-exp": "loss statistics bfloat16: statistics",
    "loss, gradient of logits": "loss logit gradients bfloat16: logit_gradients",
    "loss, gradient of hidden states": "loss hidden gradients bfloat16: add_hidden_gradients",
}
"""The rows of the table, and the key of each in budgets.json without its architecture."""


def table(rows: dict[str, dict]) -> str:
    """From the documents of `static --json` by key: registers of each architecture, all else of sm_90."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for name, launch in LAUNCHES.items():
        hopper = rows[f"sm_90 {launch}"]
        f = hopper["facts"]
        loop = f["loop_tensor_core"] > 0
        cells = [
            name, *(str(rows[f"{a} {launch}"]["facts"]["registers"]) for a in ARCHITECTURES), f"{f['shared_bytes'] / 1024:.0f}",
            " ".join(f"{n} {kind}" for kind, n in f["tensor_core"].items()) or "-",
            f"{f['loop_instructions']} / {f['loop_tensor_core']}" if loop else "-", f"{f['loop_cost']:.0f}" if loop else "-",
            f"{hopper['intensity']:,.0f}", f"{hopper['floor_us']:,.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def written() -> list[list[str]]:
    text = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_table_has_every_launch():
    head, _, *rows = written()
    assert tuple(head) == HEAD and [row[0] for row in rows] == list(LAUNCHES)


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_row_is_of_the_baseline(name):
    launches = json.loads(static.BUDGETS.read_text())["launches"]
    (row,) = [row for row in written() if row[0] == name]
    baselines = [launches[f"{architecture} {LAUNCHES[name]}"] for architecture in ARCHITECTURES]
    assert [int(cell) for cell in row[1:5]] == [baseline["registers"] for baseline in baselines]
    hopper = baselines[ARCHITECTURES.index("sm_90")]
    assert int(row[5]) == round(hopper["shared_bytes"] / 1024)
    loop = re.match(r"(\d+) / (\d+)", row[7])
    assert hopper["loop_ratio"] == (loop and round(int(loop[1]) / int(loop[2]), 2))


if __name__ == "__main__":
    measured = {row["key"]: row for row in json.loads(Path(sys.argv[1]).read_text())["rows"]}
    before, begin, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + begin + table(measured) + END + rest.partition(END)[2])
