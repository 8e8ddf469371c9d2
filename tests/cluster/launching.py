"""What tests of launching share: a tiny run, a launcher on a node, and a stand-in for `bigtrain train` that tells a story."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGKILL
from subprocess import CalledProcessError

from nodes import Nodes

from bigtrain import configfile, opbuild
from bigtrain.runfolder import RunFolder, read_json

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/distributed"))
from training import config, prepare_data  # noqa: E402

ENVIRONMENT = {
    **os.environ,
    **opbuild.environment(),
    "PYTHONPATH": os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launch")),
    "OMP_NUM_THREADS": "1",
}

# Rank 0 opens the attempt as the real one does; then each rank says that it is there, and does what the story says.
STAND_IN = """
import json, os, signal, socket, sys, time
if sys.argv[1] != "train": sys.exit()
rank, world, run, host = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["BIGTRAIN_RUN"], socket.gethostname()
def newest(): return max([0, *map(int, os.listdir(f"{run}/attempts") if os.path.isdir(f"{run}/attempts") else [])])
if rank == 0:
    attempt = newest() + 1
    os.makedirs(f"{run}/attempts/{attempt}/heartbeat")
    json.dump({"token": os.environ["BIGTRAIN_ATTEMPT"]}, open(f"{run}/attempts/{attempt}/.attempt.json", "w"))
    os.rename(f"{run}/attempts/{attempt}/.attempt.json", f"{run}/attempts/{attempt}/attempt.json")
else:
    while True:
        attempt = newest()
        try:
            if json.load(open(f"{run}/attempts/{attempt}/attempt.json"))["token"] == os.environ["BIGTRAIN_ATTEMPT"]: break
        except OSError: pass
        time.sleep(0.02)
def words(code, reason, restart, step=3):
    facts = dict(rank=rank, step=step, position=8 * step, exit_code=code, reason=reason, restart=restart, lost=False)
    json.dump(facts, open(f"{run}/attempts/{attempt}/heartbeat/rank-{rank:05d}.json", "w"))
    sys.exit(code)
def saved(number, frame): words(75, f"stopped on {signal.Signals(number).name}", False)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1): signal.signal(number, saved)
print(f"rank {rank} of {world} on {host}", flush=True)
facts = {"host": host, "pid": os.getpid(), "world": world, "master": os.environ["MASTER_ADDR"], "environment": dict(os.environ)}
json.dump(facts, open(f"{run}/attempts/{attempt}/.up-{rank}", "w"))
os.rename(f"{run}/attempts/{attempt}/.up-{rank}", f"{run}/attempts/{attempt}/up-{rank}")
def for_ever():
    while True: time.sleep(0.05)
"""


class Launches:
    """Runs in a folder that all nodes see. Launchers are `bigtrain launch` on a node, in this folder."""

    def __init__(self, nodes: Nodes, folder: Path):
        self.nodes, self.folder = nodes, folder
        self._number = 0
        prepare_data(folder)

    def config(self, name: str, **changes: dict) -> Path:
        """A config of a tiny run; `changes` are merged into its sections."""
        path = self.folder / f"{name}.yaml"
        path.write_text(configfile.dump(config(self.folder, **{"data": {"validation_fraction": 0.2}, "run": {"name": name}, **changes})))
        return path

    def story(self, name: str, story: str, **changes: dict) -> Path:
        """A config of a run whose ranks are stand-ins that do what `story` says."""
        package = self.folder / f"{name}-ranks/bigtrain"
        package.mkdir(parents=True)
        (package / "__main__.py").write_text(STAND_IN + story)
        launch = {"environment": {"PYTHONPATH": str(package.parent)}, "preflight": {"enabled": False}, **changes.pop("launch", {})}
        return self.config(name, launch=launch, restarts={"backoff": 0.1, **changes.pop("restarts", {})}, **changes)

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    def hostfile(self, *lines: str) -> str:
        self._number += 1
        path = self.folder / f"hosts-{self._number}"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    @contextmanager
    def launcher(self, node: str, kind: str, *arguments: str | Path, **environment: str) -> Iterator[subprocess.Popen]:
        """`bigtrain launch KIND ARGUMENTS` on a node; what it says is read with `communicate`."""
        command = [sys.executable, "-m", "bigtrain", "launch", kind, *map(str, arguments)]
        options = {"env": {**ENVIRONMENT, **environment}, "cwd": self.folder, "stdout": -1, "stderr": subprocess.STDOUT}
        inside = self.nodes.command(node, ["setsid", "--wait", "env", f"--chdir={self.folder}", *command])
        process = subprocess.Popen(inside, text=True, start_new_session=True, **options)
        try:
            yield process
        finally:
            with suppress(CalledProcessError):  # it has ended
                self.signal(node, SIGKILL)
            process.communicate()

    def signal(self, node: str, number: int) -> None:
        """Send a signal to the launcher on a node, and to what is in its process group, as a terminal does."""
        self.nodes.run(node, f"kill -{int(number)} -- -$(pgrep -o -f '^{sys.executable} -m bigtrain launch')")

    def up(self, name: str, attempt: int, ranks: int, process: subprocess.Popen) -> list[dict]:
        """Wait until the stand-ins of an attempt are there; what each says of itself."""
        folder = self.run(name).attempt(attempt)
        until(lambda: all((folder / f"up-{rank}").exists() for rank in range(ranks)), process)
        return [read_json(folder / f"up-{rank}") for rank in range(ranks)]

    def left(self) -> list[str]:
        """Agents and ranks on any node."""
        return [f"{name}: {line}" for name in self.nodes.up_names() for line in self.nodes.processes(name, " -m bigtrain")]

    def all_gone(self, seconds: float) -> None:
        """Fail unless no agent and no rank is left on any node within so many seconds."""
        end = time.monotonic() + seconds
        while found := self.left():
            assert time.monotonic() < end, found
            time.sleep(0.1)


def until(condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 90.0) -> None:
    """Wait for a condition, as long as a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def losses(run: RunFolder) -> dict[int, float]:
    """The loss of every step, of the latest attempt that has it."""
    return {row["step"]: row["loss"] for line in run.metrics.read_text().splitlines() if "loss" in (row := json.loads(line))}
