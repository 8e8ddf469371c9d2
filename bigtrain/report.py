"""The report: one HTML file that shows a run, or compares several, and needs nothing but a browser.

`write_report` fills `report_page/` (the page's HTML, its style, and the script that draws the charts) with what
report_data.py reads from run folders. The file opens from disk, loads nothing from the network (its content security
policy forbids it) and treats everything read from a run as hostile text. Needs no torch, so that it works on a laptop.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from bigtrain.errors import DONE, FAILURE, STOPPED, USER_MISTAKE, UserError
from bigtrain.report_data import Run, curves, number, numbers, positions, read_run
from bigtrain.runfolder import RunFolder, write_atomically
from bigtrain.secrets import redact, redacted

SAMPLE_STEPS = 40
"""Evaluations whose samples are shown, spread over the run."""
COLOURS = 8
EXITS = {
    DONE: "done",
    FAILURE: "failed",
    USER_MISTAKE: "mistake in the configuration",
    STOPPED: "stopped on request",
    76: "hang",
    77: "bad node",
    78: "same crash twice",
}


class Chart(NamedTuple):
    title: str
    keys: tuple[str, ...]
    """Keys of the rows of metrics.jsonl that are drawn."""
    unit: str = "number"
    """How the script writes values: number, count, percent, seconds, gib or power (of ten)."""
    smooth: bool = False
    zero: bool = False
    """The vertical axis starts at zero."""


CHARTS = (
    Chart("Loss", ("loss", "validation_loss"), smooth=True),
    Chart("Validation perplexity", ("perplexity",)),
    Chart("Validation bits per byte", ("bits_per_byte",)),
    Chart("Learning rate", ("lr",), "power"),
    Chart("Gradient norm", ("grad_norm",), smooth=True),
    Chart("Tokens per second", ("tokens_per_s",), "count", smooth=True, zero=True),
    Chart("Model FLOPs utilisation", ("mfu",), "percent", smooth=True, zero=True),
    Chart("Step time", ("step_s",), "seconds", smooth=True),
    Chart("Peak memory", ("memory_gib",), "gib", zero=True),
    Chart("Loss scale", ("loss_scale",), "count"),
)


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Write the report of one or more run folders and return its path.

    `out` left out: report.html in the run's folder, or beside the first run's folder when several are compared.
    Raises UserError when a folder holds no run or the file cannot be written.
    """
    if not runs:
        raise UserError("report: no run given; name one or more run folders, such as runs/NAME")
    folders = [RunFolder(path) for path in runs]
    names = [folder.name for folder in folders]
    loaded = [read_run(folder, name if names.count(name) == 1 else str(folder.path)) for folder, name in zip(folders, names)]
    out = Path(out) if out else folders[0].report if len(folders) == 1 else folders[0].path.resolve().parent / "report.html"
    # A model's text may hold half of a surrogate pair, which UTF-8 cannot write.
    page = _page(loaded).encode("utf-8", "replace").decode("utf-8")
    try:
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written ({error.strerror}); give another path with --out") from None
    return out


def _page(runs: list[Run]) -> str:
    drawn = [curves(run) for run in runs]
    charts = _charts(key for found in drawn for key in found)
    data = {
        "runs": [{"name": run.name, "curves": found} for run, found in zip(runs, drawn)],
        "charts": [chart._asdict() for chart in charts],
    }
    folder = Path(__file__).with_name("report_page")
    script = (folder / "charts.js").read_text(encoding="utf-8")
    samples = "".join(_samples(i, run) for i, run in enumerate(runs))
    parts = {
        "title": _text(" · ".join(run.name for run in runs)),
        "written": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": (folder / "style.css").read_text(encoding="utf-8"),
        "summaries": "".join(_summary(i, run) for i, run in enumerate(runs)),
        "charts_hidden": "" if charts else "hidden",
        "differences": _differences(runs) if len(runs) > 1 else "",
        "samples": f"<section><h2>Samples</h2><div class=runs>{samples}</div></section>" if samples else "",
        # "<" is the only character that could end the element or begin a comment in it.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], (folder / "page.html").read_text(encoding="utf-8"))


def _charts(keys: Iterable[str]) -> list[Chart]:
    """The charts that have something to show; a key that no chart knows (a task's own metric) gets one of its own."""
    keys = dict.fromkeys(keys)
    known = {key for chart in CHARTS for key in chart.keys}
    own = [Chart(key.replace("_", " ").capitalize(), (key,), smooth=True) for key in keys if key not in known]
    return [chart for chart in (*CHARTS, *own) if any(key in keys for key in chart.keys)]


# Words and numbers


def _text(value: Any) -> str:
    return html.escape(redact(str(value)))


def _count(n: float) -> str:
    """1.57B, 124M, 50.3k."""
    if not math.isfinite(n):
        return str(n)
    power = max(0, min(4, (len(f"{abs(n):.0f}") - 1) // 3))
    return f"{n / 1000**power:.3g}{('', 'k', 'M', 'B', 'T')[power]}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 60 else f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _moment(value: Any) -> datetime | None:
    """A time given as seconds since 1970 or in ISO form, in UTC."""
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else datetime.fromtimestamp(value, timezone.utc)
    except (TypeError, ValueError, OverflowError, OSError):
        return None
    return found.astimezone(timezone.utc) if found.tzinfo else found.replace(tzinfo=timezone.utc)


def _line(value: Any) -> str:
    """Hardware and the like on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_line(v)}" for key, v in value.items() if v not in (None, "", []))
    return ", ".join(map(_line, value)) if isinstance(value, list) else str(value)


def _ending(attempt: dict[str, Any]) -> tuple[str, str]:
    """How an attempt ended: words, and the class that colours them."""
    code = attempt.get("exit_code")
    if code is None:
        return ("in progress" if attempt.get("ended") is None else "ended", "open")
    words = EXITS.get(code, "failed") if isinstance(code, int) else "failed"
    return words + (f" (exit code {code})" if code else ""), "good" if code == DONE else "open" if code == STOPPED else "bad"


Facts = list[tuple[str, str]]


def _figures(run: Run) -> Facts:
    """The run in numbers."""
    validation = numbers(run.validation, "validation_loss", finite=False)
    best = min((n for n in validation if not math.isnan(n)), default=math.inf)
    train = run.config.get("train")
    total = train.get("steps") if isinstance(train, dict) else None
    environment = run.environment

    def last(rows: list[dict[str, Any]], key: str) -> float | None:
        return (numbers(rows, key, finite=False) or [None])[-1]

    def middle(key: str) -> float | None:
        found = numbers(run.train, key)
        return median(found) if found else None

    figures = (
        ("Parameters", number(environment.get("parameters")), _count),
        ("Steps", run.train[-1]["step"] if run.train else None, lambda n: f"{n:,}" + (f" of {total:,}" if isinstance(total, int) else "")),
        ("Tokens", last(run.train, "tokens"), _count),
        ("Training loss", last(run.train, "loss"), "{:.4f}".format),
        ("Validation loss", validation[-1] if validation else None, "{:.4f}".format),
        ("Best validation loss", best if validation and validation[-1] > best else None, "{:.4f}".format),
        ("Perplexity", last(run.validation, "perplexity"), "{:.4g}".format),
        ("Bits per byte", last(run.validation, "bits_per_byte"), "{:.4f}".format),
        ("Tokens/s (median)", middle("tokens_per_s"), _count),
        ("MFU (median)", middle("mfu"), "{:.1%}".format),
        ("Training time", positions(run.train)[-1][2] if run.train else None, _duration),
        ("ZeRO stage", environment.get("zero_stage"), str),
        ("Precision", environment.get("precision"), str),
        ("Ranks", run.attempts[-1].get("ranks") if run.attempts else None, str),
    )
    return [(label, write(value)) for label, value, write in figures if value is not None]


def _words(run: Run) -> Facts:
    environment = run.environment
    versions = [f"{name} {environment[name]}" for name in ("bigtrain", "torch", "deepspeed", "python") if environment.get(name)]
    heard = _moment(run.train[-1].get("time")) if run.train else None
    words = (
        ("Last row", f"{heard:%Y-%m-%d %H:%M:%S} UTC" if heard else ""),
        ("Hardware", _line(environment.get("hardware") or "")),
        ("Versions", ", ".join(versions)),
        ("Commit", str(environment.get("git_commit") or "")[:12]),
    )
    return [(label, text) for label, text in words if text]


# HTML


def _summary(index: int, run: Run) -> str:
    words, kind = _ending(run.attempts[-1]) if run.attempts else ("no attempt recorded", "open")
    empty = "" if run.train else "<p class=note>No training step has been logged yet.</p>"
    return (
        f'<article class="run colour-{index % COLOURS}"><h2>{_text(run.name)} <span class="badge {kind}">{_text(words)}</span></h2>'
        f"{empty}{_list('figures', _figures(run))}{_list('words', _words(run))}{_attempts(run)}"
        f"{_details('Configuration', run.config)}{_details('Environment', run.environment)}</article>"
    )


def _list(kind: str, facts: Facts) -> str:
    items = "".join(f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for label, value in facts)
    return f"<dl class={kind}>{items}</dl>" if facts else ""


def _attempts(run: Run) -> str:
    rows = []
    for attempt in run.attempts:
        started, ended = _moment(attempt.get("started")), _moment(attempt.get("ended"))
        took = _duration((ended - started).total_seconds()) if started and ended else ""
        at = f"{started:%Y-%m-%d %H:%M:%S}" if started else ""
        cells = (attempt["attempt"], at, took, attempt.get("host", ""), attempt.get("ranks", ""))
        how, kind = _ending(attempt)
        row = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        rows.append(f"<tr>{row}<td><span class={kind}>{_text(how)}</span> {_text(attempt.get('reason') or '')}</td></tr>")
    head = "<tr><th>Attempt<th>Started (UTC)<th>Took<th>Host<th>Ranks<th>How it ended</tr>"
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>" if rows else ""


def _details(title: str, mapping: dict[str, Any]) -> str:
    text = yaml.safe_dump(redacted(mapping), sort_keys=False, allow_unicode=True, width=120)
    return f"<details><summary>{title}</summary><pre>{_text(text)}</pre></details>" if mapping else ""


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: v for name, sub in value.items() for key, v in _flat(sub, f"{prefix}.{name}" if prefix else str(name)).items()}


def _differences(runs: list[Run]) -> str:
    """The keys in which the configs differ; where and under which name a run lives is no difference."""
    flat = [{key: "null" if v is None else str(v) for key, v in _flat(run.config).items()} for run in runs]
    keys = [key for key in dict.fromkeys(k for f in flat for k in f) if len({f.get(key) for f in flat}) > 1 and not key.startswith("run.")]
    if not keys:
        return "<section><h2>Differences</h2><p class=note>The configurations are the same.</p></section>"
    head = "".join(f'<th class="colour-{i % COLOURS}">{_text(run.name)}</th>' for i, run in enumerate(runs))
    body = "".join(
        f"<tr><th scope=row>{_text(key)}</th>{''.join(f'<td>{_text(f.get(key, chr(0x2013)))}</td>' for f in flat)}</tr>" for key in keys
    )
    table = f"<table><thead><tr><th>Key</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<section><h2>Differences</h2><div class=scroll>{table}</div></section>"


def _samples(index: int, run: Run) -> str:
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in run.samples:
        same = by_step.setdefault(row["step"], [])
        if same and same[0].get("attempt") != row.get("attempt"):
            same.clear()  # a later attempt repeated the step
        same.append(row)
    if not by_step:
        return ""
    steps = sorted(by_step, reverse=True)
    shown = [steps[i * (len(steps) - 1) // (SAMPLE_STEPS - 1)] for i in range(SAMPLE_STEPS)] if len(steps) > SAMPLE_STEPS else steps
    note = f"<p class=note>{len(shown)} of {len(steps)} evaluations.</p>" if len(shown) < len(steps) else ""
    parts = []
    for step in shown:
        pairs = [(str(row.get("prompt", "")), str(row.get("text", ""))) for row in by_step[step]]
        texts = "".join(f"<pre class=sample><mark>{_text(prompt)}</mark>{_text(text.removeprefix(prompt))}</pre>" for prompt, text in pairs)
        parts.append(f"<details{' open' * (step == shown[0])}><summary>Step {step:,}</summary>{texts}</details>")
    return f'<article class="run colour-{index % COLOURS}"><h3>{_text(run.name)}</h3>{note}{"".join(parts)}</article>'
