"""A zoo of checkpoints: the smallest file of every dialect, and one of every kind of broken file.

    python -m minisd.lab.zoo FOLDER

writes them, 4 MB in all, most of which is headers, with `zoo.json`. That says of each what a careful program does with
it: "loads" it (as a whole model, the same one in every dialect), "describes" it (it is sound, but no Stable Diffusion
1.x that can be loaded), or "refuses" it, and which word belongs into the message. Made for minisd's tests, and for
those of any other program.
"""

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minisd.checkpoint.keymap import COMPVIS_PREFIX, ema_name, model_keys
from minisd.checkpoint.naming import TEXT_PREFIX
from minisd.checkpoint.save import settings_as_metadata
from minisd.config import SD15
from minisd.lab.weights.convert import convert
from minisd.pipeline import StableDiffusion
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import CLIPTokenizer, vocabulary_of
from minisd.unet import UNet
from minisd.vae import VAE

Tensors = dict[str, Tensor]

UNET, VAE_PREFIX, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
POSITION_IDS = TEXT + "text_model.embeddings.position_ids"
QUERY = UNET + "middle_block.1.transformer_blocks.0.attn2.to_q"


@dataclass(frozen=True)
class Specimen:
    """One file or folder of the zoo."""

    path: str  # below the zoo's folder
    fate: str  # "loads", "describes" or "refuses"
    word: str = ""  # what the message says, where it does not load
    same: bool = True  # of what loads: are the weights those of the first specimen, bit for bit?


def smallest_model() -> StableDiffusion:
    """A Stable Diffusion of 12,000 weights; all that a larger one has, it has once."""
    words = CLIPTokenizer(vocabulary_of([]), [], pad_token="<|endoftext|>", context_length=16)
    torch.manual_seed(0)
    text = replace(
        SD15.text_encoder, vocabulary=len(words.vocabulary), width=4, heads=1, layers=1, hidden_width=4,
        context_length=16,
    )  # fmt: skip
    unet = replace(
        SD15.unet, sample_size=8, widths=(4, 4), attention=(True, False), resnets_per_level=1, heads=2,
        context_width=4, norm_groups=2,
    )  # fmt: skip
    vae = replace(SD15.vae, sample_size=16, widths=(4, 4), resnets_per_level=1, norm_groups=2)
    sd = StableDiffusion(TextEncoder(text), UNet(unet), VAE(vae), words, scheduler=SD15.scheduler)
    for module in (sd.text_encoder, sd.unet, sd.vae):
        for parameter in module.eval().parameters():
            nn.init.normal_(parameter, 0, 0.1)
            for small in (torch.float8_e4m3fn, torch.float8_e5m2):  # so that all precisions hold the same
                parameter.data = parameter.data.to(small).float()
    return sd


def write_zoo(folder: str | os.PathLike[str]) -> list[Specimen]:
    """Write every specimen below `folder`, which is made, and `zoo.json`; returns the list."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    sd = smallest_model()
    sd.save(root / "compvis.safetensors", layout="compvis")
    metadata = settings_as_metadata(sd.config, sd.tokenizer, {})
    tensors = compvis_tensors(sd)
    keeper = Keeper(root, tensors, metadata)
    specimens = [
        Specimen("compvis.safetensors", "loads"),
        *precisions(keeper),
        *names(keeper, sd),
        *companions(keeper),
        *folders(root, sd),
        *parts(keeper),
        *faults(keeper),
        *strangers(keeper),
        *adapters(keeper),
        *broken(root),
        *broken_folders(root),
    ]
    table = [vars(specimen) for specimen in specimens]
    (root / "zoo.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return specimens


def compvis_tensors(sd: StableDiffusion) -> Tensors:
    """The model under CompVis' names."""
    state = sd.state()
    return {
        COMPVIS_PREFIX[component] + key.compvis: state[f"{component}.{key.minisd}"].reshape(key.compvis_shape)
        for component, keys in model_keys(sd.config).items()
        for key in keys
    }


@dataclass(frozen=True)
class Keeper:
    """Writes variations of one single file."""

    root: Path
    tensors: Tensors
    metadata: Mapping[str, str]

    def write(
        self, name: str, tensors: Mapping[str, Tensor], fate: str = "loads", word: str = "", *, same: bool = True,
        more: Mapping[str, str] | None = None,
    ) -> Specimen:  # fmt: skip
        """A file of these tensors, with the settings of the model in its metadata."""
        path = f"{name}.safetensors"
        told = {} if word in STRANGERS else {**self.metadata, **(more or {})}
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, self.root / path, told)
        return Specimen(path, fate, word, same)

    def renamed(self, old: str, new: str) -> Tensors:
        """The model with another prefix."""
        return {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in self.tensors.items()}

    def only(self, *prefixes: str) -> Tensors:
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefixes)}

    def without(self, *prefixes: str) -> Tensors:
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(prefixes)}


# ---- what loads ------------------------------------------------------------------------------------------


def precisions(keeper: Keeper) -> Iterator[Specimen]:
    """The dtypes people store, alone and mixed, and 8-bit floats with the scales that have to be multiplied in."""
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
    dtypes |= {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    for name, dtype in dtypes.items():
        yield keeper.write(name, {key: tensor.to(dtype) for key, tensor in keeper.tensors.items()})
    yield keeper.write("mixed", keeper.tensors | {name: t.half() for name, t in keeper.only(UNET).items()})
    rows = torch.tensor([2.0**n for n in range(-2, 2)])
    scales = {
        "fp8_scale_weight": {QUERY + ".scale_weight": torch.tensor(0.25), "scaled_fp8": torch.zeros(2)},
        "fp8_weight_scale": {QUERY + ".weight_scale": torch.tensor([0.25]), QUERY + ".input_scale": torch.ones(1)},
        "fp8_scale_by_row": {QUERY + ".weight_scale": rows.reshape(-1, 1)},
    }
    for name, scale in scales.items():
        factor = next(iter(scale.values()))
        small = {QUERY + ".weight": (keeper.tensors[QUERY + ".weight"] / factor).to(torch.float8_e4m3fn)}
        yield keeper.write(name, keeper.tensors | small | scale)


def names(keeper: Keeper, sd: StableDiffusion) -> Iterator[Specimen]:
    """What the same weights are called."""
    yield keeper.write("text_without_prefix", keeper.renamed(TEXT + TEXT_PREFIX, TEXT))
    for wrapper in ("module.", "_orig_mod."):
        yield keeper.write(f"wrapped_{wrapper.strip('._')}", {wrapper + n: t for n, t in keeper.tensors.items()})
    state = sd.state()
    for name, prefixes in {
        "diffusers_names": ("unet.", "vae.", "text_encoder."),
        "diffusers_names_clip_l": ("unet.", "vae.", "clip_l."),
    }.items():
        yield keeper.write(
            name,
            {
                prefix + key.diffusers: state[f"{component}.{key.minisd}"]
                for (component, keys), prefix in zip(model_keys(sd.config).items(), prefixes, strict=True)
                for key in keys
            },
        )
    shapes = {n: t.squeeze() for n, t in keeper.tensors.items() if n.endswith((".q.weight", "proj_in.weight"))}
    yield keeper.write("matrices_for_convolutions", keeper.tensors | shapes)


def companions(keeper: Keeper) -> Iterator[Specimen]:
    """What stands beside the model in a file."""
    averaged = {ema_name(name.removeprefix(UNET)): tensor for name, tensor in keeper.only(UNET).items()}
    raw = {name: tensor + 1 for name, tensor in keeper.only(UNET).items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    yield keeper.write("ema_only", keeper.without(UNET) | averaged | counters)
    yield keeper.write("raw_and_ema", keeper.tensors | raw | averaged | counters, same=False)
    yield keeper.write("ema_counters", keeper.tensors | counters)
    buffers = ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef2", "logvar")
    trainer = {"global_step": torch.tensor(840_000), "epoch": torch.tensor(3)}
    yield keeper.write("trained", keeper.tensors | trainer | {name: torch.zeros(1000) for name in buffers})
    for name, ids in {"int64": torch.arange(16), "fp16": torch.arange(16).half(), "damaged": torch.ones(16)}.items():
        yield keeper.write(f"position_ids_{name}", keeper.tensors | {POSITION_IDS: ids[None]})
    groups = ("control_model.input_hint_block.0.bias", "lora_te_x.alpha", "embedding_manager.x", "denoiser.sigmas")
    rest = (*groups, "first_stage_model.loss.logvar", "cond_stage_model.logit_scale")
    yield keeper.write("passengers", keeper.tensors | {name: torch.zeros(1) for name in rest})
    unscheduled = json.loads(keeper.metadata["minisd.config"])
    del unscheduled["scheduler"]
    silent = {"minisd.config": json.dumps(unscheduled)}  # nothing of minisd's own says what is predicted
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    yield keeper.write("v_prediction", keeper.tensors | markers, more=silent)
    for name, kind in {"modelspec": "epsilon", "modelspec_v": "v"}.items():
        described = {"modelspec.architecture": "stable-diffusion-v1", "modelspec.prediction_type": kind}
        yield keeper.write(name, keeper.tensors, more=described | silent)
    yield keeper.write("yaml_v", keeper.tensors, more=silent)
    (keeper.root / "yaml_v.yaml").write_text('model:\n  params:\n    parameterization: "v"\n', encoding="utf-8")
    channels = {UNET + "input_blocks.0.0.weight": torch.zeros(4, 9, 3, 3)}
    settings = json.loads(keeper.metadata["minisd.config"])
    settings["unet"]["in_channels"] = 9
    wide = {"minisd.config": json.dumps(settings)}
    yield keeper.write("inpainting", keeper.tensors | channels, same=False, more=wide)


def folders(root: Path, sd: StableDiffusion) -> Iterator[Specimen]:
    """diffusers' layout, with its variants."""
    vae, unet = "vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"

    def folder(name: str, change: Callable[[Path], object] = lambda _: None) -> Specimen:
        sd.save(root / name)
        change(root / name)
        return Specimen(name, "loads")

    def variant(name: str) -> Callable[[Path], object]:
        return lambda at: [path.rename(path.with_suffix(f".{name}.safetensors")) for path in at.glob("*/*.safetensors")]

    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    yield folder("diffusers")
    yield folder("diffusers_fp16", variant("fp16"))
    yield folder("diffusers_old_vae_names", lambda at: rewrite(at / vae, lambda n, t: (replaced(n, older), t)))
    yield folder(
        "diffusers_vae_convolutions",
        lambda at: rewrite(at / vae, lambda n, t: (n, t[..., None, None] if ".to_" in n and t.ndim == 2 else t)),
    )
    yield folder(
        "diffusers_bare_text_encoder",
        lambda at: rewrite(at / "text_encoder/model.safetensors", lambda n, t: (n.removeprefix(TEXT_PREFIX), t)),
    )
    yield folder("diffusers_non_ema", lambda at: rewrite(at / unet, lambda n, t: (n, t + 1), ".non_ema"))
    convert(root / "diffusers", root / "diffusers_shards", shard_size=10_000)
    yield Specimen("diffusers_shards", "loads")


def replaced(name: str, changes: Mapping[str, str]) -> str:
    return next((name.replace(old, new) for old, new in changes.items() if old in name), name)


def rewrite(path: Path, change: Callable[[str, Tensor], tuple[str, Tensor]], variant: str = "") -> None:
    """Write a file's tensors anew under other names or with other values, as a variant beside it or in its place."""
    tensors = dict(change(name, tensor) for name, tensor in load_file(path).items())
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(f"{variant}.safetensors")
    )


# ---- what is sound, but no whole model -------------------------------------------------------------------


def parts(keeper: Keeper) -> Iterator[Specimen]:
    """Components alone."""
    yield keeper.write("vae_only", keeper.only(VAE_PREFIX), "describes", "VAE only")
    bare = {name.removeprefix(VAE_PREFIX): tensor for name, tensor in keeper.only(VAE_PREFIX).items()}
    yield keeper.write("vae_only_bare", bare, "describes", "VAE only")
    yield keeper.write("unet_only", keeper.only(UNET), "describes", "UNet only")
    yield keeper.write("text_only", keeper.only(TEXT), "describes", "text encoder only")
    yield keeper.write("no_vae", keeper.without(VAE_PREFIX), "describes", "no VAE")


def faults(keeper: Keeper) -> Iterator[Specimen]:
    """One thing wrong each."""
    bias, head = UNET + "out.2.bias", UNET + "input_blocks.0.0.weight"
    yield keeper.write("missing_tensor", keeper.without(bias), "describes", bias)
    yield keeper.write("misshapen", keeper.tensors | {bias: torch.zeros(5)}, "describes", bias)
    yield keeper.write("unknown_tensor", keeper.tensors | {"surprise": torch.zeros(3)}, "describes", "surprise")
    for name, dtype in {"int8": torch.int8, "bool": torch.bool}.items():
        yield keeper.write(
            f"weights_{name}", keeper.tensors | {head: keeper.tensors[head].to(dtype)}, "describes", head
        )
    scale = {QUERY + ".scale_weight": torch.ones(3), QUERY + ".weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}
    yield keeper.write("fp8_unfit_scale", keeper.tensors | scale, "describes", "scale_weight")
    broken = {"minisd.config": "{"}
    yield keeper.write("broken_settings", keeper.tensors, "describes", "minisd.config", more=broken)


STRANGERS = {
    "SDXL": "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
    "SD 3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "Flux": "double_blocks.0.img_attn.qkv.weight",
    "ControlNet": "control_model.input_hint_block.0.weight",
    "TAESD": "taesd_decoder.1.weight",
    "IP-Adapter": "ip_adapter.1.to_k_ip.weight",
    "LoRA": "lora_unet_mid_block_attentions_0_proj_in",
    "embedding": "emb_params",
    "not ": "model.layers.0.mlp.gate_proj.weight",
}


def strangers(keeper: Keeper) -> Iterator[Specimen]:
    """Models of other kinds, by one of their tensors."""
    for word, tensor in STRANGERS.items():
        if word not in ("LoRA", "embedding"):
            name = "stranger_" + (word.strip().lower().replace(" ", "_").replace("-", "_") if word != "not " else "llm")
            yield keeper.write(name, {tensor: torch.zeros(4, 4)}, "describes", word)


def adapters(keeper: Keeper) -> Iterator[Specimen]:
    """LoRAs and textual inversions of every dialect: for SD 1.5's own sizes."""
    kohya, path = STRANGERS["LoRA"], "mid_block.attentions.0.proj_in"
    down, up = torch.zeros(1, 1280), torch.zeros(1280, 1)
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    loras = {
        "kohya": {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.alpha": torch.ones(())},
        "compvis": {
            f"lora_unet_middle_block_1_proj_in.lora_{end}.weight": part for end, part in (("down", down), ("up", up))
        },
        "peft": {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up},
        "diffusers": {f"unet.{path}.lora.down.weight": down, f"unet.{path}.lora.up.weight": up},
        "old_diffusers": {
            f"{attention}.processor.to_q_lora.{end}.weight": part for end, part in (("down", down), ("up", up))
        },
        "locon_tucker": {
            "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": down[..., None, None],
            "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": torch.zeros(1, 1, 3, 3),
            "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": up[..., None, None],
        },
        "loha": {f"{kohya}.hada_w{n}_{end}": up if end == "a" else down for n in (1, 2) for end in "ab"},
        "lokr": {f"{kohya}.lokr_w1": torch.zeros(40, 40), f"{kohya}.lokr_w2": torch.zeros(32, 32)},
        "dora": {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.dora_scale": up},
    }
    for name, tensors in loras.items():
        yield keeper.write(f"lora_{name}", tensors, "describes", "LoRA")
    embeddings = {
        "emb_params": {"emb_params": torch.zeros(2, 768)},
        "named": {"<cat>": torch.zeros(768)},
        "sdxl": {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)},
    }
    for name, tensors in embeddings.items():
        yield keeper.write(f"embedding_{name}", tensors, "describes", "embedding")


# ---- what is broken --------------------------------------------------------------------------------------


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file, byte by byte: right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOUR = b"\0" * 4
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "short": (b"abc", "too short"),
    "text": (b"this is not a weight file at all, but a letter\n", "not a safetensors file"),
    "header_longer_than_file": (raw({}, length=5000), "truncated"),
    "header_of_terabytes": (raw({}, length=1 << 60), "100 MB"),
    "not_json": (raw(b"{not json}"), "not JSON"),
    "not_utf8": (raw(b'{"\xff": 1}'), "not JSON"),
    "nested": (raw(b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"), "broken header"),
    "number_of_5000_digits": (raw(b'{"a":' + b"1" * 5000 + b"}"), "not JSON"),
    "not_an_object": (raw(b"[]"), "not a safetensors file"),
    "duplicate_name": (raw(b'{"a": 1, "b": 2, "a": 1}'), "twice"),
    "no_description": (raw({"a": 3}), "no description"),
    "unknown_dtype": (raw({"a": entry(dtype="F77")}, FOUR), "dtype"),
    "dtype_is_a_list": (raw({"a": entry(dtype=["F32"])}, FOUR), "dtype"),
    "negative_shape": (raw({"a": entry([-1])}, FOUR), "shape"),
    "fractional_shape": (raw({"a": entry([1.0])}, FOUR), "shape"),
    "a_thousand_axes": (raw({"a": entry([1] * 1000)}, FOUR), "shape"),
    "overflowing_shape": (raw({"a": entry([1 << 62, 1 << 62])}, FOUR), "does not fit"),
    "wrong_shape": (raw({"a": entry([3])}, FOUR), "does not fit"),
    "backward_offsets": (raw({"a": entry(offsets=[4, 0])}, FOUR), "does not fit"),
    "no_offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}, FOUR), "offsets"),
    "terabytes_claimed": (raw({"a": entry([1 << 40], [0, 1 << 42])}, FOUR), "truncated"),
    "overlap": (raw({"a": entry(), "b": entry()}, FOUR), "overlap"),
    "hole": (raw({"a": entry(), "b": entry(offsets=[8, 12])}, FOUR * 3), "hole"),
    "truncated": (raw({"a": entry([4], [0, 16])}, FOUR * 3), "truncated"),
    "trailing_bytes": (raw({"a": entry()}, FOUR + b"x"), "after its last tensor"),
    "metadata_of_numbers": (raw({"__metadata__": {"a": 1}, "a": entry()}, FOUR), "metadata"),
    "pickle": (b"\x80\x04\x95" + b"0" * 40, "convert"),
    "zip": (b"PK\x03\x04" + b"0" * 40, "convert"),
    "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265146304\n", "LFS"),
    "web_page": (b"<!DOCTYPE html><html><body>404: not found</body></html>", "HTML"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 40, "GGUF"),
}


def broken(root: Path) -> Iterator[Specimen]:
    """Files that are no safetensors, or damaged ones."""
    for name, (content, word) in BROKEN.items():
        (root / f"{name}.safetensors").write_bytes(content)
        yield Specimen(f"{name}.safetensors", "refuses", word)
    (root / "folder.safetensors").mkdir(exist_ok=True)
    yield Specimen("folder.safetensors", "refuses", "folder")
    for name, target in (("loop_a", "loop_b"), ("loop_b", "loop_a")):
        link = root / f"{name}.safetensors"
        link.unlink(missing_ok=True)
        link.symlink_to(f"{target}.safetensors")
    yield Specimen("loop_a.safetensors", "refuses", "cannot be read")
    if hasattr(os, "mkfifo"):
        pipe = root / "pipe.safetensors"
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        yield Specimen("pipe.safetensors", "refuses", "not a regular file")


def broken_folders(root: Path) -> Iterator[Specimen]:
    """Folders in diffusers' layout with one file wrong. Weights are linked, not copied."""
    files = ("unet/config.json", "vae/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json")
    unet, vae, vocabulary, scheduler = files

    def edited(name: str, **changes: Any) -> str:
        return json.dumps(json.loads((root / "diffusers" / name).read_text(encoding="utf-8")) | changes)

    cases: dict[str, tuple[str, str | None, str, str]] = {
        "config_not_json": (unet, "{", "refuses", "not JSON"),
        "config_of_another_shape": (unet, edited(unet, cross_attention_dim=8), "describes", "attn2"),
        "config_impossible": (vae, edited(vae, scaling_factor=0), "describes", "scaling_factor"),
        "config_contradictory": (unet, edited(unet, down_block_types=["DownBlock2D"]), "describes", "block"),
        "config_unsupported": (unet, edited(unet, resnet_out_scale_factor=1.4), "describes", "1.4"),
        "schedule_impossible": (scheduler, edited(scheduler, num_train_timesteps=10**13), "describes", f"{10**13}"),
        "tokenizer_corrupt": (vocabulary, '{"a": ', "describes", "vocab.json"),
        "tokenizer_missing": (vocabulary, None, "describes", "tokenizer"),
    }
    for name, (file, text, fate, word) in cases.items():
        path = copy_of(root / "diffusers", root / f"folder_{name}") / file
        path.unlink()
        if text is not None:
            path.write_text(text, encoding="utf-8")
        yield Specimen(f"folder_{name}", fate, word)
    index = "diffusion_pytorch_model.safetensors.index.json"
    for name, shard, word in (("shard_missing", "gone.safetensors", "missing"), ("shard_outside", "../x", "outside")):
        folder = copy_of(root / "diffusers_shards", root / f"folder_{name}") / "unet"
        table = json.loads((folder / index).read_text(encoding="utf-8"))
        first = next(iter(table["weight_map"]))
        (folder / index).unlink()
        (folder / index).write_text(json.dumps({"weight_map": table["weight_map"] | {first: shard}}), encoding="utf-8")
        yield Specimen(f"folder_{name}", "refuses", word)


def copy_of(source: Path, target: Path) -> Path:
    """A folder of the same files: links, which take no room."""
    for path in source.rglob("*"):
        if path.is_file():
            link = target / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            os.link(path, link)
    return target


if __name__ == "__main__":
    print(f"{len(write_zoo(sys.argv[1]))} specimens in {sys.argv[1]}")
