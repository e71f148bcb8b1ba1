"""The ground floor: what is read is regular and bounded, what is written is whole, what is shown is one line."""

import os

import pytest

from minisd import CheckpointError
from minisd.files import check_regular, read_json, read_json_object, read_text, shown, write_whole


@pytest.mark.parametrize(
    ("text", "line"),
    (
        ("down.4.weight", "down.4.weight"),
        ("naïve 中文", "naïve 中文"),
        ("\x1b[31mred\nline\r\x00", r"\x1b[31mred\nline\r\x00"),
        ("\ud800\u202e", r"\ud800\u202e"),
        ("a" * 200, "a" * 120 + "... (200 characters)"),
        (["a", 1], "['a', 1]"),
    ),
    ids=ascii,
)
def test_shown(text, line):
    assert shown(text) == line


def test_shown_is_short_whatever_comes():
    assert len(shown("\x1b" * 1_000_000, 50)) < 300


def test_a_file_of_bounded_size(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json_object(path) == {"a": 1} and read_text(path, 8) == '{"a": 1}' and check_regular(path) == 8
    with pytest.raises(CheckpointError, match=r"x\.json: is larger than the 7 bytes"):
        read_text(path, 7)
    os.truncate(path, 1 << 40)  # a hole of a terabyte
    with pytest.raises(CheckpointError, match="is larger"):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "cause"),
    (
        (b"\xff", "cannot be read"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 5000, "not JSON"),
        (b"[]", "not a JSON object"),
    ),
    ids=["not UTF-8", "cut", "nested", "digits", "list"],
)
def test_what_is_no_json_object(tmp_path, content, cause):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=cause):
        read_json_object(tmp_path / "x.json")


def test_what_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(CheckpointError, match="is missing"):
        read_text(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no such file"):
        check_regular(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_text(tmp_path / "loop")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="is not a regular file"):
            read_json(tmp_path / "pipe")


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_whole(path, b"old")

    def fail(*_):
        raise OSError("disk on fire")

    monkeypatch.setattr("minisd.files.os.replace", fail)
    with pytest.raises(OSError, match="fire"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
