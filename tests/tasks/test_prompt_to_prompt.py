"""Prompt-to-prompt: equal to the paper's equations inside diffusers' own UNet, and what it means on the small model."""

import json

import numpy as np
import pytest
import torch

from minisd.tasks import prompt_to_prompt, psnr
from minisd.tasks.images import decoded
from minisd.tasks.prompt_to_prompt import layers, make_control
from tests.tasks.conftest import latents_of, pixels, refused

STEPS, CROSS, SELF = 5, 0.6, 0.4


class Paper:
    """An attention processor of diffusers that does to the maps what the paper's equations say."""

    def __init__(self, columns, new, weights):
        self.columns, self.new, self.weights, self.calls = columns, new, weights, 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        crossing = encoder_hidden_states is not None
        context = encoder_hidden_states if crossing else hidden_states
        q, k, v = (
            attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        maps = attn.get_attention_scores(q, k).unflatten(0, (4, attn.heads))  # unconditional twice, old, new
        old, new = maps[2], maps[3].clone()
        if crossing and self.calls < int(CROSS * STEPS):
            for token in range(77):  # (M_t)_{i,j} = c_j * (M_t)_{i, A(j)}, or c_j * (M*_t)_{i,j} for a new token
                source = new if token in self.new else old
                maps[3, ..., token] = self.weights.get(token, 1.0) * source[..., self.columns.get(token, token)]
        elif not crossing and self.calls < int(SELF * STEPS):
            maps[3] = old
        self.calls += 1
        out = attn.batch_to_head_dim(torch.bmm(maps.flatten(0, 1), v))
        return attn.to_out[1](attn.to_out[0](out))


# prompts, the column of the old prompt for a token of the new one, tokens that are new, weights by word and by token
CASES = {
    "swap": ("red cat", "blue cat", {}, set(), {}, {}),
    "refinement": ("red cat", "red big cat", {3: 2, 4: 3}, {2}, {}, {}),
    "weight": ("red cat", "red cat", {}, set(), {"cat": 2.5}, {2: 2.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_papers_equations(twin, ours, case):
    theirs, _ = twin
    old, new, columns, fresh, words, weights = CASES[case]
    assert all(len(ours.tokenizer.ids(word)) == 1 for word in f"{old} {new}".split()), "one token a word"
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    kept = dict(theirs.unet.attn_processors)
    theirs.unet.set_attn_processor({name: Paper(columns, fresh, weights) for name in kept})
    try:
        settings = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
        expected = theirs([old, new], latents=noise.repeat(2, 1, 1, 1), **settings).images
    finally:
        theirs.unet.set_attn_processor(kept)
    given = {"steps": STEPS, "guidance_scale": 5.0, "height": 64, "width": 64, "seed": 3}
    control = {"cross": CROSS, "self_attention": SELF, "weights": words}
    *_, last = prompt_to_prompt(ours, old, new, **control, **given)
    assert (last.latents - expected).abs().max() < 1e-5 * expected.abs().max()
    *_, plain = ours.denoise(new, **given)
    assert (plain.latents - expected[1:]).abs().max() > 1e-3 * expected.abs().max(), "the control did nothing"


def test_words_answer_to_words(emoji):
    old, new = "a mushroom on a sofa", "a big toadstool on a sofa"
    control = make_control(emoji, "red cat", "blue cat", {"blue": 2})
    count = len(emoji.tokenizer.tokens("blue cat"))
    assert torch.equal(control.mapping.sum(0)[:count], torch.ones(count)) and control.weights.max() == 2
    control = make_control(emoji, old, new, {})
    words = emoji.tokenizer.tokens(new)
    fresh = [token for token, shared in zip(words, control.shared, strict=False) if not shared]
    assert "".join(fresh).replace("</w>", " ").split() == ["big", "toadstool"]
    assert control.shared[0] == 1 and control.shared[len(words) :].all()
    one, several = "sun", "xylophonist"  # of another number of tokens
    control = make_control(emoji, one, several, {})
    count = len(emoji.tokenizer.ids(several))
    assert count > 1 and torch.allclose(control.mapping[1, 1 : count + 1], torch.full((count,), 1 / count))
    assert control.mapping[2, count + 1] == 1  # the end answers to the end
    with pytest.raises(ValueError, match="weights: 'dog' is not a word of the new prompt"):
        make_control(emoji, "cat", "cat", {"dog": 2})


def test_which_layers(emoji):
    assert len(layers(emoji, 16)) == 32 and len(layers(emoji, 64)) == 16 + 6  # 64 and 32 positions a side are too many


def figure(picture) -> np.ndarray:
    """The pixels that are far from the colour of the upper edge."""
    found = pixels(picture)[0]
    return np.linalg.norm(found - np.median(found[:6].reshape(-1, 3), axis=0), axis=-1) > 60


def overlap(one, other) -> float:
    return float((figure(one) & figure(other)).sum() / (figure(one) | figure(other)).sum())


@pytest.mark.parametrize("thing", ("a red heart", "a mushroom"))
def test_the_ground_changes_and_the_figure_stays(emoji, thing):
    prompts = f"{thing} on a blue background", f"{thing} on a yellow background"
    *_, last = prompt_to_prompt(emoji, *prompts, seed=1, steps=8)
    old, new = decoded(emoji, last.latents)
    assert psnr(old, emoji.text_to_image(prompts[0], seed=1, steps=8)[0]) > 40  # the old one is as ever
    (red, green, blue), (was_red, _, was_blue) = pixels(new)[0][:6].mean((0, 1)), pixels(old)[0][:6].mean((0, 1))
    assert was_blue > 200 > was_red and min(red, green) > 180 > 110 > blue
    assert overlap(old, new) > 0.9


def test_more_attention_of_the_old_prompt_is_more_of_the_old_picture(emoji):
    prompts = "a red heart", "a green apple"
    near = {}
    for share in (0.0, 0.5, 1.0):
        *_, last = prompt_to_prompt(emoji, *prompts, seed=1, steps=6, cross=share, self_attention=share)
        near[share] = psnr(*decoded(emoji, last.latents))
    assert near[0.0] < near[0.5] < near[1.0]
    *_, last = prompt_to_prompt(emoji, "a red heart", "a green apple", seed=1, steps=6, cross=0.0, self_attention=0.0)
    assert psnr(decoded(emoji, last.latents)[1], emoji.text_to_image("a green apple", seed=1, steps=6)[0]) > 40


def test_a_real_picture(emoji, disc):
    """Inverted exactly: the old row is the picture again, and the new one has another ground."""
    latents = latents_of(emoji, disc)
    prompts = "a red circle", "a red circle on a blue background"
    *_, last = prompt_to_prompt(emoji, *prompts, latents=latents, steps=6, guidance_scale=2.0)
    assert (last.latents[:1] - latents).norm() / latents.norm() < 1e-3
    old, new = decoded(emoji, last.latents)
    assert psnr(old, decoded(emoji, latents)[0]) > 45
    red, _, blue = pixels(new)[0][:6].mean((0, 1))
    assert blue - red > 60 > pixels(old)[0][:6].std()


def test_the_command(command):
    result = command("p2p", "red cat", "blue cat", "-s", "1", "--reweight", "blue:2", "--json")
    told = json.loads(result.stdout)
    assert told["cross"] == 0.8 and told["reweight"] == "blue:2" and told["images"] == ["red-cat-1.png"]
    assert command("p2p", "red cat", "blue cat", "../disc.png", "-o", "x.png").written.name == "x.png"
    assert command("replay", "x.png", steps=None).stdout.startswith("equal to the bit")


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["cat", "dog", "--cross", "2"], "cross"),
        (["cat", "dog", "--reweight", "cow:2"], "'cow' is not a word"),
        (["cat", "dog", "../text.png"], "is not a picture"),
    ),
)
def test_bad_input(command, arguments, words):
    assert refused(command("p2p", *arguments), words)
