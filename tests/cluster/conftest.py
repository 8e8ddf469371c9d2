"""Tests of several machines run where they can: as root, with the programs that `make cluster-tools` installs.

Elsewhere they are skipped and say why. After `make cluster-tools`, and with CI=true, a missing part is a failure instead: nobody
should believe that they ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from nodes import Nodes, insisted, missing, tag
from slurmnodes import PROGRAMS, Slurm
from sshnodes import SshNodes


@pytest.fixture(scope="session")
def require() -> Callable[..., None]:
    """`require("sshd", ...)` at the top of a fixture: goes on where nodes with these programs can be made, else skips or fails."""

    def check(*programs: str) -> None:
        if (reason := missing(programs)) is None:
            return
        if why := insisted():
            pytest.fail(f"cluster tests must run here ({why}), but: {reason}; run make cluster-tools", pytrace=False)
        pytest.skip(f"{reason}; `make cluster-tools` (as root, on Debian) installs what tests of several machines need")

    return check


@pytest.fixture(scope="session")
def four(require, tmp_path_factory) -> Iterator[Nodes]:
    """Four machines for the whole test run; `hosts` puts services on them, so only its `boot` brings one back that was switched off.
    Sorted by name, n10 precedes n9."""
    require()
    nodes = Nodes(["n9", "n10", "n11", "n12"], tmp_path_factory.mktemp("nodes"), tag("bigtrain"))
    try:
        yield nodes.up()
    finally:
        nodes.down()


@pytest.fixture(scope="session")
def hosts(require, four, tmp_path_factory) -> SshNodes:
    """The same four with an ssh server each, for the whole test run."""
    require("sshd", "ssh", "ssh-keygen")
    return SshNodes(four, tmp_path_factory.mktemp("ssh")).up()


@pytest.fixture(scope="session")
def slurm(require, tmp_path_factory) -> Iterator[Slurm]:
    """A Slurm of nine nodes for the whole test run. Sorted by name, n10 precedes n9."""
    require(*PROGRAMS)
    cluster = Slurm([f"n{number}" for number in range(8, 17)], tmp_path_factory.mktemp("slurm"), tag("bigslurm"))
    try:
        yield cluster.up()
    finally:
        cluster.down()
