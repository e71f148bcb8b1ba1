"""Does parity bite? Every known mistake, made on purpose, must be noticed.

The mistakes are those of the lab's table that name a probe: lines that some reimplementation got wrong. A probe
compares a copy of minisd with diffusers: it must say "equal" before and "different" after.
"""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler as ReferenceDDPM

import minisd.pipeline
from minisd.lab.parity.bugs import TABLE, planted
from minisd.lab.parity.sides import MinisdSide


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------ probes: reference, minisd -> two tensors


def unet(theirs, mine):
    for scale in (1, 0.01):
        latents, context, t = randn(2, 4, 7, 9) * scale, randn(2, 77, 128, seed=1), torch.tensor(400)
        yield theirs.unet(latents, t, encoder_hidden_states=context).sample, mine.unet(latents, t, context)


def vae(theirs, mine):
    for scale in (1, 0.01):
        images, latents = randn(1, 3, 64, 64) * scale, randn(1, 4, 8, 8) * scale
        yield theirs.vae.encode(images).latent_dist.parameters[:, :4], mine.vae.encode(images).mean
        yield theirs.vae.decode(latents).sample, mine.vae.decode(latents)


def logvar(theirs, mine):
    bias = theirs.vae.quant_conv.bias + 100
    images = randn(1, 3, 64, 64)
    with torch.no_grad():
        reference, candidate = copy.deepcopy(theirs.vae), copy.deepcopy(mine.vae)
        reference.quant_conv.bias.copy_(bias)
        candidate.quant_conv.bias.copy_(bias)
    yield reference.encode(images).latent_dist.logvar, candidate.encode(images).logvar


def text(theirs, mine):
    ids = mine.tokenizer(["a photograph of an astronaut", ""])
    yield theirs.text_encoder(ids)[0], mine.text_encoder(ids)


def as_tensor(pictures) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def trajectories(theirs, mine, scheduler="ddim", **settings):
    """The last latents, the state of the random generator and the pictures, of two prompts with two pictures each."""
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    prompts, negatives = ["a cat", "two dogs"], ["ugly", "blue"]
    common = {"negative_prompt": negatives, "guidance_rescale": 0.5, **settings}
    latents = theirs(
        prompts,
        num_inference_steps=7,
        num_images_per_prompt=2,
        generator=seeds[0],
        output_type="latent",
        **common,
    ).images
    images = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample
    pictures = theirs.image_processor.postprocess(images)
    for step in mine.denoise(prompts, steps=7, images_per_prompt=2, generator=seeds[1], scheduler=scheduler, **common):
        candidate = step.latents
    yield latents, candidate
    yield seeds[0].get_state(), seeds[1].get_state()
    to_pictures = getattr(mine, "to_pictures", minisd.pipeline.to_pictures)  # a copy may have its own
    yield as_tensor(pictures), as_tensor(to_pictures(mine.decode(candidate)))


def ddim(theirs, mine):
    yield from trajectories(theirs, mine, eta=0.7)


def ddpm(theirs, mine):
    pipeline = type(theirs)(**theirs.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = ReferenceDDPM.from_config(theirs.scheduler.config)
    yield from trajectories(pipeline, mine, scheduler="ddpm")


def betas(theirs, mine):
    yield theirs.scheduler.betas, mine.make_scheduler(None).betas


PROBES = {probe.__name__: probe for probe in (unet, vae, logvar, text, ddim, ddpm, betas)}
TEETH = {bug.name: bug for bug in TABLE if bug.probe}


@torch.no_grad()
def equal(probe: str, theirs, mine) -> bool:
    return all(torch.equal(reference, candidate) for reference, candidate in PROBES[probe](theirs, mine))


@pytest.mark.parametrize("probe", PROBES)
def test_probes_find_no_difference(twin, ours, probe):
    assert equal(probe, twin[0], ours)


@pytest.mark.parametrize("name", TEETH)
def test_a_mistake_is_noticed(twin, ours, name):
    mutant, _ = planted(MinisdSide("minisd", ours, ours.config), name)
    assert not equal(TEETH[name].probe, twin[0], mutant.model)


def test_every_kind_of_mistake_is_tried():
    assert len(TEETH) == 35 and {bug.probe for bug in TEETH.values()} == set(PROBES)
