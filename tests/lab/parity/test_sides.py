"""Traces, other people's modules, the command, and everything that may be wrong with what one types."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minisd import CheckpointError
from minisd.cli import cli
from minisd.lab.parity import traces
from minisd.lab.parity.bugs import planted
from minisd.lab.parity.compare import compare
from minisd.lab.parity.opening import open_side
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, SAME, UNKNOWN
from minisd.pipeline import StableDiffusion
from tests.lab.parity.small import CASE, side, small_model

HERE = "python:tests.lab.parity.others"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    small_model().save(folder)
    return f"minisd:{folder}"


@pytest.fixture(scope="module")
def sound(model):
    return StableDiffusion.load(model.removeprefix("minisd:"))


def traced(sd, path, **settings) -> str:
    traces.write(path, side(sd), CASE, **settings)
    return f"trace:{path}"


# ---- traces ----------------------------------------------------------------------------------------------


def test_a_trace_in_float32_cannot_tell(sound, model, tmp_path):
    verdict = compare(traced(sound, tmp_path / "t.safetensors"), model)
    assert (verdict.word, verdict.exit_status, verdict.culprits) == (UNKNOWN, 2, [])
    assert "nothing to look at" in verdict.sentence
    assert verdict.rung("UNet, step 0").r64 == pytest.approx(1, abs=8)


def test_a_trace_in_float64_can(sound, model, tmp_path):
    verdict = compare(model, traced(sound, tmp_path / "t.safetensors", exact=True))
    assert verdict.word == SAME and len(verdict.pairs) > 100
    assert verdict.case["steps"] == CASE.steps  # the trace's own


BUGS = ("eps-transformer", "residual-scale", "gelu-tanh", "vae-padding", "one-weight", "sin-cos", "skip-first")


@pytest.mark.parametrize("bug", BUGS)
def test_a_mistake_in_a_trace(sound, model, tmp_path, bug):
    """With the modules' inputs in it, a trace in float64 names the culprit as exactly as a live side does."""
    mutant, expected = planted(side(sound), bug)
    verdict = compare(traced(mutant.model, tmp_path / "t.safetensors", exact=True), model)
    reached = bug != "vae-padding"  # a run from text does not use the encoder
    assert verdict.word == (DIFFERENT if reached else SAME)
    assert verdict.culprits == (expected if reached else [])


def test_a_mistake_in_a_float32_trace_is_worth_a_look(sound, model, tmp_path):
    mutant, expected = planted(side(sound), "residual-scale")
    verdict = compare(traced(mutant.model, tmp_path / "t.safetensors"), model)
    assert (verdict.word, verdict.culprits) == (UNKNOWN, expected)
    assert verdict.sentence.startswith("cannot tell") and f"look at {expected[0]}" in verdict.sentence


def test_a_trace_without_inputs_names_the_first_that_is_off(sound, model, tmp_path):
    """Outputs only, under diffusers' names: later modules are off too, but the first is where to look."""
    mutant, _ = planted(side(sound), "residual-scale")
    traced(mutant.model, tmp_path / "t.safetensors", exact=True)
    tensors, metadata = with_metadata(tmp_path / "t.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "/unet" not in name or "resnet" in name}
    kept = {name: tensor for name, tensor in kept.items() if ":" not in name and not name.endswith(("conv1", "conv2"))}
    kept["step.0/up_blocks.0.resnets.0"] = kept.pop("step.0/unet.up.0.resnet")
    save_file(kept, tmp_path / "theirs.safetensors", metadata=metadata)
    verdict = compare(f"trace:{tmp_path / 'theirs.safetensors'}", model)
    assert verdict.culprits == ["unet.up.0.resnet"]
    assert verdict.pair("unet.up.0.resnet").b == "up_blocks.0.resnets.0"


def test_wrong_tokens_are_wrong_in_any_precision(sound, model, tmp_path):
    mutant, _ = planted(side(sound), "padding-token")
    verdict = compare(traced(mutant.model, tmp_path / "t.safetensors"), model)
    assert (verdict.word, verdict.culprits) == (DIFFERENT, ["tokens"])


def with_metadata(path):
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def test_what_a_trace_says_of_itself(sound, tmp_path):
    traced(sound, tmp_path / "t.safetensors")
    tensors, metadata = with_metadata(tmp_path / "t.safetensors")
    assert metadata["minisd.trace"] == "1" and json.loads(metadata["case"])["prompts"] == list(CASE.prompts)
    assert "torch" in json.loads(metadata["versions"]) and json.loads(metadata["config"])["unet"]["heads"] == 8
    assert {
        "tokens",
        "step.0/noise",
        "step.0/unet.up.0.resnet",
        "step.0/unet.up.0.resnet:1",
        "pixels",
    } <= tensors.keys()


def changed(sound, tmp_path, change, *, exact=True) -> str:
    """A trace with some tensors replaced."""
    traced(sound, tmp_path / "t.safetensors", exact=exact)
    tensors, about = with_metadata(tmp_path / "t.safetensors")
    kept = {name: tensor.contiguous().clone() for name, tensor in {**tensors, **change(tensors)}.items()}
    save_file(kept, tmp_path / "c.safetensors", metadata=about)
    return f"trace:{tmp_path / 'c.safetensors'}"


def test_one_tensor_in_float64_is_no_verdict(sound, model, tmp_path):
    """NumPy's schedule is in float64, whatever the networks compute in."""
    wide = load_file(traced(sound, tmp_path / "w.safetensors", exact=True).removeprefix("trace:"))["alphas_cumprod"]
    verdict = compare(changed(sound, tmp_path, lambda _: {"alphas_cumprod": wide}, exact=False), model)
    assert (verdict.word, verdict.exit_status, verdict.culprits) == (UNKNOWN, 2, [])
    assert "not in float64; nothing to look at" in verdict.sentence
    tensors, metadata = with_metadata(tmp_path / "c.safetensors")
    ladder = {name: tensor for name, tensor in tensors.items() if "." not in name.partition("/")[2]}
    ladder = {name: tensor for name, tensor in ladder.items() if name.partition("/")[2] not in ("unet", "vae")}
    save_file({**ladder, "step.0/noise": -ladder["step.0/noise"]}, tmp_path / "n.safetensors", metadata=metadata)
    verdict = compare(f"trace:{tmp_path / 'n.safetensors'}", model)
    assert verdict.word == UNKNOWN and "look at UNet, step 0: " in verdict.sentence


def test_a_difference_in_float64_is_one_beside_float32_too(sound, model, tmp_path):
    def change(tensors):
        return {"decode/images": tensors["decode/images"] * 1.01, "step.0/noise": -tensors["step.0/noise"].float()}

    verdict = compare(changed(sound, tmp_path, change), model)
    assert verdict.word == DIFFERENT and "VAE decode" in verdict.culprits and "UNet, step 0" not in verdict.culprits


@pytest.mark.parametrize(("off", "status"), [(1, SAME), (2, UNKNOWN)])
def test_pixels_of_a_trace_in_working_precision(sound, model, tmp_path, off, status):
    """The same formula in another order rounds some bytes the other way: that is no accusation."""

    def change(tensors):
        pixels = tensors["pixels"].clone()
        pixels[0, 0, 0, 0] += off if pixels[0, 0, 0, 0] < 100 else -off
        return {"pixels": pixels}

    verdict = compare(changed(sound, tmp_path, change, exact=False), model)
    assert (verdict.word, verdict.rung("pixels").status) == (UNKNOWN, status)
    assert ("look at pixels: 1 differ" in verdict.sentence) is (off == 2)
    assert compare(changed(sound, tmp_path, change), model).culprits == ["pixels"]  # from images in float64


MISFITS = {
    "step.0/latents": lambda tensor: tensor[:, :3],
    "step.0/timestep": lambda tensor: torch.tensor([1, 2, 3]),
    "tokens": lambda tensor: tensor + 10**7,
    "decode/z": lambda tensor: tensor[0, 0],
    "decode/images": lambda tensor: tensor[0, 0],
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_tensor_that_does_not_fit_is_named(sound, model, tmp_path, name):
    path = changed(sound, tmp_path, lambda tensors: {name: MISFITS[name](tensors[name])})
    with pytest.raises(ValueError, match=f"does not fit the model: .*{name}") as caught:
        compare(path, model)
    assert "\n" not in str(caught.value)


def broken_trace(tmp_path, metadata, tensors=None) -> str:
    save_file(tensors or {"a": torch.zeros(1)}, tmp_path / "b.safetensors", metadata=metadata)
    return f"trace:{tmp_path / 'b.safetensors'}"


@pytest.mark.parametrize(
    ("metadata", "cause"),
    [
        ({}, 'its metadata has no "case"'),
        ({"case": "{"}, "broken 'case'"),
        ({"case": "[]"}, 'broken "case"'),
        ({"case": '{"prompts": ["a"], "negatives": []}'}, "not as many"),
        ({"case": '{"steps": "x"}'}, 'broken "case"'),
        ({"case": '{"guidance": "5"}'}, "guidance is '5', must be a number"),
        ({"case": '{"guidance": NaN}'}, "guidance is nan"),
        ({"case": '{"steps": 2.5}'}, "steps is 2.5, must be a whole number"),
        ({"case": '{"prompts": "a", "negatives": "b"}'}, "prompts must be a list of texts"),
        ({"case": "{}", "versions": "[1]"}, "broken 'versions'"),
    ],
)
def test_a_broken_trace(tmp_path, metadata, cause):
    with pytest.raises(CheckpointError, match=cause):
        open_side(broken_trace(tmp_path, metadata))


def test_a_trace_without_a_known_name(model, tmp_path):
    with pytest.raises(ValueError, match="none of its tensors"):
        compare(broken_trace(tmp_path, {"case": "{}"}), model)


# ---- other implementations -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("fused_attention", "resnet"))
def test_another_structure_is_the_same_function(model, name):
    verdict = compare(model, f"{HERE}:{name}", CASE)
    assert (verdict.word, verdict.culprits) == (SAME, []) and verdict.pairs[0].calls > 0


def test_fused_attention_is_named_as_a_whole(model):
    """Its q, k and v are one matrix that no name can stand for: the attention is as exact as it gets."""
    verdict = compare(f"{HERE}:wrong_fused_attention", model, CASE)
    assert (verdict.word, verdict.culprits) == (DIFFERENT, ["unet.down.0.attention.self_attn"])


def test_an_epsilon_in_a_resnet_of_ones_own(model):
    verdict = compare(model, f"{HERE}:wrong_resnet", CASE)
    assert verdict.culprits == ["unet.down.0.resnet.norm1"]
    assert "eps 1e-05 (A), 1e-06 (B)" in verdict.cause


def test_modules_without_names_are_paired_by_their_weights(model):
    verdict = compare(model, f"{HERE}:resnet_without_names", CASE)
    assert verdict.word == SAME and {pair.name.rpartition(".")[2] for pair in verdict.pairs} == {
        "resnet", "norm1", "conv1", "time", "norm2", "conv2",
    }  # fmt: skip
    assert verdict.compared.startswith("6 modules in ") and verdict.compared.endswith(
        "inside it paired by their weights"
    )
    wrong = compare(model, f"{HERE}:wrong_resnet_without_names", CASE)
    assert wrong.culprits == ["unet.down.0.resnet.norm1"] and "eps 1e-05 (A), 1e-06 (B)" in wrong.cause


def test_a_weight_that_is_off_is_found_without_names(model):
    verdict = compare(model, f"{HERE}:one_weight_off_without_names", CASE)
    assert verdict.culprits == ["unet.down.0.resnet.conv1"] and "differ, by" in verdict.cause


def test_what_weights_alone_pair_is_no_culprit_of_a_function_that_is_the_same(model):
    verdict = compare(model, f"{HERE}:scaled_resnet_without_names", CASE)
    assert (verdict.word, verdict.culprits) == (SAME, [])


def test_what_was_compared_is_told_where_there_is_no_ladder(model, tmp_path):
    result = minisd("parity", model, f"{HERE}:resnet_without_names", *SMALL, "--html", str(tmp_path / "r.html"))
    assert "\ncompared: 6 modules in " in result.stdout and "R64" not in result.stdout.split("compared:")[1]
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Compared: 6 modules in " in page and "The ladder" not in page
    assert '{"": "unet.down.0.resnet", "first_norm": "unet.down.0.resnet.norm1"}' in minisd("parity", "--help").stdout


def test_numpy(model):
    verdict = compare(f"{HERE}:numpy_clip", model, CASE)
    assert verdict.word == SAME and verdict.rung("text embedding").r64 < 16
    wrong = compare(f"{HERE}:numpy_clip_without_mask", model, CASE)
    assert (wrong.word, wrong.culprits) == (DIFFERENT, ["text_encoder.layers.0", "text_encoder.layers.1"])
    assert compare(f"{HERE}:numpy_clip_in_float32", model, CASE).word == UNKNOWN


# ---- the command -----------------------------------------------------------------------------------------


def minisd(*arguments: str):
    return CliRunner().invoke(cli, list(arguments), standalone_mode=False)


SMALL = ("--prompt", "red", "--size", "24x16", "--steps", "1")


def test_json_and_exit_status(model):
    result = minisd("parity", model, model, *SMALL, "--json")
    told = json.loads(result.stdout)
    assert (result.return_value, told["word"], told["exit_status"]) == (0, SAME, 0)
    assert told["command"].startswith(f"minisd parity {model} {model} --steps 1 --size 24x16 --prompt red")
    assert told["matrix"]["stages"] == ["UNet, step 0", "UNet at noise 0.01"]
    assert len(told["matrix"]["r64"][0]) == len(told["matrix"]["blocks"]) > 5
    assert told["not_compared"] and told["versions"]["torch"] and told["case"]["width"] == 24


def test_demo(model):
    result = minisd("parity", model, "--demo", "attention-heads", *SMALL)
    assert result.return_value == 1
    assert "likely cause: unet.down.0.attention.cross_attn: heads 8 (A), 4 (B)" in result.stdout
    assert "planted: half as many heads" in result.stderr
    assert "sin-cos " in minisd("parity", "--demo", "list").stdout


def test_two_precisions(model):
    result = minisd("parity", f"{model}@bfloat16", model, *SMALL)
    assert result.return_value == 0 and "computes in bfloat16, B in float32" in result.stdout.replace(
        "A computes", "computes"
    )


def test_trace_then_parity(model, tmp_path):
    path = tmp_path / "t.safetensors"
    assert minisd("trace", model, "-o", str(path), "--float64", *SMALL).stdout.splitlines() == [str(path)]
    assert minisd("parity", f"trace:{path}", model).return_value == 0


BAD = {
    "nothing": ((), "needs two sides"),
    "one side": (("minisd:emoji",), "needs two sides"),
    "no kind": (("emoji", "minisd:emoji"), "is not a side to compare"),
    "no such folder": (("minisd:nowhere/x", "minisd:emoji"), "nowhere"),
    "no such trace": (("trace:nowhere.safetensors", "minisd:emoji"), "no such file"),
    "no such module": (("python:nowhere:f", "minisd:emoji"), "cannot be imported"),
    "no such function": ((f"{HERE}:nowhere", "minisd:emoji"), "cannot be imported"),
    "no function": ((f"{HERE}:NOT_A_FUNCTION", "minisd:emoji"), "is a int, not a function"),
    "no names": ((f"{HERE}:no_names", "minisd:emoji"), r"must return \(module, names\)"),
    "strange names": ((f"{HERE}:strange_names", "MODEL"), "no module is called 'unet.nowhere'"),
    "a misfit": ((f"{HERE}:misfit", "MODEL"), "nothing could be compared|fails where A does not"),
    "a function that fails": ((f"{HERE}:fails", "MODEL"), "not today"),
    "a function that says nothing": ((f"{HERE}:says_nothing", "MODEL"), "none of the names it returns"),
    "nothing live": ((f"{HERE}:resnet", f"{HERE}:resnet"), "one of the two must be"),
    "shapes": (("minisd:emoji", "MODEL"), "shapes that cannot be paired"),
    "a size": (("minisd:emoji", "minisd:emoji", "--size", "big"), "not a size"),
    "negatives": (("minisd:emoji", "minisd:emoji", "--negative", "x"), "one for each"),
    "no such bug": (("--demo", "typo"), "no bug to plant"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(model, what):
    arguments, cause = BAD[what]
    result = minisd("parity", *(model if one == "MODEL" else one for one in arguments))
    if result.exception is None:  # a part that does not fit is a finding
        assert what == "a misfit" and result.return_value == 1
        return
    assert isinstance(result.exception, ValueError | FileNotFoundError)
    assert "\n" not in str(result.exception)
    with pytest.raises(type(result.exception), match=cause):
        raise result.exception


STRANGERS = {
    "exit": ("import sys; sys.exit(0)", r"cannot be imported \(it calls sys.exit\(0\)\)"),
    "error": ("raise RuntimeError('import time')", "RuntimeError: import time"),
    "syntax": ("def f(:", "SyntaxError"),
    "factory_exits": ("import sys\ndef f(): sys.exit(0)", "calls sys.exit"),
    "factory_fails": ("def f(): return 1 / 0", "ZeroDivisionError: division by zero"),
    "function_exits": ("import sys\ndef f(given): sys.exit(0)", "calls sys.exit"),
    "function_fails": ("def f(given): return 1 / 0", "ZeroDivisionError"),
    "number": ("def f(given): return 42", "returns a int; must be a dict"),
    "numpy": ("def f(given): return {'step.0/noise': given['noise'].numpy()}", "returns a ndarray as 'step.0/noise'"),
    "forward_exits": (
        "import sys\nfrom torch import nn\nclass M(nn.Module):\n    def forward(self, x, time=None): sys.exit(0)\n"
        "def f(): return M(), {'': 'unet.down.0.resnet'}",
        "ends with SystemExit",
    ),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_code_that_ends_itself_does_not_end_the_comparison(model, tmp_path, monkeypatch, what):
    source, cause = STRANGERS[what]
    (tmp_path / f"stranger_{what}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    result = minisd("parity", model, f"python:stranger_{what}:f", *SMALL)
    assert isinstance(result.exception, ValueError) and "\n" not in str(result.exception)
    with pytest.raises(ValueError, match=cause):
        raise result.exception


def test_what_a_stranger_prints_is_not_in_the_json(model, tmp_path, monkeypatch):
    source = "print('IMPORT')\ndef f(given):\n    print('CALL')\n    return {'step.0/guided': given['step.0/guided']}\n"
    source += "from tests.lab.parity.others import resnet\ndef g():\n    print('FACTORY')\n    return resnet()\n"
    (tmp_path / "stranger_prints.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    result = minisd("parity", model, "python:stranger_prints:g", *SMALL, "--json")
    assert json.loads(result.stdout)["exit_status"] == result.return_value
    assert "IMPORT" in result.stderr and "FACTORY" in result.stderr


def test_too_little_memory_is_said_before_it_starts(model, monkeypatch):
    monkeypatch.setattr("minisd.lab.parity.memory.available", lambda: 10**6)
    result = minisd("parity", model, model, *SMALL)
    assert isinstance(result.exception, MemoryError) and "needs about" in str(result.exception)


def test_half_precision_is_another_precision(model):
    assert compare(model, f"{model}@bfloat16", CASE).word == PRECISION
