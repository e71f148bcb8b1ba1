"""LoRAs: every dialect gives diffusers' numbers with the same file; nothing stays behind; misfits are named."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import minisd
from minisd.adapters import lora as reading
from minisd.adapters.lora import baked_together, open_lora
from minisd.config import SD15
from tests.adapters.makers import ENDINGS, attention, everything, lora, shapes, write
from tests.unit.tiny import equal, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@torch.no_grad()
def outputs(pair, inputs):
    """(diffusers' UNet and text encoder, minisd's)."""
    theirs, ours = pair
    latents, timestep, context = inputs
    ids = ours.tokenizer(["a red cat", "a photograph of two dogs"])
    return (
        (theirs.unet(latents, timestep, context).sample, theirs.text_encoder(ids)[0]),
        (ours.unet(latents, timestep, context), ours.text_encoder(ids)),
    )


@pytest.fixture
def loaded(pair, inputs):
    """Load files, [(path, scale)], into both; afterwards both must be what they were."""
    theirs, ours = pair
    before = outputs(pair, inputs)[1]

    def load(files):
        names = [f"lora{number}" for number in range(len(files))]
        for name, (path, scale) in zip(names, files, strict=True):
            theirs.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
            ours.load_lora(path, scale)
        theirs.set_adapters(names, [scale for _, scale in files])
        return before

    yield load
    theirs.unload_lora_weights()
    ours.unload_lora()
    after = outputs(pair, inputs)[1]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def check(pair, inputs, before, changed=("unet", "text_encoder")):
    """Both give the same, and it is not what it was before."""
    theirs, ours = outputs(pair, inputs)
    for component, one, other, old in zip(("unet", "text_encoder"), theirs, ours, before, strict=True):
        assert torch.equal(one, other), f"{component}: {(one - other).abs().max():.1e}"
        assert (other - old).abs().max() > 0.01 if component in changed else torch.equal(other, old)


# ------------------------------------------------ parity


@pytest.mark.parametrize("dialect", ["kohya", "peft", "diffusers", "old_diffusers"])
def test_every_dialect_gives_diffusers_numbers(pair, inputs, loaded, tmp_path, dialect):
    path = write(tmp_path / "a.safetensors", lora(pair[1].config, dialect))
    check(pair, inputs, loaded([(path, 0.7)]))


def test_all_layers_convolutions_too(pair, inputs, loaded, tmp_path):
    path = write(tmp_path / "a.safetensors", lora(pair[1].config, pick=everything, rank=3, alpha=1.7))
    check(pair, inputs, loaded([(path, -0.3)]))


def test_float16_files(pair, inputs, loaded, tmp_path):
    tensors = {name: tensor.half() for name, tensor in lora(pair[1].config, pick=everything, alpha=0.7).items()}
    check(pair, inputs, loaded([(write(tmp_path / "a.safetensors", tensors), 1.0)]))


def test_models_in_float16(twin, inputs, tmp_path):
    """Bit for bit there too, whatever the file's dtype."""
    from diffusers import StableDiffusionPipeline

    pair = (
        StableDiffusionPipeline.from_pretrained(twin[1], dtype=torch.float16),
        minisd.StableDiffusion.load(twin[1], dtype=torch.float16),
    )
    inputs = tuple(one.half() if one.is_floating_point() else one for one in inputs)
    before = outputs(pair, inputs)[1]
    path = write(tmp_path / "a.safetensors", lora(pair[1].config, pick=everything))
    pair[0].load_lora_weights(tmp_path, weight_name=path.name)
    pair[1].load_lora(path)
    check(pair, inputs, before)


def test_ranks_and_alphas_that_differ(pair, inputs, loaded, tmp_path):
    """Alphas differ outside of attention only: there diffusers loses all but the most frequent one."""
    tensors = {}
    for part, rank, alpha in (("attn1", 2, 1.5), ("attn2", 3, 1.5), (".ff.", 4, 5.0), ("resnets", 2, 0.5)):
        tensors |= lora(pair[1].config, pick=lambda path, part=part: part in path, rank=rank, alpha=alpha)
    check(pair, inputs, loaded([(write(tmp_path / "a.safetensors", tensors), 1.0)]), changed=("unet",))


@pytest.mark.parametrize("only", ["unet", "text_encoder"])
def test_of_one_component(pair, inputs, loaded, tmp_path, only):
    path = write(tmp_path / "a.safetensors", lora(pair[1].config, only=only))
    check(pair, inputs, loaded([(path, 1.0)]), changed=(only,))


def test_several_at_once_through_a_whole_trajectory(pair, inputs, loaded, tmp_path):
    one = write(tmp_path / "one.safetensors", lora(pair[1].config, spread=0.1))
    two = write(tmp_path / "two.safetensors", lora(pair[1].config, "peft", pick=everything, spread=0.05, seed=1))
    check(pair, inputs, loaded([(one, 0.8), (two, -0.5)]))

    def seeded():
        return torch.Generator().manual_seed(4)

    theirs = pair[0]("a red heart", num_inference_steps=4, generator=seeded(), output_type="latent").images
    (*_, last) = pair[1].denoise("a red heart", steps=4, generator=seeded())
    assert torch.equal(theirs, last.latents)


def test_alphas_in_metadata(pair, inputs, loaded, tmp_path):
    """diffusers keeps PEFT's settings there: alpha, special alphas, and whether to divide by the rank's root."""
    tensors = lora(pair[1].config, "peft", only="unet", rank=4)
    modules = [name.removeprefix("unet.").removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    settings = {"r": 4, "lora_alpha": 3, "alpha_pattern": {"attn2.to_q": 7}, "use_rslora": True}
    metadata = {f"unet.{name}": value for name, value in (settings | {"target_modules": modules}).items()}
    path = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(metadata)})
    check(pair, inputs, loaded([(path, 1.0)]), changed=("unet",))


def test_a_folder_that_peft_wrote(pair, inputs, tmp_path):
    """PEFT by itself, without diffusers: alpha is in the configuration beside the weights."""
    from peft import LoraConfig, get_peft_model

    theirs, ours = pair
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "ff.net.2", "conv1"], init_lora_weights=False)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = get_peft_model(theirs.unet, config)
        model.save_pretrained(tmp_path)
        ours.load_lora(tmp_path / "adapter_model.safetensors")
        with torch.no_grad():
            latents, timestep, context = inputs
            expected = model(latents, timestep, context).sample
            assert torch.equal(ours.unet(latents, timestep, context), expected)
        ours.unload_lora()
        assert not torch.equal(ours.unet(latents, timestep, context), expected)
    finally:
        model.unload()
        ours.unload_lora()


def test_dora(pair, inputs, loaded, tmp_path):
    """A magnitude beside the factors. diffusers loses those of the text encoder: they are put in by hand."""
    tensors = lora(pair[1].config, "peft", pick=everything)
    magnitudes = {}
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        size = len(tensors[name])
        shape = (1, size, 1, 1) if tensors[name].ndim == 4 else (size,)
        magnitudes[name.removesuffix(".lora_B.weight") + ".lora_magnitude_vector"] = 1 + 0.3 * torch.rand(shape)
    before = loaded([(write(tmp_path / "a.safetensors", tensors | magnitudes), 0.9)])
    for name, module in pair[0].text_encoder.named_modules():
        found = magnitudes.get(f"text_encoder.text_model.{name}")
        if found is not None:
            module["lora0"].weight.data = found
    check(pair, inputs, before)


@pytest.mark.parametrize("kinds", ["LD", "DL", "DD", "LDL"])
def test_dora_among_others(pair, inputs, loaded, tmp_path, kinds):
    """LoRAs (L) and DoRAs (D) of the same layers in any order. There the order counts, in diffusers as here."""
    files = [write(tmp_path / f"{n}.safetensors", some(pair[1].config, kind, n)) for n, kind in enumerate(kinds)]
    scales = [0.9, 0.6, -0.4]
    check(pair, inputs, loaded(list(zip(files, scales, strict=False))), changed=("unet",))


def some(config, kind: str, seed: int) -> dict:
    """A LoRA of the UNet; as a DoRA (D) with lengths by output in PEFT's way, or (I) by input in kohya's."""
    dialect = "kohya" if kind == "I" else "peft"
    tensors = lora(config, dialect, only="unet", pick=everything, rank=3, spread=0.15, seed=seed)
    down, up = ENDINGS[dialect]
    generator = torch.Generator().manual_seed(seed)
    for name in [name.removesuffix(up) for name in tensors if name.endswith(up) and kind != "L"]:
        outs, ins, kernel = len(tensors[name + up]), tensors[name + down].shape[1], [1] * (tensors[name + up].ndim - 2)
        shape = (1, ins, *kernel) if kind == "I" else (1, outs, *kernel) if kernel else (outs,)
        ending = ".dora_scale" if kind == "I" else ".lora_magnitude_vector"
        tensors[name + ending] = 1 + 0.3 * torch.rand(shape, generator=generator)
    return tensors


# ------------------------------------------------ dialects that diffusers does not read


def test_every_ending_is_read_as_a_whole():
    """None is taken for a shorter one that it ends in."""
    for ending, role in reading.ROLES.items():
        assert reading.parsed(f"a.b{ending}") == ("a.b", role)


def deltas(path: Path, config) -> dict:
    return {weight: change.delta() for weight, change in open_lora(path, config).changes.items()}


@pytest.mark.parametrize("dialect", ["kohya_ldm", "peft, default", "diffusers", "old_diffusers", "bare peft"])
def test_dialects_mean_the_same_changes(tmp_path, dialect):
    """The same values under other names are the same changes, at SD 1.5's own layers."""
    config = tiny_model().config
    reference = deltas(write(tmp_path / "a.safetensors", lora(config, alpha=4.0)), config)
    tensors = lora(config, dialect.removeprefix("bare "), alpha=4.0)
    if dialect.startswith("bare"):
        tensors = {name.removeprefix("unet."): tensor for name, tensor in tensors.items() if name.startswith("unet.")}
        reference = {weight: delta for weight, delta in reference.items() if weight[0] == "unet"}
    other = deltas(write(tmp_path / "b.safetensors", tensors), config)
    assert other.keys() == reference.keys() and len(other) >= 128
    assert all(torch.equal(other[weight], reference[weight]) for weight in reference)


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (0.0, 1.0), (4.0, 1.0), (1.0, 0.25), (8.0, 2.0)])
def test_scale_is_alpha_over_rank(tmp_path, alpha, factor):
    """Without alpha, or with an alpha of zero, it is 1."""
    sd = tiny_model()
    path = write(tmp_path / "a.safetensors", lora(sd.config, alpha=alpha, rank=4, only="unet"))
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = load_file(path)
    expected = factor * (tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"])
    assert torch.allclose(deltas(path, sd.config)["unet", "middle.0.attention.self_attn.q.weight"], expected, atol=1e-6)


LAYERS = {  # minisd's name -> kohya's
    "unet": {
        "conv_in": "lora_unet_conv_in",
        "down.2.downsample.conv": "lora_unet_down_blocks_0_downsamplers_0_conv",
        "middle.0.attention.proj_in": "lora_unet_mid_block_attentions_0_proj_in",
        "middle.0.resnet.time": "lora_unet_mid_block_resnets_0_time_emb_proj",
    }
}


def special(kind: str, out: int, width: int, kernel: tuple[int, ...], rank: int = 4) -> tuple[dict, torch.Tensor]:
    """The tensors of one layer in a LyCORIS form, and the change that they stand for, multiplied out by hand."""
    torch.manual_seed(out + width + len(kernel))

    def some(*shape):
        return 0.3 * torch.randn(*shape)

    size = 1
    for n in kernel:
        size *= n
    if kind == "loha":
        a, b, c, d = some(out, rank), some(rank, width * size), some(out, rank), some(rank, width * size)
        parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
        return parts, ((a @ b) * (c @ d)).reshape(out, width, *kernel)
    if kind == "loha, Tucker":
        cores, lefts = (some(rank, rank, *kernel), some(rank, rank, *kernel)), (some(rank, out), some(rank, out))
        rights = some(rank, width), some(rank, width)
        parts = {}
        whole = torch.ones(())
        for n, (core, left, right) in enumerate(zip(cores, lefts, rights, strict=True), 1):
            parts |= {f"hada_t{n}": core, f"hada_w{n}_a": left, f"hada_w{n}_b": right}
            whole = whole * torch.einsum("ijkl,ip,jr->prkl", core, left, right)
        return parts, whole
    if kind == "lokr":
        one, other = some(4, 2), some(out // 4, width // 2, *kernel)
        whole = torch.stack(
            [torch.cat([one[i // (out // 4), j] * other[i % (out // 4)] for j in range(2)]) for i in range(out)]
        )
        return {"lokr_w1": one, "lokr_w2": other}, whole
    if kind == "lokr, Tucker":
        one, core, left, right = some(4, 2), some(rank, rank, *kernel), some(rank, out // 4), some(rank, width // 2)
        other = torch.einsum("ijkl,ip,jr->prkl", core, left, right).contiguous()
        parts = {"lokr_w1": one, "lokr_t2": core, "lokr_w2_a": left, "lokr_w2_b": right}
        return parts, torch.kron(one[..., None, None], other)
    if kind == "lokr, low-rank":
        one, a, b = some(4, 2), some(out // 4, rank), some(rank, width // 2 * size)
        return {"lokr_w1": one, "lokr_w2_a": a, "lokr_w2_b": b}, torch.kron(one, a @ b).reshape(out, width, *kernel)
    up, mid, down = some(out, rank, 1, 1), some(rank, rank, *kernel), some(rank, width, 1, 1)
    whole = torch.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    return {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, whole


@pytest.mark.parametrize("prefix", ["lora_unet", "lycoris"])
@pytest.mark.parametrize("kind", ["loha", "loha, Tucker", "lokr", "lokr, Tucker", "lokr, low-rank", "Tucker"])
def test_lycoris(tmp_path, kind, prefix):
    """LoHa, LoKr, and LoCon around a Tucker core: the change by hand, and the same beside the layer."""
    sd = tiny_model()
    alpha = 2.0
    tensors, expected = {}, {}
    for ours, name in LAYERS["unet"].items():
        layer = sd.unet.get_submodule(ours)
        out, width, *kernel = layer.weight.shape
        if "Tucker" in kind and not kernel:
            continue
        parts, whole = special(kind, out, width, tuple(kernel))
        name = name.replace("lora_unet", prefix)
        tensors |= {f"{name}.{part}": value for part, value in parts.items()} | {f"{name}.alpha": torch.tensor(alpha)}
        expected[ours] = whole * (1 if kind == "lokr" else alpha / 4)
    lora_ = sd.load_lora(write(tmp_path / "a.safetensors", tensors), 0.5)
    for ours, whole in expected.items():
        assert torch.allclose(lora_.changes["unet", f"{ours}.weight"].delta(), whole, atol=1e-5)
        layer = sd.unet.get_submodule(ours)
        x = torch.randn(2, layer.weight.shape[1], *([9, 9] if layer.weight.ndim == 4 else []))
        changed = layer.weight + 0.5 * whole
        if layer.weight.ndim == 4:
            plain = F.conv2d(x, changed, layer.bias, layer.stride, layer.padding)
        else:
            plain = F.linear(x, changed, layer.bias)
        assert torch.allclose(layer(x), plain, atol=1e-4)


def test_dora_as_kohya_writes_it(tmp_path):
    """kohya's `dora_scale`: whichever axis has the lengths, beside the layer it is what baking makes of the weight."""
    sd = tiny_model()
    name, layer = "lora_unet_mid_block_attentions_0_proj_in", sd.unet.middle[0].attention.proj_in
    for shape in ((32, 1, 1, 1), (1, 32, 1, 1)):
        tensors = {k: v for k, v in lora(sd.config, pick=everything, only="unet").items() if k.startswith(name + ".")}
        tensors[f"{name}.dora_scale"] = 1 + torch.rand(shape)
        loaded = sd.load_lora(write(tmp_path / "a.safetensors", tensors), 0.5)
        baked = loaded.changes["unet", "middle.0.attention.proj_in.weight"].baked(layer.weight, 0.5)
        axes = [axis for axis in range(4) if shape[axis] == 1]
        lengths = torch.linalg.vector_norm(baked, dim=axes, keepdim=True)
        assert torch.allclose(lengths, tensors[f"{name}.dora_scale"], atol=1e-5)
        x = torch.randn(1, 32, 5, 5)
        assert torch.allclose(layer(x), F.conv2d(x, baked, layer.bias), atol=1e-5)
        sd.unload_lora()


def test_inpainting_models_take_loras_of_plain_ones(tmp_path):
    """The first four of nine channels change; those of the mask and of the picture below it do not."""
    plain, inpainting = tiny_model(), tiny_model(in_channels=9)
    path = write(tmp_path / "a.safetensors", lora(plain.config, pick=lambda name: name == "conv_in"))
    small = plain.load_lora(path).changes["unet", "conv_in.weight"].delta()
    large = inpainting.load_lora(path).changes["unet", "conv_in.weight"].delta()
    assert torch.equal(large[:, :4], small) and not large[:, 4:].any() and large.shape[1] == 9
    x = torch.randn(1, 9, 8, 8)
    added = inpainting.unet.conv_in(x) - F.conv2d(
        x, inpainting.unet.conv_in.weight, inpainting.unet.conv_in.bias, padding=1
    )
    assert torch.allclose(added, F.conv2d(x[:, :4], small, padding=1), atol=1e-5)


# ------------------------------------------------ loading and unloading


def snapshot(sd) -> dict:
    return {
        part: {name: tensor.clone() for name, tensor in getattr(sd, part).state_dict().items()}
        for part in ("unet", "vae", "text_encoder")
    }


def test_no_weight_is_touched_and_unloading_restores_every_bit(tmp_path):
    sd, context = tiny_model(), torch.randn(1, 77, 64)
    x, before = torch.randn(1, 4, 16, 16), snapshot(sd)
    plain = sd.unet(x, torch.tensor(10), context)
    one = write(tmp_path / "one.safetensors", lora(sd.config))
    two = write(tmp_path / "two.safetensors", lora(sd.config, seed=1))
    sd.load_lora(one)
    with_one = sd.unet(x, torch.tensor(10), context)
    sd.load_lora(two, 0.5)
    assert not torch.equal(sd.unet(x, torch.tensor(10), context), with_one)
    after = snapshot(sd)
    assert all(torch.equal(before[part][name], after[part][name]) for part in before for name in before[part])
    sd.unload_lora(two)
    assert torch.equal(sd.unet(x, torch.tensor(10), context), with_one)
    with pytest.raises(ValueError, match=r"two\.safetensors: is not loaded \(.*one\.safetensors\)"):
        sd.unload_lora(two)
    sd.unload_lora()
    assert torch.equal(sd.unet(x, torch.tensor(10), context), plain) and sd.adapters.loras == []
    sd.unload_lora()  # of nothing: nothing happens


def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    sd = tiny_model()
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 64)
    plain = sd.unet(x, torch.tensor(10), context)
    path = write(tmp_path / "a.safetensors", lora(sd.config))
    read, left = reading.read_tensor, [300]

    def failing(files, name):
        left[0] -= 1
        if not left[0]:
            raise OSError("the disk is gone")
        return read(files, name)

    monkeypatch.setattr(reading, "read_tensor", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        sd.load_lora(path)
    assert left[0] == 0 and sd.adapters.loras == [] and torch.equal(sd.unet(x, torch.tensor(10), context), plain)
    assert not any(module._forward_hooks for module in sd.unet.modules())
    for scale in (float("nan"), float("inf"), "much", None, True):
        with pytest.raises(ValueError, match="must be a finite number"):
            sd.load_lora(path, scale)
    assert sd.adapters.loras == []


@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_saving_bakes(tmp_path, layout):
    """What is written has the LoRAs in its weights: W + scale alpha/rank up down, in float32, then rounded."""
    sd = tiny_model()
    before = snapshot(sd)
    sd.load_lora(write(tmp_path / "one.safetensors", lora(sd.config, pick=everything, spread=0.05)), 0.8)
    sd.load_lora(write(tmp_path / "two.safetensors", lora(sd.config, "peft", spread=0.05, seed=1)), -0.5)
    target = tmp_path / ("saved.safetensors" if layout == "compvis" else "saved")
    sd.save(target, layout=layout)
    baked = minisd.StableDiffusion.load(target)
    name = "middle.0.attention.self_attn.q.weight"
    one, two = (each.lora.changes["unet", name].delta() for each in sd.adapters.loras)
    expected = before["unet"][name] + 0.8 * one + -0.5 * two
    assert torch.allclose(baked.unet.state_dict()[name], expected, rtol=0, atol=1e-7)
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 64)
    with torch.no_grad():
        live, saved = (model.unet(x, torch.tensor(10), context) for model in (sd, baked))
    assert (live - saved).abs().max() < 1e-5 * live.abs().max()  # measured: 6e-7; the order of additions differs
    sd.unload_lora()
    after = snapshot(sd)
    assert all(torch.equal(before[part][name], after[part][name]) for part in before for name in before[part])
    assert not equal(sd, baked)


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["L", "D", "I", "LD", "DL", "DD", "LI", "IL", "DI", "LDL"])
def test_saved_equals_live_in_any_company(tmp_path, kinds):
    """LoRAs (L) and DoRAs (by output D, by input I) of the same layers, in any order."""
    sd, context = tiny_model(), torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = sd.unet(x, torch.tensor(10), context)
    for number, (kind, scale) in enumerate(zip(kinds, (0.9, 0.6, -0.4), strict=False)):
        sd.load_lora(write(tmp_path / f"{number}.safetensors", some(sd.config, kind, number)), scale)
    sd.save(tmp_path / "saved")
    live = sd.unet(x, torch.tensor(10), context)
    saved = minisd.StableDiffusion.load(tmp_path / "saved").unet(x, torch.tensor(10), context)
    assert (live - plain).abs().max() > 0.01 * plain.abs().max()
    assert (live - saved).abs().max() < 1e-5 * live.abs().max()  # measured: at most 1.8e-6, rounding


def test_plain_loras_are_baked_as_one_after_the_other(tmp_path):
    """In float32, with one rounding at the end, whatever the dtype of the weight."""
    sd = tiny_model()
    name = "middle.0.attention.self_attn.q.weight"
    changes = []
    for number in range(3):
        path = write(tmp_path / f"{number}.safetensors", lora(sd.config, only="unet", seed=number))
        changes.append((open_lora(path, sd.config).changes["unet", name], 0.5))
    weight = sd.unet.get_parameter(name)
    one_by_one = weight
    for change, scale in changes:
        one_by_one = change.baked(one_by_one, scale)
    together = baked_together(weight, changes)
    assert torch.equal(together, one_by_one) and together.dtype == torch.float32
    assert torch.equal(baked_together(weight.half(), changes), baked_together(weight.half().float(), changes))
    assert torch.equal(baked_together(weight, []), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["lora_down.weight", "lora_up.weight", "dora_scale"])
def test_numbers_that_are_not_finite(tmp_path, where, value):
    """One in the last layer's tensors: refused before the first layer is touched."""
    sd = tiny_model()
    tensors = some(sd.config, "I", 0)
    name = [name for name in tensors if name.endswith(where)][-1]
    tensors[name][0, -1] = value
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(minisd.CheckpointError, match=f"^{path}: {name} holds NaN or infinite numbers"):
        sd.load_lora(path)
    assert sd.adapters.loras == [] and not any(module._forward_hooks for module in sd.unet.modules())
    changes = open_lora(path, sd.config).changes.values()
    with pytest.raises(minisd.CheckpointError, match="holds NaN or infinite numbers"):
        [baked_together(torch.zeros(change.target.shape), [(change, 1.0)]) for change in changes]


def test_a_loaded_lora_follows_dtype(tmp_path):
    sd = tiny_model()
    sd.unet.to(torch.bfloat16)
    sd.load_lora(write(tmp_path / "a.safetensors", lora(sd.config, only="unet")))
    out = sd.unet(torch.randn(1, 4, 16, 16).bfloat16(), torch.tensor(3), torch.randn(1, 77, 64).bfloat16())
    assert out.dtype == torch.bfloat16


# ------------------------------------------------ what does not fit


def of(name: str, ending: str = "lora") -> dict:
    return {f"{name}.{ending}_down.weight": torch.zeros(2, 8), f"{name}.{ending}_up.weight": torch.zeros(8, 2)}


KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
MID_DOWN = {f"{KEY}.lora_down.weight": torch.zeros(2, 64)}
MID_UP = {f"{KEY}.lora_up.weight": torch.zeros(32, 2)}
BAD = {
    "SDXL, by its second text encoder": (of("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "is a LoRA for SDXL"),
    "SDXL, by its depth": (
        MID_DOWN | MID_UP | of("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"),
        "does not fit this model: it is a LoRA for SDXL.*1 of 2 layers not in the model: lora_unet_input_blocks_4_1",
    ),
    "SD 2": (
        {f"{KEY}.lora_down.weight": torch.zeros(2, 1024), **MID_UP},
        r"a LoRA for SD 2.x.*of another shape: middle.0.attention.cross_attn.k \(64 in, 32 out\) with down \[2, 1024\]",
    ),
    "Flux": (of("lora_unet_double_blocks_0_img_attn_proj"), "is a LoRA for Flux"),
    "unknown layers": (
        MID_DOWN | MID_UP | {k: v for n in range(9) for k, v in of(f"lora_unet_nowhere_{n}").items()},
        r"9 of 10 layers not in the model: lora_unet_nowhere_0, .*nowhere_3, and 5 more",
    ),
    "another width": (MID_DOWN | {f"{KEY}.lora_up.weight": torch.zeros(33, 2)}, r"32 out\) with .* up \[33, 2\]"),
    "ranks that differ": (MID_DOWN | {f"{KEY}.lora_up.weight": torch.zeros(32, 3)}, r"and up \[32, 3\]"),
    "rank zero": ({f"{KEY}.lora_down.weight": torch.zeros(0, 64), f"{KEY}.lora_up.weight": torch.zeros(32, 0)}, "0, 6"),
    "DoRA of another width": (MID_DOWN | MID_UP | {f"{KEY}.dora_scale": torch.zeros(33, 1)}, r"magnitudes \[33, 1\]"),
    "half": (MID_DOWN, "cross_attn.k is incomplete: there is only down"),
    "vectors": ({f"{KEY}.lora_down.weight": torch.zeros(2), **MID_UP}, "are no matrices"),
    "integers": (MID_DOWN | {f"{KEY}.lora_up.weight": torch.zeros(32, 2, dtype=torch.int32)}, "I32.*floating point"),
    "alpha NaN": (MID_DOWN | MID_UP | {f"{KEY}.alpha": torch.tensor(float("nan"))}, "alpha of middle.0.* is not a num"),
    "a boolean alpha": (MID_DOWN | MID_UP | {f"{KEY}.alpha": torch.tensor(True)}, "is not a number"),
    "an endless alpha": (MID_DOWN | MID_UP | {f"{KEY}.alpha": torch.tensor(1e30)}, "beyond 1,000,000"),
    "two alphas": (MID_DOWN | MID_UP | {f"{KEY}.alpha": torch.ones(2)}, "is not a number"),
    "twice": (
        MID_DOWN | MID_UP | {k.replace("lora_unet_mid_block_attentions_0", "lora_unet_middle_block_1"): v.clone()
                             for k, v in (MID_DOWN | MID_UP).items()},
        "are the same tensor",
    ),
    "LoKr, misshapen": ({f"{KEY}.lokr_w1": torch.zeros(3, 3), f"{KEY}.lokr_w2": torch.zeros(5, 5)}, "come out"),
    "GLoRA": ({f"{KEY}.a1.weight": torch.zeros(2, 2)}, "is GLoRA"),
    "IA3": ({f"{KEY}.weight": torch.zeros(2), f"{KEY}.on_input": torch.tensor(True)}, "is IA3"),
    "OFT": ({f"{KEY}.oft_blocks": torch.zeros(2, 2)}, "is OFT"),
    "diff": (MID_DOWN | MID_UP | {f"{KEY}.diff_b": torch.zeros(32)}, "full differences of weights"),
    "biases of layers": (MID_DOWN | MID_UP | {f"{KEY}.bias": torch.zeros(32)}, "a LoRA with biases .PEFT"),
    "whole weights": (MID_DOWN | MID_UP | {"unet.conv_out.weight": torch.zeros(4)}, "whole weights .PEFT's modules_to"),
    "LoHa, misshapen": ({f"{KEY}.hada_w{n}_{side}": torch.zeros(2, 2) for n in "12" for side in "ab"}, "come out"),
    "LoKr, a vector": ({f"{KEY}.lokr_w1": torch.zeros(3), f"{KEY}.lokr_w2": torch.zeros(5, 5)}, "come out"),
    "biases": (MID_DOWN | MID_UP | {f"{KEY}.lora_B.bias": torch.zeros(32)}, "a LoRA with biases"),
    "an embedding": ({"emb_params": torch.zeros(1, 64)}, "is a textual inversion embedding, not a LoRA"),
    "something else": ({"weight": torch.zeros(1)}, r"is not a LoRA for this model: .*1 tensors \(weight\)"),
    "nothing": ({}, r"is not a LoRA"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_named(tmp_path, tensors, message):
    path = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(minisd.CheckpointError, match=f"(?s)^{path}: .*{message}") as caught:
        open_lora(path, tiny_model().config)
    text = str(caught.value)
    assert len(text.splitlines()) <= 3 and len(text) < 1000 + len(str(path))


def test_broken_metadata(tmp_path):
    path = write(tmp_path / "a.safetensors", MID_DOWN | MID_UP, {"lora_adapter_metadata": "[" * 9})
    with pytest.raises(minisd.CheckpointError, match="broken lora_adapter_metadata"):
        open_lora(path, tiny_model().config)


ALPHAS = ["four", "x", [1], {"a": 1}, True, float("nan"), float("inf"), 1e308, 10**400, -(10**400), 1_000_001]


@pytest.mark.parametrize("stabilised", [True, False])
@pytest.mark.parametrize("alpha", ALPHAS, ids=lambda alpha: str(alpha)[:8])
def test_alphas_that_are_none(tmp_path, alpha, stabilised):
    """Whatever metadata say, in general or for a layer: type, finiteness and size before any arithmetic."""
    for settings in ({"unet.lora_alpha": alpha}, {"unet.alpha_pattern": {"attn2.to_k": alpha}}):
        metadata = {"lora_adapter_metadata": json.dumps(settings | {"unet.use_rslora": stabilised})}
        path = write(tmp_path / "a.safetensors", MID_DOWN | MID_UP, metadata)
        with pytest.raises(
            minisd.CheckpointError, match=f"^{path}: the alpha of middle.0.* is not a number, or beyond"
        ):
            open_lora(path, tiny_model().config)


def test_files_that_are_no_safetensors(tmp_path):
    sd = tiny_model()
    with pytest.raises(FileNotFoundError, match="no such file"):
        sd.load_lora(tmp_path / "nowhere.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(minisd.CheckpointError, match="pickle"):
        sd.load_lora(tmp_path / "a.pt")
    sd.save(tmp_path / "model.safetensors", layout="compvis")
    with pytest.raises(minisd.CheckpointError, match="is not a LoRA"):
        sd.load_lora(tmp_path / "model.safetensors")


def test_only_headers_are_read_to_open(tmp_path, monkeypatch):
    """A LoRA of any size is understood from its header and its alphas."""
    path = write(tmp_path / "a.safetensors", lora(SD15, rank=1, only="text_encoder"))
    read = []
    monkeypatch.setattr(reading, "read_tensor", lambda files, name: read.append(name) or torch.ones(()))
    assert len(open_lora(path, SD15).changes) == 48
    assert all(name.endswith(".alpha") for name in read)
    assert sum(1 for _ in shapes(SD15)) == 354 and attention("attn1")
