import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from bigtrain.config import Batch
from bigtrain.data.loader import Loader, evaluation_batches
from bigtrain.errors import UserError
from bigtrain.tasks import make_task

ARRAYS = ("token", "target", "position", "document")


@pytest.fixture
def build(store, config):
    def make(shape: Batch, rank: int = 0, config_=None) -> Loader:
        c = config_ or config()
        return Loader(store, make_task(c, store.manifest.tokenizer), c, shape, rank, seed=3)

    return make


def shape(global_batch, micro_batch, ranks):
    accumulation = -(-global_batch // (micro_batch * ranks))
    return Batch(global_batch=global_batch, micro_batch=micro_batch, accumulation=accumulation, ranks=ranks)


def rows(micro_batches):
    """The counted rows of some micro-batches, as hashable values."""
    found = []
    for batch in micro_batches:
        for row in range(len(batch["token"])):
            if (batch["target"][row] != -100).any():
                found.append(tuple(tuple(batch[key][row].tolist()) for key in ARRAYS))
    return found


def same(a, b):
    return all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()) and a.keys() == b.keys()


@pytest.mark.parametrize("global_batch", [6, 7, 1])
@pytest.mark.parametrize("position", [0, 95])
def test_a_step_is_the_same_on_any_number_of_ranks(build, global_batch, position):
    def step(ranks, micro_batch):
        s = shape(global_batch, micro_batch, ranks)
        by_rank = [build(s, rank).step(position) for rank in range(ranks)]
        assert {p for _, p in by_rank} == {position + global_batch}
        assert all(len(batches) == s.accumulation and len(b["token"]) == micro_batch for batches, _ in by_rank for b in batches)
        in_order = [batches[a] for a in range(s.accumulation) for batches, _ in by_rank]
        assert sum(b["count"] for b in in_order) == global_batch * 32
        return rows(in_order)

    alone = step(ranks=1, micro_batch=1)
    assert len(alone) == global_batch
    assert all(step(ranks, m) == alone for ranks, m in [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])


def test_an_epoch_is_every_sequence_once_and_the_next_is_shuffled_anew(build, store):
    n = store.sequences(32)
    loader = build(shape(1, 1, 1))
    epochs = [rows(loader.step(p)[0][0] for p in range(e * n, (e + 1) * n)) for e in (0, 1)]
    in_order = [store.tokens(32 * i, 32 * i + 32).tolist() for i in range(n)]
    for epoch in epochs:
        assert sorted(list(row[0]) for row in epoch) == sorted(in_order)
        assert [list(row[0]) for row in epoch] != in_order
    assert epochs[0] != epochs[1]


def test_a_sequence_is_its_slice_of_the_stream(build, store):
    """Against the stream itself, document starts across the borders of shards included (1000 is no multiple of 32)."""
    loader = build(shape(1, 1, 1))
    for p in range(store.sequences(32)):
        (batch,), _ = loader.step(p)
        i = loader.order.sample(p)
        window = store.tokens(32 * i, 32 * i + 33)
        assert batch["token"][0].tolist() == window[:-1].tolist()
        assert batch["target"][0].tolist() == window[1:].tolist()
        begins = [t for t in range(1, 32) if window[t] == 256]
        assert batch["document"][0].tolist() == np.searchsorted(begins, np.arange(32), side="right").tolist()
        assert [t for t in range(32) if batch["position"][0][t] == 0] == [0, *begins]
        assert batch["byte_count"] == (window[1:] != 256).sum()  # one byte a token
        assert batch["first_position"] == p


@pytest.mark.parametrize("start", [0, 4, 1001])
def test_resuming_gives_the_same_batches(build, start):
    loader, again = build(shape(4, 2, 1)), build(shape(4, 2, 1))
    steps = loader.steps(0) if start == 0 else loader.steps(start)
    position = start
    for _ in range(4):
        batches, after = next(steps)
        expected, _ = again.step(position)
        assert len(batches) == 2 and all(same(a, b) for a, b in zip(batches, expected))
        position += 4
        assert after == position
    steps.close()


def test_padding_has_no_weight(build):
    (batch,), _ = build(shape(3, 2, 2), rank=1).step(0)
    assert (batch["target"][1] == -100).all() and (batch["target"][0] != -100).all()
    assert batch["count"] == 32 and batch["first_position"] == 2
    assert torch.equal(batch["position"][1], torch.arange(32))


def test_closing_ends_the_thread(build):
    before = threading.active_count()
    steps = build(shape(1, 1, 1)).steps(0)
    next(steps)
    assert threading.active_count() > before
    steps.close()
    assert threading.active_count() == before


def test_an_error_comes_out_as_it_was_at_its_step(build):
    loader = build(shape(1, 1, 1))
    make = loader.task.batch

    def fail_at_5(samples, positions):
        if positions == [5]:
            raise ZeroDivisionError("here")
        return make(samples, positions)

    loader.task.batch = fail_at_5
    before, steps = threading.active_count(), loader.steps(3)
    assert [next(steps)[1] for _ in range(2)] == [4, 5]
    with pytest.raises(ZeroDivisionError, match="here"):
        next(steps)
    assert threading.active_count() == before


def test_a_file_that_has_changed_ends_the_steps(build, store):
    """Its tokens are all in the vocabulary, so nothing but the checksum can tell; the rank whose share it is does."""
    path = store.folder / "train-00001.tokens"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    ended = []
    for rank in range(3):
        with closing(build(shape(3, 1, 3), rank=rank).steps(0)) as steps:
            try:
                next(steps)
                while any(thread.name == "data-check" for thread in threading.enumerate()):
                    next(steps)
                next(steps)
            except UserError as error:
                ended.append(str(error))
    assert ended == [f"{path}: has changed since it was prepared; copy it again or prepare the data again"]


def test_the_thread_stays_a_bounded_number_of_steps_ahead(build):
    loader, made = build(shape(1, 1, 1)), []
    step = loader.step
    loader.step = lambda position: made.append(position) or step(position)
    steps = loader.steps(0)
    for taken in range(1, 20):
        next(steps)
        time.sleep(0.005)
        assert len(made) <= taken + 1
    steps.close()


@pytest.mark.parametrize("ranks, micro_batch", [(1, 1), (1, 4), (2, 2), (3, 2)])
@pytest.mark.parametrize("sequences", [7, None])
def test_evaluation_is_the_same_on_any_number_of_ranks(store, config, ranks, micro_batch, sequences):
    c = config(evaluate=dict(sequences=sequences))
    task = make_task(c, store.manifest.tokenizer)
    by_rank = [list(evaluation_batches(store, task, c, shape(1, micro_batch, ranks), rank)) for rank in range(ranks)]
    assert len({len(batches) for batches in by_rank}) == 1
    found = rows(batch for group in zip(*by_rank) for batch in group)
    total = sequences or store.sequences(32)
    assert [list(row[0]) for row in found] == [store.tokens(32 * i, 32 * i + 32).tolist() for i in range(total)]


def test_evaluation_takes_what_there_is(store, config):
    c = config(evaluate=dict(sequences=10**6))
    task = make_task(c, store.manifest.tokenizer)
    assert len(list(evaluation_batches(store, task, c, shape(1, 1, 1), 0))) == store.sequences(32)


def test_a_token_beyond_the_vocabulary_is_located(build, store, config):
    path = store.folder / "train-00001.tokens"
    tokens = np.fromfile(path, "<u2")
    tokens[17] = 600
    tokens.tofile(path)
    loader = build(shape(1, 1, 1))
    with pytest.raises(UserError, match="train-00001.tokens: token 17 is 600, beyond the vocabulary of 258: .*prepare the data again"):
        for p in range(store.sequences(32)):
            loader.step(p)


def test_a_damaged_held_out_sequence_is_told_and_has_no_weight(store, config):
    """So that a rank that finds one takes as many batches as the others."""
    path = store.folder / "train-00000.tokens"
    tokens = np.fromfile(path, "<u2")
    tokens[32 * 5 + 7] = 600
    tokens.tofile(path)
    c = config(evaluate=dict(sequences=8))
    task = make_task(c, store.manifest.tokenizer)
    told = []
    batches = list(evaluation_batches(store, task, c, shape(1, 2, 2), 0, told.append))
    assert [str(error).split(":")[1] for error in told] == [" token 167 is 600, beyond the vocabulary of 258"]
    assert [batch["count"] for batch in batches] == [64, 32] and (batches[1]["token"] < 258).all()
    with pytest.raises(UserError, match="token 167 is 600"):
        list(evaluation_batches(store, task, c, shape(1, 2, 2), 0))


def test_a_model_that_is_too_small_is_refused_at_the_start(build, config):
    small = config(model=dict(layers=1, width=8, heads=1, mlp_width=8, max_positions=64, vocab_size=100))
    with pytest.raises(UserError, match="model.vocab_size: 100 is too small"):
        build(shape(1, 1, 1), config_=small)


def test_too_little_data_is_refused_at_the_start(build, config):
    with pytest.raises(UserError, match="lower data.sequence_length"):
        build(shape(1, 1, 1), config_=config(dict(sequence_length=10**6)))
