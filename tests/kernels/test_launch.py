"""Where an operator launches: on the GPU of its tensors, whichever is the current one, with what the tables have for it."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch

from bigtrain_kernels import cross_entropy, launch, static
from bigtrain_kernels.launch import INTERPRETED, Launch, architecture, on_its_gpu, operator


class Gpus:
    """Stands in for torch.cuda: only which GPU is the current one."""

    current = 0

    def exchange(self, index):
        before, self.current = self.current, index if index >= 0 else self.current
        return before if index >= 0 else -1


class OnGpu:
    """What torch.cuda.device_of asks a tensor."""

    is_cuda = True

    def __init__(self, index):
        self.index = index

    def get_device(self):
        return self.index


@pytest.fixture
def gpus(monkeypatch):
    gpus = Gpus()
    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, gpus.exchange)
    return gpus


def test_a_function_runs_on_the_gpu_of_its_first_tensor(gpus):
    where = on_its_gpu(lambda tensor, more: (gpus.current, more))
    assert where(OnGpu(3), "x") == (3, "x") and gpus.current == 0
    assert where(OnGpu(0), "x") == (0, "x") and where(torch.empty(2), "x") == (0, "x")


def test_the_current_gpu_comes_back_after_an_error(gpus):
    def fail(tensor):
        raise ValueError(f"on {gpus.current}")

    with pytest.raises(ValueError, match="on 2"):
        on_its_gpu(fail)(OnGpu(2))
    assert gpus.current == 0


def test_an_operator_asks_for_its_gpu(monkeypatch):
    asked = []

    class Asked(torch.cuda.device_of):
        def __init__(self, tensor):
            asked.append(tensor.shape)
            super().__init__(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", Asked)

    @operator("bigtrain_test::twice")
    def twice(x: torch.Tensor, y: torch.Tensor, by: float) -> torch.Tensor:
        return x * by + y

    twice.register_fake(lambda x, y, by: torch.empty_like(x))
    x, y = torch.ones(3), torch.zeros(1)
    compiled = torch.compile(lambda x, y: twice(x, y, by=2.0), fullgraph=True, backend="eager")
    assert compiled(x, y).sum() == 6 and twice(y=y, by=2.0, x=x).sum() == 6
    assert asked == [x.shape, x.shape]


@pytest.mark.parametrize(
    ("backend", "arch", "entry"),
    [
        *[("cuda", 75, "sm_80"), ("cuda", 80, "sm_80"), ("cuda", 89, "sm_80"), ("cuda", 90, "sm_90"), ("cuda", 100, "sm_100")],
        *[("cuda", 103, "sm_100"), ("cuda", 120, "sm_80"), ("hip", "gfx942", "gfx942"), ("hip", "gfx90a", "gfx942")],
    ],
)
def test_every_gpu_has_an_entry(monkeypatch, backend, arch, entry):
    here = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend=backend, arch=arch)))
    monkeypatch.setattr(launch, "driver", here)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    assert architecture() == entry
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    assert architecture() == INTERPRETED


def test_what_a_launch_is_given():
    assert Launch({"BLOCK_M": 64}, warps=4).arguments() == {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize("family", static.FAMILIES)
def test_every_operator_is_registered_that_way(family):
    source = inspect.getsource(importlib.import_module(f"bigtrain_kernels.{family}"))
    assert "@operator(" in source and "custom_op" not in source


def test_the_loss_takes_small_tiles_where_rows_are_not_aligned(monkeypatch):
    monkeypatch.setattr(cross_entropy, "architecture", lambda: "sm_90")
    aligned, other = (torch.empty(4, width, dtype=torch.bfloat16) for width in (4096, 4104))
    assert cross_entropy._key(aligned, aligned) == ("sm_90", 2)
    assert cross_entropy._key(aligned, other) == cross_entropy._key(aligned, aligned[:, 1:]) == ("unaligned", 2)
    assert cross_entropy.STATISTICS["unaligned", 2].blocks["TILES"] == 32
