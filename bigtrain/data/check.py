"""Prepared data against its checksums, while training has begun already: a flipped bit in a shard is silent otherwise."""

from __future__ import annotations

import hashlib
import threading
import time

from bigtrain.data.shards import TokenStore
from bigtrain.errors import UserError

_BLOCK = 1 << 20
_REST = 9  # times the time that a block took: a tenth of one core, and of what the disk can give, at most


class Check:
    """Reads this rank's share of the files of prepared data on a daemon thread. Together the ranks read each file once."""

    def __init__(self, store: TokenStore, rank: int, ranks: int):
        self._folder = store.folder
        largest_first = sorted(store.manifest.files().items(), key=lambda file: (-file[1][0], file[0]))
        self._files = largest_first[rank::ranks]
        self._found: UserError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="data-check", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Give up what is not read yet."""
        self._stop.set()
        self._thread.join(1.0)  # a read that hangs must not hold up the end of a run

    def wait(self) -> None:
        """Wait until every file of the share has been read."""
        self._thread.join()

    def refuse(self) -> None:
        """Raise UserError for the first file so far that has changed since it was prepared, or cannot be read."""
        if self._found:
            raise self._found

    def _work(self) -> None:
        block = memoryview(bytearray(_BLOCK))
        for name, (_, expected) in self._files:
            path, sha256 = self._folder / name, hashlib.sha256()
            try:
                with open(path, "rb", buffering=0) as file:
                    began = time.monotonic()
                    while size := file.readinto(block):
                        sha256.update(block[:size])  # without the GIL, as the read before it
                        if self._stop.wait(_REST * (time.monotonic() - began)):
                            return
                        began = time.monotonic()
            except OSError as error:
                self._found = UserError(f"{path}: cannot be read ({error.strerror}); copy it again or prepare the data again")
                return
            if sha256.hexdigest() != expected:
                self._found = UserError(f"{path}: has changed since it was prepared; copy it again or prepare the data again")
                return
