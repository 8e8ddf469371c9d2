"""Tokenizers that somebody else made, with code beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from payloads import Cases, Place

from bigtrain.data import tokenizer

cases = Cases()
case = cases.case


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.train_bpe(["some words and other words"], 270).save(folder)
    return folder


def remote_code(place: Place, bpe: Path, **settings: Any) -> Path:
    """A Hugging Face tokenizer that brings Python code along."""
    folder = place.folder / "tok"
    shutil.copytree(bpe, folder)
    for name in ("evil", "tokenization_evil", "__init__", "configuration_evil"):
        (folder / f"{name}.py").write_text(f"import os\nos.system({place.command!r})\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    return folder


AUTO_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}


@case("does not load as a Hugging Face tokenizer", harmless=True)
def tokenizer_with_remote_code(place, bpe):
    folder = remote_code(place, bpe, auto_map=AUTO_MAP, tokenizer_class="Evil")
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": AUTO_MAP}))
    tokenizer.from_hugging_face(folder)


@case("does not load as a Hugging Face tokenizer", harmless=True)
def tokenizer_with_remote_code_elsewhere(place, bpe):
    tokenizer.from_hugging_face(remote_code(place, bpe, auto_map={"AutoTokenizer": ["evil/repo--evil.Evil", "../tok--evil.Evil"]}))


@case("does not load as a Hugging Face tokenizer|has no fast tokenizer", harmless=True)
def tokenizer_with_a_pickled_vocabulary(place, bpe):
    folder = remote_code(place, bpe, tokenizer_class="TransfoXLTokenizer")
    (folder / "tokenizer.json").unlink()
    for name in ("vocab.pkl", "vocab.bin", "vocab.txt", "spiece.model", "tokenizer.model", "pytorch_model.bin"):
        (folder / name).write_bytes(place.pickle)
    tokenizer.from_hugging_face(folder)


@case("data.tokenizer: .*tok does not load as a Hugging Face tokenizer: .")
def tokenizer_that_is_a_pickle(place, bpe):
    folder = remote_code(place, bpe)
    (folder / "tokenizer.json").write_bytes(place.pickle)
    tokenizer.from_hugging_face(folder)


@case("data.tokenizer: .*tok does not load as a Hugging Face tokenizer: .")
def tokenizer_of_deep_nesting(place, bpe):
    folder = remote_code(place, bpe)
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    tokenizer.from_hugging_face(folder)


@case("data.tokenizer: .*tokenizer_config.json is no regular file; take it out of the folder")
def tokenizer_with_a_fifo(place, bpe):
    remote_code(place, bpe)
    tokenizer.from_hugging_face(place.fifo("tok/tokenizer_config.json").parent)


@case(None)
def saved_tokenizer_with_remote_code(place, bpe):
    assert tokenizer.load(remote_code(place, bpe, auto_map=AUTO_MAP, chat_template="{{ ''.__class__.__mro__ }}")).encode("words")


@case("has a token of number 4000000000: the file is damaged")
def saved_tokenizer_with_an_absurd_id(place, bpe):
    folder = remote_code(place, bpe)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"]["zzz"] = 4_000_000_000
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer.load(folder)


@case("tokenizer.json: damaged .*; prepare the data again")
def saved_tokenizer_of_deep_nesting(place, bpe):
    folder = remote_code(place, bpe)
    (folder / "tokenizer.json").write_text('{"a":' * 100_000)
    tokenizer.load(folder)


@case("tok: has no token to end a document")
def saved_tokenizer_of_wrong_types(place, bpe):
    tokenizer.load(remote_code(place, bpe, eos_token={"__type": "AddedToken", "content": "x"}, mask_token=[1], sep_token=7))


@case("tok: not a tokenizer saved by bigtrain .*'tokenizer_class'")
def saved_tokenizer_without_a_class(place, bpe):
    (remote_code(place, bpe) / "tokenizer_config.json").write_text("{}")
    tokenizer.load(place.folder / "tok")


@case("tok: not a tokenizer saved by bigtrain .*the key 'tokenizer_class' stands twice")
def saved_tokenizer_with_a_key_twice(place, bpe):
    (remote_code(place, bpe) / "tokenizer_config.json").write_text('{"tokenizer_class": "a", "tokenizer_class": "bigtrain.bytes"}')
    tokenizer.load(place.folder / "tok")


@case("tok: not a tokenizer saved by bigtrain .*is a link to /etc/passwd, outside the folder")
def saved_tokenizer_that_is_a_link(place, bpe):
    remote_code(place, bpe)
    tokenizer.load(place.link("tok/tokenizer.json", "/etc/passwd").parent)


@case("tok: not a tokenizer saved by bigtrain .*is no regular file")
def saved_tokenizer_that_is_a_fifo(place, bpe):
    remote_code(place, bpe)
    tokenizer.load(place.fifo("tok/tokenizer.json").parent)


@pytest.mark.parametrize("name", cases)
def test_payload(name, place, request):
    cases.attempt(name, place, request)
