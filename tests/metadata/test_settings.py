"""Pictures that remember: settings into PNGs and out again, minisd's own and those of other programs."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import minisd
import minisd.cli
from minisd.metadata.reading import a1111, comfyui, read_settings
from minisd.metadata.writing import fingerprint, signed
from minisd.pipeline import StableDiffusion
from minisd.schedulers.names import NAMES, a1111_name, named
from tests.command import Result
from tests.tasks.conftest import tiny_folder  # noqa: F401  # a fixture

A1111 = """a (red:1.2) heart, on blue <lora:style:0.8>
second line
Negative prompt: ugly, blurry
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 42, Size: 512x768, Model hash: abc, \
Model: v1-5, Clip skip: 2, Denoising strength: 0.6, Lora hashes: "style: 1, other: 2", Version: v1.10.1"""
CPP = """a cat
Steps: 12, CFG scale: 7.000000, Guidance: 3.5, Seed: 9, Size: 512x512, Model: x.safetensors, RNG: cuda, \
Sampler: euler_a, Version: stable-diffusion.cpp"""
COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 5, "steps": 9, "cfg": 4.5, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
            "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "ink.safetensors", "model": ["4", 0]}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 640, "height": 512, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "fog", "clip": ["4", 1]}},
}  # fmt: skip


def test_a1111():
    found = a1111(A1111)
    assert found.program == "AUTOMATIC1111 v1.10.1"
    assert found.settings == {
        "prompt": "a (red:1.2) heart, on blue \nsecond line",
        "negative_prompt": "ugly, blurry",
        "steps": 20, "guidance_scale": 6.5, "seed": 42, "width": 512, "height": 768, "clip_skip": 1, "model": "v1-5",
        "scheduler": "dpm++_2m_karras",
    }  # fmt: skip
    lost = "\n".join(found.lost)
    assert all(words in lost for words in ("<lora:style:0.8>", "RNG", "Denoising strength: 0.6"))
    assert len(found.lost) == 3


def test_stable_diffusion_cpp():
    found = a1111(CPP)
    assert found.program == "stable-diffusion.cpp" and found.settings["scheduler"] == "euler_a"
    assert found.settings["guidance_scale"] == 7 and found.settings["model"] == "x.safetensors"
    assert any("generator" in line for line in found.lost) and "Guidance: 3.5" in found.lost


def test_comfyui():
    found = comfyui(COMFY)
    assert found.settings == {
        "prompt": "a fox", "negative_prompt": "fog", "steps": 9, "guidance_scale": 4.5, "seed": 5, "width": 640,
        "height": 512, "model": "v1-5.safetensors", "scheduler": "dpm++_2m_karras",
    }  # fmt: skip
    assert found.lost == ["LoRA ink.safetensors: --lora PATH"]


def test_every_name_of_another_program_is_read():
    """The table of names, in both directions."""
    for name, row in NAMES.items():
        for other in filter(None, (row.a1111, row.comfyui, row.kind if not row.arguments else "")):
            assert named(other) == named(name), other
        if row.a1111:
            found = a1111(f"x\nSteps: 3, Sampler: {a1111_name(name)}, Version: v1")
            assert found.settings["scheduler"] == name
    assert a1111_name("dpmpp_2m_karras") == "DPM++ 2M Karras" and a1111_name("ddpm") == "DDPM"
    lost = a1111("x\nSteps: 3, Sampler: DPM adaptive, Version: v1").lost
    assert "sampler DPM adaptive: minisd has none of that name; ddim in its place" in lost


def test_the_librarys_picture_remembers(tiny_folder, tmp_path):  # noqa: F811
    sd = StableDiffusion.load(tiny_folder)
    (picture,) = sd.text_to_image("a, 猫", steps=2, seed=7, negative_prompt="red", scheduler="euler_a")
    picture.save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").text["parameters"].startswith("a, 猫\nNegative prompt: red\nSteps: 2, ")
    found = read_settings(tmp_path / "x.png")
    assert found.program == f"minisd {minisd.__version__}" and found.settings["model"] == str(tiny_folder)
    assert found.record["model_hash"] == fingerprint(sd) and found.record["missing"] == []
    assert found.record["options"]["seed"] == 7 and found.record["options"]["scheduler"] == "euler_a"
    (drawn,) = sd.text_to_image("cat", steps=2)
    assert json.loads(drawn.info["minisd"])["missing"] == ["seed"]
    for ending in ("jpg", "webp", "bmp"):  # which hold no such texts
        picture.save(tmp_path / f"x.{ending}")
    assert picture == Image.open(tmp_path / "x.png").convert("RGB") and picture != drawn


def test_a_fingerprint_is_the_weights():
    sd, other = (minisd.StableDiffusion.load() for _ in range(2))
    before = fingerprint(sd)
    assert before == fingerprint(other) and len(before) == 16
    with torch.no_grad():
        sd.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert fingerprint(sd) != before == fingerprint(other)


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Run a command of minisd in an empty folder; TINY stands for the tiny model."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["minisd", *(str(tiny_folder) if one == "TINY" else one for one in arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            minisd.cli.main()
        return Result(caught.value.code, *capsys.readouterr())

    return run


GENERATE = ("generate", "cat", "-m", "TINY", "--steps", "2", "-s", "5", "-o", "x.png")


@pytest.mark.parametrize("options", ([], ["--images", "3"], ["--images", "3", "--batch", "2", "--scheduler", "ddpm"]))
def test_replay_is_equal_to_the_bit(run, options):
    written = run(*GENERATE, *options).written
    for name in ["x-3.png", "x.png"] if options else [written.name]:
        done = run("replay", name)
        assert (done.status, done.stdout) == (0, f"equal to the bit\n{name[:-4]}-replayed.png\n"), done.stderr
        assert Image.open(name).text["parameters"] == Image.open(f"{name[:-4]}-replayed.png").text["parameters"]


def test_replay_of_a_task_and_of_python(run, tiny_folder):  # noqa: F811
    Image.new("RGB", (64, 64), "red").save("red.png")
    run("img2img", "cat", "red.png", "-m", "TINY", "--steps", "4", "-s", "1", "-o", "y.png")
    assert run("replay", "y.png").status == 0
    Image.new("RGB", (64, 64), "blue").save("red.png")
    assert "red.png: the picture was made from this file, which has changed since" in run("replay", "y.png").stderr
    sd = StableDiffusion.load(tiny_folder)
    sd.text_to_image(["cat", "dog"], seed=3, steps=2, images_per_prompt=2)[2].save("z.png")
    assert run("replay", "z.png").stdout == "equal to the bit\nz-replayed.png\n"
    sd.text_to_image("cat", steps=2)[0].save("z.png")
    assert "whose seed no file can hold" in run("replay", "z.png").stderr


def test_a_picture_that_was_changed_is_not_equal(run):
    run(*GENERATE)
    changed = Image.open("x.png")
    changed.putpixel((0, 0), (1, 2, 3))
    signed(changed.convert("RGB"), changed.text["parameters"], json.loads(changed.text["minisd"])).save("x.png")
    done = run("replay", "x.png", "--json")
    assert done.status == 1 and json.loads(done.stdout)["equal"] is False


def test_a_picture_of_another_program(run):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", A1111.replace("512x768", "64x64"))
    Image.new("RGB", (64, 64)).save("a.png", pnginfo=info)
    shown = run("show", "a.png").stdout
    assert "made with: AUTOMATIC1111 v1.10.1\n" in shown
    assert "not honoured by minisd: Denoising strength: 0.6\n" in shown
    assert "with a model 'v1-5': name the file with --model" in run("replay", "a.png").stderr
    done = run("replay", "a.png", "--model", "TINY")
    assert done.status == 0 and "not honoured: " in done.stdout and "not equal: " in done.stdout
    found = read_settings("a-replayed.png")
    assert found.record["call"] == "guide" and found.settings["weighted"] and found.settings["seed"] == 42


@pytest.mark.parametrize(
    ("change", "words"),
    (
        ({"call": "convert"}, "which this version does not have"),
        ({"call": 3}, "settings that cannot be read"),
        ({"options": {"prompt": "x", "shell": "y"}}, "was made with .*shell"),
        ({"options": {"prompt": "x", "steps": "many"}}, "not a valid integer"),
        ({"call": "text_to_image", "load": {"path": "x"}}, "was made with .*path"),
        ({"files": {"gone.png": "0"}}, "gone.png: the picture was made from this file, which is not there"),
    ),
)
def test_records_that_lie(run, change, words):
    """What stands in a picture is a stranger's word: only commands that make pictures run, with options they have."""
    run(*GENERATE)
    record = json.loads(Image.open("x.png").text["minisd"])
    signed(Image.new("RGB", (8, 8)), "x", {**record, **change}).save("x.png")
    done = run("replay", "x.png")
    assert done.status == 2 and re.search(words, done.stderr) and "Traceback" not in done.stderr, done.stderr
    assert not Path("x-replayed.png").exists()


def test_bad_input(run):
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("text.png").write_text("no picture")
    for name, words in (("plain", "has no settings in it"), ("text", "is not a picture"), ("gone", "no such file")):
        for command in ("show", "replay"):
            done = run(command, f"{name}.png")
            assert (done.status, done.stdout) == (2, "") and words in done.stderr and done.stderr.count("\n") == 1


LEAF = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["KSampler", "3"])
JSON = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(["parameters", "prompt", "minisd"]), value=JSON | st.text(), raw=st.booleans())
def test_any_text_is_settings_or_one_line(tmp_path, name, value, raw):
    info = PngImagePlugin.PngInfo()
    info.add_itxt(name, str(value).encode("utf-8", "replace").decode() if raw else json.dumps(value))
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png", pnginfo=info)
    try:
        read_settings(tmp_path / "x.png")
    except ValueError as error:
        assert "\n" not in str(error)
