"""Guidance beyond one prompt: several weighted prompts at once, weighted words, and any loss on the foreseen picture.

Each is a stand-in for `StableDiffusion.predict_noise`, or context in the place of a prompt:

    sd.text_to_image("sun", predict_noise=compose(sd, [("red heart", 0.5), ("star", 0.5)]))
    sd.text_to_image("sun", predict_noise=LossGuidance(sd, colour_loss("blue"), scale=3))
    sd.text_to_image(weighted_context(sd, "a (red:1.3) heart"))

and on a model of pixels: model.sample(predict_noise=LossGuidance(model, colour_loss("blue"))).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import ImageColor
from torch import Tensor

from minisd.context import same_length
from minisd.pipeline import StableDiffusion, check_channels, rescale_guidance
from minisd.pixel.pipeline import PixelDiffusion
from minisd.sampling import PredictNoise, Texts
from minisd.schedulers import Scheduler, equations

# ------------------------------------------------ several prompts


def compose(
    sd: StableDiffusion, others: Sequence[tuple[Texts, float]], weight: float = 1.0, long_prompts: bool = False
) -> PredictNoise:
    """A `predict_noise` that follows the prompt with `weight`, and `others`, (text, weight) each, at the same time.

    Liu et al. 2022, Compositional Visual Generation with Composable Diffusion Models, arXiv:2206.01714, eq. 11:
    eps = negative + scale * sum of weight_i (eps_i - negative). A negative weight pushes away. The weights usually add
    up to about 1; without guidance (a scale up to 1) there is nothing to compose, which is a ValueError.
    """
    with torch.no_grad():
        contexts = [sd.encode_prompt(text, None, long_prompts=long_prompts) for text, _ in others]
    weights = [weight, *(weight for _, weight in others)]

    def predict_noise(x: Tensor, t: Tensor, context: Tensor, guidance_scale: float, rescale: float = 0.0) -> Tensor:
        if guidance_scale <= 1:
            raise ValueError(f"guidance_scale={guidance_scale}: must be above 1 to compose prompts")
        check_channels(sd, x)
        each_of = [context, *(one.expand(len(x), -1, -1) for one in contexts)]  # negative and prompt, others
        several = torch.cat(same_length(sd, each_of))
        negative, *each = sd.unet(torch.cat([x] * (2 + len(contexts))), t, several).chunk(2 + len(contexts))
        direction = sum(
            (weight * (eps - negative) for weight, eps in zip(weights, each, strict=True)), torch.zeros_like(negative)
        )
        eps = negative + guidance_scale * direction
        return rescale_guidance(eps, negative + direction, rescale) if rescale > 0 else eps

    return predict_noise


# ------------------------------------------------ weighted words

STEP = 1.1  # what a pair of plain brackets multiplies the weight with
TOKEN = re.compile(r"\\[()\[\]\\]|:\s*([+-]?[.\d]+)\s*\)|[()\[\]]|[^\\()\[\]:]+|:|\\", re.DOTALL)


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Read "a (red:1.3) [dull] heart" -> [("a ", 1.0), ("red", 1.3), (" ", 1.0), ("dull", 1 / 1.1), (" heart", 1.0)].

    The syntax of AUTOMATIC1111's web UI: (words:1.3) is a weight, (words) is 1.1, [words] is 1 / 1.1; they nest and
    multiply; a backslash makes a bracket plain. Raises ValueError for brackets that do not match.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []
    for found in TOKEN.finditer(text):
        sign, number = found[0], found[1]
        if sign in "([":
            opened.append((sign, len(pieces)))
        elif sign in ")]" or number is not None:
            kind = "[" if sign == "]" else "("
            if not opened or opened[-1][0] != kind:
                raise ValueError(f"prompt: {sign!r} closes nothing in {text!r}; write \\{sign[-1]} for a plain one")
            try:
                factor = float(number) if number is not None else STEP if kind == "(" else 1 / STEP
            except ValueError:
                raise ValueError(f"prompt: {number!r} is not a weight, in {text!r}") from None
            _, first = opened.pop()
            pieces[first:] = [(words, weight * factor) for words, weight in pieces[first:]]
        else:
            pieces.append((sign[1:] if len(sign) == 2 and sign[0] == "\\" else sign, 1.0))
    if opened:
        raise ValueError(
            f"prompt: {opened[-1][0]!r} is never closed in {text!r}; write \\{opened[-1][0]} for a plain one"
        )
    return pieces


def weighted_context(
    sd: StableDiffusion, prompts: str | Sequence[str], clip_skip: int = 0, long_prompts: bool = False
) -> Tensor:
    """Prompts with weights -> context (B, 77, D), to be given in the place of a prompt; (B, 77 n, D) `long_prompts`.

    Each token's vector is multiplied by its weight; then all are scaled so that the mean of the whole context is what
    it was. That is the normalisation of AUTOMATIC1111's web UI ("original" emphasis).
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    return torch.cat(same_length(sd, [_weighted(sd, text, clip_skip, long_prompts) for text in texts]))


@torch.no_grad()
def _weighted(sd: StableDiffusion, text: str, clip_skip: int, long_prompts: bool) -> Tensor:
    pieces = parse_weights(text)
    plain = "".join(words for words, _ in pieces)
    context = sd.encode_prompt([plain], None, clip_skip=clip_skip, long_prompts=long_prompts)  # (1, 77 n, D)
    length = sd.tokenizer.context_length
    weights = torch.ones(context.shape[1] // length, length)  # by window
    before, first = "", 0
    for words, weight in pieces:
        before += words
        last = min(count_tokens(sd, before), len(weights) * (length - 2))
        for place in range(first, last):
            window, column = divmod(place, length - 2)
            weights[window, 1 + column] = weight  # behind the window's start token
        first = max(first, last)
    weighted = context * weights.reshape(1, -1, 1).to(context)
    return weighted * (context.float().mean() / weighted.float().mean()).to(context)


def count_tokens(sd: StableDiffusion, text: str) -> int:
    """How many tokens a text has, without start, end and padding."""
    return len(sd.tokenizer.ids(text))


# ------------------------------------------------ a loss


class LossGuidance:
    """A `predict_noise` that also walks down the slope of a loss of the picture foreseen.

    At each step: x0 as the UNet sees it behind x, decoded; the gradient of `loss`(images (B, 3, H, W) in about
    [-1, 1]) -> (B,) with respect to x, through the VAE and the UNet; and x0 moves against it. Classifier guidance
    (Dhariwal & Nichol 2021, arXiv:2105.05233, algorithm 2) with a loss on the predicted x0 (Chung et al. 2022,
    arXiv:2209.14687; Bansal et al. 2023, arXiv:2302.07121). The gradient is taken at unit length, so that `scale` means
    the same for any loss: 1 adds to the predicted noise as much again. Most of it the next step takes back.

    `predict_noise`: what to guide; the model's own unless given, such as `compose`'s. `scheduler`: the one in use, if
    it is not the model's own schedule. On a `PixelDiffusion` nothing is decoded, and the gradient is that of pixels.
    """

    def __init__(
        self,
        sd: StableDiffusion | PixelDiffusion,
        loss: Callable[[Tensor], Tensor],
        *,
        scale: float = 3.0,
        scheduler: Scheduler | str | None = None,
        predict_noise: Callable[..., Tensor] | None = None,
    ) -> None:
        if not -float("inf") < scale < float("inf"):
            raise ValueError(f"scale={scale}: must be a finite number")
        self.loss, self.scale = loss, scale
        self.scheduler = sd.make_scheduler(scheduler)
        self.sd = sd
        self.predict_noise = predict_noise or (sd.unet if isinstance(sd, PixelDiffusion) else sd.predict_noise)

    def __call__(self, x: Tensor, t: Tensor, *settings: Any) -> Tensor:
        alpha_bar, kind = self.scheduler.alpha_bar(int(t)), self.scheduler.prediction_type
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            output = self.predict_noise(x, t, *settings)
            noisy = x[:, : output.shape[1]]  # an inpainting model is given its mask too, behind the latents
            x0 = equations.x0_from_output(output, noisy, alpha_bar, kind)
            losses = self.loss(self.picture(x0))
            slope = torch.autograd.grad(losses.sum(), x)[0][:, : output.shape[1]]
        push = self.scale * slope * unit_length(slope, like=output)
        return towards(output.detach(), push, alpha_bar, kind)

    def picture(self, x0: Tensor) -> Tensor:
        """The picture that x0 stands for, with a gradient."""
        return x0 if isinstance(self.sd, PixelDiffusion) else self.sd.vae.decode(x0 / self.sd.vae.scaling_factor)


def unit_length(slope: Tensor, like: Tensor) -> Tensor:
    """The factor (B, 1, 1, 1) that makes each slope as long as the noise in `like` is; 0 where there is no slope."""
    dims = tuple(range(1, slope.ndim))
    length = slope.float().square().sum(dim=dims, keepdim=True).sqrt()
    noise = like.detach().float().square().sum(dim=dims, keepdim=True).sqrt()
    return torch.where(length > 0, noise / length.clamp(min=1e-30), torch.zeros_like(length)).to(slope)


def towards(output: Tensor, push: Tensor, alpha_bar: Tensor, kind: str) -> Tensor:
    """The model's output, changed so that its noise has `push` more: x0 then lies that much further down the slope."""
    if kind == "epsilon":
        return output + (1 - alpha_bar) ** 0.5 * push
    if kind == "v_prediction":  # x0 = sqrt(alpha_bar) x - sqrt(1 - alpha_bar) v
        return output + push
    return output - push


def colour_loss(colour: str) -> Callable[[Tensor], Tensor]:
    """A loss that asks for a mean colour: "blue", "#4080ff", ...; of grey pictures for its mean brightness.

    Raises ValueError for a colour that nobody knows.
    """
    try:
        red_green_blue = ImageColor.getrgb(colour)[:3]
    except ValueError:
        raise ValueError(f"colour={colour!r}: is no colour; must be a name, such as blue, or #4080ff") from None
    wanted = torch.tensor(red_green_blue) / 255 * 2 - 1

    def loss(images: Tensor) -> Tensor:
        asked = wanted if images.shape[1] == 3 else wanted.mean(dim=0, keepdim=True)
        return (images.mean(dim=(2, 3)) - asked.to(images)).square().sum(dim=1)

    return loss
