"""Fetching from the hub, for real, from a small hub on this machine: what is fetched, what is said, what is kept."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from safetensors.torch import load_file, save_file

from minisd.checkpoint import hub as sources
from minisd.pipeline import StableDiffusion
from tests.unit.tiny import equal, tiny_model

NAME = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOT_NEEDED = {
    "README.md": b"# A card",
    "v1-5-pruned-emaonly.safetensors": b"the whole model in one file",
    "v1-5-pruned.ckpt": b"and as a pickle",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"raw weights",
    "text_encoder/pytorch_model.bin": b"a pickle",
    "vae/diffusion_pytorch_model.bin": b"a pickle",
    "safety_checker/config.json": b"{}",
    "safety_checker/model.safetensors": b"a gigabyte, really",
    "feature_extractor/preprocessor_config.json": b"{}",
}
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


class Hub:
    """One repository behind the two kinds of address that huggingface_hub asks for: what there is, and a file."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.tokens: set[str | None] = set()
        self.fetched: list[str] = []
        self.cut: set[str] = set()  # files whose first half is sent once, then nothing
        self.served: dict[str, bytes] = {}  # other bytes than those that were promised
        self.resumed: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.tokens.add(request.headers["Authorization"])
        path = urlsplit(request.path).path
        content = self.content(path)
        status, headers = self.refusal or (200, {})
        if content is None and self.refusal is None:
            status, headers = 404, {"X-Error-Code": "RepoNotFound" if NAME not in path else "EntryNotFound"}
        body = content if status == 200 else b'{"error": "no"}'
        file = path.partition(f"{COMMIT}/")[2]
        headers |= {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        body = self.served.get(file, body)
        first = int((request.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if first:
            self.resumed.append(file)
            status, headers = 206, headers | {"Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"}
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body) - first)}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            end = len(body) // 2 if file in self.cut else len(body)
            self.cut.discard(file)
            request.wfile.write(body[first:end])
            if status == 200 and "/resolve/" in path:
                self.fetched.append(file)

    def content(self, path: str) -> bytes | None:
        if path.startswith(f"/{NAME}/resolve/"):
            return self.files.get(path.partition(f"/{NAME}/resolve/")[2].partition("/")[2])
        api = f"/api/models/{NAME}"
        if path.startswith(f"{api}/tree/"):
            rows = [{"type": "file", "path": name, **self.about(name)} for name in self.files]
            return json.dumps(rows).encode()
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name, **self.about(name)} for name in self.files]
            return json.dumps({"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings}).encode()
        return None

    def about(self, name: str) -> dict:
        content = self.files[name]
        about = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()  # "sha256" of a model, "oid" in a tree
            about["lfs"] = {"size": len(content), "sha256": digest, "oid": digest, "pointerSize": 134}
        return about

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A repository as SD 1.5's is: the model in diffusers' layout, its half-precision twin, and much besides."""
    folder = tmp_path_factory.mktemp("repository") / "tiny"
    tiny_model().save(folder)
    for name in WEIGHTS.values():
        half = {key: tensor.half() for key, tensor in load_file(folder / name).items()}
        save_file(half, (folder / name).with_suffix(".fp16.safetensors"))
    model = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return model | NOT_NEEDED


@pytest.fixture
def hub(files):
    hub = Hub(files)
    yield hub
    hub.close()


FIND = """
import sys, minisd
from minisd.checkpoint.hub import resolve
try:
    print(resolve(sys.argv[1], half=sys.argv[2:] == ["half"]))
except minisd.CheckpointError as error:
    sys.exit(f"CheckpointError: {error}")
"""
LOAD = """
import sys, torch, minisd
sd = minisd.StableDiffusion.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(sd.dtype, sd.unet.conv_in.bias.double().sum().item())
"""


@pytest.fixture
def run(hub, tmp_path):
    """Find or load the model in a process of its own, which knows no hub but ours."""

    def run(*arguments: str, program: str = FIND, **environment: str):
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        ours = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", program, *(arguments or [NAME])]
        return subprocess.run(
            command, env=inherited | ours | environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
        )

    return run


def refused(result, *words: str) -> bool:
    """Did it end with a CheckpointError of one line with these words in it?"""
    lines = result.stderr.splitlines()
    return result.returncode == 1 and lines[-1].startswith("CheckpointError: ") and all(w in lines[-1] for w in words)


@pytest.mark.parametrize(("dtype", "ending"), (("float32", ".safetensors"), ("bfloat16", ".fp16.safetensors")))
def test_only_what_is_needed_is_fetched_once(hub, run, files, tmp_path, dtype, ending):
    result = run(NAME, dtype, program=LOAD)
    assert result.returncode == 0 and result.stdout.split()[0] == f"torch.{dtype}", result.stderr
    weights = {name.replace(".safetensors", ending) for name in WEIGHTS.values()}
    others = {name for name in files if name not in NOT_NEEDED and not name.endswith(".safetensors")}
    assert set(hub.fetched) == weights | others and len(hub.fetched) == len(weights | others)

    size = sum(len(files[name]) for name in hub.fetched) / 1e9
    assert f"Fetching {NAME}: {size:.2f} GB into {tmp_path / 'hf' / 'hub'}" in result.stderr.splitlines()[0]

    hub.fetched.clear()
    again = run(NAME, dtype, program=LOAD)
    assert again.stdout == result.stdout and again.returncode == 0
    assert hub.fetched == [] and again.stderr == ""


def test_the_model_is_the_one_in_the_repository(run):
    assert equal(StableDiffusion.load(run().stdout.strip()), tiny_model())


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub, run, files):
    """What is kept of a file is whole pieces: smaller ones here, as the file is small."""
    hub.cut = {WEIGHTS["unet"]}
    pieces = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1 << 16\n"
    result = run(NAME, "float32", program=pieces + LOAD)
    assert result.returncode == 0, result.stderr
    assert hub.resumed == [WEIGHTS["unet"]] and hub.cut == set()


@pytest.mark.parametrize("change", (lambda data: data[:-1] + b"!", lambda data: data[:-400], lambda data: b"<html>"))
def test_bytes_that_are_not_what_was_promised(hub, run, files, change):
    """One line, and the next try finds no trace of them."""
    name = WEIGHTS["vae"]
    hub.served = {name: change(files[name])}
    result = run()
    assert refused(result, NAME), result.stderr
    hub.served = {}
    result = run(NAME, "float32", program=LOAD)
    assert result.returncode == 0, result.stderr


def test_another_precision_fetches_only_its_weights(hub, run):
    run()
    hub.fetched.clear()
    assert run(NAME, "half").returncode == 0
    assert sorted(hub.fetched) == sorted(name.replace(".safetensors", ".fp16.safetensors") for name in WEIGHTS.values())


def test_switched_off_with_a_cache(hub, run):
    first = run(NAME, "half")
    hub.tokens.clear()
    offline = run(NAME, "half", HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout != "" and offline.returncode == 0, offline.stderr
    assert hub.tokens == set()  # nobody asked


def test_switched_off_without_a_cache(run):
    assert refused(run(HF_HUB_OFFLINE="1"), NAME, "not in the cache", "HF_HUB_OFFLINE")


def test_out_of_reach_with_a_cache(hub, run):
    first = run()
    hub.close()
    later = run()
    assert later.stdout == first.stdout != "" and later.returncode == 0, later.stderr


def test_out_of_reach_without_a_cache(hub, run):
    hub.close()
    assert refused(run(), NAME, "not in the cache", "cannot be fetched")


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    (
        (404, {"X-Error-Code": "RepoNotFound"}, "no such hub repository"),
        (401, {}, "private"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "private"),
        (403, {"X-Error-Code": "GatedRepo"}, "agree to terms"),
        (503, {}, "503"),
    ),
)
def test_refusals(hub, run, status, headers, words):
    hub.refusal = (status, headers)
    assert refused(run(), NAME, words)


def test_a_refusal_with_a_cache(hub, run):
    """A repository that was taken down since, a token that ran out: what is here is here."""
    first = run()
    hub.refusal = (404, {"X-Error-Code": "RepoNotFound"})
    assert run().stdout == first.stdout != ""


def test_impossible_names(run):
    assert refused(run("some one/tiny!"), "some one/tiny!", "no such file or folder")


def test_a_repository_of_something_else(hub, run):
    hub.files = {name: data for name, data in hub.files.items() if not name.startswith("unet/")}
    assert refused(run(), NAME, "unet/diffusion_pytorch_model.safetensors", "layout")
    assert hub.fetched == []


def test_a_vae_of_its_own(hub, run, files, tmp_path):
    """As stabilityai/sd-vae-ft-mse is: no folders. And the VAE alone out of a whole model's repository."""
    program = "import sys, minisd; minisd.StableDiffusion.load(sys.argv[1], vae=sys.argv[2])"
    model = str(tmp_path / "model")
    tiny_model().save(model)
    result = run(model, NAME, program=program)
    assert result.returncode == 0, result.stderr
    assert set(hub.fetched) == {"vae/config.json", WEIGHTS["vae"], "model_index.json"}

    hub.files = {name.removeprefix("vae/"): data for name, data in files.items() if name.startswith("vae/")}
    hub.fetched.clear()
    for environment in ({"HF_HOME": "alone"}, {"HF_HOME": "alone", "HF_HUB_OFFLINE": "1"}):
        result = run(model, NAME, program=program, **environment)
        assert result.returncode == 0, result.stderr
    assert sorted(hub.fetched) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_the_token_is_passed_on(hub, run):
    assert run(HF_TOKEN="hf_secret").returncode == 0
    assert hub.tokens == {"Bearer hf_secret"}


def test_the_command_says_it_in_one_line(hub, run):
    hub.refusal = (404, {"X-Error-Code": "RepoNotFound"})
    result = run("generate", "cat", "-m", NAME, program="import minisd.__main__")
    assert result.returncode == 2 and result.stderr.startswith(f"error: {NAME}: ")
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""


def test_sd15_is_an_alias(monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "from_hub", lambda name, **settings: asked.append((name, settings)) or Path("."))
    sources.resolve("sd15", half=True)
    assert asked == [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", {"half": True, "weights": "auto", "component": None})
    ]


def test_paths_go_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "from_hub", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    assert sources.resolve(NAME) == Path(NAME)
    for name in ("someone/typo", "nothing", "a/b/c", "a/b.safetensors", "./a", "../a", "/a/b", "~nobody/a"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            sources.resolve(name)


def test_variants_of_weights():
    """What `wanted_files` picks, without a hub: shards, raw weights, anything rather than nothing."""
    stems = [f"{part}/{stem}" for part, stem in sources.STEMS.items()]
    shards = ["-00001-of-00002.safetensors", "-00002-of-00002.safetensors", ".safetensors.index.json"]
    names = [stem + end for stem in stems for end in (*shards, ".fp16.safetensors", ".non_ema.safetensors")]

    def ends(half: bool = False, weights: str = "auto", names: list[str] = names):
        wanted = sources.wanted_files(NAME, names, half=half, weights=weights)
        return {name.removeprefix(stem) for stem in stems for name in wanted if name.startswith(stem)}

    assert ends() == set(shards)
    assert ends(half=True) == {".fp16.safetensors"}
    assert ends(weights="raw") == {".non_ema.safetensors"}
    assert ends(names=[stem + ".fp16.safetensors" for stem in stems]) == {".fp16.safetensors"}
