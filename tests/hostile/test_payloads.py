"""Files that somebody else made: none may run code, hang, read elsewhere or end in a traceback.

Each case plants something and reads it the way a command does. Either one clear line comes out, or the reading does no harm. What is
planted would create the canary file if it were run.
"""

from __future__ import annotations

import contextlib
import html.parser
import io
import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bigtrain import configfile
from bigtrain.checkpoint import format
from bigtrain.checkpoint.compare import differences
from bigtrain.checkpoint.load import restore
from bigtrain.checkpoint.save import Content, save
from bigtrain.config import Batch, Config
from bigtrain.data import source, tokenizer
from bigtrain.data.loader import Loader
from bigtrain.data.prepare import prepare
from bigtrain.data.shards import Manifest, TokenStore
from bigtrain.errors import BigtrainError, UserError
from bigtrain.model.transformer import parameter_shapes
from bigtrain.ranks import launched
from bigtrain.report import write_report
from bigtrain.runfolder import RunFolder
from bigtrain.screen import Screen, printable
from bigtrain.start import with_data
from bigtrain.tasks import make_task
from bigtrain.trackers import Trackers, _indented

SECONDS = 20
CONFIG = """\
model: {layers: 1, width: 8, heads: 1, mlp_width: 8, max_positions: 16}
data: {source: text, path: FOLDER/text, tokenizer: bytes, folder: FOLDER/data, sequence_length: 16, validation_fraction: 0.3}
train: {steps: 2, global_batch: 2, micro_batch: 1}
optimizer: {lr: 0.1}
"""


class Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Place:
    """A folder with a good config c.yaml and its data, to be spoilt; `says` the cases' way to expect a message."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.canary = folder / "canary"
        self.pickle = pickle.dumps(Bomb(self.canary))
        self.command = f"touch {self.canary}"
        self.data = folder / "data"

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def fifo(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path

    def link(self, name: str, target: str | Path) -> Path:
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        return path

    def config(self, more: str = "", **replaced: str) -> Config:
        text = (self.folder / "c.yaml").read_text()
        for old, new in replaced.items():
            text = text.replace(old, new)
        return configfile.load(self.write("changed.yaml", text + more))

    def manifest(self, change: Callable[[dict[str, Any]], object]) -> Path:
        """A manifest that was changed by somebody who knows how its fingerprint is made."""
        path = self.data / "manifest.json"
        stored = json.loads(path.read_text())
        change(stored)
        with contextlib.suppress(ValueError):
            stored["fingerprint"] = Manifest.model_validate({k: v for k, v in stored.items() if k != "fingerprint"}).fingerprint
        path.write_text(json.dumps(stored))
        return path

    def train_on_it(self) -> None:
        """What the commands do with prepared data before and while they train."""
        config = with_data(configfile.load(self.folder / "c.yaml"))
        store = TokenStore(config.data.folder, "train")
        batch = Batch(global_batch=1, micro_batch=1, accumulation=1, ranks=1)
        loader = Loader(store, make_task(config, store.manifest.tokenizer), config, batch, 0, 0)
        for position in range(loader.reader.sequences):
            [micro_batch], _ = loader.step(position)
            assert micro_batch["token"].min() >= 0 and micro_batch["token"].max() < config.model.vocab_size
            assert micro_batch["position"].min() >= 0 and micro_batch["position"].max() < config.model.max_positions

    def run(self) -> RunFolder:
        """A run folder with a config, a step and a sample."""
        run = RunFolder(self.folder / "runs" / "r")
        (run.attempt(1) / "logs").mkdir(parents=True)
        run.metrics.write_text('{"attempt": 1, "step": 1, "time": 1.0, "loss": 2.5, "step_s": 0.1}\n')
        run.config.write_text(configfile.dump(configfile.load(self.folder / "c.yaml")))
        return run


CASES: dict[str, tuple[Callable[..., Any], str | None, bool]] = {}


def case(says: str | None, harmless: bool = False):
    """Register a case: `says` is what its one line must say. None, or `harmless`: it may also be read, without harm."""

    def register(function):
        assert function.__name__ not in CASES
        CASES[function.__name__] = function, says, harmless or says is None
        return function

    return register


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    (folder / "text").mkdir()
    for n in range(30):
        (folder / "text" / f"{n:02d}.txt").write_text(f"document {n}: " + "word " * n)
    (folder / "c.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    prepare(configfile.load(folder / "c.yaml").data)
    return folder


@pytest.fixture
def place(prepared, written, tmp_path) -> Place:
    folder = tmp_path / "p"
    shutil.copytree(prepared, folder)
    (folder / "c.yaml").write_text(CONFIG.replace("FOLDER", str(folder)))
    return Place(folder)


@pytest.fixture(autouse=True)
def hurry():
    """A read of a pipe waits for ever: say so instead."""

    def late(number, frame):
        raise AssertionError(f"still waiting after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_the_place_itself_is_good(place):
    place.train_on_it()
    assert place.config().train.steps == 2


def test_the_bomb_works(place):
    pickle.loads(place.pickle)
    assert place.canary.exists()


# ---- Config files ----


def yaml_case(name: str, text: str, says: str) -> None:
    """The text appended to a good config."""

    def load(place: Place) -> None:
        place.config(text.replace("COMMAND", place.command))

    load.__name__ = name
    case(says)(load)


TAGS = {
    "apply": "run: !!python/object/apply:os.system ['COMMAND']",
    "new": "run: !!python/object/new:os.system ['COMMAND']",
    "object": "run: !!python/object:os.system {command: COMMAND}",
    "name": "run: !!python/name:os.system",
    "module": "run: !!python/module:os",
    "verbatim": "run: !<tag:yaml.org,2002:python/object/apply:os.system> ['COMMAND']",
    "exec": "run: {name: !!python/object/apply:exec ['import os; os.system(\"COMMAND\")']}",
    "custom": "run: !bomb {name: COMMAND}",
    "binary": "run: {name: !!binary aGVsbG8=}",
}
for name, text in TAGS.items():
    yaml_case(f"yaml_tag_{name}", text, r"changed.yaml:\d+: is not valid YAML: the tag .* is not supported; write a plain value")


@case("the tag .* is not supported")
def yaml_tag_by_a_directive(place):
    text = f"%TAG !b! tag:yaml.org,2002:python/object/apply:\n---\nmodel: !b!os.system ['{place.command}']\n"
    configfile.load(place.write("c.yaml", text))


@case("command line: train.steps: is not valid YAML: the tag .* is not supported")
def yaml_tag_in_an_override(place):
    configfile.load(place.folder / "c.yaml", [f"train.steps=!!python/object/apply:os.system ['{place.command}']"])


BILLION = "a: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
yaml_case("yaml_billion_laughs", BILLION, r"changed.yaml:6: is not valid YAML: aliases \(\*name\) are not supported")
yaml_case("yaml_alias_of_itself", "a: &a [*a]\n", "aliases")
yaml_case("yaml_merge_key", "a: &a {b: 1}\nrun: {<<: *a}\n", "aliases")
yaml_case("yaml_deep_nesting", "run: " + "[" * 100_000, "changed.yaml: is not valid YAML: nested too deeply")
yaml_case("yaml_deep_mapping", "run: " + "{a: " * 100_000, "changed.yaml: is not valid YAML: nested too deeply")
yaml_case("yaml_key_twice", "optimizer: {lr: 1}\n", "changed.yaml:5: optimizer: stands twice; the first is at .*changed.yaml:4")
yaml_case("yaml_null_bytes", "run: {name: 'a\0b'}\n", "changed.yaml: is not valid YAML: special characters are not allowed")
yaml_case("run_name_that_escapes", "run: {name: ../../etc}\n", r"changed.yaml:5: run.name: found '../../etc'; expected text of the form")
yaml_case("run_name_of_html", "run: {name: <script>}\n", "run.name: found '<script>'")
yaml_case("yaml_huge_file", "# " + "x" * (1 << 20), "changed.yaml: is larger than 1 MiB: no config")


@case(r"command line: train.steps: found '9+\.\.\.; expected a whole number of at least 1")
def number_of_6000_digits_in_an_override(place):
    configfile.load(place.folder / "c.yaml", ["train.steps=" + "9" * 6000])


@case("c.yaml: is not UTF-8 text")
def config_that_is_a_pickle(place):
    configfile.load(place.write("c.yaml", place.pickle))


@case("c.yaml: is a device or a pipe; name a .yaml file")
def config_that_is_a_fifo(place):
    configfile.load(place.fifo("c.yaml"))


@case("c.yaml: is a device or a pipe; name a .yaml file")
def config_that_is_a_device(place):
    configfile.load(place.link("c.yaml", "/dev/zero"))


@case("include: .*pipe.yaml: is a device or a pipe")
def include_of_a_fifo(place):
    place.fifo("pipe.yaml")
    configfile.load(place.write("c.yaml", "include: pipe.yaml\n" + CONFIG))


@case("config.yaml:1: include: the config of a run or checkpoint includes nothing; remove it")
def saved_config_that_includes(place):
    configfile.load_saved(place.write("runs/r/config.yaml", "include: /etc/passwd\n" + CONFIG))


# ---- Prepared data ----


@case(r"train-00000.tokens: has \d+ bytes, expected \d+ bytes; copy it again or prepare the data again")
def shard_that_is_a_pickle(place):
    place.write("data/train-00000.tokens", place.pickle)
    place.train_on_it()


@case(r"train-00000.tokens: token \d+ is \d+, beyond the vocabulary of 320: the file is damaged; prepare the data again")
def shard_that_is_a_pickle_of_the_right_size(place):
    size = (place.data / "train-00000.tokens").stat().st_size
    place.write("data/train-00000.tokens", place.pickle.ljust(size, b"\0"))
    place.train_on_it()


@case(r"train-00000.tokens: token 333 is 65535, beyond the vocabulary of 320")
def token_out_of_range(place):
    tokens = np.fromfile(place.data / "train-00000.tokens", "<u2")
    tokens[333] = 65535
    tokens.tofile(place.data / "train-00000.tokens")
    place.train_on_it()


@case("train.documents: positions do not ascend: the file is damaged")
def documents_out_of_order(place):
    starts = np.fromfile(place.data / "train.documents", "<u8")
    np.roll(starts, 1).tofile(place.data / "train.documents")
    place.train_on_it()


@case("train-00000.tokens: is no regular file, expected")
def shard_that_is_a_fifo(place):
    place.fifo("data/train-00000.tokens")
    place.train_on_it()


@case("train-00000.tokens: is a link to /.*outside, outside the folder; put the file itself there")
def shard_that_is_a_link_to_elsewhere(place):
    outside = shutil.copy(place.data / "train-00000.tokens", place.folder / "outside")
    place.link("data/train-00000.tokens", outside)
    place.train_on_it()


@case("train-00000.bytes: is a link to /dev/zero, outside the folder")
def shard_that_is_a_device(place):
    place.link("data/train-00000.bytes", "/dev/zero")
    place.train_on_it()


@case("manifest.json: damaged .UnicodeDecodeError")
def manifest_that_is_a_pickle(place):
    place.write("data/manifest.json", place.pickle)
    place.train_on_it()


@case("manifest.json: damaged .OSError: .* is no regular file")
def manifest_that_is_a_fifo(place):
    place.fifo("data/manifest.json")
    place.train_on_it()


@case("manifest.json: damaged .OSError: .* is no regular file")
def manifest_that_is_a_device(place):
    place.link("data/manifest.json", "/dev/zero")
    place.train_on_it()


MANIFESTS = {
    "deep_nesting": ("[" * 100_000, "nested too deeply"),
    "nan": ('{"format": NaN}', "NaN is no JSON number"),
    "number_of_6000_digits": ('{"format": ' + "9" * 6000 + "}", "Exceeds the limit"),
    "key_twice": ('{"format": 1, "format": 1}', "the key 'format' stands twice"),
    "a_list": ("[1, 2]", "it holds no JSON object"),
    "a_text": ('"text"', "it holds no JSON object"),
    "null": ("null", "it holds no JSON object"),
    "empty": ("", "Expecting value"),
}
for name, (text, says) in MANIFESTS.items():

    def manifest_case(place, text=text):
        place.write("data/manifest.json", text)
        place.train_on_it()

    manifest_case.__name__ = f"manifest_{name}"
    case(f"manifest.json: damaged .*{says}.*; remove the folder and prepare the data again")(manifest_case)

FORGED = {
    "name_that_escapes": (
        lambda m: m["splits"]["train"]["shards"][0].update(name="../outside"),
        "shards.0.name: String should match pattern",
    ),
    "name_that_is_absolute": (lambda m: m["splits"]["train"]["shards"][0].update(name="/etc/passwd"), "shards.0.name: String should match"),
    "name_with_a_null": (lambda m: m["splits"]["train"]["shards"][0].update(name="a\0b"), "shards.0.name: String should match"),
    "negative_tokens": (lambda m: m["splits"]["train"].update(tokens=-1), "splits.train.tokens: Input should be greater"),
    "shards_of_other_sum": (lambda m: m["splits"]["train"].update(tokens=10**18), "the shards do not sum to 1000000000000000000"),
    "no_shards": (lambda m: m["splits"]["train"].update(shards=[], tokens=0), "splits.train.tokens: Input should be greater"),
    "text_for_a_number": (lambda m: m["splits"]["train"].update(documents="many"), "documents: Input should be a valid integer"),
    "a_float_for_a_number": (lambda m: m["splits"]["train"].update(documents=3.5), "documents: Input should be a valid integer"),
    "true_for_a_number": (lambda m: m["splits"]["train"].update(documents=True), "documents: Input should be a valid integer"),
    "object_dtype": (lambda m: m["splits"]["train"].update(token_dtype="|O"), "token_dtype: Input should be '<u2' or '<u4'"),
    "no_validation": (lambda m: m["splits"].pop("validation"), "splits: Dictionary should have at least 2 items"),
    "end_of_document_beyond": (lambda m: m["tokenizer"].update(eod_id=10**9), "eod_id or mask_id is beyond vocab_size 258"),
    "mask_beyond": (lambda m: m["tokenizer"].update(mask_id=258), "eod_id or mask_id is beyond vocab_size 258"),
    "unknown_key": (lambda m: m.update(code="import os"), "code: Extra inputs are not permitted"),
}
for name, (change, says) in FORGED.items():

    def forged_case(place, change=change):
        place.manifest(change)
        place.train_on_it()

    forged_case.__name__ = f"manifest_{name}"
    case(f"manifest.json: damaged .*{says}")(forged_case)


@case(r"train-00000.tokens: has \d+ bytes, expected 2000000000000000000 bytes")
def manifest_of_absurd_numbers(place):
    def change(manifest):
        split = manifest["splits"]["train"]
        split["tokens"] = split["shards"][0]["tokens"] = 10**18

    place.manifest(change)
    place.train_on_it()


# ---- Text ----


def rows(place: Place, content: str | bytes, name: str = "rows.jsonl") -> None:
    path = place.write(name, content)
    list(source.documents(place.config(**{"source: text": "source: jsonl", f"{place.folder}/text": str(path)}).data))


@case(r"rows.jsonl:1: not JSON that can be read \(nested too deeply\); mend the row or take it out")
def row_of_deep_nesting(place):
    rows(place, '{"text": ' + "[" * 100_000)


@case(r"rows.jsonl:2: not JSON that can be read \(Exceeds the limit")
def row_with_a_number_of_6000_digits(place):
    rows(place, '{"text": "a"}\n{"n": ' + "9" * 6000 + "}\n")


@case("rows.jsonl:2: longer than 0 MiB; every line must be one JSON object: split it")
def row_that_never_ends(place, monkeypatch):
    monkeypatch.setattr(source, "_LONGEST_LINE", 1000)
    rows(place, '{"text": "a"}\n' + '{"text": "' + "x" * 10_000)


@case("rows.jsonl:1: not UTF-8")
def row_that_is_a_pickle(place):
    rows(place, place.pickle)


@case("data.path: .*/pipe is a device or a pipe; give a file or a folder")
def text_that_is_a_fifo(place):
    place.fifo("pipe")
    list(source.documents(place.config(**{f"{place.folder}/text": f"{place.folder}/pipe"}).data))


@case("data.path: /dev/zero is a device or a pipe; give a file or a folder")
def text_that_is_a_device(place):
    list(source.documents(place.config(**{f"{place.folder}/text": "/dev/zero"}).data))


@case(None)
def fifo_among_texts(place):
    before = list(source.documents(place.config().data))
    place.fifo("text/pipe")
    place.link("text/loop", "loop")
    assert list(source.documents(place.config().data)) == before


# ---- Tokenizers ----


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.train_bpe(["some words and other words"], 270).save(folder)
    return folder


def remote_code(place: Place, bpe: Path, **settings: Any) -> Path:
    """A Hugging Face tokenizer that brings Python code along."""
    folder = place.folder / "tok"
    shutil.copytree(bpe, folder)
    for name in ("evil", "tokenization_evil", "__init__", "configuration_evil"):
        (folder / f"{name}.py").write_text(f"import os\nos.system({place.command!r})\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    return folder


AUTO_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}


@case("does not load as a Hugging Face tokenizer", harmless=True)
def tokenizer_with_remote_code(place, bpe):
    folder = remote_code(place, bpe, auto_map=AUTO_MAP, tokenizer_class="Evil")
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": AUTO_MAP}))
    tokenizer.from_hugging_face(folder)


@case("does not load as a Hugging Face tokenizer", harmless=True)
def tokenizer_with_remote_code_elsewhere(place, bpe):
    tokenizer.from_hugging_face(remote_code(place, bpe, auto_map={"AutoTokenizer": ["evil/repo--evil.Evil", "../tok--evil.Evil"]}))


@case("does not load as a Hugging Face tokenizer|has no fast tokenizer", harmless=True)
def tokenizer_with_a_pickled_vocabulary(place, bpe):
    folder = remote_code(place, bpe, tokenizer_class="TransfoXLTokenizer")
    (folder / "tokenizer.json").unlink()
    for name in ("vocab.pkl", "vocab.bin", "vocab.txt", "spiece.model", "tokenizer.model", "pytorch_model.bin"):
        (folder / name).write_bytes(place.pickle)
    tokenizer.from_hugging_face(folder)


@case("data.tokenizer: .*tok does not load as a Hugging Face tokenizer: .")
def tokenizer_that_is_a_pickle(place, bpe):
    folder = remote_code(place, bpe)
    (folder / "tokenizer.json").write_bytes(place.pickle)
    tokenizer.from_hugging_face(folder)


@case("data.tokenizer: .*tok does not load as a Hugging Face tokenizer: .")
def tokenizer_of_deep_nesting(place, bpe):
    folder = remote_code(place, bpe)
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    tokenizer.from_hugging_face(folder)


@case("data.tokenizer: .*tokenizer_config.json is no regular file; take it out of the folder")
def tokenizer_with_a_fifo(place, bpe):
    remote_code(place, bpe)
    tokenizer.from_hugging_face(place.fifo("tok/tokenizer_config.json").parent)


@case(None)
def saved_tokenizer_with_remote_code(place, bpe):
    assert tokenizer.load(remote_code(place, bpe, auto_map=AUTO_MAP, chat_template="{{ ''.__class__.__mro__ }}")).encode("words")


@case("has a token of number 4000000000: the file is damaged")
def saved_tokenizer_with_an_absurd_id(place, bpe):
    folder = remote_code(place, bpe)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"]["zzz"] = 4_000_000_000
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer.load(folder)


@case("tokenizer.json: damaged .*; prepare the data again")
def saved_tokenizer_of_deep_nesting(place, bpe):
    folder = remote_code(place, bpe)
    (folder / "tokenizer.json").write_text('{"a":' * 100_000)
    tokenizer.load(folder)


@case("tok: has no token to end a document")
def saved_tokenizer_of_wrong_types(place, bpe):
    tokenizer.load(remote_code(place, bpe, eos_token={"__type": "AddedToken", "content": "x"}, mask_token=[1], sep_token=7))


@case("tok: not a tokenizer saved by bigtrain .*'tokenizer_class'")
def saved_tokenizer_without_a_class(place, bpe):
    (remote_code(place, bpe) / "tokenizer_config.json").write_text("{}")
    tokenizer.load(place.folder / "tok")


@case("tok: not a tokenizer saved by bigtrain .*the key 'tokenizer_class' stands twice")
def saved_tokenizer_with_a_key_twice(place, bpe):
    (remote_code(place, bpe) / "tokenizer_config.json").write_text('{"tokenizer_class": "a", "tokenizer_class": "bigtrain.bytes"}')
    tokenizer.load(place.folder / "tok")


@case("tok: not a tokenizer saved by bigtrain .*is a link to /etc/passwd, outside the folder")
def saved_tokenizer_that_is_a_link(place, bpe):
    remote_code(place, bpe)
    tokenizer.load(place.link("tok/tokenizer.json", "/etc/passwd").parent)


@case("tok: not a tokenizer saved by bigtrain .*is no regular file")
def saved_tokenizer_that_is_a_fifo(place, bpe):
    remote_code(place, bpe)
    tokenizer.load(place.fifo("tok/tokenizer.json").parent)


# ---- Checkpoints ----


@pytest.fixture(scope="module")
def written(prepared) -> Path:
    """A checkpoint of the model of c.yaml, as one rank writes it."""
    config = with_data(configfile.load(prepared / "c.yaml"))
    shapes = {name: list(shape) for name, shape in parameter_shapes(config.model, config.model.vocab_size).items()}
    tensors = [(name, kind, 0, torch.zeros(torch.Size(shape).numel())) for name, shape in shapes.items() for kind in ("model", "exp_avg")]
    state = {"step": 5, "position": 10, "global_batch": 2, "data": "d", "done": False, "best_loss": None, "evaluations_since_best": 0}
    state |= {"skipped": 0, "norm_average": 0.0, "norm_count": 0, "optimizer": {}, "loss_scaler": {}, "metrics": {}}
    files = {"config.yaml": configfile.dump(config), "tokenizer": prepared / "data/tokenizer"}
    alone = SimpleNamespace(rank=0, size=1, first=True, gather=lambda value: [value])
    return save(prepared / "checkpoints", Content(5, shapes, tensors, state, files), alone)


def spoilt(place: Place, change: Callable[[Path], object]) -> Path:
    """The checkpoint, changed by somebody who knows how its checksums are made."""
    checkpoint = place.folder / "checkpoints/step-00000005"
    change(checkpoint)
    with contextlib.suppress(OSError):
        (checkpoint / "manifest.json").write_text(json.dumps(format.manifest(checkpoint, {})))
    return checkpoint


def use(checkpoint: Path) -> None:
    """What evaluating and generating do, and comparing after it."""
    restore(checkpoint, "model", torch.device("cpu"), torch.float32)
    list(differences(checkpoint, checkpoint))


def test_the_checkpoint_itself_is_good(place):
    use(spoilt(place, lambda checkpoint: None))


def checkpoint_case(name: str, says: str | None, change: Callable[[Place, Path], object]) -> None:
    def attack(place: Place) -> None:
        use(spoilt(place, lambda checkpoint: change(place, checkpoint)))

    attack.__name__ = f"checkpoint_{name}"
    case(says)(attack)


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Place, Path], object]:
    def apply(place: Place, checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        change(content)
        (checkpoint / name).write_text(json.dumps(content))

    return apply


def put(name: str, text: str | Callable[[Place], str | bytes]) -> Callable[[Place, Path], object]:
    def apply(place: Place, checkpoint: Path) -> None:
        content = text if isinstance(text, str) else text(place)
        (checkpoint / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def fragment(column: int, value: Any) -> Callable[[Place, Path], object]:
    return edit("index.json", lambda index: index["fragments"][0].__setitem__(column, value))


RANK = "rank-00000-0.safetensors"
NAME = "embedding.weight"
OUTSIDE = "index.json: names the file .*, which is outside the checkpoint; do not use it"
for name, value in {"up": "../rank.safetensors", "absolute": "/etc/passwd", "folder": "tokenizer/x", "dots": "..", "nothing": ""}.items():
    checkpoint_case(f"file_{name}", OUTSIDE, fragment(4, value))
checkpoint_case("file_with_a_null", "cannot be read|names the file", fragment(4, "a\0b"))
checkpoint_case("file_of_another_type", "index.json: damaged", fragment(4, 7))
checkpoint_case("key_of_another_type", "index.json: damaged", fragment(5, 7))
checkpoint_case("kind_of_another_type", "index.json: damaged", fragment(1, ["model"]))
checkpoint_case("negative_offset", "index.json: damaged", fragment(2, -8))
checkpoint_case("negative_length", "index.json: damaged", fragment(3, -1))
checkpoint_case("huge_offset", "lacks element 0", fragment(2, 10**30))
checkpoint_case("huge_length", "has shape .*, the index says 1000000000000000000 elements", fragment(3, 10**18))
checkpoint_case("key_that_is_missing", f"{RANK}: cannot be read", fragment(5, "nothing"))
checkpoint_case(
    "shape_beyond_memory", "a checkpoint of another model", edit("index.json", lambda i: i["shapes"].update({NAME: [10**15, 8]}))
)
checkpoint_case("shape_of_text", "index.json: damaged", edit("index.json", lambda i: i["shapes"].update({NAME: "big"})))
checkpoint_case("shapes_in_a_list", "index.json: damaged", edit("index.json", lambda i: i.update(shapes=[1])))
checkpoint_case("another_version", "format version 'evil'|format version evil", edit("index.json", lambda i: i.update(version="evil")))
checkpoint_case("deep_index", "index.json: cannot be read", put("index.json", "[" * 100_000))
checkpoint_case("pickled_index", "index.json: cannot be read", put("index.json", lambda place: place.pickle))
checkpoint_case("pickled_state", "state.json: cannot be read", put("state.json", lambda place: place.pickle))
checkpoint_case("pickled_tensors", f"{RANK}: cannot be read", put(RANK, lambda place: place.pickle))
checkpoint_case("header_beyond_the_file", f"{RANK}: cannot be read", put(RANK, lambda place: (2**62).to_bytes(8, "little") + b"{}"))
checkpoint_case("header_of_deep_nesting", f"{RANK}: cannot be read", put(RANK, lambda place: (10**5).to_bytes(8, "little") + b"[" * 10**5))
checkpoint_case("state_of_text", "state.json: damaged .step: ", edit("state.json", lambda s: s.update(step="5")))
checkpoint_case("state_below_zero", "state.json: damaged .position: ", edit("state.json", lambda s: s.update(position=-5)))
checkpoint_case("state_of_more", "state.json: damaged .code: ", edit("state.json", lambda s: s.update(code="import os")))
checkpoint_case("state_of_nothing", "state.json: damaged", put("state.json", "null"))
checkpoint_case(
    "state_not_finite", "state.json: damaged .norm_average: ", edit("state.json", lambda s: s.update(norm_average=float("nan")))
)
checkpoint_case(
    "tags_in_its_config",
    "config.yaml: ?.*the tag .* is not supported",
    put("config.yaml", lambda p: f"a: !!python/object/apply:os.system ['{p.command}']"),
)
checkpoint_case(
    "config_that_includes",
    "config.yaml:1: include: .*includes nothing",
    lambda place, c: (c / "config.yaml").write_text("include: /etc/passwd\n" + (c / "config.yaml").read_text()),
)
checkpoint_case(
    "config_of_a_billion_layers",
    "parameters, its config.yaml says 1000000000 layers",
    lambda place, c: (c / "config.yaml").write_text((c / "config.yaml").read_text().replace("layers: 1", "layers: 1000000000")),
)
checkpoint_case(
    "config_of_a_huge_width",
    "a checkpoint of another model",
    lambda place, c: (c / "config.yaml").write_text((c / "config.yaml").read_text().replace(" width: 8", " width: 1000000000")),
)
checkpoint_case(
    "remote_code_in_its_tokenizer",
    None,
    lambda place, c: [
        (c / "tokenizer" / n).write_text(f"import os\nos.system({place.command!r})") for n in ("__init__.py", "tokenization.py")
    ],
)
checkpoint_case(
    "pickled_tokenizer", "tokenizer: not a tokenizer saved by bigtrain", put("tokenizer/tokenizer_config.json", lambda place: place.pickle)
)
checkpoint_case(
    "linked_tensors",
    f"{RANK}: a link; a checkpoint holds plain files",
    lambda place, c: ((c / RANK).rename(place.folder / "moved"), (c / RANK).symlink_to(place.folder / "moved")),
)
checkpoint_case(
    "linked_tokenizer",
    "tokenizer: not in the manifest; it was put there",
    lambda place, c: (shutil.rmtree(c / "tokenizer"), (c / "tokenizer").symlink_to(place.data / "tokenizer")),
)


def seen_by_the_manifest(name: str, says: str, change: Callable[[Place, Path], object]) -> None:
    """Changed after the manifest was written."""

    def attack(place: Place) -> None:
        checkpoint = place.folder / "checkpoints/step-00000005"
        change(place, checkpoint)
        use(checkpoint)

    attack.__name__ = f"manifest_of_a_checkpoint_{name}"
    case(says)(attack)


def listed(name: str) -> Callable[[Place, Path], object]:
    def apply(place: Place, checkpoint: Path) -> None:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"] | {name: [1, "0"]}
        (checkpoint / "manifest.json").write_text(json.dumps({"version": 1, "files": files, "checksum": format._own_checksum(files)}))

    return apply


seen_by_the_manifest("names_up", "names the file '../../c.yaml', which is outside the checkpoint", listed("../../c.yaml"))
seen_by_the_manifest("names_an_absolute_path", "names the file '/etc/passwd', which is outside", listed("/etc/passwd"))
seen_by_the_manifest("names_a_null", "missing; a checkpoint holds plain files", listed("a\0b"))
seen_by_the_manifest("is_a_pickle", "manifest.json: cannot be read", put("manifest.json", lambda place: place.pickle))
seen_by_the_manifest("is_a_list", "manifest.json: damaged", put("manifest.json", "[1]"))
seen_by_the_manifest("is_a_fifo", "manifest.json: cannot be read", lambda place, c: place.fifo("checkpoints/step-00000005/manifest.json"))
seen_by_the_manifest("index_is_a_fifo", "no checkpoint here", lambda place, c: place.fifo("checkpoints/step-00000005/index.json"))
seen_by_the_manifest("tensors_are_a_fifo", "missing", lambda place, c: place.fifo(f"checkpoints/step-00000005/{RANK}"))
seen_by_the_manifest("tensors_are_a_device", "a link", lambda place, c: place.link(f"checkpoints/step-00000005/{RANK}", "/dev/zero"))
seen_by_the_manifest("code_beside_it", "evil.py: not in the manifest", put("evil.py", "import os"))


# ---- Run folders, and what a person looks at ----

HTML = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'><!--<script>"


class Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def report(place: Place) -> None:
    """Write the report, and compare its elements with those of a page of the same run with harmless text."""
    page = Page(write_report([place.folder / "runs" / "r"]).read_text())
    assert [tag for tag, _ in page.tags].count("script") == 2 and "img" not in [tag for tag, _ in page.tags]
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on") or key in ("src", "srcdoc", "href")]


@case(None)
def html_everywhere_in_a_report(place):
    run = place.run()
    run.samples.write_text(json.dumps({"attempt": 1, "step": 1, "prompt": HTML, "text": HTML}) + "\n")
    run.metrics.write_text(json.dumps({"attempt": 1, "step": 1, "time": 1.0, "loss": 2.5, "step_s": 0.1, HTML: 1.0, "other": HTML}) + "\n")
    run.config.write_text(json.dumps({HTML: {HTML: [HTML]}, "train": {"steps": HTML}}))
    record = {"host": HTML, "reason": HTML, "ranks": HTML, "started": HTML, "exit_code": HTML, HTML: HTML}
    (run.attempt(1) / "attempt.json").write_text(json.dumps(record))
    (run.attempt(1) / "environment.json").write_text(
        json.dumps({"hardware": {HTML: HTML}, "git_commit": HTML, "torch": HTML, "parameters": HTML})
    )
    report(place)


@case(None)
def html_in_the_name_of_a_run(place):
    place.run()
    named = place.folder / "runs" / HTML.replace("/", "\u2215")
    (place.folder / "runs" / "r").rename(named)
    shutil.copytree(named, place.folder / "runs" / "r")
    tags = [tag for tag, _ in Page(write_report([named, place.folder / "runs" / "r"]).read_text()).tags]
    assert tags.count("script") == 2 and "img" not in tags


@case(None)
def run_folder_of_bombs(place):
    run = place.run()
    run.config.write_text(BILLION)
    run.samples.write_text("[" * 100_000 + '\n{"step": ' + "9" * 6000 + '}\n{"step": 1, "prompt": [], "text": {}}\n')
    with open(run.metrics, "ab") as file:
        file.write(b"[" * 100_000 + b"\n" + place.pickle + b'\n{"step": 2, "loss": 1e999}\n{"step": 3, "loss": "' + b"9" * 6000 + b'"}\n')
    (run.attempt(1) / "attempt.json").write_text("[" * 100_000)
    (run.attempt(1) / "environment.json").write_bytes(place.pickle)
    report(place)


@case(None)
def run_folder_of_tags(place):
    run = place.run()
    run.config.write_text(f"a: !!python/object/apply:os.system ['{place.command}']\n")
    report(place)


@case(None)
def run_folder_of_fifos(place):
    run = place.run()
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "attempts/1/attempt.json", "attempts/1/environment.json"):
        place.fifo(f"runs/r/{name}")
    assert run.attempts() == [1]
    report(place)


ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\r\x08 \u202eback"


@case(None)
def escape_sequences_on_the_screen(place):
    stream = io.StringIO()
    shows = Screen(stream)
    shows.header({"run": ESCAPES})
    shows.sample(ESCAPES, ESCAPES)
    shows.warn(ESCAPES)
    shows.message(ESCAPES)
    assert set(stream.getvalue()).isdisjoint("\x1b\x07\x9b\r\x08\u202e")


@case(r"^(?!.*[\x1b\x07\x9b\r\x08\u202e]).*there is no such file")
def escape_sequences_in_a_message(place):
    try:
        configfile.load(place.folder / ESCAPES)
    except UserError as error:  # as the command prints it
        raise UserError(printable(error)) from None


@case(None)
def markup_in_trackers(place):
    """TensorBoard makes HTML of Markdown: all that it gets is a block of code."""
    text = f"{HTML}\n```\n# x\u2028<b>\r\n\x0b[link](javascript:alert(1))"
    assert all(line.startswith("    ") for line in _indented(text).split("\n"))
    run = place.run()
    trackers = Trackers(place.config("tracking: {tensorboard: false}").tracking, run, 1, {}, pytest.fail)
    trackers.log_samples([{"step": 1, "prompt": text, "text": f"{text}\ud800"}])
    trackers.close()
    assert run.samples.read_text().count("\n") == 1
    report(place)


# ---- The environment ----

ODD = {
    "rank_of_6000_digits": ({"RANK": "9" * 6000}, "RANK: expected a whole number from the launcher, found '9{40}'"),
    "rank_in_other_digits": ({"RANK": "١"}, "RANK: expected a whole number"),
    "rank_with_a_newline": ({"RANK": "0\n"}, "RANK: expected a whole number"),
    "negative_rank": ({"RANK": "-1"}, "RANK: expected a whole number"),
    "world_of_nobody": ({"WORLD_SIZE": "0"}, "RANK: 0 is not below WORLD_SIZE 0"),
    "port_of_text": ({"MASTER_PORT": "$(touch x)"}, "MASTER_PORT: expected a whole number"),
}
for name, (variables, says) in ODD.items():

    def odd_case(place, variables=variables):
        launched({"RANK": "0", "WORLD_SIZE": "1", **variables})

    odd_case.__name__ = name
    case(says)(odd_case)


@case(None)
def odd_slurm_job(place):
    srun = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    for job in ("", "12_[3-4]", "x" * 5000, "9" * 6000):
        assert 20000 <= int(launched({**srun, "SLURM_JOB_ID": job})["MASTER_PORT"]) < 30000


@pytest.mark.parametrize("name", CASES)
def test_payload(name, place, bpe, monkeypatch):
    attack, says, harmless = CASES[name]
    arguments = {"place": place, "bpe": bpe, "monkeypatch": monkeypatch}
    message = None
    try:
        attack(*(arguments[name] for name in attack.__code__.co_varnames[: attack.__code__.co_argcount] if name in arguments))
    except BigtrainError as error:
        message = str(error)
    assert not place.canary.exists()
    assert harmless or message is not None
    if message is not None:
        assert says and re.search(says, message), message
        assert "\n" not in message and len(message) < 1000
