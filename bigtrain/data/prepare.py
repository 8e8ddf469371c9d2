"""Text to shards, once: read, hash, tokenise, shuffle by hash, write, and put in place with one rename.

The hash of a document's text decides everything about it: its split, its place in the stream, and that a second copy
is left out. So the result depends on the texts alone, not on the order in which they were found.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from bigtrain.config import Data
from bigtrain.data import tokenizer as tokenizers
from bigtrain.data.shards import MANIFEST, SPLITS, TOKENIZER, Manifest, Shard, Split, TokenizerInfo
from bigtrain.data.source import Document, documents, roots
from bigtrain.errors import RunError, UserError

# Keys of the data config that decide what is in the folder; the others decide how it is read.
PREPARATION = ("source", "path", "field", "tokenizer", "bpe_vocab_size", "validation_fraction", "shard_tokens")

_BATCH_CHARACTERS = 1 << 22  # text tokenised at a time: enough to keep every core busy

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many documents it has been done to, and to how many it will be (None: not known)."""


def prepare(data: Data, progress: Progress = lambda stage, done, total: None) -> Path:
    """Prepare `data` into `data.folder`, or return at once if it is there already.

    Text streams through; per document some 50 bytes stay in memory, and while it runs the disk holds about three times the
    result. A single document must fit in memory, tokenised. Nothing is left behind by a failure short of a kill,
    after which FOLDER.partial-PID may be removed.

    Raises UserError for a folder that holds anything else, for text or a tokenizer that cannot be read, and for a split
    that would be empty; RunError when the disk is full or cannot be written.
    """
    folder = Path(data.folder)
    if (folder / MANIFEST).exists():
        return _same(folder, data)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"data.folder: {folder} exists and holds no prepared data; set another folder, or remove it")
    for root in roots(data):
        if folder.resolve().is_relative_to(root.resolve()):
            raise UserError(f"data.folder: {folder} is inside data.path {root}, which would read what it writes; set another folder")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write(data, partial, progress)
        _sync(partial)
        try:
            os.rename(partial, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return _same(folder, data)  # another process has prepared it meanwhile
    except OSError as error:
        raise RunError(
            f"data.folder: {folder} cannot be written ({error.strerror}); make room or set another folder. Nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _same(folder: Path, data: Data) -> Path:
    there, wanted = Manifest.read(folder).data, data.model_dump(include=set(PREPARATION))
    changes = [f"data.{key}: {there.get(key)} -> {wanted[key]}" for key in PREPARATION if there.get(key) != wanted[key]]
    if changes:
        raise UserError(f"data.folder: {folder} was prepared from another config ({'; '.join(changes)}); set another folder, or remove it")
    return folder


def _write(data: Data, folder: Path, progress: Progress) -> None:
    threshold = np.uint64(data.validation_fraction * 2**64)
    tokenizer = _tokenizer(data, int(threshold), progress)
    tokenizer.save(folder / TOKENIZER)
    # Tokens lie in the spool as they came, until all hashes are known and say where each document belongs.
    with open(folder / "spool.tokens", "w+b") as tokens, open(folder / "spool.bytes", "w+b") as counts:
        hashes, lengths, largest_count = _spool(data, tokenizer, tokens, counts, progress)
        offsets = np.cumsum(lengths) - lengths
        order = np.unique(hashes, return_index=True)[1]  # by hash, the first of each
        held_out = hashes[order] < threshold
        parts = {"train": order[~held_out], "validation": order[held_out]}
        _refuse_empty(parts, hashes, data)
        byte_dtype = np.min_scalar_type(largest_count).newbyteorder("<")
        token_dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        spool = np.asarray(np.memmap(tokens, "<u4", "r")), np.asarray(np.memmap(counts, "<u4", "r"))
        splits = {}
        for split in SPLITS:
            chosen = parts[split]
            writer = _Writer(folder, split, token_dtype, byte_dtype, data.shard_tokens)
            for done, d in enumerate(chosen, 1):
                where = slice(int(offsets[d]), int(offsets[d] + lengths[d]))
                writer.document(spool[0][where], spool[1][where])
                progress(f"write {split}", done, len(chosen))
            splits[split] = writer.close()
    for name in ("spool.tokens", "spool.bytes"):
        (folder / name).unlink()
    info = TokenizerInfo(
        fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, mask_id=tokenizer.mask_id
    )
    manifest = Manifest(
        data=data.model_dump(include=set(PREPARATION)),
        duplicates=len(hashes) - len(order),
        tokenizer=info,
        tokenizer_sha256={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / TOKENIZER).iterdir())},
        splits=splits,
    )
    (folder / MANIFEST).write_text(manifest.text(), encoding="utf-8")


def _tokenizer(data: Data, threshold: int, progress: Progress) -> tokenizers.Tokenizer:
    if data.tokenizer == "bytes":
        return tokenizers.Bytes()
    if data.tokenizer != "bpe":
        return tokenizers.from_hugging_face(data.tokenizer)

    def training_texts() -> Iterator[str]:  # the held-out documents are held out of the vocabulary too
        for done, document in enumerate(documents(data), 1):
            if _hash(document.text) >= threshold:
                yield document.text
            progress("train tokenizer", done, None)

    return tokenizers.train_bpe(training_texts(), data.bpe_vocab_size)


def _spool(data: Data, tokenizer: tokenizers.Tokenizer, tokens, counts, progress: Progress) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokenise every document into the two files (uint32). Gives hashes (uint64), lengths (int64), the largest count."""
    hashes, lengths, largest, done = array("Q"), array("q"), 0, 0
    eod, nothing = np.array([tokenizer.eod_id], "<u4"), np.zeros(1, "<u4")
    for batch in _batches(documents(data)):
        for text, (ids, byte_counts) in zip(batch, tokenizer.encode_batch(batch)):
            if len(ids):  # a tokenizer may see nothing in white space
                hashes.append(_hash(text))
                lengths.append(len(ids) + 1)
                largest = max(largest, int(byte_counts.max()))
                for file, first, rest in ((tokens, eod, ids), (counts, nothing, byte_counts)):
                    file.write(first)
                    file.write(rest.astype("<u4", copy=False))
        done += len(batch)
        progress("tokenise", done, None)
    if not hashes:
        raise UserError(f"data.tokenizer {data.tokenizer} finds no token in the text of data.source {data.source}; check both")
    tokens.flush()
    counts.flush()
    return np.asarray(hashes), np.asarray(lengths), largest


def _batches(stream: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in stream:
        batch.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _refuse_empty(parts: dict[str, np.ndarray], hashes: np.ndarray, data: Data) -> None:
    for split, chosen in parts.items():
        if not len(chosen):
            edge = np.unique(hashes)[:2] if split == "validation" else np.unique(hashes)[-2:]
            advice = f", or a fraction of {edge.mean() / 2**64:.6f}" if len(edge) == 2 else ""
            raise UserError(
                f"data.validation_fraction: {data.validation_fraction} leaves the {split} split without any of the {len(hashes)} documents;"
                f" give more documents{advice}"
            )


class _Writer:
    """Cuts one split's stream into shards of `shard_tokens` tokens, with the checksums that the manifest holds."""

    def __init__(self, folder: Path, split: str, token_dtype: np.dtype, byte_dtype: np.dtype, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtypes = {"tokens": token_dtype, "bytes": byte_dtype}
        self.shards: list[Shard] = []
        self.starts = array("Q")
        self.total = self.bytes = self.largest = self.filled = 0
        self.files: dict[str, _HashedFile] = {}

    def document(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        self.starts.append(self.total)
        self.total += len(tokens)
        self.bytes += int(counts.sum())
        self.largest = max(self.largest, int(tokens.max()))
        while len(tokens):
            if not self.files:
                self.files = {kind: _HashedFile(self.folder / f"{self._name}.{kind}") for kind in self.dtypes}
            room = self.shard_tokens - self.filled
            for kind, values in (("tokens", tokens[:room]), ("bytes", counts[:room])):
                self.files[kind].write(values.astype(self.dtypes[kind]))
            self.filled += len(tokens[:room])
            tokens, counts = tokens[room:], counts[room:]
            if self.filled == self.shard_tokens:
                self._finish_shard()

    def close(self) -> Split:
        if self.files:
            self._finish_shard()
        documents = _HashedFile(self.folder / f"{self.split}.documents")
        documents.write(np.asarray(self.starts).astype("<u8"))
        return Split(
            documents=len(self.starts),
            tokens=self.total,
            bytes=self.bytes,
            largest_token=self.largest,
            token_dtype=self.dtypes["tokens"].str,
            byte_dtype=self.dtypes["bytes"].str,
            shards=self.shards,
            documents_sha256=documents.close(),
        )

    @property
    def _name(self) -> str:
        return f"{self.split}-{len(self.shards):05d}"

    def _finish_shard(self) -> None:
        sums = {f"{kind}_sha256": file.close() for kind, file in self.files.items()}
        self.shards.append(Shard(name=self._name, tokens=self.filled, **sums))
        self.files, self.filled = {}, 0


class _HashedFile:
    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (it outlives this function; close() closes it)
        self.sha256 = hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        self.file.write(values)
        self.sha256.update(values)

    def close(self) -> str:
        self.file.close()
        return self.sha256.hexdigest()


def _sync(folder: Path) -> None:
    """Make every file durable before the rename that makes them visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
