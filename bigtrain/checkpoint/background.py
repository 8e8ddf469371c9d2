"""Saving while training goes on: copy the state to host memory, and let a thread write it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigtrain.checkpoint import format, retention, save
from bigtrain.checkpoint.save import Content, Verdict
from bigtrain.config import Checkpoint
from bigtrain.world import World

if TYPE_CHECKING:  # it imports deepspeed
    from bigtrain.checkpoint.state import Partition


class Saver:
    """Writes a run's checkpoints, one at a time, and removes those that `rules` no longer keep. All ranks call it alike.

    `world` is for this alone: its collectives run in the thread. `guard` raises LostRun when this run may not commit. `alive`
    is called now and then while training waits for a checkpoint that is being written.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, list[int]],
        rules: Checkpoint,
        world: World,
        guard: Callable[[], None],
        alive: Callable[[], None] = lambda: None,
    ):
        self._folder, self._shapes, self._rules, self._world, self._guard = folder, shapes, rules, world, guard
        self._buffers: dict[tuple[int, str], torch.Tensor] = {}
        self._alive, self._waited_for = alive, False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Verdict] | None = None
        self._kept = retention.Kept(folder, rules)

    def trust(self, checkpoint: Path) -> None:
        """Count a checkpoint that all ranks have just verified as sound: reading it whole would hold up rank 0's next save."""
        self._kept.trust(checkpoint)

    @property
    def failed(self) -> bool:
        """The save in the background has ended, and badly; `wait` says how."""
        done = self._writing is not None and self._writing.done()
        return done and (self._writing.exception() is not None or self._writing.result() is not None)

    def write(self, step: int, partitions: list[Partition], state: dict[str, Any], files: dict[str, str | Path]) -> None:
        """Write a checkpoint and return when it is on disk. Raises RunError on every rank when any rank could not."""
        self.wait()
        content = Content(step, self._shapes, save.fragments(partitions, self._world), state, files)
        if verdict := self._wait_for(lambda: self._write(content)):
            raise verdict

    def start(self, step: int, partitions: list[Partition], state: dict[str, Any], files: dict[str, str | Path]) -> None:
        """Copy everything to host memory and return; the rest is done while training goes on. Raises RunError when the save
        before, which must end first, has failed."""
        self.wait()
        copied = save.fragments(partitions, self._world, self._copy)
        if any(tensor.is_cuda for partition in partitions for tensor, _ in partition.tensors().values()):
            torch.cuda.synchronize()
        self._writing = self._thread.submit(self._write, Content(step, self._shapes, copied, state, files))

    def wait(self) -> None:
        """Wait for the save in the background. Raises RunError, on every rank, when it has failed."""
        writing, self._writing = self._writing, None
        if writing is not None and (verdict := self._wait_for(writing.result)):
            raise verdict

    def _wait_for(self, verdict: Callable[[], Verdict]) -> Verdict:
        self._waited_for = True
        try:
            return verdict()
        finally:
            self._waited_for = False

    def _sign(self) -> None:
        if self._waited_for:  # else it would hide that training hangs
            self._alive()

    def _copy(self, tensor: torch.Tensor, key: tuple[int, str]) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() != tensor.numel():
            buffer = self._buffers[key] = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)

    def _write(self, content: Content) -> Verdict:
        final = self._folder / f"{format.PREFIX}{content.step:08d}"
        verdict = save.write(final, content, self._world, self._rules, self._guard, self._sign)
        if verdict is None and self._world.first:
            self._kept.added(final)
        return verdict
