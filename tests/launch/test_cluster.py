"""Ranks on several machines: real agents, over pipes, with small stand-ins for `python -m bigtrain`. Over ssh: tests/cluster."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bigtrain.errors import BAD_NODE, DONE, FAILURE, HANG, STOPPED, StopRequested, UserError
from bigtrain.runfolder import OWNER, process_start
from bigtrain_launch import channel, local, remote
from bigtrain_launch.cluster import Cluster, Node
from bigtrain_launch.local import End

A, B = Node("a", 2), Node("b", 1)


@pytest.fixture
def attempt(cluster, tmp_path, monkeypatch):
    """Let every rank run a script: attempt(script, nodes, **arguments of Cluster.attempt) -> End."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bigtrain").mkdir()
    (tmp_path / "bigtrain/__init__.py").touch()  # else the real one comes first
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.4)

    def run(script: str, nodes=(A, B), **arguments) -> End:
        prelude = "import json, os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
        (tmp_path / "bigtrain/__main__.py").write_text(prelude + script)
        assert cluster.connect([node.name for node in nodes]) == {}
        return cluster.attempt(nodes, ["train", "x"], arguments.pop("environment", {}), **arguments)

    return run


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    return process_start(pid) is None


WRITE = "json.dump([sys.argv[1:], dict(os.environ), os.getpid()], open(f'{rank}.json', 'w'))\n"


def test_ranks_in_the_order_of_the_machines(attempt, tmp_path):
    assert attempt(WRITE, (B, A), environment={"MINE": "1", "PATH": "/bin"}, run="/runs/r") == End(DONE)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, (node, local_rank, machine) in enumerate([("b", 0, 0), ("a", 0, 1), ("a", 1, 1)]):
        argv, environment, _ = seen[rank]
        assert argv == ["train", "x"]
        numbers = [environment[k] for k in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
        assert numbers == [str(rank), str(local_rank), str(machine), "3", {"a": "2", "b": "1"}[node]]
        assert environment["MINE"] == "1" and environment["PATH"] == "/bin" and environment["BIGTRAIN_RUN"] == "/runs/r"
        assert environment["BIGTRAIN_NODE"] == node and environment["OMP_NUM_THREADS"]
    assert len({(e["MASTER_ADDR"], e["MASTER_PORT"], e["BIGTRAIN_ATTEMPT"]) for _, e, _ in seen}) == 1


def test_one_machine_meets_itself(attempt, tmp_path):
    assert attempt(WRITE, (B,)).code == DONE
    assert json.loads((tmp_path / "0.json").read_text())[1]["MASTER_ADDR"] == "127.0.0.1"


def test_rank_0_is_shown_and_the_first_that_fails(attempt, shown, capfd):
    script = "print(f'ä {rank}', flush=True)\nif rank == 2: time.sleep(0.2); sys.exit('disk full')\ntime.sleep(60)"
    end = attempt(script)
    assert end == End(FAILURE, 2, host="b", suspects=("b",))
    assert "".join(shown) == "ä 0\n"
    assert capfd.readouterr().err.splitlines() == [
        "bigtrain: rank 2 on b ended with exit code 1; its log is rank-00002.log in the run's newest attempts/*/logs",
        "ä 2",
        "disk full",
    ]


def test_a_long_story_is_shown_by_its_end(attempt, capfd):
    attempt("if rank == 2: print('x' * 1000000); sys.exit('the end')")
    said = capfd.readouterr().err
    assert said.rstrip().endswith("x\nthe end") and len(said) < 20000


def test_much_output_of_rank_0_arrives_whole(attempt, shown):
    attempt("if rank == 0:\n for n in range(200000): print(n)")
    assert "".join(shown) == "".join(f"{n}\n" for n in range(200000))


def test_a_killed_rank(attempt, capfd):
    assert attempt("if rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(60)") == End(FAILURE, 1, 9, host="a", suspects=("a",))
    assert "rank 1 on a was killed by SIGKILL (out of memory?)" in capfd.readouterr().err


def test_who_found_a_hang_is_quoted(attempt, capfd):
    script = f"if rank == 2: print('bigtrain: no progress: rank 1 is late', flush=True)\nif rank != 1: sys.exit({HANG})\ntime.sleep(60)"
    end = attempt(script)
    assert (end.code, end.suspects) == (HANG, ())
    assert "bigtrain: no progress: rank 1 is late" in capfd.readouterr().err


def test_an_agent_that_is_killed_takes_its_ranks_with_it(attempt, pipes, tmp_path, capfd):
    def kill():
        until(lambda: all((tmp_path / f"{rank}.json").exists() and (tmp_path / f"{rank}.json").read_text() for rank in range(3)))
        pipes.agents["a"].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    begun = time.monotonic()
    end = attempt(WRITE + "time.sleep(60)")
    thread.join()
    assert end == End(FAILURE, 0, host="a", suspects=("a",), gone=("a",), reason="a is gone: the connection ended")
    assert time.monotonic() - begun < 20 and "bigtrain: a is gone: the connection ended" in capfd.readouterr().err
    until(lambda: all(gone(json.loads((tmp_path / f"{rank}.json").read_text())[2]) for rank in range(3)))


def test_an_agent_that_falls_silent_is_gone_and_can_be_had_again(attempt, cluster, pipes, tmp_path, monkeypatch):
    monkeypatch.setattr(channel, "SILENCE", 4.0)
    assert cluster.connect(["a", "b"]) == {}

    def stop():
        until(lambda: (tmp_path / "2.json").exists())
        pipes.agents["b"].send_signal(signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    end = attempt(WRITE + "if os.environ['TRY'] == '1': time.sleep(60)", environment={"TRY": "1"})
    thread.join()
    assert end.reason == "b is gone: no sign of life for 4 s"
    stopped = pipes.agents["b"]
    assert attempt(WRITE, environment={"TRY": "2"}).code == DONE
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(20) == 0  # it has noticed that it is not wanted any more


def test_ranks_end_with_the_launcher(tmp_path):
    """Whose kill -9 closes the pipes; the ranks do not even listen to signals."""
    (tmp_path / "bigtrain").mkdir()
    (tmp_path / "bigtrain/__init__.py").touch()
    (tmp_path / "bigtrain/__main__.py").write_text(
        "import os, signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "open(os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import os; from pathlib import Path; from conftest import Pipes\n"
        "from bigtrain_launch.cluster import Cluster, Node; from bigtrain_launch.local import Signals\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "with Signals() as signals, Cluster(Pipes(Path('.')), signals) as cluster:\n"
        "    cluster.connect(['a', 'b']); cluster.attempt([Node('a', 1), Node('b', 1)], [], {})"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{local_path()}"})
    try:
        until(lambda: all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"))
        launcher.kill()
        until(lambda: all(gone(int((tmp_path / rank).read_text())) for rank in "01"), 15)
    finally:
        launcher.kill()
        launcher.wait()


def local_path() -> str:
    root = Path(__file__).parents[2]
    return f"{root}{os.pathsep}{root / 'launch'}"


def test_a_signal_reaches_every_rank_once(attempt, cluster, tmp_path):
    script = (
        "def arrived(*a): print('x', file=open(f'signals-{rank}', 'a')); time.sleep(0.2); sys.exit(75)\n"
        "signal.signal(15, arrived)\nopen(f'ready-{rank}', 'w')\ntime.sleep(60)"
    )

    def ask():
        until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(3)))
        cluster.signals.add(signal.SIGTERM)
        cluster.signals.add(signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    end = attempt(script)
    thread.join()
    assert (end.code, end.asked) == (STOPPED, True)
    assert [(tmp_path / f"signals-{rank}").read_text() for rank in range(3)] == ["x\n"] * 3


def test_a_signal_to_an_agent_stops_the_run(attempt, pipes, tmp_path):
    """A scheduler may tell the agents, not the launcher."""
    script = f"signal.signal(15, lambda *a: sys.exit({STOPPED}))\nopen(f'ready-{{rank}}', 'w')\ntime.sleep(60)"

    def ask():
        until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(3)))
        pipes.agents["b"].send_signal(signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    end = attempt(script)
    thread.join()
    assert (end.code, end.asked) == (STOPPED, True)


def test_a_signal_while_machines_are_awaited(cluster, pipes, monkeypatch):
    monkeypatch.setattr(pipes, "start", lambda names: None)
    cluster.signals.add(signal.SIGINT)
    with pytest.raises(StopRequested):
        cluster.connect(["a"])


def test_strays_of_an_earlier_start_are_ended(attempt, tmp_path, capfd):
    """What a rank has started and not ended; a process of another run, and of a launcher that is at work, is left alone."""
    stay = "import subprocess\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    attempt(f"{stay}open('stray', 'w').write(str(p.pid))", (B,), run="/runs/mine", environment={OWNER: "me"})
    attempt(f"{stay}open('other', 'w').write(str(p.pid))", (B,), run="/runs/other", environment={OWNER: "me"})
    stray, other = (int((tmp_path / name).read_text()) for name in ("stray", "other"))
    try:
        assert attempt("", (B,), run="/runs/mine", environment={OWNER: "you"}).code == DONE
        assert not gone(stray)  # its agent lives, and its launcher is another one
        assert attempt("", (B,), run="/runs/mine", environment={OWNER: "me"}).code == DONE
        assert gone(stray) and not gone(other)
        assert "bigtrain: b: ended 1 process that an earlier start of this run had left" in capfd.readouterr().err
    finally:
        os.kill(other, 9)


def test_a_folder_that_is_not_there(attempt, cluster, tmp_path, monkeypatch, capfd):
    assert cluster.connect(["a", "b"]) == {}
    monkeypatch.setattr(remote.os, "getcwd", lambda: "/not/there")
    end = attempt("")
    assert sorted(end.gone) == ["a", "b"] and end.reason == f"{end.host} cannot start ranks: /not/there: No such file or directory"


def test_a_port_that_is_taken(attempt):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"launch.port: {port} is in use on a; choose another"):
            attempt("", port=port)
    assert attempt(f"sys.exit(os.environ['MASTER_PORT'] != '{port}')", port=port).code == DONE


def test_machines_that_do_not_reach_the_first(cluster, attempt, monkeypatch, capfd):
    assert cluster.connect(["a", "b", "c"]) == {}
    ask = cluster._ask

    def misled(names, kind, seconds, **facts):
        """A name that leads to another machine, for some."""
        if kind == "knock":
            names = [name for name in names if name not in wrong]
            found = ask(wrong, kind, seconds, **{**facts, "nonce": "another"}) if wrong else {}
            return found | ask(names, kind, seconds, **facts)
        return ask(names, kind, seconds, **facts)

    monkeypatch.setattr(cluster, "_ask", misled)
    nodes, wrong = [Node("a", 1), Node("b", 1), Node("c", 1)], ["c"]
    end = attempt("", nodes)
    assert (end.code, end.suspects, end.gone) == (BAD_NODE, ("c",), ("c",))
    assert end.reason.startswith("c does not reach a, where rank 0 is to be: port ") and "that is another machine" in end.reason
    assert end.reason in capfd.readouterr().err
    wrong = ["b", "c"]
    assert list(cluster.apart(nodes)) == ["a"]
    wrong = []
    assert cluster.apart(nodes) == {}


def test_machines_that_cannot_be_had(cluster, pipes):
    pipes.dead["b"] = "no route"
    assert cluster.connect(["a", "b"]) == {"b": "no route"}
    assert cluster.connect(["a"]) == {} and len(pipes.agents) == 1  # it is there already
    assert cluster.greeting("a")["pid"] == pipes.agents["a"].pid


def test_another_version_is_named(cluster, monkeypatch):
    monkeypatch.setattr("bigtrain_launch.cluster.PROTOCOL", 2)
    assert "does not fit this one: install the same version" in cluster.connect(["a"])["a"]


def test_no_answer_in_time(pipes, monkeypatch):
    monkeypatch.setattr(pipes, "start", lambda names: None)
    with local.Signals() as signals, Cluster(pipes, signals, patience=0.2) as cluster:
        assert cluster.connect(["a"]) == {"a": "no agent has answered for 0 s"}


# ---- Questions ----


def test_gather(cluster, attempt, tmp_path):
    (tmp_path / "probe.py").write_text(
        "import json, os, sys\nrank = int(os.environ['RANK'])\nprint('noise')\n"
        "if rank == 1: sys.exit(3)\nprint(json.dumps({'text': 'x' * 200000, 'argv': sys.argv[1:]}))\n"
        "if rank == 2: sys.exit('a library complains as it ends')"
    )
    assert cluster.connect(["a", "b"]) == {}
    answers = cluster.gather([A, B], "probe", ["--fast"], {}, 20)
    assert sorted(answers) == [0, 2] and answers[2]["argv"] == ["--fast"] and len(answers[0]["text"]) == 200000


def test_gather_is_over_in_time(cluster, attempt, tmp_path):
    (tmp_path / "probe.py").write_text("import os, time\nprint('{}', flush=True)\nif os.environ['RANK'] == '1': time.sleep(60)")
    cluster.connect(["a", "b"])
    begun = time.monotonic()
    assert sorted(cluster.gather([A, B], "probe", [], {}, 1.5)) == [0, 2] and time.monotonic() - begun < 20


def test_run_once_on_each(cluster, attempt, tmp_path):
    (tmp_path / "bigtrain/__main__.py").write_text("import os, sys\nif os.environ['BIGTRAIN_NODE'] == 'b': sys.exit('no compiler')")
    cluster.connect(["a", "b"])
    assert cluster.run([A, B], ["ops", "build"], {}) == {"b": "`bigtrain ops` failed there: no compiler"}


def test_clocks(cluster, tmp_path):
    cluster.connect(["a", "b"])
    facts = cluster.facts([A, B], {"folder": str(tmp_path), "token": "t"})
    assert list(facts) == ["a", "b"]
    assert all(abs(one["clock"]) <= one["round_trip"] < 5 for one in facts.values())


def test_many_agents_start_in_time(attempt, pipes, cluster, tmp_path):
    """32 on this machine, each with a rank that ends at once: under 10 s with two cores of its own."""
    nodes = [Node(f"n{number}", 1) for number in range(32)]
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    assert cluster.connect([node.name for node in nodes]) == {}
    assert attempt("open(str(rank), 'w')", nodes) == End(DONE)
    wall = time.monotonic() - begun
    for node in nodes:
        cluster.drop(node.name, "done")
    pipes.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert wall < 10 or computed / 2 < 10 < wall < 60  # others use the cores as well
    assert sorted(int(path.name) for path in tmp_path.glob("[0-9]*")) == list(range(32))


def test_nothing_is_left_open(pipes, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with local.Signals() as signals, Cluster(pipes, signals) as cluster:
        cluster.connect(["a", "b"])
    assert len(os.listdir("/proc/self/fd")) == before
    assert [agent.wait(20) for agent in pipes.agents.values()] == [0, 0]


def test_the_last_words_of_an_earlier_start_are_not_heard():
    class Links:
        show = print

        def poll(self, seconds):
            return [("a", {"kind": "ended", "token": token, "rank": 1, "code": 0, "tail": ""}) for token in ("earlier", sent["token"])]

        def send(self, name, kind, /, **facts):
            sent.update(facts)

        def lost(self, name):
            return None

        def drop(self, name, why):
            pass

    sent = {}
    ranks = remote.Remote(Links(), [A], show_first=True)
    ranks.start([], {}, {"a": remote.Meeting("127.0.0.1", 1, None)}, "", 0)
    assert ranks.ended(0) == [local.Exit(1, 0, "a")] and ranks.running == {0}
    sent["token"] = "another"
    assert ranks.ended(0) == []
