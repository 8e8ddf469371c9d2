"""`bigtrain launch hosts`: over real ssh, between machines that lose their power, their processes and their minds."""

import re
import signal
import time

import pytest
from launching import Launches, losses, until

from bigtrain.checkpoint import format
from bigtrain.errors import BAD_NODE, DONE, FAILURE, STOPPED, USER_MISTAKE
from bigtrain.runfolder import read_json, read_rows


@pytest.fixture(scope="module")
def launches(hosts, tmp_path_factory) -> Launches:
    return Launches(hosts.nodes, tmp_path_factory.mktemp("launches"))


@pytest.fixture(autouse=True)
def tidy(hosts, launches):
    """Every test finds all machines on, and leaves no process."""
    yield
    for name in hosts.nodes.names:
        if name not in hosts.nodes.up_names():
            hosts.boot(name)
    launches.all_gone(20)


# ---- With stand-ins for the ranks ----


def test_ranks_on_two_machines(launches):
    config = launches.story("two", "words(0, 'done', False)")
    with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=2", "n9 slots=1"), SECRET="hush") as process:
        screen = process.communicate(timeout=60)[0]
    assert process.returncode == DONE, screen
    assert screen.splitlines() == ["rank 0 of 3 on n10"]
    ranks = [read_json(launches.run("two").attempt(1) / f"up-{rank}") for rank in range(3)]
    assert [r["host"] for r in ranks] == ["n10", "n10", "n9"]
    for rank, (local, node) in enumerate([(0, 0), (1, 0), (0, 1)]):
        environment = ranks[rank]["environment"]
        numbers = [environment[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK")]
        assert numbers == [str(rank), str(local), "3", "2" if node == 0 else "1", str(node)]
        assert environment["MASTER_ADDR"] == launches.nodes.ip["n10"] and environment["GLOO_SOCKET_IFNAME"] == "eth0"
        assert "SECRET" not in environment  # only what is named is forwarded


def test_forwarded_variables_are_on_no_command_line(launches):
    config = launches.story("forward", "for_ever()", launch={"forward": ["WANDB_API_KEY"]})
    arguments = [config, "--hostfile", launches.hostfile("n10 slots=1")]
    secret = "0123456789abcdef0123456789abcdef01234567"
    with launches.launcher("n9", "hosts", *arguments, WANDB_API_KEY=secret) as process:
        [rank] = launches.up("forward", 1, 1, process)
        assert rank["environment"]["WANDB_API_KEY"] == secret
        seen = [line for name in ("n9", "n10") for line in launches.nodes.processes(name, "")]
        assert any("ssh" in line for line in seen) and not any(secret in line for line in seen)
    with launches.launcher("n9", "hosts", *arguments) as process:
        screen = process.communicate(timeout=60)[0]
    assert process.returncode == USER_MISTAKE and "launch.forward: WANDB_API_KEY not set in this shell" in screen


def test_kill_9_of_the_launcher_leaves_no_process(launches):
    config = launches.story("killed", "for number in (1, 2, 15): signal.signal(number, signal.SIG_IGN)\nfor_ever()")
    with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=2", "n11 slots=2")) as process:
        launches.up("killed", 1, 4, process)
        launches.signal("n9", signal.SIGKILL)
        launches.all_gone(15)


def test_kill_9_of_an_agent_and_the_run_goes_on(launches):
    config = launches.story("agent", "if attempt == 2: words(0, 'done', False)\nfor_ever()")
    with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=2", "n11 slots=2")) as process:
        ranks = launches.up("agent", 1, 4, process)
        launches.nodes.run("n11", "pkill -9 -f bigtrain_launch.agent")
        killed = time.monotonic()
        until(lambda: not any(f" {r['pid']} " in line for r in ranks for line in launches.nodes.processes(r["host"], " -m bigtrain train")))
        assert time.monotonic() - killed < 15
        screen = process.communicate(timeout=60)[0]
    assert process.returncode == DONE, screen
    assert "n11 is gone: the connection ended; starting again from the newest checkpoint (restart 1 of 3 in 0.1 s)" in screen
    assert [r["host"] for r in launches.up("agent", 2, 4, process)] == ["n10", "n10", "n11", "n11"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_stops_the_ranks_of_all_machines(launches, number):
    config = launches.story(f"signal{number}", "for_ever()")
    with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=1", "n11 slots=1")) as process:
        launches.up(f"signal{number}", 1, 2, process)
        launches.signal("n9", number)
        screen = process.communicate(timeout=30)[0]
    assert process.returncode == STOPPED, screen
    run = launches.run(f"signal{number}")
    assert [read_json(run.heartbeat(1, rank))["reason"] for rank in (0, 1)] == [f"stopped on {signal.Signals(number).name}"] * 2
    assert run.attempts() == [1]


def test_a_second_ctrl_c_kills(launches):
    config = launches.story("twice", "signal.signal(2, lambda *a: open(f'{run}/asked-{rank}', 'w'))\nfor_ever()")
    with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=1", "n11 slots=1")) as process:
        launches.up("twice", 1, 2, process)
        launches.signal("n9", signal.SIGINT)
        until(lambda: all((launches.run("twice").path / f"asked-{rank}").exists() for rank in (0, 1)), process)
        launches.signal("n9", signal.SIGINT)
        screen = process.communicate(timeout=30)[0]
    assert process.returncode == FAILURE and "killing the ranks" in screen


@pytest.mark.parametrize("code", [USER_MISTAKE, FAILURE])
def test_exit_codes_keep_their_meaning_and_the_first_error_is_shown_with_its_host(launches, code):
    full = f"if rank == 2: print('the disk of rank 2 is full', flush=True); words({code}, 'full', False)\n"
    config = launches.story(f"code{code}", f"{full}time.sleep(0.5); words(1, 'lost', False)")
    with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=2", "n11 slots=1")) as process:
        screen = process.communicate(timeout=60)[0]
    assert process.returncode == code, screen
    lines = screen.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(f"bigtrain: rank 2 on n11 ended with exit code {code}"))
    assert lines[at + 1 : at + 3] == ["rank 2 of 3 on n11", "the disk of rank 2 is full"] and screen.count("rank 1 of 3") == 0


def test_power_loss_of_rank_0s_machine_ends_in_time_and_a_spare_takes_over(hosts, launches):
    config = launches.story("power", "if attempt == 2: words(0, 'done', False)\nfor_ever()", launch={"spares": 1})
    hostfile = launches.hostfile("n10 slots=1", "n11 slots=1", "n12 slots=1")
    with launches.launcher("n9", "hosts", config, "--hostfile", hostfile) as process:
        launches.up("power", 1, 2, process)
        hosts.nodes.power_off("n10")
        lost = time.monotonic()
        screen = process.communicate(timeout=60)[0]
        assert time.monotonic() - lost < 60
    assert process.returncode == DONE, screen
    assert "bigtrain: n10 is gone: no sign of life for 10 s; starting again" in screen
    assert [r["host"] for r in launches.up("power", 2, 2, process)] == ["n11", "n12"]
    record = read_json(launches.run("power").record(1))
    assert record["reason"] == "n10 is gone: no sign of life for 10 s" and record["restart"] is True


def test_a_machine_that_is_cut_off_kills_its_ranks_and_the_others_go_on_with_fewer(hosts, launches):
    config = launches.story("fewer", "if attempt == 2: words(0, 'done', False)\nfor_ever()", launch={"nodes": 2, "min_nodes": 1})
    with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=1", "n11 slots=1")) as process:
        launches.up("fewer", 1, 2, process)
        hosts.nodes.cable("n11", False)
        cut = time.monotonic()
        try:
            until(lambda: not launches.nodes.processes("n11", " -m bigtrain"))
            assert time.monotonic() - cut < 15
            screen = process.communicate(timeout=90)[0]
        finally:
            hosts.nodes.cable("n11", True)
    assert process.returncode == DONE, screen
    assert "n11 is left out: ssh does not get there: " in screen and "going on with 1 of 2 machines" in screen
    assert [r["world"] for r in launches.up("fewer", 2, 1, process)] == [1]


def test_a_firewall_between_two_machines_is_named(hosts, launches):
    config = launches.story("wall", "words(0, 'done', False)")
    hosts.nodes.run("n11", f"ip route add unreachable {hosts.nodes.ip['n10']}")
    try:
        with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=1", "n11 slots=1")) as process:
            screen = process.communicate(timeout=60)[0]
    finally:
        hosts.nodes.run("n11", f"ip route del unreachable {hosts.nodes.ip['n10']}")
    assert process.returncode == BAD_NODE
    assert re.search(r"bigtrain: n11 does not reach n10, where rank 0 is to be: port \d+ is not to be reached \(.*No route to host", screen)


def test_a_port_in_use_is_the_users_mistake(launches):
    config = launches.story("port", "words(0, 'done', False)", launch={"port": 24444})
    listen = "import socket, time; s = socket.create_server(('', 24444)); print('on', flush=True); time.sleep(60)"
    with (
        launches.nodes.popen("n10", ["python3", "-c", listen], stdout=-1) as taken,
        launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=1", "n11 slots=1")) as process,
    ):
        assert taken.stdout.readline() == "on\n"
        screen = process.communicate(timeout=60)[0]
        taken.kill()
    assert process.returncode == USER_MISTAKE
    assert "launch.port: 24444 is in use on n10; choose another, or leave it out" in screen


STRAY = """
import subprocess
if attempt == 1:
    stay = f"import time; open('{run}/stray', 'w'); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", stay], start_new_session=True, stdout=subprocess.DEVNULL)
    while not os.path.exists(f"{run}/stray"): time.sleep(0.02)
    os.kill(os.getpid(), 9)
words(0, "done", False)
"""


def test_strays_of_an_earlier_attempt_are_ended(launches):
    config = launches.story("stray", STRAY)
    with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=1")) as process:
        screen = process.communicate(timeout=60)[0]
    assert process.returncode == DONE, screen
    assert "bigtrain: rank 0 on n10 was killed by SIGKILL" in screen
    assert "bigtrain: n10: ended 1 process that an earlier start of this run had left" in screen
    assert launches.nodes.processes("n10", "time.sleep(600)") == []


# ---- Machines on which no agent comes up ----


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("pkill sshd", r"ssh does not get there: ssh: connect to host n11 port 2222: Connection refused"),
        ("chmod 000 /root/.ssh; touch /run/nologin; mount --bind /dev/null {root}/id.pub", r"ssh does not get there: .*Permission denied"),
    ],
    ids=["refused", "denied"],
)
def test_a_machine_that_ssh_does_not_reach_is_named(hosts, launches, spoil, said, request):
    config = launches.story(f"unreached-{request.node.callspec.id}", "words(0, 'done', False)")
    hosts.nodes.run("n11", spoil.format(root=hosts.root))
    try:
        with launches.launcher("n9", "hosts", config, "--hostfile", launches.hostfile("n10 slots=1", "n11 slots=1")) as process:
            screen = process.communicate(timeout=60)[0]
    finally:
        hosts.nodes.power_off("n11")  # the fixture boots it again
    assert process.returncode == BAD_NODE
    assert re.search(f"bigtrain: n11 is left out: {said}", screen), screen
    assert "look at n11" in screen


# ---- Real training ----


def test_two_machines_train_as_one_does_and_a_loss_of_power_changes_nothing(hosts, launches):
    """The machine of rank 0 goes off after a checkpoint; a spare takes over, and the losses are those of one undisturbed machine."""
    settings = {"train": {"steps": 40}, "checkpoint": {"every": 10}, "restarts": {"backoff": 0.1}}
    alone = launches.config("alone", launch={"ranks_per_node": 2}, **settings)
    with launches.launcher("n9", "local", alone) as process:
        screen = process.communicate(timeout=240)[0]
    assert process.returncode == DONE, screen

    spread = launches.config("spread", launch={"spares": 1, "preflight": {"enabled": False}}, **settings)
    hostfile = launches.hostfile("n10 slots=1", "n11 slots=1", "n12 slots=1")
    with launches.launcher("n9", "hosts", spread, "--hostfile", hostfile) as process:
        until(lambda: format.checkpoints(launches.run("spread").checkpoints), process, 240)
        hosts.nodes.power_off("n10")
        screen = process.communicate(timeout=240)[0]
    assert process.returncode == DONE, screen
    run = launches.run("spread")
    assert run.attempts() == [1, 2] and [read_json(run.record(n))["host"] for n in (1, 2)] == ["n10", "n11"]
    assert losses(run) == losses(launches.run("alone"))
    first = min(row["step"] for row in read_rows(run.metrics) if row["attempt"] == 2)
    assert first > 10 and "resuming step-" in screen
