"""Which checkpoints stay, and that two sound ones always do."""

from pathlib import Path

import pytest
from fakes import write
from typer.testing import CliRunner

from bigtrain.checkpoint import format
from bigtrain.checkpoint.retention import Kept, kept
from bigtrain.cli import app
from bigtrain.config import Checkpoint


def steps(paths) -> list[int]:
    return sorted(format.step_of(path) for path in paths)


def damage(path: Path) -> None:
    (path / "state.json").write_text("{}")


@pytest.mark.parametrize(
    ("rules", "metrics", "expected"),
    [
        ({}, {}, [5, 6]),
        ({"keep": 3}, {}, [4, 5, 6]),
        ({"keep_every": 3}, {}, [3, 5, 6]),
        ({"keep_best": "perplexity"}, {1: 9.0, 2: 4.0, 6: 5.0}, [2, 5, 6]),
        ({"keep_best": "perplexity"}, {1: 4.0, 2: 4.0}, [2, 5, 6]),  # of equals the newer
        ({"keep": 9}, {}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_rules(rules, metrics, expected):
    found = [Path(f"step-{n:08d}") for n in range(1, 7)]
    assert steps(kept(found, {Path(f"step-{n:08d}"): value for n, value in metrics.items()}, Checkpoint(**rules))) == expected


def test_the_best_is_read_from_the_checkpoints(tmp_path):
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 2.5)):
        write(tmp_path, step, size=1, metrics={"validation_loss": loss})
    assert steps(Kept(tmp_path, Checkpoint(keep_best="validation_loss")).prune()[0]) == [1]
    assert steps(format.checkpoints(tmp_path)) == [2, 3, 4] == steps(tmp_path.iterdir())


def test_two_sound_ones_stay_whatever_the_newest_are_like(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, size=1)
    for step in (4, 5, 6):
        damage(tmp_path / f"step-{step:08d}")
    removed, damaged = Kept(tmp_path, Checkpoint()).prune()
    assert steps(removed) == [1, 4] and steps(damaged) == [4, 5, 6]
    assert steps(format.checkpoints(tmp_path)) == [2, 3, 5, 6]


def test_what_has_just_been_verified_is_not_read_again(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, step, size=1)
    monkeypatch.setattr(format, "verify", None)
    kept = Kept(tmp_path, Checkpoint())
    kept.trust(tmp_path / "step-00000002")
    kept.added(tmp_path / "step-00000003")
    assert steps(format.checkpoints(tmp_path)) == [2, 3]


def test_nothing_is_removed_while_fewer_than_two_are_sound(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, size=1)
    for step in (1, 3, 4):
        damage(tmp_path / f"step-{step:08d}")
    assert Kept(tmp_path, Checkpoint()).prune()[0] == [] and len(list(tmp_path.iterdir())) == 4


def test_prune_and_diff_from_the_command_line(tmp_path):
    from bigtrain import configfile

    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        write(folder, step, size=1, seed=step)
    invoke = CliRunner().invoke
    assert invoke(app, ["checkpoint", "prune", str(tmp_path)]).exit_code == 2  # no config.yaml: not a run folder
    config = configfile.load(Path(__file__).parents[2] / "configs/quickstart.yaml")
    (tmp_path / "config.yaml").write_text(configfile.dump(config))
    dry = invoke(app, ["checkpoint", "prune", str(tmp_path), "--dry-run"])
    assert dry.stdout == f"would remove  {folder / 'step-00000001'}\n" and len(list(folder.iterdir())) == 3
    assert invoke(app, ["checkpoint", "prune", str(tmp_path)]).stdout == f"removed  {folder / 'step-00000001'}\n"
    assert invoke(app, ["checkpoint", "prune", str(tmp_path)]).stdout == "nothing to remove\n"
    two, three = folder / "step-00000002", folder / "step-00000003"
    assert invoke(app, ["checkpoint", "diff", str(two), str(two)]).stdout == f"equal, bit for bit: {two} and {two}\n"
    told = invoke(app, ["checkpoint", "diff", str(two), str(three), "--rows", "4"], env={"COLUMNS": "200"}).stdout
    assert "6 tensors differ" in told and "a.weight" in told and "exp_avg" in told and "and 2 more; --rows shows them" in told
