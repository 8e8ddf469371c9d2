"""Machines in a list, reached by OpenSSH's own client: the agent's channel is ssh's standard input and output, so that no port
needs to be open and a private network or a jump host is no obstacle. What ~/.ssh/config says of a machine counts."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bigtrain.errors import UserError
from bigtrain_launch.channel import Channel, Message, last_lines
from bigtrain_launch.cluster import CONNECT_SECONDS, Node
from bigtrain_launch.local import die_with_parent

SSH = (
    "ssh",
    *("-T", "-o", "BatchMode=yes"),  # a question would wait for ever
    *("-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=3", "-o", "ServerAliveCountMax=3"),  # a dead machine is noticed
)
_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._@:-]*)\s+slots=(?P<slots>[1-9][0-9]{0,3})")


@dataclass
class _Started:
    process: subprocess.Popen
    channel: Channel
    errors: IO[bytes]
    since: float
    answered: bool = False


class Hosts:
    """A transport (cluster.Transport) over ssh. `python`: the Python to run on the machines."""

    def __init__(self, python: str):
        self._python = python
        self._started: dict[str, _Started] = {}

    def command(self, name: str) -> list[str]:
        """The command that starts an agent on a machine."""
        variables = [f"BIGTRAIN_NODE={name}"]
        if path := os.environ.get("PYTHONPATH"):
            variables.append(f"PYTHONPATH={os.pathsep.join(str(Path(part).absolute()) for part in path.split(os.pathsep) if part)}")
        # Not in the home folder: Python would take a clone of bigtrain there for the package.
        agent = shlex.join(["exec", "env", *variables, self._python, "-m", "bigtrain_launch.agent"])
        return [*SSH, "--", name, f"cd / && {agent}"]

    def start(self, names: Sequence[str]) -> None:
        for name in names:
            self._stop(name)
            errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by _stop)
            # A session of its own keeps Ctrl-C away from it: the ranks are to be asked, not cut off.
            process = subprocess.Popen(
                self.command(name),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
            channel = Channel(os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno()))
            process.stdin.close()
            process.stdout.close()
            self._started[name] = _Started(process, channel, errors, time.monotonic())

    def connected(self) -> list[tuple[str, Message, Channel]]:
        come = []
        for name, one in self._started.items():
            if not one.answered and (greeting := one.channel.next(0)):
                one.answered = True
                come.append((name, greeting, one.channel))
        return come

    def failed(self) -> list[tuple[str, str]]:
        problems = []
        for name, one in list(self._started.items()):
            late = time.monotonic() - one.since > CONNECT_SECONDS
            if not one.answered and (late or one.channel.lost):
                problems.append((name, self._why(one)))
                self._stop(name)
        return problems

    def close(self) -> None:
        for name in list(self._started):
            self._stop(name)

    def _why(self, one: _Started) -> str:
        try:
            code = one.process.wait(1)
        except subprocess.TimeoutExpired:
            code = None
        one.errors.seek(0)
        said = last_lines(one.errors.read().decode(errors="replace") or one.channel.noise) or "it said nothing"
        if code is None:
            return f"no agent has answered over ssh for {CONNECT_SECONDS:.0f} s ({said}); does `{shlex.join([*SSH, 'HOST', 'true'])}` work?"
        if code == 255:
            return f"ssh does not get there: {said}"
        if code in (126, 127):
            return f"{self._python} cannot be run there ({said}); give an environment that all machines have as launch.venv"
        if "No module named" in said:
            return f"bigtrain is not installed there, in {self._python}: {said}"
        return f"the agent there ended at once, with exit code {code}: {said}"

    def _stop(self, name: str) -> None:
        """Hang up; the agent notices, and ends its ranks and itself."""
        if one := self._started.pop(name, None):
            one.channel.close()
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)
            one.process.wait()
            one.errors.close()


def read_hostfile(path: Path) -> list[Node]:
    """Machines of a file in DeepSpeed's format: a line `NAME slots=N` each, N ranks at most; # begins a comment.

    Raises UserError, naming the line, for anything else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"{path}: cannot be read ({why}); give a hostfile with a line `NAME slots=N` for each machine") from None
    nodes: dict[str, Node] = {}
    for number, text in enumerate(lines, 1):
        if not (line := text.partition("#")[0].strip()):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise UserError(f"{path}:{number}: expected NAME slots=N, as in `node1 slots=8`, found {line[:80]!r}")
        if found["name"] in nodes:
            raise UserError(f"{path}:{number}: {found['name']} is there twice; give it one line, with all its slots")
        nodes[found["name"]] = Node(found["name"], int(found["slots"]))
    if not nodes:
        raise UserError(f"{path}: names no machine; add a line `NAME slots=N` for each")
    return list(nodes.values())
