"""Which rank this process is, on which device, and how all ranks agree on small numbers."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.errors import RunError, UserError
from bigtrain.ranks import launched


class World:
    """This rank among all: `rank`, `size`, `local_rank`, `device`, and collectives on a gloo group for control.

    Control messages never touch the accelerator, so agreeing on a number waits for no kernel.
    """

    def __init__(self, rank: int, size: int, local_rank: int, device: torch.device, timeout: float):
        self.rank, self.size, self.local_rank, self.device, self._timeout = rank, size, local_rank, device, timeout
        self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @classmethod
    def join(cls, accelerator: str, timeout: float) -> World:
        """Meet the other ranks. `accelerator` is "cpu" or "cuda" (ROCm's torch calls its devices cuda too).

        Raises UserError when the launcher's variables are incomplete or the port is taken, RunError when ranks stay away.
        """
        variables = launched(os.environ)
        if variables is None:
            raise UserError("no rank variables (RANK, WORLD_SIZE): start with `bigtrain train`, torchrun, deepspeed or srun")
        if not variables["MASTER_ADDR"]:
            raise UserError("MASTER_ADDR is not set: export the address of the first node before starting the ranks")
        os.environ.update(variables)
        rank, size, local_rank = (int(variables[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        device = torch.device("cpu")
        if accelerator != "cpu":
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        address = f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}"
        try:
            dist.init_process_group(
                "gloo" if accelerator == "cpu" else "cpu:gloo,cuda:nccl", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
            )
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                raise UserError(
                    f"port {variables['MASTER_PORT']} is in use on this machine: set another MASTER_PORT or launch.port"
                ) from None
            first = str(error).splitlines()[0][:200]
            raise RunError(f"rank {rank} of {size} did not meet the others at {address} within {timeout:.0f} s: {first}") from None
        return cls(rank, size, local_rank, device, timeout)

    def another(self) -> World:
        """The same ranks with a control group of their own, for a thread that agrees on things beside this one."""
        return World(self.rank, self.size, self.local_rank, self.device, self._timeout)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum each value over all ranks, in float64 (exact for counts below 2^53)."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._control)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (JSON types), by rank, on all ranks."""
        payload = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()]), group=self._control)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: payload.numel()] = payload
        received = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded, group=self._control)
        return [_decode(r[: int(n)]) for r, n in zip(received, sizes, strict=True)]

    def from_first(self, value: Any = None) -> Any:
        """Rank 0's `value` (JSON types) on all ranks."""
        payload = _encode(value if self.first else None)
        size = torch.tensor([payload.numel()])
        dist.broadcast(size, 0, group=self._control)
        if not self.first:
            payload = torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self._control)
        return _decode(payload)

    def barrier(self) -> None:
        dist.barrier(group=self._control)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(payload: torch.Tensor) -> Any:
    return json.loads(payload.numpy().tobytes())
