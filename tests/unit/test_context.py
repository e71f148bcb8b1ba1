"""Prompts longer than the context window: the words that are cut off are told, or read in windows of their own."""

import pytest
import torch

from minisd.tasks import compose, interpolate, invert, weighted_context
from tests.unit.tiny import tiny_model


@pytest.fixture(scope="module")
def sd():
    return tiny_model()


def long_prompt(sd, tokens: int) -> str:
    """A text of so many tokens."""
    text = "a"
    while len(sd.tokenizer.ids(f"{text} a")) <= tokens:
        text += " a"
    assert len(sd.tokenizer.ids(text)) == tokens
    return text


def test_what_is_cut_off_is_told(sd, recwarn):
    sd.encode_prompt(long_prompt(sd, 75), None)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"the prompt has 77 tokens, of which .* 75; cut off: 'b c'") as told:
        sd.text_to_image(long_prompt(sd, 75) + " b c", steps=1, seed=1)
    assert told[0].filename == __file__  # the user's line, not minisd's
    with pytest.warns(UserWarning, match="cut off: 'b'"):
        sd.text_to_image("a", negative_prompt=long_prompt(sd, 75) + " b", steps=1, seed=1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tokens", [1, 75, 76, 150, 151])
def test_windows_of_75_are_encoded_alone_and_concatenated(sd, tokens):
    """The common method: each window is a prompt of its own; negative and shorter prompts get empty windows."""
    text = long_prompt(sd, tokens)
    count = -(-tokens // 75)
    windows = [" ".join(text.split()[75 * n : 75 * (n + 1)]) for n in range(count)]
    context = sd.encode_prompt([text, "b"], ["c", "d"], long_prompts=True)
    assert context.shape == (4, 77 * count, sd.config.text_encoder.width)
    expected = torch.cat([sd.encode_prompt([window], None) for window in windows], dim=1)
    torch.testing.assert_close(context[2:3], expected, rtol=1e-5, atol=1e-5)
    expected = torch.cat([sd.encode_prompt([window], None) for window in ["c", *[""] * (count - 1)]], dim=1)
    torch.testing.assert_close(context[:1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_short_prompts_are_what_they_were(sd):
    plain = [step.latents for step in sd.denoise("a cat", steps=2, seed=1, negative_prompt="b")]
    long = [step.latents for step in sd.denoise("a cat", steps=2, seed=1, negative_prompt="b", long_prompts=True)]
    assert all(torch.equal(a, b) for a, b in zip(plain, long, strict=True))


@pytest.mark.filterwarnings("error")
def test_every_task_takes_them(sd):
    text = long_prompt(sd, 80)
    settings = {"steps": 2, "seed": 1, "long_prompts": True}
    (*_, last) = sd.denoise(text, **settings)
    (*_, other) = sd.denoise(" ".join(text.split()[:75]), steps=2, seed=1)
    assert not torch.equal(last.latents, other.latents)
    list(sd.denoise("a", predict_noise=compose(sd, [(text, 0.5)], long_prompts=True), **settings))
    noise = torch.randn(1, 4, 8, 8)
    list(interpolate(sd, ("a", text), (noise, -noise), frames=2, **settings))
    list(invert(sd, text, noise, exact=False, steps=2, long_prompts=True))
    context = sd.encode_prompt(text, None, long_prompts=True)  # given encoded, beside a short negative prompt
    (*_, same) = sd.denoise(context, steps=2, seed=1)
    assert torch.equal(same.latents, last.latents)


def test_weights_beyond_the_first_window(sd):
    text = long_prompt(sd, 76)
    plain = sd.encode_prompt(text + " b", None, long_prompts=True)
    weighted = weighted_context(sd, text + " (b:3)", long_prompts=True)
    ratio = (weighted / plain).mean(dim=2)[0]
    assert ratio.argmax() == 77 + 1 + 1 and (ratio > 2 * ratio.min()).sum() == 1


def test_contexts_that_do_not_fit_each_other(sd):
    one, other = torch.zeros(1, 77, 64), torch.zeros(1, 100, 64)
    with pytest.raises(ValueError, match="context of 77 tokens beside one of 100"):
        sd.encode_prompt(one, other)


@pytest.mark.parametrize("seed", [2**32 + 7, -(2**32) + 7])
def test_seeds_that_a_generator_cannot_tell_apart(sd, seed):
    with pytest.warns(UserWarning, match=f"seed={seed}: draws the same numbers as seed=7"):
        (*_, last) = sd.denoise("a", steps=1, seed=seed)
    (*_, other) = sd.denoise("a", steps=1, seed=7)
    assert torch.equal(last.latents, other.latents)
