"""From a position to the micro-batches of one rank, without state: the position is all there is to save."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from bigtrain.config import Batch, Config
from bigtrain.data.check import Check
from bigtrain.data.order import Order
from bigtrain.data.pack import Sample, pack, padding
from bigtrain.data.shards import TokenStore
from bigtrain.errors import UserError

_STEPS_AHEAD = 2  # one being made while the one before it waits


class Loader:
    """Training batches: step after step over an endless, per-epoch shuffled order of the sequences of `store`.

    `task` turns samples into a batch (see bigtrain/tasks). Raises UserError for a store with less than one sequence, or
    with tokens that the model has no row for.
    """

    def __init__(self, store: TokenStore, task, config: Config, batch: Batch, rank: int, seed: int):
        self.reader = _Reader(store, config)
        self.task, self.shape, self.rank = task, batch, rank
        self.order = Order(self.reader.sequences, seed)

    def step(self, position: int) -> tuple[list[dict[str, Any]], int]:
        """This rank's `accumulation` micro-batches of the step that begins at sequence `position`, and the next position.

        The step is the sequences at [position, position + global_batch), whatever the number of ranks. Beside what the
        task puts in, a micro-batch holds `first_position` (int): the position of its first sequence, to seed dropout.
        """
        shape, micro_batches = self.shape, []
        for a in range(shape.accumulation):
            places = _places(a, shape.micro_batch, shape.ranks, self.rank)
            positions = position + places
            samples = [
                self.reader.sample(i) if place < shape.global_batch else self.reader.padding
                for place, i in zip(places, self.order.samples(positions).tolist())
            ]
            micro_batches.append(_batch(self.task, samples, positions))
        return micro_batches, position + shape.global_batch

    def steps(self, start: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """What `step` gives from position `start` on, for ever, made in a background thread a step or two ahead.

        An error in the thread is raised here at the step that it belongs to. Beside it this rank's share of the files is
        compared with its checksums; UserError is raised at the step after one was found to differ. Closing the iterator ends
        both threads.
        """
        check = Check(self.reader.store, self.rank, self.shape.ranks)
        check.start()
        pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        waiting: deque[Future] = deque()
        try:
            while True:
                while len(waiting) < _STEPS_AHEAD:
                    waiting.append(pool.submit(self.step, start))
                    start += self.shape.global_batch
                step = waiting.popleft().result()
                check.refuse()
                yield step
        finally:
            check.stop()
            pool.shutdown(cancel_futures=True)


def evaluation_batches(
    store: TokenStore, task, config: Config, batch: Batch, rank: int, damaged: Callable[[UserError], None] | None = None
) -> Iterator[dict[str, Any]]:
    """The first `evaluate.sequences` sequences of `store` (null: all), in their fixed order, this rank's share of them.

    Every rank gets the same number of batches of `micro_batch` rows; places left over hold sequences of weight zero. So does the
    place of a damaged one, of which `damaged` is told; left out, it is raised.
    """
    reader = _Reader(store, config)

    def sample(i: int) -> Sample:
        try:
            return reader.sample(i)
        except UserError as error:
            if damaged is None:
                raise
            damaged(error)
            return reader.padding

    total = min(config.evaluate.sequences or reader.sequences, reader.sequences)
    for a in range(-(-total // (batch.micro_batch * batch.ranks))):
        places = _places(a, batch.micro_batch, batch.ranks, rank)
        yield _batch(task, [sample(i) if i < total else reader.padding for i in places.tolist()], places)


def _places(a: int, micro_batch: int, ranks: int, rank: int) -> np.ndarray:
    """Places within the step of the sequences of micro-batch `a` on one rank, shape (micro_batch,)."""
    return (a * ranks + rank) * micro_batch + np.arange(micro_batch)


def _batch(task, samples: list[Sample], positions: np.ndarray) -> dict[str, Any]:
    return {**task.batch(samples, positions.tolist()), "first_position": int(positions[0])}


class _Reader:
    """Sequences of a store, as samples, with every token checked: on a GPU an id out of range is an opaque device assert."""

    def __init__(self, store: TokenStore, config: Config):
        self.store, self.length, self.document_mask = store, config.data.sequence_length, config.data.document_mask
        self.vocab_size = config.model.vocab_size or store.manifest.tokenizer.vocab_size
        store.check_model(self.vocab_size)
        self.sequences = store.sequences(self.length)
        self.padding = padding(self.length)

    def sample(self, index: int) -> Sample:
        start, stop = index * self.length, (index + 1) * self.length + 1
        tokens = self.store.tokens(start, stop)
        if tokens.max() >= self.vocab_size:
            bad = int(np.argmax(tokens >= self.vocab_size))
            file, offset = self.store.locate(start + bad)
            raise UserError(
                f"{file}: token {offset} is {tokens[bad]}, beyond the vocabulary of {self.vocab_size}: the file is damaged;"
                " prepare the data again"
            )
        return pack(tokens, self.store.token_bytes(start, stop), self.store.document_starts(start, stop) - start, self.document_mask)
