import json

import pytest

from bigtrain.config import Data
from bigtrain.data.source import documents
from bigtrain.errors import UserError


def read(source, path, **more):
    return list(documents(Data(source=source, path=path, sequence_length=8, **more)))


def test_stdlib_is_the_source_without_tests_in_a_fixed_order():
    found = list(documents(Data(sequence_length=8)))
    names = [d.name for d in found]
    assert {"os.py", "json/decoder.py"} <= set(names) and len(names) > 300
    assert names == sorted(names)
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/")) or n.startswith("_sysconfigdata")]
    assert all(d.text for d in found)  # empty __init__.py files are no documents


def test_text_reads_files_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_bytes("zwei\r\n€".encode())
    (tmp_path / "b" / "1.md").write_bytes(b"\xef\xbb\xbfeins")
    (tmp_path / "b" / "empty").write_bytes(b"")
    (tmp_path / "b" / ".hidden").write_bytes(b"\xff")
    (tmp_path / "b" / ".git").mkdir()
    (tmp_path / "b" / ".git" / "index").write_bytes(b"\xff")
    (tmp_path / "a.txt").write_text("null")
    (tmp_path / "b" / "3" / ".cache").mkdir(parents=True)
    (tmp_path / "b" / "3" / ".cache" / "x").write_bytes(b"\xff")
    found = read("text", [str(tmp_path / "b"), str(tmp_path / "a.txt")])
    assert [d.text for d in found] == ["eins", "zwei\r\n€", "null"]
    assert found[0].name.endswith("1.md")


def test_jsonl_reads_the_named_field(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "one\\u00e9"}\n\n{"body": "", "n": 1}\n{"n": 2, "body": "two"}', encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not a row")
    found = read("jsonl", str(tmp_path), field="body")
    assert [d.text for d in found] == ["oneé", "two"]
    assert found[1].name.endswith("x.jsonl:4")


@pytest.mark.parametrize(
    "line, says",
    [
        (b"{'text': 1}", ["not JSON", "one JSON object"]),
        (b"[1]", ["expected a JSON object", "found a list"]),
        (b'{"body": "x", "title": "y"}', ["no field 'text'", "'body', 'title'", "data.field"]),
        (b'{"text": null}', ["field 'text' must be a string", "found null"]),
        (b'{"text": 3}', ["field 'text' must be a string", "found a number"]),
        (b'{"text": "\\ud800"}', ["lone surrogate at character 0", "remove it"]),
        (b'{"text": "\xe9"}', ["not UTF-8", "byte 0xe9 at 10", "convert it"]),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, says):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        read("jsonl", str(tmp_path))
    assert all(s in str(caught.value) for s in [f"{tmp_path / 'x.jsonl'}:2: ", *says]), caught.value


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(UserError, match="data.path: .*nowhere does not exist; give a file or a folder"):
        read("text", str(tmp_path / "nowhere"))


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("abcé".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin1.txt: not UTF-8 \(byte 0xe9 at 3\); convert it"):
        read("text", str(tmp_path))


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_source_without_text_is_named(tmp_path, source):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ""}) if source == "jsonl" else "")
    with pytest.raises(UserError, match=f"data.source {source}: no text found in .*; check data.path"):
        read(source, str(tmp_path))
