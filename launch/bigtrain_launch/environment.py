"""The environment variables of a rank: what bigtrain sets where nobody else has, and why.

One table for every way to start: the launchers apply it before a rank starts, `bigtrain train` under torchrun, deepspeed or
srun while it still can, and `--dry-run` prints it. No pydantic and no torch: agents start in large numbers.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bigtrain import opbuild
from bigtrain.errors import UserError
from bigtrain.hardware import HOST_MEMORY, Hardware
from bigtrain.ranks import machine_number, machines, ranks_here
from bigtrain_launch.network import interface, is_here, is_loopback, own_address

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Place:
    """A machine and what runs on it."""

    hardware: Hardware
    ranks: int | None
    """Ranks that share the cores; None where that is not known."""
    machines: int | None
    """Machines of the run, None where that is not known."""
    towards: str | None
    """A host that the ranks must reach: the first machine, and on the first itself another; None without others."""


@dataclass(frozen=True)
class Setting:
    name: str
    value: str
    why: str


@dataclass(frozen=True)
class _Rule:
    name: str
    value: str
    """In words, for a machine that is not here."""
    why: str
    here: Callable[[Place, Mapping[str, str]], str | None]
    """The value on a machine, None where nothing is to be set; from the variables that are set already, too."""


def rank_environment(place: Place, given: Mapping[str, str]) -> list[Setting]:
    """What to add to `given`, the variables that the ranks have anyway: the user's own, `launch.environment`, `launch.forward`.

    Raises UserError where the ranks of several machines would talk to themselves only, BadNode where this one finds no way to
    the others.
    """
    rules = [rule for rule in _RULES if rule.name not in given]
    return [Setting(rule.name, value, rule.why) for rule in rules if (value := rule.here(place, given)) is not None]


def joining(environ: Mapping[str, str], variables: Mapping[str, str], hardware: Hardware) -> dict[str, str]:
    """What a rank that another launcher has started is to set for itself. `variables` are its rank variables.

    Raises, beside what `rank_environment` raises, UserError on rank 0 and on the machine that is MASTER_ADDR where these are two.
    """
    master, count = variables["MASTER_ADDR"] or None, machines(environ)
    # torchrun, and bigtrain's own agents, have brought all machines together there before.
    tried = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or "BIGTRAIN_AGENT" in environ
    if tried and master in LOOPBACK:
        count = 1
    ranks = ranks_here(environ)
    if ranks and hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) * ranks <= (os.cpu_count() or 1):
        ranks = 1  # each has been bound to cores of its own; a quota, as containers have, is for all of them
    settings = {setting.name: setting.value for setting in rank_environment(Place(hardware, ranks, count, master), environ)}
    number = 0 if variables["RANK"] == "0" else machine_number(environ)
    if master and not tried and number is not None and (number == 0) != is_here(master):
        there = "is this machine, but rank 0 runs on another" if number else "is another machine, but rank 0 runs on this one"
        raise UserError(
            f"MASTER_ADDR: {master} {there} ({socket.gethostname()}), and the ranks would wait for each other; set it to the address of"
            " the first machine, on all of them"
        )
    return settings


def planned(given: Mapping[str, str]) -> list[Setting]:
    """The same for machines that are not here, with the values in words."""
    return [Setting(rule.name, rule.value, rule.why) for rule in _RULES if rule.name not in given]


def show(settings: list[Setting], chosen: Mapping[str, str], forwarded: list[str]) -> list[str]:
    """Lines for --dry-run: bigtrain's settings with their reasons, then the user's. Values that are forwarded are not shown."""
    rows = [(f"{s.name}={s.value if s.value.startswith('<') else shlex.quote(s.value)}", s.why) for s in settings]
    rows += [(f"{name}={shlex.quote(value)}", "launch.environment") for name, value in chosen.items()]
    rows += [(f"{name}=...", "launch.forward: from the launching shell") for name in forwarded if name not in chosen]
    width = max((len(text) for text, _ in rows), default=0)
    return [f"{text:<{width}}  # {why}" for text, why in rows]


def _threads(place: Place, given: Mapping[str, str]) -> str | None:
    return str(max(1, place.hardware.cores // place.ranks)) if place.ranks else None


def _on_cpu(value: str) -> Callable[[Place, Mapping[str, str]], str | None]:
    return lambda place, given: value if place.hardware.kind == "cpu" else None


def _on_gpu(value: str) -> Callable[[Place, Mapping[str, str]], str | None]:
    return lambda place, given: None if place.hardware.kind == "cpu" else value


def _towards(place: Place) -> str | None:
    """The interface by which the ranks reach each other."""
    if place.towards is None or place.machines == 1:
        return None
    address = own_address(place.towards)
    if not is_loopback(address):
        return interface(address)
    if place.machines is None:
        return None
    raise UserError(
        f"MASTER_ADDR: {place.towards} is {address} on this machine, which no other reaches (see /etc/hosts); give the address by which"
        " the other machines know the first one"
    )


def _gloo(place: Place, given: Mapping[str, str]) -> str | None:
    return interface("127.0.0.1") if place.machines == 1 else _towards(place)


def _nccl(place: Place, given: Mapping[str, str]) -> str | None:
    name = _towards(place) if place.hardware.kind != "cpu" else None
    return f"={name}" if name else None


_RULES = (
    _Rule("OMP_NUM_THREADS", "<cores / ranks of the machine>", "every rank would take all cores", _threads),
    _Rule("DS_ACCELERATOR", "<cpu where there is no GPU>", "DeepSpeed need not guess", _on_cpu("cpu")),
    _Rule(
        "TORCH_EXTENSIONS_DIR",
        "<torch_extensions in the Python environment>",
        "DeepSpeed's ops are built once, before ranks start",
        lambda place, given: str(opbuild.folder(given)),
    ),
    _Rule(
        "GLOO_SOCKET_IFNAME",
        "<interface of the route to the first machine>",
        "gloo takes what the host's name resolves to, which may be a loopback address",
        _gloo,
    ),
    # NCCL's guide: a leading = asks for exactly this name. The data goes by InfiniBand where there is any, whatever stands here.
    _Rule("NCCL_SOCKET_IFNAME", "<= and the same, with GPUs>", "NCCL takes the first that is not loopback or docker's", _nccl),
    _Rule("NCCL_DEBUG", "<WARN with GPUs>", "NCCL says why it fails, into the rank's log", _on_gpu("WARN")),
    *(
        _Rule(name, f"<{value} without a GPU>", "large buffers in huge pages: far fewer page faults", _on_cpu(value))
        for name, value in HOST_MEMORY.items()
    ),
)
