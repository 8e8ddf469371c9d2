"""Run folders that somebody else made, and what a person looks at: the report, the screen, trackers."""

from __future__ import annotations

import html.parser
import io
import json
import shutil

import pytest
from payloads import BILLION, Cases, Place

from bigtrain import configfile
from bigtrain.errors import UserError
from bigtrain.report import write_report
from bigtrain.runfolder import RunFolder
from bigtrain.screen import Screen, printable
from bigtrain.trackers import Trackers, _indented

cases = Cases()
case = cases.case

HTML = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'><!--<script>"


class Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def run_of(place: Place) -> RunFolder:
    """A run folder with a config, a step and a sample."""
    run = RunFolder(place.folder / "runs" / "r")
    (run.attempt(1) / "logs").mkdir(parents=True)
    run.metrics.write_text('{"attempt": 1, "step": 1, "time": 1.0, "loss": 2.5, "step_s": 0.1}\n')
    run.config.write_text(configfile.dump(configfile.load(place.folder / "c.yaml")))
    return run


def report(place: Place) -> None:
    """Write the report, and compare its elements with those of a page of the same run with harmless text."""
    page = Page(write_report([place.folder / "runs" / "r"]).read_text())
    assert [tag for tag, _ in page.tags].count("script") == 2 and "img" not in [tag for tag, _ in page.tags]
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on") or key in ("src", "srcdoc", "href")]


@case(None)
def html_everywhere_in_a_report(place):
    run = run_of(place)
    run.samples.write_text(json.dumps({"attempt": 1, "step": 1, "prompt": HTML, "text": HTML}) + "\n")
    run.metrics.write_text(json.dumps({"attempt": 1, "step": 1, "time": 1.0, "loss": 2.5, "step_s": 0.1, HTML: 1.0, "other": HTML}) + "\n")
    run.config.write_text(json.dumps({HTML: {HTML: [HTML]}, "train": {"steps": HTML}}))
    record = {"host": HTML, "reason": HTML, "ranks": HTML, "started": HTML, "exit_code": HTML, HTML: HTML}
    (run.attempt(1) / "attempt.json").write_text(json.dumps(record))
    (run.attempt(1) / "environment.json").write_text(
        json.dumps({"hardware": {HTML: HTML}, "git_commit": HTML, "torch": HTML, "parameters": HTML})
    )
    report(place)


@case(None)
def html_in_the_name_of_a_run(place):
    run_of(place)
    named = place.folder / "runs" / HTML.replace("/", "\u2215")
    (place.folder / "runs" / "r").rename(named)
    shutil.copytree(named, place.folder / "runs" / "r")
    tags = [tag for tag, _ in Page(write_report([named, place.folder / "runs" / "r"]).read_text()).tags]
    assert tags.count("script") == 2 and "img" not in tags


@case(None)
def run_folder_of_bombs(place):
    run = run_of(place)
    run.config.write_text(BILLION)
    run.samples.write_text("[" * 100_000 + '\n{"step": ' + "9" * 6000 + '}\n{"step": 1, "prompt": [], "text": {}}\n')
    with open(run.metrics, "ab") as file:
        file.write(b"[" * 100_000 + b"\n" + place.pickle + b'\n{"step": 2, "loss": 1e999}\n{"step": 3, "loss": "' + b"9" * 6000 + b'"}\n')
    (run.attempt(1) / "attempt.json").write_text("[" * 100_000)
    (run.attempt(1) / "environment.json").write_bytes(place.pickle)
    report(place)


@case(None)
def run_folder_of_tags(place):
    run = run_of(place)
    run.config.write_text(f"a: !!python/object/apply:os.system ['{place.command}']\n")
    report(place)


@case(None)
def run_folder_of_fifos(place):
    run = run_of(place)
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "attempts/1/attempt.json", "attempts/1/environment.json"):
        place.fifo(f"runs/r/{name}")
    assert run.attempts() == [1]
    report(place)


ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\r\x08 \u202eback"


@case(None)
def escape_sequences_on_the_screen(place):
    stream = io.StringIO()
    shows = Screen(stream)
    shows.header({"run": ESCAPES})
    shows.sample(ESCAPES, ESCAPES)
    shows.warn(ESCAPES)
    shows.message(ESCAPES)
    assert set(stream.getvalue()).isdisjoint("\x1b\x07\x9b\r\x08\u202e")


@case(r"^(?!.*[\x1b\x07\x9b\r\x08\u202e]).*there is no such file")
def escape_sequences_in_a_message(place):
    try:
        configfile.load(place.folder / ESCAPES)
    except UserError as error:  # as the command prints it
        raise UserError(printable(error)) from None


@case(None)
def markup_in_trackers(place):
    """TensorBoard makes HTML of Markdown: all that it gets is a block of code."""
    text = f"{HTML}\n```\n# x\u2028<b>\r\n\x0b[link](javascript:alert(1))"
    assert all(line.startswith("    ") for line in _indented(text).split("\n"))
    run = run_of(place)
    trackers = Trackers(place.config("tracking: {tensorboard: false}").tracking, run, 1, {}, pytest.fail)
    trackers.log_samples([{"step": 1, "prompt": text, "text": f"{text}\ud800"}])
    trackers.close()
    assert run.samples.read_text().count("\n") == 1
    report(place)


@pytest.mark.parametrize("name", cases)
def test_payload(name, place, request):
    cases.attempt(name, place, request)
