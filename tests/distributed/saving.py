"""Workers for test_saving.py: checkpoints that fail on the way, and a stop in the middle of a step."""

from __future__ import annotations

import math
import time
from pathlib import Path

from training import close, config, trainer

from bigtrain.checkpoint import format, save
from bigtrain.errors import LostRun, RunError, StopRequested
from bigtrain.train import Report


def settings(data: str, folder: Path, name: str, **changes):
    base = {"train": {"steps": 12, "global_batch": 8, "micro_batch": 1}, "checkpoint": {"every": 3, "keep": 9}}
    merged = {key: {**base.get(key, {}), **value} for key, value in {**base, **changes}.items()}
    return config(Path(data), run={"name": name, "folder": str(folder / "runs")}, zero={"stage": 2}, **merged)


def stops(world, folder: Path, data: str) -> dict[str, dict]:
    """What was undisturbed is in the run `straight`."""
    straight = trainer(settings(data, folder, "straight"), world)
    straight.train()
    close(straight)
    return {"in a step": stop_in_a_step(world, folder, data), "in the first step": stop_in_the_first_step(world, folder, data)}


def stop_in_the_first_step(world, folder: Path, data: str) -> dict:
    """A new run that rank 1 is asked to stop in the third of four passes of a step: the first one of two attempts, then the fourth."""
    found = {}
    for attempt, step in (("first", 1), ("second", 1), ("third", 4), ("last", None)):
        t = trainer(settings(data, folder, "begun", launch={"grace": 3600.0}), world)
        for checkpoint in format.checkpoints(t.saving.folder)[-1:]:
            t.progress = t.saving.resume(checkpoint)
        loss, passes = t.task.loss, []

        def watched(engine, batch, t=t, loss=loss, passes=passes, step=step):
            passes.append(t.progress.step + 1)
            if world.rank == 1 and passes.count(step) == 3:
                t.stop = 15
            return loss(engine, batch)

        t.task.loss = watched
        found[attempt] = {"said": "", "passes": passes}
        try:
            t.train()
        except StopRequested as stop:
            found[attempt]["said"] = str(stop)
        found[attempt]["saved"] = [format.step_of(c) for c in format.checkpoints(t.saving.folder)]
        close(t)
    return found


def stop_in_a_step(world, folder: Path, data: str) -> dict:
    """A run that rank 1 is asked to stop in the third of four passes of step 6, and what follows when it goes on."""
    first = trainer(settings(data, folder, "stopped", launch={"grace": 1e-9}), world)
    loss, passes = first.task.loss, []

    def watched(engine, batch):
        passes.append(first.progress.step + 1)
        if world.rank == 1 and passes.count(6) == 3:
            first.stop = 15
        return loss(engine, batch)

    first.task.loss = watched
    try:
        first.train()
        said = ""
    except StopRequested as stop:
        said = str(stop)
    close(first)
    saved = [format.step_of(c) for c in format.checkpoints(first.saving.folder)]

    second = trainer(settings(data, folder, "stopped", checkpoint={"keep": 2}), world)
    second.progress = second.saving.resume(format.checkpoints(second.saving.folder)[-1])
    verify, read = format.verify, []
    format.verify = lambda path, *rest: read.append(path.name)
    second.train()
    format.verify = verify
    close(second)
    return {"said": said, "passes": passes.count(6), "saved": saved, "read": read}


def failing(world, folder: Path, data: str, cases: list) -> dict[str, dict]:
    """For each (asynchronous, on_error): a run in which rank 1 cannot write the checkpoint of step 6."""
    result = {}
    for asynchronous, on_error in cases:
        name = f"failing-{asynchronous}-{on_error}"
        rules = {"asynchronous": asynchronous, "on_error": on_error}
        report, rows, warnings = Report(), [], []
        report.warn = warnings.append
        t = trainer(settings(data, folder, name, checkpoint=rules), world, report)

        def seen(row, t=t, rows=rows, asynchronous=asynchronous):
            rows.append(row["step"])
            if row["step"] == 7 and asynchronous:
                wait_for_failure(t)

        report.step = seen
        raised = ends_with(t, broken_at=[6])
        saved = [format.step_of(c) for c in format.checkpoints(t.saving.folder)]
        result[name] = {"warnings": warnings, "raised": raised, "saved": saved, "steps": len(rows)}
        close(t)
    return result


def failing_before_a_stop(world, folder: Path, data: str) -> dict[str, dict]:
    """Runs with checkpoint.on_error: stop in which rank 1 cannot write the checkpoint of step 6, and is asked to stop when it has
    failed; "full" is one that cannot write another either."""
    result = {}
    for name, broken_at in (("again", [6]), ("full", [6, 7])):
        report, warnings = Report(), []
        report.warn = warnings.append
        t = trainer(settings(data, folder, f"stop-{name}", checkpoint={"on_error": "stop"}), world, report)

        agree = t.agree

        def held_back(tokens, t=t, agree=agree):  # the failure and the signal are seen in the same step
            if t.progress.step == 7:
                wait_for_failure(t)
                t.stop = 15 if world.rank == 1 else None
            return agree(tokens)

        t.agree = held_back
        raised = ends_with(t, broken_at)
        saved = [format.step_of(c) for c in format.checkpoints(t.saving.folder)]
        result[name] = {"warnings": warnings, "raised": raised, "saved": saved}
        close(t)
    return result


def wait_for_failure(t) -> None:
    """So that it is found out at the next step, however busy the machine is."""
    end = time.monotonic() + 20
    while not t.saving.failed and time.monotonic() < end:
        time.sleep(0.01)


def ends_with(t, broken_at: list[int]) -> str:
    """Train where rank 1 cannot write the checkpoints of some steps: the message of what ended it, nothing where it came to its end."""
    real = save._write_tensors

    def broken(path, fragments):
        if path.name.startswith("rank-00001") and any(f"{step:08d}" in path.parent.name for step in broken_at):
            raise OSError(28, "No space left on device")
        return real(path, fragments)

    save._write_tensors = broken
    try:
        t.train()
        return ""
    except (RunError, StopRequested) as error:
        return str(error)
    finally:
        save._write_tensors = real


def lost(world, folder: Path, data: str) -> dict:
    """A run that another attempt takes over before step 6's checkpoint: a failure that is not gone on from."""
    t = trainer(settings(data, folder, "lost"), world)

    def guard():
        if t.progress.step >= 6:
            raise LostRun("attempt 2 has taken the run over")

    t.saving.saver._guard = guard
    try:
        t.train()
        raised = ""
    except LostRun as error:
        raised = str(error)
    saved = [format.step_of(c) for c in format.checkpoints(t.saving.folder)]
    close(t)
    return {"raised": raised, "step": t.progress.step, "saved": saved}


def diverged(world, folder: Path, data: str) -> dict[int, dict[str, float]]:
    """The metrics in the checkpoints of a run whose held-out loss is out of bounds: by step."""
    t = trainer(settings(data, folder, "diverged", train={"steps": 6}, evaluate={"every": 3, "sequences": 8}), world)
    t.task.metrics = lambda *sums: {"loss": 800.0, "perplexity": math.inf, "bits_per_byte": math.nan}
    t.train()
    close(t)
    return {format.step_of(path): format.read_state(path).metrics for path in format.checkpoints(t.saving.folder)}
