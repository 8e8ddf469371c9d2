import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigtrain.data import prepare as module
from bigtrain.data.prepare import prepare
from bigtrain.data.shards import Manifest, TokenStore
from bigtrain.data.tokenizer import Bytes, load
from bigtrain.errors import RunError, UserError

ROOT = Path(__file__).parents[2]


def stream(folder, split):
    store = TokenStore(folder, split)
    return store.tokens(0, len(store)), store.token_bytes(0, len(store)), store.document_starts(0, len(store))


def written_texts(folder, split):
    tokens, counts, starts = stream(folder, split)
    tokenizer = load(folder / "tokenizer")
    parts = np.split(tokens, starts)[1:]
    assert all(part[0] == tokenizer.eod_id and tokenizer.eod_id not in part[1:] for part in parts)
    assert (counts[starts] == 0).all()
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_text_is_in_one_split_and_can_be_read_back(texts, data, kind):
    folder = prepare(data(tokenizer=kind, bpe_vocab_size=300))
    train, validation = written_texts(folder, "train"), written_texts(folder, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert 4 < len(validation) < 25  # 12 are expected
    assert train != sorted(train)
    for split, found in (("train", train), ("validation", validation)):
        tokens, counts, _ = stream(folder, split)
        info = Manifest.read(folder).splits[split]
        assert info.bytes == counts.sum() == sum(len(t.encode()) for t in found)
        assert (info.documents, info.tokens, info.largest_token) == (len(found), len(tokens), tokens.max())
        assert [s.tokens for s in info.shards[:-1]] == [1000] * (len(info.shards) - 1)


def test_the_result_depends_on_the_texts_alone(texts, data, tmp_path):
    first = prepare(data(tokenizer="bpe", bpe_vocab_size=300, folder=str(tmp_path / "1")))
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text("".join(json.dumps({"text": t}) + "\n" for t in reversed(texts)))
    second = prepare(data(tokenizer="bpe", bpe_vocab_size=300, folder=str(tmp_path / "2"), source="jsonl", path=str(elsewhere)))
    assert Manifest.read(first).fingerprint == Manifest.read(second).fingerprint


def test_the_result_never_changes(texts, data):
    assert Manifest.read(prepare(data())).fingerprint == GOLDEN


def test_the_tokenizer_is_trained_on_the_training_split(texts, data, monkeypatch):
    seen, train = [], module.tokenizers.train_bpe
    monkeypatch.setattr(module.tokenizers, "train_bpe", lambda texts, size: train((seen.append(t) or t for t in texts), size))
    folder = prepare(data(tokenizer="bpe", bpe_vocab_size=300))
    assert sorted(seen) == sorted(written_texts(folder, "train"))


def test_the_same_text_is_kept_once(texts, data, tmp_path):
    (tmp_path / "texts" / "copy.txt").write_bytes(texts[0].encode())
    folder = prepare(data())
    assert sorted(written_texts(folder, "train") + written_texts(folder, "validation")) == sorted(texts)
    assert Manifest.read(folder).duplicates == 1


def test_a_second_call_returns_at_once(texts, data, tmp_path, monkeypatch):
    folder = prepare(data())
    monkeypatch.setattr(module, "_write", lambda *_: pytest.fail("prepared again"))
    assert prepare(data(sequence_length=64, document_mask=False)) == folder


def test_another_config_in_the_same_folder_is_refused(texts, data):
    prepare(data())
    changes = r"\(data.tokenizer: bytes -> bpe; data.shard_tokens: 1000 -> 7\)"
    with pytest.raises(UserError, match=f"prepared was prepared from another config {changes}; set another folder"):
        prepare(data(tokenizer="bpe", shard_tokens=7))


def test_a_folder_of_something_else_is_left_alone(texts, data, tmp_path):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="data.folder: .*prepared exists and holds no prepared data; set another"):
        prepare(data())
    assert (tmp_path / "prepared" / "thesis.tex").read_text() == "precious"


def test_a_folder_inside_the_source_is_refused(texts, data, tmp_path):
    with pytest.raises(UserError, match="data.folder: .* is inside data.path .*texts"):
        prepare(data(folder=str(tmp_path / "texts" / "prepared")))


@pytest.mark.parametrize("split, fraction", [("validation", 1e-9), ("train", 1 - 1e-9)])
def test_an_empty_split_is_refused_with_a_fraction_that_works(texts, data, tmp_path, split, fraction):
    with pytest.raises(UserError, match=f"leaves the {split} split without any of the 60 documents; give more") as caught:
        prepare(data(validation_fraction=fraction))
    assert [p.name for p in tmp_path.iterdir()] == ["texts"]
    enough = float(str(caught.value).split()[-1])
    prepare(data(validation_fraction=enough))


def test_one_document_cannot_be_split(data, tmp_path):
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(UserError, match="without any of the 1 documents; give more documents$"):
        prepare(data(path=str(tmp_path / "one.txt")))


def test_a_full_disk_leaves_nothing(texts, data, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # every file ends at 4 KiB, as on a disk that is full
    try:
        with pytest.raises(RunError, match="prepared cannot be written .*; make room or set another folder"):
            prepare(data())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["texts"]


def test_a_bad_source_leaves_nothing(texts, data, tmp_path):
    (tmp_path / "texts" / "zzz.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="zzz.txt: not UTF-8"):
        prepare(data())
    assert [p.name for p in tmp_path.iterdir()] == ["texts"]


def test_the_process_that_comes_second_takes_the_first_ones_work(texts, data, verify, monkeypatch):
    write = module._write

    def slow(*arguments):
        write(*arguments)
        monkeypatch.setattr(module, "_write", write)
        prepare(data())  # meanwhile, another process

    monkeypatch.setattr(module, "_write", slow)
    monkeypatch.setattr(module.os, "getpid", iter([1, 2]).__next__)
    folder = prepare(data())
    verify(TokenStore(folder, "train"))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["prepared", "texts"]


def test_dtypes_are_the_narrowest_that_fit(texts, data, monkeypatch):
    class Wide(Bytes):
        vocab_size, eod_id = 70_000, 69_999

        def encode_batch(self, texts):
            return [(ids, np.full_like(counts, 300)) for ids, counts in super().encode_batch(texts)]

    monkeypatch.setattr(module.tokenizers, "Bytes", Wide)
    folder = prepare(data())
    info = Manifest.read(folder).splits["train"]
    assert (info.token_dtype, info.byte_dtype, info.largest_token) == ("<u4", "<u2", 69_999)
    tokens, counts, starts = stream(folder, "train")
    assert (tokens[starts] == 69_999).all() and counts.max() == 300


def test_progress_counts_documents(texts, data):
    calls = []
    prepare(data(tokenizer="bpe", bpe_vocab_size=300), lambda *call: calls.append(call))
    assert {stage for stage, _, _ in calls} == {"train tokenizer", "tokenise", "write train", "write validation"}
    assert ("tokenise", 60, None) in calls
    assert all(total is None or done <= total for _, done, total in calls)


def test_preparing_does_not_import_torch(texts, data):
    program = f"""
import sys
from bigtrain.config import Data
from bigtrain.data import loader, prepare
prepare.prepare(Data(**{data(tokenizer="bpe", bpe_vocab_size=300).model_dump()!r}))
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


GOLDEN = "407534c5c076794d15d849be5ee2753aeb99a2ca8819c66b9edd329ee736a462"
