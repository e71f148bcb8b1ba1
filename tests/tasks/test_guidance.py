"""Guidance: what composed prompts, weighted words and a loss do to a picture, measured; and their refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

import minisd
from minisd.cli.options import text_and_number
from minisd.schedulers import equations
from minisd.tasks import LossGuidance, colour_loss, compose, weighted_context
from minisd.tasks.guidance import count_tokens, parse_weights
from tests.tasks.conftest import middle, pixels, refused, seeded

# ------------------------------------------------ several prompts


def test_one_prompt_in_two_halves_is_the_prompt(emoji):
    settings = {"steps": 2, "seed": 1, "guidance_scale": 4.0, "guidance_rescale": 0.5}
    *_, plain = emoji.denoise("sun", **settings)
    *_, halves = emoji.denoise("sun", predict_noise=compose(emoji, [("sun", 0.3)], 0.7), **settings)
    assert (plain.latents - halves.latents).abs().max() < 1e-3


def test_the_equation(emoji):
    """negative + scale (w1 (eps1 - negative) + w2 (eps2 - negative)), with the four parts asked one by one."""
    x = torch.randn(2, 4, 8, 8, generator=seeded())
    t = torch.tensor(500)
    texts = {name: emoji.encode_prompt([name, name], None) for name in ("", "sun", "moon", "tree")}
    with torch.no_grad():
        negative, sun, moon, tree = (emoji.unet(x, t, context) for context in texts.values())
        context = torch.cat([texts[""], texts["sun"]])
        found = compose(emoji, [("moon", 0.4), ("tree", -0.2)], 0.6)(x, t, context, 3.0)
    expected = negative + 3 * (0.6 * (sun - negative) + 0.4 * (moon - negative) - 0.2 * (tree - negative))
    assert (found - expected).abs().max() < 1e-3


def test_two_colours_mix(emoji):
    settings = {"steps": 20, "guidance_scale": 4.0, "images_per_prompt": 2}

    def generate(**others):
        generators = [seeded(seed) for seed in (1, 2)]
        pictures = emoji.text_to_image("red heart", generator=generators, **settings, **others)
        return np.mean([middle(picture)[2] - middle(picture)[0] for picture in pictures])

    mixed = generate(predict_noise=compose(emoji, [("blue heart", 0.5)], 0.5))
    assert generate() < -100 and mixed > generate() + 50


def test_composition_needs_guidance(emoji):
    with pytest.raises(ValueError, match=r"guidance_scale=1.0: must be above 1"):
        list(emoji.denoise("sun", steps=1, guidance_scale=1.0, predict_noise=compose(emoji, [("moon", 1.0)])))


# ------------------------------------------------ weighted words


@pytest.mark.parametrize(
    ("text", "pieces"),
    (
        ("a heart", [("a heart", 1.0)]),
        ("a (red:1.3) heart", [("a ", 1.0), ("red", 1.3), (" heart", 1.0)]),
        ("(red) [heart]", [("red", 1.1), (" ", 1.0), ("heart", 1 / 1.1)]),
        ("((red))", [("red", 1.21)]),
        ("(a (red:2) heart:0.5)", [("a ", 0.5), ("red", 1.0), (" heart", 0.5)]),
        (r"\(red\) at 12:30", [("(", 1.0), ("red", 1.0), (")", 1.0), (" at 12", 1.0), (":", 1.0), ("30", 1.0)]),
        ("", []),
    ),
)
def test_the_syntax(text, pieces):
    found = parse_weights(text)
    assert [words for words, _ in found] == [words for words, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize("text", ("(red", "red)", "(red]", "[red:1.3)", "(red:1.2.3)", "[a (b]"))
def test_brackets_must_match(text):
    with pytest.raises(ValueError, match="prompt: "):
        parse_weights(text)


def test_weights_fall_on_their_words(emoji):
    """Each word's vectors are multiplied, all are scaled back to the old mean; a weight of 1 changes nothing."""
    plain, weighted = emoji.encode_prompt(["a red heart"], None), weighted_context(emoji, "a (red:1.5) heart")
    ratio = (weighted / plain).median(dim=-1).values[0]
    first = count_tokens(emoji, "a")
    red = slice(1 + first, 1 + count_tokens(emoji, "a red"))
    others = torch.ones(len(ratio), dtype=torch.bool)
    others[red] = False
    assert torch.allclose(ratio[red] / ratio[0], torch.tensor(1.5), rtol=1e-3)
    assert torch.allclose(ratio[others], ratio[0], rtol=1e-3)
    assert weighted.mean() == pytest.approx(plain.mean().item(), rel=1e-3)
    assert torch.allclose(weighted_context(emoji, "a (red:1.0) heart"), plain, atol=1e-5)


def test_brackets_are_plain_text_unless_asked(emoji):
    one, other = (emoji.encode_prompt([text], None) for text in ("(red:1.3) heart", "red heart"))
    assert not torch.allclose(one, other, atol=1e-2)


# ------------------------------------------------ a loss


def test_the_mean_colour_moves_as_asked(emoji):
    """ "Make it blue": blue against red and green, over the whole picture."""
    settings = {"steps": 10, "guidance_scale": 3.0, "seed": 1}

    def blueness(**others) -> float:
        colour = pixels(*emoji.text_to_image("sun", **settings, **others)).mean(axis=(0, 1, 2))
        return colour[2] - colour[:2].mean()

    plain = blueness()
    assert blueness(predict_noise=LossGuidance(emoji, colour_loss("blue"), scale=5.0)) > plain + 20
    assert blueness(predict_noise=LossGuidance(emoji, colour_loss("blue"), scale=0.0)) == plain


def test_any_callable_is_a_loss(emoji):
    """Darkness of the left half: the right half is left alone, more or less."""

    def left_is_dark(images):
        return (images[..., : images.shape[-1] // 2] + 1).square().mean(dim=(1, 2, 3))

    settings = {"steps": 10, "guidance_scale": 3.0, "seed": 1}
    (plain,) = emoji.text_to_image("sun", **settings)
    (dark,) = emoji.text_to_image("sun", predict_noise=LossGuidance(emoji, left_is_dark, scale=4.0), **settings)
    change = (pixels(dark) - pixels(plain))[0].mean(axis=(0, 2))
    half = len(change) // 2
    assert change[:half].mean() < -10 and change[:half].mean() < change[half:].mean() - 5


def test_the_slope_goes_through_the_unet(ours):
    """Against differences of the loss itself, along the slope."""
    guide = LossGuidance(ours, colour_loss("blue"), scale=1.0)
    x, t = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor(300)
    context = ours.encode_prompt(["a cat"], None).detach()
    alpha_bar = guide.scheduler.alpha_bar(300)

    def loss(x):
        with torch.no_grad():
            x0 = (x - (1 - alpha_bar) ** 0.5 * ours.unet(x, t, context)) / alpha_bar**0.5
            return guide.loss(ours.vae.decode(x0 / ours.vae.scaling_factor)).item()

    with torch.no_grad():
        eps = ours.unet(x, t, context)
        push = (guide(x, t, context, 1.0, 0.0) - eps) / (1 - alpha_bar) ** 0.5
    assert push.norm() == pytest.approx(eps.norm().item(), rel=1e-3)
    direction = push / push.norm()
    step = 0.02
    rise = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    other = torch.randn(x.shape, generator=seeded(3))
    other -= (other * direction).sum() * direction  # no steeper way at right angles
    across = (loss(x + step * other / other.norm()) - loss(x - step * other / other.norm())) / (2 * step)
    assert rise > 0 and abs(across) < 0.1 * rise


@pytest.mark.parametrize("kind", ("epsilon", "v_prediction", "sample"))
def test_every_kind_of_model_is_pushed_the_same_way(ours, kind):
    """x0 moves straight down the slope, whatever the model predicts."""
    scheduler = minisd.DDIMScheduler.from_config(ours.config.scheduler, prediction_type=kind)
    settings = {"steps": 4, "guidance_scale": 1.0, "scheduler": scheduler}
    x = torch.randn(1, 4, 8, 8, generator=seeded()).requires_grad_()
    first = next(ours.denoise("cat", latents=x.detach(), **settings))

    def loss(images):
        return images.mean(dim=(1, 2, 3))

    guide = LossGuidance(ours, loss, scale=0.5, scheduler=scheduler)
    pushed = next(ours.denoise("cat", latents=x.detach(), predict_noise=guide, **settings))
    output = ours.unet(x, torch.tensor(first.timestep), ours.encode_prompt(["cat"], None).detach())
    x0 = equations.x0_from_output(output, x, scheduler.alpha_bar(first.timestep), kind)
    assert torch.allclose(x0, first.x0, atol=1e-4)
    (slope,) = torch.autograd.grad(ours.vae.decode(x0 / ours.vae.scaling_factor).mean(), x)
    assert torch.cosine_similarity((pushed.x0 - first.x0).flatten(), slope.flatten(), dim=0) < -0.999


def test_a_batch_is_guided_as_its_members_alone(emoji):
    guide = LossGuidance(emoji, colour_loss("blue"))
    settings = {"steps": 2, "guidance_scale": 3.0, "predict_noise": guide}
    *_, both = emoji.denoise(["sun", "tree"], generator=[seeded(1), seeded(2)], **settings)
    *_, alone = emoji.denoise("tree", seed=2, **settings)
    assert (both.latents[1] - alone.latents[0]).abs().max() < 1e-2 * alone.latents.std()


# ------------------------------------------------ the command


def test_weighted_prompts():
    assert text_and_number("blue circle:0.5") == ("blue circle", 0.5) and text_and_number("sun") == ("sun", 1.0)
    assert text_and_number("at 12:noon") == ("at 12:noon", 1.0) and text_and_number("a:b:-1") == ("a:b", -1.0)


def test_the_command(command, tiny_folder):
    guided = ["--and", "red:0.5", "--prompt-weight", "0.5", "--weighted", "--colour", "blue", "--colour-scale", "2"]
    result = command("guide", "(cat:1.2)", "-s", "1", "-g", "3", *guided, "-o", "x.png", steps="2")
    assert (result.stdout, result.stderr) == ("x.png\n", "")
    sd = minisd.StableDiffusion.load(tiny_folder)
    cat, nothing = weighted_context(sd, "(cat:1.2)"), weighted_context(sd, "")
    several = compose(sd, [("red", 0.5)], 0.5)
    predict_noise = LossGuidance(sd, colour_loss("blue"), scale=2.0, predict_noise=several)
    settings = {"negative_prompt": nothing, "steps": 2, "guidance_scale": 3.0, "seed": 1}
    (expected,) = sd.text_to_image(cat, predict_noise=predict_noise, **settings)
    assert abs(pixels(Image.open("x.png")) - pixels(expected)).max() <= 1
    text = Image.open("x.png").text["parameters"]
    assert "Colour: blue" in text and 'And: "red:0.5"' in text and "Prompt weight: 0.5" in text
    plain = command("generate", "cat", "-s", "1", "-g", "3", "-o", "y.png", steps="2").written
    assert not np.array_equal(pixels(Image.open(plain)), pixels(expected))


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["cat", "--colour", "nocolour"], "colour='nocolour': is no colour"),
        (["(cat", "--weighted"], r"prompt: '\(' is never closed"),
        (["cat", "--weighted", "--and", "dog):2"], r"prompt: '\)' closes nothing"),
        (["cat", "--and", "dog", "-g", "1"], r"guidance_scale=1.0: must be above 1"),
        (["cat", "--colour", "red", "--colour-scale", "nan"], "scale=nan"),
    ),
)
def test_refusals(command, arguments, words):
    assert refused(command("guide", *arguments, "-s", "1"), words)
