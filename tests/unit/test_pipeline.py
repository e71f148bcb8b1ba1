"""StableDiffusion as people use it: the loop, randomness, batches, and every setting that is impossible."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch

import minisd
from minisd.pipeline import StableDiffusion, to_pictures
from minisd.sampling import Step
from minisd.schedulers import NAMES
from minisd.tokenizer import CLIPTokenizer
from tests.ids import stable_id
from tests.unit.tiny import equal, tiny_model


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return tiny_model()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(pictures) -> np.ndarray:
    """Pictures -> (B, H, W, 3), as signed numbers."""
    return np.stack([np.asarray(picture).astype(int) for picture in pictures])


def same(one, other) -> bool:
    return np.array_equal(pixels(one), pixels(other))


# ------------------------------------------------ the loop


def test_pictures_are_rgb_of_the_models_size(sd):
    (picture,) = sd.text_to_image("cat", steps=2, seed=1)
    assert picture.size == (64, 64) and picture.mode == "RGB"


def test_width_and_height_are_not_swapped(sd):
    (picture,) = sd.text_to_image("cat", steps=1, seed=1, width=72, height=40)
    assert picture.size == (72, 40)


def test_steps_of_the_loop(sd):
    steps = list(sd.denoise("cat", steps=4, seed=1, images_per_prompt=2, height=40))
    assert all(isinstance(step, Step) for step in steps)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.timestep for step in steps] == [751, 501, 251, 1]
    assert {tuple(tensor.shape) for step in steps for tensor in (step.latents, step.x0)} == {(2, 4, 5, 8)}
    assert not any(torch.equal(one.latents, two.latents) for one, two in itertools.pairwise(steps))


def test_the_loop_ends_where_text_to_image_does(sd):
    *_, last = sd.denoise("cat", steps=3, seed=1)
    with torch.no_grad():
        assert same(to_pictures(sd.decode(last.latents)), sd.text_to_image("cat", steps=3, seed=1))


def test_the_loop_is_lazy_and_can_be_left(sd, monkeypatch):
    calls = []
    forward = sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    denoising = sd.denoise("cat", steps=50, seed=1)
    assert calls == []
    first, second = next(denoising), next(denoising)
    assert len(calls) == 2 and (first.index, second.index) == (0, 1)
    denoising.close()
    assert list(denoising) == [] and len(calls) == 2


def test_two_loops_at_once(sd):
    """Nothing of a run is kept in the model: each loop has a scheduler of its own."""
    alone = [step.latents for step in sd.denoise("cat", steps=3, seed=1)]
    together = zip(sd.denoise("cat", steps=3, seed=1), sd.denoise("red", steps=3, seed=2), strict=True)
    assert all(torch.equal(one.latents, latents) for (one, _), latents in zip(together, alone, strict=True))


def test_guidance_of_one_asks_once(sd, monkeypatch):
    """Without guidance the UNet sees the prompt only. (128 pixels: this toy's norms want more than one value.)"""
    batches = []
    forward = sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda x, *rest: batches.append(len(x)) or forward(x, *rest))
    list(sd.denoise("cat", steps=1, seed=1, guidance_scale=1.0, height=128, width=128))
    list(sd.denoise("cat", steps=1, seed=1, guidance_scale=1.5))
    assert batches == [1, 2]


@pytest.mark.parametrize(
    "settings",
    (
        {"guidance_scale": 3.0},
        {"guidance_rescale": 0.7},
        {"negative_prompt": "red"},
        {"eta": 1.0},
        {"scheduler": "ddpm"},
        {"steps": 3},
        {"seed": 2},
        {"clip_skip": 1},
    ),
    ids=stable_id,
)
def test_every_setting_matters(sd, settings):
    plain = {"prompt": "cat", "steps": 2, "seed": 1}
    *_, one = sd.denoise(**plain)
    *_, other = sd.denoise(**plain | settings)
    assert not torch.equal(one.latents, other.latents)


def test_gradients(sd):
    """Painting keeps no graph, and leaves the caller's mode alone."""
    assert torch.is_grad_enabled()
    for step in sd.denoise("cat", steps=2, seed=1):
        assert not step.latents.requires_grad and not step.x0.requires_grad
        assert torch.is_grad_enabled()
    sd.text_to_image("cat", steps=1, seed=1)
    assert torch.is_grad_enabled() and all(parameter.grad is None for parameter in sd.unet.parameters())


def test_painting_changes_nothing(sd):
    before = copy.deepcopy([sd.unet, sd.vae, sd.text_encoder, sd.config, sd.generation])
    sd.text_to_image(["cat", "red"], steps=2, seed=1, eta=0.5)
    for module, twin in zip([sd.unet, sd.vae, sd.text_encoder], before, strict=False):
        state, old = module.state_dict(), twin.state_dict()
        assert state.keys() == old.keys() and all(torch.equal(state[name], old[name]) for name in state)
        assert not module.training
    assert [sd.config, sd.generation] == before[3:]


# ------------------------------------------------ randomness


@pytest.mark.parametrize("settings", ({}, {"eta": 1.0}, {"scheduler": "ddpm"}), ids=stable_id)
def test_a_seed_is_a_generator_is_a_picture(sd, settings):
    one = sd.text_to_image("cat", steps=2, seed=5, **settings)
    assert same(one, sd.text_to_image("cat", steps=2, seed=5, **settings))
    assert same(one, sd.text_to_image("cat", steps=2, generator=seeded(5), **settings))
    assert same(one, sd.text_to_image("cat", steps=2, generator=[seeded(5)], **settings))
    assert not same(one, sd.text_to_image("cat", steps=2, seed=6, **settings))


@pytest.mark.parametrize("seed", (0, 2**63 - 1, 2**64 - 1, -1))
def test_extreme_seeds(sd, seed):
    assert same(sd.text_to_image("cat", steps=1, seed=seed), sd.text_to_image("cat", steps=1, seed=seed))


def test_a_generator_goes_on(sd):
    generator = seeded(5)
    first, second = (sd.text_to_image("cat", steps=1, generator=generator) for _ in range(2))
    assert not same(first, second)


@pytest.mark.parametrize("scheduler", NAMES)
def test_no_step_waits_for_an_accelerator(scheduler, monkeypatch):
    """On the meta device in its place: there every reading of a value is an error, since there is none."""
    sd = tiny_model()
    for module in sd.modules.values():
        module.to("meta")
    monkeypatch.setattr("minisd.warn.tell_first", lambda asked: False)  # the one question, after the last step
    settings = {"steps": 5, "eta": 0.5 if scheduler == "ddim" else 0, "generator": torch.Generator()}
    latents = torch.zeros(2, 4, 8, 8, device="meta")
    *_, last = sd.denoise("cat", scheduler=scheduler, latents=latents, images_per_prompt=2, **settings)
    assert last.latents.device.type == "meta" and isinstance(last.timestep, int)


def test_the_prompt_is_tokenized_once(sd, monkeypatch):
    asked, ids = [], CLIPTokenizer.ids
    monkeypatch.setattr(CLIPTokenizer, "ids", lambda self, text: asked.append(text) or ids(self, text))
    next(sd.denoise("cat", negative_prompt="red", guidance_scale=2, steps=1))
    assert sorted(asked) == ["cat", "red"]


def test_large_images_are_decoded_in_tiles(sd, monkeypatch):
    latents, sizes, decode = torch.randn(1, 4, 12, 9), [], sd.vae.decode
    monkeypatch.setattr(sd.vae, "decode", lambda z: sizes.append(z.shape[2:]) or decode(z))
    for from_, tile, tiled in (
        (10**9, None, False),
        (12 * 9 * 64 - 1, None, True),
        (0, False, False),
        (10**9, True, True),
    ):
        monkeypatch.setattr("minisd.pipeline.TILED_FROM", from_)
        monkeypatch.setattr(sd, "tile", tile)
        sizes.clear()
        assert sd.decode(latents).shape == (1, 3, 96, 72)
        assert sizes == ([(8, 8), (8, 3), (6, 8), (6, 3)] if tiled else [(12, 9)])


def test_a_seed_leaves_the_global_generator_alone(sd):
    before = torch.get_rng_state()
    sd.text_to_image("cat", steps=2, seed=1, eta=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_given_latents(sd):
    noise = torch.randn(1, 4, 8, 8, generator=seeded(5))
    kept = noise.clone()
    assert same(sd.text_to_image("cat", steps=2, latents=noise), sd.text_to_image("cat", steps=2, seed=5))
    assert torch.equal(noise, kept)


def test_a_scheduler_of_ones_own(sd):
    scheduler = minisd.DDIMScheduler.from_config(sd.config.scheduler, timestep_spacing="trailing")
    steps = list(sd.denoise("cat", steps=2, seed=1, scheduler=scheduler))
    assert [step.timestep for step in steps] == [999, 499]


# ------------------------------------------------ batches

# What a batch changes: libraries sum in another order for another batch size. Measured: latents of spread 4 by at most
# 2e-6, so that a pixel between two bytes may fall on either side. The noise that it starts from is equal bit for bit.
LATENTS, BYTES = 2e-5, 1


@pytest.mark.parametrize("settings", ({}, {"eta": 1.0}, {"scheduler": "ddpm"}), ids=stable_id)
def test_a_batch_generates_what_its_members_generate_alone(sd, settings):
    seeds = [3, 4, 5]
    settings = {"steps": 3, **settings}
    *_, last = sd.denoise("cat", images_per_prompt=3, generator=[seeded(seed) for seed in seeds], **settings)
    batch = sd.text_to_image("cat", images_per_prompt=3, generator=[seeded(seed) for seed in seeds], **settings)
    for index, seed in enumerate(seeds):
        *_, alone = sd.denoise("cat", seed=seed, **settings)
        assert (last.latents[index : index + 1] - alone.latents).abs().max() <= LATENTS
        difference = pixels(batch[index : index + 1]) - pixels(sd.text_to_image("cat", seed=seed, **settings))
        assert abs(difference).max() <= BYTES


def test_the_noise_of_a_batch_is_its_members_noise(sd):
    noise = sd.initial_noise((3, 4, 8, 8), [seeded(seed) for seed in (3, 4, 5)], None)
    for index, seed in enumerate((3, 4, 5)):
        assert torch.equal(noise[index : index + 1], sd.initial_noise((1, 4, 8, 8), seeded(seed), None))


def test_the_order_of_a_batch(sd):
    """Prompt by prompt, each `images_per_prompt` times."""
    prompts, negatives = ["cat", "red"], ["", "cat"]
    generators = [seeded(seed) for seed in range(4)]
    batch = sd.text_to_image(prompts, negative_prompt=negatives, steps=2, images_per_prompt=2, generator=generators)
    for index, picture in enumerate(batch):
        settings = {"negative_prompt": negatives[index // 2], "seed": index, "steps": 2}
        alone = sd.text_to_image(prompts[index // 2], **settings)
        assert abs(pixels([picture]) - pixels(alone)).max() <= BYTES


@torch.no_grad()
def test_the_order_of_the_context(sd):
    """The negative half first, then the prompts; each text stands where its pictures do. (Texts hardly change what
    this toy generates, so that pictures would not tell.)"""
    prompts, negatives = ["cat", "red"], ["", "re"]
    context = sd.encode_prompt(prompts, negatives, images_per_prompt=2)
    texts = [*negatives, *prompts]
    alone = torch.cat([sd.encode_prompt([text], None) for text in texts])
    distances = torch.cdist(context.flatten(1), alone.flatten(1))
    assert distances.argmin(dim=1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert distances.min(dim=1).values.max() < 1e-3 < distances.topk(2, dim=1, largest=False).values[:, 1].min()


def test_one_negative_prompt_serves_all(sd):
    settings = {"steps": 2, "seed": 1}
    one = sd.text_to_image(["cat", "red"], negative_prompt="re", **settings)
    assert same(one, sd.text_to_image(["cat", "red"], negative_prompt=["re", "re"], **settings))


# ------------------------------------------------ the impossible


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"seed": 1, "generator": seeded(1)}, "seed and generator"),
        ({"seed": "lucky"}, "seed='lucky'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"steps": 0}, "steps=0"),
        ({"steps": -3}, "steps=-3"),
        ({"steps": 1001}, "steps=1001"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"steps": "9"}, "steps=9"),
        ({"steps": True}, "steps=True"),
        ({"prompt": []}, "^prompt="),
        ({"prompt": 3}, "^prompt=3"),
        ({"prompt": None}, "^prompt=None"),
        ({"prompt": ["cat", 3]}, "^prompt="),
        ({"prompt": b"cat"}, "^prompt="),
        ({"prompt": "cat \udcff"}, "not valid Unicode"),
        ({"negative_prompt": None}, "negative_prompt=None"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 for 1"),
        ({"negative_prompt": ["a"], "prompt": ["a", "b"]}, "negative_prompt: 1 for 2"),
        ({"height": 100}, "height=100: .* multiple of 8"),
        ({"width": 4}, "width=4"),
        ({"width": 0}, "width=0"),
        ({"height": -8}, "height=-8"),
        ({"height": 64.0}, "height=64.0"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents have the shape \(1, 4, 4, 4\): must be \(1, 4, 8, 8\)"),
        ({"latents": torch.zeros(4, 8, 8)}, "latents have the shape"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"guidance_scale": "7"}, "guidance_scale=7"),
        ({"guidance_scale": [1.0]}, "guidance_scale="),
        ({"guidance_rescale": float("nan")}, "guidance_rescale=nan"),
        ({"guidance_rescale": -0.5}, "guidance_rescale=-0.5"),
        ({"eta": -0.1}, "eta=-0.1"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"scheduler": "eular"}, "scheduler='eular': must be one of ddim, ddpm"),
        ({"clip_skip": 2}, "clip_skip=2: must be a whole number from 0 to 1"),
        ({"clip_skip": -1}, "clip_skip=-1"),
        ({"clip_skip": 0.5}, "clip_skip=0.5"),
        ({"images_per_prompt": 0}, "images_per_prompt=0"),
        ({"images_per_prompt": 2.0}, "images_per_prompt=2.0"),
        ({"images_per_prompt": 3, "generator": [seeded(1), seeded(2)]}, "generator: 2 given; must be .* 3 samples"),
        ({"generator": []}, "generator: 0 given"),
    ),
    ids=stable_id,
)
def test_impossible_settings(sd, settings, words):
    with pytest.raises(ValueError, match=words):
        sd.text_to_image(**{"prompt": "cat", "steps": 2, **settings})


def test_unknown_settings(sd):
    with pytest.raises(TypeError, match="cfg"):
        sd.text_to_image("cat", cfg=7)


@pytest.mark.parametrize(
    "settings", ({"device": "toaster"}, {"device": "meta"}, {"dtype": torch.int8}, {"dtype": "half"})
)
def test_impossible_ways_to_load(sd, tmp_path, settings):
    sd.save(tmp_path / "model")
    with pytest.raises(ValueError, match=next(iter(settings))):
        StableDiffusion.load(tmp_path / "model", **settings)


# ------------------------------------------------ kept and loaded again


@pytest.mark.parametrize("layout", ("diffusers", "compvis"))
def test_recommended_settings_are_kept(sd, tmp_path, layout):
    model = copy.copy(sd)
    model.generation = {"steps": 12, "guidance_scale": 4.5}
    model.save(tmp_path / "model", layout=layout)
    again = StableDiffusion.load(tmp_path / "model")
    assert again.generation == {"steps": 12, "guidance_scale": 4.5} and equal(again, sd)
    assert sd.generation == {}


@pytest.mark.parametrize("layout", ("diffusers", "compvis"))
def test_a_saved_model_generates_the_same(sd, tmp_path, layout):
    sd.save(tmp_path / "model", layout=layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = StableDiffusion.load(tmp_path / "model")
    assert same(again.text_to_image("cat", steps=2, seed=1), sd.text_to_image("cat", steps=2, seed=1))


def test_saved_files_can_be_read_by_others(sd, tmp_path):
    """They get the permissions of any new file."""
    (tmp_path / "any").touch()
    sd.save(tmp_path / "folder")
    sd.save(tmp_path / "model.safetensors", layout="compvis")
    saved = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in saved} == {(tmp_path / "any").stat().st_mode}


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_paints(sd, tmp_path, dtype):
    sd.save(tmp_path / "model")
    half = StableDiffusion.load(tmp_path / "model", dtype=dtype)
    (step,) = half.denoise("cat", steps=1, seed=1)
    assert step.latents.dtype == dtype and step.latents.isfinite().all()
    assert half.text_to_image("cat", steps=1, seed=1)[0].size == (64, 64)
