"""The only file that imports deepspeed, its checkpoint adapter aside: sharding, precision and the optimizer in one place."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from bigtrain.config import Batch, Config, Optimizer
from bigtrain.deepspeed_config import derive
from bigtrain.optim import freeze, parameter_groups
from bigtrain.world import World

import deepspeed  # isort: skip  (after torch's own start-up; slow, and noisy on import)
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion


class Engine:
    """A model under DeepSpeed: call it like the model, then `backward` and `step`.

    `build` makes the bare model; `initialise(name, tensor)` fills one whole parameter in place. Under ZeRO-3 the model is
    built sharded and filled one parameter at a time, so no rank ever holds it whole.
    """

    def __init__(
        self,
        config: Config,
        batch: Batch,
        precision: str,
        world: World,
        build: Callable[[], nn.Module],
        initialise: Callable[[str, torch.Tensor], None],
    ):
        self._config, self._precision = config, precision
        self._world = world
        settings = derive(config, batch, precision)
        if world.device.type == "cpu":
            _leave_compilers_out()
        _start_collectives(world)
        model = _build(config.zero.stage, settings, world.device, build, initialise)
        freeze(model, config.train.frozen)
        groups = parameter_groups(model, config.optimizer)
        optimizer = _optimizer(config.optimizer, groups, config.zero.offload_optimizer, world.device.type)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        self._base = getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)
        self._plain = self._base is self.deepspeed.optimizer
        if hasattr(self.deepspeed.optimizer, "fp32_groups"):
            _undo_first_step(self.deepspeed.optimizer)
        # DeepSpeed's stage-0 optimizer divides fp16 gradients by the loss scale, but its engine multiplies the loss at
        # stages 1 to 3 only.
        self._unscaled = config.zero.stage == 0 and precision == "fp16"

    @property
    def module(self) -> nn.Module:
        """The model itself. Under ZeRO-3 its forward gathers weights: every rank must call it, or none."""
        return self.deepspeed.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss` to those of this step.

        The loss arrives divided by the token count of the whole global batch; DeepSpeed will average over ranks, so it
        is multiplied by their number here, and DeepSpeed's division by the accumulation steps is off.
        """
        if self._unscaled:
            loss = loss * self.loss_scale
        self.deepspeed.backward(loss * self._world.size, scale_wrt_gas=False)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # only counts the micro-batch

    def step(self, learning_rate_share: float, largest_norm: float = math.inf) -> tuple[float, bool]:
        """Update the weights after the last micro-batch. Returns the gradient's L2 norm before clipping, and whether the update
        was applied: with a norm that is not finite, or above `largest_norm`, nothing changes. Every rank finds the same.
        """
        for group in self._base.param_groups:
            group["lr"] = group["lr_base"] * learning_rate_share
        if self._plain:
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            norm = float(nn.utils.clip_grad_norm_(parameters, self._config.train.clip or math.inf))
            if not norm <= largest_norm or math.isinf(norm):
                self.module.zero_grad(set_to_none=True)
                return norm, False
            self.deepspeed.step()
            return norm, True
        # Where DeepSpeed looks whether the norm is finite, it is told of one that is too large as well. In fp16 it may have
        # seen an overflow before, and asks nothing.
        norm = math.inf
        scale = self.loss_scale or 1.0

        def refused(found: torch.Tensor | float) -> bool:
            nonlocal norm
            found = float(found) / scale
            norm = found if found >= 0 else math.inf  # DeepSpeed's -1: not finite
            return not norm <= largest_norm or math.isinf(norm)

        with mock.patch.object(sys.modules[type(self.deepspeed.optimizer).__module__], "is_invalid_grad_norm", refused):
            self.deepspeed.step()
        return norm, not self.deepspeed.optimizer.overflow

    @contextlib.contextmanager
    def evaluating(self):
        """Dropout off and no gradients, for the duration of a `with` block."""
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.deepspeed.train()

    @property
    def loss_scale(self) -> float | None:
        """Current loss scale of fp16; None in the other precisions."""
        return float(self.deepspeed.optimizer.loss_scale) if self._precision == "fp16" else None


def _leave_compilers_out() -> None:
    """Keep compilers out of a rank on a CPU, which compiles nothing: 130 MiB, and a second at start-up."""
    # torch._dynamo would import Triton's; None has Python answer that it is not installed. Kernels that run in its interpreter
    # have imported it by now.
    sys.modules.setdefault("triton", None)
    # Whatever the optimizer, DeepSpeed imports its Muon, whose orthogonalisation is handed to torch.compile at import.
    with mock.patch.object(torch, "compile", lambda function, **_: function):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def _start_collectives(world: World) -> None:
    """Let DeepSpeed set up its collectives on the process group that is there.

    Those for the host map a file of 66 MiB per rank in /dev/shm, by a name made of the port, and never remove it. Removed
    before, a file that a killed run left is not mistaken for a peer's; removed once all ranks have mapped it, the memory
    ends with the processes, however they end.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    shared = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{world.rank}")
    shared.unlink(missing_ok=True)
    world.barrier()
    deepspeed.init_distributed(dist_backend="gloo" if world.device.type == "cpu" else "nccl", verbose=False)
    world.barrier()
    shared.unlink(missing_ok=True)


def _undo_first_step(optimizer: Any) -> None:
    """DeepSpeed's 16-bit optimizer of stage 0 steps once on zero gradients to allocate its states: that decays the weights
    and counts a step that never was."""
    optimizer.optimizer.state.clear()
    with torch.no_grad():
        for low, master in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for p, m in zip(low, master, strict=True):
                m.copy_(p)


def _build(stage: int, settings: dict, device: torch.device, build: Callable, initialise: Callable) -> nn.Module:
    if stage < 3:
        model = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                initialise(name, parameter)
        return model
    with deepspeed.zero.Init(config_dict_or_path=settings, remote_device=None):
        model = build()
    for name, parameter in model.named_parameters():
        # Every rank computes the same whole value; modifier_rank makes rank 0's the one that is scattered.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            initialise(name, parameter)
    return model


def _optimizer(config: Optimizer, groups: list[dict[str, Any]], offload: bool, device: str) -> torch.optim.Optimizer:
    """The optimizer that steps DeepSpeed's flat partitions. config.py's table says which stages each may be used at."""
    betas = tuple(config.betas)
    if config.name == "adamw":
        if offload:
            return DeepSpeedCPUAdam(groups, betas=betas, eps=config.eps, adamw_mode=True)
        return _eager(torch.optim.AdamW)(groups, betas=betas, eps=config.eps, fused=True)
    if config.name == "lion":
        # DeepSpeed's Lion for the host works on any tensor in host memory, and without a GPU all of them are.
        return DeepSpeedCPULion(groups, betas=betas) if offload or device == "cpu" else FusedLion(groups, betas=betas)
    if config.name == "muon":
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        return MuonWithAuxAdam(groups)
    if config.name == "sgd":
        return _eager(torch.optim.SGD)(groups, momentum=config.momentum)
    return _eager(torch.optim.RMSprop)(groups, alpha=config.alpha, eps=config.eps, momentum=config.momentum)


def _eager(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """`kind` without the wrappers that tell torch.compile to stay out: to say so they import it, 60 MiB and a second."""
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in ("add_param_group", "zero_grad", "step")}
    methods["step"] = torch.no_grad()(methods["step"])  # which its wrapper saw to as well
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})


def load_op(name: str) -> None:
    """Load one of DeepSpeed's C++ ops by its name, compiling it if it is not there."""
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, CPULionBuilder
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    {b.NAME: b for b in (ShareMemCommBuilder, CPUAdamBuilder, CPULionBuilder)}[name]().load()
