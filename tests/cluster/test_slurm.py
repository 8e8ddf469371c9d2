"""`bigtrain launch slurm`: on a real Slurm, whose nodes lose their power and whose jobs lose their nodes.

Most of the time here is Slurm's: until it misses a node, or begins a job again. So what can wait at the same time does.
"""

import re
import sys
import time

import pytest
from launching import ENVIRONMENT, Launches, losses, until

from bigtrain import configfile
from bigtrain.runfolder import read_json
from bigtrain_launch import jobs
from bigtrain_launch.hostlist import expand

# A rank that counts a step every tenth of a second, saves its count now and then and when it is told to stop, and goes on from there.
COUNT = """
if rank == 0:
    begin = {"job": os.environ["SLURM_JOB_ID"], "token": os.environ["BIGTRAIN_ATTEMPT"]}
    json.dump(begin, open(f"{run}/attempts/{attempt}/attempt.json", "w"))
def save(step):
    os.makedirs(f"{run}/checkpoints/step-{step:08d}", exist_ok=True)
    open(f"{run}/checkpoints/step-{step:08d}/manifest.json", "w").write("{}")
saved = os.listdir(f"{run}/checkpoints") if os.path.isdir(f"{run}/checkpoints") else []
told = []
for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, lambda number, frame: told.append(number))
for step in range(max([0, *(int(name[5:]) for name in saved)]) + 1, STEPS + 1):
    if rank == 0: open(f"{run}/steps", "a").write(f"{step}\\n")
    time.sleep(0.1)
    if rank == 0 and (told or step % 10 == 0): save(step)
    if told: words(75, "stopped", False, step)
words(0, "done", False, STEPS)
"""


class Jobs(Launches):
    """Launchers that are jobs: `bigtrain launch slurm` on the head node, and what Slurm makes of them."""

    def submit(self, name: str, *arguments: str, **environment: str) -> str:
        """The number of the job that trains the run of this name."""
        with self.launcher("head", "slurm", self.folder / f"{name}.yaml", *arguments, **self.nodes.environment, **environment) as process:
            told = process.communicate(timeout=60)[0]
        found = re.findall(r"^job (\d+): ", told, re.MULTILINE)
        assert process.returncode == 0 and found, told
        self.newest = int(found[-1])
        return found[0]

    def count(self, name: str, steps: int, **launch: object) -> None:
        """A config of a run that only counts."""
        self.story(name, COUNT.replace("STEPS", str(steps)), launch=launch)

    def steps(self, name: str) -> list[int]:
        file = self.run(name).path / "steps"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def ended(self, name: str, job: str) -> str:
        """Wait until a job is complete; how often it was begun again."""
        end = self.nodes.wait(job)
        assert end["JobState"] == "COMPLETED", (end, self.nodes.log(job))
        return end["Restarts"]


@pytest.fixture(scope="module")
def launches(slurm, tmp_path_factory) -> Jobs:
    return Jobs(slurm, tmp_path_factory.mktemp("launches"))


@pytest.fixture(scope="module", autouse=True)
def limited(launches) -> str:
    """A job that meets its time limit, which takes Slurm half a minute, beside the other tests."""
    launches.count("limited", 320, nodes=2, exclude="n[8-11,14-16]", time="1", grace=44)
    return launches.submit("limited")


@pytest.fixture(scope="module", autouse=True)
def broken(launches) -> str:
    """A job that has a broken node, beside the first tests."""
    story = COUNT.replace("STEPS", "20").replace("def save", "if host == 'n14': words(1, 'broken', True)\ndef save")
    launches.story("broken", story, launch={"nodes": 2, "exclude": "n[8-13]"}, restarts={"node_failures": 1})
    return launches.submit("broken")


def test_ranks_in_the_order_of_the_host_list(launches, slurm):
    launch = {"nodes": 3, "gpus_per_node": 2, "exclude": "n8,n[12-16]", "forward": ["SECRET"]}
    launches.story("order", "words(0, 'done', False)", launch=launch)
    job = launches.submit("order", SECRET="hush", STRAY="stray")
    launches.ended("order", job)
    ranks = [read_json(launches.run("order").attempt(1) / f"up-{rank}") for rank in range(6)]
    assert [r["host"] for r in ranks] == ["n9", "n9", "n10", "n10", "n11", "n11"]
    for rank in ranks:
        environment = rank["environment"]
        assert (environment["MASTER_ADDR"], environment["CUDA_VISIBLE_DEVICES"], rank["world"]) == (slurm.ip["n9"], "0,1", 6)
        assert environment["SECRET"] == "hush" and not {"STRAY", "BIGTRAIN_TOKEN", "BIGTRAIN_LAUNCHER"} & environment.keys()
    written = [path for path in launches.run("order").path.rglob("*") if path.is_file() and not path.name.startswith("up-")]
    assert written and not [path for path in written if "hush" in path.read_text()]


def test_more_urgent_job(launches, slurm):
    """Slurm tells the ranks to end; they save, the job makes room, is requeued, and goes on with the next step."""
    launches.count("preempted", 50, nodes=4, exclude="n[12-16]")
    job = launches.submit("preempted")
    until(lambda: len(launches.steps("preempted")) > 12)
    urgent = slurm.on("head", "sbatch --parsable --partition=urgent --nodelist=n[8-11] --output=/dev/null --wrap 'sleep 0.1'")
    assert slurm.wait(urgent)["JobState"] == "COMPLETED"
    assert launches.ended("preempted", job) == "1", slurm.log(job)
    assert launches.steps("preempted") == list(range(1, 51))
    assert [
        read_json(path)["exit_code"] for path in sorted(launches.run("preempted").path.glob("attempts/*/heartbeat/rank-00003.json"))
    ] == [75, 0]


def test_broken_node_is_left_out_after_a_requeue(launches, slurm, broken):
    assert launches.ended("broken", broken) == "1", slurm.log(broken)
    assert (slurm.job(broken)["ExcNodeList"], slurm.job(broken)["NodeList"]) == ("n[8-14]", "n[15-16]")
    assert "n14 is left out" in slurm.log(broken) and "1 of 3 restarts are used up" in slurm.log(broken)


def test_lost_nodes(launches, slurm):
    """A node of one job, which goes on with a spare; and the launcher's node of another, which is begun again by those that are left."""
    launches.count("spare", 60, nodes=2, spares=1, exclude="n[12-13]")
    launches.count("launcher", 60, nodes=2, spares=1, exclude="n[12-13]")
    job = {name: launches.submit(name) for name in ("spare", "launcher")}
    until(lambda: all(len(launches.steps(name)) > 12 for name in job))
    lost = [expand(slurm.job(job["spare"])["NodeList"])[1], slurm.job(job["launcher"])["BatchHost"]]
    try:
        for node in lost:
            slurm.power_off(node)
        assert launches.ended("spare", job["spare"]) == "0"
        assert f"{lost[0]} is gone" in slurm.log(job["spare"])
        assert launches.ended("launcher", job["launcher"]) == "1"
        assert "requeue 1; 1 of 3 restarts are used up" in slurm.log(job["launcher"])
    finally:
        for node in lost:
            slurm.repair(node)
    for name in job:
        assert sorted(set(launches.steps(name))) == list(range(1, 61))  # some twice: back to what was saved


def test_cancelled_job_leaves_nothing(launches, slurm):
    launches.count("cancelled", 1000, nodes=2, exclude="n[12-13]")
    job = launches.submit("cancelled")
    until(lambda: len(launches.steps("cancelled")) > 5)
    slurm.on("head", f"scancel {job}")
    cancelled = time.monotonic()
    until(lambda: not [line for line in launches.left() if not line.startswith(("n12:", "n13:"))])
    assert time.monotonic() - cancelled < 15
    assert slurm.wait(job)["JobState"] == "CANCELLED" and slurm.job(job)["Restarts"] == "0"


def test_chain_and_sweep(launches, slurm):
    launches.count("chain", 5)
    launches.count("sweep", 5)
    first, second = launches.submit("chain", "--chain", "2"), str(launches.newest)
    array = launches.submit(
        "sweep", "--sweep", "optimizer.lr=1e-3,2e-3", "--sweep", "optimizer.betas=[0.9,0.95]", "--after", f"afterok:{second}"
    )
    assert slurm.job(second)["Dependency"] in (f"afterany:{first}(unfulfilled)", "(null)") and int(array) == int(second) + 1
    assert [launches.ended("chain", job) for job in (first, second)] == ["0", "0"]
    until(lambda: all(launches.steps(f"sweep-{point}") for point in (1, 2)))
    for point, rate in ((1, 1e-3), (2, 2e-3)):
        run = launches.run(f"sweep-{point}")
        assert configfile.load_saved(run.config).optimizer.lr == rate
        assert [(job.kind, job.id, len(job.attempts)) for job in jobs.read(run)] == [("slurm", f"{array}_{point}", 1)]
    assert [(job.id, len(job.attempts)) for job in jobs.read(launches.run("chain"))] == [(first, 1), (second, 1)]


# ---- With real ranks ----


@pytest.fixture(scope="module")
def local(launches, slurm) -> dict[int, float]:
    """Losses of two ranks on one machine."""
    config = launches.config("local", launch={"cpu_ranks": 2})
    with launches.launcher("head", "local", config) as process:
        told = process.communicate(timeout=120)[0]
    assert process.returncode == 0, told
    return losses(launches.run("local"))


def test_training_is_told_to_stop_and_resumes_exactly(launches, slurm, local):
    launches.config("trained", launch={"nodes": 2, "exclude": "n[12-13]", "preflight": {"enabled": False}})
    job = launches.submit("trained")
    run = launches.run("trained")
    until(lambda: run.metrics.exists() and len(losses(run)) > 3)
    slurm.on("head", f"scancel --batch --signal=USR1 {job}")
    assert launches.ended("trained", job) == "1"
    assert len(run.attempts()) == 2 and losses(run) == local


def test_srun_by_hand(launches, slurm, local):
    config = launches.config("srun", launch={"nodes": 2})
    slurm.on(
        "head",
        f"cd {launches.folder} && srun --nodes=2 --exclude=n[12-13] {sys.executable} -m bigtrain train {config}",
        env={**ENVIRONMENT, **slurm.environment},
    )
    assert losses(launches.run("srun")) == local


def test_time_limit(launches, slurm, limited):
    """USR1 comes before the time limit: the run saves, the job is requeued, and goes on with the next step."""
    assert int(launches.ended("limited", limited)) >= 1, slurm.log(limited)
    assert launches.steps("limited") == list(range(1, 321))
