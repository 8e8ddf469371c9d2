"""Twelve kills and three stops at random points, half of the kills inside a save: nothing is lost. The long version is
benchmarks/faults.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import faults
from training import prepare_data

from bigtrain import configfile


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("kills")
    prepare_data(folder)
    source = [f"data.{key}={value}" for key, value in (("source", "text"), ("path", folder / "text"), ("folder", folder / "data"))]
    return [f"run.folder={folder / 'runs'}", *source, "data.validation_fraction=0.2"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_twelve_kills(overrides):
    found = faults.kills(faults.SMALL, [*overrides, "train.steps=440"], 12, seed=1)
    assert found.lost == []
    assert found.facts["attempts"] == 13 and found.facts["inside_a_save"] >= 3


def test_three_stops(overrides):
    found = faults.stops(faults.SMALL, [*overrides, "train.steps=300"], 3, grace=10.0, seed=2)
    assert found.lost == [] and found.facts["stops"] == 3


def test_what_is_lost_is_seen(overrides, tmp_path):
    """The comparison itself: another run, of another seed, is not taken for this one."""
    runs = Path(configfile.load(faults.SMALL, overrides).run.folder)
    job = faults.Job(faults.SMALL, [*overrides, "train.steps=300"], "stopped")
    found = faults.Found()
    faults.compare(job, faults.RunFolder(runs / "killed"), found)
    assert any(text.startswith("steps: 300 rows, 440 expected") for text in found.lost)
    assert any("differs at the end" in text for text in found.lost)


def test_the_model_of_goodput():
    assert faults.expected_goodput(start=0, interval=1e-9, every=100) == pytest.approx(1)
    assert faults.expected_goodput(start=3, interval=4, every=50) == pytest.approx(0.9)
    assert faults.expected_goodput(start=3, interval=4, every=50, saving=0.4) == pytest.approx(0.81)
    assert faults.expected_goodput(start=100, interval=4, every=50) == 0
