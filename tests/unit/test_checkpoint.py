"""Every dialect that checkpoints come in, and every reason to refuse one."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minisd
import minisd.tokenizer
from minisd.checkpoint import values
from minisd.checkpoint.hub import STEMS
from minisd.checkpoint.keymap import COMPVIS_PREFIX, ema_name, unet_keys, vae_keys
from minisd.checkpoint.naming import IGNORABLE, ignorable
from minisd.checkpoint.values import Values
from minisd.pipeline import StableDiffusion
from tests.unit.tiny import TOKENIZER, UNET, VAE_CONFIG, compvis_tensors, equal, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def compvis(model, tmp_path_factory):
    """The tiny model's tensors under CompVis' names, without metadata: what a stranger's file would hold."""
    return compvis_tensors(model, tmp_path_factory.mktemp("compvis"))


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def load(path, **settings) -> StableDiffusion:
    return StableDiffusion.load(path, tokenizer=TOKENIZER, **settings)


def write(tensors, path, **metadata):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def rename(tensors, old: str, new: str):
    return {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}


# ------------------------------------------------ both layouts, there and back


@pytest.mark.parametrize("layout", ("diffusers", "compvis"))
def test_round_trip(model, tmp_path, layout):
    model.save(tmp_path / "saved", layout=layout)
    again = StableDiffusion.load(tmp_path / "saved")
    assert equal(model, again) and again.config == model.config
    assert again.tokenizer.vocabulary == TOKENIZER.vocabulary and again.tokenizer.merges == TOKENIZER.merges


def test_compvis_to_diffusers_to_compvis(model, compvis, tmp_path):
    load(write(compvis, tmp_path / "a.safetensors")).save(tmp_path / "folder")
    StableDiffusion.load(tmp_path / "folder").save(tmp_path / "b.safetensors", layout="compvis")
    back = load_file(tmp_path / "b.safetensors")
    assert back.keys() == compvis.keys() and all(torch.equal(back[name], compvis[name]) for name in back)


def test_what_shapes_cannot_tell_is_in_the_metadata(tmp_path):
    """Heads, norm groups and the scaling factor leave no trace in shapes."""
    other = tiny_model(heads=4, norm_groups=8)
    other.save(tmp_path / "model.safetensors", layout="compvis")
    again = StableDiffusion.load(tmp_path / "model.safetensors")
    assert again.config.unet.heads == 4 and again.config == other.config


def test_configuration_from_shapes(compvis, tmp_path):
    sd = load(write(compvis, tmp_path / "a.safetensors"))
    assert (sd.config.unet.widths, sd.config.unet.attention) == (UNET.widths, UNET.attention)
    assert sd.config.unet.heads == 8 and sd.config.text_encoder.heads == 1 and sd.config.vae.norm_groups == 32


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_saving_in_another_dtype(model, tmp_path, dtype):
    model.save(tmp_path / "half", dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors").values()} == {dtype}
    assert StableDiffusion.load(tmp_path / "half", dtype=None).dtype == dtype
    assert StableDiffusion.load(tmp_path / "half").dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_loading_copies_nothing(folder):
    """All weights lie in memory that is mapped from the files."""
    sd = StableDiffusion.load(folder)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for module in (sd.unet, sd.vae, sd.text_encoder):
        for parameter in module.parameters():
            assert any(start <= parameter.data_ptr() < end for start, end in spans)


# ------------------------------------------------ dialects


def older_vae_names(state):
    return {
        (key.older or (key.diffusers,))[0]: state[key.diffusers] for key in vae_keys(VAE_CONFIG)
    }  # query, key, value, proj_attn


def test_older_vae_names(model, folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    write(older_vae_names(load_file(path)), path)
    assert equal(model, StableDiffusion.load(folder))


def test_older_vae_names_in_shards(model, folder):
    """diffusers renames them in single files only, and leaves a sharded VAE half empty."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    shard(older_vae_names(load_file(path)), folder / "vae", "diffusion_pytorch_model", "")
    path.unlink()
    assert equal(model, StableDiffusion.load(folder))


def shard(tensors, folder, stem, infix):
    """Two shards and their index. The variant stands behind "index" there, and before the number here."""
    names = sorted(tensors)
    table = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}{infix}-{number:05}-of-00002.safetensors"
        write({name: tensors[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    index = folder / f"{stem}.safetensors.index{infix}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return index


@pytest.mark.parametrize("shape", ((32, 32), (32, 32, 1), (32, 32, 1, 1)), ids=str)
def test_attention_weights_as_matrix_or_convolution(model, folder, compvis, tmp_path, shape):
    squares = [name for name, t in compvis.items() if ".attn_1." in name and t.ndim == 4]
    assert len(squares) == 8
    single = compvis | {name: compvis[name].reshape(shape) for name in squares}
    assert equal(model, load(write(single, tmp_path / "a.safetensors")))

    path = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    matrices = [name for name, t in state.items() if ".attentions." in name and t.ndim == 2]
    write(state | {name: state[name].reshape(shape) for name in matrices}, path)
    assert equal(model, StableDiffusion.load(folder))


def test_linear_transformer_projections(model, compvis, tmp_path):
    """proj_in and proj_out as matrices, as newer families write them."""
    matrices = {n: t[:, :, 0, 0] for n, t in compvis.items() if ".proj_in.weight" in n or ".proj_out.weight" in n}
    assert equal(model, load(write(compvis | matrices, tmp_path / "a.safetensors")))


@pytest.mark.parametrize("ones", ((1,), (1, 1, 1)))
def test_a_column_is_no_vector(compvis, tmp_path, ones):
    name = next(name for name, tensor in compvis.items() if tensor.ndim == 1)
    column = compvis[name].reshape(-1, *ones)
    with pytest.raises(minisd.CheckpointError, match=re.escape(name)):
        load(write(compvis | {name: column}, tmp_path / "a.safetensors"))


TEXT = "cond_stage_model.transformer.text_model."


@pytest.mark.parametrize(
    ("old", "new"),
    (
        (TEXT, "cond_stage_model.transformer."),
        (TEXT, "cond_stage_model."),
        (TEXT, "te.text_model."),
        (TEXT, "clip_l.text_model."),
        ("first_stage_model.", "vae."),
        ("model.diffusion_model.", "diffusion_model."),
        ("", "module."),
        ("", "_orig_mod."),
        ("", "module._orig_mod."),
        ("", "_orig_mod.module."),
        ("", "_orig_mod.module.model."),
    ),
)
def test_prefixes(model, compvis, tmp_path, old, new):
    assert equal(model, load(write(rename(compvis, old, new), tmp_path / "a.safetensors")))


@pytest.mark.parametrize("bare", (False, True))
def test_text_encoder_with_and_without_prefix(model, folder, bare):
    """transformers 5.6 and later may write the text encoder's names without `text_model.`."""
    path = folder / "text_encoder/model.safetensors"
    state = load_file(path)
    write(rename(state, "text_model.", "") if bare else state, path)
    assert equal(model, StableDiffusion.load(folder))


def test_diffusers_names_in_one_file(model, folder, tmp_path):
    tensors = {}
    for part, stem in STEMS.items():
        state = load_file(folder / part / f"{stem}.safetensors")
        tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
    assert equal(model, load(write(tensors, tmp_path / "a.safetensors")))


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.float16, torch.float32))
def test_position_ids(model, compvis, tmp_path, dtype):
    name = f"{TEXT}embeddings.position_ids"
    ids = torch.arange(77).to(dtype)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(model, load(write(compvis | {name: ids}, tmp_path / "a.safetensors")))


def test_damaged_position_ids_are_reported(model, compvis, tmp_path):
    ids = torch.arange(77, dtype=torch.float32)[None]
    ids[0, 76] = 75.9975
    path = write(compvis | {f"{TEXT}embeddings.position_ids": ids}, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="position_ids is damaged"):
        assert equal(model, load(path))


def with_ema(compvis, average):
    names = {key.compvis: ema_name(key.compvis) for key in unet_keys(UNET)}
    prefix = COMPVIS_PREFIX["unet"]
    extra = {ema: average[prefix + name] for name, ema in names.items()}
    scalars = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    return compvis | extra | scalars


def test_raw_and_averaged_weights(model, compvis, tmp_path):
    other = tiny_model(seed=1)
    path = write(with_ema(compvis, compvis_tensors(other, tmp_path)), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="raw and averaged"):
        assert equal(load(path), model)
    assert equal(load(path, weights="raw"), model)
    assert equal(load(path, weights="ema"), other, ["unet"])


def test_only_averaged_weights(model, compvis, tmp_path):
    kept = {n: t for n, t in with_ema(compvis, compvis).items() if not n.startswith("model.diffusion_model.")}
    path = write(kept, tmp_path / "a.safetensors")
    assert equal(load(path), model)
    with pytest.raises(minisd.CheckpointError, match="no raw UNet"):
        load(path, weights="raw")


def test_scalars_alone_are_no_average(model, compvis, tmp_path):
    """The official "emaonly" file has averaged weights under the raw names, and two `model_ema.` scalars."""
    path = write(compvis | {"model_ema.decay": torch.tensor(0.9)}, tmp_path / "a.safetensors")
    assert equal(load(path), model)
    with pytest.raises(minisd.CheckpointError, match="no ema UNet"):
        load(path, weights="ema")


def test_leftovers(model, compvis, tmp_path):
    names = """betas alphas_cumprod posterior_mean_coef2 lvlb_weights logvar global_step epoch control_model.x.weight
        lora_unet_down_blocks_0.alpha embedding_manager.x denoiser.sigmas first_stage_model.loss.logvar edm_mean
        cond_stage_model.logit_scale""".split()
    extra = {name: torch.zeros(3) for name in names}
    assert equal(model, load(write(compvis | extra, tmp_path / "a.safetensors")))
    assert all(ignorable(name) for name in names) and ignorable("surprise.weight") is None
    assert all(reason for _, reason, _ in IGNORABLE)


def test_prediction_hints(compvis, tmp_path):
    flags = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    scheduler = load(write(compvis | flags, tmp_path / "a.safetensors")).make_scheduler(None)
    assert scheduler.prediction_type == "v_prediction" and scheduler.rescale_betas_zero_snr


def test_casting_reads_pieces_only(model, tmp_path, monkeypatch):
    """Else the file's pages are in memory beside the weights that are made of them."""
    model.save(tmp_path / "model")
    monkeypatch.setattr(values, "PIECE", 100)
    monkeypatch.setattr(Values, "_stored", lambda self, name: pytest.fail(f"{name} is read whole"))
    cast = StableDiffusion.load(tmp_path / "model", dtype=torch.float16)
    assert all(torch.equal(weight, model.state()[name].half()) for name, weight in cast.state().items())


def test_mixed_dtypes(model, compvis, tmp_path):
    dtypes = {"model": torch.float16, "first_stage_model": torch.bfloat16, "cond_stage_model": torch.float32}
    mixed = {name: tensor.to(dtypes[name.partition(".")[0]]) for name, tensor in compvis.items()}
    path = write(mixed, tmp_path / "a.safetensors")
    sd = load(path)
    assert {p.dtype for m in (sd.unet, sd.vae, sd.text_encoder) for p in m.parameters()} == {torch.float32}
    sd = load(path, dtype=None)
    assert [next(m.parameters()).dtype for m in (sd.unet, sd.vae, sd.text_encoder)] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]


def test_variants_side_by_side(folder):
    """fp32 unless half is asked for; `non_ema` only for raw weights; anything rather than nothing."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    write({name: (tensor + 1).half() for name, tensor in state.items()}, path.with_suffix(".fp16.safetensors"))
    write({name: tensor + 2 for name, tensor in state.items()}, path.with_suffix(".non_ema.safetensors"))

    def shift(**settings):
        bias = StableDiffusion.load(folder, **settings).unet.conv_in.bias
        return round((bias.float() - state["conv_in.bias"]).mean().item())

    assert [shift(), shift(dtype=torch.float16), shift(dtype=torch.bfloat16), shift(weights="raw")] == [0, 1, 1, 2]
    path.unlink()
    assert shift() == 1
    path.with_suffix(".fp16.safetensors").unlink()
    assert shift() == 2


@pytest.mark.parametrize("infix", ("", ".fp16"))
def test_shards(model, folder, infix):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    shard(load_file(path), folder / "unet", "diffusion_pytorch_model", infix)
    path.unlink()
    assert equal(model, StableDiffusion.load(folder))


def test_inpainting_and_other_input_channels(compvis, tmp_path):
    wide = compvis | {"model.diffusion_model.input_blocks.0.0.weight": torch.randn(32, 9, 3, 3)}
    sd = load(write(wide, tmp_path / "a.safetensors"))
    assert sd.config.unet.in_channels == 9
    with pytest.raises(ValueError, match="9 channels"):
        sd.text_to_image("cat", steps=1)


def test_another_vae(model, compvis, folder, tmp_path):
    """From a folder, a VAE file with or without prefix, a whole checkpoint; and for a file that has none."""
    other = tiny_model(seed=1)
    theirs = compvis_tensors(other, tmp_path)
    vae = {name: tensor for name, tensor in theirs.items() if name.startswith("first_stage_model.")}
    other.save(tmp_path / "other")
    none = write({n: t for n, t in compvis.items() if n not in vae}, tmp_path / "none.safetensors")
    sources = (
        write(vae, tmp_path / "prefix.safetensors"),
        write(rename(vae, "first_stage_model.", ""), tmp_path / "bare.safetensors"),
        write(theirs, tmp_path / "whole.safetensors"),
        tmp_path / "other",
        tmp_path / "other" / "vae",
    )
    for source in sources:
        for base in (folder, none):
            sd = load(base, vae=source)
            assert equal(sd, other, ["vae"]) and equal(sd, model, ["unet"])
    with pytest.raises(minisd.CheckpointError, match="no VAE; give a VAE with vae="):
        load(none)


# ------------------------------------------------ refusals

STRANGERS = {
    "SDXL": {"conditioner.embedders.0.transformer.x": (1,), "model.diffusion_model.label_emb.0.0.weight": (1,)},
    "SD 2's upscaler": {"low_scale_model.betas": (1,)},
    "SD 3": {"model.diffusion_model.joint_blocks.0.x": (1,)},
    "LoRA": {"lora_unet_a.lora_down.weight": (1,), "lora_unet_a.lora_up.weight": (1,), "lora_unet_a.alpha": ()},
    "ControlNet": {"control_model.input_blocks.0.0.weight": (1,)},
    "textual inversion": {"emb_params": (1, 768)},
    "not a Stable Diffusion model": {"model.layers.0.weight": (1,)},
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_refused_by_name(tmp_path, name):
    path = write({key: torch.zeros(shape) for key, shape in STRANGERS[name].items()}, tmp_path / "a.safetensors")
    with pytest.raises(minisd.CheckpointError, match=name) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_wide_cross_attention_is_another_family(compvis, tmp_path):
    """SD 2.x and SDXL UNets have SD 1.x's names, and text of width 1024 and 2048."""
    for width in (1024, 2048):
        to_context = [name for name in compvis if ".attn2.to_k" in name or ".attn2.to_v" in name]
        wide = compvis | {name: torch.zeros(len(compvis[name]), width) for name in to_context}
        with pytest.raises(minisd.CheckpointError, match=f"the UNet expects text of width {width}"):
            load(write(wide, tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("prefix", "message"),
    (
        ("first_stage_model.", "holds a VAE only.*vae="),
        ("model.diffusion_model.", "holds a UNet only"),
        ("cond_stage_model.", "holds a text encoder only"),
    ),
)
def test_one_component_is_not_a_model(compvis, tmp_path, prefix, message):
    path = write({n: t for n, t in compvis.items() if n.startswith(prefix)}, tmp_path / "a.safetensors")
    with pytest.raises(minisd.CheckpointError, match=message):
        load(path)


def test_all_problems_are_told_together(compvis, tmp_path):
    """In the file's own names and in minisd's, a few of each kind, and how many there are."""
    broken = dict(compvis)
    for block in range(1, 3):
        for name in [name for name in broken if name.startswith(f"model.diffusion_model.output_blocks.{block}.")]:
            del broken[name]
    broken["surprise.weight"] = torch.zeros(1)
    broken["first_stage_model.quant_conv.bias"] = torch.zeros(9)
    with pytest.raises(minisd.CheckpointError) as caught:
        load(write(broken, tmp_path / "a.safetensors"))
    text = str(caught.value)
    assert "missing" in text and "surprise.weight" in text and "[9] in the file, [8] in the model" in text
    assert "model.diffusion_model.output_blocks.1" in text and "minisd: unet.up.1." in text and "more" in text
    assert len(text.splitlines()) <= 25


def test_one_tensor_under_two_names(folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    twin = state["encoder.mid_block.attentions.0.to_q.weight"].clone()
    write(state | {"encoder.mid_block.attentions.0.query.weight": twin}, path)
    with pytest.raises(minisd.CheckpointError, match="two names"):
        StableDiffusion.load(folder)


@pytest.mark.parametrize("dtype", (torch.int8, torch.bool))
def test_weights_that_are_not_floating_point(compvis, tmp_path, dtype):
    name = "model.diffusion_model.out.2.bias"
    with pytest.raises(minisd.CheckpointError, match="dtype"):
        load(write(compvis | {name: compvis[name].to(dtype)}, tmp_path / "a.safetensors"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "word"),
    (
        ("unet/config.json", {"resnet_out_scale_factor": 1.4}, "resnet_out_scale_factor"),
        ("unet/config.json", {"use_linear_projection": "yes"}, "linear_projections"),
        ("unet/config.json", {"norm_eps": "small"}, "norm_eps"),
        ("unet/config.json", {"block_out_channels": [32, 32]}, "disagree"),
        ("unet/config.json", {"attention_head_dim": [5, 10, 20, 20]}, "does not divide"),
        ("unet/config.json", {"attention_head_dim": [1, 2]}, "heads differs between levels"),
        ("unet/config.json", {"norm_num_groups": 7}, "does not divide"),
        ("unet/config.json", {"cross_attention_dim": 32}, "of another shape"),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("text_encoder/config.json", {"hidden_act": "tanh"}, "tanh"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**13}, "layers"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**13}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "zigzag"}, "beta_schedule"),
    ),
)
def test_impossible_configurations(folder, file, changes, word):
    edit_json(folder / file, **changes)
    with pytest.raises(minisd.CheckpointError, match=word) as caught:
        StableDiffusion.load(folder)
    assert str(folder) in str(caught.value)


def test_invented_fields_are_reported_and_ignored(model, folder):
    edit_json(folder / "unet/config.json", invented_field=3)
    with pytest.warns(UserWarning, match="invented_field"):
        assert equal(model, StableDiffusion.load(folder))


def test_early_vae_configs_have_no_scaling_factor(folder):
    config = json.loads((folder / "vae/config.json").read_text())
    del config["scaling_factor"]
    (folder / "vae/config.json").write_text(json.dumps(config))
    assert StableDiffusion.load(folder).vae.scaling_factor == 0.18215


@pytest.mark.parametrize(
    ("file", "content", "word"),
    (
        ("unet/config.json", "{", "not JSON"),
        ("unet/config.json", "[]", "not a JSON object"),
        ("tokenizer/vocab.json", "{}", "vocabulary has no"),
        ("tokenizer/vocab.json", '{"a": -1}', "not a table"),
        ("tokenizer/merges.txt", "a b c\n", "not a list of pairs"),
        ("tokenizer/merges.txt", "zz yy\n", "disagree"),
        ("tokenizer/tokenizer.json", "{}", "not a byte-pair tokenizer"),
    ),
)
def test_broken_text_files(folder, file, content, word):
    (folder / file).write_text(content)
    with pytest.raises(minisd.CheckpointError, match=word) as caught:
        StableDiffusion.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "missing", ("unet", "vae", "text_encoder", "tokenizer", "unet/config.json", "tokenizer/merges.txt")
)
def test_missing_parts(folder, missing):
    import shutil

    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(minisd.CheckpointError, match=missing.rpartition("/")[2].replace(".", r"\.")):
        StableDiffusion.load(folder)


def test_pickles_are_never_opened(folder, tmp_path):
    """Neither in a folder nor by name; opening this one would leave a mark."""
    import pickle

    class Mark:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Mark()))
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Mark()))
    for name in ("evil.ckpt", "evil.safetensors"):
        with pytest.raises(minisd.CheckpointError, match="pickle"):
            load(tmp_path / name)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(minisd.CheckpointError, match="pickles"):
        StableDiffusion.load(folder)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("shard_name", ("../outside.safetensors", "/etc/passwd", "gone.safetensors"))
def test_shard_indexes_stay_in_their_folder(folder, shard_name):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    index = shard(load_file(path), folder / "unet", "diffusion_pytorch_model", "")
    path.unlink()
    table = json.loads(index.read_text())
    table["weight_map"]["conv_in.bias"] = shard_name
    index.write_text(json.dumps(table))
    with pytest.raises(minisd.CheckpointError, match=r"outside|missing"):
        StableDiffusion.load(folder)


def test_components_must_fit_together(folder, model, tmp_path):
    with pytest.raises(minisd.CheckpointError, match="tokenizer"):
        StableDiffusion.load(folder, tokenizer=minisd.tokenizer.CLIPTokenizer.clip())


@pytest.mark.parametrize("source", ("nowhere", "./a/b", "no/such/thing", "nothing.safetensors"))
def test_no_such_path(source):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(source)


@pytest.mark.parametrize("settings", ({"weights": "best"}, {"device": "toaster"}))
def test_impossible_arguments(folder, settings):
    with pytest.raises(ValueError, match=next(iter(settings.values()))):
        load(folder, **settings)


# ------------------------------------------------ writing


def test_saving_replaces_models_and_nothing_else(model, tmp_path):
    model.save(tmp_path / "model")
    again = StableDiffusion.load(tmp_path / "model")
    again.save(tmp_path / "model")  # over the file that its own weights are mapped from
    assert equal(model, StableDiffusion.load(tmp_path / "model"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds cat\.png, which minisd did not write"):
        model.save(tmp_path / "photos")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "photos"]


def test_an_interrupted_save_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr("minisd.checkpoint.save.save_file", lambda *_, **__: 1 / 0)
    for layout in ("diffusers", "compvis"):
        with pytest.raises(ZeroDivisionError):
            model.save(tmp_path / "new", layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_cannot_finish_puts_the_old_model_back(model, folder, monkeypatch):
    def fail(*_):
        raise OSError("disk on fire")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="fire"):
        patch.setattr("minisd.checkpoint.save.os.replace", fail)
        tiny_model(seed=1).save(folder)
    assert equal(model, StableDiffusion.load(folder)) and len(list(folder.parent.iterdir())) == 1


def test_numbers_that_no_file_can_tell_are_not_lost_silently(tmp_path):
    with pytest.raises(ValueError, match="transformer_norm_eps"):
        tiny_model(transformer_norm_eps=1e-5).save(tmp_path / "x")


def test_bad_arguments_of_save(model, tmp_path):
    with pytest.raises(ValueError, match="layout"):
        model.save(tmp_path / "x", layout="zip")
    with pytest.raises(ValueError, match="dtype"):
        model.save(tmp_path / "x", dtype=torch.int8)
