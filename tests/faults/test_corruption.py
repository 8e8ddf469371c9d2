"""Every file of a checkpoint, damaged in every way: found, named, and the checkpoint before it taken. Without processes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
from fakes import SHAPES, on_ranks, write

from bigtrain.checkpoint import format
from bigtrain.checkpoint.load import Reader, check_shapes, newest_sound
from bigtrain.errors import RunError, UserError

RANKS = ["rank-00000-0.safetensors", "rank-00001-0.safetensors"]
FILES = [*RANKS, "index.json", "state.json", "config.yaml", "tokenizer/tokenizer.json", "manifest.json"]


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1 << 4
    path.write_bytes(content)


def swap(path: Path) -> None:
    """With the same file of another step, as large and as intact."""
    shutil.copy(str(path).replace("step-00000002", "step-00000001"), path)


WAYS = {
    "truncated by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "truncated to a half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "a bit at the start": lambda path: flip(path, 0),
    "a bit in the middle": lambda path: flip(path, 0.5),
    "a bit at the end": lambda path: flip(path, 1),
    "swapped": swap,
    "deleted": lambda path: path.unlink(),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}
SAME = {("config.yaml", "swapped"), ("tokenizer/tokenizer.json", "swapped"), ("index.json", "swapped")}
"""Files that are the same at every step: swapping them is no damage."""
CASES = [(name, way) for name in FILES for way in WAYS if (name, way) not in SAME]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text('{"model": 1}')
    files = {"config.yaml": "x: 1\n", "tokenizer": folder / "tokenizer"}
    for step in (1, 2):
        write(folder / "checkpoints", step, seed=step, files=files, position=4 * step)
    return folder / "checkpoints"


def chosen(found: list[Path]) -> tuple[list, list[str]]:
    """What both of two ranks take, and what rank 0 is told."""
    told: list[str] = []
    answers = on_ranks(2, lambda world: newest_sound(found, world, told.append if world.first else lambda text: None))
    return answers, told


def test_at_least_sixty():
    assert len(CASES) >= 60 and {way for _, way in CASES} == set(WAYS) and {name for name, _ in CASES} == set(FILES)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_is_found_named_and_passed_over(pristine, tmp_path, name, way):
    folder = tmp_path / "checkpoints"
    shutil.copytree(pristine, folder)
    one, two = format.checkpoints(folder)
    assert chosen([one, two]) == ([two, two], [])
    WAYS[way](two / name)
    answers, told = chosen(format.checkpoints(folder, complete=False))
    assert answers == [one, one] and len(told) == 1 and told[0].endswith(f"Passing over {two.name}")
    # An intact manifest of another step names the first file that is not of that step.
    assert f"{two.name}/{name}" in told[0] or ((name, way) == ("manifest.json", "swapped") and "differs from the manifest" in told[0])


def test_every_checkpoint_damaged(pristine, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(pristine, folder)
    found = format.checkpoints(folder)
    for checkpoint in found:
        flip(checkpoint / "state.json", 0.5)
    answers, told = chosen(found)
    assert len(told) == 2 and all(isinstance(a, RunError) and str(a).startswith("every checkpoint of this run is damaged") for a in answers)


def test_none_there_is_a_new_run():
    assert chosen([]) == ([None, None], [])


def test_another_model(pristine):
    with pytest.raises(UserError, match="a checkpoint of another model: b \\[7\\] in the checkpoint, \\[8\\] in the model"):
        check_shapes(pristine, Reader(pristine / "step-00000002").index, {**SHAPES, "b": [8]})


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("room", range(20))
def test_a_disk_that_fills_up(tmp_path, room):
    """Twenty disks of different size: wherever the space ends, a valid checkpoint stays and all ranks say the same."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = 360 + 24 * room
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        shapes = {"a": [9_000], "b": [5_000]}  # 168 KB with its moments
        written = []
        for step in (1, 2, 3, 4, 5):
            results = write(folder, step, shapes=shapes, seed=step)
            if isinstance(results[0], RunError):
                assert len({str(r) for r in results}) == 1 and results[0].args[0].startswith(
                    f"{folder}/step-{step:08d}: not written, rank "
                )
                assert any(text in str(results[0]) for text in (os.strerror(errno.ENOSPC), "no space: "))
                break
            written.append(results[0])
        assert isinstance(results[0], RunError) and 1 <= len(written) <= 4
        assert format.checkpoints(folder) == written and [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
        for path in written:
            format.verify(path)
            assert json.loads((path / "state.json").read_text())["step"] == format.step_of(path)
    finally:
        subprocess.run(["umount", folder], check=True)
