"""What a checkpoint says that its UNet predicts: understood once, loaded so and shown so."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from minisd import CheckpointError, StableDiffusion
from minisd.checkpoint.load import open_checkpoint
from minisd.checkpoint.survey import survey
from minisd.lab.weights.inspect import inspect
from tests.unit.tiny import compvis_tensors, tiny_model


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """A model under CompVis' names, and nothing said about it."""
    return compvis_tensors(tiny_model(), tmp_path_factory.mktemp("tiny"))


def write(tensors, path, **metadata):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def predicts(path, **settings):
    """What is loaded, after a look that inspect sees the same."""
    kind = open_checkpoint(path, dtype=torch.float32, **settings).scheduler["prediction_type"]
    if not settings:
        told = any("prediction type: v_prediction" in hint for hint in inspect(path).hints)
        assert told == (kind == "v_prediction") and survey(path).schedule.prediction == kind
    return kind


def test_nothing_said_is_epsilon(tensors, tmp_path):
    assert predicts(write(tensors, tmp_path / "m.safetensors")) == "epsilon"


@pytest.mark.parametrize("name", ("modelspec.prediction_type", "modelspec.predict_key"))
@pytest.mark.parametrize(
    ("value", "kind"),
    (("v", "v_prediction"), ("v_prediction", "v_prediction"), ("V", "v_prediction"), ("eps", "epsilon")),
)
def test_metadata(tensors, tmp_path, name, value, kind):
    assert predicts(write(tensors, tmp_path / "m.safetensors", **{name: value})) == kind


@pytest.mark.parametrize("ending", ("yaml", "yml"))
@pytest.mark.parametrize(("value", "kind"), (('"v"', "v_prediction"), ("eps", "epsilon"), ("x0", "sample")))
def test_a_yaml_beside_the_file(tensors, tmp_path, ending, value, kind):
    path = write(tensors, tmp_path / "m.safetensors")
    (tmp_path / f"m.{ending}").write_text(f"model:\n  params:\n    parameterization: {value}\n")
    assert predicts(path) == kind


@pytest.mark.parametrize(
    "text", ("", "model: [", "[1, 2]", "model: {params: 3}", "a: &a [*a]", "x" * (1 << 21), "model: {params: {}}")
)
def test_other_yaml_says_nothing(tensors, tmp_path, text):
    path = write(tensors, tmp_path / "m.safetensors")
    (tmp_path / "m.yaml").write_text(text)
    assert predicts(path) == "epsilon"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_for_a_yaml_is_a_note(tensors, tmp_path):
    path = write(tensors, tmp_path / "m.safetensors")
    os.mkfifo(tmp_path / "m.yaml")
    assert any("m.yaml" in note for note in survey(path).notes)


def test_a_marker_counts_more_than_metadata_and_disagreement_is_told(tensors, tmp_path):
    path = write(
        tensors | {"v_pred": torch.zeros(0)}, tmp_path / "m.safetensors", **{"modelspec.prediction_type": "eps"}
    )
    assert predicts(path) == "v_prediction"
    (note,) = survey(path).notes
    assert "tensor v_pred says v_prediction, metadata modelspec.prediction_type says epsilon" in note
    assert note in inspect(path).warnings


def test_what_nobody_knows_is_told(tensors, tmp_path):
    path = write(tensors, tmp_path / "m.safetensors", **{"modelspec.prediction_type": "\x1b[31mflow"})
    assert predicts(path) == "epsilon"
    (note,) = survey(path).notes
    assert r"\x1b[31mflow" in note and "\x1b" not in note


def test_whoever_loads_may_say_otherwise(tensors, tmp_path):
    path = write(tensors, tmp_path / "m.safetensors", **{"modelspec.prediction_type": "v"})
    for kind in ("epsilon", "sample", "v_prediction"):
        assert predicts(path, prediction=kind) == kind
    with pytest.raises(ValueError, match="prediction='flow'"):
        predicts(path, prediction="flow")


def test_a_folder(tmp_path):
    tiny_model().save(tmp_path / "m")
    path = tmp_path / "m/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert predicts(tmp_path / "m") == "v_prediction"
    assert predicts(tmp_path / "m", prediction="epsilon") == "epsilon"


@pytest.mark.parametrize(
    "change", ({"beta_end": 3}, {"beta_start": "x"}, {"trained_betas": [1]}, {"beta_schedule": []})
)
def test_an_impossible_schedule_is_seen_by_both(tmp_path, change):
    tiny_model().save(tmp_path / "m")
    path = tmp_path / "m/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        StableDiffusion.load(tmp_path / "m")
    assert str(caught.value) == inspect(tmp_path / "m").problem and "beta" in str(caught.value)


def test_zero_terminal_snr_with_epsilon_is_told(tensors, tmp_path):
    path = write(tensors | {"ztsnr": torch.zeros(0)}, tmp_path / "m.safetensors")
    assert any("divides by zero" in note for note in survey(path).notes)
    sure = write(tensors | {"ztsnr": torch.zeros(0), "v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    assert survey(sure).notes == ()


def test_saved_models_say_what_they_are(tmp_path):
    """The metadata that other programs look for."""
    sd = tiny_model()
    sd.scheduler_config["prediction_type"] = "v_prediction"
    sd.save(tmp_path / "mine.safetensors", layout="compvis")
    metadata = inspect(tmp_path / "mine.safetensors").metadata
    assert {name: text for name, text in metadata.items() if name.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/ldm",
        "modelspec.title": "mine",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": "64x64",
    }
    assert (
        predicts(tmp_path / "mine.safetensors") == "v_prediction" and survey(tmp_path / "mine.safetensors").notes == ()
    )
