"""Is anything ever lost? A run is killed, stopped and restarted over and over, and must end where an undisturbed one does.

    python benchmarks/faults.py kills [--count 200]     SIGKILL of a random rank, every second time while a checkpoint is written
    python benchmarks/faults.py stops [--count 20]      SIGTERM at random moments; each must save within --grace seconds
    python benchmarks/faults.py goodput [--minutes 10]  the quick start with a fault every --every seconds on average
    python benchmarks/faults.py layouts                 144 pairs: ZeRO 0-3 on 1, 2 and 4 ranks, saved by one and loaded by another

Real processes and real signals under `bigtrain train`. Prints what was found, leaves FOLDER/TIME/faults.json, and ends with 1
when anything was lost. tests/faults and tests/distributed/test_layouts.py are the short version.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigtrain import configfile, opbuild
from bigtrain.checkpoint import format
from bigtrain.checkpoint.load import Reader
from bigtrain.config import batch_arithmetic
from bigtrain.errors import DONE, FAILURE, SAME_CRASH, STOPPED, BigtrainError, RunError
from bigtrain.runfolder import RunFolder, latest_rows, read_json, read_rows, write_atomically

HERE = Path(__file__).parent
SMALL, QUICKSTART = HERE / "faults.yaml", HERE.parent / "configs/quickstart.yaml"
START_SECONDS = 120.0
"""Within which a start must have trained again."""
STEP_SECONDS = 10.0
"""Of a large model's step, for which `goodput` says what its measurement means."""


class Job:
    """`bigtrain train CONFIG OVERRIDES` and what it leaves; a context that ends it."""

    def __init__(self, config: Path, overrides: Sequence[str], name: str):
        self._command = [sys.executable, "-m", "bigtrain", "train", str(config), *overrides, f"run.name={name}"]
        settings = configfile.load(config, [*overrides, f"run.name={name}"])
        self.run = RunFolder(Path(settings.run.folder) / name)
        self.config, self.screen = settings, self.run.path.parent / f"{name}.screen"

    def __enter__(self) -> Job:
        self.run.path.parent.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def start(self) -> None:
        environment = {**os.environ, **opbuild.environment()}
        with open(self.screen, "ab") as screen:
            self.process = subprocess.Popen(
                self._command, env=environment, stdin=subprocess.DEVNULL, stdout=screen, stderr=screen, start_new_session=True
            )

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    @property
    def attempt(self) -> int:
        return max(self.run.attempts(), default=0)

    def steps(self, attempt: int) -> int:
        """Steps that an attempt has logged."""
        return sum(row["attempt"] == attempt and "loss" in row for row in read_rows(self.run.metrics))

    def pids(self, attempt: int) -> list[int]:
        """Of the ranks of an attempt, as far as they have written a heartbeat."""
        beats = [read_json(path) for path in sorted(self.run.heartbeat(attempt, 0).parent.glob("rank-*.json"))]
        return [beat["pid"] for beat in beats if beat.get("step")]

    def wait_until(self, reached, what: str, seconds: float = START_SECONDS, poll: float = 0.02) -> bool:
        """Wait until `reached()`; False when the process ends before. Raises RunError when it takes too long."""
        end = time.monotonic() + seconds
        while not reached():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise RunError(f"{self.run.path}: waited {seconds:.0f} s for {what}; see {self.screen}")
            time.sleep(poll)
        return True


@dataclass
class Found:
    """What a scenario has found; nothing in `lost` is what it is all about."""

    facts: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


def undisturbed(config: Path, overrides: Sequence[str], name: str) -> RunFolder:
    with Job(config, overrides, name) as job:
        if job.process.wait(3600) != DONE:
            raise RunError(f"the undisturbed run failed; see {job.screen}")
    return job.run


def compare(job: Job, other: RunFolder, found: Found) -> None:
    """Put into `found.lost` every way in which a disturbed run differs from an undisturbed one."""
    rows, expected = latest_rows(job.run.metrics, "loss"), latest_rows(other.metrics, "loss")
    batch = batch_arithmetic(job.config.train, job.config.launch.ranks_per_node or 1).global_batch
    if [row["step"] for row in rows] != [row["step"] for row in expected]:
        found.lost.append(f"steps: {len(rows)} rows, {len(expected)} expected")
    wrong = [row["step"] for row in rows if row["position"] != (row["step"] - 1) * batch]
    if wrong:
        found.lost.append(f"sequences lost or repeated at steps {wrong[:5]}")
    differ = [a["step"] for a, b in zip(rows, expected) if a["loss"] != b["loss"]]
    if differ:
        found.lost.append(f"{len(differ)} losses differ, first at step {differ[0]}")
    ours, theirs = (Reader(format.checkpoints(run.checkpoints)[-1]) for run in (job.run, other))
    for name in theirs.index.shapes:
        for kind in sorted(theirs.index.kinds):
            if theirs.holds(name, kind) and not torch.equal(ours.tensor(name, kind), theirs.tensor(name, kind)):
                found.lost.append(f"{kind} of {name} differs at the end")
    if "Passing over" in job.screen.read_text(errors="replace"):
        found.lost.append("a start met a damaged checkpoint")
    for checkpoint in format.checkpoints(job.run.checkpoints):
        format.verify(checkpoint)


def kills(config: Path, overrides: Sequence[str], count: int, seed: int = 0, tell=lambda text: None) -> Found:
    """Kill a random rank `count` times, every second time while a checkpoint is being written, then let the run end."""
    chance, found = random.Random(seed), Found()
    other = undisturbed(config, overrides, "not-killed")
    inside = killed_at = 0
    with Job(config, overrides, "killed") as job:
        for number in range(1, count + 1):
            started = time.monotonic()
            while True:  # a start is killed once it has saved more than the one before, or it might be the same crash twice
                attempt = job.attempt
                before = format.checkpoints(job.run.checkpoints)
                if before and format.step_of(before[-1]) > killed_at and len(job.pids(attempt)) > 1:
                    break
                if job.process.poll() is not None or time.monotonic() - started > START_SECONDS:
                    found.lost.append(f"kill {number}: nothing to kill: exit code {job.process.poll()}; see {job.screen}")
                    return found
                time.sleep(0.02)
            in_save = number % 2 == 0
            if in_save:
                job.wait_until(lambda: any(job.run.checkpoints.glob(".step-*.writing")), "a checkpoint being written", poll=0.0005)
                time.sleep(chance.random() * 0.01)
            else:
                time.sleep(chance.random() * 0.3)
            os.kill(chance.choice(job.pids(attempt)), signal.SIGKILL)
            if not job.wait_until(lambda attempt=attempt: job.attempt > attempt, "a restart"):
                found.lost.append(f"kill {number}: no restart: exit code {job.process.poll()}; see {job.screen}")
                return found
            killed_at = max(row["step"] for row in latest_rows(job.run.metrics, "loss")) + 2  # rows are a step late
            hit = any(job.run.checkpoints.glob(".step-*.writing"))
            inside += hit
            tell(f"kill {number} of {count}: attempt {attempt}, {len(before)} checkpoints{', inside a save' if hit else ''}")
        code = job.process.wait(3600)
        if code != DONE:
            found.lost.append(f"the run ended with {code}; see {job.screen}")
            return found
        compare(job, other, found)
        found.facts = {"kills": count, "inside_a_save": inside, "attempts": job.attempt, "steps": job.config.train.steps}
    return found


def stops(config: Path, overrides: Sequence[str], count: int, grace: float, seed: int = 0, tell=lambda text: None) -> Found:
    """Stop the run `count` times with SIGTERM at a random moment of its training; each time it must have saved within `grace`."""
    chance, found = random.Random(seed), Found()
    other, took = undisturbed(config, overrides, "not-stopped"), []
    for number in range(1, count + 1):
        with Job(config, overrides, "stopped") as job:
            before = job.attempt
            if not job.wait_until(lambda: job.attempt > before and job.steps(job.attempt) > 2, "training"):  # noqa: B023
                found.lost.append(f"stop {number}: the run ended before; see {job.screen}")
                return found
            time.sleep(chance.random() * 0.3)
            sent = time.monotonic()
            job.process.terminate()
            code = job.process.wait(120)
            took.append(time.monotonic() - sent)
            steps = [row["step"] for row in latest_rows(job.run.metrics, "loss")]
            newest = format.checkpoints(job.run.checkpoints)[-1]
            if code != STOPPED or format.step_of(newest) != steps[-1] or took[-1] > grace:
                found.lost.append(f"stop {number}: exit code {code}, step {steps[-1]}, {newest.name}, {took[-1]:.1f} s")
            format.verify(newest)
            tell(f"stop {number} of {count}: saved at step {steps[-1]}, {took[-1]:.1f} s")
    with Job(config, overrides, "stopped") as job:
        if job.process.wait(3600) != DONE:
            found.lost.append(f"the run did not end; see {job.screen}")
            return found
        compare(job, other, found)
    found.facts = {"stops": count, "grace_s": grace, "longest_s": max(took), "seconds": took}
    return found


def expected_goodput(start: float, interval: float, every: float, saving: float = 0.0) -> float:
    """Share of the time whose steps are kept, with a fault every `every` seconds on average: a fault costs the start (`start`
    seconds) and, on average, half of the time between checkpoints (`interval` seconds, each of which blocks for `saving`).

    Young 1974, "A first order approximation to the optimum checkpoint interval", equation 1, as a share.
    """
    return max(0.0, (1 - saving / interval) * (1 - (start + interval / 2) / every))


def goodput(overrides: Sequence[str], minutes: float, every: float, seed: int = 0, tell=lambda text: None) -> Found:
    """Train the quick start for so long, with SIGKILL of a random rank every `every` seconds on average (exponentially)."""
    chance, found, starts = random.Random(seed), Found(), []
    changes = ["train.steps=100000", "evaluate.every=null", "restarts.max=1000000", "restarts.backoff=0", "checkpoint.every=4"]
    with Job(QUICKSTART, [*overrides, *changes], "goodput") as job:
        begun = time.monotonic()
        end, next_fault, faults, killed = begun + 60 * minutes, begun + chance.expovariate(1 / every), 0, begun
        attempt = again = 0
        while time.monotonic() < end:
            if job.process.poll() == SAME_CRASH:  # two faults at one step look like a bug; a person knows better
                again += 1
                job.start()
            elif job.process.poll() is not None:
                found.lost.append(f"the run ended with exit code {job.process.poll()}; see {job.screen}")
                return found
            if job.attempt > attempt and job.steps(job.attempt):
                attempt = job.attempt
                starts.append(time.monotonic() - killed)
            if time.monotonic() >= next_fault and (pids := job.pids(job.attempt)):
                with suppress(ProcessLookupError):  # those of an attempt that has just ended: the next one gets this fault
                    os.kill(chance.choice(pids), signal.SIGKILL)
                    killed, faults = time.monotonic(), faults + 1
                    next_fault = killed + chance.expovariate(1 / every)
                    tell(f"fault {faults} at {killed - begun:.0f} s of {60 * minutes:.0f} s")
            time.sleep(0.05)
        wall = time.monotonic() - begun
        job.process.terminate()
        job.process.wait(120)
        rows = latest_rows(job.run.metrics, "step_s")
        useful = sum(row["step_s"] for row in rows)
        step = sorted(row["step_s"] for row in rows)[len(rows) // 2]
        start = sorted(starts)[len(starts) // 2] if starts else math.nan
        found.facts = {
            "wall_s": wall,
            "faults": faults,
            "started_by_hand": again,
            "steps_kept": len(rows),
            "useful_s": useful,
            "goodput": useful / wall,
            "step_s": step,
            "start_s": start,
            "expected": expected_goodput(start, 4 * step, wall / max(1, faults)),
            "expected_at_a_step_of_10_s": {  # a checkpoint every 30 steps, and a minute more to start
                f"a fault every {hours} h": expected_goodput(start + 60, 30 * STEP_SECONDS, 3600.0 * hours) for hours in (1, 4, 24)
            },
        }
        if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
            found.lost.append("steps are missing")
    return found


def layouts(tell=lambda text: None) -> Found:
    """All 144 pairs of layouts, by way of the tests' own workers."""
    code = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/distributed/test_layouts.py"],
        cwd=HERE.parent,
        env={**os.environ, "ALL_LAYOUTS": "1"},
    ).returncode
    return Found({"pairs": 144}, [] if code == 0 else ["see above"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("scenario", choices=("kills", "stops", "goodput", "layouts"))
    parser.add_argument("--count", type=int, help="of kills (200) or stops (20)")
    parser.add_argument("--grace", type=float, default=10.0, metavar="S", help="within which a stop must have saved")
    parser.add_argument("--minutes", type=float, default=10.0, help="of goodput")
    parser.add_argument("--every", type=float, default=30.0, metavar="S", help="between faults, on average (goodput)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"), help="for the runs and the result")
    options = parser.parse_args(argv)
    folder = options.folder / time.strftime("faults-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    overrides = [f"run.folder={folder}"]

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.scenario == "kills":
        count = options.count or 200
        found = kills(SMALL, [*overrides, f"train.steps={20 * count + 200}"], count, options.seed, tell)
    elif options.scenario == "stops":
        count = options.count or 20
        found = stops(SMALL, [*overrides, f"train.steps={20 * count + 200}"], count, options.grace, options.seed, tell)
    elif options.scenario == "goodput":
        found = goodput(overrides, options.minutes, options.every, options.seed, tell)
    else:
        found = layouts(tell)
    write_atomically(folder / "faults.json", json.dumps({"scenario": options.scenario, "facts": found.facts, "lost": found.lost}, indent=1))
    print(json.dumps(found.facts, indent=1))
    print(f"{folder / 'faults.json'}: " + ("nothing was lost" if not found.lost else "LOST: " + "; ".join(found.lost)))
    return FAILURE if found.lost else DONE


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except BigtrainError as error:
        print(f"faults: {error}", file=sys.stderr)
        sys.exit(error.code)
