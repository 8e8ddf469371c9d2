"""Where the ranks of a run meet: every machine goes there once before they do. So a wrong name, an address that leads elsewhere
and a firewall are found out by an agent, in seconds and by name, not by ranks that wait. Standard library only."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress

from bigtrain_launch.network import addresses


class Door:
    """A port on which whoever knocks is told a number, and so knows that it has reached this machine and no other."""

    def __init__(self, port: int):
        """Raises OSError where the port is in use."""
        self.port, self.nonce = port, secrets.token_hex(8)
        self.visitor: str | None = None
        """The address of someone who has knocked."""
        self._socket = socket.create_server(("", port), backlog=1024)
        self._socket.setblocking(False)

    def answer(self) -> None:
        """Tell those who have knocked."""
        with suppress(OSError):  # nobody more
            while True:
                connection, (visitor, _) = self._socket.accept()
                with connection, suppress(OSError):  # it has gone again
                    connection.sendall(self.nonce.encode() + b"\n")
                    self.visitor = visitor

    def close(self) -> None:
        self.answer()
        self._socket.close()


def ways_here(name: str) -> list[str]:
    """By what others may reach this machine, which the launcher calls `name`, best first. The address by which ssh has come is what
    that name means to the launcher, which may know it from its ~/.ssh/config alone."""
    came = os.environ.get("SSH_CONNECTION", "").split()[2:3]
    return list(dict.fromkeys([*came, name, *(str(address) for _, address in addresses() if not address.is_loopback)]))


def knock(ways: Sequence[str], port: int, nonce: str, seconds: float) -> dict[str, str]:
    """Look for the door with this number by each of these names and addresses, for so long each: the `address` that leads there,
    or the `problem` with all of them."""
    problems = []
    for way in ways:
        try:
            with socket.create_connection((way, port), timeout=seconds) as connection:
                with connection.makefile("rb") as answer:
                    found = answer.readline(100).decode(errors="replace").strip()
                address = connection.getpeername()[0]
        except OSError as error:
            problems.append(f"{way}: {error.strerror or error}")
            continue
        if found == nonce:
            return {"address": address}
        problems.append(f"{way}: that is another machine")
    return {"problem": f"port {port} is not to be reached ({'; '.join(problems)})"}
