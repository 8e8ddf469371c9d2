"""The command that runs in the pods of `bigtrain launch kubernetes`, in the environment that Kubernetes would give it: on machines that
are separate, under the names that a headless service would give them. There is no Kubernetes here."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
from launching import ENVIRONMENT, Launches, until

from bigtrain.errors import DONE, STOPPED, USER_MISTAKE
from bigtrain_launch import jobs
from bigtrain_launch.kubernetes import host
from bigtrain_launch.listener import ADDRESS, TOKEN


class Cluster:
    """Pods that run on nodes."""

    def __init__(self, launches: Launches, name: str, config):
        self.launches, self.nodes, self.name, self.config = launches, launches.nodes, name, config
        self.token = secrets.token_hex(8)
        self.pods: list[subprocess.Popen] = []

    def pod(self, index: int, node: str, **environment: str) -> subprocess.Popen:
        """Start pod `index` on a node; DNS knows from now on that it is there."""
        names = self.nodes.root / "hosts"
        others = [line for line in names.read_text().splitlines() if line.split()[-1] != host(self.name, index)]
        with open(names, "r+") as file:  # the nodes have mounted this file: it must stay the same
            file.write("\n".join([*others, f"{self.nodes.ip[node]} {host(self.name, index)}", ""]))
            file.truncate()
        given = {
            "BIGTRAIN_JOB": f"default/jobset/{self.name}", "JOB_COMPLETION_INDEX": str(index), TOKEN: self.token,
            ADDRESS: f"{host(self.name, 0)}:20700",
        }  # fmt: skip
        command = [sys.executable, "-m", "bigtrain", "launch", "pod", str(self.config)]
        inside = self.nodes.command(node, ["env", f"--chdir={self.launches.folder}", *command])
        options = {"env": {**ENVIRONMENT, **given, **environment}, "stdout": -1, "stderr": subprocess.STDOUT}
        self.pods.append(subprocess.Popen(inside, text=True, start_new_session=True, **options))
        return self.pods[-1]

    def kill(self, node: str, number: int) -> None:
        """A signal to the first process of the pod there, as Kubernetes or the kernel sends it."""
        self.nodes.run(node, f"pkill -{number} -f 'bigtrain launch pod'")


@pytest.fixture(scope="module")
def launches(four, tmp_path_factory) -> Launches:
    return Launches(four, tmp_path_factory.mktemp("pods"))


@pytest.fixture
def kubernetes(launches) -> Iterator[object]:
    made: list[Cluster] = []

    def make(name: str, story: str, **launch) -> Cluster:
        config = launches.story(name, story, launch={"nodes": 2, "cpu_ranks": 2, **launch})
        made.append(Cluster(launches, f"{name}-1", config))
        return made[-1]

    names = launches.nodes.root / "hosts"
    before = names.read_text()
    yield make
    for process in (pod for cluster in made for pod in cluster.pods):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    launches.all_gone(20)
    with open(names, "r+") as file:
        file.write(before)
        file.truncate()


def test_pods_that_are_replaced_go_on_with_the_others(kubernetes, launches):
    """First a pod of agents only, then pod 0 with the launcher; the last attempt ends the run, and with it all pods."""
    cluster = kubernetes("replaced", "if attempt == 3: words(0, 'done', False)\nfor_ever()")
    first, second = cluster.pod(0, "n9"), cluster.pod(1, "n10")
    ranks = launches.up("replaced", 1, 4, first)
    assert [rank["host"] for rank in ranks] == ["n9", "n9", "n10", "n10"]
    environment = ranks[0]["environment"]
    assert TOKEN not in environment and ADDRESS not in environment and environment["GLOO_SOCKET_IFNAME"] == "eth0"
    cluster.kill("n10", signal.SIGKILL)
    second.wait()
    replaced = cluster.pod(1, "n11")
    assert [rank["host"] for rank in launches.up("replaced", 2, 4, first)] == ["n9", "n9", "n11", "n11"]
    cluster.kill("n9", signal.SIGKILL)
    first.wait()
    until(lambda: not launches.nodes.processes("n11", " -m bigtrain train"))  # without their launcher, ranks are not left alone
    launcher = cluster.pod(0, "n12")
    screen = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == DONE, screen
    assert replaced.communicate(timeout=60)[0].count("the launcher is gone; waiting for the next") == 1
    assert replaced.returncode == DONE
    assert [rank["host"] for rank in launches.up("replaced", 3, 4, None)] == ["n12", "n12", "n11", "n11"]
    (job,) = jobs.read(launches.run("replaced"))
    assert (job.kind, job.id, job.nodes, job.attempts) == ("kubernetes", "default/jobset/replaced-1", "2", (1, 2, 3))
    late = cluster.pod(1, "n10")  # a pod that comes when all is over ends well at once
    assert late.wait(30) == DONE


@pytest.mark.parametrize("index", [0, 1])
def test_a_pod_that_is_told_to_end_lets_all_ranks_save(kubernetes, launches, index):
    cluster = kubernetes(f"evicted{index}", "for_ever()")
    pods = [cluster.pod(0, "n9"), cluster.pod(1, "n10")]
    launches.up(f"evicted{index}", 1, 4, pods[0])
    cluster.kill(("n9", "n10")[index], signal.SIGTERM)
    screen = pods[0].communicate(timeout=60)[0]
    assert pods[0].returncode == STOPPED, screen
    run = launches.run(f"evicted{index}")
    beats = run.heartbeats(1, 0.0)
    assert [beat["reason"] for beat in beats] == ["stopped on SIGTERM"] * 4
    if index == 1:
        assert pods[1].wait(30) == STOPPED
    else:  # the other waits for the next launcher, until it is told to end as well
        assert pods[1].poll() is None
        cluster.kill("n10", signal.SIGTERM)
        assert pods[1].wait(30) == STOPPED


def test_a_mistake_ends_pod_0_with_its_code(kubernetes, launches):
    cluster = kubernetes("mistake", "print('there is no such token', flush=True); words(2, 'mistake', False)")
    launcher, _ = cluster.pod(0, "n9"), cluster.pod(1, "n10")
    screen = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == USER_MISTAKE and "there is no such token" in screen
    assert jobs.find(launches.run("mistake"), "kubernetes", "default/jobset/mistake-1").facts["exit_code"] == USER_MISTAKE


def test_who_has_another_token_is_not_let_in(kubernetes, launches):
    cluster = kubernetes("stranger", "words(0, 'done', False)")
    stranger, launcher = cluster.pod(1, "n10", **{TOKEN: "guessed"}), cluster.pod(0, "n9")
    until(lambda: launches.nodes.run("n9", "ss -Htn state established sport = :20700").stdout, launcher)  # it has come, and was heard
    friend = cluster.pod(1, "n11")
    screen = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == DONE and friend.wait(30) == DONE, screen
    assert {rank["host"] for rank in launches.up("stranger", 1, 4, None)} == {"n9", "n11"}
    assert stranger.poll() in (None, DONE)
