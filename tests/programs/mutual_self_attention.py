"""Mutual self-attention in the manner of MasaCtrl: the tree is walked by class name, and `forward` is replaced."""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline


class Editor:
    """From a step and a layer on, the second image's queries look at the first image's keys and values."""

    def __init__(self, first_step, first_layer):
        self.first_step, self.first_layer = first_step, first_layer
        self.layers, self.layer, self.step = 0, 0, 0

    def attend(self, query, key, value, crosses, scale):
        if not crosses and self.step >= self.first_step and self.layer // 2 >= self.first_layer:
            key, value = (self.from_first(x) for x in (key, value))
        out = torch.softmax(torch.einsum("bid,bjd->bij", query, key) * scale, dim=-1) @ value
        self.layer += 1
        if self.layer == self.layers:
            self.layer, self.step = 0, self.step + 1
        return out

    @staticmethod
    def from_first(x):
        halves = x.unflatten(0, (2, 2, -1))  # unconditional and conditional, image, head
        return halves[:, :1].expand_as(halves).flatten(0, 2)


def edited_forward(attn, editor):
    def forward(x, encoder_hidden_states=None, attention_mask=None, context=None, mask=None):
        to_out = attn.to_out[0] if type(attn.to_out) is torch.nn.ModuleList else attn.to_out
        crosses = encoder_hidden_states is not None
        context = encoder_hidden_states if crosses else x
        query, key, value = (
            layer(y).unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
            for layer, y in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        out = editor.attend(query, key, value, crosses, attn.scale)
        return to_out(out.unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2))

    return forward


def register(module, editor):
    """The number of attention layers found, by class name, below `module`."""
    if module.__class__.__name__ == "Attention":
        module.forward = edited_forward(module, editor)
        return 1
    return sum(register(child, editor) for child in module.children())


def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)).repeat(2, 1, 1, 1)
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "latent", "latents": latents}
    before = pipe(["red heart", "red car"], **settings).images
    editor = Editor(first_step=2, first_layer=3)
    counts = {}
    for name, child in pipe.unet.named_children():
        if "down" in name or "mid" in name or "up" in name:
            counts[name] = register(child, editor)
    editor.layers = sum(counts.values())
    after = pipe(["red heart", "red car"], **settings).images
    assert editor.layers and editor.step == 5 and not torch.equal(before[1], after[1]), "the edit did nothing"
    return {"before": before, "after": after, **{name: torch.tensor(count) for name, count in counts.items()}}
