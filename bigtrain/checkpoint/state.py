"""The one adapter to DeepSpeed's private state: which flat pieces of which parameters this rank's optimizer holds.

Every ZeRO stage steps flat float32 tensors. What differs is which parameters lie where in them:

    stage 0, float32      the parameters themselves, whole on every rank
    stage 0, bf16/fp16    `fp32_groups`, a float32 copy of each parameter, whole on every rank
    stage 1 and 2         one flat partition per parameter group; `param._hp_mapping` says which piece of it is whose
    stage 3               one flat partition per sub-group; each parameter's piece is ceil(numel / ranks) long
    frozen parameters     the model's own: whole on every rank, at stage 3 this rank's piece, in the precision of the model

`partitions` describes all of them in the same words, as views of the live tensors, so that saving reads them, loading
fills them and the moving average follows them without knowing the stage. Attributes of DeepSpeed 0.19 that begin with
an underscore are named in this file alone; tests/distributed/test_state.py compares them with DeepSpeed's public,
gathering accessors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed import comm as ds_comm


@dataclass
class Piece:
    """`length` elements of the flattened parameter `name` from `offset`, at `start` of a partition."""

    name: str
    offset: int
    length: int
    start: int


@dataclass
class Partition:
    """One flat tensor, float32 where the optimizer steps it on this rank; without an optimizer, a frozen parameter or its piece.

    `parameter` is what `optimizer` knows it by; `replicated` says that every rank holds the same.
    `own_layout` lists the kinds of state that are laid out differently from the master, with their pieces. `extra` holds
    what bigtrain keeps beside DeepSpeed, the moving average.
    """

    optimizer: torch.optim.Optimizer | None
    parameter: torch.Tensor
    pieces: list[Piece]
    replicated: bool
    own_layout: dict[str, list[Piece]] = field(default_factory=dict)
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def master(self) -> torch.Tensor:
        return self.parameter.detach().view(-1)

    @property
    def state(self) -> dict[str, Any]:
        # Looked up each time: DeepSpeed replaces the dictionary of a parameter that has not stepped yet.
        return {} if self.optimizer is None else self.optimizer.state[self.parameter]

    def tensors(self) -> dict[str, tuple[torch.Tensor, list[Piece]]]:
        """Flat tensors and their layout by kind: "model" (the float32 weights), the optimizer's own, "ema"."""
        own = {k: (v.detach().view(-1), self.own_layout.get(k, self.pieces)) for k, v in self.state.items() if self._is_flat(k, v)}
        extra = {k: (v, self.pieces) for k, v in self.extra.items()}
        return {"model": (self.master, self.pieces), **own, **extra}

    def scalars(self) -> dict[str, float]:
        """What the optimizer keeps besides flat tensors, such as its step count."""
        return {k: float(v) for k, v in self.state.items() if not self._is_flat(k, v)}

    def create(self, kind: str) -> None:
        """Make the flat tensor of `kind` out of zeros where the optimizer has not stepped yet."""
        if kind in self.tensors():
            return
        if kind == "ema":
            self.extra[kind] = torch.zeros_like(self.master, dtype=torch.float32)
        elif kind in self.own_layout:
            self.state[kind] = self.master.new_zeros(sum(piece.length for piece in self.own_layout[kind]))
        else:
            self.state[kind] = torch.zeros_like(self.parameter, requires_grad=False)

    def set_scalars(self, values: dict[str, float]) -> None:
        """Restore `scalars` in the type that the optimizer keeps them in; nothing where it keeps no state."""
        if not self.state:
            return
        for key, value in values.items():
            if not type(self.optimizer).__module__.startswith("torch.optim"):
                self.state[key] = int(value)  # DeepSpeed's count in Python
            else:
                fused = self.optimizer.defaults.get("fused")
                self.state[key] = torch.tensor(value, dtype=torch.float32, device=self.parameter.device if fused else "cpu")

    def _is_flat(self, kind: str, value: Any) -> bool:
        return torch.is_tensor(value) and value.dim() > 0 and (kind in self.own_layout or value.numel() == self.master.numel())


def partitions(engine: Any) -> list[Partition]:
    """Every partition of this rank, as views of the live tensors of `engine`, DeepSpeed's."""
    return [*_trained(engine), *_frozen(engine)]


def _frozen(engine: Any) -> list[Partition]:
    made = []
    for name, p in engine.module.named_parameters():
        if not p.requires_grad and engine.zero_optimization_stage() < 3:
            made.append(Partition(None, p, [Piece(name, 0, p.numel(), 0)], True))
        elif not p.requires_grad:
            offset = ds_comm.get_rank(group=engine.optimizer.dp_process_group) * p.ds_tensor.ds_numel
            length = min(p.ds_tensor.ds_numel, p.ds_numel - offset)
            made.append(Partition(None, p.ds_tensor, [Piece(name, offset, length, 0)] if length > 0 else [], False))
    return made


def _trained(engine: Any) -> list[Partition]:
    names = {id(p): name for name, p in engine.module.named_parameters()}
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    base = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer

    def partition(master: torch.Tensor, pieces: list[Piece], replicated: bool = False) -> Partition:
        return Partition(base, master, pieces, replicated)

    def whole(parameter: torch.Tensor, start: int = 0) -> Piece:
        return Piece(names[id(parameter)], 0, parameter.numel(), start)

    if stage == 0 and base is optimizer:
        return [partition(p, [whole(p)], True) for group in base.param_groups for p in group["params"]]
    if stage == 0:
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return [partition(m, [whole(p)], True) for low, master in pairs for p, m in zip(low, master, strict=True)]
    made = []
    if stage in (1, 2):
        groups, masters = _bit16_groups(optimizer)
        for i, (group, master) in enumerate(zip(groups, masters, strict=True)):
            made.append(partition(master, [_mapped(names[id(p)], p) for p in group if p._hp_mapping is not None]))
            if getattr(group[0], "use_muon", False) and hasattr(optimizer, "_muon_pending_momentum") and not optimizer.cpu_offload:
                # Muon's momentum covers every parameter that this partition touches, whole, one after the other.
                pieces, start = [], 0
                for p in optimizer.params_in_partition[i]:
                    pieces.append(whole(p, start))
                    start += p.numel()
                made[-1].own_layout["momentum_buffer"] = pieces
        return made
    rank = ds_comm.get_rank(group=optimizer.dp_process_group)
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        pieces, start = [], 0
        for p in group:
            share = p.ds_tensor.ds_numel
            offset = rank * share
            length = min(share, p.ds_numel - offset)  # the last ranks' shares may be padding, in part or whole
            if length > 0:
                pieces.append(Piece(names[id(p)], offset, length, start))
            start += share
        made.append(partition(master, pieces))
    return made


def _bit16_groups(optimizer: Any) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    if hasattr(optimizer, "bf16_groups"):  # BF16_Optimizer: stage 1 with float32 accumulation
        return optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    return optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups


def _mapped(name: str, parameter: torch.Tensor) -> Piece:
    in_parameter, in_partition = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
    return Piece(name, in_parameter.start, in_parameter.numel, in_partition.start)


def publish(engine: Any) -> None:
    """Copy the float32 weights into the ones that the model computes with, after they were written from outside."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    with torch.no_grad():
        if stage == 0:
            if hasattr(optimizer, "fp32_groups"):
                for low, master in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                    for p, m in zip(low, master, strict=True):
                        p.copy_(m)
        elif stage in (1, 2):
            optimizer.update_lp_params()
        else:
            for low, master in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True):
                low.copy_(master)
            persistent = optimizer.persistent_parameters  # small ones that stay whole between steps
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)


def link(engine: Any) -> None:
    """Tell DeepSpeed's accessors of optimizer states that they do not know: those created from outside, and those of all
    parameter groups but the first, which it links before they exist."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


LOSS_SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler(engine: Any) -> Iterator[tuple[Any, str, float]]:
    """Where fp16's dynamic loss scale keeps its numbers: (object, attribute, value); nothing in other precisions."""
    if engine.fp16_enabled():
        optimizer = engine.optimizer
        holder = getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)
        for key in LOSS_SCALE_KEYS:
            if hasattr(holder, key):
                yield holder, key, float(getattr(holder, key))
