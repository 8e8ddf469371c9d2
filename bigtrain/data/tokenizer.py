"""Tokenizers: text to ids, with the exact number of UTF-8 bytes behind every token, and back.

Three kinds: bytes; byte-level BPE trained on the data; and the folder of a Hugging Face tokenizer. The last two are
saved as a standard Hugging Face folder (JSON only), which is all that another machine needs.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from bigtrain import jsonfile
from bigtrain.errors import UserError

Encoded = tuple[np.ndarray, np.ndarray]
"""Ids (uint32) and, for each, the bytes of text behind it (uint32)."""

_LARGEST_VOCABULARY = 1 << 24  # a list as long as the largest id is made, and no tokenizer comes near

EOD = "<|endoftext|>"
MASK = "<|mask|>"


class Tokenizer(ABC):
    """What every kind can do. `pieces` holds the bytes of each token where the tokenizer is byte-level, else it is None."""

    vocab_size: int
    """Largest id plus one."""
    eod_id: int
    """Opens every document."""
    mask_id: int | None
    """Stands for a hidden token (masked language models); None where the tokenizer has none."""
    pieces: list[bytes] | None
    """Bytes of each id, empty for special tokens."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and byte counts of each text; special tokens are neither added nor recognised in the text.

        The counts of a text sum to its length in UTF-8, unless it has no token at all.
        """

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0][0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def stream(self) -> Callable[[int | None], str]:
        """A function from the next id to the text that it completes, which never holds half a character.

        None in place of an id ends the stream and gives what is left, U+FFFD for a character that never came whole.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda i: decoder.decode(b"", final=True) if i is None else decoder.decode(self.pieces[i])

    @abstractmethod
    def files(self) -> dict[str, str]:
        """Name and content of the files that make the tokenizer up."""

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_text(content, encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that are saved alike."""
        return hashlib.sha256(json.dumps(self.files(), sort_keys=True).encode()).hexdigest()


class Bytes(Tokenizer):
    """The bytes of UTF-8 as ids 0 to 255, then end-of-document and mask."""

    vocab_size, eod_id, mask_id = 258, 256, 257
    pieces = [bytes([i]) for i in range(256)] + [b"", b""]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        ids = [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]
        return [(i, np.ones_like(i)) for i in ids]

    def files(self) -> dict[str, str]:
        return {"tokenizer_config.json": json.dumps({"tokenizer_class": "bigtrain.bytes"}, indent=1) + "\n"}


class Subword(Tokenizer):
    """A tokenizer of the `tokenizers` library. `special` maps Hugging Face's names (eos_token, mask_token, ...) to tokens."""

    def __init__(self, backend, special: dict[str, str], name: str):
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = {role: token for role, token in special.items() if isinstance(token, str)}
        eod = special.get("eos_token") or special.get("sep_token")
        if max(vocabulary.values(), default=0) >= _LARGEST_VOCABULARY:
            raise UserError(f"{name}: has a token of number {max(vocabulary.values())}: the file is damaged; prepare the data again")
        if eod not in vocabulary:
            raise UserError(
                f"{name}: has no token to end a document; give its tokenizer_config.json an eos_token or a sep_token of its vocabulary"
            )
        self.backend = backend
        self.special = special
        # A text that spells a special token is still text; a length limit in the file is a limit of its first model.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = vocabulary[eod]
        self.mask_id = vocabulary.get(special.get("mask_token"))
        self.pieces = _byte_pieces(backend, vocabulary, self.vocab_size)
        self._lengths = np.array([len(p) for p in self.pieces], np.uint32) if self.pieces else None

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        if self.pieces is None:
            return [self._with_offsets(text, e) for text, e in zip(texts, self.backend.encode_batch(texts, add_special_tokens=False))]
        encoded = []
        for text, encoding in zip(texts, self.backend.encode_batch_fast(texts, add_special_tokens=False)):
            ids = np.array(encoding.ids, np.uint32)
            counts = self._lengths[ids]
            if counts.sum() != len(text.encode()):  # the tokenizer normalises this text, or adds a space before it
                ids, counts = self._with_offsets(text, self.backend.encode(text, add_special_tokens=False))
            encoded.append((ids, counts))
        return encoded

    @staticmethod
    def _with_offsets(text: str, encoding) -> Encoded:
        """Bytes from the end of the token before to the end of this one; of tokens that share a character, the first has it."""
        ids = np.array(encoding.ids, np.uint32)
        code = np.frombuffer(text.encode("utf-32-le"), "<u4")
        bytes_before = np.concatenate(([0], np.cumsum(1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF))))
        ends = np.array([end for _, end in encoding.offsets], np.int64)
        if ends.size:
            ends[-1] = len(text)
        return ids, np.diff(bytes_before[np.maximum.accumulate(ends)], prepend=0).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return super().decode(ids) if self.pieces else self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> Callable[[int | None], str]:
        if self.pieces:
            return super().stream()
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda i: "" if i is None else stream.step(self.backend, i) or ""

    def files(self) -> dict[str, str]:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        return {"tokenizer.json": self.backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(settings, indent=1) + "\n"}


def load(folder: str | Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote; nothing in it is run. Raises UserError for a folder that is missing or damaged."""
    folder = Path(folder)
    settings, vocabulary = folder / "tokenizer_config.json", folder / "tokenizer.json"
    try:
        for path in (settings, vocabulary):
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{path} is a link to {path.resolve()}, outside the folder")
        special = jsonfile.read(settings)
        if special.pop("tokenizer_class") == "bigtrain.bytes":
            return Bytes()
        text = jsonfile.read_text(vocabulary)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder}: not a tokenizer saved by bigtrain ({error}); prepare the data again") from None
    return Subword(_backend(text, vocabulary), special, str(folder))


def from_hugging_face(folder: str | Path) -> Tokenizer:
    """Read the folder of a Hugging Face tokenizer; no code in it is run and nothing is fetched.

    Raises UserError for a folder that is missing, cannot be read, or holds no fast tokenizer or no end-of-document token.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"data.tokenizer: {str(folder)!r} is neither bytes nor bpe nor a folder; download the tokenizer and give its folder"
        )
    for path in Path(folder).iterdir():
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"data.tokenizer: {path} is no regular file; take it out of the folder")
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises almost anything here
        raise UserError(f"data.tokenizer: {folder} does not load as a Hugging Face tokenizer: {_first_line(error)}") from None
    if not found.is_fast:
        raise UserError(f"data.tokenizer: {folder} has no fast tokenizer; convert it so that the folder has a tokenizer.json")
    return Subword(found.backend_tokenizer, found.special_tokens_map, f"data.tokenizer: {folder}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; bytes: Radford et al. 2019) of at most `vocab_size` ids.

    Ids 0 and 1 are end-of-document and mask, the 256 bytes follow. Deterministic. Memory grows with the distinct words.
    """
    if vocab_size < 258:
        raise UserError(f"data.bpe_vocab_size: {vocab_size} is too small: 256 bytes, end-of-document and mask need 258")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOD, MASK], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return Subword(backend, {"eos_token": EOD, "mask_token": MASK}, "bpe")


def _backend(text: str, path: Path):
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{path}: damaged ({_first_line(error)}); prepare the data again") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _byte_pieces(backend, vocabulary: dict[str, int], vocab_size: int) -> list[bytes] | None:
    """Bytes of every id if the tokenizer spells bytes as GPT-2 does (one printable character a byte), else None."""
    if type(backend.decoder).__name__ != "ByteLevel":
        return None
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    byte_of = {chr(b): b for b in printable}
    byte_of |= {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(printable)))}
    added = backend.get_added_tokens_decoder()
    pieces = [b""] * vocab_size
    for token, i in vocabulary.items():
        if i not in added:
            if not byte_of.keys() >= set(token):
                return None
            pieces[i] = bytes(byte_of[character] for character in token)
        elif not added[i].special:
            pieces[i] = added[i].content.encode()
    return pieces
