"""Losses on held-out data: sums over uneven batches and ranks, and a saved run evaluated in one process."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))
from fakes import on_ranks, partitions, saved

from bigtrain import configfile
from bigtrain.checkpoint import format
from bigtrain.config import Config, Data
from bigtrain.data.prepare import prepare
from bigtrain.data.shards import TokenStore
from bigtrain.data.tokenizer import Bytes
from bigtrain.errors import RunError, UserError
from bigtrain.evaluate import evaluate, evaluate_run, to_device
from bigtrain.generate import generate
from bigtrain.model.initialise import initialise
from bigtrain.model.transformer import Transformer
from bigtrain.tasks import make_task

CPU = torch.device("cpu")
MODEL = {"vocab_size": 320, "layers": 1, "width": 16, "heads": 2, "mlp_width": 16, "max_positions": 32}


class Batches:
    """A stand-in for a task: a batch holds its loss, its count and its bytes."""

    def loss(self, model, batch):
        assert not torch.is_grad_enabled()
        return torch.tensor(batch["loss"]), torch.tensor(batch["count"])

    def metrics(self, loss_sum, count, byte_count):
        return {"loss": loss_sum / count, "perplexity": math.exp(loss_sum / count), "bytes": byte_count}


def test_is_the_sum_over_the_count():
    batches = [
        {"loss": 6.0, "count": 3, "byte_count": 10},
        {"loss": 1.0, "count": 1, "byte_count": 4},
        {"loss": 0.0, "count": 0, "byte_count": 0},
    ]
    found = evaluate(None, Batches(), batches, CPU, total=lambda sums: sums)
    assert found == {"validation_loss": 1.75, "perplexity": math.exp(1.75), "bytes": 14}
    assert next(iter(found)) == "validation_loss"  # a mean of the batches' means would be 1.5


def test_ranks_are_added():
    batch = [{"loss": 6.0, "count": 3, "byte_count": 10}]
    seen = []

    def total(sums):
        seen.append(sums)
        return [a + b for a, b in zip(sums, (2.0, 1, 5))]

    assert evaluate(None, Batches(), batch, CPU, total)["validation_loss"] == 2.0
    assert seen == [[6.0, 3, 10]]


def test_a_batch_stays_where_it_is_on_a_cpu():
    batch = {"token": torch.ones(1), "count": 1}
    assert to_device(batch, CPU) is batch


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with a checkpoint of a model that no training has touched; its average is twice the model."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i}.txt").write_text(f"document {i} " * (3 + i))
    data = {"source": "text", "path": str(folder / "text"), "tokenizer": "bytes", "folder": str(folder / "data")}
    data |= {"sequence_length": 16, "validation_fraction": 0.2}
    prepare(Data(**data))
    train = {"steps": 1, "global_batch": 4, "micro_batch": 2}
    config = Config.model_validate({"model": MODEL, "data": data, "train": train, "optimizer": {"lr": 0.1}})
    model = Transformer(config.model, 320)
    initialise(model, 0)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    shapes = {name: list(p.shape) for name, p in weights.items()}
    whole = {"model": weights, "ema": {name: 2 * p for name, p in weights.items()}}
    layout = [[(name, 0, p.numel()) for name, p in weights.items()]]
    fingerprint = TokenStore(folder / "data", "train").manifest.fingerprint
    files = {"config.yaml": configfile.dump(config), "tokenizer": folder / "data" / "tokenizer"}
    mine = partitions(whole, layout)
    on_ranks(1, lambda world: saved(folder / "checkpoints", 7, shapes, mine, world, files=files, data=fingerprint, done=True))
    return folder


def evaluated(path: Path, kind: str = "model", sequences: int | None = None, progress=lambda done: None) -> dict:
    return evaluate_run(path, kind, CPU, torch.float32, sequences, progress)


def by_hand(run: Path, scale: float, sequences: int | None) -> float:
    """The loss, one sequence at a time, through the model's own forward."""
    config = configfile.load(run / "checkpoints/step-00000007/config.yaml")
    store = TokenStore(run / "data", "validation")
    model = Transformer(config.model, 320)
    initialise(model, 0)
    for p in model.parameters():
        p.data *= scale
    task, total, count = make_task(config, store.manifest.tokenizer), 0.0, 0
    from bigtrain.config import Batch
    from bigtrain.data.loader import evaluation_batches

    limited = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"sequences": sequences})})
    one = Batch(global_batch=1, micro_batch=1, accumulation=1, ranks=1)
    for batch in evaluation_batches(store, task, limited, one, 0):
        total += float(task.loss(model, batch)[0].detach())
        count += batch["count"]
    return total / count


def test_a_saved_run(run):
    seen = []
    found = evaluated(run, progress=seen.append)
    assert found["step"] == 7 and found["validation_loss"] == pytest.approx(by_hand(run, 1, None), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["validation_loss"])) and found["bits_per_byte"] > 0
    assert seen == list(range(8, 8 * len(seen) + 1, 8)) and seen[-1] >= TokenStore(run / "data", "validation").sequences(16)
    assert evaluated(run / "checkpoints/step-00000007") == found
    few = evaluated(run, sequences=3)["validation_loss"]
    assert few == pytest.approx(by_hand(run, 1, 3), rel=1e-5) and few != found["validation_loss"]


def test_the_moving_average(run):
    assert evaluated(run, "ema", 5)["validation_loss"] == pytest.approx(by_hand(run, 2, 5), rel=1e-5)
    with pytest.raises(UserError, match="holds no moving average"):
        evaluated(run, "exp_avg")


def test_other_data_is_refused(run):
    state = run / "checkpoints/step-00000007/state.json"
    manifest = state.with_name(format.MANIFEST)
    before = state.read_text(), manifest.read_text()
    try:
        state.write_text(json.dumps({**json.loads(before[0]), "data": "another fingerprint"}))
        with pytest.raises(RunError, match="state.json: .* the manifest says"):
            evaluated(run)
        manifest.write_text(json.dumps(format.manifest(state.parent, {})))
        with pytest.raises(UserError, match="data: not the data that .*step-00000007 was trained on"):
            evaluated(run)
    finally:
        state.write_text(before[0])
        manifest.write_text(before[1])
    (run / "data").rename(run / "moved")
    try:
        with pytest.raises(UserError, match="no prepared data in"):
            evaluated(run)
    finally:
        (run / "moved").rename(run / "data")


def test_generating_from_a_checkpoint_needs_no_data(run):
    from bigtrain.checkpoint.load import restore
    from bigtrain.config import Generate

    restored = restore(run, "model", CPU, torch.float32)
    assert isinstance(restored.tokenizer, Bytes) and not restored.model.training
    assert not any(p.requires_grad for p in restored.model.parameters())
    assert isinstance("".join(generate(restored.model, restored.tokenizer, "x", Generate(tokens=5), CPU)), str)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoint here"):
        evaluated(tmp_path)
