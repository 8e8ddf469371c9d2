"""The report: structure, escaping, thinning, and folders that are incomplete, broken or still running."""

import base64
import hashlib
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import bigtrain
from bigtrain.errors import UserError
from bigtrain.report import write_report
from bigtrain.report_data import bucket_means, downsample

BLOCK = 'def read(path):\n    with open(path) as f:\n        return f.read()\n\n\nclass Reader:\n    """Reads <b>lines</b>."""\n'


def fake_run(folder, steps=400, seed=0, lr=3e-4, stage=2, stop_at=None, running=False, fp16=False, evaluate_every=50, peak_loss=8.4):
    """A run's folder as training leaves it: one attempt, or two when it was stopped at a step and resumed ten steps before."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    config = {
        "run": {"name": folder.name},
        "model": {"layers": 12, "width": 768, "heads": 12, "mlp": "swiglu"},
        "train": {"steps": steps, "global_batch": 512, "clip": 1.0},
        "optimizer": {"name": "adamw", "lr": lr, "betas": [0.9, 0.95]},
        "zero": {"stage": stage},
        "precision": "fp16" if fp16 else "auto",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    spans = [(1, 1, steps)] if stop_at is None else [(1, 1, stop_at), (2, stop_at - 9, steps)]
    rows, samples, now = [], [], 1_760_000_000.0
    for attempt, first, last in spans:
        environment = {
            "bigtrain": "0.1.0", "python": "3.11.4", "torch": "2.13.0", "deepspeed": "0.19.8", "precision": "bf16", "zero_stage": stage,
            "precision_reason": "the hardware multiplies it fast", "parameters": 124_439_808, "git_commit": "8b744ba9" * 5,
            "hardware": {"gpu": "NVIDIA H100 80GB HBM3", "gpus": 8, "cpu": "Xeon Platinum 8481C"},
            "deepspeed_config": {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}},
        }  # fmt: skip
        started = now
        for step in range(first, last + 1):
            share = step / steps
            loss = 2.9 + (peak_loss - 2.9) * math.exp(-6 * share**0.55) + 2.2 * math.exp(-step / 12) + rng.gauss(0, 0.05)
            if step == steps * 3 // 5:
                loss += 1.5
            step_s = 0.52 * rng.uniform(0.97, 1.06) + (38 if step == first else 0)
            now += step_s
            warmup = min(1.0, step / (0.05 * steps))
            row = {"attempt": attempt, "step": step, "time": now, "loss": loss}
            row |= {"lr": lr * warmup * (0.55 + 0.45 * math.cos(math.pi * share))}
            row |= {"grad_norm": 0.4 + 4 * math.exp(-step / 20) + abs(rng.gauss(0, 0.08))}
            row |= {
                "tokens": step * 524_288,
                "tokens_per_s": 524_288 / step_s,
                "mfu": 0.43 * 0.52 / step_s,
                "step_s": step_s,
                "memory_gib": 61.3 if step > first + 3 else 48.0,
            }
            if fp16:
                row["loss_scale"] = 65536.0 * 2 ** (step * 5 // steps)
            rows.append(row)
            if step % evaluate_every == 0 or step == steps:
                now += 4
                held_out = loss + 0.03
                row = {"attempt": attempt, "step": step, "time": now, "validation_loss": held_out}
                rows.append(row | {"perplexity": math.exp(held_out), "bits_per_byte": held_out / 2.9})
                samples += [{"attempt": attempt, "step": step, "prompt": "def quicksort(", "text": f"items):  # {step}\n" + BLOCK}]
                samples += [{"attempt": attempt, "step": step, "prompt": "import ", "text": "os\nimport sys\n\n\n" + BLOCK}]
        of_attempt = {"attempt": attempt, "host": f"node-{attempt:02d}", "ranks": 8, "started": started}
        if last < steps:
            of_attempt |= {"ended": now, "exit_code": 75, "reason": "SIGTERM from the scheduler"}
        elif not running:
            of_attempt |= {"ended": now, "exit_code": 0}
        (folder / f"attempts/{attempt}/logs").mkdir(parents=True)
        (folder / f"attempts/{attempt}/attempt.json").write_text(json.dumps(of_attempt))
        (folder / f"attempts/{attempt}/environment.json").write_text(json.dumps(environment))
        now += 3600
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


def page_of(*runs, out=None):
    return write_report(list(runs), out).read_text(encoding="utf-8")


def data_in(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def rewrite(path, change):
    """Pass every row of a .jsonl file through `change`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(row) or row) + "\n" for row in rows))


def test_one_run_tells_what_happened(tmp_path):
    run = fake_run(tmp_path / "small", stop_at=200)
    page = page_of(run)
    assert (run / "report.html").is_file()
    for text in ("124M", "400 of 400", "210M", "stopped on request (exit code 75)", "SIGTERM from the", "node-02", "gpu: NVIDIA H100"):
        assert text in page, text
    data = data_in(page)
    assert [chart["title"] for chart in data["charts"]][:2] == ["Loss", "Validation perplexity"]
    assert "Loss scale" not in [chart["title"] for chart in data["charts"]]
    curves = data["runs"][0]["curves"]
    assert curves["loss"]["step"] == list(range(1, 401))
    assert curves["loss"]["tokens"][-1] == 400 * 524_288
    assert curves["validation_loss"]["dots"] and curves["validation_loss"]["tokens"][0] == 50 * 524_288


def test_time_leaves_out_the_pause_between_attempts(tmp_path):
    curves = data_in(page_of(fake_run(tmp_path / "small", stop_at=200)))["runs"][0]["curves"]
    times = curves["loss"]["time"]
    assert times == sorted(times)
    assert 200 < times[-1] < 400  # 400 steps of half a second and two slow starts; the pause alone is an hour


def test_several_runs_are_compared(tmp_path):
    a, b = fake_run(tmp_path / "a"), fake_run(tmp_path / "b", lr=1e-3, stage=3, fp16=True)
    path = write_report([a, b])
    assert path == tmp_path / "report.html"
    page = path.read_text()
    differences = re.search(r"<h2>Differences</h2>.*?</section>", page, re.S)[0]
    assert re.findall(r"<th scope=row>(.*?)</th>", differences) == ["optimizer.lr", "zero.stage", "precision"]
    assert "<td>0.0003</td><td>0.001</td>" in differences
    assert "Loss scale" in [chart["title"] for chart in data_in(page)["charts"]]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [fake_run(tmp_path / "x/base", steps=20), fake_run(tmp_path / "y/base", steps=20)]
    assert [run["name"] for run in data_in(page_of(*runs))["runs"]] == [str(run) for run in runs]


def test_hostile_text_stays_text(tmp_path):
    hostile = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)> {{script}} & \ud800 \u2028"
    run = fake_run(tmp_path / "</title><b>x")  # two folders: "<" and "b>x" under it
    rewrite(run / "samples.jsonl", lambda row: row | {"prompt": hostile, "text": hostile + hostile})
    rewrite(run / "metrics.jsonl", lambda row: row | {"</script><script>alert(3)</script>": 1.0})
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"path": hostile.replace("\ud800", "")}}))
    attempt = json.loads((run / "attempts/1/attempt.json").read_text())
    (run / "attempts/1/attempt.json").write_text(json.dumps(attempt | {"reason": hostile, "host": hostile, "ranks": hostile}))
    page = page_of(run, out=tmp_path / "out.html")
    assert len(re.findall("<script", page)) == 2 and page.count("</script>") == 2
    assert "<img" not in page and "<b>" not in page
    assert "{{script}}" in page  # text of the run is not filled in as a part of the page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<mark>") == page.count("</mark>") > 0


def test_page_needs_nothing_from_outside(tmp_path):
    page = page_of(fake_run(tmp_path / "small"))
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|@import|url\((?!#)|\bsrc=|fetch\(", page)
    assert "default-src 'none'" in page


def test_the_policy_allows_this_script_and_no_other(tmp_path):
    page = page_of(fake_run(tmp_path / "small"))
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    allowed = re.search(r"script-src 'sha256-([^']+)'", page)[1]
    assert allowed == base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def test_long_curves_are_thinned_and_spikes_stay(tmp_path):
    run = fake_run(tmp_path / "long", steps=20)
    values = [2 + 0.1 * math.sin(i) for i in range(100_000)]
    values[54_321], values[77_777] = 99.0, -5.0
    rows = (json.dumps({"attempt": 1, "step": i, "time": i, "loss": v, "lr": 1e-3, "tokens": i * 512}) for i, v in enumerate(values, 1))
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    began = time.process_time()
    loss = data_in(page_of(run))["runs"][0]["curves"]["loss"]
    assert time.process_time() - began < 15
    assert 1000 <= len(loss["y"]) <= 2100
    assert loss["y"][loss["step"].index(54_322)] == 99.0 and -5.0 in loss["y"]
    assert (loss["step"][0], loss["step"][-1]) == (1, 100_000)
    means = loss["mean"]["y"]
    assert len(means) <= 2000 and sorted(means)[len(means) // 2] == pytest.approx(2, abs=0.02)


def test_values_that_are_not_finite_are_gaps(tmp_path):
    run = fake_run(tmp_path / "nan", steps=30)
    bad = {7: "NaN", 8: "Infinity", 9: math.nan, 30: "NaN"}  # as trackers.py writes them, and as Python's json would
    rewrite(run / "metrics.jsonl", lambda row: row | {"loss": bad[row["step"]]} if "loss" in row and row["step"] in bad else row)
    page = page_of(run)
    loss = data_in(page)["runs"][0]["curves"]["loss"]
    assert [step for step, y in zip(loss["step"], loss["y"]) if y is None] == [7, 8, 9, 30]
    assert "<dt>Training loss</dt><dd>nan</dd>" in page


def test_thinning_keeps_values_that_are_not_finite():
    values = [1.0] * 10_000
    values[5001] = math.nan
    assert 5001 in downsample(values)
    assert all(mean == 1.0 for mean in bucket_means(values)[1])


def test_metrics_of_a_task_get_a_chart(tmp_path):
    run = fake_run(tmp_path / "masked", steps=30)
    rewrite(run / "metrics.jsonl", lambda row: row | {"masked_accuracy": 0.5, "note": "text is no curve"} if "loss" in row else row)
    assert data_in(page_of(run))["charts"][-1]["title"] == "Masked accuracy"


FILES = ["config.yaml", "metrics.jsonl", "samples.jsonl", "attempts/1/attempt.json", "attempts/1/environment.json"]


@pytest.mark.parametrize("missing", FILES)
@pytest.mark.parametrize("content", [None, "", '{"step": [', "[1, 2]", "\x00\ufffd"])
def test_any_file_may_be_missing_or_broken(tmp_path, missing, content):
    run = fake_run(tmp_path / "part", steps=12)
    (run / missing).unlink()
    if content is not None:
        (run / missing).write_text(content)
    page = page_of(run)
    assert "part" in page
    assert ("No training step has been logged yet" in page) == (missing == "metrics.jsonl")


def test_a_run_that_has_just_started(tmp_path):
    (tmp_path / "new/attempts/1/logs").mkdir(parents=True)
    page = page_of(tmp_path / "new")
    assert "in progress" in page and "No training step has been logged yet" in page


def test_samples_are_newest_first_and_of_the_latest_attempt(tmp_path):
    run = fake_run(tmp_path / "s", steps=20)
    rows = [{"attempt": 1, "step": s, "prompt": "p", "text": f"first {s}"} for s in range(1, 101)]
    rows += [{"attempt": 2, "step": 100, "prompt": "p", "text": "p again"}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(run)
    assert "<mark>p</mark> again" in page and "first 100" not in page  # the prompt is not shown twice
    steps = [int(s) for s in re.findall(r"<summary>Step (\d+)</summary>", page)]
    assert steps == sorted(steps, reverse=True) and steps[0] == 100 and steps[-1] == 1 and len(steps) == 40


def test_mistakes_are_told_in_one_line(tmp_path):
    for runs in ([], [tmp_path / "nowhere"], [tmp_path]):
        with pytest.raises(UserError) as error:
            write_report(runs)
        assert "\n" not in str(error.value) and "runs/NAME" in str(error.value)
    run = fake_run(tmp_path / "r", steps=12)
    with pytest.raises(UserError, match="--out"):
        write_report([run], tmp_path / "no/such/folder.html")


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    run = fake_run(tmp_path / "r", steps=12)
    before = page_of(run)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_report([run])
    assert (run / "report.html").read_text() == before
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_report_imports_no_torch():
    code = "import sys, bigtrain.report; print([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    root = Path(bigtrain.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"
