"""Checkpoints that somebody else made, also by one who knows how their checksums are made."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from payloads import Cases, Place

from bigtrain import configfile
from bigtrain.checkpoint import format
from bigtrain.checkpoint.compare import differences
from bigtrain.checkpoint.load import restore
from bigtrain.checkpoint.save import Content, save
from bigtrain.model.transformer import parameter_shapes
from bigtrain.start import with_data

cases = Cases()


@pytest.fixture(scope="module")
def written(prepared, tmp_path_factory) -> Path:
    """A checkpoint of the model of c.yaml, as one rank writes it."""
    config = with_data(configfile.load(prepared / "c.yaml"))
    shapes = {name: list(shape) for name, shape in parameter_shapes(config.model, config.model.vocab_size).items()}
    tensors = [(name, kind, 0, torch.zeros(torch.Size(shape).numel())) for name, shape in shapes.items() for kind in ("model", "exp_avg")]
    state = {"step": 5, "position": 10, "global_batch": 2, "data": "d", "done": False, "best_loss": None, "evaluations_since_best": 0}
    state |= {"skipped": 0, "norm_average": 0.0, "norm_count": 0, "optimizer": {}, "loss_scaler": {}, "metrics": {}}
    files = {"config.yaml": configfile.dump(config), "tokenizer": prepared / "data/tokenizer"}
    alone = SimpleNamespace(rank=0, size=1, first=True, gather=lambda value: [value])
    return save(tmp_path_factory.mktemp("checkpoints"), Content(5, shapes, tensors, state, files), alone)


@pytest.fixture
def place(place, written) -> Place:
    shutil.copytree(written.parent, place.folder / "checkpoints")
    return place


def spoilt(place: Place, change: Callable[[Path], object]) -> Path:
    """The checkpoint, changed by somebody who knows how its checksums are made."""
    checkpoint = place.folder / "checkpoints/step-00000005"
    change(checkpoint)
    with contextlib.suppress(OSError):
        (checkpoint / "manifest.json").write_text(json.dumps(format.manifest(checkpoint, {})))
    return checkpoint


def use(checkpoint: Path) -> None:
    """What evaluating and generating do, and comparing after it."""
    restore(checkpoint, "model", torch.device("cpu"), torch.float32)
    list(differences(checkpoint, checkpoint))


def test_the_checkpoint_itself_is_good(place):
    use(spoilt(place, lambda checkpoint: None))


def checkpoint_case(name: str, says: str | None, change: Callable[[Place, Path], object]) -> None:
    def attack(place: Place) -> None:
        use(spoilt(place, lambda checkpoint: change(place, checkpoint)))

    cases.add(f"checkpoint_{name}", attack, says)


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Place, Path], object]:
    def apply(place: Place, checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        change(content)
        (checkpoint / name).write_text(json.dumps(content))

    return apply


def put(name: str, text: str | Callable[[Place], str | bytes]) -> Callable[[Place, Path], object]:
    def apply(place: Place, checkpoint: Path) -> None:
        content = text if isinstance(text, str) else text(place)
        (checkpoint / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def fragment(column: int, value: Any) -> Callable[[Place, Path], object]:
    return edit("index.json", lambda index: index["fragments"][0].__setitem__(column, value))


RANK = "rank-00000-0.safetensors"
NAME = "embedding.weight"
OUTSIDE = "index.json: names the file .*, which is outside the checkpoint; do not use it"
for name, value in {"up": "../rank.safetensors", "absolute": "/etc/passwd", "folder": "tokenizer/x", "dots": "..", "nothing": ""}.items():
    checkpoint_case(f"file_{name}", OUTSIDE, fragment(4, value))
checkpoint_case("file_with_a_null", "cannot be read|names the file", fragment(4, "a\0b"))
checkpoint_case("file_of_another_type", "index.json: damaged", fragment(4, 7))
checkpoint_case("key_of_another_type", "index.json: damaged", fragment(5, 7))
checkpoint_case("kind_of_another_type", "index.json: damaged", fragment(1, ["model"]))
checkpoint_case("negative_offset", "index.json: damaged", fragment(2, -8))
checkpoint_case("negative_length", "index.json: damaged", fragment(3, -1))
checkpoint_case("huge_offset", "lacks element 0", fragment(2, 10**30))
checkpoint_case("huge_length", "has shape .*, the index says 1000000000000000000 elements", fragment(3, 10**18))
checkpoint_case("key_that_is_missing", f"{RANK}: cannot be read", fragment(5, "nothing"))
checkpoint_case(
    "shape_beyond_memory", "a checkpoint of another model", edit("index.json", lambda i: i["shapes"].update({NAME: [10**15, 8]}))
)
checkpoint_case("shape_of_text", "index.json: damaged", edit("index.json", lambda i: i["shapes"].update({NAME: "big"})))
checkpoint_case("shapes_in_a_list", "index.json: damaged", edit("index.json", lambda i: i.update(shapes=[1])))
checkpoint_case("another_version", "format version 'evil'|format version evil", edit("index.json", lambda i: i.update(version="evil")))
checkpoint_case("deep_index", "index.json: cannot be read", put("index.json", "[" * 100_000))
checkpoint_case("pickled_index", "index.json: cannot be read", put("index.json", lambda place: place.pickle))
checkpoint_case("pickled_state", "state.json: cannot be read", put("state.json", lambda place: place.pickle))
checkpoint_case("pickled_tensors", f"{RANK}: cannot be read", put(RANK, lambda place: place.pickle))
checkpoint_case("header_beyond_the_file", f"{RANK}: cannot be read", put(RANK, lambda place: (2**62).to_bytes(8, "little") + b"{}"))
checkpoint_case("header_of_deep_nesting", f"{RANK}: cannot be read", put(RANK, lambda place: (10**5).to_bytes(8, "little") + b"[" * 10**5))
checkpoint_case("state_of_text", "state.json: damaged .step: ", edit("state.json", lambda s: s.update(step="5")))
checkpoint_case("state_below_zero", "state.json: damaged .position: ", edit("state.json", lambda s: s.update(position=-5)))
checkpoint_case("state_of_more", "state.json: damaged .code: ", edit("state.json", lambda s: s.update(code="import os")))
checkpoint_case("state_of_nothing", "state.json: damaged", put("state.json", "null"))
checkpoint_case(
    "state_not_finite", "state.json: damaged .norm_average: ", edit("state.json", lambda s: s.update(norm_average=float("nan")))
)
checkpoint_case(
    "tags_in_its_config",
    "config.yaml: ?.*the tag .* is not supported",
    put("config.yaml", lambda p: f"a: !!python/object/apply:os.system ['{p.command}']"),
)
checkpoint_case(
    "config_that_includes",
    "config.yaml:1: include: .*includes nothing",
    lambda place, c: (c / "config.yaml").write_text("include: /etc/passwd\n" + (c / "config.yaml").read_text()),
)
checkpoint_case(
    "config_of_a_billion_layers",
    "parameters, its config.yaml says 1000000000 layers",
    lambda place, c: (c / "config.yaml").write_text((c / "config.yaml").read_text().replace("layers: 1", "layers: 1000000000")),
)
checkpoint_case(
    "config_of_a_huge_width",
    "a checkpoint of another model",
    lambda place, c: (c / "config.yaml").write_text((c / "config.yaml").read_text().replace(" width: 8", " width: 1000000000")),
)
checkpoint_case(
    "remote_code_in_its_tokenizer",
    None,
    lambda place, c: [
        (c / "tokenizer" / n).write_text(f"import os\nos.system({place.command!r})") for n in ("__init__.py", "tokenization.py")
    ],
)
checkpoint_case(
    "pickled_tokenizer", "tokenizer: not a tokenizer saved by bigtrain", put("tokenizer/tokenizer_config.json", lambda place: place.pickle)
)
checkpoint_case(
    "linked_tensors",
    f"{RANK}: a link; a checkpoint holds plain files",
    lambda place, c: ((c / RANK).rename(place.folder / "moved"), (c / RANK).symlink_to(place.folder / "moved")),
)
checkpoint_case(
    "linked_tokenizer",
    "tokenizer: not in the manifest; it was put there",
    lambda place, c: (shutil.rmtree(c / "tokenizer"), (c / "tokenizer").symlink_to(place.data / "tokenizer")),
)


def seen_by_the_manifest(name: str, says: str, change: Callable[[Place, Path], object]) -> None:
    """Changed after the manifest was written."""

    def attack(place: Place) -> None:
        checkpoint = place.folder / "checkpoints/step-00000005"
        change(place, checkpoint)
        use(checkpoint)

    cases.add(f"manifest_of_a_checkpoint_{name}", attack, says)


def listed(name: str) -> Callable[[Place, Path], object]:
    def apply(place: Place, checkpoint: Path) -> None:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"] | {name: [1, "0"]}
        (checkpoint / "manifest.json").write_text(json.dumps({"version": 1, "files": files, "checksum": format._own_checksum(files)}))

    return apply


seen_by_the_manifest("names_up", "names the file '../../c.yaml', which is outside the checkpoint", listed("../../c.yaml"))
seen_by_the_manifest("names_an_absolute_path", "names the file '/etc/passwd', which is outside", listed("/etc/passwd"))
seen_by_the_manifest("names_a_null", "missing; a checkpoint holds plain files", listed("a\0b"))
seen_by_the_manifest("is_a_pickle", "manifest.json: cannot be read", put("manifest.json", lambda place: place.pickle))
seen_by_the_manifest("is_a_list", "manifest.json: damaged", put("manifest.json", "[1]"))
seen_by_the_manifest("is_a_fifo", "manifest.json: cannot be read", lambda place, c: place.fifo("checkpoints/step-00000005/manifest.json"))
seen_by_the_manifest("index_is_a_fifo", "no checkpoint here", lambda place, c: place.fifo("checkpoints/step-00000005/index.json"))
seen_by_the_manifest("tensors_are_a_fifo", "missing", lambda place, c: place.fifo(f"checkpoints/step-00000005/{RANK}"))
seen_by_the_manifest("tensors_are_a_device", "a link", lambda place, c: place.link(f"checkpoints/step-00000005/{RANK}", "/dev/zero"))
seen_by_the_manifest("code_beside_it", "evil.py: not in the manifest", put("evil.py", "import os"))


@pytest.mark.parametrize("name", cases)
def test_payload(name, place, request):
    cases.attempt(name, place, request)
