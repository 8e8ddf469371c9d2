"""The pods of a run in Kubernetes. Each has an agent; pod 0 has the launcher too, whose exit code is the run's.

Agents come to the launcher over TCP, by the name that the headless service gives to pod 0. A pod that is replaced comes again under
its old name; where that is pod 0, the agents of the others wait for the new launcher. Kubernetes takes a job for complete when all
of its pods have ended well, so they look into the run's folder for the end of the run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

from bigtrain.errors import DONE, STOPPED, BadNode, RunError, UserError
from bigtrain.runfolder import RunFolder
from bigtrain_launch import jobs
from bigtrain_launch.agent import Agent, greeting
from bigtrain_launch.channel import Channel, Message
from bigtrain_launch.kubernetes import INDEX, JOB, host
from bigtrain_launch.listener import ADDRESS, TOKEN, Listener, join
from bigtrain_launch.local import Signals, die_with_parent, say
from bigtrain_launch.queues import KUBERNETES_ID

NODE = "BIGTRAIN_NODE"
PATIENCE_SECONDS = 900.0
"""For pods to come, which wait for a machine and for their image, and for a launcher to come back."""
JOIN_SECONDS = 3.0  # between looks at the run's folder, and at signals
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Pod:
    """Which pod this is."""

    id: str
    """Of the job: NAMESPACE/KIND/NAME."""
    index: int
    launcher: str
    token: str

    @classmethod
    def here(cls, environ: MutableMapping[str, str]) -> Pod:
        """As the environment says, from which what the ranks need not know is taken. Raises UserError in what is no pod of a run."""
        job, index, address, token = (environ.get(name, "") for name in (JOB, INDEX, ADDRESS, TOKEN))
        port = address.rpartition(":")[2]
        if not (KUBERNETES_ID.fullmatch(job) and re.fullmatch("[0-9]{1,6}", index) and re.fullmatch("[0-9]{1,5}", port) and token):
            raise UserError(
                f"{JOB}, {INDEX}, {ADDRESS} and {TOKEN} do not say which pod this is: this command is for the pods that `bigtrain launch"
                " kubernetes` makes"
            )
        del environ[ADDRESS], environ[TOKEN]
        return cls(job, int(index), address, token)

    def name(self, index: int) -> str:
        """The name by which the others reach a pod of this job."""
        return host(self.id.rpartition("/")[2], index)


class Pods:
    """A transport (cluster.Transport) in pod 0: its own agent, and those that come by themselves, at any time. A thread lets them in."""

    def __init__(self, pod: Pod):
        """Raises UserError where the port is taken."""
        self._pod, self._listener = pod, Listener(pod.token, int(pod.launcher.rpartition(":")[2]))
        self._own: subprocess.Popen | None = None
        self._wanted: set[str] = set()
        self._come: dict[str, tuple[Message, Channel]] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._doorman = threading.Thread(target=self._let_in, name="doorman", daemon=True)
        self._doorman.start()

    def start(self, names: Sequence[str]) -> None:
        self._wanted.update(names)
        if (own := self._pod.name(0)) in names:
            self._end_own()
            environment = {**os.environ, ADDRESS: f"127.0.0.1:{self._listener.port}", TOKEN: self._pod.token, NODE: own}
            self._own = subprocess.Popen(
                [sys.executable, "-m", "bigtrain_launch.agent"],
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def connected(self) -> list[tuple[str, Message, Channel]]:
        with self._lock:
            found = [(name, *self._come.pop(name)) for name in list(self._come) if name in self._wanted]
        self._wanted.difference_update(name for name, _, _ in found)
        return found

    def failed(self) -> list[tuple[str, str]]:
        return []  # a pod that is not there yet may come at any time

    def close(self) -> None:
        self._closed.set()
        self._doorman.join()
        self._listener.close()
        for _, channel in self._come.values():
            channel.close()
        self._end_own()

    def _let_in(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            with self._lock:
                for hello, channel in self._listener.accepted():
                    name = str(hello.get("node"))
                    if name in self._come:  # from before the pod was replaced
                        self._come.pop(name)[1].close()
                    self._come[name] = hello, channel
                for name, (_, channel) in list(self._come.items()):
                    channel.receive()
                    if channel.lost:
                        self._come.pop(name)[1].close()

    def _end_own(self) -> None:
        if self._own:
            self._own.kill()  # and with it its ranks
            self._own.wait()


def serve(pod: Pod, run: RunFolder) -> int:
    """The agent of a pod other than 0, for one launcher after another. Returns the exit code when the run is done, or this pod is
    told to end. Raises BadNode where no launcher comes."""
    hello = greeting() | {"node": pod.name(pod.index)}
    since = time.monotonic()
    with Signals() as signals:
        while not _is_done(pod, run):
            try:
                channel = join(pod.launcher, pod.token, hello, JOIN_SECONDS)
            except RunError as error:
                if time.monotonic() - since > PATIENCE_SECONDS:
                    raise BadNode(f"{pod.name(pod.index)}: {error}, for {PATIENCE_SECONDS:.0f} s") from None
                if any(True for _ in signals.take()):
                    return STOPPED
                continue
            agent = Agent(channel, signals)
            agent.run()
            if agent.signalled:  # the launcher was told, and has let the ranks save
                return STOPPED
            if not _is_done(pod, run):
                say("the launcher is gone; waiting for the next, or for the end of the run")
            since = time.monotonic()
    return DONE


def _is_done(pod: Pod, run: RunFolder) -> bool:
    job = jobs.find(run, "kubernetes", pod.id)
    return job is not None and job.facts.get("exit_code") == DONE
