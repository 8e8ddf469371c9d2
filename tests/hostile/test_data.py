"""Prepared data, and text to be prepared, that somebody else made."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from payloads import Cases, Place

from bigtrain import configfile
from bigtrain.config import Batch
from bigtrain.data import source
from bigtrain.data.loader import Loader
from bigtrain.data.shards import Manifest, TokenStore
from bigtrain.start import with_data
from bigtrain.tasks import make_task

cases = Cases()
case = cases.case


def train_on(place: Place) -> None:
    """What the commands do with prepared data before and while they train."""
    config = with_data(configfile.load(place.folder / "c.yaml"))
    store = TokenStore(config.data.folder, "train")
    batch = Batch(global_batch=1, micro_batch=1, accumulation=1, ranks=1)
    loader = Loader(store, make_task(config, store.manifest.tokenizer), config, batch, 0, 0)
    for position in range(loader.reader.sequences):
        [micro_batch], _ = loader.step(position)
        assert micro_batch["token"].min() >= 0 and micro_batch["token"].max() < config.model.vocab_size
        assert micro_batch["position"].min() >= 0 and micro_batch["position"].max() < config.model.max_positions


def forge(place: Place, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest that was changed by somebody who knows how its fingerprint is made."""
    path = place.data / "manifest.json"
    stored = json.loads(path.read_text())
    change(stored)
    with contextlib.suppress(ValueError):
        stored["fingerprint"] = Manifest.model_validate({k: v for k, v in stored.items() if k != "fingerprint"}).fingerprint
    path.write_text(json.dumps(stored))


def test_the_place_itself_is_good(place):
    train_on(place)


@case(r"train-00000.tokens: has \d+ bytes, expected \d+ bytes; copy it again or prepare the data again")
def shard_that_is_a_pickle(place):
    place.write("data/train-00000.tokens", place.pickle)
    train_on(place)


@case(r"train-00000.tokens: token \d+ is \d+, beyond the vocabulary of 320: the file is damaged; prepare the data again")
def shard_that_is_a_pickle_of_the_right_size(place):
    size = (place.data / "train-00000.tokens").stat().st_size
    place.write("data/train-00000.tokens", place.pickle.ljust(size, b"\0"))
    train_on(place)


@case(r"train-00000.tokens: token 333 is 65535, beyond the vocabulary of 320")
def token_out_of_range(place):
    tokens = np.fromfile(place.data / "train-00000.tokens", "<u2")
    tokens[333] = 65535
    tokens.tofile(place.data / "train-00000.tokens")
    train_on(place)


@case("train.documents: positions do not ascend: the file is damaged")
def documents_out_of_order(place):
    starts = np.fromfile(place.data / "train.documents", "<u8")
    np.roll(starts, 1).tofile(place.data / "train.documents")
    train_on(place)


@case("train-00000.tokens: is no regular file, expected")
def shard_that_is_a_fifo(place):
    place.fifo("data/train-00000.tokens")
    train_on(place)


@case("train-00000.tokens: is a link to /.*outside, outside the folder; put the file itself there")
def shard_that_is_a_link_to_elsewhere(place):
    outside = shutil.copy(place.data / "train-00000.tokens", place.folder / "outside")
    place.link("data/train-00000.tokens", outside)
    train_on(place)


@case("train-00000.bytes: is a link to /dev/zero, outside the folder")
def shard_that_is_a_device(place):
    place.link("data/train-00000.bytes", "/dev/zero")
    train_on(place)


@case("manifest.json: damaged .UnicodeDecodeError")
def manifest_that_is_a_pickle(place):
    place.write("data/manifest.json", place.pickle)
    train_on(place)


@case("manifest.json: damaged .OSError: .* is no regular file")
def manifest_that_is_a_fifo(place):
    place.fifo("data/manifest.json")
    train_on(place)


@case("manifest.json: damaged .OSError: .* is no regular file")
def manifest_that_is_a_device(place):
    place.link("data/manifest.json", "/dev/zero")
    train_on(place)


def manifest_case(name: str, says: str, change: Callable[[Place], object]) -> None:
    """What `change` makes of the manifest is refused as damaged."""

    def attack(place: Place) -> None:
        change(place)
        train_on(place)

    cases.add(f"manifest_{name}", attack, f"manifest.json: damaged .*{says}")


MANIFESTS = {
    "deep_nesting": ("[" * 100_000, "nested too deeply"),
    "nan": ('{"format": NaN}', "NaN is no JSON number"),
    "number_of_6000_digits": ('{"format": ' + "9" * 6000 + "}", "Exceeds the limit"),
    "key_twice": ('{"format": 1, "format": 1}', "the key 'format' stands twice"),
    "a_list": ("[1, 2]", "it holds no JSON object"),
    "a_text": ('"text"', "it holds no JSON object"),
    "null": ("null", "it holds no JSON object"),
    "empty": ("", "Expecting value"),
}
for name, (text, says) in MANIFESTS.items():
    manifest_case(name, f"{says}.*; remove the folder and prepare the data again", lambda p, text=text: p.write("data/manifest.json", text))

FORGED = {
    "name_that_escapes": (
        lambda m: m["splits"]["train"]["shards"][0].update(name="../outside"),
        "shards.0.name: String should match pattern",
    ),
    "name_that_is_absolute": (lambda m: m["splits"]["train"]["shards"][0].update(name="/etc/passwd"), "shards.0.name: String should match"),
    "name_with_a_null": (lambda m: m["splits"]["train"]["shards"][0].update(name="a\0b"), "shards.0.name: String should match"),
    "negative_tokens": (lambda m: m["splits"]["train"].update(tokens=-1), "splits.train.tokens: Input should be greater"),
    "shards_of_other_sum": (lambda m: m["splits"]["train"].update(tokens=10**18), "the shards do not sum to 1000000000000000000"),
    "no_shards": (lambda m: m["splits"]["train"].update(shards=[], tokens=0), "splits.train.tokens: Input should be greater"),
    "text_for_a_number": (lambda m: m["splits"]["train"].update(documents="many"), "documents: Input should be a valid integer"),
    "a_float_for_a_number": (lambda m: m["splits"]["train"].update(documents=3.5), "documents: Input should be a valid integer"),
    "true_for_a_number": (lambda m: m["splits"]["train"].update(documents=True), "documents: Input should be a valid integer"),
    "object_dtype": (lambda m: m["splits"]["train"].update(token_dtype="|O"), "token_dtype: Input should be '<u2' or '<u4'"),
    "no_validation": (lambda m: m["splits"].pop("validation"), "splits: Dictionary should have at least 2 items"),
    "end_of_document_beyond": (lambda m: m["tokenizer"].update(eod_id=10**9), "eod_id or mask_id is beyond vocab_size 258"),
    "mask_beyond": (lambda m: m["tokenizer"].update(mask_id=258), "eod_id or mask_id is beyond vocab_size 258"),
    "tokenizer_file_that_escapes": (lambda m: m["tokenizer_sha256"].update({"../x": ""}), "tokenizer_sha256.*String should match pattern"),
    "unknown_key": (lambda m: m.update(code="import os"), "code: Extra inputs are not permitted"),
}
for name, (change, says) in FORGED.items():
    manifest_case(name, says, lambda place, change=change: forge(place, change))


@case(r"train-00000.tokens: has \d+ bytes, expected 2000000000000000000 bytes")
def manifest_of_absurd_numbers(place):
    def change(manifest):
        split = manifest["splits"]["train"]
        split["tokens"] = split["shards"][0]["tokens"] = 10**18

    forge(place, change)
    train_on(place)


# ---- Text ----


def rows(place: Place, content: str | bytes, name: str = "rows.jsonl") -> None:
    path = place.write(name, content)
    list(source.documents(place.config(**{"source: text": "source: jsonl", f"{place.folder}/text": str(path)}).data))


@case(r"rows.jsonl:1: not JSON that can be read \(nested too deeply\); mend the row or take it out")
def row_of_deep_nesting(place):
    rows(place, '{"text": ' + "[" * 100_000)


@case(r"rows.jsonl:2: not JSON that can be read \(Exceeds the limit")
def row_with_a_number_of_6000_digits(place):
    rows(place, '{"text": "a"}\n{"n": ' + "9" * 6000 + "}\n")


@case("rows.jsonl:2: longer than 0 MiB; every line must be one JSON object: split it")
def row_that_never_ends(place, monkeypatch):
    monkeypatch.setattr(source, "_LONGEST_LINE", 1000)
    rows(place, '{"text": "a"}\n' + '{"text": "' + "x" * 10_000)


@case("rows.jsonl:1: not UTF-8")
def row_that_is_a_pickle(place):
    rows(place, place.pickle)


@case("data.path: .*/pipe is a device or a pipe; give a file or a folder")
def text_that_is_a_fifo(place):
    place.fifo("pipe")
    list(source.documents(place.config(**{f"{place.folder}/text": f"{place.folder}/pipe"}).data))


@case("data.path: /dev/zero is a device or a pipe; give a file or a folder")
def text_that_is_a_device(place):
    list(source.documents(place.config(**{f"{place.folder}/text": "/dev/zero"}).data))


@case(None)
def fifo_among_texts(place):
    before = list(source.documents(place.config().data))
    place.fifo("text/pipe")
    place.link("text/loop", "loop")
    assert list(source.documents(place.config().data)) == before


@pytest.mark.parametrize("name", cases)
def test_payload(name, place, request):
    cases.attempt(name, place, request)
