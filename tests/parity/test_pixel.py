"""The pixel-space UNet and its sampling loop against diffusers' `UNet2DModel`, `DDPMPipeline` and `DDIMPipeline`."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

import minisd
from minisd.pixel.files import find_unet, open_unet, read_config, write_config
from minisd.pixel.keys import pixel_unet_keys
from minisd.pixel.pipeline import PixelDiffusion
from minisd.schedulers import equations
from minisd.tasks import LossGuidance, colour_loss
from tests.parity.reference import shake

ATTENDS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
EVERYWHERE = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
NARROW = {"sample_size": 16, "block_out_channels": (16, 32), "norm_num_groups": 8, **ATTENDS}
# What the published DDPM checkpoints have, then one option after the other.
OPTIONS = {
    "ddpm": {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "attention_head_dim": None}
    | {"norm_eps": 1e-6},
    "plain": {},
    "two sizes": {"sample_size": (8, 16)},
    "one channel": {"in_channels": 1, "out_channels": 1, "layers_per_block": 1},
    "not mirrored": {"up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
    "no attention in the middle": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "scaled middle": {"mid_block_scale_factor": 1.7},
    "centred": {"center_input_sample": True},
    "wide time": {"time_embedding_dim": 48},
    "gelu": {"act_fn": "gelu"},
    "table": {"num_class_embeds": 10},
    "timestep": {"class_embed_type": "timestep"},
    "identity": {"class_embed_type": "identity"},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "groups in the middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "resnets": {"downsample_type": "resnet", "upsample_type": "resnet", **EVERYWHERE},
    "resnets where there is attention": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "learned variance": {"out_channels": 6},
}


def reference(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    return shake(UNet2DModel(**(NARROW | changes)))


def saved(unet: UNet2DModel, folder, kind=DDPMPipeline, scheduler=None) -> DDPMPipeline:
    """A pipeline that was saved to `folder` and loaded from it again."""
    kind(unet, scheduler or DDPMScheduler()).save_pretrained(folder)
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def labels_for(unet: UNet2DModel, count: int) -> torch.Tensor | None:
    if unet.config.class_embed_type == "identity":
        return torch.randn(count, 64)
    return torch.arange(count) if unet.class_embedding is not None else None


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_unet(changes, tmp_path):
    theirs = saved(reference(**changes), tmp_path / "model").unet
    model = PixelDiffusion.load(tmp_path / "model")
    for count, scale in ((1, 1.0), (3, 0.01)):  # a small input makes epsilons visible
        x, t = scale * torch.randn(count, theirs.config.in_channels, 8, 16), torch.randint(0, 1000, (count,))
        labels = labels_for(theirs, count)
        assert torch.equal(model.unet(x, t, labels), theirs(x, t, labels).sample)
        assert torch.equal(model.unet(x, t[0], labels), theirs(x, t[0], labels).sample)
    model.save(tmp_path / "again")
    again = DDPMPipeline.from_pretrained(tmp_path / "again")
    own = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    assert {name: again.unet.config[name] for name in own} == own
    assert all(torch.equal(value, again.unet.state_dict()[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "scheduler", "settings"),
    [
        (DDPMPipeline, DDPMScheduler(), {}),
        (DDPMPipeline, DDPMScheduler(variance_type="fixed_large", clip_sample=False), {}),
        (DDIMPipeline, DDIMScheduler(), {}),
        (DDIMPipeline, DDIMScheduler(clip_sample=True, beta_schedule="squaredcos_cap_v2"), {"eta": 0.6}),
        (DDIMPipeline, DDIMScheduler(), {"eta": 1.0, "use_clipped_model_output": True}),
    ],
)
def test_sampling(kind, scheduler, settings, tmp_path):
    pipeline = saved(reference(), tmp_path, kind, scheduler)
    model = PixelDiffusion.load(tmp_path)
    theirs = pipeline(batch_size=2, num_inference_steps=6, generator=seeded(3), output_type="pt", **settings).images
    *_, last = model.denoise(images=2, steps=6, scheduler="model", seed=3, **settings)
    assert torch.equal((last.latents / 2 + 0.5).clamp(0, 1), theirs)
    pictures = pipeline(batch_size=1, num_inference_steps=2, generator=seeded(4), **settings).images
    ours = model.sample(steps=2, scheduler="model", seed=4, **settings)
    assert ours[0].tobytes() == pictures[0].tobytes()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_names_of_the_first_files_and_of_compvis(tmp_path):
    """The published DDPM files say query, key, value, proj_attn; the first code on pixels had other names still."""
    saved(reference(), tmp_path / "model")
    folder = find_unet(tmp_path / "model")[1]
    tensors, model = load_file(folder / "diffusion_pytorch_model.safetensors"), PixelDiffusion.load(tmp_path / "model")
    keys = list(pixel_unet_keys(model.unet.config))
    assert {key.diffusers for key in keys} == tensors.keys()
    older = {(key.older or (key.diffusers,))[0]: tensors[key.diffusers] for key in keys}
    compvis = {key.compvis: tensors[key.diffusers].reshape(key.compvis_shape) for key in keys}
    assert "mid_block.attentions.0.proj_attn.bias" in older and "temb.dense.0.weight" in compvis
    assert compvis["up.1.attn.0.q.weight"].ndim == 4
    for name, state in {"older": older, "compvis": compvis}.items():
        shutil.copytree(folder, tmp_path / name)  # a bare UNet2DModel
        save_file(state, tmp_path / name / "diffusion_pytorch_model.safetensors")
        loaded = PixelDiffusion.load(tmp_path / name).unet.state_dict()
        assert all(torch.equal(loaded[weight], value) for weight, value in model.unet.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier' is not supported"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "'SkipDownBlock2D' is not supported"),
        ({"down_block_types": ["DownBlock2D"]}, "1 block types for 2 widths"),
        ({"resnet_time_scale_shift": "spatial"}, "'spatial' is not supported"),
        ({"block_out_channels": [16, -32]}, "widths=-32 is impossible"),
        ({"block_out_channels": 16}, "widths=16 is impossible"),
        ({"norm_num_groups": 7}, "norm_groups=7 does not divide the width 16"),
        ({"attention_head_dim": 5}, "head_width=5 does not divide the width 32"),
        ({"sample_size": [8]}, "sample_size=[8] is impossible"),
        ({"dropout": 2}, "dropout=2 is impossible"),
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel, not a UNet2DModel"),
    ],
)
def test_refusals(changes, words, tmp_path):
    saved(reference(), tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(minisd.CheckpointError) as refusal:
        open_unet(tmp_path / "unet")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_weights_that_do_not_fit(tmp_path):
    saved(reference(), tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["stray"] = state.pop("conv_in.bias")
    save_file(state, file)
    with pytest.raises(minisd.CheckpointError, match=r"1 tensor missing, 1 tensor unexpected"):
        PixelDiffusion.load(tmp_path)


def test_config_there_and_back():
    for changes in OPTIONS.values():
        config = read_config(dict(UNet2DModel(**(NARROW | changes)).config), "x", [])
        assert read_config(write_config(config), "x", []) == config


def test_settings_that_do_not_fit(tmp_path):
    saved(reference(), tmp_path / "plain")
    saved(reference(num_class_embeds=10), tmp_path / "classes")
    plain, classes = (PixelDiffusion.load(tmp_path / name) for name in ("plain", "classes"))
    for call, words in (
        (lambda: plain.denoise([1]), "has no classes"),
        (lambda: classes.denoise(), "needs one a picture"),
        (lambda: classes.denoise([10]), "must be from 0 to 9"),
        (lambda: classes.denoise([1], guidance_scale=3.0), "no label for no class"),
        (lambda: plain.denoise(steps=2000), "at most the schedule's 1000"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_guidance_goes_down_the_slope(channels, tmp_path):
    """One step: the picture foreseen comes nearer to the colour, and without a strength nothing changes."""
    saved(reference(in_channels=channels, out_channels=channels), tmp_path)
    model, loss = PixelDiffusion.load(tmp_path), colour_loss("red")
    x, t = torch.randn(2, channels, 16, 16, generator=seeded(1)), torch.tensor(500)
    alpha_bar = model.make_scheduler().alpha_bar(500)

    def far(scale: float) -> torch.Tensor:
        output = LossGuidance(model, loss, scale=scale)(x, t, None)
        return loss(equations.x0_from_output(output, x, alpha_bar, "epsilon"))

    with torch.no_grad():
        assert torch.equal(LossGuidance(model, loss, scale=0.0)(x, t, None), model.unet(x, t))
    assert (far(0.05) < 0.95 * far(0.0)).all() and (far(-0.05) > 1.05 * far(0.0)).all()
