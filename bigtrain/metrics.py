"""What a step is measured by: scalars on their way to the host, FLOPs against a peak, and memory."""

from __future__ import annotations

import re
import resource
import sys
import time

import torch

# Dense bf16/fp16 tensor-core peaks in TFLOP/s, from the vendors' data sheets (without sparsity).
PEAK_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA A100": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
    "NVIDIA A10": 125.0,
    "AMD Instinct MI300X": 1307.0,
}


class Deferred:
    """A scalar tensor on its way to the host: the copy starts now, `value` waits only for what was queued before it."""

    def __init__(self, scalar: torch.Tensor):
        self._event = None
        self._host = scalar.detach().float()
        if scalar.is_cuda:
            self._host = torch.empty((), dtype=torch.float32, pin_memory=True)
            self._host.copy_(scalar.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)


def data_sheet_tflops(name: str) -> tuple[float, str] | None:
    """The peak of a GPU in bf16 or fp16, and which one it is, or None for one that the table does not know."""
    for known, peak in PEAK_TFLOPS.items():
        if re.match(rf"{known}(?![A-Za-z0-9])(?!.*MIG)", name):  # an L40 is no L4, and a slice of a GPU is not the GPU
            return peak, known
    return None


def peak_tflops(name: str, precision: str, device: torch.device) -> tuple[float, str]:
    """TFLOP/s that one rank's device can multiply at best, and where the figure is from.

    From the data sheet for a known GPU in bf16 or fp16; else the best of a few large matmuls, measured now (0.1 s), which a
    model can approach but hardly pass. Every rank should call it at once: they may share the machine's cores.
    """
    if device.type == "cuda" and precision != "fp32" and (known := data_sheet_tflops(name)):
        return known[0], f"data sheet of {known[1]}"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e12, f"measured: {n} x {n} matmul in {precision}"


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: the GPU's as torch reserved it, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
