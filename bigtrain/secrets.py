"""Keeps keys and passwords out of what a run writes. Standard library only.

A secret is text in the shape of a well-known kind of key, or the value of an environment variable that is named like one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

BEGIN, END = "-----BEGIN ", "-----END "  # of a private key, which spans many lines
_NAMES = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET)$|PASSWORD|PASSWD", re.IGNORECASE)
_SHORTEST = 8  # characters of a variable's value: shorter ones stand in ordinary text by chance
_ANYWHERE = {
    "private key": rf"{BEGIN}[A-Z ]*PRIVATE KEY-----(?:[^-]|(?!{END})-)*(?:{END}[A-Z ]*-----)?",
    "password in a URL": r"(?<=://)[^\s/:@]*:[^\s/@]+(?=@)",
}
_AT_A_WORD = {  # apart, because most places in a text are not the beginning of a word
    "bearer token": r"[Bb]earer\s+[\w.~+/-]{20,}=*",
    "API key": r"sk-(?=[\w-]*\d)[\w-]{16,}",
    "Hugging Face token": r"hf_[A-Za-z0-9]{16,}",
    "GitHub token": r"gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}",
    "AWS access key": r"A[KS]IA[A-Z0-9]{16}\b",
    "Slack token": r"xox[a-z]-[\w-]{10,}",
    "Google API key": r"AIza[\w-]{35}",
    "JSON Web Token": r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*",
    # A path may hold 40 such digits: Hugging Face's cache names its folders by commit.
    "wandb key": r"wandb_v\d_\w{20,}|(?<![/.])[0-9a-f]{40}(?![\w/])",
}


def redact(text: str) -> str:
    """`text` with every secret replaced by what it is: `[redacted: HF_TOKEN]`."""
    pattern, names = _secrets()
    return pattern.sub(lambda match: f"[redacted: {names[match.lastindex - 1]}]", text)


def redacted(value: Any) -> Any:
    """A tree of JSON types with every text in it redacted. Do so before it is text: JSON writes some characters otherwise."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(v) for key, v in value.items()}
    return [redacted(v) for v in value] if isinstance(value, (list, tuple)) else value


def kinds(text: str) -> list[str]:
    """What the secrets in a text are."""
    pattern, names = _secrets()
    return [names[match.lastindex - 1] for match in pattern.finditer(text)]


@cache
def _secrets() -> tuple[re.Pattern[str], list[str]]:
    """One pattern with a group for each secret, and what each is: those of this process's environment, as it is when it first asks."""
    return compiled(os.environ)


def compiled(environment: Mapping[str, str]) -> tuple[re.Pattern[str], list[str]]:
    values = {value: name for name, value in environment.items() if _NAMES.search(name) and len(value) >= _SHORTEST}
    # A variable that names a file holds no secret itself; the longest first, where one begins with another.
    secret = {value: values[value] for value in sorted(values, key=len, reverse=True) if not os.path.exists(value)}
    anywhere, at_a_word = (
        "|".join(f"({p})" for p in group) for group in ([*map(re.escape, secret), *_ANYWHERE.values()], _AT_A_WORD.values())
    )
    return re.compile(rf"{anywhere}|\b(?:{at_a_word})"), [*secret.values(), *_ANYWHERE, *_AT_A_WORD]
