"""Building DeepSpeed's ops: which ones, stale locks, and builds that fail. No compiler runs here."""

import os
import stat
import sys
import threading
import time
from pathlib import Path

import pytest

from bigtrain import opbuild
from bigtrain.config import Config
from bigtrain.errors import RunError, UserError

OP = "cpu_adam"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    (tmp_path / "ops" / OP).mkdir(parents=True)
    return tmp_path / "ops" / OP


def lock(folder: Path, seconds: float) -> Path:
    file = folder / "lock"
    file.touch()
    os.utime(file, (time.time() - seconds,) * 2)
    return file


def process(root: Path, number: int, cwd: Path | None) -> Path:
    """A process of a made-up /proc; without `cwd` it is another user's, whose folder cannot be read."""
    (root / str(number)).mkdir(parents=True)
    (root / str(number) / "cwd").symlink_to(cwd) if cwd else (root / str(number) / "cwd").touch()
    return root


def test_a_stale_lock_is_named(folder, tmp_path):
    file = lock(folder, 300)
    root = process(process(tmp_path / "proc", 7, tmp_path), 8, None)
    with pytest.raises(UserError, match=f"{file}: left 5 minutes ago by a build of DeepSpeed's cpu_adam that died.*rm {file}"):
        opbuild.check_locks([OP], root)
    opbuild.check_locks(["cpu_lion"], root)  # another op's lock hinders nobody
    with pytest.raises(UserError, match="rm "):
        opbuild.build([OP], print)


def test_a_young_lock_and_a_live_compiler_are_left_alone(folder, tmp_path):
    lock(folder, 1)
    opbuild.check_locks([OP], tmp_path / "proc")
    lock(folder, 3000)
    opbuild.check_locks([OP], process(tmp_path / "proc", 7, folder))


def test_the_lock_of_a_build_elsewhere_is_left_alone(folder, tmp_path):
    """Its compiler is not to be seen from here, on another machine that shares the folder; that it holds the right to build is."""
    lock(folder, 3000)
    with opbuild._right():
        opbuild.check_locks([OP], tmp_path / "proc")


def test_a_second_build_waits_for_the_first_and_does_nothing(folder):
    said: list[str] = []
    right = opbuild._right()
    waiting = threading.Thread(target=opbuild.build, args=([OP], said.append))
    waiting.start()
    while not said and waiting.is_alive():
        time.sleep(0.01)
    (folder / f"{OP}.so").touch()
    right.close()
    waiting.join(timeout=30)
    assert said == ["waiting for another process, which is building DeepSpeed's ops"]


def test_a_builder_keeps_the_right_when_its_parent_dies(python):
    python("ls -l /proc/$$/fd | grep -q '/ops/.building$' && touch $TORCH_EXTENSIONS_DIR/$5/$5.so")
    opbuild.build([OP], lambda text: None)
    opbuild._right().close()


def test_a_folder_that_cannot_be_had(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file/ops"))
    with pytest.raises(UserError, match=r"file/ops: DeepSpeed's ops are to be built there: Not a directory; set TORCH_EXTENSIONS_DIR"):
        opbuild.build([OP], print)


def test_where_ops_are_built():
    assert opbuild.folder({"TORCH_EXTENSIONS_DIR": "/x"}) == Path("/x")
    assert opbuild.folder({}) == Path(sys.prefix) / "torch_extensions"


def test_one_place_and_one_ninja(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/env/bin/python")
    expected = {"PATH": f"/env/bin{os.pathsep}/usr/bin", "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions"}
    assert opbuild.environment({"PATH": "/usr/bin"}) == expected
    assert opbuild.environment({"TORCH_EXTENSIONS_DIR": "/x"})["TORCH_EXTENSIONS_DIR"] == "/x"


def test_what_is_there_is_not_built_again(folder):
    (folder / f"{OP}.so").touch()
    opbuild.build([OP], lambda text: pytest.fail(text))
    assert opbuild.missing([OP, "cpu_lion"]) == ["cpu_lion"]


def test_no_compiler(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler to build cpu_adam; install g\+\+"):
        opbuild.build([OP], print)


@pytest.fixture
def python(folder, tmp_path, monkeypatch):
    """Let a shell script stand in for the Python that builds; `$5` is the op."""

    def write(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(path))
        monkeypatch.setattr(opbuild.shutil, "which", lambda name: name)

    return write


def test_a_build_that_fails_shows_its_last_lines(python):
    python("for i in $(seq 40); do echo line $i; done; echo 'fatal error: no such header' >&2; exit 1")
    said = []
    with pytest.raises(RunError) as caught:
        opbuild.build([OP], said.append)
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["DeepSpeed's ops did not build.", "cpu_adam:"] and lines[-1] == "fatal error: no such header"
    assert len(lines) == 17 and "line 10" not in lines and "cpu_adam" in said[0]


def test_a_build_that_leaves_nothing_has_failed(python):
    python("echo fine")
    with pytest.raises(RunError, match="cpu_adam:\nfine"):
        opbuild.build([OP], print)


def test_ops_are_built_at_once(python, folder):
    """Each waits for the other's mark: one after the other would never end."""
    python("""
cd $TORCH_EXTENSIONS_DIR; mkdir -p $5; touch mark-$5
for i in $(seq 100); do [ $(ls mark-* | wc -l) = 2 ] && touch $5/$5.so && exit; sleep 0.1; done
exit 1""")
    opbuild.build([OP, "cpu_lion"], lambda text: None)
    assert opbuild.missing([OP, "cpu_lion"]) == []


@pytest.mark.parametrize(
    ("accelerator", "optimizer", "offload", "ops"),
    [
        ("cpu", "adamw", False, ["deepspeed_shm_comm"]),
        ("cpu", "adamw", True, ["deepspeed_shm_comm", "cpu_adam"]),
        ("cpu", "lion", False, ["deepspeed_shm_comm", "cpu_lion"]),
        ("cpu", "muon", True, ["deepspeed_shm_comm"]),
        ("cuda", "adamw", False, []),
        ("cuda", "adamw", True, ["cpu_adam"]),
        ("rocm", "lion", False, []),
        ("cuda", "lion", True, ["cpu_lion"]),
        ("cuda", "sgd", True, []),
    ],
)
def test_needed(accelerator, optimizer, offload, ops):
    config = Config.model_validate(
        {
            "model": {"layers": 1, "width": 8, "heads": 1, "mlp_width": 8, "max_positions": 8},
            "data": {"sequence_length": 8},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
            "optimizer": {"lr": 1.0, "name": optimizer},
            "zero": {"offload_optimizer": offload},
        }
    )
    assert opbuild.needed(config, accelerator) == ops
    assert set(ops) <= set(opbuild.ALL)
