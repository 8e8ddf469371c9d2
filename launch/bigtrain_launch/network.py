"""Which way another machine lies: the address and the interface from which it is reached. Standard library only.

The kernel's routes are asked, since names of interfaces differ between machines and a host may have several addresses.
"""

from __future__ import annotations

import array
import ipaddress
import socket
import struct
import sys
import time
from pathlib import Path

from bigtrain.errors import BadNode

RESOLVE_SECONDS = 30.0
"""How long a host name may stay unknown: pods of Kubernetes start before their names do."""
SIOCGIFCONF = 0x8912  # Linux: the IPv4 addresses of all interfaces


def resolve(host: str) -> list[tuple[socket.AddressFamily, tuple]]:
    """(family, socket address) of a host, best first. Raises BadNode when it stays unknown."""
    until = time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            return [(family, address) for family, _, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)]
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= until:
                raise BadNode(f"{host}: this machine ({socket.gethostname()}) knows no host of that name ({error})") from None
            time.sleep(0.5)


def own_address(host: str) -> str:
    """The address of this machine from which `host` is reached. Raises BadNode when it is unknown or no route leads there."""
    reason = ""
    for family, address in resolve(host):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(address)  # sends nothing: it only chooses the route
            except OSError as error:
                reason = reason or str(error)
                continue
            return probe.getsockname()[0]
    raise BadNode(f"{host}: no route leads there from this machine ({socket.gethostname()}): {reason}")


def interface(address: str, root: Path = Path("/")) -> str | None:
    """The interface that has an address of this machine, None where the system does not say."""
    if sys.platform != "linux":
        return None
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.version == 6:
        rows = [line.split() for line in (root / "proc/net/if_inet6").read_text().splitlines()]
        return next((row[-1] for row in rows if int(row[0], 16) == int(wanted)), None)
    return next((name for name, found in addresses() if found == wanted), None) or ("lo" if wanted.is_loopback else None)


def addresses() -> list[tuple[str, ipaddress.IPv4Address]]:
    """(interface, address) of all IPv4 addresses of this machine."""
    import fcntl  # not on every system

    table = array.array("B", bytes(1 << 16))
    entry = struct.calcsize("16s4s4s16x")  # struct ifreq: name, family and port, address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("iP", len(table), table.buffer_info()[0])
        size = struct.unpack("iP", fcntl.ioctl(probe, SIOCGIFCONF, request))[0]
    rows = [struct.unpack("16s4s4s16x", table[i : i + entry].tobytes()) for i in range(0, size, entry)]
    # An alias is written eth0:1; the interface is eth0.
    return [(name.rstrip(b"\0").decode().partition(":")[0], ipaddress.IPv4Address(found)) for name, _, found in rows]


def is_here(host: str) -> bool:
    """Whether one of a host's addresses is this machine's own. Raises BadNode when the host is unknown."""
    for family, address in resolve(host):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address[0], 0, *address[2:]))
            except OSError:
                continue
            return True
    return False


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
