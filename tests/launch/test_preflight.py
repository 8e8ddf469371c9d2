"""What a preflight concludes from what machines tell and from made-up measurements, and what it asks of a cluster."""

import random
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bigtrain.config import Config
from bigtrain.configlaunch import Preflight
from bigtrain.errors import RunError
from bigtrain.probe import schedule
from bigtrain.runfolder import RunFolder
from bigtrain_launch import facts as facts_module
from bigtrain_launch import preflight
from bigtrain_launch.cluster import Node
from bigtrain_launch.facts import collect
from bigtrain_launch.preflight import Verdict, best_of, check, show
from bigtrain_launch.verdict import files_needed, judge_answers, judge_facts, odd_ones

WORD = "launcher's word"
FOLDER = "runs/x"


def nodes(count: int, ranks: int = 2) -> list[Node]:
    return [Node(f"n{number}", ranks) for number in range(count)]


def told(**changes) -> dict:
    """What a healthy node tells; `versions` and `space` are changed key by key."""
    facts = {
        "executable": "/venv/bin/python",
        "versions": {"python": "3.11.7", "bigtrain": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "triton": "3.7.1", "numpy": "2.4"},
        "code": "c0de",
        "commit": "abc",
        "shared": {"read": WORD, "wrote": "w"},
        "space": {
            FOLDER: {"free_gib": 900.0, "write_mib_s": 800.0, "error": None},
            "/tmp": {"free_gib": 9.0, "write_mib_s": 1.0, "error": None},
        },
        "shared_memory_gib": 16.0,
        "open_files": 1 << 20,
        "gpus": 8,
        "clock": 0.01,
    }
    for key in ("versions", "space", "shared"):
        facts[key] = {**facts[key], **changes.pop(key, {})}
    return facts | changes


def facts_verdict(*, settings: Preflight | None = None, seen=None, ranks: int = 2, **by_node) -> dict[str | None, list[str]]:
    """Findings by node, problems with a `!` before them, of nodes n0, n1, ...; None for one that is silent."""
    here = [Node(name, ranks) for name in by_node]
    present = {name: facts for name, facts in by_node.items() if facts}
    everywhere = dict.fromkeys(present, True) | (seen or {})
    return by_name(judge_facts(here, present, WORD, everywhere, FOLDER, settings or Preflight()))


def by_name(findings) -> dict[str | None, list[str]]:
    found: dict[str | None, list[str]] = {}
    for finding in findings:
        assert finding.advice and "\n" not in finding.text
        found.setdefault(finding.node, []).append(("!" if finding.problem else "") + finding.text)
    return found


def measured(
    here: list[Node], *, node=None, link=None, rank=None, noise: float = 0.0, seed: int = 0, scale: float = 1.0, device="NVIDIA H100"
):
    """Answers of healthy ranks, but for `node`: (index, share sent, share received), `link`: (two indices, share) and `rank`: (rank,
    share); `noise` is the most that a figure is off, as a share of it."""
    off = random.Random(seed)
    answers, first = {}, []
    for each in here:
        first.append(len(answers))
        for _ in range(each.ranks):
            number = len(answers)
            tflops = 700 * scale * (rank[1] if rank and rank[0] == number else 1.0) * (1 - noise * off.random())
            answers[number] = {"stage": "done", "rank": number, "world": sum(n.ranks for n in here), "device": device, "tflops": tflops}
    for a_round in schedule(len(here)):
        for pair in a_round:
            for one, other in (pair, pair[::-1]):
                rate = 45 * scale * (1 - noise * off.random())
                if node and one == node[0]:
                    rate *= node[1]
                if node and other == node[0]:
                    rate *= node[2]
                if link and {one, other} == set(link[:2]):
                    rate *= link[2]
                answers[first[one]].setdefault("pairs", []).append([other, rate, rate * (1 - noise * off.random()), None])
    return answers


def answers_verdict(here, answers, settings=None):
    return by_name(judge_answers(here, answers, settings or Preflight()))


# ---- what machines tell


def test_machines_that_are_alike():
    assert facts_verdict(n0=told(), n1=told(), n2=told()) == {}


def test_another_version_is_named_with_what_the_others_have():
    found = facts_verdict(n0=told(), n1=told(versions={"torch": "2.12.0"}), n2=told())
    assert found == {"n1": ["!torch 2.12.0; the others have 2.13.0"]}
    assert facts_verdict(n0=told(), n1=told(versions={"triton": None}), n2=told()) == {
        "n1": ["!triton is not installed; the others have 3.7.1"]
    }
    assert facts_verdict(n0=told(), n1=told(versions={"numpy": "2.3"})) == {"n1": ["numpy 2.3; the others have 2.4"]}  # only a warning


def test_of_two_the_first_is_taken_for_right():
    assert facts_verdict(n0=told(versions={"torch": "2.12.0"}), n1=told()) == {"n1": ["!torch 2.13.0; the others have 2.12.0"]}
    assert odd_ones({"a": 1, "b": 2, "c": 2}) == (2, {"a": 1}) and odd_ones({}) == (None, {})


def test_other_source_files_are_seen_even_under_the_same_commit():
    found = facts_verdict(n0=told(), n1=told(), n2=told(code="0ther", commit="abc-dirty"))
    assert found == {"n2": ["!another source of bigtrain (abc-dirty; the others: abc)"]}
    assert facts_verdict(n0=told(), n1=told(code="0ther")) == {"n1": ["!another source of bigtrain (abc; the others: abc)"]}


def test_a_silent_machine_is_named():
    assert facts_verdict(n0=told(), n1=None, n2=told()) == {"n1": ["!did not answer"]}


def test_a_folder_that_is_not_shared():
    found = facts_verdict(n0=told(), n1=told(shared={"read": None}), n2=told(shared={"read": "an old word"}))
    assert set(found) == {"n1", "n2"} and all(
        "!does not see what the launcher writes in runs/x: it is not shared" in f for f in found.values()
    )
    found = facts_verdict(n0=told(), n1=told(), seen={"n1": False})
    assert found == {"n1": ["!what it writes in runs/x is not seen elsewhere: it is not shared"]}


def test_a_full_disk_is_named_once():
    full = {"free_gib": 0.0, "write_mib_s": None, "error": "No space left on device"}
    assert facts_verdict(n0=told(), n1=told(space={"/tmp": full})) == {"n1": ["!cannot write in /tmp: No space left on device"]}
    found = facts_verdict(n0=told(), n1=told(space={FOLDER: full}, shared={"wrote": None}))
    assert found == {"n1": [f"!cannot write in {FOLDER}: No space left on device"]}
    absent = {"free_gib": None, "write_mib_s": None, "error": "No such file or directory"}
    assert len(facts_verdict(n0=told(), n1=told(space={FOLDER: absent}, shared={"read": None, "wrote": None}))["n1"]) == 1


def test_too_little_room():
    little = {"free_gib": 1.5, "write_mib_s": 800.0, "error": None}
    assert facts_verdict(n0=told(space={FOLDER: little}), n1=told()) == {}
    found = facts_verdict(n0=told(space={FOLDER: little}), n1=told(), settings=Preflight(free_gib=2))
    assert found == {"n0": ["!1.50 GiB are free in runs/x, less than launch.preflight.free_gib: 2"]}


def test_a_slow_disk_a_small_dev_shm_and_few_open_files_are_warnings():
    slow = {"free_gib": 900.0, "write_mib_s": 12.0, "error": None}
    found = facts_verdict(n0=told(), n1=told(space={FOLDER: slow}, shared_memory_gib=0.0625, open_files=256), n2=told())
    assert found == {
        "n1": [
            "/dev/shm has 0.06 GiB; ranks of a node exchange data there",
            f"256 open files are allowed; 6 ranks may need {files_needed(6)}",
            "writes 12.0 MiB/s in runs/x; usual here: 800",
        ]
    }


def test_a_missing_gpu():
    assert facts_verdict(n0=told(), n1=told(gpus=7), n2=told()) == {"n1": ["!7 GPUs; the others have 8"]}


def test_a_clock_that_differs_from_those_of_the_others():
    """The launcher's own clock does not count: all may differ from it by the same."""
    found = facts_verdict(n0=told(clock=100.0), n1=told(clock=103.5), n2=told(clock=100.2), n3=told(clock=None))
    assert found == {"n1": ["its clock is 3.3 s ahead of the others'"]}
    assert facts_verdict(n0=told(clock=0.0), n1=told(clock=-0.9)) == {}
    assert (
        "behind"
        in facts_verdict(n0=told(clock=0.0), n1=told(clock=-0.9), n2=told(clock=0.1), settings=Preflight(clock_seconds=0.5))["n1"][0]
    )


# ---- what is measured


@pytest.mark.parametrize("count", [2, 3, 4, 8, 17, 64, 1024])
def test_the_schedule(count):
    rounds = schedule(count)
    for a_round in rounds:
        taking_part = [n for pair in a_round for n in pair]
        assert len(taking_part) == len(set(taking_part)), "a node is in two pairs at once"
    pairs = Counter(tuple(sorted(pair)) for a_round in rounds for pair in a_round)
    assert set(pairs.values()) == {1} and {n for pair in pairs for n in pair} == set(range(count))
    if count <= 16:
        assert len(pairs) == count * (count - 1) / 2
    else:
        assert len(rounds) <= 20
        assert min(Counter(n for pair in pairs for n in pair).values()) >= 3  # one bad partner must not condemn a node


@pytest.mark.parametrize("count", [2, 3, 4, 16, 17, 64, 1024])
@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_nobody_is_blamed_where_all_are_alike(count, scale):
    """However fast they are, and with a quarter of noise."""
    here = nodes(count)
    for seed in range(20 if count < 64 else 2):
        assert answers_verdict(here, measured(here, noise=0.25, scale=scale, seed=seed)) == {}


@pytest.mark.parametrize("count", [3, 4, 5, 16, 64, 1024])
@pytest.mark.parametrize(("sends", "receives"), [(0.1, 1.0), (1.0, 0.1), (0.1, 0.1)])
def test_a_slow_node(count, sends, receives):
    here = nodes(count)
    for at in {0, 1, count // 2, count - 1}:
        found = answers_verdict(here, measured(here, node=(at, sends, receives), noise=0.2, seed=at))
        assert list(found) == [f"n{at}"] and len(found[f"n{at}"]) == 1
        assert found[f"n{at}"][0].startswith("!sends" if sends < 1 else "!receives")


@pytest.mark.parametrize("count", [3, 4, 5, 16, 64, 1024])
def test_a_slow_link(count):
    """Between two nodes that are well with the others: both are named, one is to go."""
    here = nodes(count)
    found = answers_verdict(here, measured(here, link=(1, 2, 0.1), noise=0.2))
    assert list(found) in (["n1"], ["n2"])
    ((text,),) = found.values()
    assert text.startswith("!the link between n1 and n2 is slow: n1 to n2 ") and "usual here: " in text and "Gbit/s" in text


def test_one_node_with_two_slow_links_is_the_one_to_go():
    here, answers = nodes(8), measured(nodes(8))
    for one, other in ((3, 5), (3, 6)):
        for a, b in ((one, other), (other, one)):
            answers[2 * a]["pairs"] = [[peer, 1.0, 1.0, None] if peer == b else [peer, *rest] for peer, *rest in answers[2 * a]["pairs"]]
    assert {name: len(texts) for name, texts in answers_verdict(here, answers).items()} == {"n3": 2}


def test_two_nodes_one_of_which_sends_slowly():
    found = answers_verdict(nodes(2), measured(nodes(2), node=(0, 0.02, 1.0)))
    assert found == {"n0": ["!the link between n0 and n1 is slow: n0 to n1 7.2 Gbit/s, n1 to n0 360 Gbit/s; usual here: 360 Gbit/s"]}


def test_a_link_through_which_nothing_passes():
    here, answers = nodes(4), measured(nodes(4))
    for a, b in ((1, 2), (2, 1)):
        answers[2 * a]["pairs"] = [p if p[0] != b else [b, 0.0, 0.0, "timed out"] for p in answers[2 * a]["pairs"]]
    assert "n1 to n2 0 Mbit/s, n2 to n1 0 Mbit/s (timed out)" in next(iter(answers_verdict(here, answers).values()))[0]
    answers = measured(here)
    for a, b in ((1, 2), (2, 1)):  # both hung in each other when time ran out
        answers[2 * a] |= {"stage": "pairs", "peer": b, "pairs": [p for p in answers[2 * a]["pairs"] if p[0] != b]}
    assert "(no answer)" in next(iter(answers_verdict(here, answers).values()))[0]


def test_a_network_in_two_halves_blames_nobody():
    """Within a half of the cluster it is five times as fast as between the halves."""
    here, answers = nodes(8), measured(nodes(8))
    for rank in range(0, 16, 2):
        for pair in answers[rank]["pairs"]:
            pair[1] = pair[2] = 45 if pair[0] // 4 == rank // 8 else 9
    found = answers_verdict(here, answers)
    assert set(found) <= {None} and not any(text.startswith("!") for texts in found.values() for text in texts)


@pytest.mark.parametrize(("count", "ranks"), [(2, 1), (3, 2), (64, 8), (1024, 8)])
def test_a_slow_gpu(count, ranks):
    here = nodes(count, ranks)
    bad = count * ranks - 1
    found = answers_verdict(here, measured(here, rank=(bad, 0.4), noise=0.1))
    assert list(found) == [f"n{count - 1}"]
    assert found[f"n{count - 1}"][0].startswith(f"!rank {bad} (NVIDIA H100): ") and "usual here: " in found[f"n{count - 1}"][0]


def test_all_ranks_of_a_node_are_slow():
    here = nodes(4, 4)
    answers = measured(here)
    for rank in range(4, 8):
        answers[rank]["tflops"] /= 2
    assert answers_verdict(here, answers) == {"n1": ["!ranks 4 to 7 (NVIDIA H100): 350 TFLOP/s in a matrix product; usual here: 700"]}


def test_another_kind_of_gpu_is_slower_and_only_told():
    here, answers = nodes(4), measured(nodes(4))
    for rank in (6, 7):
        answers[rank] |= {"device": "NVIDIA A100", "tflops": 250.0}
    assert answers_verdict(here, answers) == {"n3": ["its device is NVIDIA A100, others have NVIDIA H100"]}


def test_the_thresholds_are_settings():
    here = nodes(4)
    answers = measured(here, link=(0, 1, 0.4), rank=(5, 0.6))
    assert answers_verdict(here, answers, Preflight(slow_link=0.3, slow_device=0.5)) == {}
    assert set(answers_verdict(here, answers)) == {"n0", "n2"}


# ---- ranks that do not get through


def stopped(here, stage, **by_rank):
    """All ranks got as far as `stage`; r5={...} changes rank 5, r5=None is missing."""
    world = sum(node.ranks for node in here)
    answers = {rank: {"stage": stage, "rank": rank, "world": world} for rank in range(world)}
    for name, change in by_rank.items():
        rank = int(name[1:])
        answers[rank] = change and answers[rank] | change
    return {rank: answer for rank, answer in answers.items() if answer}


def test_a_rank_without_an_answer_and_not_those_that_waited():
    here = nodes(3)
    found = answers_verdict(here, stopped(here, "meeting the others", r0={"absent": [2, 3]}, r2=None, r3=None))
    assert found == {"n1": ["!ranks 2, 3 did not answer"]}


def test_a_node_that_does_not_reach_the_first():
    here = nodes(3)
    timed_out = {"error": "timed out while trying to connect to (n0, 20000)"}
    found = answers_verdict(here, stopped(here, "meeting the others", r0={"absent": [4, 5]}, r4=timed_out, r5=timed_out))
    assert found == {"n2": ["!ranks 4, 5 got no further than meeting the others: timed out while trying to connect to (n0, 20000)"]}


def test_a_first_node_that_nobody_reaches():
    here = nodes(3)
    timed_out = {f"r{rank}": {"error": "timed out"} for rank in range(2, 6)}
    found = answers_verdict(
        here, stopped(here, "meeting the others", r0={"absent": [2, 3, 4, 5]}, r1={"absent": [2, 3, 4, 5]}, **timed_out)
    )
    assert list(found) == ["n0"]
    found = answers_verdict(here, stopped(here, "meeting the others", r0={"error": "address already in use"}, **timed_out))
    assert found == {"n0": ["!rank 0 got no further than meeting the others: address already in use"]}


def test_a_rank_that_dies_is_named_and_not_those_that_lose_it():
    here = nodes(3)
    lost = {f"r{rank}": {"stage": "collectives", "error": "Connection closed by peer"} for rank in (0, 1, 2, 4, 5)}
    assert answers_verdict(here, stopped(here, "matrix product", **lost)) == {"n1": ["!rank 3 got no further than matrix product"]}
    assert answers_verdict(here, stopped(here, "collectives", **lost)) == {"n1": ["!rank 3 got no further than collectives"]}


def test_nobody_is_blamed_for_what_stops_all():
    here = nodes(3)
    assert answers_verdict(here, stopped(here, "collectives")) == {None: ["!no rank got further than collectives in time"]}
    assert answers_verdict(here, {}) == {None: ["no rank got further than starting in time"]}  # torch from a cold disk: a warning
    mistake = {f"r{rank}": {"error": "x.yaml: no such file"} for rank in range(6)}
    assert answers_verdict(here, stopped(here, "starting", **mistake)) == {
        None: ["!no rank got further than starting: x.yaml: no such file"]
    }


def test_a_silent_world_of_one_is_no_answer():
    here = nodes(2, 1)
    found = answers_verdict(here, stopped(here, "done", r1={"world": 1}))
    assert found == {"n1": ["!rank 1 took part in a run of 1 ranks, not 2"]}


def test_pairs_that_time_cut_short_are_no_fault():
    here, answers = nodes(4), measured(nodes(4))
    answers[0] |= {"stage": "pairs", "peer": 3, "pairs": answers[0]["pairs"][:1]}
    assert answers_verdict(here, answers) == {}


def test_another_config_or_other_data():
    here, answers = nodes(3), measured(nodes(3))
    for answer in answers.values():
        answer |= {"config": "c", "data": "d"}
    answers[2] |= {"config": "other"}
    answers[5] |= {"data": None}
    found = answers_verdict(here, answers)
    assert found == {"n1": ["!the config differs from that of the others"], "n2": ["!the prepared data is not there"]}


# ---- the whole, over a cluster that is made up


class FakeCluster:
    """Two nodes whose facts are this machine's, and whose ranks answer as they are told to, once per call."""

    def __init__(self, *answers):
        self.answers, self.asked, self.unreached = list(answers), [], {}

    def facts(self, here, asked, seconds):
        return {node.name: collect(asked) | {"clock": 0.0} for node in here}

    def apart(self, here):
        return self.unreached

    def gather(self, here, module, argv, environment, seconds):
        self.asked.append((module, argv, environment, seconds))
        return self.answers.pop(0)


@pytest.fixture
def config():
    model = {"layers": 1, "width": 8, "heads": 1, "mlp_width": 8, "max_positions": 8}
    train = {"steps": 1, "micro_batch": 1, "accumulation": 1}
    launch = {"preflight": {"free_gib": 0}}
    return Config.model_validate(
        {"model": model, "data": {"sequence_length": 8}, "train": train, "optimizer": {"lr": 1e-3}, "launch": launch}
    )


def run_check(cluster, config, tmp_path, here=None) -> Verdict:
    return check(cluster, here or nodes(2), config, RunFolder(tmp_path), ["c.yaml"], {"A": "b"}, lambda text: None)


def test_a_check_that_passes(config, tmp_path):
    cluster = FakeCluster(measured(nodes(2)))
    verdict = run_check(cluster, config, tmp_path)
    assert not verdict.failed and verdict.problems == {}
    ((module, argv, environment, seconds),) = cluster.asked
    assert (module, argv[0], argv[2:], environment) == ("bigtrain.probe", "--seconds", ["c.yaml"], {"A": "b"})
    assert float(argv[1]) < seconds <= 60
    assert list(tmp_path.iterdir()) == []


def test_what_is_slow_is_measured_again(config, tmp_path):
    """A burst of other traffic is over the second time; a bad cable is not."""
    here = nodes(4)
    slow = measured(here, node=(2, 0.1, 0.1), noise=0.2)
    verdict = run_check(FakeCluster(slow, measured(here)), config, tmp_path, here)
    assert not verdict.failed and len(verdict.answers) == 8
    verdict = run_check(FakeCluster(slow, measured(here, node=(2, 0.1, 0.1), seed=1)), config, tmp_path, here)
    assert list(verdict.problems) == ["n2"]


def test_no_rank_is_started_where_the_facts_are_wrong(config, tmp_path, monkeypatch):
    cluster = FakeCluster()
    monkeypatch.setattr(cluster, "facts", lambda here, asked, seconds: {"n0": collect(asked)})
    verdict = run_check(cluster, config, tmp_path)
    assert verdict.problems == {"n1": ["did not answer"]} and cluster.asked == []


def test_a_machine_that_does_not_reach_the_first(config, tmp_path):
    cluster = FakeCluster()
    cluster.unreached = {"n1": "n1 does not reach n0, where rank 0 is to be: timed out"}
    verdict = run_check(cluster, config, tmp_path)
    assert list(verdict.problems) == ["n1"] and cluster.asked == []


def test_a_folder_that_only_the_launcher_has(config, tmp_path, monkeypatch):
    """A node with a folder of its own at that path neither sees the launcher's word nor is seen."""
    cluster, elsewhere = FakeCluster(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(
        cluster, "facts", lambda here, asked, seconds: {"n0": collect(asked), "n1": collect(asked | {"folder": str(elsewhere)})}
    )
    verdict = run_check(cluster, config, run)
    assert list(verdict.problems) == ["n1"] and "is not shared" in verdict.problems["n1"][0]


def test_agents_are_at_home_elsewhere(config, tmp_path, monkeypatch):
    """Not in the launcher's working directory: what they are asked names the run's folder in full."""
    (tmp_path / "here/runs/x").mkdir(parents=True)
    cluster = FakeCluster(measured(nodes(2)))
    honest = cluster.facts

    def facts(here, asked, seconds):
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir("/")
            return honest(here, asked, seconds)

    monkeypatch.setattr(cluster, "facts", facts)
    monkeypatch.chdir(tmp_path / "here")
    assert check(cluster, nodes(2), config, RunFolder("runs/x"), [], {}, lambda text: None).problems == {}


def test_a_run_folder_that_cannot_be_written(config, tmp_path):
    with pytest.raises(RunError, match="cannot be written"):
        run_check(FakeCluster(), config, tmp_path / "absent")


def test_two_measurements_clear_whom_either_clears():
    one = {0: {"stage": "done", "tflops": 1.0, "pairs": [[1, 5.0, 4.0, None], [2, 0.0, 0.0, "timed out"]]}, 1: {"stage": "done"}}
    two = {0: {"stage": "done", "tflops": 2.0, "pairs": [[1, 4.5, 4.2, None], [2, 3.0, 2.0, None]]}}
    assert best_of(one, two) == {
        0: {"stage": "done", "tflops": 2.0, "pairs": [[1, 5.0, 4.0, None], [2, 3.0, 0.0, None]]},
        1: {"stage": "done"},
    }


def test_luck_is_not_what_others_are_measured_by():
    """On busy machines a transfer that nothing disturbs is twice as fast as the usual one; three of these four nodes had one."""
    here, answers = nodes(4), measured(nodes(4))
    for rank in range(0, 8, 2):
        answers[rank]["pairs"] = [[peer, 10.0 if 2 in (peer, rank // 2) else 25.0, 9.0, None] for peer, *_ in answers[rank]["pairs"]]
    assert answers_verdict(here, answers) == {}


def shown(verdict: Verdict, width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        show(verdict, console)
    return capture.get()


def test_what_a_person_sees():
    here = nodes(3)
    answers = measured(here, node=(1, 0.004, 1.0))
    answers[0] |= {"all_reduce": 41.5, "all_to_all": 38.0, "latency_us": 31.0}
    facts = {node.name: told() for node in here}
    text = shown(Verdict(here, judge_answers(here, answers, Preflight()), facts, answers, 12.3))
    rows = [line.split() for line in text.splitlines() if "│ n" in line]
    assert [row[1] for row in rows] == ["n1", "n0", "n2"] and "problem" in rows[0] and "ok" in rows[1]
    assert "problem: n1: sends no faster than 1.44 Gbit/s to any other node; usual here: 360 Gbit/s" in text and "look at its cable" in text
    assert "all_reduce 41.5 GB/s" in text and "preflight of 3 machines failed in 12.3 s" in text


def test_a_thousand_nodes_fit_a_screen():
    here = nodes(1024)
    facts = {node.name: told(versions={"torch": "2.12.0"} if int(node.name[1:]) % 2 and int(node.name[1:]) < 80 else {}) for node in here}
    findings = judge_facts(here, facts, WORD, dict.fromkeys(facts, True), FOLDER, Preflight())
    text = shown(Verdict(here, findings, facts))
    assert len(text.splitlines()) < 40
    assert "and 24 more: torch 2.12.0; the others have 2.13.0" in text and "and 1008 more, 984 of them well" in text


def test_a_thousand_nodes_take_no_time():
    here = nodes(1024, 8)
    answers = measured(here, node=(700, 0.1, 0.1))
    start = time.process_time()
    assert list(answers_verdict(here, answers)) == ["n700"]
    assert time.process_time() - start < 5


# ---- facts


def test_facts_of_this_machine(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/launcher").write_text(WORD)
    found = collect({"folder": str(tmp_path), "token": "t"})
    assert found["versions"]["torch"] and found["code"] and found["open_files"] > 0 and found["shared_memory_gib"] is not None
    assert found["shared"]["read"] == WORD and (tmp_path / "t" / found["shared"]["wrote"]).read_text() == found["shared"]["wrote"]
    assert found["space"][str(tmp_path)]["error"] is None and found["space"][str(tmp_path)]["write_mib_s"] > 0
    assert judge_facts([Node("a", 1)], {"a": found}, WORD, {"a": True}, str(tmp_path), Preflight(free_gib=0)) == []


def test_facts_where_nothing_can_be_had(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(facts_module.tempfile, "TemporaryFile", fails)
    monkeypatch.setattr(facts_module.subprocess, "run", fails)
    found = collect({"folder": str(tmp_path / "absent"), "token": "t"})
    assert found["shared"] == {"read": None, "wrote": None} and found["commit"] is None
    assert found["space"][str(tmp_path / "absent")]["error"] == "No such file or directory"
    assert {space["error"] for place, space in found["space"].items() if "absent" not in place} == {"No space left on device"}


def test_the_digest_of_the_code_sees_a_changed_file(tmp_path, monkeypatch):
    """In a copy of the packages: another line of code is another digest, the same code at another place is not."""
    for name, where in (("bigtrain", "."), ("bigtrain_kernels", "kernels"), ("bigtrain_launch", "launch")):
        shutil.copytree(Path(preflight.__file__).parents[2] / where / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    here = facts_module.code()
    specs = {
        name: type("Spec", (), {"submodule_search_locations": [str(tmp_path / name)]})
        for name in ("bigtrain", "bigtrain_kernels", "bigtrain_launch")
    }
    monkeypatch.setattr(facts_module.importlib.util, "find_spec", specs.get)
    assert facts_module.code() == here
    with open(tmp_path / "bigtrain/train.py", "a") as file:
        file.write("# another line\n")
    assert facts_module.code() != here


def test_findings_are_told_apart():
    finding = judge_facts(nodes(1), {}, WORD, {}, FOLDER, Preflight())[0]
    assert Verdict([], [replace(finding, problem=False)]).failed is False and Verdict([], [finding]).failed is True
