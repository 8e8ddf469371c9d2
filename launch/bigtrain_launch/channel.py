"""Messages between a launcher and its agents: JSON objects, one a line, both ways, over any pair of file descriptors.

Each side says every INTERVAL seconds that it lives, from a thread, so that a slow disk does not look like a death; who hears
nothing for SILENCE seconds takes the other for gone. Nothing here waits: what cannot be sent yet is kept.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
import weakref
from typing import Any

PROTOCOL = 1
"""Raised when a message changes its meaning: a launcher and an agent of different versions refuse each other."""
INTERVAL = 2.0
SILENCE = 10.0
LONGEST = 1 << 24  # bytes of one message; more is garbage
CHUNK = 1 << 16
READS = 64  # chunks at a time, so that one talkative side does not keep the loop from the others

Message = dict[str, Any]


class Channel:
    """One end of a conversation. `lost` says in a few words why it is over, None while it is not.

    A shell may print a greeting before the agent speaks: until the first message, lines that are none are kept as `noise`;
    after it they end the conversation.
    """

    def __init__(self, reader: int, writer: int):
        self._reader, self._writer = reader, writer
        for descriptor in (reader, writer):
            os.set_blocking(descriptor, False)
        self._received, self._unsent = b"", bytearray()
        self._put_back: list[Message] = []
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        self._begun = self._closed = False
        self.noise = ""
        self.lost: str | None = None
        self.silent = False
        """It is over because nothing came any more, not because the other side ended it."""
        _keep_alive(self)

    @classmethod
    def over(cls, connection: socket.socket) -> Channel:
        """A channel over a connected socket, which is the channel's from now on."""
        descriptor = connection.detach()
        return cls(descriptor, descriptor)

    def fileno(self) -> int:
        """To be waited on for arrivals."""
        return self._reader

    @property
    def backlog(self) -> int:
        """Bytes that the other side has not taken yet."""
        return len(self._unsent)

    def send(self, kind: str, **facts: Any) -> None:
        """Send a message, now or as soon as there is room. To someone who is gone it is dropped; `lost` says so."""
        self._put({"kind": kind, **facts})

    def receive(self) -> list[Message]:
        """What has arrived since the last call."""
        self.flush()
        ended = self._closed or self._read()
        *lines, self._received = self._received.split(b"\n")
        messages = [*self._put_back, *(message for line in lines if (message := self._parse(line)) and "kind" in message)]
        self._put_back = []
        if len(self._received) > LONGEST:
            self._end("what it sends is no message")
        elif ended:
            self._end("the connection ended")
        elif time.monotonic() - self._heard > SILENCE:
            self.silent = self.silent or not self.lost
            self._end(f"no sign of life for {SILENCE:.0f} s")
        return messages

    def next(self, seconds: float) -> Message | None:
        """The next message, waited for; None where none comes in so many seconds, or the conversation is over."""
        until = time.monotonic() + seconds
        arrivals = select.poll()  # select() knows the first 1,024 descriptors only
        arrivals.register(self, select.POLLIN)
        while True:
            if messages := self.receive():
                self._put_back = messages[1:]
                return messages[0]
            if self.lost or time.monotonic() > until:
                return None
            arrivals.poll(100)

    def flush(self) -> None:
        """Send what was kept, as far as there is room."""
        self._put(None)

    def close(self) -> None:
        self._end("closed")
        with self._lock:
            if not self._closed:
                self._closed = True
                for descriptor in {self._reader, self._writer}:
                    os.close(descriptor)

    def _put(self, message: Message | None) -> None:
        with self._lock:
            if self._closed or self.lost:
                return
            if message is not None:
                self._unsent += json.dumps(message).encode() + b"\n"
            try:
                while self._unsent:
                    del self._unsent[: os.write(self._writer, self._unsent[:CHUNK])]
            except BlockingIOError:
                pass
            except OSError as error:
                # What the other side has said before it went is still to be read; the end of it is found there.
                self._unsent.clear()
                self.silent = not isinstance(error, ConnectionError)
                if self._reader == self._writer or not isinstance(error, BrokenPipeError):
                    self._end(f"the connection broke ({error.strerror})")

    def _read(self) -> bool:
        """Take what is there; whether that was all there will ever be."""
        try:
            for _ in range(READS):
                chunk = os.read(self._reader, CHUNK)
                if not chunk:
                    return True
                self._received += chunk
                self._heard = time.monotonic()
        except BlockingIOError:
            pass
        except OSError as error:
            self.silent = not isinstance(error, ConnectionError)
            return True
        return False

    def _parse(self, line: bytes) -> Message | None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if isinstance(message, dict):
            self._begun = True
            return message
        text = line.decode(errors="replace").strip()
        if self._begun and text:
            self._end(f"what it sends is no message: {last_lines(text)}")
        elif text:
            self.noise = f"{self.noise}{text}\n"[-4096:]
        return None

    def _end(self, why: str) -> None:
        self.lost = self.lost or why


def last_lines(text: str, most: int = 200) -> str:
    """The last lines of what a program said, as one that a terminal can show."""
    words = " / ".join(line.strip() for line in text.strip().splitlines()[-3:] if line.strip())
    shown = "".join(character if character.isprintable() else "?" for character in words)
    return shown if len(shown) <= most else f"...{shown[-most:]}"


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
_guard = threading.Lock()


def _keep_alive(channel: Channel) -> None:
    with _guard:
        first = not _channels
        _channels.add(channel)
    if first:
        threading.Thread(target=_say_so, name="keep-alive", daemon=True).start()


def _say_so() -> None:
    """Say on all channels that this process lives, until none is left."""
    while True:
        with _guard:
            present = list(_channels)
            if not present:
                return
        for channel in present:
            channel._put({})
        del channel, present  # they would be kept
        time.sleep(INTERVAL)
