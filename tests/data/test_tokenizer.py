import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bigtrain.data.tokenizer import Bytes, Subword, Tokenizer, from_hugging_face, load, train_bpe
from bigtrain.errors import UserError

ROOT = Path(__file__).parents[2]
TEXTS = [
    "plain ascii, with  two spaces\n\tand a tab",
    "Grüße, naïve café \u0065\u0301 (decomposed)",
    "日本語のテキスト, emoji 😀👩‍🚀🇩🇪 and \U0001d11e",
    "a special <|endoftext|> spelled out, and <|mask|>, [SEP], [MASK]",
    " leading space",
    "\ufeff\u0000\u200d\r\n",
    "the end is white  \n",
    "x",
]


def bpe():
    return train_bpe(TEXTS * 3, 400)


def hugging_face(folder, kind):
    """The folder of a tokenizer as others make it, of the three designs that count bytes differently."""
    if kind == "wordpiece":  # BERT: lower-cased, parts of words marked, unknown words, sep instead of eos
        backend = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[SEP]", "[MASK]"], show_progress=False)
        special = {"sep_token": "[SEP]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    elif kind == "metaspace":  # Llama 2: spaces are a letter, unknown characters fall back to bytes
        backend = library.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256))], limit_alphabet=40, show_progress=False
        )
        special = {"eos_token": "</s>", "unk_token": "<unk>"}
    else:  # GPT-2 with a space put before the text, Qwen's NFC, and an added token that is not special
        backend = library.Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        special = {"eos_token": "</s>"}
    backend.train_from_iterator(TEXTS, trainer)
    if kind == "metaspace":  # its bytes are special only so that the trainer puts them in
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        backend = library.Tokenizer.from_str(json.dumps(state))
    backend.add_tokens([library.AddedToken("café", normalized=False)])
    backend.enable_truncation(4)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    return folder


@pytest.fixture(params=["bytes", "bpe", "bytelevel", "wordpiece", "metaspace"])
def tokenizer(request, tmp_path):
    made = {"bytes": Bytes, "bpe": bpe}.get(request.param)
    return made() if made else from_hugging_face(hugging_face(tmp_path / "hf", request.param))


def test_byte_counts_are_exact(tokenizer):
    for text, (ids, counts) in zip(TEXTS, tokenizer.encode_batch(TEXTS)):
        assert len(ids) == len(counts)
        assert not len(ids) or counts.sum() == len(text.encode()), text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_every_byte_level_token_counts_its_own_bytes():
    tokenizer = bpe()
    for ids, counts in tokenizer.encode_batch(TEXTS):
        assert counts.tolist() == [len(tokenizer.pieces[i]) for i in ids]
        assert counts.min() > 0


def test_tokens_that_share_or_reorder_characters_count_each_byte_once():
    encoding = SimpleNamespace(ids=[7, 8, 9, 7, 6], offsets=[(0, 1), (0, 1), (1, 3), (1, 2), (3, 4)])
    assert Subword._with_offsets("éx€ ", encoding)[1].tolist() == [2, 0, 4, 0, 1]


def test_a_length_limit_in_the_file_is_not_ours(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])).endswith("tab")


def test_an_added_token_that_is_text_is_decoded(tokenizer):
    assert "café" in tokenizer.decode(tokenizer.encode("un café noir"))


def test_text_never_becomes_a_special_token(tokenizer):
    for ids, _ in tokenizer.encode_batch(TEXTS):
        assert tokenizer.eod_id not in ids and tokenizer.mask_id not in ids


@pytest.mark.parametrize("make", [Bytes, bpe])
def test_decode_is_the_inverse(make):
    tokenizer = make()
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eod_id, *tokenizer.encode("é"), tokenizer.mask_id]) == "é"


def test_stream_gives_whole_characters_that_join_to_the_text(tokenizer):
    for text in TEXTS:
        ids, emit = tokenizer.encode(text), tokenizer.stream()
        parts = [emit(i) for i in ids] + [emit(None)]
        assert "\ufffd" not in "".join(parts)
        assert "".join(parts) == tokenizer.decode(ids)


def test_stream_ends_half_a_character_as_a_replacement():
    emit = Bytes().stream()
    assert [emit(i) for i in "😀".encode()] == ["", "", "", "😀"]
    assert [emit(0xE2), emit(None)] == ["", "\ufffd"]


def test_a_saved_tokenizer_travels(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.eod_id, loaded.mask_id) == (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.mask_id)
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_a_saved_bpe_is_a_hugging_face_tokenizer(tmp_path):
    tokenizer = bpe()
    tokenizer.save(tmp_path)
    again = from_hugging_face(tmp_path)
    assert (again.eod_id, again.mask_id, again.encode(TEXTS[2])) == (tokenizer.eod_id, tokenizer.mask_id, tokenizer.encode(TEXTS[2]))


def test_sizes_and_special_tokens():
    assert (Bytes().vocab_size, Bytes().eod_id, Bytes().mask_id) == (258, 256, 257)
    assert (bpe().vocab_size, bpe().eod_id, bpe().mask_id) == (400, 0, 1)


def test_training_is_the_same_in_another_process():
    program = f"from bigtrain.data.tokenizer import train_bpe; print(train_bpe({TEXTS * 3!r}, 400).fingerprint)"
    fingerprints = {
        subprocess.check_output([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, cwd=ROOT, text=True).strip() for seed in "12"
    }
    assert fingerprints == {bpe().fingerprint}


@pytest.mark.parametrize("left_out", ["encode_batch", "files"])
def test_a_kind_that_leaves_something_out_cannot_be_made(left_out):
    methods = {name: getattr(Bytes, name) for name in ("encode_batch", "files") if name != left_out}
    with pytest.raises(TypeError, match=left_out):
        type("Half", (Tokenizer,), methods)()


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="data.bpe_vocab_size: 257 is too small.* need 258"):
        train_bpe(["x"], 257)


def test_a_folder_that_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.tokenizer: 'gtp2' is neither bytes nor bpe nor a folder; download"):
        from_hugging_face("gtp2")
    with pytest.raises(UserError, match="data.tokenizer: .* does not load as a Hugging Face tokenizer"):
        from_hugging_face(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    folder = hugging_face(tmp_path / "hf", "bytelevel")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match="hf: has no token to end a document; give its tokenizer_config.json an eos_token"):
        from_hugging_face(folder)


@pytest.mark.parametrize("name, content", [("tokenizer_config.json", "{"), ("tokenizer.json", "{}"), ("tokenizer.json", None)])
def test_a_damaged_saved_tokenizer_is_named(tmp_path, name, content):
    bpe().save(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}.*prepare the data again"):
        load(tmp_path)
