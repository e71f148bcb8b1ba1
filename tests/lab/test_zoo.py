"""Every specimen of the zoo meets its fate: in Python, and at the command line."""

import json
import time

import pytest
import torch
from click.testing import CliRunner

import minisd.checkpoint
from minisd import CheckpointError, StableDiffusion
from minisd.cli.weights import inspect as inspect_command
from minisd.lab.weights.inspect import inspect
from minisd.lab.zoo import write_zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    return folder, {specimen.path: specimen for specimen in write_zoo(folder)}


@pytest.fixture(scope="session")
def first(zoo):
    return StableDiffusion.load(zoo[0] / "compvis.safetensors").state()


def of(zoo, *fates):
    return [specimen for specimen in zoo[1].values() if specimen.fate in fates]


def test_what_the_zoo_holds(zoo):
    folder, specimens = zoo
    assert json.loads((folder / "zoo.json").read_text()) == [vars(specimen) for specimen in specimens.values()]
    assert {fate: len(of(zoo, fate)) >= 20 for fate in ("loads", "describes", "refuses")} == dict.fromkeys(
        ("loads", "describes", "refuses"), True
    )
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8_000_000


@pytest.mark.filterwarnings("ignore:.*(raw and averaged|is damaged)")
def test_what_loads_is_the_same_model_in_every_dialect(zoo, first):
    for specimen in of(zoo, "loads"):
        path = zoo[0] / specimen.path
        state = StableDiffusion.load(path).state()
        assert inspect(path).problem is None, specimen.path
        weights = minisd.checkpoint.open(path)
        assert list(weights) == [name for name in weights if name in state] and len(weights) == len(state)
        for name, tensor in state.items():
            assert torch.equal(weights[name].read().float(), tensor), (specimen.path, name)
            assert not specimen.same or torch.equal(tensor, first[name]), (specimen.path, name)


def test_diffusers_loads_the_folder(zoo):
    """A folder in its layout is one for diffusers too: the same noise and the same ids."""
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(zoo[0] / "diffusers")
    ours = StableDiffusion.load(zoo[0] / "diffusers")
    ids = theirs.tokenizer("a cat", padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours.tokenizer(["a cat"]), ids)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = ours.text_encoder(ids)
        assert torch.equal(theirs.text_encoder(ids)[0], context)
        assert torch.equal(theirs.unet(latents, 9, context).sample, ours.unet(latents, torch.tensor(9), context))
        assert torch.equal(theirs.vae.decode(latents).sample, ours.vae.decode(latents))


def test_what_is_sound_is_described_and_not_loaded(zoo):
    for specimen in of(zoo, "describes"):
        path = zoo[0] / specimen.path
        report = inspect(path)
        assert specimen.word in f"{report.what}: {report.problem}" and report.problem, (specimen.path, report.problem)
        with pytest.raises(CheckpointError) as caught:
            StableDiffusion.load(path)
        message = str(caught.value)
        assert str(path) in message and specimen.word.split(" only")[0] in message, (specimen.path, message)
        assert len(message.splitlines()) <= 25
        assert report.problem == "; ".join(line.strip() for line in message.splitlines())  # one understanding


def test_what_is_broken_is_refused_at_once(zoo):
    for specimen in of(zoo, "refuses"):
        path = zoo[0] / specimen.path
        for attempt in (StableDiffusion.load, inspect, minisd.checkpoint.open):
            began = time.monotonic()
            with pytest.raises(CheckpointError) as caught:
                attempt(path)
            message = str(caught.value)
            assert path.name in message and specimen.word in message, (specimen.path, attempt, message)
            assert len(message.splitlines()) == 1 and time.monotonic() - began < 5


@pytest.mark.parametrize("fate", ("loads", "describes", "refuses"))
def test_the_command(zoo, fate):
    """inspect exits 0 with a report that names the cause, or raises what the command line turns into one line."""
    for specimen in of(zoo, fate):
        result = CliRunner().invoke(inspect_command, [str(zoo[0] / specimen.path), "--json"])
        assert isinstance(result.exception, CheckpointError) == (fate == "refuses")
        if fate != "refuses":
            assert bool(json.loads(result.stdout)["problem"]) == (fate == "describes")
