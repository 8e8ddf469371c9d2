"""Before the first step: is the data there, does it fit, and is this a new run, one to resume, or one that is done?

Nothing here imports torch: `bigtrain train` answers these questions before it starts any process, and rank 0 asks again
when another launcher started it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain import configfile
from bigtrain.checkpoint import format
from bigtrain.config import MAY_DIFFER_ON_RESUME, Config, differences
from bigtrain.data import tokenizer as tokenizers
from bigtrain.data.shards import TOKENIZER, TokenStore
from bigtrain.errors import RunError, UserError
from bigtrain.lease import Lease
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
        if not self.checkpoints:
            return False
        try:
            format.verify(self.checkpoints[-1], None)
            return format.read_state(self.checkpoints[-1]).done
        except RunError:  # damaged: the ranks will say so, and go on from an earlier one
            return False


def with_data(config: Config) -> Config:
    """`config` with the vocabulary size that its prepared data implies, checked against the data.

    Raises UserError when the data is not there, is too short, has another tokenizer than it was prepared with, or holds tokens that
    the model has no row for, and for prompts that the model could not continue.
    """
    stores = [TokenStore(config.data.folder, split) for split in ("train", "validation")]
    stores[0].manifest.check_tokenizer(config.data.folder)
    if config.model.vocab_size is None:
        rows = -(-stores[0].manifest.tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": rows})})
    for store in stores:
        store.sequences(config.data.sequence_length)
        store.check_model(config.model.vocab_size)
    if config.generate.prompts:
        _check_prompts(config)
    return config


def _check_prompts(config: Config) -> None:
    """Refuse now what would end the run at its first evaluation."""
    if not config.model.causal:
        raise UserError("generate.prompts: an encoder (model.causal: false) does not continue text; remove them")
    tokenizer = tokenizers.load(Path(config.data.folder) / TOKENIZER)
    for prompt in config.generate.prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"generate.prompts: {prompt!r} is not text that UTF-8 can hold; remove the broken character") from None
        tokens, room = 1 + len(tokenizer.encode(prompt)), config.model.max_positions  # the end-of-document token comes first
        if tokens >= room:
            raise UserError(f"generate.prompts: {prompt[:40]!r} is {tokens} tokens long, the model has {room} positions; shorten it")


def open_run(config: Config) -> Start:
    """Look at the run's folder. Raises UserError when it holds a run of another config, naming the differences, and when a
    new run's `init.checkpoint` is of another model."""
    run = RunFolder(Path(config.run.folder) / config.run.name)
    if not run.config.is_file():
        if format.checkpoints(run.checkpoints):
            raise UserError(f"{run.config}: missing beside the checkpoints of a run; bring it back, or pass --new to start beside it")
        _check_init(config)
        return Start(run, [])
    # What a crash leaves unfinished has no manifest where that is what counts; elsewhere its loss is damage, and said.
    start = Start(run, format.checkpoints(run.checkpoints, complete=config.checkpoint.commit == "file"))
    if not start.checkpoints:
        _check_init(config)
        if not run.metrics.is_file():  # it has failed before its first step: whatever is tried next is tried here
            return start
    changed = differences(configfile.load_saved(run.config), config, ignore=MAY_DIFFER_ON_RESUME)
    if changed:
        shown = "\n  ".join(changed[:12]) + (f"\n  and {len(changed) - 12} more" if len(changed) > 12 else "")
        raise UserError(
            f"{run.path} holds a run of another config:\n  {shown}\n"
            "Pass --new to start beside it, or run.name=NAME, or take the changes back"
        )
    return start


# What fine-tuning may change of the model that it starts from: how it is trained, not what its weights mean.
_MAY_DIFFER_FROM_INIT = {"dropout", "activation_checkpointing", "init_std", "rope_theta"}


def _check_init(config: Config) -> None:
    """Refuse weights of another model. Two models can have parameters of the same shapes: an encoder and a decoder, say."""
    if config.init.checkpoint is None:
        return
    try:
        checkpoint = format.find(Path(config.init.checkpoint))
    except UserError as error:
        raise UserError(f"init.checkpoint: {error}") from None
    there, here = _meaning(configfile.load_saved(checkpoint / "config.yaml")), _meaning(config)
    changed = [f"model.{key}: {there[key]} -> {here[key]}" for key in here if there[key] != here[key]]
    if changed:
        raise UserError(f"init.checkpoint: {checkpoint} holds another model ({'; '.join(changed)}); use its config.yaml's model section")


def _meaning(config: Config) -> dict[str, Any]:
    model = config.model
    told = model.model_dump(exclude=_MAY_DIFFER_FROM_INIT | ({"max_positions"} if model.positions == "rope" else set()))
    return told | {"kv_heads": model.kv_heads_, "head_dim": model.head_dim_}


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


def create(config: Config, run: RunFolder, owner: str | None = None, say: Callable[[str], None] = print) -> Lease:
    """Make the run's folder, or freshen its config: a resumed run may differ in what does not change the numbers.

    No other process can train the run until the lease that this returns is closed; `owner` and `say` are as for Lease.take.
    Raises UserError when one does already, and when the folder cannot be written.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lease = Lease.take(run, config.launch.lease, owner, say)
        write_atomically(run.config, configfile.dump(config))
    except OSError as error:
        raise UserError(f"run.folder: {run.path} cannot be written ({error.strerror}); set another folder, or make room") from None
    return lease
