"""Commands of a scheduler, asked with a time limit. They may be missing, hang, or answer anything."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence

ASK_SECONDS = 10.0
_KLOG = re.compile(r"[IWEF][0-9]{4} [0-9:.]+ ")  # what kubectl's libraries mumble before it says the same in words
LONGEST_ANSWER = 1 << 24  # bytes; squeue tells of a job in a hundred


class Unanswered(Exception):
    """Why a command gave no answer, in a line, and what it `told` before it failed."""

    def __init__(self, why: str, told: str = ""):
        super().__init__(why)
        self.told = told


def ask(argv: Sequence[str], text: str = "", seconds: float = ASK_SECONDS, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints when it is given `text`, with `environment` in place of this process's own.

    Raises Unanswered where it is missing, fails, has not ended after `seconds`, or never stops talking."""
    with tempfile.TemporaryFile() as given:
        given.write(text.encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                argv, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True
            )
        except OSError as error:
            why = "not installed on this machine" if isinstance(error, FileNotFoundError) else error.strerror
            raise Unanswered(f"{argv[0]}: {why}") from None
    with process.stdout, process.stderr:
        try:
            told, complained = _listen(process, time.monotonic() + seconds)
        except subprocess.TimeoutExpired:
            raise Unanswered(f"{argv[0]}: no answer in {seconds:g} s") from None
        except OverflowError:
            raise Unanswered(f"{argv[0]}: answered with more than {LONGEST_ANSWER >> 20} MiB") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started: a wrapper's child would hold on
                process.wait()
    if process.returncode:
        lines = [line for line in complained.splitlines() if line.strip() and not _KLOG.match(line)]
        why = lines[0] if lines else f"exit code {process.returncode}"
        raise Unanswered(f"{argv[0]}: {one_line(why)}", told)
    return told


def _listen(process: subprocess.Popen, until: float) -> tuple[str, str]:
    """Output and complaints, until the process has ended. Raises TimeoutExpired and OverflowError."""
    said = {process.stdout: b"", process.stderr: b""}
    with selectors.DefaultSelector() as selector:
        for stream in said:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, until - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired(process.args, 0)
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                said[key.fileobj] += piece
                if not piece:
                    selector.unregister(key.fileobj)
                elif len(said[key.fileobj]) > LONGEST_ANSWER:
                    raise OverflowError
    process.wait(max(0.1, until - time.monotonic()))
    return said[process.stdout].decode(errors="replace"), said[process.stderr].decode(errors="replace")


def one_line(text: str) -> str:
    """Text of others as a part of a message: short, and with nothing in it that a terminal obeys."""
    return "".join(c if c.isprintable() else " " for c in text.strip())[:200]
