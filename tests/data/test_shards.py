import json
from types import SimpleNamespace

import numpy as np
import pytest

from bigtrain.data import check
from bigtrain.data.check import Check
from bigtrain.data.prepare import prepare
from bigtrain.data.shards import Manifest, TokenStore
from bigtrain.errors import UserError


def test_reads_cross_the_borders_of_shards(store):
    """Every read equals the slice of the whole, which is put together here from the files as the format defines them."""
    names = sorted(p.name for p in store.folder.glob("train-*.tokens"))
    assert len(names) > 4
    whole = np.concatenate([np.fromfile(store.folder / n, "<u2") for n in names])
    counts = np.concatenate([np.fromfile(store.folder / n.replace(".tokens", ".bytes"), "u1") for n in names])
    assert len(whole) == len(store)
    for start, stop in [(0, len(store)), (990, 1010), (999, 1000), (1000, 1001), (500, 3500), (len(store) - 1, len(store)), (7, 7)]:
        assert (store.tokens(start, stop) == whole[start:stop]).all()
        assert (store.token_bytes(start, stop) == counts[start:stop]).all()
        starts = np.flatnonzero(whole == 256)  # the end-of-document token opens each
        assert (store.document_starts(start, stop) == starts[(starts >= start) & (starts < stop)]).all()


def test_a_read_beyond_the_end_is_refused(store):
    with pytest.raises(IndexError):
        store.tokens(0, len(store) + 1)


def test_locate_names_the_file(store):
    assert store.locate(0) == (store.folder / "train-00000.tokens", 0)
    assert store.locate(999) == (store.folder / "train-00000.tokens", 999)
    assert store.locate(1000) == (store.folder / "train-00001.tokens", 0)


def test_a_missing_or_short_file_is_named(store):
    path = store.folder / "train-00001.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="train-00001.tokens: has 1998 bytes, expected 2000 bytes; copy it again"):
        TokenStore(store.folder, "train")
    path.unlink()
    with pytest.raises(UserError, match="train-00001.tokens: is missing, expected 2000 bytes"):
        TokenStore(store.folder, "train")


@pytest.mark.parametrize("file", ["train-00001.tokens", "train-00000.bytes", "validation.documents"])
def test_a_flipped_bit_is_found(store, verify, file):
    verify(store)
    raw = bytearray((store.folder / file).read_bytes())
    raw[5] ^= 1
    (store.folder / file).write_bytes(raw)
    with pytest.raises(UserError, match=f"{file}: has changed since it was prepared"):
        verify(store)
    (store.folder / file).unlink()
    with pytest.raises(UserError, match=f"{file}: cannot be read .No such file"):
        verify(store)


@pytest.mark.parametrize("ranks", [1, 3, 100])
def test_the_ranks_read_every_file_once(store, ranks):
    shares = [[name for name, _ in Check(store, rank, ranks)._files] for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(store.manifest.files())
    assert {p.name for p in store.folder.iterdir() if p.is_file()} - {"manifest.json"} == store.manifest.files().keys()


def test_the_check_leaves_most_of_the_time_to_others(store, monkeypatch):
    """It rests nine times as long as it works, and a stop does not wait for it to finish."""
    rests = []
    one = Check(store, 0, 1)
    monkeypatch.setattr(one._stop, "wait", lambda seconds: rests.append(seconds))
    clock = iter(range(1000))
    monkeypatch.setattr(check, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    one.start()
    one.wait()
    assert rests == [9.0] * len(one._files)
    stopped = Check(store, 0, 1)
    stopped._stop.set()
    (store.folder / stopped._files[1][0]).unlink()
    stopped.start()
    stopped.wait()
    stopped.refuse()  # it did not get to the second file


@pytest.mark.parametrize("values", [[5, 3, 8], [0, 0, 0], [2**63, 0, 2**64 - 1]], ids=str)
def test_document_positions_that_do_not_ascend_are_refused(store, values):
    path = store.folder / "train.documents"
    positions = np.fromfile(path, "<u8")
    positions[: len(values)] = values
    positions.tofile(path)
    with pytest.raises(UserError, match="train.documents: positions do not ascend: .*prepare the data again"):
        TokenStore(store.folder, "train").document_starts(0, len(store))


def test_no_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match="manifest.json does not exist: no prepared data in .*; prepare it first"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: m["splits"]["train"].pop("tokens"), "damaged .splits.train.tokens: Field required.; remove"),
        (lambda m: m["splits"]["train"].update(bytes=5), "damaged .its fingerprint does not match"),
        (lambda m: m["splits"]["train"].update(tokens=5), "damaged .splits.train: Value error, the shards do not sum to 5 tokens"),
        (lambda m: m["tokenizer"].update(eod_id="256"), "damaged .tokenizer.eod_id: Input should be a valid integer"),
        (lambda m: m.update(format=2), "format 2, this version of bigtrain reads format 1"),
        (lambda m: m.clear(), "damaged .KeyError: 'fingerprint'"),
    ],
)
def test_a_damaged_manifest_is_named(store, change, says):
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"manifest.json: {says}"):
        Manifest.read(store.folder)


def test_a_tokenizer_that_has_changed_is_named(texts, data):
    folder = prepare(data(tokenizer="bpe", bpe_vocab_size=300))
    manifest = Manifest.read(folder)
    assert manifest.tokenizer_sha256.keys() == {p.name for p in (folder / "tokenizer").iterdir()}
    manifest.check_tokenizer(folder)
    for name in manifest.tokenizer_sha256:
        path = folder / "tokenizer" / name
        before = path.read_bytes()
        path.write_bytes(before + b"\n")  # what reads it would not see that
        with pytest.raises(UserError, match=f"^{path}: has changed since the data was prepared; copy it again or prepare the data again$"):
            manifest.check_tokenizer(folder)
        path.unlink()
        with pytest.raises(UserError, match=f"tokenizer/{name}: is missing; copy"):
            manifest.check_tokenizer(folder)
        path.write_bytes(before)


def test_data_of_a_manifest_without_a_checksum_of_its_tokenizer(store, data):
    """It was prepared before there were any: it is the same data, and good as it is."""
    path = store.folder / "manifest.json"
    stored = json.loads(path.read_text())
    del stored["tokenizer_sha256"]
    path.write_text(json.dumps(stored))
    manifest = Manifest.read(prepare(data()))
    assert manifest.tokenizer_sha256 is None and manifest.fingerprint == store.manifest.fingerprint
    manifest.check_tokenizer(store.folder)


def test_a_manifest_cut_short_is_named(store):
    path = store.folder / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="manifest.json: damaged .*remove the folder and prepare the data again"):
        Manifest.read(store.folder)


def test_a_model_with_too_few_rows_is_refused(store):
    store.check_model(257)
    with pytest.raises(UserError, match="model.vocab_size: 256 is too small for .*, whose largest token is 256; set it to 258 or more"):
        store.check_model(256)


def test_sequences_need_their_last_target(store, texts, data):
    n = len(store)
    assert store.sequences(n - 1) == 1
    with pytest.raises(UserError, match=f"the train split has {n} tokens, not one sequence of {n} and its target; lower data.seq"):
        store.sequences(n)
    with pytest.raises(UserError, match="a larger data.validation_fraction"):
        TokenStore(prepare(data()), "validation").sequences(10**6)
