"""The door for pickles: tensors come through, code does not."""

import collections
import os
import pickle
import sys
import types
import zipfile

import pytest
import torch

from minisd import CheckpointError, StableDiffusion
from minisd.config import SD15
from minisd.lab.converting import convert
from minisd.lab.pickles import unpickle
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


def test_no_other_door(tensors, tmp_path):
    torch.save(tensors, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="pickle"):
        convert(tmp_path / "model.ckpt", tmp_path / "out")
