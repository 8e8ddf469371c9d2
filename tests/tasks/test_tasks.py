import math
from typing import get_args

import numpy as np
import pytest
import torch

from bigtrain.config import Checkpoint, Config, Evaluate, problems
from bigtrain.data.pack import IGNORE, pack, padding
from bigtrain.data.shards import TokenizerInfo
from bigtrain.errors import UserError
from bigtrain.evaluate import evaluate
from bigtrain.tasks import make_task

EOD, MASK, VOCAB = 256, 257, 258
INFO = TokenizerInfo(fingerprint="", vocab_size=VOCAB, eod_id=EOD, mask_id=MASK)


def make_config(task="causal", T=8, document_mask=True, mask_fraction=0.15, seed=0):
    return Config(
        model=dict(layers=1, width=8, heads=1, mlp_width=8, max_positions=4096, causal=task == "causal"),
        data=dict(sequence_length=T, document_mask=document_mask),
        train=dict(task=task, steps=1, global_batch=1, micro_batch=1, mask_fraction=mask_fraction, seed=seed),
        optimizer=dict(lr=0.1),
    )


def sample(T=8, seed=0):
    """Random bytes with a document that begins at 3."""
    window = np.random.default_rng(seed).integers(256, size=T + 1)
    window[3] = EOD
    return pack(window, np.where(window == EOD, 0, 2), np.array([3]), True)


class Model:
    """A uniform model: it knows the call of Transformer.forward, and keeps what it was called with."""

    def __call__(self, token_BT, *, position_BT=None, document_BT=None, target_BT=None):
        self.called = token_BT, position_BT, document_BT, target_BT
        count = (target_BT != IGNORE).sum()
        return count * math.log(VOCAB), count


def test_causal_batch_shapes_counts_and_padding():
    batch = make_task(make_config(), INFO).batch([sample(), padding(8)], [0, 1])
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items() if torch.is_tensor(v)} == {
        "token": ((2, 8), torch.int64),
        "target": ((2, 8), torch.int64),
        "position": ((2, 8), torch.int64),
        "document": ((2, 8), torch.int32),
    }
    assert batch["count"] == 8
    assert batch["byte_count"] == 2 * 7  # the end-of-document token among the targets has none


def test_byte_count_leaves_out_targets_that_are_not_counted():
    s = sample()
    s.target_T[5:] = IGNORE
    batch = make_task(make_config(), INFO).batch([s], [0])
    assert (batch["count"], batch["byte_count"]) == (5, 2 * 4)


@pytest.mark.parametrize("task", ["causal", "masked"])
@pytest.mark.parametrize("metric", get_args(get_args(Checkpoint.model_fields["keep_best"].annotation)[0]))
def test_a_metric_that_the_task_does_not_give_keeps_no_checkpoint(task, metric):
    """What a config may ask for is what an evaluation finds: `bigtrain.config.problems` knows no task."""
    config, made = make_config(task), make_task(make_config(task), INFO)
    found = evaluate(Model(), made, [made.batch([sample()], [0])], torch.device("cpu"), total=lambda sums: sums)
    rules = Checkpoint(every=1, keep_best=metric)
    refused = problems(config.model_copy(update={"checkpoint": rules, "evaluate": Evaluate(every=1)}))
    assert [key for key, text in refused if metric in text] == ([] if metric in found else ["checkpoint.keep_best"])


@pytest.mark.parametrize("task", ["causal", "masked"])
@pytest.mark.parametrize("document_mask", [True, False])
def test_loss_calls_the_model_by_name(task, document_mask):
    made, model = make_task(make_config(task, document_mask=document_mask), INFO), Model()
    batch = made.batch([sample()], [0])
    loss_sum, count = made.loss(model, batch)
    token, position, document, target = model.called
    assert token is batch["token"] and position is batch["position"] and target is batch["target"]
    assert document is batch["document"] and (document is not None) == document_mask
    assert count == batch["count"] and torch.isclose(loss_sum, count * math.log(VOCAB))


def test_causal_metrics():
    metrics = make_task(make_config(), INFO).metrics(loss_sum=80.0, count=40, byte_count=160)
    assert metrics == {"loss": 2.0, "perplexity": math.exp(2.0), "bits_per_byte": pytest.approx(0.5 / math.log(2))}
    assert make_task(make_config(), INFO).metrics(1e6, 1, 1)["perplexity"] == math.inf
    assert math.isnan(make_task(make_config(), INFO).metrics(math.nan, 1, 1)["perplexity"])
    with pytest.raises(ValueError, match="no targets"):
        make_task(make_config(), INFO).metrics(0.0, 0, 0)


def test_masked_metrics_have_no_bits_per_byte():
    task = make_task(make_config("masked"), INFO)
    batch = task.batch([sample()], [0])
    assert set(task.metrics(3.0, batch["count"], batch["byte_count"])) == {"loss", "perplexity"}


def test_masked_targets_are_the_tokens_that_were_there():
    s = sample(T=2000)
    batch = make_task(make_config("masked", T=2000), INFO).batch([s], [0])
    token, target = batch["token"][0].numpy(), batch["target"][0].numpy()
    chosen = target != IGNORE
    assert (target[chosen] == s.token_T[chosen]).all()
    assert (token[~chosen] == s.token_T[~chosen]).all()
    assert chosen.sum() == round(0.15 * 1999) == batch["count"]


def test_masked_follows_80_10_10():
    T, rows = 2000, 40
    samples = [sample(T, seed) for seed in range(rows)]
    batch = make_task(make_config("masked", T=T), INFO).batch(samples, list(range(rows)))
    token, target = batch["token"], batch["target"]
    chosen = target != IGNORE
    shares = [(token[chosen] == MASK).float().mean(), (token[chosen] == target[chosen]).float().mean()]
    # 12,000 targets: the standard deviation of each share is below 0.004. A random token is right, or the mask, 1 in 258 times.
    assert shares == [pytest.approx(0.8, abs=0.015), pytest.approx(0.1, abs=0.012)]


def test_masked_never_hides_the_end_of_a_document_and_always_something():
    task = make_task(make_config("masked", mask_fraction=0.01), INFO)
    for position in range(200):
        batch = task.batch([sample()], [position])
        assert batch["count"] == 1 and batch["target"][0, 3] == IGNORE and batch["token"][0, 3] == EOD


def test_masking_is_keyed_by_position_and_seed():
    def hidden(positions, **more):
        T = 200
        batch = make_task(make_config("masked", T=T, **more), INFO).batch([sample(T)] * len(positions), positions)
        return batch["token"]

    together = hidden([4, 5, 6])
    assert torch.equal(together[1:2], hidden([5]))  # alone on another rank
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(hidden([5]), hidden([5], seed=1))


def test_masking_changes_neither_its_sample_nor_padding():
    s, empty = sample(), padding(8)
    before = [a.copy() for a in s]
    batch = make_task(make_config("masked", mask_fraction=0.9), INFO).batch([s, empty], [0, 1])
    assert all((a == b).all() for a, b in zip(s, before))
    assert (batch["target"][1] == IGNORE).all() and (batch["token"][1] == 0).all()


def test_masked_needs_a_mask_token():
    with pytest.raises(UserError, match="train.task: masked needs a tokenizer with a mask token; set data.tokenizer to bytes, bpe"):
        make_task(make_config("masked"), INFO.model_copy(update={"mask_id": None}))
