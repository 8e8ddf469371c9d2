"""The preflight on machines over ssh: what is wrong with one of them is named, and a spare takes its place."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from launching import ENVIRONMENT, ROOT, Launches

from bigtrain.errors import BAD_NODE, DONE
from bigtrain.runfolder import read_json

MACHINES = ("n10 slots=1", "n11 slots=1", "n12 slots=1")

# Stands in for bigtrain.probe where ranks do: it measures nothing, and all are alike.
STAND_IN = """
import json, os
print(json.dumps({"stage": "done", "world": int(os.environ["WORLD_SIZE"]), "device": "CPU", "tflops": 1.0}))
"""


@pytest.fixture(scope="module")
def launches(hosts, tmp_path_factory) -> Launches:
    return Launches(hosts.nodes, tmp_path_factory.mktemp("preflight"))


@pytest.fixture(autouse=True)
def tidy(hosts, launches):
    """What a test has done to n11 is gone with its power; no process is left anywhere."""
    yield
    hosts.nodes.power_off("n11")
    hosts.boot("n11")
    launches.all_gone(20)


def launch(launches: Launches, config: Path, *machines: str) -> tuple[int, str]:
    with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile(*machines), COLUMNS="200") as process:
        screen = process.communicate(timeout=240)[0]
    return process.returncode, screen


def another_version(launches: Launches) -> str:
    """A torch of another version, as far as its metadata goes, over the one that all machines share."""
    fake = launches.folder / "fake.dist-info"
    fake.mkdir(exist_ok=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    return f"mount --bind {fake} {metadata.distribution('torch')._path}"


def other_source(launches: Launches) -> str:
    """Another bigtrain/schedule.py, as from a checkout that somebody has worked in."""
    (launches.folder / "schedule.py").write_text((ROOT / "bigtrain/schedule.py").read_text() + "# changed\n")
    return f"mount --bind {launches.folder}/schedule.py {ROOT}/bigtrain/schedule.py"


def own_folder(launches: Launches) -> str:
    """A disk of the machine's own where the others have the shared folder."""
    return f"mkdir -p {launches.folder}/runs; mount -t tmpfs tmpfs {launches.folder}/runs"


def full_disk(launches: Launches) -> str:
    """/tmp on a disk that has a megabyte; the folders in it stay where they were."""
    return (
        "mkdir /run/tmp && mount --rbind /tmp /run/tmp && mount -t tmpfs -o size=1m tmpfs /tmp && cd /run/tmp"
        ' && for name in */; do mkdir "/tmp/$name" && mount --rbind "$name" "/tmp/$name"; done'
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (another_version, f"torch 2.12.0; the others have {metadata.version('torch')}"),
        (other_source, "another source of bigtrain"),
        (own_folder, "it is not shared"),
        (full_disk, "cannot write in /tmp: No space left on device"),
    ],
)
def test_what_is_wrong_with_one_machine_is_named(hosts, launches, spoil, said):
    config = launches.story(spoil.__name__, "words(0, 'done', False)", launch={"preflight": {"free_gib": 0.01}})
    hosts.nodes.run("n11", spoil(launches))
    code, screen = launch(launches, config, *MACHINES)
    assert code == BAD_NODE, screen
    problems = [line for line in screen.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 1 and problems[0].startswith("problem: n11: ") and said in problems[0], screen
    assert "preflight of 3 machines failed in" in screen and "look at n11; or add launch.spares" in screen
    assert launches.run(spoil.__name__).attempts() == []
    assert not list(launches.run(spoil.__name__).path.glob(".preflight-*"))


def test_a_spare_takes_the_place_of_a_machine_that_is_not_fit(hosts, launches):
    config = launches.story("spare", "words(0, 'done', False)", launch={"spares": 1, "preflight": {"free_gib": 0.01}})
    (launches.folder / "spare-ranks/bigtrain/probe.py").write_text(STAND_IN)
    hosts.nodes.run("n11", full_disk(launches))
    code, screen = launch(launches, config, *MACHINES)
    assert code == DONE, screen
    assert "n11 is left out: cannot write in /tmp: No space left on device" in screen
    assert "preflight of 2 machines failed in" in screen and "preflight of 2 machines passed in" in screen
    assert [read_json(launches.run("spare").attempt(1) / f"up-{rank}")["host"] for rank in (0, 1)] == ["n10", "n12"]


def test_a_slow_link_is_named(hosts, launches):
    """n11's cable gives 200 Mbit/s one way, and the other machines' a hundred times that."""
    config = launches.config("slow", launch={"preflight": {"free_gib": 0.01}})
    hosts.nodes.limit("n11", "200mbit")
    try:
        code, screen = launch(launches, config, *MACHINES)
    finally:
        hosts.nodes.unlimit("n11")
    assert code == BAD_NODE, screen
    problems = [line for line in screen.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 1, screen
    [problem] = problems
    assert problem.startswith("problem: n11: sends no faster than ") and "Mbit/s to any other node; usual here: " in problem, screen
    assert "preflight: something is slow; measuring again" in screen


def test_machines_that_are_well_are_not_blamed(launches):
    """The doctor measures them, too, and all figures are there."""
    config = launches.config("well", launch={"preflight": {"free_gib": 0.01}})
    arguments = [str(config), "--launch", "hosts", "--hostfile", launches.hostfile(*MACHINES)]
    inside = ["env", f"--chdir={launches.folder}", sys.executable, "-m", "bigtrain", "doctor", *arguments]
    command = launches.nodes.command("n9", [*inside, "--json"])
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    found = json.loads(done.stdout)
    assert [finding for finding in found["machines"] if finding["problem"]] == [], done.stderr
    assert done.returncode == int(any(line["state"] == "problem" for line in found["here"]))
