"""The command line: --lora, --embedding and `minisd lora extract`, run as people run them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minisd.cli
import minisd.cli.output
from minisd.adapters.lora import open_lora
from tests.adapters.makers import everything, lora, write
from tests.command import Result
from tests.unit.tiny import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("place")
    sd = tiny_model()
    sd.save(place / "tiny")
    write(place / "style.safetensors", lora(sd.config, pick=everything, spread=0.1))
    write(place / "wide.safetensors", lora(sd.config) | {"lora_unet_nowhere.lora_up.weight": torch.zeros(1, 1)})
    write(place / "zork.safetensors", {"emb_params": torch.randn(2, 64, generator=torch.Generator().manual_seed(0))})
    broken = {name: tensor * float("nan") for name, tensor in lora(sd.config).items() if "lora_down" in name}
    write(place / "nan.safetensors", lora(sd.config) | broken)
    write(place / "sd2.safetensors", {"emb_params": torch.zeros(1, 1024)})
    sd.load_lora(place / "style.safetensors")
    sd.save(place / "tuned")
    return place


@pytest.fixture
def run(place, tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["minisd", *arguments])
        with pytest.raises(SystemExit) as ended:
            minisd.cli.main()
        out, err = capsys.readouterr()
        return Result(ended.value.code, out, err)

    return run


def generate(run, place, *arguments: str, prompt: str = "a red cat") -> tuple[Result, np.ndarray]:
    common = ("-m", str(place / "tiny"), "--steps", "2", "-s", "1", "-q", "-o", "out.png")
    result = run("generate", prompt, *common, *arguments)
    assert result.status == 0, result.stderr
    return result, np.asarray(Image.open("out.png"))


def test_lora(run, place):
    style = str(place / "style.safetensors")
    plain = generate(run, place)[1]
    result, _ = generate(run, place, "--lora", style, "--json")
    assert json.loads(result.stdout)["lora"] == style
    strong = generate(run, place, "--lora", f"{style}:50")[1]  # so small a model is hardly moved by less
    sd = minisd.StableDiffusion.load(place / "tiny")
    sd.load_lora(style, 0.5)
    (expected,) = sd.text_to_image("a red cat", steps=2, generator=[torch.Generator().manual_seed(1)])
    half = generate(run, place, "--lora", f"{style}:0.5")[1]
    assert np.array_equal(half, np.asarray(expected))
    assert not np.array_equal(strong, plain)
    assert f'Lora: "{style}:0.5"' in Image.open("out.png").text["parameters"]
    assert np.array_equal(generate(run, place, "--lora", f"{style}:0")[1], plain)
    twice = generate(run, place, "--lora", f"{style}:0.5", "--lora", f"{style}:-0.5")[1].astype(int)
    assert np.abs(twice - plain).max() <= 1  # the two cancel, but for rounding


def test_embedding(run, place):
    """A word has the same vectors under any name. (What they do to a picture is less than a byte in so small a model:
    see test_embeddings.py for the context.)
    """
    path = str(place / "zork.safetensors")
    result, learnt = generate(run, place, "--embedding", path, prompt="a zork cat")
    assert "zork.safetensors: in prompts as zork" in result.stderr
    renamed, picture = generate(run, place, "--embedding", f"{path}:<x>", prompt="a <x> cat")
    assert "in prompts as <x>" in renamed.stderr and np.array_equal(picture, learnt)


def test_other_commands_take_them_too(run, place):
    Image.new("RGB", (64, 64), "red").save("in.png")
    style, zork = str(place / "style.safetensors"), str(place / "zork.safetensors")
    common = ("-m", str(place / "tiny"), "--steps", "2", "-q", "--lora", style, "--embedding", zork, "--json")
    for command in (["img2img", "zork", "in.png"], ["guide", "zork"], ["invert", "zork", "in.png"]):
        result = run(*command, *common, "-o", "out.png")
        assert result.status == 0, result.stderr
        told = json.loads(result.stdout)
        assert (told["lora"], told["embedding"]) == (style, zork)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lora", "wide.safetensors", "does not fit this model; 1 of 137 layers not in the model: lora_unet_nowhere"),
        ("--lora", "zork.safetensors:0.5", "is a textual inversion embedding, not a LoRA"),
        ("--lora", "style.safetensors:nan", "scale=nan: must be a finite number"),
        ("--lora", "style.safetensors:much", "no such file"),
        ("--lora", "tiny", "is a folder"),
        ("--embedding", "sd2.safetensors", "it is for SD 2.x"),
        ("--embedding", "style.safetensors", "an embedding was expected"),
        ("--lora", "nan.safetensors", "lora_down.weight holds NaN or infinite numbers"),
        ("--embedding", "zork.safetensors:<|endoftext|>", "is in the vocabulary already"),
        ("--embedding", "zork.safetensors:", "token='': a word cannot be empty; choose a name"),
        ("--embedding", "zork.safetensors:a cat", "token='a cat': a word cannot have spaces"),
        ("--embedding", "nowhere.safetensors", "no such file"),
    ],
)
def test_what_is_wrong_takes_one_line(run, place, option, value, message):
    result = run("generate", "x", "-m", str(place / "tiny"), "-o", "out.png", option, str(place / value))
    assert result.status == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert list(Path().iterdir()) == []


def test_extract(run, place):
    result = run("lora", "extract", str(place / "tiny"), str(place / "tuned"), "--rank", "4", "-q")
    assert result.written == Path("tuned-rank4.safetensors")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("UNet: 280 layers, 100.00% of the squared difference kept")
    assert lines[1].startswith("text encoder: 12 layers")
    assert len(open_lora(result.written, tiny_model().config).changes) == 292
    command = ("lora", "extract", str(place / "tiny"), str(place / "tuned"), "--rank", "1", "-q")
    told = json.loads(run(*command, "-o", "e.safetensors", "--dtype", "float32", "--json").stdout)
    assert told["path"] == "e.safetensors" and 0.2 < told["components"]["unet"]["energy"] < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", "tiny"), "do not differ"),
        (("tiny", "nowhere"), "no such file"),
        (("tiny", "tuned", "-o", "e.pt"), "must end in .safetensors"),
        (("tiny", "tuned", "--rank", "0"), "0 is not in the range"),
        (("tiny", "style.safetensors"), "LoRA"),
    ],
)
def test_extract_says_what_is_wrong(run, place, arguments, message):
    paths = [str(place / argument) if index < 2 else argument for index, argument in enumerate(arguments)]
    result = run("lora", "extract", *paths, "-q")
    assert result.status == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert list(Path().iterdir()) == []
