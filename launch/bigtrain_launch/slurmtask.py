"""The task of a node in a Slurm job: `python -m bigtrain_launch.slurmtask` is an agent that outlives its launcher's node.

Light, as the agent is: hundreds of them may be starting from one file system.
"""

from __future__ import annotations

import os
import sys

from bigtrain.errors import DONE, FAILURE, BigtrainError
from bigtrain_launch.agent import JOIN_SECONDS, Agent, greeting
from bigtrain_launch.listener import ADDRESS, TOKEN, join
from bigtrain_launch.local import Signals
from bigtrain_launch.requeue import watch_over

WATCHERS = 3  # of the nodes of a start: one is enough, and may be lost at the same time
WATCH_SECONDS = 5.0


def main() -> int:
    address, token = os.environ.pop(ADDRESS, ""), os.environ.pop(TOKEN, "")  # the ranks need neither
    with Signals() as signals:
        channel = join(address, token, greeting(), JOIN_SECONDS)
        Agent(channel, signals).run()
    if channel.silent and int(os.environ.get("SLURM_NODEID", "0")) <= WATCHERS:
        watch_over(os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0), WATCH_SECONDS)
    return DONE


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BigtrainError as error:
        print(f"bigtrain: {error}", file=sys.stderr)
        sys.exit(FAILURE)
