"""The same global batches through one layout after the other: losses and updated weights for test_invariance.py."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from training import close, config, tensors, trainer

STEPS, LENGTH = 3, 32
EPS = 1e-4  # AdamW divides by the gradient's size: with a smaller eps it blows rounding of gradients near zero up to a whole step


CLIP = {"adamw": 0.5, "sgd": None}  # a clipped step is blind to the gradient's scale, and so is AdamW: SGD without it is not


def documents(step: int) -> list[torch.Tensor]:
    """Eight documents of one global batch; with 2 to 17 tokens their numbers of targets are very uneven."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, 300, (length,), generator=generator) for length in (17, 2, 16, 15, 3, 12, 2, 13)]


def rows(step: int, packed: bool) -> dict[str, torch.Tensor]:
    """The documents of a step as padded rows, one each, or packed two and more to a row."""
    groups = [[17, 2, 3], [16, 15], [12, 2, 13]] if packed else None
    texts = documents(step)
    if groups:
        by_length: dict[int, list[torch.Tensor]] = {}
        for text in texts:
            by_length.setdefault(len(text), []).append(text)
        placed = [[by_length[length].pop(0) for length in group] for group in groups]
    else:
        placed = [[text] for text in texts]
    made: dict[str, list] = {"token": [], "target": [], "position": [], "document": []}
    for group in placed:
        token, target = torch.zeros(LENGTH, dtype=torch.int64), torch.full((LENGTH,), -100)
        position, document = torch.zeros(LENGTH, dtype=torch.int64), torch.full((LENGTH,), -1, dtype=torch.int32)
        at = 0
        for number, text in enumerate(group):
            n = len(text) - 1
            token[at : at + n], target[at : at + n] = text[:-1], text[1:]
            position[at : at + n], document[at : at + n] = torch.arange(n), number
            at += n
        for key, value in (("token", token), ("target", target), ("position", position), ("document", document)):
            made[key].append(value)
    return {key: torch.stack(value) for key, value in made.items()}


def micro_batches(step: int, packed: bool, batch, rank: int) -> list[dict]:
    """This rank's part, laid out as the loader does; places left over are rows of weight zero."""
    whole = rows(step, packed)
    made = []
    for a in range(batch.accumulation):
        first = (a * batch.ranks + rank) * batch.micro_batch
        places = [i for i in range(first, first + batch.micro_batch) if i < len(whole["token"])]
        part = {key: value[places] for key, value in whole.items()}
        missing = batch.micro_batch - len(places)
        if missing:
            empty = {"token": 0, "target": -100, "position": 0, "document": -1}
            part = {k: torch.cat([v, torch.full((missing, LENGTH), empty[k], dtype=v.dtype)]) for k, v in part.items()}
        made.append({**part, "count": int((part["target"] != -100).sum()), "byte_count": 0, "first_position": first})
    return made


def train(world, folder: Path, data: str, layouts: list) -> dict[str, list[list[float]]]:
    """For each (stage, accumulation, packed, optimizer): losses and gradient norms; the weights after STEPS go into a checkpoint."""
    losses = {}
    for stage, accumulation, packed, optimizer in layouts:
        name = f"{world.size}-{stage}-{accumulation}-{packed}-{optimizer}"
        sequences = 3 if packed else 8
        settings = config(
            Path(data),
            run={"name": name, "folder": str(folder / "runs")},
            train={"steps": STEPS, "global_batch": sequences, "micro_batch": None, "accumulation": accumulation, "clip": CLIP[optimizer]},
            optimizer={"lr": 0.01, "name": optimizer, "eps": EPS},
            zero={"stage": stage},
            schedule={"name": "constant", "warmup_steps": 0},
        )
        t = trainer(settings, world)
        seen: list[list[float]] = []
        t.report.step = lambda row, seen=seen: seen.append([row["loss"], row["grad_norm"]])
        for step in range(STEPS):
            t.unlogged = t.train_step(micro_batches(step, packed, t.batch, world.rank), time.perf_counter())
            t.progress.step += 1
            t.finish_step()
        losses[name] = seen
        t.saving.save(t.progress, t.evaluated)
        close(t)
    return losses


def reference(optimizer: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The same three steps in float64 in a few lines of plain torch: no DeepSpeed, no trainer, one document at a time."""
    from training import MODEL

    from bigtrain.config import Model
    from bigtrain.model.initialise import initialise
    from bigtrain.model.transformer import Transformer

    model = Transformer(Model(**MODEL), MODEL["vocab_size"])
    initialise(model, 0)
    model.double()
    decay = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    made = (
        torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=EPS)
        if optimizer == "adamw"
        else torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    )
    losses = []
    for step in range(STEPS):
        total, count = 0.0, 0
        for text in documents(step):
            logits = model(text[None, :-1])[0]
            total = total + torch.nn.functional.cross_entropy(logits, text[1:], reduction="sum")
            count += len(text) - 1
        loss = total / count
        made.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP[optimizer] or float("inf"))
        made.step()
        losses.append([loss.item(), norm.item()])
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    [checkpoint] = (folder / "runs" / name / "checkpoints").iterdir()
    return {key.split("|")[0]: value for key, value in tensors(checkpoint).items() if key.endswith("|model")}
