"""The explain page: its numbers against the model's own, and the page in a real browser with the network refused."""

import base64
import json
import sys

import numpy as np
import pytest
import torch

import minisd
import minisd.cli
from minisd.explain import causes, explain
from minisd.explain.generation import generate, spread
from minisd.explain.packing import packed, reduced
from minisd.sampling import Sampling
from minisd.tasks.values import read_values
from tests.lab.parity.test_report import chromium  # noqa: F401  # a fixture
from tests.tasks.conftest import emoji  # noqa: F401  # a fixture

PROMPT = "a red heart and a star on a blue background"
SETTINGS = {"seed": 1, "steps": 6}


@pytest.fixture(scope="module")
def found(emoji):  # noqa: F811
    return explain(emoji, PROMPT, versus={"seed": 2}, **SETTINGS)


def unpacked(one: dict) -> np.ndarray:
    levels = np.frombuffer(base64.b64decode(one["data"]), np.uint8).reshape(one["shape"])
    return one["low"] + (one["high"] - one["low"]) * levels / 255


def test_packing_keeps_values_to_a_byte():
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert np.allclose(unpacked(packed(values)), values, atol=float(values.max() - values.min()) / 500)
    assert torch.equal(reduced(torch.ones(2, 5, 64, 64), 16), torch.ones(2, 5, 16, 16))
    assert spread(20, 4) == [0, 6, 13, 19] and spread(3, 4) == [0, 1, 2]


def test_looking_changes_no_bit(emoji, found):  # noqa: F811
    assert emoji.text_to_image(PROMPT, **SETTINGS)[0] == found.picture


def test_the_numbers_are_the_models(emoji, found):  # noqa: F811
    steps, data = list(emoji.denoise(PROMPT, **SETTINGS)), found.data
    assert data["timesteps"] == [step.timestep for step in steps]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = torch.cat([noise, *(step.latents for step in steps)])
    assert np.allclose(unpacked(data["latents"]), latents, atol=0.05)
    assert np.allclose(data["norms"]["latents"], latents[:-1].square().mean((1, 2, 3)).sqrt())
    negative, positive, guided = (unpacked(data["predictions"][name]) for name in ("negative", "positive", "guided"))
    assert np.allclose(guided, negative + 4 * (positive - negative), atol=0.3)
    for (u, c, g), alpha in zip(data["plane"], data["alphas"], strict=True):  # guidance is a straight line
        assert np.allclose(np.array(g), np.array(u) + 4 * (np.array(c) - np.array(u)), atol=1e-4) and 0 < alpha < 1
    assert data["tokens"]["pieces"][0][1] == emoji.tokenizer.vocabulary["<|startoftext|>"]
    assert data["settings"]["model"] == "emoji"


def test_attention_is_the_taps(emoji, found):  # noqa: F811
    name = "unet.up.9.attention.cross_attn.probabilities"
    with emoji.taps(name, keep=True) as taps:
        list(emoji.denoise(PROMPT, **SETTINGS))
    maps = torch.stack([reading.positive[0] for reading in taps[name]])  # (steps, heads, N, 77)
    (mine,) = (layer["maps"] for layer in found.data["attention"]["layers"] if layer["name"] == "unet.up.9.attention")
    shown = maps[found.data["attention"]["steps"]][..., :12].transpose(2, 3).unflatten(-1, (16, 16))
    assert np.allclose(unpacked(mine), shown, atol=0.01)
    heart, star = (unpacked(mine)[:, :, token].mean((0, 1)) for token in (3, 6))  # <start> a red heart and a star
    assert heart[:, :8].sum() > heart[:, 8:].sum() and star[:, :8].sum() < star[:, 8:].sum()


def test_causes(emoji, found):  # noqa: F811
    """A word without which another picture comes, and what a block adds, each as a run of its own."""
    run = generate(emoji, PROMPT, Sampling(**SETTINGS))
    plain, words = causes.without_words(run)
    assert [change.name for change in words] == ["red", "heart", "star", "blue", "background"]
    alone = emoji.text_to_image("a heart and a star on a blue background", seed=1, steps=6)[0]
    assert np.abs(np.asarray(words[0].picture).astype(int) - np.asarray(alone)).max() <= 1  # batches round otherwise
    assert causes.psnr(plain, run.picture) > 40 and all(change.psnr < 60 for change in words)
    changes = causes.without_blocks(run)
    blocks = {change.name: change.psnr for change in changes}
    assert len(blocks) == 22 and blocks["unet.up.9"] < 25 < blocks["unet.middle.0"]
    edits = {"unet.up.9.resnet.conv2": lambda x, _: 0 * x, "unet.up.9.attention.proj_out": lambda x, _: 0 * x}
    with emoji.taps(edit=edits):
        alone = emoji.text_to_image(PROMPT, seed=1, steps=4)[0]
    (mine,) = (change for change in changes if change.name == "unet.up.9")
    assert np.abs(np.asarray(mine.picture).astype(int) - np.asarray(alone)).max() <= 1
    rows = causes.other_guidance(run)
    assert [round(row["share"], 2) for row in rows] == [0, 0.33, 0.67] and len(rows[0]["pictures"]) == 5
    assert causes.psnr(rows[0]["pictures"][2], plain) > 40  # the usual guidance, from the beginning


def test_where_two_runs_part(emoji, found):  # noqa: F811
    assert found.data["compare"]["parts_at"] == 0
    late = explain(emoji, PROMPT, versus={"steps": 6}, what_if=False, **SETTINGS).data["compare"]
    assert late["parts_at"] is None and max(late["distances"]) == 0


def test_without_guidance(emoji):  # noqa: F811
    page = explain(emoji, "red heart", guidance_scale=1.0, seed=1, steps=2, what_if=False)
    assert page.data["plane"] == [] and "nothing is guided" in page.html


def test_a_long_prompt_says_what_was_cut(emoji):  # noqa: F811
    with pytest.warns(UserWarning, match="cut off"):
        data = explain(emoji, "red heart " * 40, seed=1, steps=2, what_if=False).data
    assert data["tokens"]["cut"].startswith("heart red heart") and "first 14 tokens" in " ".join(data["reduced"])


@pytest.mark.parametrize(
    ("settings", "words"),
    (({"images_per_prompt": 2}, "one image"), ({"steps": 0}, "steps=0"), ({"scheduler": "x"}, "scheduler='x'")),
)
def test_impossible_settings(emoji, settings, words):  # noqa: F811
    with pytest.raises(ValueError, match=words):
        explain(emoji, "heart", **settings)
    with pytest.raises(ValueError, match="prompt: is empty"):
        explain(emoji, " ")


def test_values_by_name():
    assert read_values(["guidance=1,7.5", "sampler=euler_a"]) == {"guidance_scale": [1, 7.5], "scheduler": ["euler_a"]}
    assert read_values(["prompt=a,, b,c"]) == {"prompt": ["a, b", "c"]}
    for text in ("steps", "size=3", "steps=few"):
        with pytest.raises(ValueError, match=text):
            read_values([text])


# ------------------------------------------------ the page


def test_one_small_file(found):
    assert len(found.html.encode()) < 3_000_000 and "default-src 'none'" in found.html
    assert "srcdoc=" in found._repr_html_()


@pytest.mark.parametrize(("scheme", "width"), (("light", 1100), ("dark", 390)))
def test_in_a_browser(found, chromium, tmp_path, scheme, width):  # noqa: F811
    found.save(tmp_path / "x.html")
    heard = []
    context = chromium.new_context(color_scheme=scheme, offline=True, viewport={"width": width, "height": 800})
    tab = context.new_page()
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("request", lambda request: heard.append(request.url) if request.url.startswith("http") else None)
    tab.goto((tmp_path / "x.html").as_uri())
    assert "step 6 of 6" in tab.locator("#now").inner_text()
    before = tab.evaluate("byId('x0').toDataURL() + byId('preview').style.backgroundPosition")
    tab.keyboard.press("ArrowLeft")
    assert "step 5 of 6" in tab.locator("#now").inner_text() and tab.locator("#step").input_value() == "4"
    assert before != tab.evaluate("byId('x0').toDataURL() + byId('preview').style.backgroundPosition")
    tab.locator(".film button").first.click()
    assert "step 1 of 6" in tab.locator("#now").inner_text()
    tab.select_option("#layer", index=1)
    tab.select_option("#when", index=1)
    assert "this layer, all heads, this step" in tab.locator("#formula").inner_text()
    tab.get_by_role("button", name="up.9", exact=True).click()
    assert "unet.up.9" in tab.locator("#features-name").inner_text() and tab.locator("#features canvas").count() == 8
    assert tab.locator("#compare b").first.inner_text() == "2" and tab.locator("details pre").count() == 8
    moves = (
        "[...Array(30).keys()].map(n => { const s = performance.now(); update(n % 6); return performance.now() - s })"
    )
    assert sorted(tab.evaluate(moves))[15] < 50  # milliseconds, the median: the machine has other work
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert heard == []
    context.close()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["minisd", "explain", *arguments, "--steps", "2", "--no-what-if"])
        with pytest.raises(SystemExit) as caught:
            minisd.cli.main()
        return caught.value.code, *capsys.readouterr()

    status, out, _ = run("red heart", "-s", "1", "--json", "--versus", "guidance=1")
    told = json.loads(out)
    assert status == 0 and told["output"] == "red-heart.html" and told["compare"]["versus"] == {"guidance_scale": "1.0"}
    status, out, err = run("red heart", "-o", "y.html")
    assert status == 0 and out == "y.html\n" and err.startswith("seed ")
    for arguments, words in ((("",), "prompt: is empty"), (("x", "--versus", "nothing=1"), "must be NAME=VALUE")):
        status, out, err = run(*arguments, "-o", "no.html")
        assert (status, out) == (2, "") and words in err and not (tmp_path / "no.html").exists()
