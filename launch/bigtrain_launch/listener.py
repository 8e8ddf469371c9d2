"""Agents that come to their launcher over TCP, where something else (srun, Kubernetes) has started them.

Both sides know a token, from their environment. Neither sends it: each proves that it knows it, over numbers that the two have
just made up, so that nobody on the network can take the place of either, or learn the token by listening.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import time

from bigtrain.errors import RunError, UserError
from bigtrain_launch.channel import Channel, Message

ADDRESS = "BIGTRAIN_LAUNCHER"
"""Variable with HOST:PORT of the launcher."""
TOKEN = "BIGTRAIN_TOKEN"
GREETING_SECONDS = 10.0
RETRY_SECONDS = 0.5


class Listener:
    """Where agents come to: `port` on all addresses of this machine (0: a free one), for those that know the token."""

    def __init__(self, token: str, port: int = 0):
        self._token = token
        try:
            self._socket = socket.create_server(("", port), backlog=1024)
        except OSError as error:
            raise UserError(f"port {port}, on which agents are awaited, cannot be had ({error.strerror}); choose another") from None
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self._greeting: list[tuple[float, str, Channel]] = []

    def accepted(self) -> list[tuple[Message, Channel]]:
        """Agents that have come since the last call, each with its greeting (see agent.py). Who does not know the token is sent away."""
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # nobody more, or one that has gone again
                break
            nonce = secrets.token_hex(16)
            channel = Channel.over(connection)
            channel.send("who", nonce=nonce)
            self._greeting.append((time.monotonic() + GREETING_SECONDS, nonce, channel))
        come, waiting = [], []
        for until, nonce, channel in self._greeting:
            messages = channel.receive()
            if messages and _same(messages[0].get("proof"), _proof(self._token, "agent", nonce, str(messages[0].get("nonce")))):
                channel.send("welcome", proof=_proof(self._token, "launcher", nonce, messages[0]["nonce"]))
                come.append((messages[0], channel))
            elif messages or channel.lost or time.monotonic() > until:
                channel.close()
            else:
                waiting.append((until, nonce, channel))
        self._greeting = waiting
        return come

    def close(self) -> None:
        self._socket.close()
        for _, _, channel in self._greeting:
            channel.close()


def join(address: str, token: str, greeting: Message, seconds: float) -> Channel:
    """An agent's side: the channel to the launcher at HOST:PORT. Tries for so long; raises RunError when that does not help."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=GREETING_SECONDS)
            return _introduce(Channel.over(connection), token, greeting)
        except (OSError, ValueError) as error:
            if time.monotonic() > until:
                raise RunError(f"the launcher at {address} cannot be reached: {error}") from None
            time.sleep(RETRY_SECONDS)


def _introduce(channel: Channel, token: str, greeting: Message) -> Channel:
    """Prove to each other that both know the token. Raises ConnectionError."""
    asked = (channel.next(GREETING_SECONDS) or {}).get("nonce")
    nonce = secrets.token_hex(16)
    channel.send(**greeting, nonce=nonce, proof=_proof(token, "agent", str(asked), nonce))
    if not _same((channel.next(GREETING_SECONDS) or {}).get("proof"), _proof(token, "launcher", str(asked), nonce)):
        channel.close()
        raise ConnectionError("who answers there is not the launcher of this run, or has another token")
    return channel


def _proof(token: str, role: str, one: str, other: str) -> str:
    return hmac.new(token.encode(), f"{role} {one} {other}".encode(), hashlib.sha256).hexdigest()


def _same(given: object, expected: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())
