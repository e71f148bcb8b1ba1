"""The three networks against diffusers and transformers: torch.equal, at two scales of input and odd sizes."""

import json

import pytest
import torch

SCALES = (1.0, 0.01)  # the small one makes epsilons visible
LATENT_SIZES = ((8, 8), (16, 8), (7, 9), (5, 5), (1, 3))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", LATENT_SIZES)
@pytest.mark.parametrize("batch", (1, 2, 3))
@torch.no_grad()
def test_unet(twin, ours, batch, size, scale):
    latents, context = randn(batch, 4, *size) * scale, randn(batch, 77, 128, seed=1)
    for t in (0, 1, 500, 999):
        theirs = twin[0].unet(latents, torch.tensor(t), encoder_hidden_states=context).sample
        assert torch.equal(ours.unet(latents, torch.tensor(t), context), theirs)


@torch.no_grad()
def test_unet_with_a_timestep_for_each_sample(twin, ours):
    latents, context, t = randn(3, 4, 8, 8), randn(3, 77, 128, seed=1), torch.tensor([3, 400, 998])
    theirs = twin[0].unet(latents, t, encoder_hidden_states=context).sample
    assert torch.equal(ours.unet(latents, t, context), theirs)


@torch.no_grad()
def test_unet_with_a_short_context(twin, ours):
    latents, context = randn(2, 4, 8, 8), randn(2, 13, 128, seed=1)
    theirs = twin[0].unet(latents, 7, encoder_hidden_states=context).sample
    assert torch.equal(ours.unet(latents, torch.tensor(7), context), theirs)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", ((64, 64), (56, 72), (8, 8), (128, 64)))
@pytest.mark.parametrize("batch", (1, 2))
@torch.no_grad()
def test_vae_encode(twin, ours, batch, size, scale):
    images = (randn(batch, 3, *size) * scale).clamp(-1, 1)
    theirs = twin[0].vae.encode(images).latent_dist
    mine = ours.vae.encode(images)
    assert torch.equal(mine.mean, theirs.mean)
    assert torch.equal(mine.logvar, theirs.logvar)
    assert torch.equal(mine.mode(), theirs.mode())
    assert torch.equal(mine.kl(), theirs.kl())
    samples = [q.sample(torch.Generator().manual_seed(5)) for q in (mine, theirs)]
    assert torch.equal(*samples)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", LATENT_SIZES)
@pytest.mark.parametrize("batch", (1, 2))
@torch.no_grad()
def test_vae_decode(twin, ours, batch, size, scale):
    latents = randn(batch, 4, *size) * scale
    assert torch.equal(ours.vae.decode(latents), twin[0].vae.decode(latents).sample)


@torch.no_grad()
def test_vae_decodes_what_it_encoded(twin, ours):
    """The moments leave the encoder with channels last, and the decoder's kernels depend on that."""
    images = randn(2, 3, 64, 64).clamp(-1, 1)
    theirs = twin[0].vae.decode(twin[0].vae.encode(images).latent_dist.mean).sample
    assert torch.equal(ours.vae.decode(ours.vae.encode(images).mean), theirs)


@torch.no_grad()
def test_logvar_is_clamped(ours):
    """From a network whose last bias is huge: diffusers clamps to [-30, 20]."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    from minisd.vae import Gaussian

    moments = randn(1, 8, 4, 4) * 100
    theirs = DiagonalGaussianDistribution(moments)
    assert torch.equal(Gaussian(moments).logvar, theirs.logvar)
    assert Gaussian(moments).logvar.min() == -30 and Gaussian(moments).logvar.max() == 20


@pytest.mark.parametrize("length", (77, 20, 1))
@pytest.mark.parametrize("batch", (1, 2, 5))
@torch.no_grad()
def test_text_encoder(twin, ours, batch, length):
    ids = torch.randint(0, 49408, (batch, length), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.text_encoder(ids), twin[0].text_encoder(ids)[0])


@torch.no_grad()
def test_clip_skip(twin, ours):
    """An earlier layer's output, and the final norm all the same."""
    ids = ours.tokenizer(["a photograph of an astronaut riding a horse"])
    states = twin[0].text_encoder(ids, output_hidden_states=True).hidden_states
    norm = twin[0].text_encoder.final_layer_norm
    for skip in (0, 1, 2, 11):
        assert torch.equal(ours.text_encoder(ids, clip_skip=skip), norm(states[-1 - skip]))


@torch.no_grad()
def test_other_architectures_of_the_family():
    """Other depths and widths, nine input channels, one level without attention in another place."""
    from minisd.checkpoint import configs
    from minisd.checkpoint.keymap import unet_keys
    from minisd.unet import UNet
    from tests.parity.reference import reference_unet

    theirs = reference_unet(
        (32, 64, 64),
        64,
        in_channels=9,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    notes: list[str] = []
    config = configs.read_unet(json.loads(json.dumps(dict(theirs.config))), "config", notes)
    assert notes == []
    mine = UNet(config)
    state = theirs.state_dict()
    mine.load_state_dict({key.minisd: state[key.diffusers] for key in unet_keys(config)}, strict=True)
    latents, context = randn(2, 9, 6, 10), randn(2, 77, 64)
    assert torch.equal(mine(latents, torch.tensor(9), context), theirs(latents, 9, context).sample)
