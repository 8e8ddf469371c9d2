"""A real Slurm on machines that are namespaces: a controller on `head`, and nodes with two cores and two GPUs that are device files."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nodes import Nodes, sh

from bigtrain_launch.hostlist import fold

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
GPUS = 2
# Times that a cluster has in minutes are seconds here. cred_expire: a requeued job waits for its old credentials to run out.
CONFIG = """\
ClusterName=bigtrain
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=1
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=6
KillWait=3
MessageTimeout=5
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=train Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10 PreemptMode=REQUEUE
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Slurm(Nodes):
    """`compute` are the nodes; a command is run by `on` a machine, with Slurm's variables."""

    def __init__(self, compute: Sequence[str], root: Path, tag: str):
        super().__init__(["head", *compute], root, tag, subnet="10.78.0")
        self.compute = list(compute)
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def up(self) -> Slurm:
        for folder in ("state", "log", "spool", "dev", *(f"spool/{name}" for name in self.compute)):
            (self.root / folder).mkdir(parents=True)
        for number in range(GPUS):
            sh(f"mknod {self.root}/dev/nvidia{number} c 1 3")
        resources = f"CPUs=2 RealMemory=4000 Gres=gpu:{GPUS}"
        nodes = "\n".join(f"NodeName={name} NodeHostname={name} NodeAddr={self.ip[name]} {resources}" for name in self.compute)
        config = CONFIG.format(root=self.root, head=self.ip["head"], nodes=nodes, names=fold(self.compute))
        (self.root / "slurm.conf").write_text(config)
        (self.root / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.root}/dev/nvidia[0-{GPUS - 1}]\n")
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (self.root / "munge.key").write_bytes(os.urandom(1024))
        (self.root / "munge.key").chmod(0o400)
        super().up()
        files = {
            "key-file": "munge.key",
            "socket": "munge.sock",
            "pid-file": "munged.pid",
            "log-file": "log/munged.log",
            "seed-file": "seed",
        }
        self.on("head", "munged --force " + " ".join(f"--{option}={self.root}/{file}" for option, file in files.items()))
        self.on("head", "slurmctld -c")
        for name in self.compute:
            self.on(name, f"slurmd -N {name}")
        self.idle()
        return self

    def on(self, name: str, script: str, **options) -> str:
        done = self.run(name, script, **{"env": self.environment, "check": False} | options)
        if done.returncode:
            raise RuntimeError(f"{name}: {script}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def repair(self, name: str) -> None:
        """Boot a node that has lost its power."""
        self.boot(name)
        self.cable(name, True)
        self.on(name, f"slurmd -N {name}")

    def idle(self, seconds: float = 60) -> None:
        """Wait until all nodes are free."""

        def state() -> dict[str, str]:
            lines = self.on("head", "sinfo --noheader --Node --partition=train --format='%N %T'").splitlines()
            return {name: state for name, state in (line.split() for line in lines)}

        self.until(lambda: set(state().values()) == {"idle"}, seconds, state)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        return dict(re.findall(r"(\w+)=(\S+)", self.on("head", f"scontrol --oneliner show job {number}")))

    def wait(self, number: str, states: Sequence[str] = OVER, seconds: float = 180) -> dict[str, str]:
        """Wait until a job is in one of these states, and return what Slurm says of it."""
        self.until(lambda: self.job(number)["JobState"] in states, seconds, lambda: (self.job(number), self.log(number)))
        return self.job(number)

    def log(self, number: str) -> str:
        output = Path(self.job(number).get("StdOut", ""))
        return output.read_text(errors="replace") if output.is_file() else ""

    def until(self, true: Callable[[], object], seconds: float, tell: Callable[[], object] = str) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise TimeoutError(tell())
            time.sleep(0.2)
