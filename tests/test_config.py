"""Config files: what they mean, what is refused, and that one reading names everything that is wrong with its place."""

import copy
import json
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain import configfile
from bigtrain.config import Config
from bigtrain.configfile import dump, find, load, read
from bigtrain.configschema import schema
from bigtrain.errors import UserError

SMALL = """\
model: {layers: 2, width: 64, heads: 4, mlp_width: 128, max_positions: 512}
data: {sequence_length: 128}
train: {steps: 100, micro_batch: 4, accumulation: 2}
optimizer: {lr: 1e-4}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, so that messages carry short paths; `folder(name=text)` writes files into it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configfile, "shipped_folders", lambda: [tmp_path / "shipped"])

    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text)

    return write


def refused(folder, text=SMALL, overrides=()) -> list[str]:
    """The lines of the message for a config; one that is accepted fails the test."""
    folder(c=text)
    with pytest.raises(UserError) as error:
        load("c.yaml", overrides)
    lines = str(error.value).splitlines()
    if len(lines) == 1:
        return lines
    assert lines[0] == f"c.yaml: {len(lines) - 1} problems"
    return [line.removeprefix("  ") for line in lines[1:]]


# ---- What a file means ----


def test_numbers_and_words(folder):
    text = SMALL.replace("steps: 100", "steps: 1e2, seed: 1_000") + "tracking: {wandb: off}\nrun: {name: '2024'}\nzero:\n  # nothing\n"
    folder(c=text)
    config = load("c.yaml")
    assert config.optimizer.lr == 1e-4
    assert (config.train.steps, type(config.train.steps)) == (100, int)
    assert config.train.seed == 1000
    assert config.tracking.wandb == "off"  # a boolean in YAML 1.1
    assert config.zero.stage == 2


def test_overrides(folder):
    folder(c=SMALL)
    given = ["train.steps=1e3", "optimizer.lr=2e-3", "train.clip=null", "optimizer.betas=[0.8, 0.9]", "run.name=a-b", "zero={stage: 1}"]
    given += ["train.steps=7", "generate.prompts=['a: b', \"x=y\"]", "train.early_stopping.patience=3", "evaluate.every=5"]
    config = load("c.yaml", given)
    assert (config.train.steps, config.optimizer.lr, config.train.clip, config.run.name) == (7, 2e-3, None, "a-b")
    assert config.optimizer.betas == [0.8, 0.9]
    assert config.generate.prompts == ["a: b", "x=y"]
    assert config.zero.stage == 1
    assert config.train.early_stopping.patience == 3
    assert load("c.yaml", ["zero=", "kernels=null"]) == load("c.yaml")


def test_includes_merge_in_order(folder, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/deep.yaml").write_text("include: ../wide.yaml\nmodel: {layers: 9}\ntrain: {seed: 1, clip: 2}\n")
    folder(
        wide="model: {layers: 1, width: 256}\n",
        later="train: {seed: 2}\n",
        c="include: [models/deep.yaml, later.yaml]\n" + SMALL.replace("width: 64, ", ""),
    )
    config = load("c.yaml")
    assert (config.model.layers, config.model.width, config.train.seed, config.train.clip) == (2, 256, 2, 2.0)


def test_null_over_an_included_mapping_turns_it_off(folder):
    folder(base="train: {early_stopping: {patience: 3}}\nevaluate: {every: 2}\n")
    folder(c="include: base.yaml\n" + SMALL.replace("steps: 100", "steps: 100, early_stopping: null"))
    assert load("c.yaml").train.early_stopping is None


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=60, deadline=None, database=None)
@given(
    prompts=st.lists(
        TEXT | st.sampled_from(["1e5", "off", "null", "~", "- a", "a: b", "#c", "0x1F", "2024-01-01", "'", '"', "a\nb\n", "\x85", " x "])
    ),
    path=TEXT.filter(bool),
    lr=st.floats(min_value=1e-300, max_value=1e300),
)
def test_dump_reads_back_equal(tmp_path_factory, prompts, path, lr):
    values = copy.deepcopy(yaml.safe_load(SMALL))
    values["optimizer"]["lr"] = lr
    values["generate"] = {"prompts": prompts}
    values["data"] |= {"source": "text", "path": [path]}
    values["train"]["early_stopping"] = {"patience": 3}
    values["evaluate"] = {"every": 3}
    config = Config.model_validate(values)
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(file) == config
    assert yaml.safe_load(dump(config)) == config.model_dump()  # other readers, by the rules of YAML 1.1, agree


def test_show_says_who_set_what(folder):
    folder(base="train: {log_every: 5}\n", c="include: base.yaml\n" + SMALL)
    source = read("c.yaml", ["optimizer.lr=3e-4"])
    lines = {line.split(":")[0].strip(): line for line in source.show().splitlines()}
    assert lines["lr"].endswith("# command line")
    assert lines["log_every"].endswith("# base.yaml:1")
    assert lines["sequence_length"].endswith("# c.yaml:3")
    assert "#" not in lines["weight_decay"]
    folder(shown=source.show())
    assert load("shown.yaml") == source.config


# ---- What is refused ----


def test_everything_wrong_is_said_at_once(folder):
    folder(preset="model:\n  layers: zero\n")
    text = """\
include: preset.yaml
model: {width: 64, heads: 5, kv_heads: 2, mlp_width: 128, max_positions: 64}
data: {sequence_length: 128}
train:
  steps: 0
  micro_batch: 4
  acumulation: 2
  accumulation: 2
optimizer: {lr: fast, betas: [0.9, 2]}
schedule: {name: cosin}
zero: {stage: 0, offload_optimizer: true}
lr: 3
"""
    assert sorted(refused(folder, text, ["tracking.tensorboard=1", "evaluat.every=3"])) == sorted(
        [
            "preset.yaml:2: model.layers: found 'zero'; expected a whole number of at least 1",
            "c.yaml:2: model: width 64 is not a multiple of heads 5; change one, or set head_dim",
            "c.yaml:5: train.steps: found 0; expected a whole number of at least 1",
            "c.yaml:7: train.acumulation: unknown key; did you mean train.accumulation?",
            "c.yaml:9: optimizer.lr: found 'fast'; expected a number greater than 0",
            "c.yaml:9: optimizer.betas: found [0.9, 2]; expected a list of 2 (each item a number of at least 0 and less than 1)",
            "c.yaml:10: schedule.name: found 'cosin'; expected one of constant, linear, cosine, wsd or inverse_sqrt",
            "c.yaml:12: lr: unknown key; did you mean optimizer.lr?",
            "command line: tracking.tensorboard: found 1; expected true or false",
            "command line: evaluat: unknown key; did you mean evaluate?",
        ]
    )


def test_rules_over_sections_are_looked_at_beside_wrong_keys(folder):
    lines = refused(folder, SMALL + "zero: {offload_optimizer: true, stage: 0}\n", ["optimizer.nam=sgd", "data.sequence_length=1024"])
    assert [line.split(": ")[1] for line in lines] == ["optimizer.nam", "data.sequence_length", "zero.offload_optimizer"]


def test_fewer_machines_must_leave_the_batch_as_it_is(folder):
    (line,) = refused(folder, SMALL, ["launch.min_nodes=1"])
    assert line.startswith("command line: launch.min_nodes: fewer machines would make another batch; set train.global_batch")
    assert len(refused(folder, SMALL, ["launch.min_nodes=1", "train.global_batch=16"])) == 1
    settled = load("c.yaml", ["launch.min_nodes=1", "train.global_batch=16", "train.accumulation=null"])
    assert settled.launch.min_nodes == 1


def test_a_rule_about_a_wrong_key_waits_for_its_value(folder):
    assert len(refused(folder, SMALL, ["data.sequence_length=1024", "model.max_positions=long"])) == 1
    assert len(refused(folder, SMALL, ["train.early_stopping.patience=2", "evaluate.evry=2"])) == 1


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.layers", "2.5", "a whole number of at least 1"),
        ("model.layers", "true", "a whole number of at least 1"),
        ("model.kv_heads", "no", "a whole number of at least 1 or null"),
        ("model.activation_checkpointing", "1", "none or full or a whole number of at least 2"),
        ("model.dropout", "1", "a number of at least 0 and less than 1"),
        ("optimizer.lr", ".inf", "a number greater than 0"),
        ("optimizer.lr", "[1]", "a number greater than 0"),
        ("zero.stage", "4", "a whole number from 0 to 3"),
        ("data.field", "5", "text; put it in quotes"),
        ("data.path", "5", "text or a list (each item text) or null; put it in quotes"),
        ("run.name", "a b", "text of the form [A-Za-z0-9][A-Za-z0-9._-]*"),
        ("precision", "", "one of auto, bf16, fp16 or fp32"),
        ("model", "gpt2", "a mapping with the keys layers, width, heads, mlp_width, max_positions"),
        ("zero", "3", "a mapping of keys (stage, offload_optimizer, bucket_bytes, overlap_comm)"),
        ("launch.environment", "3", "a mapping of names of the form [A-Za-z_][A-Za-z0-9_]* to values (each text in one line)"),
        ("launch.environment.A", "[1]", "text in one line"),
        ("launch.environment.A", "true", "text in one line; put it in quotes"),
        ("launch.environment.A", '"1\\n2"', "text in one line"),
        ("launch.kubernetes.node_selector.zone", "1", "text; put it in quotes"),
        ("launch.kubernetes.node_selector", "a", "a mapping of names to values (each text)"),
        ("launch.time", "soon", "text of the form MINUTES, HH:MM:SS or DAYS-HH:MM:SS or null"),
        ("launch.kubernetes.cpu", "1.5GB", "text such as 500m, 8 or 16Gi or null"),
    ],
)
def test_what_would_be_right(folder, key, value, expected):
    (line,) = refused(folder, SMALL, [f"{key}={value}"])
    assert line.startswith(f"command line: {key}: found ") and line.endswith(f"; expected {expected}")


def test_every_wrong_entry_of_a_mapping_is_named(folder):
    text = SMALL + "launch:\n  environment:\n    A-b: 1\n    C: [2]\n    D: fine\n    1: x\n"
    named = "is no name for an entry; expected one of the form [A-Za-z_][A-Za-z0-9_]*"
    assert refused(folder, text, ["train.steps=0"]) == [
        "command line: train.steps: found 0; expected a whole number of at least 1",
        f"c.yaml:7: launch.environment.A-b: {named}",
        "c.yaml:8: launch.environment.C: found [2]; expected text in one line",
        f"c.yaml:10: launch.environment.1: {named}",
    ]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("model.layrs", "model.layers"),
        ("trian.steps", "train"),
        ("model.lr", "optimizer.lr"),
        ("warmup_steps", "schedule.warmup_steps"),
        ("xyz", None),
    ],
)
def test_the_nearest_key(folder, wrong, near):
    (line,) = refused(folder, SMALL, [f"{wrong}=1"])
    assert line.endswith(f"unknown key; did you mean {near}?" if near else "unknown key")


def test_a_missing_key_is_placed_in_its_section(folder):
    assert refused(folder, SMALL.replace("lr: 1e-4", "")) == ["c.yaml:4: optimizer.lr: is missing; expected a number greater than 0"]
    assert refused(folder, SMALL.replace("data: {sequence_length: 128}", "")) == [
        "c.yaml: data: is missing; expected a mapping with the keys sequence_length"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL + "zero: {stage: 1}\nzero: {stage: 2}\n", "c.yaml:6: zero: stands twice; the first is at c.yaml:5: remove one"),
        (SMALL + "run:\n  name: a\n  name: b\n", "c.yaml:7: run.name: stands twice; the first is at c.yaml:6: remove one"),
        (SMALL + "include: c.yaml\n", "c.yaml:5: include: the files include each other: c.yaml -> c.yaml"),
        (SMALL + "include: gone.yaml\n", "c.yaml:5: include: gone.yaml: there is no such file"),
        (SMALL + "include: {a: b}\n", "c.yaml:5: include: expected a path or a list of paths"),
        (SMALL + "run: {include: c.yaml}\n", "c.yaml:5: run.include: stands only at the top level of a file"),
        (SMALL + "kernels: &a {}\nevaluate: *a\n", "c.yaml:6: is not valid YAML: aliases (*name) are not supported; use include"),
        (
            SMALL + "precision: !!python/name:os.system ''\n",
            "c.yaml:5: is not valid YAML: the tag tag:yaml.org,2002:python/name:os.system is not supported",
        ),
        (SMALL + "launch: {port: " + "9" * 5000 + "}\n", "c.yaml:5: launch.port: found '99999"),
        (SMALL + "run: {[a]: b}\n", "c.yaml:5: run: expected a key, found a list or mapping"),
        (
            "model:\n\tlayers: 2\n",
            "c.yaml:2: is not valid YAML: found character '\\t' that cannot start any token (indent with spaces, not tabs)",
        ),
        ("model: [1\n", "c.yaml:2: is not valid YAML: "),
        (SMALL + "---\na: b\n", "c.yaml:5: is not valid YAML: but found another document"),
        ("[" * 5000, "c.yaml: is not valid YAML: nested too deeply"),
        ("", "c.yaml: expected a mapping of sections (model:, data:, train:, ...); the file is empty"),
        ("- a\n", "c.yaml: expected a mapping of sections (model:, data:, train:, ...); found a list"),
        ("hello\n", "c.yaml: expected a mapping of sections (model:, data:, train:, ...); found 'hello'"),
        ("a: \x01\n", "c.yaml: is not valid YAML: special characters are not allowed"),
    ],
)
def test_one_message_for_a_broken_file(folder, text, message):
    (line,) = refused(folder, text)
    assert line.startswith(message)


def test_what_may_be_in_an_unread_file_is_not_called_missing(folder):
    (line,) = refused(folder, "include: gone.yaml\noptimizer: {lr: 1e-3}\n")
    assert "gone.yaml: there is no such file" in line


def test_circle_over_two_files(folder):
    folder(a="include: c.yaml\n")
    (line,) = refused(folder, SMALL + "include: a.yaml\n")
    assert line == "a.yaml:1: include: the files include each other: c.yaml -> a.yaml -> c.yaml"


def test_files_that_are_none(folder, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/x.yaml").write_text(SMALL)
    (tmp_path / "latin.yaml").write_bytes(SMALL.encode() + b"# caf\xe9\n")
    for path, message in {
        "sub": "sub: is a folder; name a .yaml file in it: x.yaml",
        "gone.yaml": "gone.yaml: there is no such file",
        "latin.yaml": "latin.yaml: is not UTF-8 text",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            load(path)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load("bom.yaml").model.layers == 2


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", ".=3", ""])
def test_an_override_that_is_none(folder, override):
    assert refused(folder, SMALL, [override]) == [f"command line: expected section.key=value, found {override!r}"]


def test_an_override_that_is_not_yaml(folder):
    (line,) = refused(folder, SMALL, ["run.name=[a"])
    assert line.startswith("command line: run.name: is not valid YAML: ") and "'[a'" in line


def test_problems_found_later_name_the_line(folder):
    folder(c=SMALL + "precision: fp16\n")
    source = read("c.yaml")
    assert str(source.error([("precision", "no")])) == "c.yaml:5: precision: no"
    assert str(source.error([("precision", "no"), ("launch.port", "taken")])).splitlines()[1:] == [
        "  c.yaml:5: precision: no",
        "  c.yaml: launch.port: taken",
    ]


# ---- Shipped configs and editors ----


def test_shipped_configs_are_found_by_name(folder, tmp_path):
    (tmp_path / "shipped/models").mkdir(parents=True)
    (tmp_path / "shipped/models/tiny.yaml").write_text(SMALL)
    for name in ("models/tiny", "models/tiny.yaml", "configs/models/tiny.yaml"):
        assert find(name) == tmp_path / "shipped/models/tiny.yaml"
    with pytest.raises(UserError, match=r"models/tny.yaml: there is no such file; did you mean models/tiny.yaml\?"):
        find("models/tny.yaml")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny.yaml").write_text("x")
    assert find("models/tiny.yaml").read_text() == "x"  # the user's own comes first
    folder(c="include: models/tiny\n")
    assert load("c.yaml").model.layers == 2


def test_every_key_of_the_tree_is_in_the_schema(folder):
    folder(c=SMALL)
    tree = schema()
    json.dumps(tree)
    assert "include" in tree["properties"] and "required" not in json.dumps(tree)
    for section, value in load("c.yaml").model_dump().items():
        node = tree["properties"][section]
        assert isinstance(value, dict) == ("properties" in node)
        assert not isinstance(value, dict) or set(node["properties"]) == set(value)
    assert tree["properties"]["model"]["properties"]["causal"]["description"].startswith("True for a decoder")
