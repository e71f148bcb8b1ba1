"""Prompt-to-prompt: the attention weights of one prompt's image are used for those of the other, by a processor."""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor


class Replace:
    """Attention whose conditional half takes, in the first steps, the first prompt's weights for the second too."""

    def __init__(self, name, store):
        self.name, self.store, self.calls = name, store, 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        batch, length, _ = hidden_states.shape
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = attn.head_to_batch_dim(attn.to_k(context)), attn.head_to_batch_dim(attn.to_v(context))
        weights = attn.get_attention_scores(query, key, attention_mask)
        if attn.is_cross_attention or length <= 16 * 16:
            weights = self.edit(weights, attn.heads)
        out = attn.batch_to_head_dim(torch.bmm(weights, value))
        self.calls += 1
        return attn.to_out[1](attn.to_out[0](out))

    def edit(self, weights, heads):
        _, conditional = weights.reshape(2, 2, heads, *weights.shape[1:]).unbind(0)  # unconditional first
        self.store.setdefault(self.name, []).append(conditional[0].mean(0))
        if self.calls < 3:
            weights = weights.clone().reshape(2, 2, heads, *weights.shape[1:])
            weights[1, 1] = weights[1, 0]
            return weights.flatten(0, 2)
        return weights


def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["red heart", "blue heart"]
    settings = {"num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).repeat(2, 1, 1, 1)

    store = {}
    names = list(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor({name: Replace(name, store) for name in names})
    edited = pipe(prompts, latents=latents, **settings).images
    assert all(processor.calls == 5 for processor in pipe.unet.attn_processors.values())

    pipe.unet.set_attn_processor(AttnProcessor())
    plain = pipe(prompts, latents=latents, **settings).images
    assert not torch.equal(edited[1], plain[1]), "the edit did nothing"
    maps = {name: torch.stack(found) for name, found in store.items()}
    return {"edited": edited, "plain": plain, "count": torch.tensor(len(names)), **maps}
