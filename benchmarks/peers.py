"""The loops that people would write instead of using bigtrain: one rank of one of them, started by throughput.py.

    python benchmarks/peers.py VARIANT FOLDER

FOLDER/work.json is a whole bigtrain config (precision bf16 or fp32) with what throughput.py adds: `tokens` (file of the
training tokens), `token_dtype`, `deepspeed` (the settings that bigtrain derives) and `device` (cpu, cuda). Ranks come from
RANK, WORLD_SIZE and LOCAL_RANK. The rank leaves FOLDER/rank-N.json: `step_ends` (seconds since 1970, one a step), `losses`,
and `device_gib` (peak memory of its GPU, 0 on a CPU).

Every loop does the same in a step: forward, loss, backward, clip, optimizer, zero the gradients, read the loss. Nothing of
bigtrain runs in it but its model in the variants called *-ours. A variant imports only what it needs: the time to its first
step is measured too.

B batch, T sequence length.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

Work = dict[str, Any]
Record = tuple[list[float], list[float]]
"""When each step ended, seconds since 1970; the losses that were read."""

RANK, RANKS, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


class Sequences(torch.utils.data.Dataset):
    """Sequence i: (input, target), int64, shape (T,) each, of the same token file that bigtrain reads."""

    def __init__(self, work: Work):
        self.T = work["data"]["sequence_length"]
        self.tokens = np.memmap(work["tokens"], work["token_dtype"], "r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.T

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        window = torch.from_numpy(self.tokens[i * self.T : (i + 1) * self.T + 1].astype(np.int64))
        return window[:-1], window[1:]


def batches(work: Work) -> Iterator[tuple[Tensor, Tensor]]:
    """`train.steps` batches of (token_BT, target_BT) for this rank, on its device; the data begins again where it ends."""
    data = Sequences(work)
    sampler = torch.utils.data.DistributedSampler(data, RANKS, RANK)
    loader = torch.utils.data.DataLoader(data, work["train"]["micro_batch"], sampler=sampler, drop_last=True)
    for token_BT, target_BT in islice(chain.from_iterable(repeat(loader)), work["train"]["steps"]):
        yield token_BT.to(device(work)), target_BT.to(device(work))


def device(work: Work) -> torch.device:
    return torch.device("cpu") if work["device"] == "cpu" else torch.device("cuda", LOCAL_RANK)


class OurModel(nn.Module):
    """bigtrain's transformer, initialised; called as model(token_BT, target_BT) it gives the mean loss."""

    def __init__(self, work: Work):
        super().__init__()
        from bigtrain.config import Model
        from bigtrain.model.initialise import initialise
        from bigtrain.model.transformer import Transformer

        config = Model.model_validate(work["model"])
        self.model = Transformer(config, config.vocab_size)
        initialise(self.model, work["train"]["seed"])

    def forward(self, token_BT: Tensor, target_BT: Tensor) -> Tensor:
        loss_sum, count = self.model(token_BT, target_BT=target_BT)
        return loss_sum / count


class LlamaModel(nn.Module):
    """transformers' Llama of the same shape; called as model(token_BT, target_BT) it gives the mean loss."""

    def __init__(self, work: Work):
        super().__init__()
        self.model = llama(work)

    def forward(self, token_BT: Tensor, target_BT: Tensor) -> Tensor:
        return self.model(input_ids=token_BT, labels=target_BT, shift_labels=target_BT).loss


def llama(work: Work) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = work["model"]
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=shape["max_positions"],
        rms_norm_eps=shape["norm_eps"],
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(work["train"]["seed"])
    return LlamaForCausalLM(config)


def adamw(model: nn.Module, work: Work) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not: as bigtrain and the Trainer have it."""
    settings, parameters = work["optimizer"], list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"], fused=True)


def torch_loop(build: Callable[[Work], nn.Module], work: Work) -> Record:
    """Plain PyTorch: float32 weights, bf16 by autocast, DistributedDataParallel on several ranks."""
    model = build(work).to(device(work))
    if RANKS > 1:
        dist.init_process_group("gloo" if work["device"] == "cpu" else "nccl")
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = adamw(model, work)
    bf16 = work["precision"] == "bf16"
    ends, losses = [], []
    for token_BT, target_BT in batches(work):
        with torch.autocast(work["device"], torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model(token_BT, target_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), work["train"]["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        ends.append(time.time())
    return ends, losses


def deepspeed_loop(build: Callable[[Work], nn.Module], work: Work) -> Record:
    """Plain DeepSpeed: ZeRO-2 with bigtrain's settings; bf16 weights with a float32 master, or float32."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo" if work["device"] == "cpu" else "nccl", verbose=False)
    model = build(work)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model, work), config=work["deepspeed"], dist_init_required=False)
    ends, losses = [], []
    for token_BT, target_BT in batches(work):
        loss = engine(token_BT, target_BT)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        ends.append(time.time())
    return ends, losses


def trainer(work: Work, deepspeed: bool = False) -> Record:
    """Hugging Face's Trainer over the Llama, with its defaults for what bigtrain has no counterpart of."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    arguments = TrainingArguments(
        output_dir=work["folder"],
        max_steps=work["train"]["steps"],
        per_device_train_batch_size=work["train"]["micro_batch"],
        bf16=work["precision"] == "bf16",
        use_cpu=work["device"] == "cpu",
        ddp_backend="gloo" if work["device"] == "cpu" else None,
        deepspeed=work["deepspeed"] if deepspeed else None,
        optim="adamw_torch_fused",
        learning_rate=work["optimizer"]["lr"],
        weight_decay=work["optimizer"]["weight_decay"],
        adam_beta1=work["optimizer"]["betas"][0],
        adam_beta2=work["optimizer"]["betas"][1],
        adam_epsilon=work["optimizer"]["eps"],
        max_grad_norm=work["train"]["clip"],
        lr_scheduler_type="constant",
        logging_steps=10,
        report_to=[],
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
        seed=work["train"]["seed"],
    )

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if work["device"] == "cuda":
                torch.cuda.synchronize()  # the other loops wait for the loss here
            ends.append(time.time())

    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        token_BT, target_BT = (torch.stack(rows) for rows in zip(*samples))
        return {"input_ids": token_BT, "labels": target_BT, "shift_labels": target_BT}

    hf = Trainer(llama(work), arguments, data_collator=collate, train_dataset=Sequences(work), callbacks=[Clock()])
    hf.train()
    return ends, [row["loss"] for row in hf.state.log_history if "loss" in row]


PEERS: dict[str, Callable[[Work], Record]] = {
    "torch-ours": lambda work: torch_loop(OurModel, work),
    "torch-llama": lambda work: torch_loop(LlamaModel, work),
    "trainer": trainer,
    "trainer-deepspeed": lambda work: trainer(work, deepspeed=True),
    "deepspeed-ours": lambda work: deepspeed_loop(OurModel, work),
    "deepspeed-llama": lambda work: deepspeed_loop(LlamaModel, work),
}


def main(variant: str, folder: Path) -> None:
    work = json.loads((folder / "work.json").read_text(encoding="utf-8")) | {"folder": str(folder)}
    if work["device"] == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    ends, losses = PEERS[variant](work)
    peak = torch.cuda.max_memory_reserved() / 2**30 if work["device"] == "cuda" else 0.0
    record = {"step_ends": ends, "losses": losses, "device_gib": peak}
    (folder / f"rank-{RANK}.json").write_text(json.dumps(record), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PEERS:
        sys.exit(f"usage: python benchmarks/peers.py VARIANT FOLDER, where VARIANT is {', '.join(PEERS)}")
    main(sys.argv[1], Path(sys.argv[2]))
