"""Text from a model: one token after the other, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bigtrain.config import Generate
from bigtrain.errors import RunError, UserError


def generate(model: Any, tokenizer: Any, prompt: str, settings: Generate, device: torch.device) -> Iterator[str]:
    """Yield the text that `model` writes after `prompt`, piece by piece, never half a character.

    The sampling is seeded by `settings.seed` and runs on the host, so all ranks that call it together (as ZeRO-3 needs)
    draw the same tokens. It ends after `settings.tokens` tokens, at an end of document, or where the model's positions end.
    Raises UserError for an encoder, and for a prompt that leaves no position free or is no Unicode text; RunError where the
    model's scores are not finite.
    """
    if not model.config.causal:
        raise UserError("generate: this model is an encoder (model.causal: false); it fills masks, it does not continue text")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"generate: the prompt {prompt!r} is not text that UTF-8 can hold; remove the broken character") from None
    ids = [tokenizer.eod_id, *tokenizer.encode(prompt)]
    room = model.config.max_positions - len(ids)
    if room < 1:
        raise UserError(f"generate: the prompt is {len(ids)} tokens long, the model has {model.config.max_positions} positions; shorten it")
    generator = torch.Generator().manual_seed(settings.seed)
    length = min(settings.tokens, room)
    cache = model.new_cache(1, len(ids) + length)
    text = tokenizer.stream()
    new = torch.tensor([ids], device=device)
    for _ in range(length):
        with torch.no_grad():
            logits_V = model(new, cache=cache, last_only=True)[0, -1]
        if not logits_V.isfinite().all():
            raise RunError("generate: the model's scores are not finite; its training has diverged, use an earlier checkpoint")
        token = sample(logits_V.float().cpu()[: tokenizer.vocab_size], settings, generator)
        if token == tokenizer.eod_id:
            break
        if piece := text(token):
            yield piece
        new = torch.tensor([[token]], device=device)
    if rest := text(None):
        yield rest


def sample(logits_V: torch.Tensor, settings: Generate, generator: torch.Generator) -> int:
    """Draw a token: temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2020). Temperature 0: the likeliest."""
    if settings.temperature == 0:
        return int(logits_V.argmax())
    logits_V, order_V = logits_V.double().sort(descending=True)
    logits_V = (logits_V - logits_V[0]) / settings.temperature  # the largest is 0: no temperature makes it overflow
    if settings.top_k:
        logits_V = logits_V[: settings.top_k]
    probability_V = logits_V.softmax(-1)
    # A token stays while the ones before it have not reached p together: at least one always does.
    probability_V = probability_V * (probability_V.cumsum(-1) - probability_V < settings.top_p)
    return int(order_V[torch.multinomial(probability_V, 1, generator=generator)])
