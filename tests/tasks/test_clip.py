"""Guidance by CLIP: the loss on a stand-in that knows two colours, and transformers' CLIP in miniature."""

import pytest
import torch

import minisd
from minisd.checkpoint.tokenizer_files import write_folder
from minisd.schedulers import equations
from minisd.tasks import LossGuidance
from minisd.tasks.clip import MEAN, STD, TransformersCLIP, clip_loss
from tests.tasks.conftest import seeded


class Colours:
    """Knows "red" and "blue": a picture is the vector of its mean colour above grey."""

    size = 8

    def embed_images(self, images):
        assert images.shape[1:] == (3, 8, 8)
        back = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        return back.mean(dim=(2, 3)) - 0.5

    def embed_texts(self, texts):
        vectors = {"red": (1.0, -1, -1), "blue": (-1.0, -1, 1)}
        return torch.tensor([vectors[text] for text in texts])


def test_the_loss_is_half_the_squared_angle():
    red = torch.tensor([1.0, -1, -1])[:, None, None].expand(1, 3, 32, 24)
    blue = red.flip(1)
    angle = torch.arccos(torch.tensor(-1 / 3))
    assert clip_loss(Colours(), "red")(torch.cat([red, blue])).tolist() == pytest.approx(
        [0, angle.item() ** 2 / 2], abs=1e-5
    )
    with pytest.raises(ValueError, match="text: is empty"):
        clip_loss(Colours(), " ")


def test_guidance_brings_the_picture_nearer_to_the_text(emoji):
    """At one step: what is foreseen behind x fits the text better, and worse with a strength below 0."""
    x, t = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor(600)
    context, loss = emoji.encode_prompt(["sun"], None), clip_loss(Colours(), "blue")

    def angle(scale):
        output = LossGuidance(emoji, loss, scale=scale)(x, t, context, 1.0)
        x0 = equations.x0_from_output(output, x, emoji.make_scheduler("ddim").alphas_cumprod[600], "epsilon")
        with torch.no_grad():
            return loss(emoji.decode(x0)).item()

    assert angle(0.1) < angle(0.0) < angle(-0.1)


def test_transformers_clip(tmp_path):
    """A miniature of it: vectors as transformers' own calls have them, and a gradient for the picture."""
    transformers = pytest.importorskip("transformers")
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = minisd.StableDiffusion.load("emoji").tokenizer
    text = transformers.CLIPTextConfig(
        **narrow, vocab_size=len(words.vocabulary), eos_token_id=len(words.vocabulary) - 1
    )
    vision = transformers.CLIPVisionConfig(**narrow, image_size=16, patch_size=8)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    theirs = transformers.CLIPModel(config).eval()
    write_folder(words, tmp_path)
    clip = TransformersCLIP(theirs, transformers.CLIPTokenizer.from_pretrained(tmp_path))
    images = torch.randn(2, 3, 16, 16, generator=seeded(), requires_grad=True)
    ids = clip.tokenizer(["sun"], return_tensors="pt")
    full = theirs(pixel_values=images, **ids)
    for ours, vectors in (
        (clip.embed_images(images), full.image_embeds),
        (clip.embed_texts(["sun"]), full.text_embeds),
    ):
        torch.testing.assert_close(torch.nn.functional.normalize(ours, dim=-1), vectors)  # they divide differently
    clip_loss(clip, "sun")(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
