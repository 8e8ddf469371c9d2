"""Predict hidden tokens from both sides (Devlin et al. 2018, "BERT", section 3.1). T: sequence length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bigtrain.config import Config
from bigtrain.data.pack import IGNORE, Sample
from bigtrain.data.shards import TokenizerInfo
from bigtrain.errors import UserError
from bigtrain.tasks.causal import Causal


class Masked(Causal):
    """Of each sequence `train.mask_fraction` of the tokens, at least one, are targets; the end-of-document token never is.

    80% of the targets are hidden behind the mask token, 10% behind a random token, 10% are left as they are. What is
    hidden is a function of (seed, position of the sequence): the same on any number of ranks, new in every epoch.
    """

    def __init__(self, config: Config, tokenizer: TokenizerInfo):
        super().__init__(config)
        if tokenizer.mask_id is None:
            raise UserError("train.task: masked needs a tokenizer with a mask token; set data.tokenizer to bytes, bpe or one that has it")
        if (rows := config.model.vocab_size) and rows < tokenizer.vocab_size:  # a hidden token may become any other
            raise UserError(f"model.vocab_size: {rows} is too small for train.task masked; set it to {tokenizer.vocab_size} or more")
        self.tokenizer = tokenizer
        self.seed, self.mask_fraction = config.train.seed, config.train.mask_fraction

    def batch(self, samples: Sequence[Sample], positions: Sequence[int]) -> dict[str, Any]:
        hidden = [self._hide(sample, position) for sample, position in zip(samples, positions)]
        return {**super().batch(hidden, positions), "byte_count": 0}

    def _hide(self, sample: Sample, position: int) -> Sample:
        if (sample.target_T == IGNORE).all():
            return sample
        random = np.random.default_rng([self.seed, position])
        candidates = np.flatnonzero(sample.token_T != self.tokenizer.eod_id)
        chosen = random.permutation(candidates)[: max(1, round(self.mask_fraction * len(candidates)))]
        fate = random.random(len(chosen))
        tokens = np.where(fate < 0.9, random.integers(self.tokenizer.vocab_size, size=len(chosen)), sample.token_T[chosen])
        token_T, target_T = sample.token_T.copy(), np.full_like(sample.target_T, IGNORE)
        token_T[chosen] = np.where(fate < 0.8, self.tokenizer.mask_id, tokens)
        target_T[chosen] = sample.token_T[chosen]
        return sample._replace(token_T=token_T, target_T=target_T)
