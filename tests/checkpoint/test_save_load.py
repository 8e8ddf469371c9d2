"""Saved by one cut and loaded by another, to the bit; and a save that fails leaves what was there."""

import errno
import itertools
import json
import os
import resource
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from fakes import SHAPES, Partition, Piece, halves, on_ranks, partitions, saved, values, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigtrain.checkpoint import format, save
from bigtrain.checkpoint.load import Reader, check_shapes, load_all, load_weights
from bigtrain.errors import RunError, UserError

# ---- Any cut to any cut ----


@st.composite
def layouts(draw, shapes: dict[str, list[int]]):
    """The pieces of every parameter, cut anywhere, dealt to ranks in any order: [rank][partition][(name, offset, length)]."""
    size = draw(st.integers(1, 4))
    layout: list[list[list]] = [[[] for _ in range(draw(st.integers(1, 2)))] for _ in range(size)]
    for name, shape in shapes.items():
        n = torch.Size(shape).numel()
        cuts = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=4))})
        for low, high in itertools.pairwise(cuts):
            rank = layout[draw(st.integers(0, size - 1))]
            rank[draw(st.integers(0, len(rank) - 1))].append((name, low, high - low))
    return layout


@st.composite
def cases(draw):
    names = draw(st.lists(st.sampled_from(["a", "b.c", "layers.10.x", "é"]), min_size=1, max_size=3, unique=True))
    shapes = {name: draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)) for name in names}
    return shapes, draw(layouts(shapes)), draw(layouts(shapes)), draw(st.integers(0, 2))


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_any_cut_is_read_by_any_other(tmp_path_factory, case):
    shapes, written, read, gap = case
    folder = tmp_path_factory.mktemp("cut")
    whole = values(shapes)
    made = on_ranks(len(written), lambda world: saved(folder, 3, shapes, partitions(whole, written[world.rank], gap), world))
    assert made == [folder / "step-00000003"] * len(written)
    format.verify(made[0])
    for rank in read:
        blank = {"model": {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}}
        mine = partitions(blank, rank, 2 - gap)
        load_all(Reader(made[0]), mine, {"step": 3.0})
        for partition in mine:
            assert partition.scalars_set == {"step": 3.0}
            for kind, (tensor, pieces) in partition.tensors().items():
                for p in pieces:
                    expected = whole[kind][p.name].flatten()[p.offset : p.offset + p.length]
                    assert torch.equal(tensor[p.start : p.start + p.length], expected)
    reader = Reader(made[0])
    assert all(torch.equal(reader.tensor(name, kind), whole[kind][name]) for kind in whole for name in shapes)


def test_bits_survive(tmp_path):
    """Signed zeros, denormals and extremes of float32."""
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38, 1 + 2**-23])
    [path] = on_ranks(1, lambda world: saved(tmp_path, 1, {"p": [7]}, partitions({"model": {"p": odd}}, [[("p", 0, 7)]]), world))
    assert torch.equal(Reader(path).tensor("p", "model").view(torch.int32), odd.view(torch.int32))


def test_lower_precision_and_parameters_that_every_rank_holds(tmp_path):
    """A replicated partition is written by one rank only, the work shared out; bf16 is widened."""
    whole = {"model": {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}}

    def one(world):
        mine = [Partition([Piece(n, 0, t.numel(), 0)], {"model": t.flatten()}, replicated=True) for n, t in whole["model"].items()]
        return saved(tmp_path, 1, SHAPES, mine, world)

    path = on_ranks(2, one)[0]
    index = format.read_index(path)
    assert sorted((f.parameter, f.file) for f in index.fragments) == [
        ("a.weight", "rank-00000-0.safetensors"),
        ("b", "rank-00001-0.safetensors"),
    ]
    assert torch.equal(Reader(path).tensor("a.weight", "model"), whole["model"]["a.weight"].float())


def test_a_kind_laid_out_in_its_own_way(tmp_path):
    """Muon's momentum covers whole parameters while the weights are cut: both ranks write it, and either's copy serves."""
    momentum, model = torch.arange(6.0), torch.arange(6.0) + 10
    layout = {"momentum": [Piece("p", 0, 6, 0)]}

    def made(rank: int, filled: bool) -> Partition:
        flat = {"model": model[3 * rank : 3 * rank + 3].clone(), "momentum": momentum.clone()} if filled else {"model": torch.zeros(3)}
        part = Partition([Piece("p", 3 * rank, 3, 0)], flat, own_layout=layout)
        part.create = lambda kind: part.flat.setdefault(kind, torch.zeros(6 if kind == "momentum" else 3))
        return part

    path = on_ranks(2, lambda world: saved(tmp_path, 1, {"p": [6]}, [made(world.rank, True)], world))[0]
    for rank in (0, 1):
        loaded = made(rank, False)
        load_all(Reader(path), [loaded], {})
        assert torch.equal(loaded.flat["momentum"], momentum) and torch.equal(loaded.flat["model"], model[3 * rank : 3 * rank + 3])


def test_weights_alone(tmp_path):
    path = write(tmp_path, 1)[0]
    whole = values(SHAPES)
    for kind in ("model", "ema"):
        [mine] = partitions({"model": {n: torch.zeros(s) for n, s in SHAPES.items()}}, [[("a.weight", 4, 9), ("b", 0, 7)]])
        load_weights(Reader(path), [mine], kind)
        assert torch.equal(mine.flat["model"], torch.cat([whole[kind]["a.weight"].flatten()[4:13], whole[kind]["b"]]))
        assert set(mine.flat) == {"model"}
    plain = write(tmp_path, 2, kinds=("model",))[0]
    with pytest.raises(UserError, match="step-00000002: holds no moving average .* without train.ema_decay"):
        load_weights(Reader(plain), [], "ema")


@pytest.mark.parametrize(("gone", "kept", "lacks"), [(3, 0, 3), (0, 3, 0)])
def test_a_part_that_is_missing_is_named(tmp_path, gone, kept, lacks):
    path = write(tmp_path, 1)[0]
    index = json.loads((path / "index.json").read_text())
    # One fragment is gone and another stands twice: as many elements as before, not the right ones.
    rows = [r for r in index["fragments"] if r[:3] != ["b", "model", gone]]
    rows += [r for r in rows if r[:3] == ["b", "model", kept]] * 2
    (path / "index.json").write_text(json.dumps({**index, "fragments": rows}))
    with pytest.raises(RunError, match=f"step-00000001: model of b lacks element {lacks} of 0 to 6"):
        Reader(path).tensor("b", "model")
    reader = Reader(path)
    with pytest.raises(RunError, match="v of b lacks element 0"):
        reader.read("b", "v", 0, torch.empty(3))
    assert not reader.holds("b", "v")


def test_another_model_is_refused_with_the_first_differences(tmp_path):
    index = format.read_index(write(tmp_path, 1)[0])
    check_shapes(tmp_path, index, SHAPES)
    with pytest.raises(UserError) as caught:
        check_shapes(tmp_path, index, {"a.weight": [5, 4], "c": [1], "d": [1], "e": [1]})
    assert "a.weight [5, 3] in the checkpoint, [5, 4] in the model; b [7] in the checkpoint, missing in the model" in str(caught.value)
    assert "and 2 more" in str(caught.value) and "\n" not in str(caught.value)


# ---- What is written ----


def test_what_is_in_the_folder_and_no_pickle(tmp_path):
    path = write(tmp_path, 100)[0]
    files = sorted(p.name for p in path.iterdir())
    assert files == ["config.yaml", "index.json", "manifest.json", "rank-00000-0.safetensors", "rank-00001-0.safetensors", "state.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000100"]
    for file in path.iterdir():
        head = file.read_bytes()[:9]
        assert head[8:9] == b"{" if file.suffix == ".safetensors" else head[:1] in (b"{", b"x")
        assert not head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))


def test_the_code_does_not_know_pickle():
    import bigtrain.checkpoint

    for file in Path(bigtrain.checkpoint.__file__).parent.glob("*.py"):
        code = file.read_text()
        assert "import pickle" not in code and "torch.load" not in code and "torch.save" not in code


def test_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 5, seed=1)
    path = write(tmp_path, 5, seed=2, size=1)[0]
    format.verify(path)
    assert torch.equal(Reader(path).tensor("b", "model"), values(SHAPES, seed=2)["model"]["b"])
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_what_a_crash_left_is_cleared(tmp_path):
    for name in (".step-00000001.writing", ".step-00000001.removing"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "rank-00000-0.safetensors").touch()
    assert format.checkpoints(tmp_path) == []
    write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


# ---- A save that fails ----


def refused(folder: Path, results: list, says: str) -> None:
    """Every rank raised the same error that names rank, reason and what is safe; only the earlier checkpoint is there."""
    assert len({str(r) for r in results}) == 1 and all(isinstance(r, RunError) for r in results), results
    assert says in str(results[0]) and str(results[0]).endswith(f"the newest complete checkpoint is {folder / 'step-00000001'}")
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]
    format.verify(folder / "step-00000001")


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_one_rank_that_cannot_write(tmp_path, monkeypatch, bad_rank):
    write(tmp_path, 1)
    real = save._write_tensors

    def failing(path, fragments):
        if path.name == f"rank-{bad_rank:05d}-0.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, fragments)

    monkeypatch.setattr(save, "_write_tensors", failing)
    refused(tmp_path, write(tmp_path, 2), f"step-00000002: not written, rank {bad_rank} says: [Errno 28] No space left on device;")


@pytest.mark.parametrize("name", ["index.json", "state.json", ".manifest.json", "config.yaml"])
def test_the_first_rank_cannot_finish(tmp_path, monkeypatch, name):
    write(tmp_path, 1)
    real = save._write_text

    def failing(path, text):
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        real(path, text)

    monkeypatch.setattr(save, "_write_text", failing)
    refused(tmp_path, write(tmp_path, 2), "rank 0 says: [Errno 5] Input/output error;")


def test_what_does_not_read_back_is_not_saved(tmp_path, monkeypatch):
    write(tmp_path, 1)
    real = format.checksum
    monkeypatch.setattr(format, "checksum", lambda path: "0" * 32 if path.name == "rank-00001-0.safetensors" else real(path))
    results = write(tmp_path, 2)
    monkeypatch.undo()
    refused(tmp_path, results, "rank-00001-0.safetensors: does not read back as it was written;")


@pytest.mark.parametrize("kind", ["model", "exp_avg", "ema"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_saved(tmp_path, kind, value):
    write(tmp_path, 1)
    whole = values(SHAPES)
    whole[kind]["b"][6] = value
    results = on_ranks(2, lambda world: saved(tmp_path, 2, SHAPES, partitions(whole, halves(SHAPES, world.rank, 2)), world))
    refused(tmp_path, results, f"rank 1 says: {kind} of b is not finite;")


def test_a_full_disk(tmp_path):
    """A real one where this user may mount a small file system, else one that a limit on the size of files plays."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True).returncode
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        write(folder, 1)
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        results = write(folder, 2, shapes={"big": [200_000]})
        refused(folder, results, "no space: 2 MiB are needed" if mounted else "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
        if mounted:
            subprocess.run(["umount", folder], check=True)


def test_nothing_is_safe_before_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_write_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    for result in write(tmp_path, 1):
        assert str(result).endswith("says: [Errno 28] full; there is no earlier checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    for result in write(tmp_path / "checkpoints", 1):
        assert isinstance(result, RunError) and "File exists" in str(result)


def test_ranks_never_wait_for_one_that_failed(tmp_path, monkeypatch):
    """The barrier of these worlds would break, and the test fail, if one rank left the others alone in a collective."""
    monkeypatch.setattr(save, "_fresh", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    assert not any(isinstance(result, threading.BrokenBarrierError) for result in write(tmp_path, 1))
