"""LoRAs and textual inversions: loaded from state dicts and files, weighed, scaled, fused and taken away again."""

import tempfile
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file


def low_rank(pipe, seed):
    """A LoRA of rank 2 for every projection of the attention layers, in both networks."""
    draw, state = torch.Generator().manual_seed(seed), {}
    for part, ends in (("unet", ("to_q", "to_k", "to_v", "to_out.0")), ("text_encoder", ("q_proj", "out_proj"))):
        for name, module in getattr(pipe, part).named_modules():
            if name.endswith(ends) and ("transformer_blocks" in name or part == "text_encoder"):
                prefix = f"{part}.text_model.{name}" if part == "text_encoder" else f"{part}.{name}"
                out, width = module.weight.shape
                state[f"{prefix}.lora_A.weight"] = torch.randn(2, width, generator=draw) * 0.1
                state[f"{prefix}.lora_B.weight"] = torch.randn(out, 2, generator=draw) * 0.1
    return state


def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def image(prompt="red heart", **settings):
        generator = torch.Generator().manual_seed(1)
        return pipe(prompt, num_inference_steps=3, generator=generator, output_type="latent", **settings).images

    found = {"plain": image()}
    one, other = low_rank(pipe, 1), low_rank(pipe, 2)
    with tempfile.TemporaryDirectory() as place:
        save_file(one, Path(place, "pytorch_lora_weights.safetensors"))
        save_file(other, Path(place, "other.safetensors"))
        pipe.load_lora_weights(place)
        found["folder"] = image()
        pipe.unload_lora_weights()
        found["unloaded"] = image()
        pipe.load_lora_weights(place, weight_name="other.safetensors", adapter_name="other")
        found["named"] = image()
        pipe.load_lora_weights(dict(one), adapter_name="one")
    pipe.set_adapters(["other", "one"], adapter_weights=[0.7, 0.3])
    assert sorted(pipe.get_active_adapters()) == ["one", "other"]
    found["weighed"] = image()
    found["weighed and scaled"] = image(cross_attention_kwargs={"scale": 0.5})
    pipe.set_adapters("one")
    found["one"] = image()
    pipe.disable_lora()
    found["disabled"] = image()
    pipe.enable_lora()
    pipe.delete_adapters("other")
    pipe.set_adapters("one")
    pipe.fuse_lora(lora_scale=0.6)
    found["fused"] = image()
    pipe.unfuse_lora()
    found["unfused"] = image()
    pipe.unload_lora_weights()
    found["gone"] = image()

    width = pipe.text_encoder.config.hidden_size
    draw = torch.Generator().manual_seed(9)
    pipe.load_textual_inversion({"<cat>": torch.randn(width, generator=draw)})
    pipe.load_textual_inversion(torch.randn(3, width, generator=draw), token="<dog>")
    with tempfile.TemporaryDirectory() as place:
        save_file({"<car>": torch.randn(1, width, generator=draw)}, Path(place, "learned_embeds.safetensors"))
        pipe.load_textual_inversion(place)
        save_file({"emb_params": torch.randn(2, width, generator=draw)}, Path(place, "boat.safetensors"))
        pipe.load_textual_inversion(place, weight_name="boat.safetensors", token="<boat>")
    found["inverted"] = image("a <cat> and a <dog> in a <car> on a <boat>", negative_prompt="<dog>")
    found["ids"] = torch.tensor(pipe.tokenizer.convert_tokens_to_ids(["<cat>", "<dog>", "<dog>_2", "<boat>_1"]))
    pipe.unload_textual_inversion("<cat>")
    found["one less"] = image("a <cat> and a <dog>")
    pipe.unload_textual_inversion()
    found["none left"] = image("a <cat>")
    return found
