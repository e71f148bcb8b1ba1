"""The scripts that train a LoRA and a word: what they learn is in the file, and nothing else has moved."""

from dataclasses import replace

import pytest
import torch
import train_embedding
import train_lora
from emoji_data import FULL, draw_scene
from latent_bank import Bank, draw_batch
from safetensors.torch import load_file
from train_text_to_image import Denoiser, learn

from minisd.adapters.writing import write_embedding, write_lora
from minisd.config import SD15
from minisd.pipeline import StableDiffusion
from minisd.schedulers import DDPMScheduler

STEPS = 8


@pytest.fixture
def sd():
    return StableDiffusion.load()


@pytest.fixture(scope="module")
def bank():
    """A few latents of nothing in particular, a quarter of the usual size."""
    mean = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Bank([draw_scene(0, index, FULL) for index in range(16)], mean, torch.full_like(mean, 0.1))


def snapshot(sd) -> dict:
    states = {"unet": sd.unet.state_dict(), "text_encoder": sd.text_encoder.state_dict()}
    return {f"{part}.{name}": tensor.clone() for part, state in states.items() for name, tensor in state.items()}


def loss(sd, bank) -> float:
    """On the batches that were trained on."""
    denoiser = Denoiser()
    denoiser.text_encoder, denoiser.unet = sd.text_encoder, sd.unet
    scheduler = DDPMScheduler.from_config(SD15.scheduler)
    with torch.enable_grad():
        sd.unet.conv_in.weight.requires_grad_(True)
        losses = [learn(denoiser, draw_batch(bank, sd.tokenizer, 4, step), scheduler).item() for step in range(3)]
    sd.unet.zero_grad()
    sd.unet.conv_in.weight.requires_grad_(False)
    return sum(losses) / len(losses)


def test_a_lora(sd, bank, tmp_path):
    before, at_first = snapshot(sd), loss(sd, bank)
    factors = train_lora.new_factors(sd, 2)
    assert len(factors) == 16 * 12 and all(not up.any() for _, up in factors.values())
    losses = train_lora.train(sd, bank, factors, steps=STEPS, batch=4, peak=5e-3)
    still = {target.minisd for target, (_, up) in factors.items() if not up.any()}
    assert still == {"middle.0.attention.self_attn.q", "middle.0.attention.self_attn.k"}  # 1 x 1: nowhere else to look
    assert len(losses) == STEPS
    after = snapshot(sd)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks for module in sd.unet.modules())
    path = write_lora(tmp_path / "a.safetensors", factors, dtype=torch.float32)
    sd.load_lora(path)
    assert loss(sd, bank) < at_first
    for target, (down, up) in factors.items():
        stored = sd.adapters.loras[0].lora.changes[target.weight].path()
        assert torch.equal(stored.down, down) and torch.equal(stored.up, up)


def test_a_word(sd, bank, tmp_path):
    sd.load_embedding(train_embedding.first_vectors(sd, 2), "heart-of-gold")
    table = sd.text_encoder.token_embedding.weight
    bank = Bank(bank.scenes, bank.mean, bank.std)
    before, first = snapshot(sd), table.detach().clone()
    with pytest.MonkeyPatch.context() as patch:
        for scene in bank.scenes:
            for figure in scene.figures:
                patch.setitem(train_embedding.EMOJI, figure.character, ("heart-of-gold",))
        at_first = loss(sd, bank)
        train_embedding.train(sd, bank, "heart-of-gold", steps=STEPS, batch=4, peak=5e-2)
        assert loss(sd, bank) < at_first
    after = snapshot(sd)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["text_encoder.token_embedding.weight"]
    assert torch.equal(table[:-2], first[:-2]) and (table[-2:] != first[-2:]).any(dim=1).all()
    path = write_embedding(tmp_path / "w.safetensors", "heart-of-gold", sd.adapters.embeddings["heart-of-gold"])
    assert torch.equal(load_file(path)["heart-of-gold"], table[-2:])
    fresh = StableDiffusion.load()
    fresh.load_embedding(path)
    assert torch.equal(fresh.text_encoder.token_embedding.weight, table)


def test_scenes_of_the_new_thing():
    """Each begins with it; grounds, places and company are what the model knows."""
    scenes = train_lora.scenes_of("🦩", 20)
    known = [draw_scene(train_lora.SEED, index, FULL) for index in range(20)]
    assert all(scene.figures[0].character == "🦩" for scene in scenes)
    for scene, like in zip(scenes, known, strict=True):
        assert replace(scene, figures=()) == replace(like, figures=()) and scene.figures[1:] == like.figures[1:]
