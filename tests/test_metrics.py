"""Peaks of GPUs by name, a measured peak, scalars and memory."""

import pytest
import torch

from bigtrain.metrics import Deferred, peak_memory_gib, peak_tflops

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10", 125.0),
    ],
)
def test_data_sheets(name, peak):
    assert peak_tflops(name, "bf16", GPU)[0] == peak_tflops(name, "fp16", GPU)[0] == peak
    assert "data sheet" in peak_tflops(name, "bf16", GPU)[1]


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA A10G", "NVIDIA A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"])
def test_another_gpu_is_measured(name, monkeypatch):
    """A name that only begins like a known one, and a slice of a GPU, must not get its peak."""
    measured = RuntimeError("measuring")

    def randn(*size, device):
        raise measured

    monkeypatch.setattr(torch, "randn", randn)
    with pytest.raises(RuntimeError, match="measuring"):
        peak_tflops(name, "bf16", GPU)


def test_a_cpu_is_measured():
    peak, source = peak_tflops("a CPU", "fp32", torch.device("cpu"))
    assert 1e-4 < peak < 100 and source == "measured: 1024 x 1024 matmul in fp32"


def test_deferred_keeps_the_value_of_its_moment():
    scalar = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert Deferred(scalar).value() == 1.5
    low = torch.tensor(2.0, dtype=torch.bfloat16)
    assert Deferred(low).value() == 2.0


def test_peak_memory_only_grows():
    before = peak_memory_gib(torch.device("cpu"))
    block = torch.ones(100 << 20, dtype=torch.uint8)
    after = peak_memory_gib(torch.device("cpu"))
    assert 0.01 < before <= after < 1000
    del block
    assert peak_memory_gib(torch.device("cpu")) >= after
