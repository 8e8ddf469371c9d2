"""The benchmarks, short of their measurements: options, processes, ratios, goals, tables and JSON; what they say without a GPU."""

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from bigtrain import configfile
from bigtrain.config import batch_arithmetic
from bigtrain.deepspeed_config import derive
from bigtrain.errors import RunError, UserError
from bigtrain.hardware import Hardware
from bigtrain.runfolder import RunFolder
from bigtrain_kernels import static
from bigtrain_kernels.launch import Launch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import comparison
import peers
import processes
import throughput
import tune
from comparison import Goal, Measurement

BENCHMARKS = Path(throughput.__file__).parent
CPU = Hardware("cpu", 0, "Some CPU", True, False, "", cores=2, memory_gib=8.0)
GPUS = Hardware("cuda", 4, "Some GPU", True, True, "", cores=16, memory_gib=64.0)


def measurement(variant, round=1, ranks=1, dtype="bf16", tokens=1000.0, memory=1.0, first=4.0, elsewhere=0.0):
    return Measurement(variant, ranks, dtype, round, tokens, memory, first, 7.0, [0.5] * 15, elsewhere)


def test_options():
    options = throughput.arguments([], CPU)
    assert (options.layout, options.only, options.dtype, options.rounds) == ([1, 2], list(throughput.VARIANTS), ["bf16", "fp32"], 3)
    assert throughput.arguments([], GPUS).layout == [1, 4]
    chosen = throughput.arguments(["--only", "bigtrain", "trainer", "trainer", "--layout", "2", "--dtype", "fp32"], CPU)
    assert (chosen.only, chosen.layout, chosen.dtype) == (["bigtrain", "trainer"], [2], ["fp32"])


@pytest.mark.parametrize("wrong", [["--layout", "3"], ["--layout", "0"], ["--steps", "14"], ["--rounds", "0"]])
def test_wrong_options(wrong):
    with pytest.raises(UserError, match=f"{wrong[0]} {wrong[1]}"):
        throughput.arguments(wrong, CPU)


def test_unknown_variant(capsys):
    with pytest.raises(SystemExit):
        throughput.arguments(["--only", "bigtrian"], CPU)
    assert "bigtrian" in capsys.readouterr().err


def test_a_busy_machine_is_refused():
    with pytest.raises(UserError, match=r"load average is 1\.7.*--anyway"):
        throughput.check_quiet(1.7, anyway=False)
    throughput.check_quiet(1.7, anyway=True)
    throughput.check_quiet(0.2, anyway=False)


def test_every_round_measures_everything_and_begins_with_another_variant():
    options = throughput.arguments(["--only", "bigtrain", "trainer", "torch-ours", "--rounds", "3"], CPU)
    found = throughput.cases(options)
    assert len(found) == len(set(found)) == 3 * 2 * 2 * 3
    for number in (1, 2, 3):
        cell = [case.variant for case in found if (case.round, case.ranks, case.dtype) == (number, 2, "bf16")]
        assert sorted(cell) == ["bigtrain", "torch-ours", "trainer"]
        assert cell[0] == options.only[number - 1]


def test_warm_up_is_not_counted():
    slow_start = [100.0, 110.0, 120.0, 130.0, 140.0, 140.5, 141.25]
    assert throughput.WARMUP == 5
    assert throughput.step_seconds(slow_start) == [0.5, 0.75]


def test_ratios_are_taken_within_a_round():
    # The second round ran on a machine half as fast: medians of each variant would mix the two.
    cell = [measurement("bigtrain", n, tokens=t) for n, t in ((1, 1200.0), (2, 700.0), (3, 900.0))]
    cell += [measurement("trainer", n, tokens=t) for n, t in ((1, 1000.0), (2, 500.0))]
    assert comparison.ratio(cell, "tokens_per_s", "trainer") == pytest.approx({"median": 1.3, "min": 1.2, "max": 1.4})
    assert comparison.ratio(cell, "tokens_per_s", "torch-ours") is None
    assert comparison.ratio(cell[3:], "tokens_per_s", "trainer") is None


def test_goals_by_layout_dtype_and_sign():
    assert Goal("tokens_per_s", "p", ">=", 1.1).met(1.1) and not Goal("tokens_per_s", "p", ">=", 1.1).met(1.09)
    assert Goal("memory_gib", "p", "<=", 0.75).met(0.75) and not Goal("memory_gib", "p", "<=", 0.75).met(0.76)
    several = Goal("tokens_per_s", "p", ">=", 1.2, "several", "bf16")
    assert several.applies(2, "bf16") and several.applies(8, "bf16")
    assert not several.applies(1, "bf16") and not several.applies(2, "fp32")
    assert Goal("memory_gib", "p", "<=", 0.75, "one").applies(1, "fp32")
    assert {goal.peer for goal in comparison.GOALS} < set(throughput.VARIANTS)


def test_summary_and_table():
    measured = [
        measurement("bigtrain", tokens=1150.0, memory=0.9, first=5.0),
        measurement("trainer", tokens=1000.0, memory=1.0, first=4.0),
        measurement("bigtrain", ranks=2, elsewhere=1.5),
    ]
    one, two = comparison.summaries(measured)
    assert (one["ranks"], one["variants"]["trainer"]["tokens_per_s"], two["ranks"], two["goals"]) == (1, 1000.0, 2, [])
    assert [(goal["goal"], goal["met"]) for goal in one["goals"]] == [
        ("tokens/s >= 1.1 x trainer", True),
        ("peak memory <= 0.75 x trainer", False),
        ("command to first step <= 1 x trainer", False),
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    for table in comparison.tables([one, two], "2 cores", "the same work"):
        console.print(table)
    first, second = console.export_text().split("bf16, 2 ranks on 2 cores")
    assert "bf16, 1 rank on 2 cores" in first and "1.150 (1.15–1.15)" in first and "the same work" in first
    assert "not met  peak memory <= 0.75 x trainer" in first and "quoted" not in first
    assert "not to be quoted" in " ".join(second.split())


def test_results_survive_a_variant_that_fails(tmp_path, monkeypatch, capsys):
    def measure(bench, case):
        if case.variant == "trainer":
            raise RunError("exit code 1: it broke")
        return measurement(case.variant, case.round, case.ranks, case.dtype)

    monkeypatch.setattr(throughput, "look", lambda: CPU)
    monkeypatch.setattr(throughput, "versions", lambda: {"torch": "2"})  # the test extra has no accelerate
    monkeypatch.setattr(throughput.Bench, "prepare", lambda bench: bench.folder.mkdir())
    monkeypatch.setattr(throughput.Bench, "measure", measure)
    options = ["--anyway", "--rounds", "2", "--layout", "1", "--only", "bigtrain", "trainer", "deepspeed-ours", "--folder", str(tmp_path)]
    assert throughput.main(options) == 1
    [result] = tmp_path.glob("*/throughput.json")
    found = json.loads(result.read_text())
    assert len(found["measurements"]) == 8 and len(found["failures"]) == 4
    assert found["failures"][0] == {"variant": "trainer", "ranks": 1, "dtype": "bf16", "round": 1, "reason": "exit code 1: it broke"}
    assert found["machine"]["name"] == "Some CPU" and "torch" in found["versions"] and found["options"]["anyway"] is True
    goal = {"goal": "tokens/s >= 0.97 x deepspeed-ours", "ratio": {"median": 1.0, "min": 1.0, "max": 1.0}, "met": True}
    assert [cell["goals"] for cell in found["summary"]] == [[goal], [goal]]
    assert "4 failed" in capsys.readouterr().out


def python(code):
    return [sys.executable, "-c", code], dict(os.environ)


def test_memory_of_the_largest_process_and_of_what_it_started(tmp_path):
    # From a process of its own: what a process starts counts what it held itself when it forked, and this one may hold anything.
    code = f"""
import os, sys
import processes
python = lambda code: ([sys.executable, "-c", code], dict(os.environ))
child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'bytearray({1 << 30}).find(1)'])"
small = processes.run([python("pass")] * 2, {str(tmp_path / "log")!r}, 60)
large = processes.run([python("pass"), python(child)], {str(tmp_path / "log")!r}, 60)
print(small.resident_gib, large.resident_gib, large.started)
"""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120, cwd=BENCHMARKS.parent)
    small, large, started = map(float, done.stdout.split())
    assert small < 1 <= large and abs(started - time.time()) < 60


def test_a_process_that_fails_or_hangs_ends_the_others(tmp_path):
    begun = time.monotonic()
    stays = python(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(300)")
    with pytest.raises(RunError, match=r"still running after 1 s: it printed nothing"):
        processes.run([stays], tmp_path / "log", 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    with pytest.raises(RunError, match="exit code 3: out of luck"):
        processes.run([stays, python("import sys; print('out of luck\\n'); sys.exit(3)")], tmp_path / "log", 200)
    assert time.monotonic() - begun < 100


def test_reading_a_run_of_bigtrain(tmp_path):
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    (run.attempt(1)).mkdir(parents=True)
    (run.attempt(1) / "attempt.json").write_text('{"peak_memory_gib": 2.5}')
    rows = [{"attempt": 1, "step": n, "time": 10.0 + n, "loss": 9.0 - n, "step_s": 1.0} for n in (1, 2)]
    rows.append({"attempt": 1, "step": 2, "time": 20.0, "validation_loss": 7.0})
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert throughput.read_bigtrain(run) == ([11.0, 12.0], 7.0, 2.5)
    assert not run.checkpoints.exists()


def test_every_variant_has_a_loop_and_all_get_the_same_work():
    assert set(peers.PEERS) | {"bigtrain"} == set(throughput.VARIANTS)
    config = configfile.load(throughput.WORK)
    settings = derive(config, batch_arithmetic(config.train, 2), "bf16")
    assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_clipping"], settings["zero_optimization"]["stage"]) == (
        4,
        1.0,
        2,
    )
    assert [place["RANK"] for place in throughput.places(2)] == ["0", "1"]
    assert len({place["MASTER_PORT"] for place in throughput.places(2)}) == 1


def test_a_loop_takes_its_steps(tmp_path):
    config = configfile.load(
        throughput.WORK, ["model.width=24", "model.layers=1", "model.vocab_size=64", "train.steps=2", "precision=fp32"]
    )
    np.random.default_rng(0).integers(0, 64, 8 * 512 + 1).astype("<u2").tofile(tmp_path / "tokens")
    work = config.model_dump() | {"tokens": str(tmp_path / "tokens"), "token_dtype": "<u2", "device": "cpu"}
    (tmp_path / "work.json").write_text(json.dumps(work))
    before = time.time()
    peers.main("torch-ours", tmp_path)
    ends, loss, device_gib = throughput.read_peer(tmp_path, 1)
    assert len(ends) == 2 and before < ends[0] < ends[1] < time.time()
    assert device_gib == 0.0 and loss == pytest.approx(math.log(64), abs=0.1)


@pytest.mark.parametrize("script", ["kernels.py", "tune.py"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_what_needs_a_gpu_says_so(script):
    done = subprocess.run([sys.executable, BENCHMARKS / script], cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "there is none" in done.stderr and "bigtrain_kernels.static" in done.stderr


def launch(M, N, warps=4):
    return Launch({"BLOCK_M": M, "BLOCK_N": N}, warps, 1)


def test_tuning_compiles_without_a_gpu():
    """In processes of its own: what the static gate refuses, or the compiler, is left out."""
    forward, backward = tune.Entry("forward", ("sm_90", 32, 2, False)), tune.Entry("backward_q", ("sm_80", 32, 4, True))
    before = {name: dict(table) for name, table in tune.TABLES.items()}
    jobs = [(backward, backward.present), (forward, launch(128, 128)), (forward, launch(64, 48))]
    found = tune.all_refused(jobs, tune.Size(256, 128))
    assert found[0] is None and "spills" in found[1] and "CompilationError" in found[2]
    assert tune.refused(*jobs[2], tune.Size(256, 128)) == found[2] and before == tune.TABLES


def test_a_candidate_must_pass_the_gate_in_all_cases_of_its_entry(monkeypatch):
    everything = [case.name for case in static.family_cases("attention", "sm_90") if "row sums" not in case.name]
    found = [case.name for entry in tune.selected("sm_90", tune.arguments([])) for case in tune.cases(entry)]
    assert sorted(found) == sorted(everything) and len(set(found)) == len(found)
    monkeypatch.setattr(static, "rows_of", lambda arch, case: [case])
    monkeypatch.setattr(static, "broken_rules", lambda case: ["no good"] * ("full" in case.name))
    monkeypatch.setattr(static, "broken_choices", lambda case, accepted: [])
    entries = [tune.Entry("backward_kv", ("sm_90", 64, 2, ranges)) for ranges in (False, True)]
    faults = [tune.refused(entry, entry.present, tune.Size(256, 128)) for entry in entries]
    assert faults == ["attention backward kv d64 bf16 full: no good", None]


@pytest.mark.parametrize(("cores", "memory", "workers"), [(64, 9.0, 4), (3, 900.0, 3), (64, 900.0, 5), (8, 0.5, 1)])
def test_as_many_compile_as_cores_and_memory_allow(monkeypatch, cores, memory, workers):
    started = []

    def pool(number, context):
        started.append(number)
        return ThreadPoolExecutor(1)

    def refused(entry, candidate, size):
        if candidate == launch(32, 32):
            raise BrokenProcessPool("killed")
        return None

    monkeypatch.setattr(tune, "look", lambda: dataclasses.replace(CPU, cores=cores, memory_gib=memory))
    monkeypatch.setattr(tune, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(tune, "refused", refused)
    found = tune.all_refused([(None, launch(n, n)) for n in (16, 32, 64, 128, 256)], tune.Size(256, 128))
    assert started == [workers] and found == [None, "BrokenProcessPool: killed", None, None, None]


def test_activations_of_a_layer():
    """A block on the kernels keeps at most a third of what it keeps on plain torch, and no more than on the torch backend."""
    command = [sys.executable, BENCHMARKS / "activations.py", "--length", "64", "--width", "64", "--heads", "2", "--mlp-width", "176"]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = "plain torch", "torch backend", "Triton kernels", "the MLP fused"
    plain, torch_backend, triton, fused = (int(re.search(rf"{name} +│ +([0-9,]+)", done.stdout)[1].replace(",", "")) for name in rows)
    assert fused < triton <= torch_backend and 3 * triton <= plain
