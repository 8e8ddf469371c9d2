"""What the machines of a run can do, measured in seconds: `python -m bigtrain.probe [--seconds S] [CONFIG [OVERRIDE]...]`.

Started as the ranks of a run (RANK, WORLD_SIZE, ... in the environment), each tells its versions and its device, meets the others,
multiplies matrices, and takes part in collectives; one rank of each node then exchanges data with those of other nodes, pair by
pair. Started alone it tells of this machine's device only. After every stage a rank prints all that it knows as a line of JSON:
the last line counts, and its `stage` says what the rank was doing when it got no further.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bigtrain import configfile
from bigtrain.data.shards import MANIFEST
from bigtrain.errors import RunError, UserError
from bigtrain.metrics import data_sheet_tflops
from bigtrain.ranks import launched
from bigtrain.runfolder import process_start

MATMUL_SECONDS = 0.5
SPAN_SECONDS = 0.02  # a transfer this long is believed; at 200 Mbit/s it is half a megabyte
REPEATS = 8
SMALLEST, LARGEST = 1 << 16, 1 << 26
ALL_PAIRS = 16  # nodes up to which every pair is measured
PAIR_SECONDS = 5.0  # of a transfer between two nodes: less than 13 kB/s is no link
FAREWELL_SECONDS = 2.0


class Answer:
    """What this rank knows, printed as it grows, and at the latest when the time is over: then the process ends."""

    def __init__(self, seconds: float):
        self._until = time.monotonic() + seconds - _age()
        self._facts: dict[str, Any] = {}
        self._lock = threading.Lock()
        late = threading.Timer(self.left, self.end)
        late.daemon = True
        late.start()

    @property
    def left(self) -> float:
        return max(0.1, self._until - time.monotonic())

    def tell(self, **facts: Any) -> None:
        with self._lock:
            self._facts |= facts
            print(json.dumps(self._facts), flush=True)

    def end(self) -> None:
        with self._lock:  # no line is cut short
            os._exit(0)  # a collective that hangs is never waited for, and gloo's threads are none of our business


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bigtrain.probe", description="Measure what the machines of a run can do.")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest that it may take")
    parser.add_argument("config", nargs="*", metavar="CONFIG [OVERRIDE]...", help="the run's config, to compare what each rank reads")
    arguments = parser.parse_args()
    answer = Answer(arguments.seconds)
    try:
        _probe(answer, arguments.config)
    except (RunError, UserError, RuntimeError, ValueError, OSError) as error:
        answer.tell(error=(str(error).splitlines() or [type(error).__name__])[0][:300])
    answer.end()


def _probe(answer: Answer, config: list[str]) -> None:
    variables = launched(os.environ) or {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}
    rank, size, local_rank = (int(variables[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    answer.tell(stage="starting", rank=rank, world=size)
    device = _device(local_rank)
    answer.tell(**_versions(device))
    if config:
        answer.tell(**_read(config))
    if size > 1:
        answer.tell(stage="meeting the others")
        store = _meet(answer, rank, size, variables["MASTER_ADDR"], int(variables["MASTER_PORT"]))
        if store is None:
            return
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=answer.left / 2))
        dist.barrier(group=dist.new_group(backend="gloo"))
    answer.tell(stage="matrix product")
    answer.tell(**matmul(device))
    if size > 1:
        answer.tell(stage="collectives")
        answer.tell(**collectives(device, size))
        answer.tell(stage="pairs")
        leaders = _leaders(local_rank, size)
        if rank in leaders:
            pairs(device, leaders, rank, store, answer)
        answer.tell(stage="waiting for the others")
        store.set(f"done/{rank}", "")
        if rank == 0:  # the store goes with it, and the last pair may still be meeting there
            store.wait([f"done/{r}" for r in range(size)], timedelta(seconds=answer.left))
    answer.tell(stage="done")


def _age() -> float:
    """Seconds since this process began: importing torch takes 2 of them, or 20 from a slow disk."""
    ticks = process_start(os.getpid())
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK") if ticks else 0.0


def _device(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise RunError(f"needs GPU {local_rank}, but only {torch.cuda.device_count()} are visible here; lower launch.ranks_per_node")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _versions(device: torch.device) -> dict[str, Any]:
    found = {"torch": torch.__version__, "device": "CPU"}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _read(arguments: list[str]) -> dict[str, Any]:
    """Digests of the config and of its prepared data's manifest as this rank sees them, None for one that is not there."""
    config = configfile.load(arguments[0], arguments[1:])
    manifest = Path(config.data.folder) / MANIFEST
    data = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
    return {"config": hashlib.sha256(configfile.dump(config).encode()).hexdigest(), "data": data, "data_folder": config.data.folder}


def _meet(answer: Answer, rank: int, size: int, host: str, port: int) -> dist.Store | None:
    """The store on rank 0 where all ranks have shown up; None where some have not, and all that have tell which."""
    patience = timedelta(seconds=answer.left * 0.6)
    if rank:
        _knock(host, port, patience.total_seconds())
    store = dist.TCPStore(host, port, size, is_master=rank == 0, timeout=patience, wait_for_workers=False)
    store.set(f"here/{rank}", "")
    if rank == 0:
        keys = [f"here/{r}" for r in range(size)]
        with suppress(RuntimeError):
            store.wait(keys, patience)
        absent = [r for r in range(size) if not store.check([keys[r]])]
        store.set("absent", json.dumps(absent))
        with suppress(RuntimeError):  # the store goes with this process: the others read first
            store.wait([f"seen/{r}" for r in range(1, size) if r not in absent], timedelta(seconds=FAREWELL_SECONDS))
    else:
        store.wait(["absent"], patience + timedelta(seconds=FAREWELL_SECONDS))
        absent = json.loads(store.get("absent"))
        store.set(f"seen/{rank}", "")
    if absent:
        answer.tell(absent=absent)
        return None
    store.set_timeout(timedelta(seconds=answer.left))
    return store


def _knock(host: str, port: int, seconds: float) -> None:
    """Wait until rank 0 listens; the store's own client says less, and tries for more than twice as long as it is told to."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, until - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RunError(f"rank 0 was not reached at {host}:{port} in {seconds:.0f} s: {error}") from None
        time.sleep(0.1)


def matmul(device: torch.device) -> dict[str, Any]:
    """TFLOP/s of a large product in the type that the device is made for (on a CPU: of one core), and the data sheet's peak where it is
    known."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # so small that other processes leave some products alone; many threads would wait for each other
        dtype, n = torch.float32, 256
    else:
        dtype, n = (torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16), 8192
    a = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    seconds, start = [], time.perf_counter()
    while time.perf_counter() - start < 2 * MATMUL_SECONDS:
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        _finish(device)
        if began - start > MATMUL_SECONDS:  # before, clocks rise and libraries choose
            seconds.append(time.perf_counter() - began)
    usual = min if device.type == "cpu" else statistics.median  # a GPU that gets hot is slow now and then, a CPU has other things to do
    tflops = 2 * n**3 / usual(seconds or [2 * MATMUL_SECONDS]) / 1e12
    peak = data_sheet_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {"tflops": tflops, "peak_tflops": peak and peak[0]}


def collectives(device: torch.device, size: int) -> dict[str, float]:
    """Bandwidth in GB/s as it leaves a rank (what nccl-tests call busbw) of all ranks together, and the latency in µs."""
    small = torch.zeros(1, device=device)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        dist.all_reduce(small)
        _finish(device)
        times.append(time.perf_counter() - start)

    def all_to_all(block: torch.Tensor) -> None:
        dist.all_to_all_single(torch.empty_like(block), block)

    return {
        "latency_us": statistics.median(times) * 1e6,
        "all_reduce": 2 * (size - 1) / size * _bandwidth(dist.all_reduce, device, size),
        "all_to_all": (size - 1) / size * _bandwidth(all_to_all, device, size),
    }


def _bandwidth(collective: Callable[[torch.Tensor], Any], device: torch.device, size: int) -> float:
    """GB/s of a collective over all ranks: blocks grow until one takes long enough to be believed."""
    for bytes_ in _sizes(device):
        block = torch.zeros(-(-bytes_ // size) * size, dtype=torch.uint8, device=device)
        _finish(device)
        start = time.perf_counter()
        collective(block)
        _finish(device)
        slowest = torch.tensor(time.perf_counter() - start, device=device, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # all must agree on whether to go on
        if slowest > SPAN_SECONDS:
            break
    return block.numel() / float(slowest) / 1e9


def pairs(device: torch.device, leaders: list[int], rank: int, store: dist.Store, answer: Answer) -> None:
    """Tell what this rank sent, as [to which node, GB/s at best, GB/s usually, why nothing passed where nothing did], growing pair by
    pair. `leaders`: the first rank of each node."""
    here, found = leaders.index(rank), []
    for one, other in (pair for a_round in schedule(len(leaders)) for pair in a_round if here in pair):
        peer = other if here == one else one
        answer.tell(peer=peer)
        try:  # the other may be waiting for a third one whose link is down
            _both(store, "met", here, peer, answer.left / 2)
        except RuntimeError:
            continue
        group = None
        try:
            group = dist.new_group([leaders[one], leaders[other]], timeout=timedelta(seconds=PAIR_SECONDS), use_local_synchronization=True)
            found.append([peer, *_exchange(device, leaders[one], leaders[other], rank, group), None])
        except RuntimeError as error:  # fails this pair only: each has its own connection
            found.append([peer, 0.0, 0.0, str(error).splitlines()[0][:200]])
        answer.tell(pairs=found)
        with suppress(RuntimeError):  # who hangs up first could cut the other's last message short
            _both(store, "parted", here, peer, PAIR_SECONDS)
        if group is not None:  # torch names a group after how many there are, which must be the same on both sides
            dist.destroy_process_group(group)
    answer.tell(peer=None)


def _both(store: dist.Store, what: str, here: int, peer: int, seconds: float) -> None:
    """Wait until both nodes of a pair have come to the same point. Raises RuntimeError when the other does not in time."""
    store.set(f"{what}/{here}/{peer}", "")
    store.wait([f"{what}/{peer}/{here}"], timedelta(seconds=seconds))


def _exchange(device: torch.device, one: int, other: int, rank: int, group: dist.ProcessGroup) -> tuple[float, float]:
    """GB/s from this rank to the other of a pair, at best and usually. They take turns, so that a cable that is slow one way shows
    which, and a machine that is busy for a while slows both ways."""
    ways = ((one, other), (other, one))
    sizes, seconds = {}, {}
    for way in ways:
        for sizes[way] in _sizes(device):
            seconds[way] = [_transfer(sizes[way], device, *way, rank, group)]
            if seconds[way][0] > SPAN_SECONDS:
                break
    for _ in range(REPEATS):
        for way in ways:
            seconds[way].append(_transfer(sizes[way], device, *way, rank, group))
    mine = ways[rank == other]
    return sizes[mine] / min(seconds[mine]) / 1e9, sizes[mine] / statistics.median(seconds[mine]) / 1e9


def _transfer(bytes_: int, device: torch.device, sender: int, receiver: int, rank: int, group: dist.ProcessGroup) -> float:
    """Seconds from the start of a transfer to the answer that all has arrived, told to both."""
    seconds = torch.zeros(1, dtype=torch.float64, device=device)
    block = torch.empty(bytes_, dtype=torch.uint8, device=device)
    if rank == sender:
        _finish(device)
        start = time.perf_counter()
        dist.send(block, receiver, group)
        dist.recv(seconds, receiver, group)
        _finish(device)
        seconds[0] = time.perf_counter() - start
        dist.send(seconds, receiver, group)
    else:
        dist.recv(block, sender, group)
        dist.send(seconds, sender, group)
        dist.recv(seconds, sender, group)
    return float(seconds)


def schedule(nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs of nodes: every pair of a few nodes; of many those at distance 1, 2, 4, ... around the ring."""
    if nodes <= ALL_PAIRS:
        ring = [*range(nodes), *([-1] if nodes % 2 else [])]  # the circle method: the first stays, the others move on
        rounds = []
        for _ in range(len(ring) - 1):
            half = len(ring) // 2
            rounds.append([(a, b) for a, b in zip(ring[:half], reversed(ring[half:])) if -1 not in (a, b)])
            ring = [ring[0], ring[-1], *ring[1:-1]]
        return rounds
    rounds, distance = [], 1
    while distance <= nodes // 2:
        for odd in (0, 1):
            starts = [n for n in range(nodes) if n // distance % 2 == odd and n + distance < nodes]
            rounds.append([(n, n + distance) for n in starts])
        distance *= 2
    return rounds


def _leaders(local_rank: int, size: int) -> list[int]:
    seen = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(seen, torch.tensor([local_rank]), group=dist.new_group(backend="gloo"))
    return [rank for rank, first in enumerate(seen) if int(first) == 0]


def _sizes(device: torch.device) -> Iterator[int]:
    bytes_ = SMALLEST
    while bytes_ <= LARGEST * (16 if device.type == "cuda" else 1):
        yield bytes_
        bytes_ *= 4


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
