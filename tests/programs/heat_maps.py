"""Where each word is in the image, in the manner of DAAM: forward hooks on cross-attention, by module path."""

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention


def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size, maps, norms, handles = pipe.unet.config.sample_size, [], {}, []

    def look(module, args, kwargs, output):
        query = module.head_to_batch_dim(module.to_q(args[0]))
        key = module.head_to_batch_dim(module.to_k(kwargs["encoder_hidden_states"]))
        weights = module.get_attention_scores(query, key)  # (B h, N, 77)
        conditional = weights.unflatten(0, (2, module.heads))[1].mean(0)  # (N, 77)
        side = int(conditional.shape[0] ** 0.5)
        maps.append(F.interpolate(conditional.T.reshape(1, -1, side, side), size=(size, size), mode="bicubic"))

    for name, module in pipe.unet.named_modules():
        if isinstance(module, Attention) and "attn2" in name:
            handles.append(module.register_forward_hook(look, with_kwargs=True))

    def measure(name):
        def hook(module, args, output):
            norms.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).norm())

        return hook

    watched = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v",
        "down_blocks.0.resnets.1",
        "mid_block.attentions.0",
        "mid_block",
        "up_blocks.2",
        "time_embedding",
    }
    for name in sorted(watched):
        handles.append(pipe.unet.get_submodule(name).register_forward_hook(measure(name)))
    handles.append(pipe.vae.decoder.up_blocks[1].register_forward_hook(measure("decoder")))
    handles.append(pipe.text_encoder.get_submodule("encoder.layers.0.mlp").register_forward_hook(measure("text")))
    generator = torch.Generator().manual_seed(1)
    image = pipe("red heart", num_inference_steps=4, generator=generator, output_type="np").images
    assert len(maps) == 4 * sum("attn2" in name for name in pipe.unet.attn_processors), "hooks did not fire"
    for handle in handles:
        handle.remove()
    return {
        "image": image,
        "maps": torch.cat(maps).mean(0),
        **{name: torch.stack(found) for name, found in norms.items()},
    }
