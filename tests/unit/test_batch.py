"""`minisd sample`: the same shards whoever makes them, and however often that is interrupted."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import minisd.cli
from minisd.batch import shards
from minisd.batch.plan import Plan
from minisd.batch.prompts import Row, read_prompts
from tests.command import Result
from tests.unit.tiny import tiny_model

pytest.importorskip("webdataset")
SETTINGS = "--per-prompt 3 --shard-size 4 --batch 2 --steps 2 --threads 1 -q".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save(place)
    return place


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "cat"}, {"prompt": "red cat", "steps": 1, "seed": 7}, {"prompt": "red", "size": "64x72"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def sample(model, monkeypatch, capsys):
    def run(*arguments) -> Result:
        given = ["--model", str(model), *SETTINGS, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["minisd", "sample", *given])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            minisd.cli.main()
        return Result(caught.value.code, *capsys.readouterr())

    return run


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".tar"}


@pytest.fixture
def whole(sample, prompts, tmp_path):
    assert not sample(prompts, tmp_path / "whole").status
    return content(tmp_path / "whole")


# ---------------------------------------------------- what to make


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n\n", "holds no prompt"),
        ("p.csv", "text\ncat\n", "has no column 'prompt'"),
        ("p.csv", "prompt,seed\ncat,1\ndog,x\n", "p.csv, line 3: seed=x: must be a whole number"),
        ("p.csv", "prompt,seed\ncat,1,2\n", "line 2: has more fields"),
        ("p.csv", "prompt,sead\ncat,1\n", "line 2: column 'sead': must be one of prompt,"),
        ("p.jsonl", '{"prompt": "cat"}\n\n{"prompt": 3}\n', "line 3: has no prompt"),
        ("p.jsonl", '{"prompt": "cat"}\n{"prompt\n', "line 2: is not JSON"),
        ("p.jsonl", '["cat"]', "line 1: ['cat']: must be an object"),
        ("p.jsonl", '{"prompt": "cat", "steps": 1.5}', "steps=1.5: must be a whole number"),
        ("p.jsonl", '{"prompt": "cat", "size": "big"}', "width=big: must be a whole number"),
        ("p.parquet", "cat", "cannot be read"),
        ("p.doc", "cat", "must end in .txt, .csv"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, name, text, words):
    if name == "p.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        read_prompts(tmp_path / name)
    assert words in str(caught.value)


def test_prompts_of_every_kind(tmp_path):
    (tmp_path / "p.txt").write_text("cat\n\nred cat \n")
    assert read_prompts(tmp_path / "p.txt") == [Row(1, "cat"), Row(3, "red cat")]
    (tmp_path / "p.csv").write_text('prompt,negative,size,guidance\n"cat, red",blue,64,\nx,,8x16,2.5\n')
    rows = [Row(2, "cat, red", negative_prompt="blue", width=64, height=64)]
    rows.append(Row(3, "x", width=8, height=16, guidance_scale=2.5))
    assert read_prompts(tmp_path / "p.csv") == rows
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    parquet.write_table(Table.from_pylist([{"prompt": "cat", "seed": 3}, {"prompt": "x"}]), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == [Row(1, "cat", seed=3), Row(2, "x")]


def test_seed_shard_and_batch_follow_from_the_index_alone():
    rows = [Row(1, "a"), Row(2, "b", steps=3), Row(3, "c", seed=5)]
    plan = Plan(rows, per_prompt=3, shard_size=4, batch=2, seed=2**32 - 2, settings={})
    assert (plan.total, list(plan.shards)) == (9, [0, 1, 2])
    items = [item for shard in plan.shards for item in plan.items(shard)]
    assert [item.index for item in items] == list(range(9))
    assert [item.seed for item in items] == [2**32 - 2, 2**32 - 1, 0, 1, 2, 3, 5, 6, 7]
    assert [[[item.index for item in batch] for batch in plan.batches(shard)] for shard in plan.shards] == [
        [[0, 1], [2], [3]],
        [[4, 5], [6, 7]],
        [[8]],
    ]


# ---------------------------------------------------- shards


def test_a_picture_is_what_generate_makes(sample, prompts, model, tmp_path):
    assert not sample(prompts, tmp_path / "out", "--batch", "1").status
    found = dict(shards.read_samples(tmp_path / "out"))
    assert list(found) == [f"{index:09}" for index in range(9)]
    told = json.loads(found["000000004"]["json"])
    assert (told["prompt"], told["seed"], told["steps"], told["width"]) == ("red cat", 8, 1, 64)
    assert json.loads(found["000000008"]["json"])["height"] == 72
    (picture,) = minisd.StableDiffusion.load(model).text_to_image("red cat", seed=8, steps=1)
    import io

    from PIL import Image

    assert Image.open(io.BytesIO(found["000000004"]["png"])).tobytes() == picture.tobytes()


def test_webdataset_reads_them(whole, tmp_path):
    import webdataset

    urls = [str(tmp_path / "whole" / name) for name in whole]
    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    samples = list(data.decode("pil"))
    assert [one["txt"] for one in samples][2:5] == ["cat", "red cat", "red cat"]
    assert samples[0]["png"].size == (64, 64) and samples[0]["json"]["index"] == 0


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_other_formats_hold_the_same(sample, prompts, whole, tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    assert not sample(prompts, tmp_path / kind, "--format", kind).status
    assert list(shards.read_samples(tmp_path / kind)) == list(shards.read_samples(tmp_path / "whole"))


def test_workers_make_the_same_bytes_in_any_order(sample, prompts, whole, tmp_path, monkeypatch):
    out = tmp_path / "split"
    sample(prompts, out, "--worker", "3/3")
    assert list(content(out)) == ["00002.tar"]
    told = sample(prompts, out, "--worker", "1/3").stdout
    assert told.startswith("5 of 9 pictures, 2 of 3 shards")
    monkeypatch.setenv("RANK", "1")  # as torchrun says it
    monkeypatch.setenv("WORLD_SIZE", "3")
    sample(prompts, out)
    assert content(out) == whole


def test_what_is_done_stays_and_what_is_missing_is_made(sample, prompts, whole, tmp_path):
    out = tmp_path / "whole"
    (out / "00001.json").unlink()
    (out / "00001.tar").write_bytes(b"half")
    (out / "00002.tar").unlink()
    before = (out / "00000.tar").stat().st_mtime_ns
    assert not sample(prompts, out).status
    assert content(out) == whole and (out / "00000.tar").stat().st_mtime_ns == before
    done = json.loads((out / "00001.json").read_text())
    assert done["count"] == 4 and done["sha256"] == shards.checksum(out / "00001.tar")


CHANGES = ("--seed 1", "--guidance 3", "--batch 3", "--eta 1", "--threads 2", "prompts", "model")


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_of_other_settings_is_refused(sample, prompts, whole, tmp_path, change):
    if change == "prompts":
        prompts.write_text(prompts.read_text().replace("red cat", "red"))
        change = ""
    if change == "model":
        tiny_model(seed=1).save(tmp_path / "other")
        change = f"--model {tmp_path / 'other'}"
    result = sample(prompts, tmp_path / "whole", *change.split())
    assert (result.status, result.stdout) == (2, "")
    assert "was begun with other settings" in result.stderr and result.stderr.count("\n") == 1
    assert content(tmp_path / "whole") == whole


def test_a_folder_of_something_else_is_refused(sample, prompts, tmp_path):
    result = sample(prompts, tmp_path)
    assert result.status == 2 and "is not empty" in result.stderr
    assert "was not made by minisd sample" in sample("--status", tmp_path).stderr


def test_rows_that_the_model_cannot_make(sample, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,size\ncat,64\ncat,65x64\n")
    result = sample(tmp_path / "p.csv", tmp_path / "out")
    assert result.status == 2 and "line 3: width=65: must be a positive multiple of 8" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("worker", ["0/3", "4/3", "1", "a/b"])
def test_workers_count_from_one(sample, prompts, tmp_path, worker):
    assert "must be K/N with K from 1 to N" in sample(prompts, tmp_path / "out", "--worker", worker).stderr


def test_a_full_disk_leaves_no_half_shard(sample, prompts, tmp_path, monkeypatch):
    import webdataset

    write = webdataset.TarWriter.write

    def full(self, obj):
        if obj["__key__"] == "000000006":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, obj)

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    result = sample(prompts, tmp_path / "out")
    assert result.status == 2 and result.stderr.count("\n") == 1 and "No space left" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.json", "00000.tar", "sample.json"]


def test_status_and_grid(sample, prompts, tmp_path):
    result = sample(prompts, tmp_path / "grid", "scheduler=ddim,euler", "--grid", "guidance=2,2.5", "--json")
    assert not result.status, result.stderr
    told = [json.loads(line) for line in result.stdout.splitlines()]
    names = [f"guidance={scale},scheduler={name}" for scale in ("2", "2.5") for name in ("ddim", "euler")]
    assert [one["output"] for one in told] == [str(tmp_path / "grid" / name) for name in names]
    assert {one["pictures"] for one in told} == {9}
    assert "9 of 9 pictures, 3 of 3 shards" in sample("--status", tmp_path / "grid" / names[0]).stdout
    for wrong in ("colour=1", "steps", "steps=x"):
        assert sample(prompts, tmp_path / "grid", "--grid", wrong).status == 2


# ---------------------------------------------------- interrupted


def started(model, prompts, out, *more):
    command = [
        sys.executable,
        "-m",
        "minisd",
        "sample",
        str(prompts),
        str(out),
        "--model",
        str(model),
        *SETTINGS,
        *more,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_any_moment(model, prompts, whole, tmp_path):
    chance, out = random.Random(0), tmp_path / "killed"
    for _ in range(4):
        processes = [started(model, prompts, out, "--worker", f"{number}/2") for number in (1, 2)]
        time.sleep(chance.uniform(2, 5))
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    for number in (1, 2):
        assert started(model, prompts, out, "--worker", f"{number}/2").wait() == 0
    assert content(out) == whole


@pytest.mark.slow
def test_on_ray(model, prompts, whole, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "ray"
    process = started(model, prompts, out, "--on", "ray")
    deadline = time.time() + 60
    while not list(out.glob("[0-9]*.json")) and time.time() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)  # the driver
    process.wait()
    assert started(model, prompts, out, "--on", "ray").wait() == 0
    assert content(out) == whole
