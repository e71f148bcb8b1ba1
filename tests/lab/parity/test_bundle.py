"""`--save case.zip` and `minisd parity case.zip`: the same case again, and what is not as it was."""

import json
import shutil
import zipfile

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from minisd import CheckpointError
from minisd.cli.parity import parity
from minisd.cli.parity import trace as trace_command
from minisd.lab.parity import bundle
from minisd.lab.parity.cases import Case
from minisd.lab.parity.compare import compare
from tests.lab.parity.small import CASE, small_model


@pytest.fixture
def models(tmp_path):
    """Two folders: a model, and one with a bias that is 0.001 off."""
    sd = small_model()
    sd.save(tmp_path / "a")
    sd.state()["unet.conv_out.bias"][0] += 0.001
    sd.save(tmp_path / "b")
    return tmp_path


def saved(models, **case):
    sides = f"minisd:{models / 'a'}", f"minisd:{models / 'b'}"
    verdict = compare(*sides, Case(**{**CASE.as_dict(), **case}))
    return verdict, bundle.write(models / "case.zip", verdict, sides)


def again(path):
    result = CliRunner().invoke(parity, [str(path), "--json"], standalone_mode=False)
    assert result.exception is None, result.exception
    return result.return_value, json.loads(result.stdout)


def test_the_same_case_again(models):
    verdict, path = saved(models, seed=7)
    status, told = again(path)
    assert status == 1 and told["culprits"] == verdict.culprits == ["unet.conv_out"]
    assert told["case"]["seed"] == 7 and told["command"] == f"minisd parity {path}"
    assert told["notes"] == ["when the bundle was made, the verdict was: different function"]
    assert [rung["relative64"] for rung in told["rungs"]] == [rung.relative64 for rung in verdict.rungs]


def test_the_noise_is_the_bundles(models, monkeypatch):
    """A torch that draws other numbers gets the ones that were stored."""
    verdict, path = saved(models)
    monkeypatch.setattr(Case, "noise", lambda self, *shape, offset=0: torch.full(shape, 0.5))
    with bundle.opened(path) as found:
        assert found.case.latents(4, 8).std() > 0.5
        assert found.case.as_dict() == verdict.case


def test_other_weights_are_told(models):
    _, path = saved(models)
    shutil.rmtree(models / "b")
    shutil.copytree(models / "a", models / "b")
    status, told = again(path)
    assert status == 0
    assert (
        "b: unet/diffusion_pytorch_model.safetensors is not the file that the bundle was made with" in told["notes"][0]
    )


def test_a_trace_travels_along(models):
    path = models / "theirs.safetensors"
    arguments = [f"minisd:{models / 'a'}", "-o", str(path), "--float64", "--steps", "1", "--size", "24x16", "-q"]
    CliRunner().invoke(trace_command, arguments, catch_exceptions=False, standalone_mode=False)
    sides = f"trace:{path}", f"minisd:{models / 'b'}"
    bundle.write(models / "case.zip", compare(*sides), sides)
    path.unlink()
    status, told = again(models / "case.zip")
    assert status == 1 and told["culprits"] == ["unet.conv_out"]


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name.replace("_", "."), content)
    return path


@pytest.mark.parametrize("members", ({}, {"bundle_json": "{"}, {"bundle_json": "[]", "inputs_safetensors": b"x"}))
def test_what_is_no_bundle(tmp_path, members):
    with pytest.raises(CheckpointError, match="is no bundle"), bundle.opened(zipped(tmp_path / "x.zip", **members)):
        pass


def rewritten(path, name, change):
    """The bundle with one of its JSON files changed."""
    with zipfile.ZipFile(path) as old:
        members = {member: old.read(member) for member in old.namelist()}
    members[name] = change(json.loads(members[name]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member, content in members.items():
            new.writestr(member, content)
    return path


def test_nothing_in_a_bundle_is_executed(models, monkeypatch):
    """A side that is code would run; the file beside the bundle is not even looked for."""
    _, path = saved(models)
    (models / "evil.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(models)
    rewritten(path, "bundle.json", lambda about: json.dumps(about | {"sides": ["python:evil:go", about["sides"][1]]}))
    with pytest.raises(CheckpointError, match="names the side 'python:evil:go'"), bundle.opened(path):
        pass
    with pytest.raises(ValueError, match="a bundle holds two sides"):
        bundle.write(models / "x.zip", saved(models)[0], ("python:evil:go", "minisd:emoji"))


@pytest.mark.parametrize(
    ("name", "content"),
    (
        ("bundle.json", "[" * 100_000),
        ("bundle.json", " " * 30_000_000),
        ("verdict.json", '{"word": "\u001b[31mall is well"}'),
        ("verdict.json", "[]"),
    ),
)
def test_broken_members(models, name, content):
    _, path = saved(models)
    rewritten(path, name, lambda _: content)
    with pytest.raises(CheckpointError, match=r"is no bundle|claims 30,000,000 bytes"), bundle.opened(path):
        pass


def test_bad_names(models):
    for arguments in (["nothing.zip"], [str(models / "case.zip"), "minisd:emoji"], ["--demo", "--save", "x.zip"]):
        saved(models)
        result = CliRunner().invoke(parity, arguments)
        assert isinstance(result.exception, ValueError | FileNotFoundError)
    save_file({"x": torch.zeros(1)}, models / "x.safetensors")
    (models / "not.zip").write_bytes((models / "x.safetensors").read_bytes())
    assert isinstance(CliRunner().invoke(parity, [str(models / "not.zip")]).exception, CheckpointError)
