"""Finding, listing and verifying checkpoints, and refusing what is damaged or foreign."""

import json
import shutil
from pathlib import Path

import pytest
from fakes import write
from typer.testing import CliRunner

from bigtrain.checkpoint import format, save
from bigtrain.checkpoint.load import Reader
from bigtrain.cli import app
from bigtrain.errors import RunError, UserError


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with checkpoints 1 and 2, of different weights in files of equal size."""
    write(tmp_path / "checkpoints", 1, seed=1)
    write(tmp_path / "checkpoints", 2, seed=2)
    return tmp_path


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def forge(manifest: dict, change) -> None:
    change(manifest["files"])
    manifest["checksum"] = format._own_checksum(manifest["files"])


DAMAGE = {
    "truncated": (lambda c: (c / "rank-00001-0.safetensors").write_bytes(b"x"), "rank-00001-0.safetensors: 1 bytes, the manifest says"),
    "flipped": (lambda c: flip(c / "rank-00000-0.safetensors"), "rank-00000-0.safetensors: checksum differs"),
    "missing": (lambda c: (c / "state.json").unlink(), "state.json: missing"),
    "of another step": (
        lambda c: shutil.copy(c.parent / "step-00000001/rank-00001-0.safetensors", c),
        "rank-00001-0.safetensors: checksum differs",
    ),
    "extra": (lambda c: (c / "rank-00002-0.safetensors").touch(), "rank-00002-0.safetensors: not in the manifest"),
    "taken out of the manifest": (
        lambda c: change_json(c / "manifest.json", lambda m: m["files"].pop("config.yaml")),
        "manifest.json: its own checksum differs",
    ),
    "another checksum": (
        lambda c: change_json(c / "manifest.json", lambda m: m["files"]["index.json"].__setitem__(1, "0" * 32)),
        "manifest.json: its own checksum differs",
    ),
    "another checksum in a manifest that was made for it": (
        lambda c: change_json(c / "manifest.json", lambda m: forge(m, lambda files: files["index.json"].__setitem__(1, "0" * 32))),
        "index.json: checksum differs",
    ),
    "a manifest that names a file elsewhere": (
        lambda c: change_json(c / "manifest.json", lambda m: forge(m, lambda files: files.update({"../x": [1, "0"]}))),
        "manifest.json: names the file '../x', which is outside the checkpoint",
    ),
    "a link": (
        lambda c: ((c / "config.yaml").unlink(), (c / "config.yaml").symlink_to(c.parent / "step-00000001/config.yaml")),
        "config.yaml: a link",
    ),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json: cannot be read"),
    "half a manifest": (lambda c: (c / "manifest.json").write_text('{"files": {'), "manifest.json: cannot be read"),
    "a manifest of something else": (lambda c: (c / "manifest.json").write_text("[1]"), "manifest.json: damaged"),
    "odd rows": (lambda c: (c / "manifest.json").write_text('{"files": {"index.json": 3}}'), "manifest.json: damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_names_the_file(run, kind):
    damage, says = DAMAGE[kind]
    path = run / "checkpoints/step-00000002"
    format.verify(path)
    damage(path)
    with pytest.raises(RunError, match=f"step-00000002/{says}") as caught:
        format.verify(path)
    assert "\n" not in str(caught.value)


def test_commands(run):
    invoke = CliRunner().invoke
    listed = invoke(app, ["checkpoint", "list", str(run)]).stdout.splitlines()
    assert [line.split()[1] for line in listed] == ["1", "2"] and listed[1].endswith("step-00000002")
    verified = invoke(app, ["checkpoint", "verify", str(run)])
    assert verified.exit_code == 0 and verified.stdout.count("ok ") == 2
    flip(run / "checkpoints/step-00000001/rank-00000-0.safetensors")
    one = invoke(app, ["checkpoint", "verify", str(run / "checkpoints/step-00000002")])
    assert one.exit_code == 0 and one.stdout.count("ok ") == 1
    failed = invoke(app, ["checkpoint", "verify", str(run)])
    assert failed.exit_code == 1 and "step-00000001/rank-00000-0.safetensors: checksum differs" in failed.stderr
    for command in ("list", "verify"):
        nothing = invoke(app, ["checkpoint", command, str(run / "checkpoints/step-00000001/none")])
        assert nothing.exit_code == 2 and nothing.stderr.startswith("bigtrain: ") and nothing.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["list", "verify"])
@pytest.mark.parametrize("moment", ["is_file", "is_dir", "read_text"])
def test_commands_pass_over_what_a_run_removes_meanwhile(run, monkeypatch, command, moment):
    """Whenever that is: `moment` is what is done with a file of step 1 for the last time before all of them are gone."""
    one = run / "checkpoints/step-00000001"
    real, left = getattr(Path, moment), []

    def watched(path, *rest, **more):
        try:
            return real(path, *rest, **more)
        finally:
            if one.name in str(path) and path.name != format.MANIFEST and not left:
                left.append(save.remove(one))

    monkeypatch.setattr(Path, moment, watched)
    result = CliRunner().invoke(app, ["checkpoint", command, str(run)])
    assert (result.exit_code, result.stderr, result.exception) == (0, "", None) and left
    assert result.stdout.count("\n") == 1 and "step-00000002" in result.stdout


def test_find(run):
    newest = run / "checkpoints/step-00000002"
    assert [format.find(p) for p in (run, run / "checkpoints", newest)] == [newest] * 3
    assert format.find(newest.with_name("step-00000001")).name == "step-00000001"
    with pytest.raises(UserError, match="no checkpoint here; give a run folder"):
        format.find(run / "nowhere")


def test_steps_sort_as_numbers(tmp_path):
    for name in ("step-00000009", "step-00000010", "step-100000000", "step-00000011"):
        (tmp_path / name).mkdir()
        if name != "step-00000011":  # without a manifest it is not complete
            (tmp_path / name / "manifest.json").touch()
    assert [format.step_of(p) for p in format.checkpoints(tmp_path)] == [9, 10, 100000000]
    assert format.checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b", "..", ".", ""])
def test_an_index_that_names_a_file_elsewhere(run, file):
    path = run / "checkpoints/step-00000002"
    change_json(path / "index.json", lambda index: index["fragments"][0].__setitem__(4, file))
    with pytest.raises(RunError, match=f"index.json: names the file '{file}', which is outside the checkpoint"):
        Reader(path)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda i: i.update(version=2), UserError, "step-00000002: format version 2, this bigtrain reads version 1"),
        (lambda i: i.pop("version"), RunError, "index.json: damaged"),
        (lambda i: i.pop("shapes"), RunError, "index.json: damaged"),
        (lambda i: i["fragments"][0].pop(), RunError, "index.json: damaged"),
        (lambda i: i.update(fragments=3), RunError, "index.json: damaged"),
        (lambda i: i["fragments"][0].__setitem__(4, 7), RunError, "index.json: damaged"),
    ],
)
def test_an_index_that_is_not_ours(run, change, error, says):
    path = run / "checkpoints/step-00000002"
    change_json(path / "index.json", change)
    with pytest.raises(error, match=says):
        format.read_index(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[0].__setitem__(5, "99"), "cannot be read"),
        (lambda rows: rows[0].__setitem__(3, 15), r"shape \[7\], the index says 15"),
        (lambda rows: rows[0].__setitem__(4, "rank-00009-0.safetensors"), "rank-00009-0.safetensors: cannot be read"),
        (lambda rows: rows[0].__setitem__(4, "state.json"), "state.json: cannot be read"),
    ],
)
def test_an_index_that_promises_too_much(run, change, says):
    path = run / "checkpoints/step-00000002"
    change_json(path / "index.json", lambda index: change(index["fragments"]))
    with pytest.raises(RunError, match=says):
        Reader(path).tensor("a.weight", "model")
