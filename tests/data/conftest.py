import pytest

from bigtrain.config import Config, Data
from bigtrain.data.check import Check
from bigtrain.data.prepare import prepare
from bigtrain.data.shards import TokenStore

WORDS = ["alpha", "βήτα", "γάμμα\n", "delta", "эпсилон", "ζ", "日本", "😀👩‍🚀", "  ", "x=1;"]


def make_texts(count: int) -> list[str]:
    """Different texts of 1 to 59 words in several scripts, the same for ever: a golden value depends on them."""
    return [" ".join([str(n), *(WORDS[(k * k + n) % 10] for k in range(1 + 37 * n % 59))]) for n in range(count)]


@pytest.fixture
def texts(tmp_path):
    """60 texts as files of the folder `texts`."""
    folder = tmp_path / "texts"
    folder.mkdir()
    made = make_texts(60)
    for n, text in enumerate(made):
        (folder / f"{n:03d}.txt").write_bytes(text.encode())
    return made


@pytest.fixture
def data(tmp_path):
    def make(**changes) -> Data:
        settings = dict(
            source="text",
            path=str(tmp_path / "texts"),
            tokenizer="bytes",
            folder=str(tmp_path / "prepared"),
            sequence_length=32,
            validation_fraction=0.2,
            shard_tokens=1000,
        )
        return Data(**{**settings, **changes})

    return make


@pytest.fixture
def config(data):
    def make(data_changes=None, **sections) -> Config:
        settings = dict(
            model=dict(layers=1, width=8, heads=1, mlp_width=8, max_positions=64),
            data=data(**(data_changes or {})).model_dump(),
            train=dict(steps=1, global_batch=1, micro_batch=1),
            optimizer=dict(lr=0.1),
        )
        return Config(**{**settings, **sections})

    return make


@pytest.fixture
def store(texts, data):
    """The training split, as bytes, in several shards."""
    return TokenStore(prepare(data()), "train")


@pytest.fixture
def verify():
    """Compare every file that belongs to a store with its checksum."""

    def run(store: TokenStore) -> None:
        check = Check(store, 0, 1)
        check.start()
        check.wait()
        check.refuse()

    return run
