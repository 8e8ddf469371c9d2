"""The devices of this machine: what bigtrain.probe measures on each, all at once, and what NVIDIA's driver says of them meanwhile."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from bigtrain.errors import RunError
from bigtrain_launch.local import die_with_parent

POLL_SECONDS = 0.1
THROTTLED = {0x08: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}
"""Bits of NVML's reasons for lower clocks that are no normal state; the power cap is one under full load."""


def measure(count: int, environment: dict[str, str], seconds: float, meanwhile: Callable[[], None]) -> list[dict[str, Any]]:
    """What the probe tells of each of `count` devices; `meanwhile` is called again and again. A device whose probe fails, or takes longer
    than `seconds`, has an `error`."""
    command = [sys.executable, "-m", "bigtrain.probe", "--seconds", f"{0.9 * seconds:.1f}"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID")}
    processes = [
        subprocess.Popen(
            command,
            env={**alone, **environment, "LOCAL_RANK": str(number)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=die_with_parent(),
        )
        for number in range(count)
    ]
    until = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            meanwhile()
            time.sleep(POLL_SECONDS)
    finally:
        for process in processes:
            process.kill()
    return [_last(*process.communicate()) for process in processes]


def _last(printed: str, errors: str) -> dict[str, Any]:
    lines = printed.splitlines()
    answer = json.loads(lines[-1]) if lines else {"stage": "starting"}
    if answer["stage"] != "done":
        said = (errors.strip().splitlines() or ["it said nothing"])[-1][:200]
        answer.setdefault("error", f"got no further than {answer['stage']}: {said}")
    return answer


class Driver:
    """NVIDIA's driver, asked through nvidia-ml-py. Raises RunError where that is not installed or does not work."""

    def __init__(self, load: Callable[[str], ModuleType] = importlib.import_module):
        try:
            self._nvml = load("pynvml")
            self._nvml.nvmlInit()
            self._devices = [self._nvml.nvmlDeviceGetHandleByIndex(n) for n in range(self._nvml.nvmlDeviceGetCount())]
        except ImportError:
            raise RunError("nvidia-ml-py is not installed") from None
        except self._nvml.NVMLError as error:
            raise RunError(f"NVIDIA's driver does not answer: {error}") from None
        self._reasons = [0] * len(self._devices)

    def look(self) -> None:
        """Take note of throttling, which shows under load only."""
        for number, device in enumerate(self._devices):
            self._reasons[number] |= self._ask(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons, device) or 0

    def complaints(self) -> list[str]:
        """What is wrong with each GPU, in a line each."""
        found = []
        for number, (device, reasons) in enumerate(zip(self._devices, self._reasons)):
            uncorrected = self._nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self._nvml.NVML_VOLATILE_ECC
            if errors := self._ask(self._nvml.nvmlDeviceGetTotalEccErrors, device, *uncorrected):
                found.append(f"GPU {number}: {errors} memory errors that ECC could not correct, since the driver was loaded")
            *_, pending, failure = self._ask(self._nvml.nvmlDeviceGetRemappedRows, device) or (0, 0)
            if pending or failure:
                found.append(f"GPU {number}: a row of its memory {'could not be' if failure else 'waits to be'} replaced")
            if why := [name for bit, name in THROTTLED.items() if reasons & bit]:
                degrees = self._ask(self._nvml.nvmlDeviceGetTemperature, device, self._nvml.NVML_TEMPERATURE_GPU)
                found.append(f"GPU {number}: clocks held down by {', '.join(why)}{f' at {degrees} °C' if degrees else ''}")
        return found

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except self._nvml.NVMLError:  # a GPU without ECC or without such counters
            return None
