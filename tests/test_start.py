"""New, resumed, done or refused: what `bigtrain train` decides before any rank starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))
from fakes import STATE

from bigtrain import configfile
from bigtrain.checkpoint import format
from bigtrain.config import MAY_DIFFER_ON_RESUME, Config, Data
from bigtrain.data.prepare import prepare
from bigtrain.errors import UserError
from bigtrain.runfolder import RunFolder
from bigtrain.start import complete, create, new_name, open_run, with_data

ROOT = Path(__file__).parents[1]
MODEL = {"layers": 1, "width": 8, "heads": 2, "mlp_width": 8, "max_positions": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i}.txt").write_text(f"document {i} " * (1 + i))
    settings = {"source": "text", "path": str(folder / "text"), "tokenizer": "bytes", "folder": str(folder / "data")}
    settings |= {"sequence_length": 16, "validation_fraction": 0.2}
    prepare(Data(**settings))
    return settings


@pytest.fixture
def config(data, tmp_path):
    """A config in a folder of its own; changes are merged into its sections."""

    def made(**changes) -> Config:
        base = {
            "run": {"name": "r", "folder": str(tmp_path / "runs")},
            "model": MODEL,
            "data": data,
            "train": {"steps": 10, "global_batch": 4, "micro_batch": 2},
            "optimizer": {"lr": 0.1},
        }
        merged = {k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in {**base, **changes}.items()}
        return Config.model_validate(merged)

    return made


def started(config: Config) -> RunFolder:
    """The folder of a run of `config` that has logged a row."""
    run = RunFolder(Path(config.run.folder) / config.run.name)
    create(config, run).close()
    run.metrics.touch()
    return run


def checkpoint(config: Config, step: int, done: bool = False) -> Path:
    """The folder of a checkpoint of `config`, as far as a start looks at it."""
    path = Path(config.run.folder) / config.run.name / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({**STATE, "step": step, "done": done}))
    (path / "index.json").write_text("{}")
    (path / "config.yaml").write_text(configfile.dump(config))
    (path / "manifest.json").write_text(json.dumps(format.manifest(path, {})))
    return path


# ---- The data ----


def test_the_vocabulary_comes_from_the_data(config):
    assert with_data(config()).model.vocab_size == 320  # 258 rounded up to a multiple of 64
    assert with_data(config(model={"vocab_size": 258})).model.vocab_size == 258


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"folder": "/nowhere"}}, "/nowhere/manifest.json does not exist: no prepared data in /nowhere; prepare it first"),
        ({"model": {"vocab_size": 200}}, "model.vocab_size: 200 is too small .* set it to 258 or more"),
        ({"data": {"sequence_length": 100_000}}, "the train split has .* not one sequence of 100000"),
        ({"data": {"sequence_length": 1500}}, "the validation split has .* or a larger data.validation_fraction"),
        ({"generate": {"prompts": ["fine", "x" * 31]}}, "generate.prompts: 'x+' is 32 tokens long, the model has 32 positions"),
        ({"generate": {"prompts": ["\udcff"]}}, r"generate.prompts: '\\udcff' is not text"),
        ({"generate": {"prompts": ["x"]}, "model": {"causal": False}}, "generate.prompts: an encoder"),
    ],
)
def test_data_that_does_not_fit(config, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        with_data(config(**changes))
    assert "\n" not in str(caught.value)


def test_another_tokenizer_than_the_datas_is_refused(config, data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data["folder"], copy)
    path = copy / "tokenizer/tokenizer_config.json"
    path.write_text(path.read_text().replace("}", ', "eos_token": "x"}'))
    with pytest.raises(UserError, match=f"^{path}: has changed since the data was prepared; copy it again or prepare the data again$"):
        with_data(config(data={"folder": str(copy)}))


def test_a_prompt_that_leaves_one_position_is_fine(config):
    settings = config(generate={"prompts": ["x" * 30, ""]})
    assert with_data(settings).generate == settings.generate


# ---- The run's folder ----


def test_new_resumed_and_done(config):
    settings = config()
    start = open_run(settings)
    assert start.checkpoints == [] and not start.done and not start.run.path.exists()
    with create(settings, start.run):
        assert configfile.load(start.run.config) == settings
    assert open_run(settings).checkpoints == []  # started, and stopped before its first checkpoint
    old, new = checkpoint(settings, 9), checkpoint(settings, 10)
    assert open_run(settings).checkpoints == [old, new] and not open_run(settings).done
    (new / "state.json").write_text(json.dumps({**STATE, "step": 10, "done": True}))
    (new / "manifest.json").write_text(json.dumps(format.manifest(new, {})))
    start = open_run(settings)
    assert start.done and complete(start).startswith(f"{start.run.path} is complete at step 10; look at ")


def test_another_config_is_refused_with_the_difference(config):
    started(config())
    with pytest.raises(UserError) as caught:
        open_run(config(optimizer={"lr": 0.2}, model={"layers": 2}))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("runs/r holds a run of another config:")
    assert lines[1:3] == ["  model.layers: 1 -> 2", "  optimizer.lr: 0.1 -> 0.2"]
    assert "--new" in lines[3]


def test_a_run_that_failed_before_its_first_step_protects_nothing(config):
    create(config(), open_run(config()).run).close()
    assert open_run(config(train={"micro_batch": 1})).checkpoints == []


def test_a_long_difference_is_cut(config):
    started(config())
    changed = {"norm": "layernorm", "mlp": "gelu", "attention_bias": True, "mlp_bias": True, "tied_embeddings": True, "dropout": 0.1}
    with pytest.raises(UserError, match=r"\n  and 1 more\n"):
        open_run(
            config(
                model={**changed, "layers": 2, "width": 16, "mlp_width": 16, "positions": "learned"},
                optimizer={"lr": 0.2, "name": "sgd"},
                train={"seed": 1},
            )
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"launch": {"ranks_per_node": 2, "timeout": 5.0}},
        {"tracking": {"tensorboard": False}},
        {"generate": {"prompts": ["x"]}},
        {"evaluate": {"every": 1}},
        {"checkpoint": {"every": 1, "keep": 5}},
    ],
)
def test_what_a_resumed_run_may_change(config, changes):
    run = started(config())
    create(config(**changes), open_run(config(**changes)).run).close()
    assert configfile.load(run.config) == config(**changes)  # the newest start's is kept
    assert set(changes) <= set(MAY_DIFFER_ON_RESUME)


def test_new_takes_the_first_free_name(config, tmp_path):
    assert new_name(config()).run.name == "r"
    for taken in ("r", "r-2", "r-4"):
        (tmp_path / "runs" / taken).mkdir(parents=True)
    assert new_name(config()).run.name == "r-3"


def test_checkpoints_without_their_config_are_not_overwritten(config):
    checkpoint(config(), 5)
    with pytest.raises(UserError, match="r/config.yaml: missing beside the checkpoints of a run"):
        open_run(config())


@pytest.mark.parametrize("state", [None, "", "{", "[]", "{}", "null"])
def test_a_newest_checkpoint_whose_state_is_damaged_is_not_done(config, state):
    """The ranks name it, and go on from an earlier one or refuse to begin anew (tests/distributed/test_runs.py)."""
    create(config(), open_run(config()).run).close()
    path = checkpoint(config(), 5, done=True) / "state.json"
    assert open_run(config()).done
    path.unlink() if state is None else path.write_text(state)
    assert not open_run(config()).done and len(open_run(config()).checkpoints) == 1


def test_junk_among_the_checkpoints_is_passed_over(config):
    create(config(), open_run(config()).run).close()
    real = checkpoint(config(), 5)
    for name in (".step-00000009.writing", "step-", "step-x", "step-²", "notes"):
        (real.parent / name).mkdir()
    (real.parent / "step-00000007").write_text("a file")
    assert open_run(config()).checkpoints == [real]
    (real.parent / "step-00000008").mkdir()  # without a manifest: somebody removed it, or, where that is what counts, it was cut short
    assert len(open_run(config()).checkpoints) == 2
    assert open_run(config(checkpoint={"commit": "file"})).checkpoints == [real]


@pytest.mark.parametrize("in_the_way", ["runs", "runs/r"])
def test_a_file_where_a_folder_should_be(config, tmp_path, in_the_way):
    path = tmp_path / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.write_text("in the way")
    with pytest.raises(UserError, match=r"^run.folder: .*runs/r cannot be written \(.+\); set another folder, or make room$"):
        create(config(), open_run(config()).run)
    assert path.read_text() == "in the way"


def test_a_full_disk_keeps_the_old_config(config, monkeypatch):
    run = open_run(config()).run
    create(config(), run).close()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device"):
        create(config(launch={"timeout": 5.0}), run)
    assert configfile.load(run.config) == config()
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "config.yaml"]


def test_two_starts_of_one_run(config):
    run = open_run(config()).run
    with create(config(), run):
        with pytest.raises(UserError, match=r"runs/r: another process is training this run; wait for it, stop it, or pass --new$"):
            create(config(), run)
        run.lease.write_text('{"attempt": 4, "pid": 77, "host": "node3", "since": 0}')
        with pytest.raises(UserError, match=r"this run \(attempt 4, process 77 on node3, since 19[67].*\);"):
            create(config(), run)
    run.lease.unlink()
    create(config(), run).close()


def test_a_killed_process_gives_the_run_back(config):
    run = open_run(config()).run
    create(config(), run).close()
    script = (
        f"import os, signal; from bigtrain.runfolder import RunFolder; f = RunFolder({str(run.path)!r}).lock(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": str(ROOT)}).returncode == -9
    create(config(), run).close()


# ---- Fine-tuning ----


def test_weights_to_start_from(config):
    base = config(run={"name": "base"}, model={"vocab_size": 320})
    path = checkpoint(base, 5)
    for where in (path, path.parent, path.parent.parent):
        tuned = {"dropout": 0.1, "rope_theta": 5e4, "kv_heads": 2, "max_positions": 64, "vocab_size": 320}
        open_run(config(init={"checkpoint": str(where)}, model=tuned, data={"sequence_length": 32}))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"causal": False}, "model.causal: True -> False"),  # the same shapes, another model
        ({"heads": 4}, "model.heads: 2 -> 4; model.kv_heads: 2 -> 4; model.head_dim: 4 -> 2"),
        ({"layers": 3}, "model.layers: 1 -> 3"),
        ({"vocab_size": 384}, "model.vocab_size: 320 -> 384"),
    ],
)
def test_weights_of_another_model_are_refused(config, change, difference):
    path = checkpoint(config(run={"name": "base"}, model={"vocab_size": 320}), 5)
    with pytest.raises(UserError) as caught:
        open_run(config(init={"checkpoint": str(path)}, model={"vocab_size": 320, **change}, train={"task": "causal"}))
    assert str(caught.value) == f"init.checkpoint: {path} holds another model ({difference}); use its config.yaml's model section"


def test_no_weights_there(config, tmp_path):
    with pytest.raises(UserError, match=r"^init.checkpoint: .*: no checkpoint here; give a run folder"):
        open_run(config(init={"checkpoint": str(tmp_path)}))


def test_a_resumed_run_no_longer_needs_them(config):
    settings = config(init={"checkpoint": "/gone"})
    create(settings, RunFolder(Path(settings.run.folder) / "r")).close()
    with pytest.raises(UserError, match="/gone"):
        open_run(settings)
    checkpoint(settings, 5)
    assert len(open_run(settings).checkpoints) == 1
