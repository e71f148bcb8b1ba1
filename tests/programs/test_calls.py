"""Calls that programs make around a generation: signatures, parts, dtypes, checks, helpers of diffusers' submodules."""

import inspect
import subprocess
import sys
from pathlib import Path

import diffusers
import diffusers.optimization
import diffusers.training_utils
import diffusers.utils
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor as their_randn
from PIL import Image

import minisd.diffusers as dialect
import minisd.diffusers.optimization
import minisd.diffusers.training_utils
from minisd.diffusers.utils.torch_utils import randn_tensor
from tests.programs.test_pipelines import NAMES, loaded, quiet, same, seeded

OPEN = {"args", "kwargs"}


@pytest.fixture(scope="module")
def pair(twin):
    return loaded("StableDiffusionPipeline", twin[1])


# ------------------------------------------------ arguments


@pytest.mark.parametrize("kind", NAMES.values())
def test_a_call_lists_the_arguments_of_diffusers(kind):
    """Programs filter arguments by signature: what is not in it they lose."""
    theirs, mine = (inspect.signature(getattr(library, kind).__call__).parameters for library in (diffusers, dialect))
    assert list(mine) == list(theirs)
    for name, one in theirs.items():
        default = tuple(one.default) if isinstance(one.default, list) else one.default
        assert mine[name].default == default and mine[name].kind == one.kind, name


def test_impossible_arguments_are_found_by_check_inputs(pair):
    for pipe in pair:
        pipe.check_inputs("a cat", 64, 64, 1)
        for arguments in (
            (None, 64, 64, 1),
            ("a cat", 65, 64, 1),
            ("a cat", 64, 64, 0),
            ("a cat", 64, 64, 1, "ugly", None, torch.ones(1, 77, 128)),
            (None, 64, 64, 1, None, torch.ones(1, 77, 128), torch.ones(2, 77, 128)),
        ):
            with pytest.raises(ValueError):
                pipe.check_inputs(*arguments)
    image, mask = (
        dialect.AutoPipelineForImage2Image.from_pipe(pair[1]),
        dialect.AutoPipelineForInpainting.from_pipe(pair[1]),
    )
    picture = Image.new("RGB", (64, 64))
    image.check_inputs("a cat", 0.5, None)
    mask.check_inputs("a cat", picture, picture, 64, 64, 0.5, None, "pil")
    with pytest.raises(ValueError, match="strength=2"):
        image.check_inputs("a cat", 2, None)
    with pytest.raises(ValueError, match="strength=-1"):
        mask.check_inputs("a cat", picture, picture, 64, 64, -1, None, "pil")
    assert image.run_safety_checker(picture, "cpu", torch.float32) == (picture, None)


# ------------------------------------------------ parts


def test_parts_that_are_none(pair):
    theirs, mine = pair
    embeds = {
        "prompt_embeds": torch.randn(1, 77, 128, generator=seeded(1)[0]),
        "negative_prompt_embeds": torch.randn(1, 77, 128, generator=seeded(2)[0]),
    }
    found = []
    for pipe, library in ((theirs, diffusers), (mine, dialect)):
        parts = {**pipe.components, "text_encoder": None, "tokenizer": None, "vae": None}
        bare = quiet(library.StableDiffusionPipeline(**parts, requires_safety_checker=False))
        found.append(bare(**embeds, num_inference_steps=2, generator=seeded(3)[0], output_type="latent").images)
        assert bare.components["vae"] is None and bare.to("cpu") is bare
    assert same(found[1], found[0])


def test_dtypes_by_part_and_by_other_names(twin):
    load = dialect.StableDiffusionPipeline.from_pretrained
    pipe = load(twin[1], torch_dtype={"unet": torch.float16, "default": torch.bfloat16}, use_auth_token=True)
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.float16, torch.bfloat16, torch.bfloat16)
    assert load(twin[1], torch_dtype="auto").unet.dtype == torch.float32
    assert load(twin[1], revision="fp16").unet.dtype == torch.float32
    half = load(twin[1]).to(torch_dtype=torch.float16)
    assert half.unet.dtype == half.text_encoder.dtype == torch.float16
    with pytest.raises(dialect.NotCoveredError, match="torch_dtype='float16'"):
        load(twin[1], torch_dtype={"unet": "float16"})


def test_a_pipeline_made_of_new_parts_is_saved_and_generated_with(twin, tmp_path, pair):
    """Networks from numbers; what minisd writes, diffusers loads, and the images are equal."""
    levels = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(5)
    unet = dialect.UNet2DConditionModel(sample_size=(8, 12), cross_attention_dim=128, attention_head_dim=8, **levels)
    assert unet.config.sample_size == (8, 12)
    pipe = quiet(dialect.StableDiffusionPipeline(**{**pair[1].components, "unet": unet.eval()}))
    pipe.scheduler = dialect.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    mine = pipe("a cat", num_inference_steps=3, generator=seeded(1)[0], output_type="np").images
    factor = pipe.vae_scale_factor
    assert mine.shape == (1, 8 * factor, 12 * factor, 3)
    pipe.save_pretrained(tmp_path / "pipe", variant="fp16")
    assert (tmp_path / "pipe/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    theirs = quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", variant="fp16"))
    assert type(theirs.scheduler).__name__ == "EulerDiscreteScheduler"
    again = theirs("a cat", num_inference_steps=3, generator=seeded(1)[0], output_type="np").images
    assert (mine == again).all()
    assert (
        pipe.config.unet == ["diffusers", "UNet2DConditionModel"] and pipe.config["_class_name"] == type(pipe).__name__
    )


@pytest.mark.parametrize("scheduler", ("DDIMScheduler", "PNDMScheduler"))
@pytest.mark.parametrize("kind", NAMES.values())
def test_diffusers_own_schedulers_are_corrected(pair, kind, scheduler):
    """A pipeline made with a scheduler sets steps_offset and others, whoever made the scheduler."""
    settings = {"steps_offset": 0, "beta_schedule": "scaled_linear"}
    settings |= {"clip_sample": True} if scheduler == "DDIMScheduler" else {"skip_prk_steps": False}
    configs = []
    for pipe, library in zip(pair, (diffusers, dialect), strict=True):
        own = getattr(diffusers, scheduler)(**settings)
        made = getattr(library, kind)(**{**pipe.components, "scheduler": own})
        configs.append({name: value for name, value in made.scheduler.config.items() if name[0] != "_"})
    assert configs[0] == configs[1] and configs[0]["steps_offset"] == 1


def test_a_config_from_another_scheduler_keeps_what_nobody_chose(pair):
    for first in ("PNDMScheduler", "DDIMScheduler"):
        configs = []
        for library in (diffusers, dialect):
            old = getattr(library, first)(beta_schedule="scaled_linear", beta_start=0.001)
            configs.append(library.EulerDiscreteScheduler.from_config(old.config).config)
        assert configs[0]["timestep_spacing"] == configs[1]["timestep_spacing"] == "linspace"


def test_results_answer_as_mappings(pair):
    noise = torch.zeros(1, 4, 8, 8)
    step = dialect.DDIMScheduler()
    step.set_timesteps(5)
    result = step.step(noise, step.timesteps[0], noise)
    assert list(result.keys()) == ["prev_sample", "pred_original_sample"] and result["prev_sample"] is result[0]
    out = pair[1].unet(noise, 1, torch.zeros(1, 77, 128))
    assert list(out.keys()) == ["sample"] and next(iter(out.values())) is out[0] is out.sample is out["sample"]


def test_pipelines_that_share_networks_share_adapters(twin):
    pipe = quiet(dialect.StableDiffusionPipeline.from_pretrained(twin[1]))
    settings = {"num_inference_steps": 1, "output_type": "latent"}
    before = pipe("a cat <x>", generator=seeded(1)[0], **settings).images
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pipe.load_lora_weights({f"{layer}.lora_A.weight": torch.ones(2, 128), f"{layer}.lora_B.weight": torch.ones(128, 2)})
    pipe.load_textual_inversion(torch.ones(128), token="<x>")
    other = quiet(dialect.StableDiffusionPipeline.from_pipe(pipe))
    assert other.get_list_adapters() == {"unet": ["default_0"]} and other.get_active_adapters() == ["default_0"]
    assert not same(other("a cat <x>", generator=seeded(1)[0], **settings).images, before)
    other.unload_lora_weights()
    other.unload_textual_inversion()
    assert not pipe.get_active_adapters() and same(pipe("a cat <x>", generator=seeded(1)[0], **settings).images, before)
    for wrong, words in (
        ({"adapter_names": ["x"]}, "'x': no such adapter; there are none"),
        ({"adapter_names": [], "adapter_weights": [1.0]}, "1 for 0 adapters"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.set_adapters(**wrong)
    with pytest.raises(minisd.CheckpointError, match=r"has no pytorch_lora_weights\.safetensors; give weight_name"):
        pipe.load_lora_weights(twin[1])
    with pytest.raises(ValueError, match="needs unet_lora_layers"):
        pipe.save_lora_weights("x")


# ------------------------------------------------ helpers


SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {"num_warmup_steps": 4},
    "piecewise_constant": {"step_rules": "1:5,0.1:9,0.01"},
    "linear": {"num_warmup_steps": 4, "num_training_steps": 17},
    "cosine": {"num_warmup_steps": 0, "num_training_steps": 17},
    "cosine_with_restarts": {"num_warmup_steps": 3, "num_training_steps": 17, "num_cycles": 3},
    "polynomial": {"num_warmup_steps": 3, "num_training_steps": 17, "power": 2.0},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates(name):
    rates = []
    for library in (diffusers, minisd.diffusers):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
        schedule = library.optimization.get_scheduler(name, optimizer, **SCHEDULES[name])
        rates.append([])
        for _ in range(20):
            rates[-1].append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
    assert rates[0] == rates[1]
    with pytest.raises(ValueError):
        minisd.diffusers.optimization.get_scheduler("cubic", optimizer)
    if SCHEDULES[name] and name != "piecewise_constant":
        with pytest.raises(ValueError, match=f"{name} needs num_warmup_steps"):
            minisd.diffusers.optimization.get_scheduler(name, optimizer)


@pytest.mark.parametrize(
    "settings", ({}, {"use_ema_warmup": True, "power": 0.75}, {"update_after_step": 3, "decay": 0.3}), ids=str
)
def test_averaged_weights(settings):
    results = []
    for library in (diffusers, minisd.diffusers):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3)
        layer.bias.requires_grad_(False)
        average = library.training_utils.EMAModel(layer.parameters(), **settings)
        for _ in range(8):
            layer.weight.data += torch.randn(3, 3)
            average.step(layer.parameters())
        before = layer.weight.clone()
        average.store(layer.parameters())
        average.copy_to(layer.parameters())
        other = library.training_utils.EMAModel(layer.parameters())
        other.load_state_dict(average.state_dict())
        results.append(
            (average.cur_decay_value, layer.weight.clone(), other.shadow_params[0], list(average.state_dict()))
        )
        average.restore(layer.parameters())
        assert torch.equal(layer.weight, before)
    assert results[0][0] == results[1][0] and results[0][3] == results[1][3]
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][2], results[1][2])


def test_small_helpers(tmp_path):
    picture = Image.new("RGBA", (6, 4), (200, 10, 10, 128))
    picture.save(tmp_path / "x.png")
    for source in (str(tmp_path / "x.png"), picture):
        assert same([diffusers.utils.load_image(source)], [dialect.utils.load_image(source)])
    four = [Image.new("RGB", (6, 4), (40 * n, 0, 0)) for n in range(4)]
    assert same([diffusers.utils.make_image_grid(four, 2, 2, 8)], [dialect.utils.make_image_grid(four, 2, 2, 8)])
    with pytest.raises(dialect.NotCoveredError, match="addresses are not covered"):
        dialect.utils.load_image("https://example.org/x.png")
    dialect.utils.logging.set_verbosity_error()
    schedulers, times = (diffusers.DDPMScheduler(), dialect.DDPMScheduler()), torch.tensor([0, 500, 999])
    ratios = [
        diffusers.training_utils.compute_snr(schedulers[0], times),
        dialect.training_utils.compute_snr(schedulers[1], times),
    ]
    assert torch.equal(*ratios)
    assert torch.equal(their_randn((2, 3), seeded(1)[0]), randn_tensor((2, 3), seeded(1)[0]))


def test_submodules_as_programs_import_them():
    from minisd.diffusers.image_processor import VaeImageProcessor  # noqa: F401
    from minisd.diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin  # noqa: F401
    from minisd.diffusers.models import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from minisd.diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0  # noqa: F401
    from minisd.diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput  # noqa: F401
    from minisd.diffusers.schedulers import DDIMScheduler, PNDMScheduler  # noqa: F401

    with pytest.raises(ImportError, match="freeze_modules"):
        from minisd.diffusers.training_utils import freeze_modules  # noqa: F401
    with pytest.raises(ImportError, match=r"minisd\.diffusers\.video_processor"):
        import minisd.diffusers.video_processor  # noqa: F401


def test_the_published_tests_are_counted(tmp_path):
    """`scripts/diffusers_tests.py` on a folder of three tests: one that fails everywhere does not count."""
    folder = tmp_path / "tests" / "schedulers"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "test_scheduler_ddim.py").write_text(
        "from diffusers import DDIMScheduler\n\n"
        "def test_equal():\n    assert len(DDIMScheduler().timesteps) == 1000\n\n"
        "def test_other():\n    assert DDIMScheduler.__module__.startswith('diffusers')\n\n"
        "def test_broken():\n    raise RuntimeError\n"
    )
    script = Path(__file__).parents[2] / "scripts" / "diffusers_tests.py"
    done = subprocess.run([sys.executable, script, folder.parent], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 of 2" and "test_other: " in done.stdout
