"""The door for pickles: tensors come through, code does not."""

import collections
import os
import pickle
import random
import struct
import sys
import types
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisd import CheckpointError, StableDiffusion
from minisd.config import SD15
from minisd.lab.weights.convert import convert
from minisd.lab.weights.pickles import unpickle
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import CLIPTokenizer
from tests.unit.tiny import TEXT, compvis_tensors, config_like, equal, tiny_model


@pytest.fixture(scope="module")
def model():
    """With CLIP's own vocabulary: a pickle cannot bring another one along."""
    sd = tiny_model()
    words = CLIPTokenizer.clip()
    text = TextEncoder(config_like(TEXT, vocabulary=len(words.vocabulary))).eval()
    return StableDiffusion(text, sd.unet, sd.vae, words, scheduler=SD15.scheduler)


@pytest.fixture(scope="module")
def tensors(model, tmp_path_factory):
    return compvis_tensors(model, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def trainer():
    """A class of a library that is not installed where the checkpoint is opened."""
    module = types.ModuleType("some_trainer")

    class ModelCheckpoint:
        def __init__(self):
            self.best = 0.5

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = "some_trainer", "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    sys.modules["some_trainer"] = module
    yield ModelCheckpoint
    sys.modules.pop("some_trainer", None)


@pytest.mark.parametrize("depth", (0, 1, 2))
def test_a_checkpoint_loads_after_conversion(model, tensors, tmp_path, depth):
    """Bare, or wrapped in `state_dict` once or twice."""
    wrapped = collections.OrderedDict(tensors)
    for _ in range(depth):
        wrapped = {"state_dict": wrapped, "global_step": 7, "epoch": 1}
    torch.save(wrapped, tmp_path / "model.ckpt")
    convert(tmp_path / "model.ckpt", tmp_path / "model.safetensors", from_pickle=True)
    assert equal(StableDiffusion.load(tmp_path / "model.safetensors"), model)
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt", "model.safetensors"}


def test_what_a_trainer_left_is_not_needed(model, tensors, tmp_path, trainer):
    state = {"state_dict": tensors, "callbacks": {trainer: trainer(), "x": [trainer()]}}
    torch.save(state, tmp_path / "model.ckpt")
    del sys.modules["some_trainer"]
    convert(tmp_path / "model.ckpt", tmp_path / "folder", from_pickle=True)
    assert equal(StableDiffusion.load(tmp_path / "folder"), model)
    assert "some_trainer" not in sys.modules


def test_a_tokenizer_beside_a_pickle(model, tensors, tmp_path):
    """A pickle holds no tokenizer, and the tiny model's is not CLIP's."""
    model.save(tmp_path / "folder")
    torch.save(tensors, tmp_path / "model.ckpt")
    source, target = tmp_path / "model.ckpt", tmp_path / "model.safetensors"
    convert(source, target, from_pickle=True, tokenizer=tmp_path / "folder" / "tokenizer")
    assert StableDiffusion.load(target).tokenizer.vocabulary == model.tokenizer.vocabulary


class Evil:
    """Runs a command when it is opened the ordinary way."""

    def __init__(self, command, function=os.system):
        self.command, self.function = command, function

    def __reduce__(self):
        return self.function, (self.command,)


@pytest.mark.parametrize("function", (os.system, exec, eval), ids=lambda f: f.__name__)
@pytest.mark.parametrize("zipped", (True, False))
def test_nothing_is_executed(tmp_path, function, zipped):
    """An attack is refused or swallowed; in no case does it happen."""
    mark = tmp_path / "was-here"
    command = f"touch {mark}" if function is os.system else f"__import__('pathlib').Path({str(mark)!r}).touch()"
    state = {"state_dict": {"a": torch.zeros(2)}, "callbacks": Evil(command, function)}
    torch.save(state, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped)
    try:
        unpickle(tmp_path / "evil.ckpt", tmp_path / "out.safetensors")
    except CheckpointError as error:
        assert "evil.ckpt" in str(error)
    assert not mark.exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)  # the test would notice: here it does happen
    assert mark.exists()


@pytest.mark.parametrize("what", ("empty", "noise", "list", "zip", "bare"))
def test_what_is_no_checkpoint(tmp_path, what):
    path = tmp_path / "x.ckpt"
    if what == "list":
        torch.save([1, 2, 3], path)
    elif what == "bare":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif what == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("hello.txt", "hello")
    else:
        path.write_bytes(b"" if what == "empty" else bytes(range(256)))
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        unpickle(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# ------------------------------------------------ under a wrong name


@pytest.mark.parametrize("zipped", (True, False))
def test_a_pickle_that_is_called_safetensors(model, tensors, tmp_path, zipped):
    """Its content decides: the way out that the refusal names is one."""
    path = tmp_path / "model.safetensors"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="minisd convert --from-pickle"):
        StableDiffusion.load(path)
    convert(path, tmp_path / "real.safetensors", from_pickle=True)
    assert equal(StableDiffusion.load(tmp_path / "real.safetensors"), model)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "real.safetensors"}


@pytest.mark.parametrize("name", ("a.ckpt", "a.safetensors"))
def test_safetensors_that_are_called_a_pickle(tmp_path, name):
    save_file({"a": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="is no pickle, but safetensors already"):
        unpickle(tmp_path / name, tmp_path / "out.safetensors")


# ------------------------------------------------ broken ones


@pytest.mark.parametrize("zipped", (True, False))
def test_every_broken_pickle_is_refused_or_read(tmp_path, zipped):
    """Bytes changed, and ends cut off: torch raises a dozen kinds of exceptions, and all become one kind."""
    path, chance = tmp_path / "x.ckpt", random.Random(0)
    torch.save({"a": torch.zeros(2), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), 0
    for _ in range(400):
        data = bytearray(whole[: chance.choice((len(whole), chance.randrange(len(whole))))])
        for _ in range(chance.choice((1, 2, 4)) if data else 0):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            unpickle(path, tmp_path / "out.safetensors")
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and "weights_only" not in str(error) and len(str(error).splitlines()) == 1
    assert 200 < refused < 400


def test_a_zip_of_several_disks(tmp_path):
    """So says a zip64's end, behind which is its true end; `zipfile.is_zipfile` raises BadZipFile (Python 3.11)."""
    data = struct.pack("<4sLQL", b"PK\x06\x07", 9, 0, 9) + struct.pack("<4s4H2LH", b"PK\x05\x06", *[0] * 7)
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.ckpt: is damaged"):
        unpickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors")


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


UNFIT = {
    "meta": (lambda: torch.zeros(2, device="meta"), "on the device 'meta'"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "is sparse"),
    "quantised": (quantised, r"is quantised \(torch\.qint8\)"),
    "complex": (lambda: torch.zeros(2, dtype=torch.complex64), "dtype torch.complex64"),
    "a bomb": (lambda: torch.zeros(1).expand(400_000_000), "claims 400,000,000 values"),
    "a small bomb": (lambda: torch.zeros(5).expand(2, 5), "claims 10 values"),
    "an overlapping bomb": (lambda: torch.zeros(2000).as_strided((1000, 1000), (1, 1)), "claims 1,000,000 values"),
}


@pytest.mark.parametrize("zipped", (True, False))
@pytest.mark.parametrize("what", UNFIT)
def test_tensors_that_cannot_be_stored(tmp_path, what, zipped):
    """Each is named, without a warning, and nothing is written."""
    make, message = UNFIT[what]
    torch.save({"fine": torch.zeros(2), "a": make()}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=rf"x\.ckpt: the tensor 'a' cannot be stored .*{message}"):
            unpickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_nested_tensors(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"the tensor .a. cannot be stored .*it is nested"):
        unpickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors")


def test_many_names_for_one_tensor_are_a_bomb_too(tmp_path):
    """Two are not: tied weights."""
    one = torch.zeros(100_000)
    for names in (2, 20):
        torch.save({str(n): one for n in range(names)}, tmp_path / "x.ckpt")
        if names == 2:
            assert len(load_file(unpickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors"))) == 2
            continue
        with pytest.raises(CheckpointError, match="more than 10 times the room"):
            unpickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", (7, "\ud800", "__metadata__"))
def test_names_that_are_none(tmp_path, name):
    torch.save({name: torch.zeros(2)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt: the tensor .*: this is no name"):
        unpickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors")


def test_views_are_stored_as_what_they_show(tmp_path):
    """Transposed, cut, and with the sign that torch keeps beside the values."""
    matrix = torch.arange(6.0).reshape(2, 3)
    views = {"t": matrix.T, "row": matrix[1], "minus": torch.tensor([1 + 2j]).conj().imag}
    torch.save(views, tmp_path / "x.ckpt")
    found = load_file(unpickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors"))
    assert found["t"].tolist() == [[0, 3], [1, 4], [2, 5]] and found["row"].tolist() == [3, 4, 5]
    assert found["minus"].tolist() == [-2]


@pytest.mark.parametrize("zipped", (True, False))
def test_the_refusal_is_short_and_names_what_is_asked_for(tmp_path, zipped):
    """And does not recommend to run it."""
    torch.save({"a": Evil("true")}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        unpickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors")
    said = "cannot be read without running what is in it (it asks for posix.system)"
    assert str(caught.value) == f"{tmp_path / 'x.ckpt'}: {said}"


@pytest.mark.parametrize("zipped", (True, False))
def test_newer_protocols_are_refused_without_a_warning(tmp_path, zipped):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.ckpt", pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=r"x\.ckpt: is damaged, or no pickle that") as caught:
            unpickle(tmp_path / "x.ckpt", tmp_path / "out.safetensors")
    assert "weights_only" not in str(caught.value)


def test_no_other_door(tensors, tmp_path):
    torch.save(tensors, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="pickle"):
        convert(tmp_path / "model.ckpt", tmp_path / "out")
