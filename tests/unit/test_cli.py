"""The command `minisd`, run as people run it: what it writes, what it says and where, and how it refuses."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import minisd
import minisd.cli
import minisd.cli.output
from minisd.metadata.writing import quoted
from minisd.pipeline import StableDiffusion
from tests.command import Result
from tests.unit.tiny import compvis_tensors, tiny_model

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of things that may be given as --model: good ones, odd ones, and ones that are none."""
    place = tmp_path_factory.mktemp("models")
    sd = tiny_model()
    sd.save(place / "tiny")
    sd.generation = {"steps": 3, "guidance_scale": 2.5}
    sd.save(place / "advised")
    tensors = compvis_tensors(sd, place)  # writes tiny.safetensors
    whole = (place / "tiny.safetensors").read_bytes()
    (place / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (place / "text.safetensors").write_text("not weights at all, just a long enough line of text\n")
    (place / "empty.safetensors").touch()
    (place / "pickle.safetensors").write_bytes(pickle.dumps({"state_dict": {}}))
    (place / "model.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    (place / "folder").mkdir()
    sdxl = {"conditioner.embedders.0.transformer.x": torch.zeros(1), "model.diffusion_model.x": torch.zeros(1)}
    save_file(sdxl, place / "sdxl.safetensors")
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith("first_stage_model.")}
    save_file(vae, place / "vae.safetensors")
    holes = {name: tensor for name, tensor in tensors.items() if ".output_blocks." not in name}
    save_file(holes, place / "holes.safetensors", metadata={"format": "pt"})
    return place


@pytest.fixture
def minisd_(models, tmp_path, monkeypatch, capsys):
    """Run the command in this process, in an empty folder. A model and two steps are given unless they are."""
    output = tmp_path / "output"
    output.mkdir()
    monkeypatch.chdir(output)

    def run(*arguments: str, model: str | None = "tiny", steps: str | None = "2") -> Result:
        command = ["minisd", *arguments]
        if model is not None and arguments[:1] == ("generate",):
            command += ["--model", str(models / model)]
        if steps is not None and arguments[:1] == ("generate",):
            command += ["--steps", steps]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            minisd.cli.main()
        return Result(caught.value.code, *capsys.readouterr())

    return run


def process(*command: str, cwd: Path, **environment: str) -> Result:
    """Run a command as a process of its own."""
    here = {"PYTHONPATH": str(Path(minisd.__file__).parents[1])}
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | here | environment, capture_output=True, text=True, timeout=120
    )
    return Result(result.returncode, result.stdout, result.stderr)


CONSOLE_SCRIPT = (
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = '/usr/bin/minisd'\nfrom minisd.cli import main\nsys.exit(main())",
)
MODULE = (sys.executable, "-m", "minisd")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def parameters(path: Path) -> str:
    with Image.open(path) as picture:
        return picture.text["parameters"]


# ------------------------------------------------ pictures


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(minisd_, monkeypatch, given, expected):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    minisd_("--version", model=None, steps=None)
    assert os.environ["OMP_WAIT_POLICY"] == expected


def test_a_picture(minisd_):
    result = minisd_("generate", "red heart", "--seed", "7")
    assert result.written == Path("red-heart-7.png") and result.stdout == "red-heart-7.png\n"
    assert size(result.written) == (64, 64) and result.stderr == ""
    assert os.listdir() == ["red-heart-7.png"]


def test_the_picture_is_the_librarys(minisd_, models):
    result = minisd_("generate", "cat", "-s", "7", "-n", "red", "-g", "3", "--eta", "0.5", "--clip-skip", "1")
    settings = {"negative_prompt": "red", "guidance_scale": 3.0, "eta": 0.5, "clip_skip": 1}
    (picture,) = StableDiffusion.load(models / "tiny").text_to_image("cat", steps=2, seed=7, **settings)
    assert np.array_equal(pixels(result.written), np.asarray(picture))


def test_a_seed_is_a_picture(minisd_):
    one, again, other = (minisd_("generate", "cat", "-s", s, "-o", f"{o}.png").written for s, o in ("1a", "1b", "2c"))
    assert one.read_bytes() == again.read_bytes()
    assert not np.array_equal(pixels(one), pixels(other))


def test_a_drawn_seed_is_printed_and_stored(minisd_):
    result = minisd_("generate", "cat")
    seed = re.fullmatch(r"seed (\d+)\n", result.stderr).group(1)
    assert f"Seed: {seed}," in parameters(result.written) and result.written.name == f"cat-{seed}.png"
    again = minisd_("generate", "cat", "--seed", seed, "-o", "again.png")
    assert again.written.read_bytes() == result.written.read_bytes() and again.stderr == ""
    assert minisd_("generate", "cat").stderr != result.stderr


def test_several_images(minisd_):
    """Each has a seed of its own, seed + n, and is what that seed generates alone. Libraries sum in another order for
    another batch size, so a pixel between two bytes may fall on either side: one step of 255 is allowed."""
    result = minisd_("generate", "cat", "--seed", "5", "--images", "3", "-o", "x.png")
    assert result.stdout.splitlines() == ["x-1.png", "x-2.png", "x-3.png", "x.png"]
    singles = [pixels(Path(f"x-{number}.png")) for number in (1, 2, 3)]
    for number, single in enumerate(singles):
        alone = minisd_("generate", "cat", "--seed", str(5 + number), "-o", "alone.png").written
        assert abs(single - pixels(alone)).max() <= 1
        assert parameters(Path(f"x-{number + 1}.png")) == parameters(alone)
    grid = pixels(result.written)
    assert grid.shape == (128, 128, 3)
    corners = grid[:64, :64], grid[:64, 64:], grid[64:, :64]
    assert all(np.array_equal(corner, single) for corner, single in zip(corners, singles, strict=True))
    assert (grid[64:, 64:] == 0).all()


def test_parameters(minisd_):
    """The form that other programs read: prompt, negative prompt, then one line of settings."""
    options = ["-s", "3", "-n", "ugly, blurry", "-g", "6.5", "--guidance-rescale", "0.7", "--clip-skip", "1"]
    text = parameters(minisd_("generate", "a cat", *options, "--eta", "0.25", "--size", "72x40").written)
    first, second, third = text.split("\n")
    assert (first, second) == ("a cat", "Negative prompt: ugly, blurry")
    # The pattern with which AUTOMATIC1111's web UI reads this line.
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', third))
    assert found.pop("Model").endswith("tiny")
    assert found == {
        "Steps": "2",
        "Sampler": "DDIM",
        "CFG scale": "6.5",
        "CFG rescale": "0.7",
        "Eta": "0.25",
        "Clip skip": "2",
        "Seed": "3",
        "Size": "72x40",
        "Version": f"minisd {minisd.__version__}",
    }


@pytest.mark.parametrize("prompt", ("猫と naïve 😀", "two\nlines", "", "Ünï", "x" * 3000), ids=lambda text: text[:9])
def test_prompts_of_all_kinds(minisd_, prompt):
    path = minisd_("generate", prompt, "-s", "1", "-n", f"not {prompt}").written
    assert parameters(path).startswith(f"{prompt}\nNegative prompt: not {prompt}\nSteps: 2, ")
    assert re.fullmatch(r"[a-z0-9-]{1,40}-1\.png", path.name)
    kinds = {"猫と naïve 😀": b"iTXt", "two\nlines": b"tEXt"}  # Latin-1 alone is what tEXt may hold
    assert kinds.get(prompt, b"arameters") in path.read_bytes()


def test_a_model_name_with_separators_is_quoted():
    assert quoted("models/v1.5 (final)") == "models/v1.5 (final)"
    for name in ("a, b", "C:\\models", "two\nlines", "a\udcff"):
        assert json.loads(quoted(name)) == name and quoted(name).isascii()


def test_recommended_settings(minisd_):
    text = parameters(minisd_("generate", "cat", "-s", "1", model="advised", steps=None).written)
    assert "Steps: 3," in text and "CFG scale: 2.5," in text
    text = parameters(minisd_("generate", "cat", "-s", "1", "-g", "9", model="advised", steps="1").written)
    assert "Steps: 1," in text and "CFG scale: 9," in text


@pytest.mark.parametrize(("option", "pair"), (("72x40", (72, 40)), ("40X72", (40, 72)), ("40", (40, 40))))
def test_sizes(minisd_, option, pair):
    path = minisd_("generate", "cat", "-s", "1", "--size", option).written
    assert size(path) == pair and f"Size: {pair[0]}x{pair[1]}," in parameters(path)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_half_precision(minisd_, dtype):
    exact, half = (minisd_("generate", "cat", "-s", "1", "--dtype", d, "-o", f"{d}.png") for d in ("float32", dtype))
    assert not np.array_equal(pixels(exact.written), pixels(half.written)) and half.stderr == ""


def test_ddpm(minisd_):
    ddim, ddpm = (minisd_("generate", "cat", "-s", "1", "--scheduler", s, "-o", f"{s}.png") for s in ("ddim", "ddpm"))
    assert "Sampler: DDPM," in parameters(ddpm.written)
    assert not np.array_equal(pixels(ddim.written), pixels(ddpm.written))


def test_a_single_file(minisd_):
    one, other = (minisd_("generate", "cat", "-s", "1", "-o", "x.png", model=m) for m in ("tiny", "tiny.safetensors"))
    assert np.array_equal(pixels(one.written), pixels(other.written)) and other.stderr == ""


def test_another_vae(minisd_, models):
    result = minisd_("generate", "cat", "-s", "1", "--vae", str(models / "vae.safetensors"))
    assert np.array_equal(pixels(result.written), pixels(minisd_("generate", "cat", "-s", "1", "-o", "y.png").written))


def test_pictures_of_the_steps(minisd_):
    result = minisd_("generate", "cat", "-s", "1", "--steps-dir", "steps", "--images", "2", "-o", "x.png", steps="3")
    names = sorted(path.name for path in Path("steps").iterdir())
    assert names == ["step-001-t667.png", "step-002-t334.png", "step-003-t001.png"]
    assert {size(Path("steps") / name) for name in names} == {size(result.written)}
    assert minisd_("generate", "cat", "-s", "1", "--steps-dir", "steps").status == 0  # a folder that is there will do


def test_batches(minisd_, monkeypatch):
    """One at a time, each image is the one that its seed makes alone; and the networks see one image at a time."""
    seen = []
    predict_noise = StableDiffusion.predict_noise
    monkeypatch.setattr(
        StableDiffusion, "predict_noise", lambda sd, x, *rest: seen.append(len(x)) or predict_noise(sd, x, *rest)
    )
    minisd_("generate", "cat", "-s", "4", "--images", "3", "--batch", "1", "-o", "x.png", "--steps-dir", "steps")
    assert set(seen) == {1} and len(list(Path("steps").iterdir())) == 3 * 2
    minisd_("generate", "cat", "-s", "5", "-o", "alone.png")
    assert np.array_equal(pixels(Path("x-2.png")), pixels(Path("alone.png")))
    seen.clear()
    minisd_("generate", "cat", "-s", "4", "--images", "3", "--batch", "2", "-o", "x.png")
    assert seen == [2, 2, 1, 1]


def test_words_that_the_model_never_saw(minisd_, models):
    (models / "tiny" / "words.txt").write_text("a red heart\non the left\ncat\n")
    try:
        assert minisd_("generate", "A (red:1.2) heart, on the left!", "-s", "1").stderr == ""
        said = minisd_("generate", "two cats ❤ on a moon", "-n", "fog", "-s", "1").stderr
        assert said.startswith("note: the small model has never seen 'two', 'cats' (near: cat), '❤', 'moon', 'fog';")
        assert said.count("\n") == 1
        assert minisd_("words", str(models / "tiny")).stdout == "a red heart\non the left\ncat\n"
    finally:
        (models / "tiny" / "words.txt").unlink()
    assert "has no words.txt" in minisd_("words", str(models / "tiny")).stderr
    assert minisd_("generate", "two cats", "-s", "1").stderr == ""


def test_json(minisd_):
    result = minisd_("generate", "猫", "--json", "--images", "2", "-o", "x.png", "-s", "4")
    told = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1 and result.stderr == ""
    assert told["images"] == ["x-1.png", "x-2.png"] and told["grid"] == "x.png"
    assert (told["prompt"], told["seed"], told["steps"], told["width"]) == ("猫", 4, 2, 64)
    drawn = minisd_("generate", "cat", "--json")
    assert json.loads(drawn.stdout)["seed"] == int(drawn.stderr.split()[1])
    assert json.loads(drawn.stdout)["grid"] is None


def test_the_picture_has_the_permissions_of_any_file(minisd_):
    Path("any").touch()
    assert minisd_("generate", "cat").written.stat().st_mode == Path("any").stat().st_mode


def test_an_old_picture_is_replaced(minisd_):
    Path("x.png").write_text("old")
    assert size(minisd_("generate", "cat", "-o", "x.png").written) == (64, 64)


def test_notes_are_for_people(minisd_, models, tmp_path):
    """What loading warns of is a line on standard error, and no Python warning."""
    import shutil

    shutil.copytree(models / "tiny", tmp_path / "odd")
    config = tmp_path / "odd" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"invented": 3}))
    result = minisd_("generate", "cat", "-s", "1", "--model", str(tmp_path / "odd"), model=None)
    assert result.written.exists() and re.fullmatch(r"note: .*invented\n", result.stderr)


class Terminal:
    """A standard error that says that it is a terminal."""

    def __init__(self, stream) -> None:
        self.stream = stream

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@pytest.mark.parametrize(("options", "bar"), (([], True), (["-q"], False)))
def test_quiet(minisd_, monkeypatch, capsys, options, bar):
    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr))
    result = minisd_("generate", "cat", "-s", "1", *options)
    assert ("step/s" in result.stderr or "2/2" in result.stderr or "/2 [" in result.stderr) == bar
    assert result.written.exists()


# ------------------------------------------------ as a process of its own


def test_module_and_console_script_are_the_same(models, tmp_path):
    arguments = ["generate", "cat", "-m", str(models / "tiny"), "--steps", "1", "-s", "1", "-q"]
    one = process(*MODULE, *arguments, "-o", "one.png", cwd=tmp_path)
    two = process(*CONSOLE_SCRIPT, *arguments, "-o", "two.png", cwd=tmp_path)
    assert (one.status, one.stdout, one.stderr) == (0, "one.png\n", "")
    assert (two.status, two.stdout, two.stderr) == (0, "two.png\n", "")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    pyproject = Path(minisd.__file__).parents[1] / "pyproject.toml"
    if pyproject.exists():
        assert '\nminisd = "minisd.cli:main"\n' in pyproject.read_text()


@pytest.mark.parametrize("arguments", (["--help"], ["generate", "--help"], ["-h"], [], ["--version"], ["generate"]))
def test_help_does_not_wait_for_torch(arguments, tmp_path):
    program = (
        f"import sys; sys.argv = ['minisd', *{arguments!r}]; from minisd.cli import main\n"
        "try: main()\n"
        "finally: sys.exit('heavy' if {'torch', 'numpy', 'huggingface_hub', 'PIL'} & set(sys.modules) else 0)"
    )
    result = process(sys.executable, "-c", program, cwd=tmp_path)
    assert result.status == 0 and "heavy" not in result.stderr


@pytest.mark.parametrize("encoding", ("utf-8", "ascii", "latin-1"))
def test_any_encoding_of_the_terminal(models, tmp_path, encoding):
    """Paths are bytes; JSON is ASCII."""
    arguments = ["generate", "猫", "-m", str(models / "tiny"), "--steps", "1", "-s", "1", "-o", "猫.png"]
    result = subprocess.run(
        [*MODULE, *arguments, *(["--json"] if encoding == "ascii" else [])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(minisd.__file__).parents[1])},
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)["images"][0] if encoding == "ascii" else result.stdout.decode().strip()
    assert told == "猫.png" and (tmp_path / told).exists()


@pytest.mark.parametrize("shell", ("bash", "zsh", "fish"))
def test_completion(shell, tmp_path):
    result = process(*CONSOLE_SCRIPT, cwd=tmp_path, _MINISD_COMPLETE=f"{shell}_source")
    assert result.status == 0 and "_MINISD_COMPLETE" in result.stdout and result.stderr == ""


def test_completion_of_options(tmp_path):
    words = {"COMP_WORDS": "minisd generate --sche", "COMP_CWORD": "2", "_MINISD_COMPLETE": "bash_complete"}
    assert "--scheduler" in process(*CONSOLE_SCRIPT, cwd=tmp_path, **words).stdout


def test_no_colour(tmp_path):
    for arguments in (["--help"], ["generate", "--help"], ["generate"]):
        result = process(*MODULE, *arguments, cwd=tmp_path, NO_COLOR="1")
        assert "\x1b" not in result.stdout + result.stderr


def test_version(minisd_):
    assert minisd_("--version").stdout == f"minisd, version {minisd.__version__}\n"


def test_no_arguments_are_a_question(minisd_):
    result = minisd_()
    assert result.status == 0 and result.stdout == minisd_("--help").stdout and result.stderr == ""


# ------------------------------------------------ refusals

BAD = {
    # what: (options, words of the message)
    "no prompt": ([], "Missing argument 'PROMPT'"),
    "missing path": (["cat", "-m", "{models}/nowhere"], "nowhere: no such file or folder"),
    "missing file": (["cat", "-m", "nothing.safetensors"], "nothing.safetensors: no such file or folder"),
    "no such home": (["cat", "-m", "~nobody-here/model"], "~nobody-here/model: no such file or folder"),
    "not in the cache": (["cat", "-m", "some/thing"], "some/thing: .*not in the cache"),
    "empty name": (["cat", "-m", ""], "no such file or folder|is not a model|has no folder"),
    "truncated": (["cat", "-m", "{models}/truncated.safetensors"], "truncated"),
    "text": (["cat", "-m", "{models}/text.safetensors"], "not a safetensors file"),
    "empty": (["cat", "-m", "{models}/empty.safetensors"], "empty"),
    "renamed pickle": (["cat", "-m", "{models}/pickle.safetensors"], "pickle"),
    "ckpt": (["cat", "-m", "{models}/model.ckpt"], "pickle"),
    "empty folder": (["cat", "-m", "{models}/folder"], "not a model in diffusers' layout"),
    "SDXL": (["cat", "-m", "{models}/sdxl.safetensors"], "is a part of SDXL"),
    "VAE only": (["cat", "-m", "{models}/vae.safetensors"], "holds a VAE only"),
    "holes": (["cat", "-m", "{models}/holes.safetensors"], "tensors missing"),
    "not a VAE": (["cat", "--vae", "{models}/sdxl.safetensors"], "does not hold a VAE"),
    "size 100": (["cat", "--size", "100x100"], "100.*multiple of 8"),
    "size 0": (["cat", "--size", "0x0"], "multiple of 8"),
    "size abc": (["cat", "--size", "abc"], "'abc' is not a size"),
    "size -64": (["cat", "--size", "-64"], "'-64' is not a size"),
    "size 64x": (["cat", "--size", "64x"], "'64x' is not a size"),
    "size 64x64x64": (["cat", "--size", "64x64x64"], "is not a size"),
    "size ²": (["cat", "--size", "64²"], "is not a size"),
    "size of the sky": (["cat", "--size", "8" + 30 * "0"], "is not a size"),
    "steps 0": (["cat", "--steps", "0"], "steps.*0"),
    "steps 1001": (["cat", "--steps", "1001"], "steps=1001: must be .* 1000"),
    "steps 1.5": (["cat", "--steps", "1.5"], "'--steps'.*1.5"),
    "images 0": (["cat", "--images", "0"], "'--images'"),
    "scheduler": (["cat", "--scheduler", "eular"], "scheduler='eular': must be one of ddim, ddpm, pndm"),
    "eta with ddpm": (["cat", "--eta", "0.5", "--scheduler", "ddpm"], "eta is an option of ddim"),
    "eta -1": (["cat", "--eta", "-1"], "eta=-1"),
    "guidance nan": (["cat", "-g", "nan"], "guidance_scale=nan"),
    "guidance inf": (["cat", "-g", "inf"], "guidance_scale=inf"),
    "guidance text": (["cat", "-g", "much"], "'much' is not a valid float"),
    "rescale nan": (["cat", "--guidance-rescale", "nan"], "guidance_rescale=nan"),
    "seed -1": (["cat", "--seed", "-1"], "'--seed'"),
    "seed 2^63": (["cat", "--seed", str(2**63)], "'--seed'"),
    "clip skip": (["cat", "--clip-skip", "2"], "clip_skip=2"),
    "device": (["cat", "--device", "toaster"], "device='toaster'"),
    "device meta": (["cat", "--device", "meta"], "device='meta'"),
    "device ''": (["cat", "--device", ""], "device=''"),
    "dtype": (["cat", "--dtype", "int8"], "'int8' is not one of"),
    "weights": (["cat", "-m", "{models}/tiny.safetensors", "--weights", "ema"], "has no ema UNet weights"),
    "option": (["cat", "--colour", "red"], "No such option.*--colour"),
    "option with a line break": (["cat", "--a\nb"], "No such option"),
    "two prompts": (["cat", "dog"], "unexpected extra argument.*dog"),
    "surrogates": (["cat \udcff"], "not valid Unicode"),
    "surrogates in the negative prompt": (["cat", "-n", "\udcff"], "not valid Unicode"),
    "no such output folder": (["cat", "-o", "nowhere/x.png"], "nowhere: there is no such folder"),
    "output is a folder": (["cat", "-o", "../folder.png"], "folder.png: is a folder"),
    "an output of several is a folder": (["cat", "-o", "../a.png", "--images", "2"], "a-2.png: is a folder"),
    "a file in the output path": (["cat", "-o", "../file/x.png"], "file: there is no such folder"),
    "output is no PNG": (["cat", "-o", "x.jpg"], "x.jpg: the name must end in .png"),
    "output is empty": (["cat", "-o", ""], "must end in .png"),
    "output is too long": (["cat", "-o", f"{'x' * 300}.png"], "too long"),
    "output in no such home": (["cat", "-o", "~nobody-here/x.png"], "~nobody-here: there is no such folder"),
    "output among processes": (["cat", "-o", "/proc/x.png"], "/proc: cannot be written to|no such folder"),
    "steps folder is a file": (["cat", "--steps-dir", "../file"], "file: exists and is not a folder"),
    "steps folder in no folder": (["cat", "--steps-dir", "no/where"], "no: there is no such folder"),
    "steps folder in a file": (["cat", "--steps-dir", "../file/x"], "file: there is no such folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(minisd_, models, tmp_path, what):
    """One line that says what is wrong, exit status 2, no traceback, and nothing left behind."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a-2.png").mkdir()
    (tmp_path / "file").write_text("a file")
    options, words = BAD[what]
    options = [option.replace("{models}", str(models)) for option in options]
    default_model = None if "-m" in options else "tiny"
    default_steps = None if "--steps" in options else "2"
    result = minisd_("generate", *options, model=default_model, steps=default_steps)
    assert (result.status, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert re.match(f"error: .*({words})", line), line
    assert os.listdir() == [] and sorted(os.listdir("..")) == ["a-2.png", "file", "folder.png", "output"]


def test_unknown_command(minisd_):
    result = minisd_("sketch", "cat")
    assert result.status == 2 and re.fullmatch(r"error: No such command 'sketch'.*\n", result.stderr)


def test_bad_input_in_a_process_of_its_own(models, tmp_path):
    """With bytes that are not UTF-8 in the arguments, as a shell would pass them."""
    for prompt in (b"cat \xff", "cat"):
        command = [*MODULE, "generate", prompt, "-m", str(models / "truncated.safetensors"), "-o", b"\xff.png"]
        if prompt != "cat":
            command[5] = str(models / "tiny")
        environment = os.environ | {"PYTHONPATH": str(Path(minisd.__file__).parents[1])}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
        assert result.returncode == 2 and result.stdout == b""
        assert result.stderr.startswith(b"error: ") and result.stderr.count(b"\n") == 1
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="file names are bytes on Linux only")
def test_an_output_path_that_is_not_utf8(models, tmp_path):
    command = [*MODULE, "generate", "cat", "-m", str(models / "tiny"), "--steps", "1", "-s", "1", "-o", b"\xff.png"]
    environment = os.environ | {"PYTHONPATH": str(Path(minisd.__file__).parents[1])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"\xff.png\n", b"")
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(minisd_):
    Path("locked").mkdir(mode=0o500)
    result = minisd_("generate", "cat", "-o", "locked/x.png")
    assert result.status == 2 and "locked: cannot be written to" in result.stderr


# ------------------------------------------------ interruptions


@pytest.mark.parametrize("where", ("denoise", "decode"))
def test_interrupted_while_generating(minisd_, monkeypatch, where):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusion, "predict_noise" if where == "denoise" else "decode", interrupt)
    result = minisd_("generate", "cat", "-s", "1", "--images", "2", "-o", "x.png")
    assert (result.status, result.stdout) == (130, "") and "Traceback" not in result.stderr
    assert os.listdir() == []


def test_interrupted_while_writing(minisd_, monkeypatch):
    """What stood there before is still there, whole."""
    old = minisd_("generate", "cat", "-s", "1", "-o", "x.png").written.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(minisd.cli.output.os, "replace", interrupt)
    result = minisd_("generate", "cat", "-s", "2", "-o", "x.png")
    assert result.status == 130 and "Traceback" not in result.stderr
    assert os.listdir() == ["x.png"] and Path("x.png").read_bytes() == old


def test_a_full_disk(minisd_, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(minisd.cli.output.os, "replace", full)
    result = minisd_("generate", "cat", "-s", "2", "-o", "x.png")
    assert result.status == 2 and result.stderr == "error: [Errno 28] No space left on device\n"
    assert os.listdir() == []


@pytest.mark.parametrize(
    "words",
    (
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 1 GiB",
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "Storage size calculation overflowed with sizes=[1, 4, 10000000000, 10000000000]",
    ),
    ids=lambda words: words[:9],
)
def test_too_little_memory(minisd_, monkeypatch, words):
    def overflow(*_, **__):
        raise RuntimeError(words)

    monkeypatch.setattr(StableDiffusion, "predict_noise", overflow)
    result = minisd_("generate", "cat")
    assert result.status == 2 and re.fullmatch("error: not enough memory: .*--size.*\n", result.stderr)
    assert os.listdir() == []


def test_a_bug_is_not_hidden(minisd_, monkeypatch):
    """What nobody foresaw stays an exception, with its traceback."""

    def bug(*_, **__):
        raise RuntimeError("surprise")

    monkeypatch.setattr(StableDiffusion, "predict_noise", bug)
    monkeypatch.setattr(sys, "argv", ["minisd"])
    with pytest.raises(RuntimeError, match="surprise"):
        minisd_("generate", "cat", "-s", "1")


def test_the_tiny_model_is_tiny(models):
    """So that this file stays quick."""
    assert sum(tensor.numel() for tensor in load_file(models / "tiny.safetensors").values()) < 3_000_000


def test_numbers_that_are_not_finite(minisd_, models, tmp_path):
    """One line that says where, status 1, and the picture is written all the same."""
    sd = tiny_model()
    sd.unet.conv_out.bias.data[0] = float("nan")
    sd.save(models / "nan")
    result = minisd_("generate", "x", "-s", "1", "--images", "2", "--steps-dir", "steps", "-o", "x.png", model="nan")
    assert result.status == 1 and result.stdout.splitlines()[-1] == "x.png" and Path("x.png").exists()
    assert re.fullmatch(r"warning: latents of step 1 .*--check.*bfloat16 and float32.*\n", result.stderr)
    sd = tiny_model()
    sd.vae.decoder.conv_in.weight.data *= 1e30
    sd.save(models / "large")
    result = minisd_("generate", "x", "-s", "1", "-o", "y.png", model="large")
    assert result.status == 1 and Path("y.png").exists()
    assert re.fullmatch(r"warning: images out of the VAE: NaN.*\n", result.stderr)


@pytest.mark.parametrize(
    ("text", "path", "token"),
    (
        (r"C:\emb\thing.safetensors", r"C:\emb\thing.safetensors", None),
        (r"C:\emb\thing.safetensors:<x>", r"C:\emb\thing.safetensors", "<x>"),
        ("C:/emb/thing.safetensors", "C:/emb/thing.safetensors", None),
        ("C:thing.safetensors", "C:thing.safetensors", None),
        ("a:b/thing.safetensors", "a:b/thing.safetensors", None),
        ("thing.safetensors:word", "thing.safetensors", "word"),
        ("thing.safetensors", "thing.safetensors", None),
    ),
)
def test_paths_with_colons(text, path, token):
    from minisd.cli.options import path_and_number, path_and_token

    assert path_and_token(text) == (path, token)
    assert path_and_number(f"{path}:0.5") == (path, 0.5) and path_and_number(path) == (path, 1.0)


def test_an_adapter_that_is_not_there_is_named_whole(minisd_):
    for option in ("--embedding", "--lora"):
        result = minisd_("generate", "x", option, r"C:\emb\thing.safetensors")
        assert result.status == 2 and r"C:\emb\thing.safetensors: no such file" in result.stderr


def test_notes_about_prompts_and_seeds(minisd_):
    result = minisd_("generate", "a " * 80, "-s", str(2**32 + 1), "-o", "x.png")
    notes = result.stderr.splitlines()
    assert result.status == 0 and len(notes) == 2 and notes[0].startswith("note: seed=4294967297: draws the same")
    assert re.match("note: the prompt has 80 tokens.*cut off: 'a a a a a'.*--long-prompts", notes[1])
    result = minisd_("generate", "a " * 80, "-s", "1", "-o", "y.png", "--long-prompts")
    assert (result.status, result.stderr) == (0, "")
    with Image.open("y.png") as picture:
        text = picture.text["parameters"]
    assert text.startswith("a " * 79) and "Long prompts: True" in text


def test_a_prompt_without_a_command(minisd_, models):
    result = minisd_("a red heart", "--model", str(models / "tiny"), "--steps", "1", "-s", "1")
    assert (result.status, result.stdout) == (0, "a-red-heart-1.png\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["gen", "a heart"], "No such command 'gen'; did you mean generate."),
        (["inpant"], "No such command 'inpant'; did you mean inpaint or "),
        (["xylophone", "of", "glass"], 'a prompt needs quotes: minisd "xylophone of glass"'),
        (["generate", "a", "red", "heart"], "red heart.; a prompt of several words needs quotes"),
    ),
)
def test_commands_that_are_none(minisd_, arguments, words):
    result = minisd_(*arguments)
    assert result.status == 2 and re.search(words, result.stderr), result.stderr


def test_what_other_programs_call_the_options(minisd_):
    names = {"--negative-prompt": "bad", "--cfg": "3", "--num-images": "2"}
    given = [word for pair in names.items() for word in pair]
    result = minisd_("generate", "x", "-s", "1", *given, "-o", "x.png", "--json")
    told = json.loads(result.stdout)
    assert (told["negative"], told["guidance"], len(told["images"])) == ("bad", 3.0, 2)
    assert (
        json.loads(minisd_("generate", "x", "-s", "1", "--guidance-scale=4", "-o", "x.png", "--json").stdout)[
            "guidance"
        ]
        == 4
    )
    assert "--cfg" not in minisd_("generate", "--help").stdout
    assert "No such option" in minisd_("generate", "x", "--color", "blue").stderr  # it has no such option at all


def test_the_models_own_scheduler_and_size(minisd_, models, tmp_path):
    tiny_model().save(models / "pndm")
    settings = models / "pndm" / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    result = minisd_("generate", "x", "-s", "1", "-o", "x.png", model="pndm")
    assert result.stderr.startswith("note: the model's own scheduler is PNDMScheduler; ddim is used")
    assert len(result.stderr.splitlines()) == 1
    for chosen in ("ddim", "model"):
        chosen = ["--scheduler", chosen, "--steps", "4"]
        assert minisd_("generate", "x", "-s", "1", "-o", "x.png", *chosen, model="pndm", steps=None).stderr == ""
    result = minisd_("generate", "x", "-s", "1", "--scheduler", "model", model="pndm")
    assert result.stderr == "error: steps=2: must be at least 4 for Runge-Kutta steps\n"
    assert "--size 16x16: the model was made for 64x64" in minisd_("generate", "x", "-s", "1", "--size", "16").stderr
    Image.new("RGB", (256, 130)).save(tmp_path / "large.png")
    model = ["--model", str(models / "tiny"), "--steps", "2"]
    result = minisd_("img2img", "x", str(tmp_path / "large.png"), "-s", "1", "-o", "y.png", *model)
    assert "256x130 pixels, the model was made for 64x64: it is brought to 88x48 (--size 256x130" in result.stderr
    with Image.open("y.png") as picture:
        assert picture.size == (88, 48)
    result = minisd_("img2img", "x", str(tmp_path / "large.png"), "-s", "1", "-o", "y.png", *model, "--size", "128x64")
    with Image.open("y.png") as picture:
        assert picture.size == (128, 64)
