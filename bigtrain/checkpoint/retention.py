"""Which checkpoints stay: the newest, every n-th, the best; and always two that are known to be sound."""

from __future__ import annotations

from pathlib import Path

from bigtrain.checkpoint import format, save
from bigtrain.config import Checkpoint
from bigtrain.errors import BigtrainError

SOUND = 2
"""So many of the newest checkpoints that passed verification are never removed."""


def kept(found: list[Path], metrics: dict[Path, float], rules: Checkpoint) -> set[Path]:
    """Those of `found` (oldest first) that `rules` keep. `metrics` has the value of `rules.keep_best` where there is one."""
    stay = set(found[-rules.keep :])
    if rules.keep_every:
        stay |= {path for path in found if format.step_of(path) % rules.keep_every == 0}
    if metrics:
        stay.add(min(metrics, key=lambda path: (metrics[path], -format.step_of(path))))
    return stay


class Kept:
    """The checkpoints of a run, and which of them this process has seen to be sound: it wrote them, or verified them."""

    def __init__(self, folder: Path, rules: Checkpoint):
        self._folder, self._rules = folder, rules
        self._sound: set[Path] = set()

    def trust(self, checkpoint: Path) -> None:
        """Count `checkpoint`, which has just been verified, as sound."""
        self._sound.add(checkpoint)

    def added(self, checkpoint: Path) -> None:
        """Count `checkpoint`, just written and read back, as sound, and remove what need not stay."""
        self.trust(checkpoint)
        self.prune()

    def prune(self, dry: bool = False) -> tuple[list[Path], dict[Path, str]]:
        """Remove what need not stay: (removed, what is wrong with those that are not sound). With `dry`, only say it.

        A checkpoint that cannot be removed is left for the next time.
        """
        found = format.checkpoints(self._folder)
        stay = kept(found, self._metrics(found), self._rules)
        removable = [path for path in found if path not in stay]
        if not removable:
            return [], {}
        sound, damaged = 0, {}
        for path in reversed(found):
            if sound == SOUND:
                break
            if problem := self._problem(path):
                damaged[path] = problem
            else:
                sound += 1
                stay.add(path)
        removed = [path for path in removable if path not in stay and sound == SOUND]
        for path in [] if dry else removed:
            try:
                save.remove(path)
            except OSError as error:
                print(f"bigtrain: {path}: not removed: {error}")
        return removed, damaged

    def _problem(self, path: Path) -> str | None:
        if path not in self._sound:
            try:
                format.verify(path)
            except BigtrainError as error:
                return str(error)
            self._sound.add(path)
        return None

    def _metrics(self, found: list[Path]) -> dict[Path, float]:
        values = {}
        for path in found if self._rules.keep_best else []:
            try:
                metrics = format.read_state(path).metrics
            except BigtrainError:
                continue  # damaged: not the best
            if self._rules.keep_best in metrics:
                values[path] = metrics[self._rules.keep_best]
        return values
