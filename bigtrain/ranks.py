"""How a launcher tells a process which rank it is. Standard library only, so that the launching side can ask too."""

from __future__ import annotations

import re
from collections.abc import Mapping

from bigtrain.errors import UserError


def launched(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The rank variables that a launcher has set, under torchrun's names, or None when nothing launched this process.

    bigtrain's own launcher, torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK; srun sets SLURM_PROCID.
    A Slurm batch script sees SLURM_PROCID too; only a task that srun started has a number for SLURM_STEP_ID.
    Raises UserError for a variable that should be a number and is not.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        found = {
            "RANK": environment["RANK"],
            "WORLD_SIZE": environment["WORLD_SIZE"],
            "LOCAL_RANK": environment.get("LOCAL_RANK", "0"),
            "MASTER_ADDR": environment.get("MASTER_ADDR", ""),
            "MASTER_PORT": environment.get("MASTER_PORT", "29500"),
        }
    elif environment.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environment:
        job = re.sub(r"[^0-9]", "", environment.get("SLURM_JOB_ID", ""))[-4:] or "0"
        found = {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")),
            "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
            "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", "")),
            # Below the ephemeral range, and the same on every node without asking anyone.
            "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + int(job)),
        }
    else:
        return None
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not re.fullmatch("[0-9]{1,9}", found[name]):
            raise UserError(
                f"{name}: expected a whole number from the launcher, found {found[name][:40]!r}; start the ranks with a launcher"
            )
    if not int(found["RANK"]) < int(found["WORLD_SIZE"]):
        raise UserError(f"RANK: {found['RANK']} is not below WORLD_SIZE {found['WORLD_SIZE']}; start the ranks with a launcher")
    if not 0 < int(found["MASTER_PORT"]) < 1 << 16:
        raise UserError(f"MASTER_PORT: {found['MASTER_PORT']} is no port; give one from 1024 to 65535, the same to every rank")
    return found


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """The Slurm job that this process belongs to, of an array 12_3; None outside of one."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")


def _first_host(nodes: str) -> str:
    """Of a host list of Slurm's, n9 of n[9-10],m1: that is where it puts rank 0, wherever srun itself was started."""
    first = re.match(r"(?:[^][,]|\[[^][]*\])*", nodes)
    return re.sub(r"\[([0-9]+)[^][]*\]", r"\1", first[0]) if first else ""


def machines(environment: Mapping[str, str]) -> int | None:
    """How many machines a launcher has started ranks on, None where it does not say. torchrun and bigtrain's own launcher set
    LOCAL_WORLD_SIZE, the deepspeed launcher CROSS_SIZE, srun SLURM_STEP_NUM_NODES."""
    world, local = environment.get("WORLD_SIZE", ""), environment.get("LOCAL_WORLD_SIZE", "")
    if world.isdigit() and local.isdigit() and int(local):
        return -(-int(world) // int(local))
    return _number(environment, ["CROSS_SIZE"] if "RANK" in environment else ["SLURM_STEP_NUM_NODES"])


def ranks_here(environment: Mapping[str, str]) -> int | None:
    """How many ranks a launcher has started on this machine, None where it does not say: torchrun's LOCAL_WORLD_SIZE, deepspeed's
    LOCAL_SIZE, srun's SLURM_STEP_TASKS_PER_NODE (of `2(x3),1` the first)."""
    if "RANK" in environment:
        return _number(environment, ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
    first = re.match("[1-9][0-9]{0,3}", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(first[0]) if first else None


def machine_number(environment: Mapping[str, str]) -> int | None:
    """Which of them this one is, None where nobody says. The first has rank 0."""
    return _number(environment, ["NODE_RANK", "GROUP_RANK", "CROSS_RANK"] if "RANK" in environment else ["SLURM_NODEID"])


def _number(environment: Mapping[str, str], names: list[str]) -> int | None:
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)
