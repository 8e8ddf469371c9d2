"""From a window of the token stream to one training sequence. T: sequence length."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORE = -100  # target of a position that is not predicted (PyTorch's ignore_index)


class Sample(NamedTuple):
    """One sequence. Each array has shape (T,) and dtype int64, `document_T` int32."""

    token_T: np.ndarray
    target_T: np.ndarray
    """The token after each position, or IGNORE."""
    position_T: np.ndarray
    """Distance from the start of the document, or of the window for the document that it opens in the middle of."""
    document_T: np.ndarray
    """Number of the document within the window, from 0."""
    target_bytes_T: np.ndarray
    """UTF-8 bytes behind each target."""


def pack(window: np.ndarray, window_bytes: np.ndarray, starts: np.ndarray, document_mask: bool) -> Sample:
    """Inputs and the targets that follow them, from T + 1 tokens and the byte counts behind each.

    `starts` are the offsets in the window at which a document begins (one at 0 may be listed or not, one at T is of no
    effect). Without `document_mask` the window is one document.
    """
    T = len(window) - 1
    position = np.arange(T)
    document = np.zeros(T, np.int32)
    if document_mask:
        starts = starts[(starts > 0) & (starts < T)]
        document[starts] = 1
        document = np.cumsum(document, dtype=np.int32)
        position = position - np.concatenate(([0], starts))[document]
    return Sample(window[:-1].astype(np.int64), window[1:].astype(np.int64), position, document, window_bytes[1:].astype(np.int64))


def padding(T: int) -> Sample:
    """A sequence of weight zero: it fills a place of a batch and predicts nothing."""
    zeros = np.zeros(T, np.int64)
    return Sample(zeros, np.full(T, IGNORE), np.arange(T), zeros.astype(np.int32), zeros)
