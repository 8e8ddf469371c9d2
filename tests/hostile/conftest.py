"""A folder with a good config and its data, one copy for each test."""

import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from payloads import CONFIG, Place

from bigtrain import configfile
from bigtrain.data.prepare import prepare

SECONDS = 20


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    (folder / "text").mkdir()
    for n in range(30):
        (folder / "text" / f"{n:02d}.txt").write_text(f"document {n}: " + "word " * n)
    (folder / "c.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    prepare(configfile.load(folder / "c.yaml").data)
    return folder


@pytest.fixture
def place(prepared, tmp_path, hurry) -> Place:
    folder = tmp_path / "p"
    shutil.copytree(prepared, folder)
    (folder / "c.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    return Place(folder)


@pytest.fixture
def hurry():
    """A read of a pipe waits for ever: say so instead."""

    def late(number, frame):
        raise AssertionError(f"still waiting after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
