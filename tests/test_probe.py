"""The probe as real processes: three ranks that measure each other, one alone, and ranks whose others stay away."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigtrain import probe

ROOT = Path(__file__).parents[1]
CONFIG = """
model: {layers: 1, width: 8, heads: 1, mlp_width: 8, max_positions: 8}
data: {sequence_length: 8, folder: FOLDER}
train: {steps: 1, micro_batch: 1, accumulation: 1}
optimizer: {lr: 1e-3}
"""


def start(*arguments: str, program: tuple[str, ...] = ("-m", "bigtrain.probe"), **variables) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK") and not k.startswith("SLURM_")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in variables.items()}
    return subprocess.Popen([sys.executable, *program, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


def answers(*processes: subprocess.Popen) -> list[list[dict]]:
    """All that each has printed; it must end well, whatever happened to it."""
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [[json.loads(line) for line in text.splitlines()] for text in printed]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What three ranks, each on a node of its own, have printed; only the last one's config has another learning rate."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "data").mkdir()
    (folder / "data/manifest.json").write_text("{}")
    (folder / "c.yaml").write_text(CONFIG.replace("FOLDER", str(folder / "data")))
    shared = {"WORLD_SIZE": 3, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    overrides = [], [], ["optimizer.lr=2e-3"]
    commands = [("--seconds", "100", str(folder / "c.yaml"), *override) for override in overrides]
    return answers(*(start(*command, RANK=rank, **shared) for rank, command in enumerate(commands)))


def test_three_ranks_measure_everything(three):
    for rank, printed in enumerate(three):
        last = printed[-1]
        assert (last["stage"], last["rank"], last["world"], last["device"], last["torch"]) == ("done", rank, 3, "CPU", torch.__version__)
        assert 1e-3 < last["tflops"] < 100 and last["peak_tflops"] is None
        assert 1 < last["latency_us"] < 1e6
        assert all(1e-3 < last[name] < 1e3 for name in ("all_reduce", "all_to_all"))
        assert {peer for peer, *_ in last["pairs"]} == {0, 1, 2} - {rank}
        assert all(1e-3 < usual <= best < 1e3 and why is None for _, best, usual, why in last["pairs"])


def test_what_is_known_is_printed_after_every_stage(three):
    stages = [answer["stage"] for answer in three[0]]
    assert list(dict.fromkeys(stages))[:5] == ["starting", "meeting the others", "matrix product", "collectives", "pairs"]
    assert all(earlier.keys() <= later.keys() for earlier, later in zip(three[0], three[0][1:]))


def test_what_the_ranks_read_can_be_compared(three):
    assert three[0][-1]["data"] == three[2][-1]["data"] is not None
    assert three[0][-1]["config"] == three[1][-1]["config"] != three[2][-1]["config"]


@pytest.fixture(scope="module")
def lonely(tmp_path_factory):
    """Last words of processes that are no ranks, started at once."""
    hang = "import time\nfrom bigtrain.probe import Answer\nanswer = Answer(1.0)\nanswer.tell(x=1)\ntime.sleep(600)"
    processes = {
        "alone": start(),
        "mistaken": start(str(tmp_path_factory.mktemp("x") / "absent.yaml")),
        "hanging": start(program=("-c", hang)),
    }
    return {name: printed[-1] for name, printed in zip(processes, answers(*processes.values()))}


def test_alone_it_measures_the_device_only(lonely):
    assert lonely["alone"]["stage"] == "done" and lonely["alone"]["world"] == 1 and lonely["alone"]["tflops"] > 1e-3
    assert "all_reduce" not in lonely["alone"] and "pairs" not in lonely["alone"]


def test_a_config_that_is_not_there(lonely):
    assert lonely["mistaken"]["stage"] == "starting" and "absent.yaml" in lonely["mistaken"]["error"]


def test_time_that_is_over_ends_what_hangs(lonely):
    assert lonely["hanging"] == {"x": 1}


class Told(dict):
    """Stands in for an Answer, which would end this process."""

    left = 1.0

    def tell(self, **facts):
        self.update(facts)


def test_rank_0_tells_who_has_not_come():
    told = Told()
    assert probe._meet(told, 0, 3, "127.0.0.1", free_port()) is None and told == {"absent": [1, 2]}


def test_a_rank_without_rank_0_tells_why():
    with pytest.raises(probe.RunError, match=r"rank 0 was not reached at 127.0.0.1:\d+ in 1 s: .*refused"):
        probe._meet(Told(), 1, 2, "127.0.0.1", free_port())


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(probe.RunError, match="needs GPU 2, but only 2 are visible"):
        probe._device(2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert probe._device(2).type == "cpu"
