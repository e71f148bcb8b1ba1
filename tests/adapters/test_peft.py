"""Adapters as PEFT and diffusers themselves write them: each change at its own strength, or refused by name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import minisd
from minisd.adapters.lora import open_lora
from tests.adapters.makers import lora, write
from tests.unit.tiny import tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
TARGETS = ["to_q", "ff.net.2", "conv1"]
Q = "attn2.to_q"

CONFIGS = {
    "LoRA": ("LoraConfig", {"lora_alpha": 6}),
    "LoRA, stabilised": ("LoraConfig", {"lora_alpha": 6, "use_rslora": True}),
    "LoRA, patterns": (
        "LoraConfig",
        {"lora_alpha": 6, "alpha_pattern": {Q: 1, r"up_blocks\..*\.conv1": 3, "conv1": 9}, "rank_pattern": {Q: 2}},
    ),
    "LoHa": ("LoHaConfig", {"alpha": 1}),
    "LoHa, convolutions": ("LoHaConfig", {"alpha": 6, "use_effective_conv2d": True, "alpha_pattern": {Q: 3}}),
    "LoKr": ("LoKrConfig", {"alpha": 1}),
    "LoKr, of two whole matrices": ("LoKrConfig", {"alpha": 5, "r": 200, "rank_pattern": {Q: 100}}),
    "LoKr, both low-rank": ("LoKrConfig", {"alpha": 6, "r": 2, "decompose_both": True}),
    "LoKr, convolutions": ("LoKrConfig", {"alpha": 6, "r": 2, "use_effective_conv2d": True}),
}


def made(kind: str, settings: dict):
    """One of PEFT's configurations, for random values."""
    unset = {"init_lora_weights" if kind == "LoraConfig" else "init_weights": False}
    return getattr(peft, kind)(**{"r": 4, "target_modules": TARGETS, **unset, **settings})


@pytest.fixture
def unet(twin):
    """diffusers' UNet of the twin, to be wrapped."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(f"{twin[1]}/unet")


@pytest.mark.parametrize(("kind", "settings"), CONFIGS.values(), ids=CONFIGS)
def test_peft_folders(unet, pair, tmp_path, kind, settings):
    """Every layer's change is PEFT's own, loaded from the folder and from the file in it."""
    model = peft.get_peft_model(unet, made(kind, settings))
    model.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(model.unload(), tmp_path)  # in the file, patterns are in another order
    config = pair[1].config
    found = open_lora(tmp_path, config)
    assert found.note() is None and found.path == tmp_path
    again = open_lora(tmp_path / "adapter_model.safetensors", config)
    assert len(found.changes) > 40
    for weight, change in found.changes.items():
        layer = model.base_model.model.get_submodule(change.target.diffusers)
        expected = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(change.delta(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(again.changes[weight].delta(), change.delta())


@pytest.mark.parametrize("way", ["save_lora_weights", "save_lora_weights, no settings", "save_lora_adapter"])
def test_three_ways_of_diffusers(unet, pair, inputs, tmp_path, way):
    """The UNet with the adapter gives diffusers' numbers, whoever wrote it, with its alphas where there are some."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    ours = pair[1]
    plain = way.endswith("no settings")  # the pipeline drops the alphas, unless it is given them
    alphas = {} if plain else {"lora_alpha": 9, "use_rslora": True, "alpha_pattern": {Q: 2}}
    config = made("LoraConfig", {"lora_alpha": 4, "target_modules": ["to_q", "to_v"], **alphas})
    unet.add_adapter(config)
    if way.startswith("save_lora_weights"):
        layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
        about = None if plain else {name: vars(config)[name] for name in ("r", *alphas)}
        StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=about)
    else:
        unet.save_lora_adapter(tmp_path)
    latents, timestep, context = inputs
    with torch.no_grad():
        expected = unet(latents, timestep, context).sample
        try:
            if plain:
                with pytest.warns(UserWarning, match="says no alpha anywhere"):
                    ours.load_lora(tmp_path)
            else:
                ours.load_lora(tmp_path)
            assert torch.equal(ours.unet(latents, timestep, context), expected)
        finally:
            ours.unload_lora()


REFUSED = {
    "biases": {"bias": "lora_only"},
    "biases of its own": {"lora_bias": True},
    "modules": {"modules_to_save": ["conv_out"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "a changed base": {"init_lora_weights": "pissa_niter_4"},
    "another method": {"peft_type": "BOFT"},
    "DoRA without magnitudes": {"use_dora": True},
    "a pattern that takes forever": {"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}},
    "a pattern that is none": {"lora_alpha": 1, "alpha_pattern": {"a[": 2}},
}


@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED)
def test_settings_that_are_not_applied_are_named(tmp_path, settings):
    config = tiny_model().config
    tensors = {
        f"base_model.model.{name.removeprefix('unet.')}": one for name, one in lora(config, "peft", only="unet").items()
    }
    write(tmp_path / "adapter_model.safetensors", {k: v for k, v in tensors.items() if not k.endswith("alpha")})
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    name = re.escape(str(list(settings)[-1])) if "alpha_pattern" not in settings else "pattern"
    with pytest.raises(minisd.CheckpointError, match=rf"^{tmp_path}.*: its settings .*{name}"):
        open_lora(tmp_path, config)


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"modules_to_save": ["conv_out"]}, {"lora_bias": True}])
def test_real_files_with_more_than_a_lora(unet, pair, tmp_path, settings):
    """PEFT's own files, without the configuration beside them: the tensors tell it too."""
    peft.get_peft_model(unet, made("LoraConfig", settings)).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(minisd.CheckpointError, match=r"is a LoRA with (biases|whole weights)"):
        open_lora(tmp_path, pair[1].config)


def test_folders_without_an_adapter(tmp_path):
    config = tiny_model().config
    with pytest.raises(minisd.CheckpointError, match=r"is a folder without adapter_model.safetensors"):
        open_lora(tmp_path, config)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(minisd.CheckpointError, match=r"--from-pickle` makes one of adapter_model.bin"):
        open_lora(tmp_path, config)


def test_embeddings_in_a_lora(tmp_path):
    """They are tokens while the LoRA is loaded; what is none for SD 1.x is named."""
    sd = tiny_model()
    width = sd.config.text_encoder.width
    vectors = torch.randn(2, width)
    tensors = lora(sd.config, only="unet") | {"bundle_emb.hero.string_to_param.*": vectors}
    tensors |= {"bundle_emb.he.ro2.emb_params": vectors[:1] + 1}
    before = sd.tokenizer
    sd.load_lora(write(tmp_path / "a.safetensors", tensors))
    assert torch.equal(sd.adapters.embeddings["hero"], vectors) and "he.ro2" in sd.adapters.embeddings
    assert sd.tokenizer.tokens("hero")[1:-1] == ["hero", "hero_1"]
    with pytest.raises(ValueError, match="loaded already"):
        sd.load_lora(write(tmp_path / "b.safetensors", tensors))
    assert len(sd.adapters.loras) == 1
    sd.unload_lora()
    assert sd.tokenizer is before and not sd.adapters.embeddings
    for name, tensor in {"x.clip_g": vectors + 1, "hero.emb_params": vectors + 1}.items():
        bad = write(tmp_path / "c.safetensors", tensors | {f"bundle_emb.{name}": tensor})
        with pytest.raises(minisd.CheckpointError, match="the embedding in it"):
            sd.load_lora(bad)


def test_merging_refuses_embeddings_by_name(tmp_path):
    from minisd.lab.weights.merge import merge

    sd = tiny_model()
    sd.save(tmp_path / "a.safetensors", layout="compvis")
    words = {"bundle_emb.hero.string_to_param.*": torch.randn(1, sd.config.text_encoder.width)}
    path = write(tmp_path / "lora.safetensors", lora(sd.config, only="unet") | words)
    with pytest.raises(minisd.CheckpointError, match=r"has embeddings in it .hero."):
        merge(tmp_path / "a.safetensors", None, tmp_path / "b.safetensors", loras=[(path, 1.0)])


def test_extracted_queries_alone_count_in_diffusers(twin, pair, inputs, tmp_path):
    """diffusers drops a text encoder's layers whose attention block lacks out_proj: zeros stand there."""
    from diffusers import StableDiffusionPipeline

    from minisd.lab.weights.extract import extract

    sd = minisd.StableDiffusion.load(twin[1])
    sd.save(tmp_path / "a")
    torch.manual_seed(0)
    weight = sd.state()["text_encoder.layers.1.self_attn.q.weight"]
    weight += 0.3 * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
    sd.save(tmp_path / "b")
    made = extract(tmp_path / "a", tmp_path / "b", rank=2, target=tmp_path / "lora.safetensors", dtype=torch.float32)
    names = {name.rpartition(".lora")[0].partition("self_attn_")[2] for name in load_file(made.path) if ".lora" in name}
    assert names == {"q_proj", "out_proj"}
    theirs = StableDiffusionPipeline.from_pretrained(twin[1])
    theirs.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    ours = minisd.StableDiffusion.load(twin[1])
    plain = ours.text_encoder(ours.tokenizer("a cat"))
    ours.load_lora(made.path)
    with torch.no_grad():
        context = ours.text_encoder(ours.tokenizer("a cat"))
        assert torch.equal(theirs.text_encoder(ours.tokenizer("a cat"))[0], context)
    assert (context - plain).abs().max() > 1e-3
