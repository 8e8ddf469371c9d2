"""Prepared data on disk, and how it is read.

    FOLDER/
        manifest.json          what is here, from which config, with a checksum of every file
        tokenizer/             see tokenizer.py
        train-00000.tokens     ids, little-endian, `token_dtype`; every shard but the last holds data.shard_tokens
        train-00000.bytes      for each of them the UTF-8 bytes of text behind it, `byte_dtype`
        train.documents        positions of the first token (end-of-document) of each document, uint64
        validation-...         the same

A split is one stream of tokens: documents in the order of their hash, cut into shards without regard to documents.
Everything is memory-mapped, so that ranks of one machine share one copy.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from bigtrain import jsonfile
from bigtrain.configschema import short
from bigtrain.configsection import Count, Positive, Section
from bigtrain.errors import UserError

SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"


FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class TokenizerInfo(Section):
    """What a task needs to know of the tokenizer without loading it."""

    fingerprint: str
    vocab_size: Positive
    eod_id: Count
    mask_id: Count | None

    @model_validator(mode="after")
    def _known(self):
        if max(self.eod_id, self.mask_id or 0) >= self.vocab_size:
            raise ValueError(f"eod_id or mask_id is beyond vocab_size {self.vocab_size}")
        return self


class Shard(Section):
    name: FileName
    """File name without the suffix (.tokens, .bytes)."""
    tokens: Positive
    tokens_sha256: str
    bytes_sha256: str


class Split(Section):
    documents: Positive
    tokens: Positive
    bytes: Count
    """UTF-8 bytes of text."""
    largest_token: Count
    token_dtype: Literal["<u2", "<u4"]
    byte_dtype: Literal["|u1", "<u2", "<u4"]
    shards: list[Shard]
    documents_sha256: str

    @model_validator(mode="after")
    def _whole(self):
        if sum(shard.tokens for shard in self.shards) != self.tokens:
            raise ValueError(f"the shards do not sum to {self.tokens} tokens")
        return self

    def files(self, name: str) -> dict[str, tuple[int, str]]:
        """Size in bytes and sha256 of each file of the split called `name`."""
        files = {f"{name}.documents": (8 * self.documents, self.documents_sha256)}
        for shard in self.shards:
            files[f"{shard.name}.tokens"] = (shard.tokens * np.dtype(self.token_dtype).itemsize, shard.tokens_sha256)
            files[f"{shard.name}.bytes"] = (shard.tokens * np.dtype(self.byte_dtype).itemsize, shard.bytes_sha256)
        return files


class Manifest(Section):
    format: Literal[1] = 1
    data: dict[str, str | int | float | list[str] | None]
    """The keys of the data config that decided what is here."""
    duplicates: Count
    """Documents left out because their text had come before."""
    tokenizer: TokenizerInfo
    tokenizer_sha256: dict[FileName, str] | None = None
    """Of the tokenizer's files, by name; None in data that was prepared before they had any."""
    splits: Annotated[dict[Literal["train", "validation"], Split], Field(min_length=len(SPLITS))]

    @property
    def fingerprint(self) -> str:
        """Equal for data that is equal: of the shards' checksums and the tokenizer, not of where the text came from."""
        content = self.model_dump(include={"format", "tokenizer", "splits"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Raises UserError for a folder without a manifest, or with one that is damaged or of another format."""
        path = Path(folder) / MANIFEST
        try:
            stored = jsonfile.read(path)
            if not isinstance(stored, dict):
                raise ValueError("it holds no JSON object")
            fingerprint = stored.pop("fingerprint")
            if stored["format"] != 1:
                raise UserError(
                    f"{path}: format {short(stored['format'])}, this version of bigtrain reads format 1; prepare the data again"
                )
            manifest = cls.model_validate(stored)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: no prepared data in {folder}; prepare it first, or set data.folder") from None
        except (OSError, ValueError, KeyError) as error:  # ValidationError is a ValueError
            reason = _first(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {str(error)[:200]}"
            raise UserError(f"{path}: damaged ({reason}); remove the folder and prepare the data again") from None
        if fingerprint != manifest.fingerprint:
            raise UserError(f"{path}: damaged (its fingerprint does not match its content); remove the folder and prepare the data again")
        return manifest

    def text(self) -> str:
        return json.dumps({**self.model_dump(), "fingerprint": self.fingerprint}, indent=1) + "\n"

    def check_tokenizer(self, folder: str | Path) -> None:
        """Raises UserError that names a file of the tokenizer in `folder` that is missing or has changed."""
        for name, expected in (self.tokenizer_sha256 or {}).items():
            path = Path(folder) / TOKENIZER / name
            there = path.is_file()
            if not there or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                state = "has changed since the data was prepared" if there else "is no regular file" if path.exists() else "is missing"
                raise UserError(f"{path}: {state}; copy it again or prepare the data again")

    def files(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and sha256 of each file of the splits."""
        return {file: facts for name, split in self.splits.items() for file, facts in split.files(name).items()}


class TokenStore:
    """The token stream of one split. Positions count tokens from its beginning; `stop` is exclusive, as in a slice.

    Raises UserError when a file is missing, not of the size that the manifest promises, or a link to somewhere else.
    """

    def __init__(self, folder: str | Path, split: Literal["train", "validation"]):
        self.folder, self.split = Path(folder), split
        self.manifest = Manifest.read(folder)
        self.info = self.manifest.splits[split]
        home = self.folder.resolve()
        for name, (expected, _) in self.info.files(split).items():
            path = self.folder / name
            if not path.resolve().is_relative_to(home):
                raise UserError(f"{path}: is a link to {path.resolve()}, outside the folder; put the file itself there")
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                state = f"has {found} bytes" if found is not None else "is no regular file" if path.exists() else "is missing"
                raise UserError(f"{path}: {state}, expected {expected} bytes; copy it again or prepare the data again")
        self._ends = np.cumsum([shard.tokens for shard in self.info.shards])
        self._documents = np.asarray(np.memmap(self.folder / f"{split}.documents", "<u8", "r"))
        self._maps: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        """Tokens in the split."""
        return self.info.tokens

    def sequences(self, length: int) -> int:
        """How many sequences of `length` inputs there are; sequence i is tokens [i * length, (i + 1) * length]."""
        count = (len(self) - 1) // length
        if count < 1:
            larger = " or a larger data.validation_fraction" if self.split == "validation" else ""
            raise UserError(
                f"{self.folder}: the {self.split} split has {len(self)} tokens, not one sequence of {length} and its target;"
                f" lower data.sequence_length, or prepare more text{larger}"
            )
        return count

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids, int64, shape (stop - start,)."""
        return self._read(".tokens", self.info.token_dtype, start, stop)

    def token_bytes(self, start: int, stop: int) -> np.ndarray:
        """Bytes of text behind each token, int64, shape (stop - start,)."""
        return self._read(".bytes", self.info.byte_dtype, start, stop)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in [start, stop) at which a document begins, int64, ascending."""
        first, last = np.searchsorted(self._documents, np.array([start, stop], np.uint64))
        starts = self._documents[first:last].astype(np.int64)
        if len(starts) and not (start <= starts[0] and starts[-1] < stop and (np.diff(starts) > 0).all()):
            raise UserError(f"{self.folder / self.split}.documents: positions do not ascend: the file is damaged; prepare the data again")
        return starts

    def locate(self, position: int) -> tuple[Path, int]:
        """The file that holds a token, and the token's number in it."""
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return self.folder / f"{self.info.shards[shard].name}.tokens", position - self._begin(shard)

    def check_model(self, vocab_size: int) -> None:
        """Raises UserError if the data holds a token for which a model of `vocab_size` rows has none."""
        if self.info.largest_token >= vocab_size:
            raise UserError(
                f"model.vocab_size: {vocab_size} is too small for {self.folder}, whose largest token is {self.info.largest_token};"
                f" set it to {self.manifest.tokenizer.vocab_size} or more, or leave it out"
            )

    def _begin(self, shard: int) -> int:
        return int(self._ends[shard]) - self.info.shards[shard].tokens

    def _read(self, suffix: str, dtype: str, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of {len(self)}")
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        parts = [np.empty(0, np.int64)]
        for shard in range(first, last + 1):
            file = self.info.shards[shard].name + suffix
            if file not in self._maps:
                self._maps[file] = np.asarray(np.memmap(self.folder / file, dtype, "r"))
            begin = self._begin(shard)
            parts.append(self._maps[file][max(start - begin, 0) : stop - begin])
        return np.concatenate(parts)


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
