"""Hostile and damaged safetensors files: CheckpointError with the cause, at once, and nothing else."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minisd.checkpoint.header import read_header
from minisd.files import CheckpointError
from minisd.lab.zoo import BROKEN, raw


@pytest.mark.parametrize("case", BROKEN)
def test_broken(tmp_path, case):
    content, word = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=word) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_header(tmp_path / "nothing.safetensors")


def test_a_folder(tmp_path):
    folder = tmp_path / "x.safetensors"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="folder"):
        read_header(folder)


def test_a_named_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="regular file"):
        read_header(tmp_path / "pipe.safetensors")


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "a.safetensors")


def test_whole_file(tmp_path):
    path = tmp_path / "good.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64), "c": torch.zeros(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("I64", ()),
        "c": ("F32", (0, 4)),
    }
    assert header.metadata == {"format": "pt"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "I64", "XX"]) | JSON,
        "shape": st.lists(st.integers(-2, 5) | st.integers(), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-2, 40) | st.integers(), max_size=3) | JSON,
    },
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=4),
    data=st.binary(max_size=48),
    length=st.none() | st.integers(0, 2**64 - 1),
    cut=st.integers(0, 60),
)
def test_nothing_but_checkpoint_error_escapes(tmp_path_factory, header, data, length, cut):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    content = raw(header, data, length)
    path.write_bytes(content[: len(content) - cut] if cut < 40 else content)
    try:
        read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
