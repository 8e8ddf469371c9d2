"""Saving in the background: the same bytes, one at a time, errors that surface, and a state that training may change meanwhile."""

import threading

import pytest
import torch
from fakes import FILES, SHAPES, STATE, halves, on_ranks, partitions, values

from bigtrain.checkpoint import format, save
from bigtrain.checkpoint.background import Saver
from bigtrain.checkpoint.load import Reader
from bigtrain.config import Checkpoint
from bigtrain.errors import LostRun, RunError


def saver(folder, world, guard=lambda: None, **rules) -> Saver:
    return Saver(folder, SHAPES, Checkpoint(**rules), world, guard)


def mine(world, seed=0):
    return partitions(values(SHAPES, seed=seed), halves(SHAPES, world.rank, world.size))


def test_the_bytes_are_those_of_a_save_that_is_waited_for(tmp_path):
    def both(world):
        ours = mine(world)
        waited = saver(tmp_path / "waited", world)
        waited.write(3, ours, {**STATE, "step": 3}, FILES)
        behind = saver(tmp_path / "behind", world)
        behind.start(3, ours, {**STATE, "step": 3}, FILES)
        for partition in ours:  # training goes on
            for tensor in partition.flat.values():
                tensor.add_(1.0)
        behind.wait()

    assert on_ranks(2, both) == [None, None]
    folders = [tmp_path / name / "step-00000003" for name in ("waited", "behind")]
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    assert files[0] == files[1] and len(files[0]) == 6
    format.verify(folders[1])
    assert torch.equal(Reader(folders[1]).tensor("b", "ema"), values(SHAPES)["ema"]["b"])


def test_buffers_are_used_again_and_one_save_waits_for_the_one_before(tmp_path, monkeypatch):
    gate, order = threading.Event(), []
    real = save.write

    def slow(final, *rest):
        gate.wait(20)
        order.append(final.name)
        return real(final, *rest)

    monkeypatch.setattr(save, "write", slow)

    def two(world):
        s, ours = saver(tmp_path, world), mine(world)
        s.start(1, ours, {**STATE, "step": 1}, FILES)
        assert not s.failed and order == []  # it is still at it, and training was not held up
        buffers = {key: buffer.data_ptr() for key, buffer in s._buffers.items()}
        gate.set()
        for partition in ours:
            partition.flat["model"].add_(1.0)
        s.start(2, ours, {**STATE, "step": 2}, FILES)
        s.wait()
        assert {key: buffer.data_ptr() for key, buffer in s._buffers.items()} == buffers

    assert on_ranks(1, two) == [None] and order == ["step-00000001", "step-00000002"]
    weights = [Reader(tmp_path / f"step-0000000{n}").tensor("b", "model") for n in (1, 2)]
    assert torch.equal(weights[0], values(SHAPES)["model"]["b"]) and torch.equal(weights[1], weights[0] + 1.0)


def test_files_are_signs_of_life_while_training_waits(tmp_path):
    signs = []

    def one(world):
        s = Saver(tmp_path, SHAPES, Checkpoint(file_bytes=1), world, lambda: None, lambda: signs.append(None))
        s.start(1, mine(world), {**STATE, "step": 1}, FILES)
        s._writing.exception()  # it has ended: training was at something else
        behind = len(signs)
        s.write(2, mine(world), {**STATE, "step": 2}, FILES)
        return behind, len(signs)

    files = sum(len(kind) for kind in values(SHAPES).values())
    assert on_ranks(1, one) == [(0, files)]


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_error_surfaces_on_every_rank(tmp_path, monkeypatch, bad_rank):
    real = save._write_tensors

    def failing(path, fragments):
        if path.name.startswith(f"rank-{bad_rank:05d}"):
            raise OSError(28, "No space left on device")
        return real(path, fragments)

    monkeypatch.setattr(save, "_write_tensors", failing)

    def one(world):
        s = saver(tmp_path, world)
        s.start(1, mine(world), {**STATE, "step": 1}, FILES)
        with pytest.raises(RunError) as caught:
            s.wait()
        assert not s.failed
        s.wait()  # said once
        monkeypatch.setattr(save, "_write_tensors", real)
        s.write(2, mine(world), {**STATE, "step": 2}, FILES)
        return str(caught.value)

    texts = on_ranks(2, one)
    assert texts[0] == texts[1] and f"step-00000001: not written, rank {bad_rank} says: [Errno 28]" in texts[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("commit", ["rename", "file"])
@pytest.mark.parametrize("lost_after", [0, 1])
def test_one_that_lost_the_run_touches_nothing_of_the_others(tmp_path, commit, lost_after):
    """The same step, which the attempt that took the run over has written, or is writing; `lost_after` so many looks."""
    looks = []

    def taken():
        looks.append(None)
        if len(looks) > lost_after:
            theirs.mkdir(exist_ok=True)
            (theirs / "theirs").touch()
            raise LostRun("attempt 3 has taken this run over")

    theirs = tmp_path / (".step-00000001.writing" if commit == "rename" else "step-00000001")
    (tmp_path / ".step-00000009.writing").mkdir()

    def one(world):
        with pytest.raises(LostRun, match="attempt 3 has taken this run over"):
            saver(tmp_path, world, taken, commit=commit).write(1, mine(world), {**STATE, "step": 1}, FILES)

    assert on_ranks(2, one) == [None, None] and (theirs / "theirs").exists()
    assert (tmp_path / ".step-00000009.writing").exists() == (lost_after == 0)


def test_no_rename_where_a_manifest_counts(tmp_path, monkeypatch):
    """With checkpoint.commit: file the folder has its name from the start, and is no checkpoint until its manifest is there."""
    seen = []
    real = save._commit

    def watched(temporary, final, *rest):
        seen.append((temporary == final, format.checkpoints(tmp_path)))
        real(temporary, final, *rest)

    monkeypatch.setattr(save, "_commit", watched)
    on_ranks(2, lambda world: saver(tmp_path, world, commit="file").write(1, mine(world), {**STATE, "step": 1}, FILES))
    assert seen == [(True, [])] and [p.name for p in format.checkpoints(tmp_path)] == ["step-00000001"]
    (tmp_path / "step-00000002").mkdir()  # what a crash leaves
    assert [p.name for p in format.checkpoints(tmp_path)] == ["step-00000001"]
    on_ranks(1, lambda world: saver(tmp_path, world, commit="file").write(3, mine(world), {**STATE, "step": 3}, FILES))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_files_grow_to_a_size(tmp_path):
    path = tmp_path / "step-00000001"
    on_ranks(1, lambda world: saver(tmp_path, world, file_bytes=100).write(1, mine(world), {**STATE, "step": 1}, FILES))
    names = sorted(p.name for p in path.glob("*.safetensors"))
    assert names == [f"rank-00000-{n}.safetensors" for n in range(len(names))] and len(names) == 3
    reader = Reader(path)
    assert all(torch.equal(reader.tensor(n, k), t) for k, tensors in values(SHAPES).items() for n, t in tensors.items())
