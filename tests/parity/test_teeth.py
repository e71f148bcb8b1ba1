"""Does parity bite? Every known mistake, made on purpose, must be noticed.

Each mutation is one line that some reimplementation got wrong. A probe compares a mutated minisd with diffusers: it
must say "equal" before and "different" after.
"""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler as ReferenceDDPM

import minisd.layers
import minisd.pipeline
import minisd.schedulers.ddpm
import minisd.text_encoder
import minisd.unet
import minisd.vae
from minisd.schedulers import equations


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
    yield as_tensor(pictures), as_tensor(minisd.pipeline.to_pictures(mine.decode(candidate)))


def ddim(theirs, mine):
    yield from trajectories(theirs, mine, eta=0.7)


def ddpm(theirs, mine):
    pipeline = type(theirs)(**theirs.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = ReferenceDDPM.from_config(theirs.scheduler.config)
    yield from trajectories(pipeline, mine, scheduler="ddpm")


@torch.no_grad()
def equal(probe, theirs, mine) -> bool:
    return all(torch.equal(reference, candidate) for reference, candidate in probe(theirs, mine))


@pytest.mark.parametrize("probe", (unet, vae, logvar, text, ddim, ddpm))
def test_probes_find_no_difference(twin, ours, probe):
    assert equal(probe, twin[0], ours)


# ------------------------------------------------ mutations


def rebuilt(sd, part: str, **changes):
    """The same weights in a network with another number in its configuration."""
    old = getattr(sd, part)
    new = type(old)(dataclasses.replace(old.config, **changes)).eval()
    new.load_state_dict(old.state_dict())
    mutant = copy.copy(sd)
    setattr(mutant, part, new)
    return mutant


CONFIG_MUTATIONS = {
    "UNet GroupNorm eps 1e-6": (unet, "unet", {"norm_eps": 1e-6}),
    "transformer GroupNorm eps 1e-5": (unet, "unet", {"transformer_norm_eps": 1e-5}),
    "LayerNorm eps 1e-6": (unet, "unet", {"layer_norm_eps": 1e-6}),
    "half the heads": (unet, "unet", {"heads": 4}),
    "16 norm groups": (unet, "unet", {"norm_groups": 16}),
    "VAE GroupNorm eps 1e-5": (vae, "vae", {"norm_eps": 1e-5}),
    "VAE padded on all sides": (vae, "vae", {"downsample_padding": 1}),
    "exact GELU in CLIP": (text, "text_encoder", {"activation": "gelu"}),
    "CLIP LayerNorm eps 1e-6": (text, "text_encoder", {"layer_norm_eps": 1e-6}),
    "CLIP heads": (text, "text_encoder", {"heads": 4}),
    "another scaling factor": (ddim, "vae", {"scaling_factor": 0.18216}),
}


@pytest.mark.parametrize("name", CONFIG_MUTATIONS)
def test_a_wrong_number(twin, ours, name):
    probe, part, changes = CONFIG_MUTATIONS[name]
    assert not equal(probe, twin[0], rebuilt(ours, part, **changes))


def sines_first(timesteps, width):
    cosines, sines = RIGHT_WAVES(timesteps, width).chunk(2, dim=-1)
    return torch.cat([sines, cosines], dim=-1)


def shifted_frequencies(timesteps, width):
    half = width // 2
    frequencies = torch.exp(-np.log(10000) * torch.arange(half) / (half - 1))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


RIGHT_WAVES = minisd.unet.timestep_embedding
RIGHT_ATTENTION = minisd.layers.Attention.forward
RIGHT_PICTURES = minisd.pipeline.to_pictures
RIGHT_RESCALE = minisd.pipeline.rescale_guidance


def never_causal(self, x, context, *, causal):
    return RIGHT_ATTENTION(self, x, context, causal=False)


def gate_and_value_swapped(self, x):
    gate, value = self.expand(x).chunk(2, dim=-1)
    return self.contract(value * F.gelu(gate))


def tanh_gelu(self, x):
    value, gate = self.expand(x).chunk(2, dim=-1)
    return self.contract(value * F.gelu(gate, approximate="tanh"))


def unclamped(self, moments):
    self.mean, self.logvar = moments.chunk(2, dim=1)


def truncated(images):
    return RIGHT_PICTURES(((images / 2 + 0.5).clamp(0, 1) * 255).floor() / 127.5 - 1)


def halves_swapped(self, x, t, context, scale, rescale=0.0):
    positive, negative = self.unet(torch.cat([x, x]), t, context).chunk(2)
    return RIGHT_RESCALE(negative + scale * (positive - negative), positive, rescale)


def rescale_by_channel(eps, positive, amount):
    dims = (2, 3)
    return amount * eps * (positive.std(dims, keepdim=True) / eps.std(dims, keepdim=True)) + (1 - amount) * eps


def slightly_more_residual(self, x, time=None):
    return RIGHT_RESNET(self, x, time) * 1.0001


RIGHT_RESNET = minisd.layers.ResnetBlock.forward

CODE_MUTATIONS = {
    "sines before cosines": (unet, minisd.unet, "timestep_embedding", sines_first),
    "frequency shift 1": (unet, minisd.unet, "timestep_embedding", shifted_frequencies),
    "tanh GELU": (unet, minisd.unet.GatedFeedForward, "forward", tanh_gelu),
    "GEGLU halves swapped": (unet, minisd.unet.GatedFeedForward, "forward", gate_and_value_swapped),
    "residual scale 1.0001": (unet, minisd.layers.ResnetBlock, "forward", slightly_more_residual),
    "CLIP without causal mask": (text, minisd.layers.Attention, "forward", never_causal),
    "log variance not clamped": (logvar, minisd.vae.Gaussian, "__init__", unclamped),
    "pixels truncated": (ddim, minisd.pipeline, "to_pictures", truncated),
    "guidance halves swapped": (ddim, minisd.pipeline.StableDiffusion, "predict_noise", halves_swapped),
    "guidance rescaled by channel": (ddim, minisd.pipeline, "rescale_guidance", rescale_by_channel),
}


@pytest.mark.parametrize("name", CODE_MUTATIONS)
def test_wrong_code(twin, ours, name, monkeypatch):
    probe, owner, attribute, mutation = CODE_MUTATIONS[name]
    monkeypatch.setattr(owner, attribute, mutation)
    assert not equal(probe, twin[0], ours)


def test_clip_without_final_norm(twin, ours):
    mutant = rebuilt(ours, "text_encoder")
    mutant.text_encoder.final_norm = torch.nn.Identity()
    assert not equal(text, twin[0], mutant)


def test_one_weight_off_by_a_millionth(twin, ours):
    mutant = rebuilt(ours, "unet")
    with torch.no_grad():
        weight = mutant.unet.middle[0].attention.cross_attn.v.weight
        weight[0, 0] += 1e-6
    assert not equal(unet, twin[0], mutant)


def test_skips_in_another_order(twin, ours, monkeypatch):
    """The first skip twice: at the lowest resolution the widths allow it."""
    kept = []

    def cat(tensors, dim):
        if dim == 1:
            x, skip = tensors
            kept.append(skip)
            tensors = [x, kept[0] if len(kept) == 2 else skip]
        return torch.cat(tensors, dim=dim)

    lookalike = SimpleNamespace(**(vars(torch) | {"cat": cat}))
    monkeypatch.setattr(minisd.unet, "torch", lookalike)
    assert not equal(unet, twin[0], ours)


def test_two_weights_of_equal_shape_swapped(twin, ours):
    mutant = rebuilt(ours, "unet")
    attention = mutant.unet.up[4].attention.self_attn
    attention.q, attention.k = attention.k, attention.q
    assert not equal(unet, twin[0], mutant)


SCHEDULE_MUTATIONS = {
    "final alpha 1": {"set_alpha_to_one": True},
    "offset 0": {"steps_offset": 0},
    "trailing": {"timestep_spacing": "trailing"},
    "clipped samples": {"clip_sample": True},
    "linear betas": {"beta_schedule": "linear"},
    "beta_end 0.0121": {"beta_end": 0.0121},
}


@pytest.mark.parametrize("name", SCHEDULE_MUTATIONS)
def test_a_wrong_schedule(twin, ours, name):
    mutant = copy.copy(ours)
    mutant.config = dataclasses.replace(ours.config, scheduler=ours.config.scheduler | SCHEDULE_MUTATIONS[name])
    assert not equal(ddim, twin[0], mutant)


def double_precision(start, end, steps):
    """CompVis: the schedule in float64, rounded once."""
    return (torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2).float()


def test_a_schedule_in_double_precision(twin, ours, monkeypatch):
    monkeypatch.setitem(equations.BETA_SCHEDULES, "scaled_linear", double_precision)
    betas = ours.make_scheduler(None).betas
    assert not torch.equal(betas, twin[0].scheduler.betas)


def test_ddpm_with_ddims_final_alpha(twin, ours, monkeypatch):
    """DDPM's last step ends at alpha 1, DDIM's (in SD 1.5) at alphas_cumprod[0]."""
    right = minisd.DDPMScheduler.alpha_bar
    monkeypatch.setattr(
        minisd.DDPMScheduler, "alpha_bar", lambda self, t: self.alphas_cumprod[0] if t < 0 else right(self, t)
    )
    assert not equal(ddpm, twin[0], ours)


def test_ddpm_without_noise_at_the_last_step(twin, ours, monkeypatch):
    """SD 1.5 ends at t=1, which still gets noise; only t=0 gets none. It is too little to see (the variance is clamped
    at 1e-20), but whatever is drawn next from the generator is different."""
    right = minisd.schedulers.ddpm.draw_noise
    calls = []

    def silent_at_the_end(*arguments):
        calls.append(None)
        return right(*arguments) if len(calls) < 7 else torch.zeros(arguments[0])

    monkeypatch.setattr(minisd.schedulers.ddpm, "draw_noise", silent_at_the_end)
    assert not equal(ddpm, twin[0], ours) and len(calls) == 7


def test_images_of_a_prompt_interleaved(twin, ours, monkeypatch):
    """a, b, a, b instead of a, a, b, b."""
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda self, n, dim: self.repeat(n, 1, 1))
    assert not equal(ddim, twin[0], ours)
