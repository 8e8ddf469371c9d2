"""Machines that are really separate, on this one: a node is a network, UTS, PID, mount and IPC namespace on a bridge.

Every node has its own address, host name, process numbers and /dev/shm; the file system is shared, as on a cluster. A node
can lose its power or its cable, be slow, or be booted again. Needs root and iproute2.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

INIT = "import os,time\nwhile 1:\n try: os.wait()\n except ChildProcessError: time.sleep(.05)"  # a node's process 1 reaps orphans

MARK = Path(__file__).parents[2] / ".venv/.cluster-tools"


def missing(programs: Sequence[str] = ()) -> str | None:
    """Why nodes on which `programs` run cannot be made here, None where they can."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [tool for tool in ("ip", "tc", "nsenter", "unshare", "setpriv", "ps", *programs) if not shutil.which(tool)]
    if lacking:
        return f"{', '.join(lacking)} not installed"
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "true"], capture_output=True).returncode:
        return "root may not make namespaces here (a container without CAP_SYS_ADMIN?)"
    return None


def insisted() -> str | None:
    """Why tests of several machines must run here, None where they need not."""
    if os.environ.get("CI") == "true":
        return "CI=true"
    return "`make cluster-tools` has run" if MARK.exists() else None


def tag(kind: str) -> str:
    """A name for this test run's set of nodes; the networks of earlier runs' sets, which a kill has left, are removed."""
    for left in Path("/run/netns").glob(f"{kind}[0-9]*-*"):
        owner = re.match(rf"{kind}(\d+)-", left.name)
        if owner and not Path("/proc", owner[1]).exists():
            subprocess.run(["ip", "netns", "del", left.name], capture_output=True)
    return f"{kind}{os.getpid()}"


def sh(command: str) -> str:
    done = subprocess.run(command, shell=True, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
    return done.stdout


class Nodes:
    """Nodes `names` from `up` to `down`, with a folder each under `root`. `tag` keeps two sets apart."""

    def __init__(self, names: list[str], root: Path, tag: str, subnet: str = "10.77.0"):
        self.names, self.root, self.tag = names, root, tag
        self.ip = {name: f"{subnet}.{10 + n}" for n, name in enumerate(names)}
        self._running: dict[str, tuple[subprocess.Popen, int]] = {}

    def up(self) -> Nodes:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in self.ip.items()))
        self.down()  # what a killed test run has left
        switch = f"{self.tag}-sw"
        sh(f"ip netns add {switch} && ip -n {switch} link add br0 type bridge && ip -n {switch} link set br0 up")
        for name in self.names:
            there, port = f"{self.tag}-{name}", f"v-{name}"
            sh(
                f"ip netns add {there} && ip -n {there} link set lo up"
                f" && ip -n {there} link add eth0 type veth peer name {port} netns {switch}"
                f" && ip -n {switch} link set {port} master br0 up"
                f" && ip -n {there} addr add {self.ip[name]}/24 dev eth0 && ip -n {there} link set eth0 up"
            )
            self.boot(name)
        return self

    def boot(self, name: str) -> None:
        """Start a node's process 1; it dies with the test run, and all processes of the node with it."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        (folder / "ready").unlink(missing_ok=True)
        script = (
            f"hostname {name}; mount --bind {self.root}/hosts /etc/hosts; mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs /run;"
            f" touch {folder}/ready; exec python3 -S -c '{INIT}'"
        )
        namespaces = ["--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        inside = ["nsenter", f"--net=/run/netns/{self.tag}-{name}", "setpriv", "--pdeathsig", "KILL", "unshare", *namespaces]
        process = subprocess.Popen([*inside, "sh", "-c", script], start_new_session=True, stderr=subprocess.DEVNULL)
        while not (folder / "ready").exists():
            if process.poll() is not None:
                raise RuntimeError(f"node {name} did not start")
            time.sleep(0.01)
        first = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        self._running[name] = process, first

    def up_names(self) -> list[str]:
        """Nodes that are not switched off."""
        return list(self._running)

    def command(self, name: str, argv: list[str]) -> list[str]:
        """`argv` to be run on a node, in this working directory."""
        namespaces = ["--net", "--uts", "--mount", "--pid", "--ipc", f"--wd={os.getcwd()}"]
        return ["nsenter", "-t", str(self._running[name][1]), *namespaces, "--", *argv]

    def run(self, name: str, script: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(name, ["bash", "-c", script]), **{"check": True, "text": True, "capture_output": True} | options)

    def popen(self, name: str, argv: list[str], **options) -> subprocess.Popen:
        return subprocess.Popen(self.command(name, argv), **{"text": True} | options)

    def processes(self, name: str, pattern: str) -> list[str]:
        """Command lines on a node that hold `pattern`."""
        return [line for line in self.run(name, "ps -wweo pid,args").stdout.splitlines() if pattern in line and "ps -wweo" not in line]

    def power_off(self, name: str) -> None:
        """The cable first, so that no last packet gets out, then every process of the node."""
        self.cable(name, False)
        process, first = self._running.pop(name)
        os.kill(first, signal.SIGKILL)
        process.wait()

    def cable(self, name: str, plugged: bool) -> None:
        sh(f"ip -n {self.tag}-sw link set v-{name} {'up' if plugged else 'down'}")

    def limit(self, name: str, rate: str) -> None:
        """Let a node send no faster than `rate`, such as 200mbit."""
        sh(f"ip netns exec {self.tag}-{name} tc qdisc replace dev eth0 root tbf rate {rate} burst 64kb latency 200ms")

    def unlimit(self, name: str) -> None:
        sh(f"ip netns exec {self.tag}-{name} tc qdisc del dev eth0 root")

    def down(self) -> None:
        for process, first in self._running.values():
            with suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
            process.wait()
        self._running.clear()
        for there in ("sw", *self.names):
            subprocess.run(["ip", "netns", "del", f"{self.tag}-{there}"], capture_output=True)
