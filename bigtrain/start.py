"""Before the first step: is the data there, does it fit, and is this a new run, one to resume, or one that is done?

Nothing here imports torch: `bigtrain train` answers these questions before it starts any process, and rank 0 asks again
when another launcher started it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bigtrain import configfile
from bigtrain.checkpoint import format
from bigtrain.config import MAY_DIFFER_ON_RESUME, Config, differences
from bigtrain.data.shards import TokenStore
from bigtrain.errors import UserError
from bigtrain.runfolder import RunFolder, write_atomically

VOCAB_MULTIPLE = 64  # rows of the embedding: a multiple of the tensor cores' tile


@dataclass(frozen=True)
class Start:
    """What `open_run` decided: where the run lives, and what it can go on from."""

    run: RunFolder
    checkpoints: list[Path]
    """Complete checkpoints, newest last; empty for a run that starts from nothing."""

    @property
    def done(self) -> bool:
        """The run has reached its end: nothing is left to train."""
        return bool(self.checkpoints) and format.read_json(self.checkpoints[-1] / "state.json")["done"]


def with_data(config: Config) -> Config:
    """`config` with the vocabulary size that its prepared data implies, checked against the data.

    Raises UserError when the data is not there, is too short, or holds tokens that the model has no row for.
    """
    store, held_out = (TokenStore(config.data.folder, split) for split in ("train", "validation"))
    length = config.data.sequence_length
    for split, tokens in (("training", store), ("validation", held_out)):
        if tokens.sequences(length) < 1:
            raise UserError(
                f"data.sequence_length: {length} is longer than the {split} split of {config.data.folder}, {len(tokens):,} tokens;"
                " shorten it, or prepare more data"
            )
    if config.model.vocab_size is None:
        rows = -(-store.manifest.tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": rows})})
    store.check_model(config.model.vocab_size)
    held_out.check_model(config.model.vocab_size)
    return config


def open_run(config: Config) -> Start:
    """Look at the run's folder. Raises UserError when it holds a run of another config, naming the differences."""
    run = RunFolder(Path(config.run.folder) / config.run.name)
    if not run.config.is_file():
        return Start(run, [])
    changed = differences(configfile.load(run.config), config, ignore=MAY_DIFFER_ON_RESUME)
    if changed:
        shown = "\n  ".join(changed[:12]) + (f"\n  and {len(changed) - 12} more" if len(changed) > 12 else "")
        raise UserError(
            f"{run.path} holds a run of another config:\n  {shown}\nPass --new to start beside it, or run.name=NAME, or take the changes back"
        )
    return Start(run, format.checkpoints(run.checkpoints))


def new_name(config: Config) -> Config:
    """`config` with the first of NAME, NAME-2, NAME-3, ... whose folder is not there yet."""
    name, number = config.run.name, 1
    while (Path(config.run.folder) / name).exists():
        number += 1
        name = f"{config.run.name}-{number}"
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def complete(start: Start) -> str:
    """What to say of a run that has reached its end."""
    step = format.step_of(start.checkpoints[-1])
    return f"{start.run.path} is complete at step {step}; look at {start.run.report}, or pass --new to train again beside it"


def create(config: Config, run: RunFolder) -> None:
    """Make the run's folder, or freshen its config: a resumed run may differ in what does not change the numbers."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomically(run.config, configfile.dump(config))
    except OSError as error:
        raise UserError(f"run.folder: {run.path} cannot be written ({error.strerror}); set another folder, or make room") from None
