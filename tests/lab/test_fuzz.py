"""A sound model with something changed in it: it loads, or CheckpointError says why not. Nothing else ever escapes."""

import json
import os
import shutil
import struct
import time
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minisd.checkpoint
from minisd import CheckpointError, StableDiffusion
from minisd.lab.weights.inspect import inspect
from minisd.lab.zoo import smallest_model

NUMBERS = st.integers(-2, 12) | st.integers() | st.floats() | st.sampled_from([10**13, 2**63, 10**400, 0.5])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)
# A hundred examples each take five minutes and were run once; a dozen each time keep watch.
FEW = settings(
    max_examples=int(os.environ.get("FUZZ", "12")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "model_index.json",
)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    smallest_model().save(path, layout="compvis")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model"
    smallest_model().save(path)
    return path


def only_checkpoint_errors(path):
    """Try every way in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attempt in (inspect, minisd.checkpoint.open, StableDiffusion.load):
            try:
                attempt(path)
            except CheckpointError as error:
                assert path.name in str(error) and len(str(error).splitlines()) <= 25


def with_header(single, path, change):
    """The file with another header, its values as they were."""
    data = single.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


@FEW
@given(
    st.integers(0, 10**6),
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    st.sampled_from(["F16", "I32", "F8_E4M3", "U8", [4], [4, 4], [16], [1, 4, 4, 1], [0], []]) | JSON,
)
def test_an_entry_changed(single, tmp_path, number, field, value):
    def change(header):
        names = sorted(header.keys() - {"__metadata__"})
        header[names[number % len(names)]][field] = value

    only_checkpoint_errors(with_header(single, tmp_path / "m.safetensors", change))


@FEW
@given(st.integers(0, 10**6), st.none() | st.text(max_size=8) | st.sampled_from(["a.b.weight", "lora_unet_x.alpha"]))
def test_a_tensor_renamed_or_gone(single, tmp_path, number, name):
    """Gone means that its bytes are part of the tensor before it: the header has a hole."""

    def change(header):
        names = sorted(header.keys() - {"__metadata__"})
        entry = header.pop(names[number % len(names)])
        if name is not None:
            header[name] = entry

    only_checkpoint_errors(with_header(single, tmp_path / "m.safetensors", change))


@FEW
@given(st.sampled_from(["minisd.config", "minisd.tokenizer", "minisd.generation"]), JSON | st.text(), st.booleans())
def test_metadata_changed(single, tmp_path, name, value, inside):
    """The whole value, or one field inside."""

    def change(header):
        stored = json.loads(header["__metadata__"].get(name, "{}"))
        if inside and stored:
            stored[sorted(stored)[0]] = value
            value_or_text = json.dumps(stored)
        else:
            value_or_text = value if isinstance(value, str) else json.dumps(value)
        header["__metadata__"][name] = value_or_text

    only_checkpoint_errors(with_header(single, tmp_path / "m.safetensors", change))


@FEW
@given(st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 3))
def test_bytes_changed(single, tmp_path, flips, cut):
    data = bytearray(single.read_bytes())
    for place, byte in flips:
        data[place % len(data)] = byte
    path = tmp_path / "m.safetensors"
    path.write_bytes(data[: len(data) - cut])
    only_checkpoint_errors(path)


@FEW
@given(st.sampled_from(CONFIGS), st.integers(0, 10**6), JSON, st.booleans())
def test_a_field_of_a_configuration_changed(folder, tmp_path, file, number, value, whole):
    shutil.copytree(folder, tmp_path / "model", copy_function=os.link, dirs_exist_ok=False)
    path = tmp_path / "model" / file
    stored = json.loads(path.read_text()) if path.is_file() else {}
    path.unlink(missing_ok=True)
    if stored and not whole:
        stored[sorted(stored)[number % len(stored)]] = value
    path.write_text(json.dumps(value if whole else stored))
    try:
        only_checkpoint_errors(tmp_path / "model")
    finally:
        shutil.rmtree(tmp_path / "model")


# ------------------------------------------------ names and numbers of absurd size

LONG = "a" * 1_000_000
ABSURD = {
    "resnets": ("unet", {"layers_per_block": 1_000_000}),
    "levels": ("vae", {"block_out_channels": [4] * 10_000, "down_block_types": ["DownEncoderBlock2D"] * 10_000,
                       "up_block_types": ["UpDecoderBlock2D"] * 10_000}),
    "layers": ("text_encoder", {"num_hidden_layers": 1_000_000}),
    "a field": ("unet", {LONG: 1}),
    "a block": ("unet", {"down_block_types": [LONG]}),
}  # fmt: skip


def told_at_once(path):
    """Every way in answers within a second or two, in short lines without control characters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for attempt in (inspect, minisd.checkpoint.open, StableDiffusion.load):
            began = time.monotonic()
            try:
                attempt(path)
            except CheckpointError as error:
                assert all(len(line) < 1000 and line.isprintable() for line in str(error).splitlines())
            assert time.monotonic() - began < 2
    assert all(len(str(one.message)) < 1000 for one in caught)


@pytest.mark.parametrize(
    "name", (LONG, "model.diffusion_model." + "input_blocks.0.0." * 60_000, "\x1b[31m\nred"), ids=len
)
def test_names_of_tensors(single, tmp_path, name):
    def rename(header):
        header[name] = header.pop("model.diffusion_model.out.2.bias")

    told_at_once(with_header(single, tmp_path / "x.safetensors", rename))


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_configurations(single, folder, tmp_path, case):
    component, changes = ABSURD[case]
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    path = model / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    told_at_once(model)

    def change(header):
        config = json.loads(header["__metadata__"]["minisd.config"])
        config[component] |= changes
        header["__metadata__"]["minisd.config"] = json.dumps(config)

    told_at_once(with_header(single, tmp_path / "x.safetensors", change))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("file", (*CONFIGS[:-1], "tokenizer/merges.txt", "unet/diffusion_pytorch_model.safetensors"))
def test_a_named_pipe_is_refused_and_does_not_block(folder, tmp_path, file):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / file).unlink()
    os.mkfifo(model / file)
    with pytest.raises(CheckpointError, match="not a regular file") as caught:
        StableDiffusion.load(model)
    assert len(str(caught.value).splitlines()) == 1
