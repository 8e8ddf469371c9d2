"""What the tests of hostile files share: a place with good files to be spoilt, and cases that spoil them.

Each case plants something and reads it the way a command does. Either one clear line comes out, or the reading does no harm. What is
planted would create the canary file if it were run.
"""

from __future__ import annotations

import inspect
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigtrain import configfile
from bigtrain.config import Config
from bigtrain.errors import BigtrainError

CONFIG = """\
model: {layers: 1, width: 8, heads: 1, mlp_width: 8, max_positions: 16}
data: {source: text, path: FOLDER/text, tokenizer: bytes, folder: FOLDER/data, sequence_length: 16, validation_fraction: 0.3}
train: {steps: 2, global_batch: 2, micro_batch: 1}
optimizer: {lr: 0.1}
"""
BILLION = "a: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))


class Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Place:
    """A folder with a good config c.yaml and its data, to be spoilt."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.canary = folder / "canary"
        self.pickle = pickle.dumps(Bomb(self.canary))
        self.command = f"touch {self.canary}"
        self.data = folder / "data"

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def fifo(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path

    def link(self, name: str, target: str | Path) -> Path:
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        return path

    def config(self, more: str = "", **replaced: str) -> Config:
        text = (self.folder / "c.yaml").read_text()
        for old, new in replaced.items():
            text = text.replace(old, new)
        return configfile.load(self.write("changed.yaml", text + more))


class Cases(dict[str, tuple[Callable[..., Any], str | None, bool]]):
    """Attacks by name, each with what its one line must say."""

    def add(self, name: str, attack: Callable[..., Any], says: str | None, harmless: bool = False) -> None:
        """`attack` is called with the fixtures that its parameters name. `says` None, or `harmless`: what it plants may also be read,
        without harm."""
        assert name not in self
        self[name] = attack, says, harmless or says is None

    def case(self, says: str | None, harmless: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a function by its name."""

        def register(attack: Callable[..., Any]) -> Callable[..., Any]:
            self.add(attack.__name__, attack, says, harmless)
            return attack

        return register

    def attempt(self, name: str, place: Place, request: Any) -> None:
        """Carry one out in `place`; `request` is pytest's."""
        attack, says, harmless = self[name]
        message = None
        try:
            attack(**{fixture: request.getfixturevalue(fixture) for fixture in inspect.signature(attack).parameters})
        except BigtrainError as error:
            message = str(error)
        assert not place.canary.exists(), "it was run"
        assert harmless or message is not None, "nothing was said"
        if message is not None:
            assert says and re.search(says, message), message
            assert "\n" not in message and len(message) < 1000, message
