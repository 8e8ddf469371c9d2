"""benchmarks/kernels.py and benchmarks/tune.py short of a GPU: every variant at a tiny size on the CPU, with a clock in place of CUDA's."""

import contextlib
import inspect
import itertools
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo  # looks at sdpa_kernel, which is replaced below
from torch.nn.attention import varlen

from bigtrain_kernels import attention_tables, reference
from bigtrain_kernels.launch import ARCHITECTURES, Launch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernelwork
import tune

import kernels

TINY = {
    "attention": [
        partial(kernelwork.attention, 32, 1, 1, 2, 48),
        partial(kernelwork.attention, 32, 2, 1, 1, 48),
        partial(kernelwork.attention, 32, 1, 1, 1, 48, packed=True),
    ],
    "norm": [partial(norm, 24, 128) for norm in (kernelwork.rms_norm, kernelwork.layer_norm)],
    "rope": [partial(kernelwork.rope, 2, 16, 4, 2, 32)],
    "mlp": [
        *(partial(kernelwork.glu, kind, 16, 96) for kind in ("swiglu", "geglu_tanh")),
        *(partial(kernelwork.activation, kind, 16, 96) for kind in ("gelu", "gelu_tanh", "relu2")),
    ],
    "gated": [partial(kernelwork.gated_linear, 32, 64, 96)],
    "loss": [partial(kernelwork.loss, 32, 32, 160)],
}


class Event:
    """CUDA's, on a clock that goes on by 1 ms at each look."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1.0
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


VARLEN = inspect.signature(varlen.varlen_attn)


def packed_attention(*arguments, **options):
    """varlen_attn, which a CPU does not have."""
    given = VARLEN.bind(*arguments, **options).arguments
    q, k, v, ends = (given[name] for name in ("query", "key", "value", "cu_seq_q"))
    assert ends is given["cu_seq_k"] and given["window_size"] == (-1, 0)
    assert given["max_q"] == given["max_k"] == int(ends.diff().max()) and int(ends[-1]) == len(q)
    pieces = [reference.attention(*(x[None, a:b] for x in (q, k, v)), causal=True)[0] for a, b in itertools.pairwise(ends)]
    return torch.cat(pieces)


def compiled(function):
    """For one family with the partition into forward and backward that Inductor has, whose backward pass frees what it was given."""
    return torch.compile(function, backend="aot_eager_decomp_partition" if function.__qualname__.startswith("rms_norm") else "eager")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(kernelwork, "DEVICE", "cpu")
    monkeypatch.setattr(kernelwork, "FAMILIES", TINY)
    monkeypatch.setattr(kernelwork, "CHUNK", 12)
    monkeypatch.setattr(kernelwork, "compiled", compiled)
    monkeypatch.setattr(kernels, "FLUSH", 16)
    monkeypatch.setattr(kernels, "REPETITIONS", (1, 1))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    monkeypatch.setattr(varlen, "varlen_attn", packed_attention)


@pytest.mark.parametrize("family", TINY)
def test_every_variant_is_right_and_has_its_times(family):
    rows = list(kernels.measure_all([family]))
    faults = {(row["work"], row["variant"]): row["fault"] for row in rows if "fault" in row}
    # flex_attention has no backward pass on a CPU; some of Liger's kernels call what the interpreter does not have.
    assert not {
        key: fault for key, fault in faults.items()
        if not (key[1] == "flex_attention" and "CPU" in fault) and not (key[1] == "liger" and "InterpreterError" in fault)
    }  # fmt: skip
    ran = [row for row in rows if "fault" not in row]
    assert all(row["error"] < 0.01 and (row["forward_ms"], row["backward_ms"]) == (1.0, 1.0) for row in ran)
    for name in {row["work"] for row in rows}:
        assert {"bigtrain", "torch.compile"} <= {row["variant"] for row in ran if row["work"] == name}


@pytest.mark.parametrize("make", TINY["attention"])
def test_the_mask_of_flex_attention(make):
    work = make()
    with torch.no_grad():
        out = work.variants["flex_attention"](*work.inputs)
    exact = kernels.truth(work)[0]
    assert (out.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("make", [TINY["attention"][1], TINY["loss"][0]])
def test_the_truth_in_parts_is_the_whole(make):
    work = make()
    assert len(work.parts) > 2
    for parts, whole in zip(kernels.truth(work), kernels.truth(work._replace(parts=None)), strict=True):
        torch.testing.assert_close(parts, whole)


def test_rates():
    work = TINY["loss"][0]()
    rows = {name: kernels.measure(work, name, kernels.truth(work)) for name in ("torch", "bigtrain's torch")}
    product = 2 * 32 * 32 * 160 / 1e9
    assert rows["torch"]["rates"] == pytest.approx({"forward": product, "backward": 2 * product, "both": 1.5 * product})
    assert rows["bigtrain's torch"]["rates"] == pytest.approx({"both": 1.5 * product})
    grouped = TINY["attention"][1]()
    assert (grouped.forward, grouped.backward) == (4 * 2 * 48 * 49 // 2 * 32, 10 * 2 * 48 * 49 // 2 * 32)


def add(x):
    return x + 1


class Spoils(torch.autograd.Function):
    """x + 1, written over its input and its gradient, as some of Liger's kernels do."""

    @staticmethod
    def forward(ctx, x):
        out = x + 1
        x.detach().fill_(float("nan"))
        return out

    @staticmethod
    def backward(ctx, grad):
        kept = grad.clone()
        grad.detach().fill_(float("nan"))
        return kept


def fails_in_the_backward_pass(x):
    x.register_hook(lambda grad: 1 / 0)
    return x + 1


def test_what_fails_is_a_row_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    work = kernelwork.Work("add", [kernelwork.randn(4, 8)], [kernelwork.randn(4, 8)], add, {}, 64, 128, kernelwork.MEMORY)
    variants = {
        "bigtrain": add,
        "wrong": lambda x: x + 2,
        "nan": lambda x: x * float("nan"),
        "raises": lambda x: x.no_such_method(),
        "two": lambda x: (x, x),
        "backward": fails_in_the_backward_pass,
        "late": add,
        "spoils": Spoils.apply,
    }
    times = kernels.times

    def too_little_memory(work, function):
        if function is variants["late"]:
            raise torch.OutOfMemoryError("too little memory\nand more")
        return times(work, function)

    variants["late"] = lambda x: x + 1
    monkeypatch.setattr(kernels, "times", too_little_memory)
    impossible = work._replace(name="impossible", exact=lambda x: 1 / 0)
    monkeypatch.setattr(kernelwork, "FAMILIES", {"add": [lambda: impossible, lambda: work._replace(variants=variants)]})
    rows = kernels.report(["add"], tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    faults = {row["variant"]: row.get("fault", "").split(":")[0] for row in rows}
    assert faults == {
        "float64": "ZeroDivisionError", "bigtrain": "", "wrong": "wrong", "nan": "wrong", "raises": "AttributeError", "two": "ValueError",
        "backward": "ZeroDivisionError", "late": "OutOfMemoryError", "spoils": "",
    }  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows) and "too little memory" in printed[-2] and "GB/s" in printed[-1]
    assert work.inputs[0].isfinite().all() and work.grads[0].isfinite().all()


def test_no_repetition_sees_what_an_earlier_one_left(monkeypatch):
    monkeypatch.setattr(kernels, "REPETITIONS", (3, 3))
    made = iter(range(10))
    seen = []
    assert kernels.milliseconds(lambda: next(made), seen.append) == 1.0
    assert seen == [0, 1, 2, 3]


@pytest.fixture
def tables(monkeypatch):
    """tune.py with few candidates and with a clock in place of do_bench: by the table as it is, 64 x 16 is the fastest."""
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "SIZES", {2: ((16, 64), (1,)), 4: ((16, 48), (1,))})
    monkeypatch.setattr(tune, "WARPS", (4,))
    monkeypatch.setattr(tune, "WIDTH", 32)
    monkeypatch.setattr(tune, "all_refused", lambda jobs, size: ["spills" if x == launch(64, 64) else None for _, x in jobs])
    before = {name: dict(table) for name, table in tune.TABLES.items()}
    yield before
    assert before == tune.TABLES


def launch(M, N):
    return Launch({"BLOCK_M": M, "BLOCK_N": N}, 4, 1)


def clock(entry, times):
    """do_bench: the milliseconds of the candidate that the entry has now."""

    def do_bench(run, **options):
        run()
        return times.get(tuple(entry.present.blocks.values()), 8.0)

    return do_bench


def test_every_entry_can_be_tuned():
    options = tune.arguments([])
    for arch in (*ARCHITECTURES, "interpreter"):
        found = tune.selected(arch, options)
        assert len(found) == len(set(found)) == 3 * 4 * 2 * 2
        assert all(tune.candidates(entry)[0] == entry.present and len(tune.candidates(entry)) > 30 for entry in found)
    few = tune.selected("sm_90", tune.arguments(["--dim", "64", "--bytes", "2", "--mask", "ranges", "--kernel", "forward"]))
    assert [str(entry) for entry in few] == ["forward d64 2 bytes ranges"]


@pytest.mark.parametrize("kernel", tune.TABLES)
@pytest.mark.parametrize("ranges", [False, True])
def test_tuning_an_entry(tables, monkeypatch, kernel, ranges):
    entry = tune.Entry(kernel, ("interpreter", 32, 2, ranges))
    monkeypatch.setattr(tune, "do_bench", clock(entry, {(32, 32): 4.0, (64, 16): 2.0}))
    tried = tune.candidates(entry)
    rows = tune.measure(entry, list(zip(tried, [None, None, None, None, "spills"])), tune.Size(48, 48))
    assert [row.get("ms") for row in rows] == [4.0, 8.0, 8.0, 2.0, None]
    assert [row["fault"] for row in rows] == [None, None, None, None, "spills"]
    assert tune.choice(rows)["launch"] == launch(64, 16)
    documents = [48 * n // 7 + (48 * n % 7 > 0) for n in range(8)]
    pairs = sum((b - a) * (b - a + 1) // 2 for a, b in itertools.pairwise(documents if ranges else [0, 48]))
    assert rows[0]["tflops"] == pytest.approx(tune.PRODUCTS[kernel] * 2 * 4 * 32 * pairs / 4.0 / 1e9)


def test_what_fails_while_tuning_is_left_out(tables, monkeypatch):
    entry = tune.Entry("backward_q", ("interpreter", 32, 4, False))
    backward_q = tune.attention.backward_q

    def wrong(*arguments):
        return backward_q(*arguments) * (float("nan") if entry.present == launch(16, 16) else 1)

    monkeypatch.setattr(tune.attention, "backward_q", wrong)
    monkeypatch.setattr(tune, "do_bench", clock(entry, {(32, 32): 4.0}))
    rows = tune.measure(entry, [(x, None) for x in tune.candidates(entry)], tune.Size(32, 32))
    faults = {tuple(row["launch"].blocks.values()): row["fault"] for row in rows}
    assert faults[32, 32] is None and "differs" in faults[16, 16]
    assert all("arange" in faults[blocks] or "power of" in faults[blocks] for blocks in ((16, 48), (48, 16), (48, 48)))
    monkeypatch.setattr(tune, "work", lambda *arguments: 1 / 0)
    rows = tune.measure(entry, [(x, None) for x in tune.candidates(entry)], tune.Size(32, 32))
    assert {row["fault"] for row in rows} == {"ZeroDivisionError: division by zero"} and tune.choice(rows) is None


def test_noise_replaces_no_entry():
    rows = [{"launch": launch(n, n), "ms": ms} for n, ms in ((32, 1.01), (16, 1.0), (64, 1.2))]
    assert tune.choice(rows) is rows[0]
    assert tune.choice([{**rows[0], "ms": 1.03}, *rows[1:]]) is rows[1]
    assert tune.choice([{"launch": launch(32, 32), "fault": "spills"}, *rows[1:]]) is rows[1]


def test_the_table_can_be_pasted(tables, monkeypatch, tmp_path, capsys):
    entries = [tune.Entry("forward", ("interpreter", D, 2, ranges)) for D in (32, 64) for ranges in (False, True)]
    fast = {entry: 3.0 for entry in entries[1:]}

    def measure(entry, faults, size):
        *ran, last = faults
        assert last == (launch(64, 64), "spills") and len(ran) == 4
        times = [fast.get(entry, 5.0) if x == launch(16, 64) else 4.0 for x, _ in ran]
        return [*({"launch": x, "ms": ms, "tflops": 1} for (x, _), ms in zip(ran, times)), {"launch": last[0], "fault": last[1]}]

    monkeypatch.setattr(tune, "measure", measure)
    tune.tune(entries, tune.Size(64, 32), tmp_path / "rows.json")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 4 * 5
    gains, table = capsys.readouterr().out.split("\n\nFORWARD\n")
    assert len(gains.splitlines()) == 5 and "1.00 x" in gains.splitlines()[1] and "1.33 x  1 of 5" in gains.splitlines()[2]
    pasted = dict(attention_tables._entries(table))
    assert pasted == {entry.key: launch(16, 64) if entry in fast else launch(32, 32) for entry in entries}
    assert len(table.strip().splitlines()) == 3  # plain and ranges in one where they are the same
