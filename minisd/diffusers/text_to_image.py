"""`StableDiffusionPipeline`, and what diffusers' three pipelines have in common.

What is here is translation: diffusers' arguments, its rules for pairing prompts with images, its order of drawing
random numbers, its callbacks. The sampling loop is `StableDiffusion.denoise`. Next: `image_to_image.py`,
`inpainting.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from minisd.diffusers.arguments import Asked, Run, check_strength, check_texts, listed, matching
from minisd.diffusers.assembly import Assembly
from minisd.diffusers.image_processor import VaeImageProcessor, check_output_type
from minisd.diffusers.outputs import Output
from minisd.diffusers.refusing import NotCoveredError, shortened
from minisd.diffusers.scheduling import LoopScheduler, own_schedule, step_arguments
from minisd.noise import Generators, draw_noise
from minisd.pipeline import guide
from minisd.sampling import Sampling, Step
from minisd.schedulers import Scheduler


class StableDiffusionPipeline(Assembly):
    """Text to picture: `pipe(prompt).images`."""

    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")
    _guidance_scale, _guidance_rescale, _interrupt, _num_timesteps = 7.5, 0.0, False, 0
    _clip_skip: int | None = None
    _cross_attention_kwargs: dict[str, Any] | None = None

    # ------------------------------------------------ what was asked, and what may be looked at meanwhile

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        return self._cross_attention_kwargs

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def _understand(self, given: Mapping[str, Any]) -> tuple[Asked, int]:
        """The arguments of a call by name, checked, and how many pictures they ask for."""
        asked = Asked.of(given, type(self).__name__)
        prompt = given["prompt"]
        check_output_type(asked.output_type)
        check_texts(prompt, asked.negative_prompt, asked.prompt_embeds, asked.negative_prompt_embeds)
        for name in asked.callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                known = ", ".join(self._callback_tensor_inputs)
                raise NotCoveredError(f"callback_on_step_end_tensor_inputs: {name!r} is not covered, which are {known}")
        if prompt is None:
            assert asked.prompt_embeds is not None
            prompts = len(asked.prompt_embeds)
        else:
            prompts = len(listed("prompt", prompt))
        batch = prompts * asked.num_images_per_prompt
        if isinstance(asked.generator, Sequence) and len(asked.generator) != batch:
            raise ValueError(
                f"generator: {len(asked.generator)} given; must be one, or one for each of {batch} pictures"
            )
        self._guidance_scale, self._guidance_rescale, self._interrupt = asked.guidance_scale, 0.0, False
        self._clip_skip, self._cross_attention_kwargs = asked.clip_skip, asked.cross_attention_kwargs
        return asked, batch

    def check_inputs(
        self,
        prompt: Any,
        height: int,
        width: int,
        callback_steps: int | None = None,
        negative_prompt: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **others: Any,
    ) -> None:
        """Raise ValueError for arguments of a call that are impossible; a call does so itself."""
        self._latent_shape(1, 1, height, width)
        check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        if callback_steps is not None and (not isinstance(callback_steps, int) or callback_steps < 1):
            raise ValueError(f"callback_steps={callback_steps!r}: must be a whole number, at least 1")

    # ------------------------------------------------ text

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: str | torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Texts -> (prompt, negative prompt), (B * num_images_per_prompt, 77, D) each, or what was given instead.

        Without guidance the second is what was given. `clip_skip` is for the prompt alone. Raises ValueError for texts
        that do not match each other.
        """
        if lora_scale is not None:
            self._scale_loras(lora_scale)
        positive = prompt_embeds if prompt_embeds is not None else self._embed(listed("prompt", prompt), clip_skip)
        positive = positive.to(device=device or self.device, dtype=(self.text_encoder or self.unet).dtype)
        negative = negative_prompt_embeds
        if do_classifier_free_guidance:
            if negative is None:
                negative = self._embed(matching(negative_prompt, prompt, len(positive)), None)
            negative = negative.to(positive).repeat_interleave(num_images_per_prompt, dim=0)
        return positive.repeat_interleave(num_images_per_prompt, dim=0), negative

    def _embed(self, prompts: list[str], clip_skip: int | None) -> Tensor:
        """(B, 77, D), the last layer's output or, `clip_skip` layers earlier, another's; the final norm applied."""
        tokenizer, encoder = self.tokenizer, self.text_encoder
        # In the program's prompt a token that was learnt as several vectors is one word.
        ids = ids_of(tokenizer, [tokenizer.core.spelt_out(prompt) for prompt in prompts]).to(encoder.device)
        if clip_skip is None:
            return encoder(ids)[0]
        states = encoder(ids, output_hidden_states=True).hidden_states
        if not isinstance(clip_skip, int) or not 0 <= clip_skip < len(states):
            raise ValueError(f"clip_skip={clip_skip}: must be a whole number from 0 to {len(states) - 1}")
        return encoder.final_layer_norm(states[-1 - clip_skip])

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> Tensor:
        """`encode_prompt` as one tensor, negative prompts first; the prompts alone without guidance."""
        positive, negative = self.encode_prompt(*args, **kwargs)
        return positive if negative is None else torch.cat([negative, positive])

    def _encoded(self, prompt: str | list[str] | None, asked: Asked) -> dict[str, Any]:
        """What callbacks may change: the UNet's context, (2B, T, D) with guidance, and the negative prompts alone."""
        positive, negative = self.encode_prompt(
            prompt,
            self.device,
            asked.num_images_per_prompt,
            self.do_classifier_free_guidance,
            asked.negative_prompt,
            asked.prompt_embeds,
            asked.negative_prompt_embeds,
            lora_scale=(asked.cross_attention_kwargs or {}).get("scale", 1.0),
            clip_skip=asked.clip_skip,
        )
        guided = self.do_classifier_free_guidance and negative is not None
        context = torch.cat([negative, positive]) if guided else positive  # type: ignore[list-item]
        return {"prompt_embeds": context, "negative_prompt_embeds": negative}

    # ------------------------------------------------ the call

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> Any:
        """Generate images of `prompt`: `.images`, `num_images_per_prompt` for each. Arguments: see `Asked`.

        `height`, `width` in pixels: both, or neither for the model's own size. `latents` (B, 4, H/8, W/8) replace the
        initial noise. Raises ValueError for impossible settings and NotCoveredError for unknown ones.
        """
        asked, batch = self._understand(locals())
        self._guidance_rescale = guidance_rescale
        if not height or not width:  # one alone is ignored, as in diffusers
            height, width = self._own_size()
        state = self._encoded(prompt, asked)
        run = self._first_step(num_inference_steps, asked)
        channels, dtype = self.unet.config.in_channels, state["prompt_embeds"].dtype
        x = self.prepare_latents(batch, channels, height, width, dtype, self.device, asked.generator, latents)
        sampling = self._sampling(run, x, asked, state)
        steps = self._core().denoise(state["prompt_embeds"][-batch:], sampling, latents=x, start=0)
        return self._finish(self._run(steps, run, state, asked), asked)

    def _own_size(self) -> tuple[int, int]:
        """Height and width in pixels that the UNet was trained at."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def _first_step(self, steps: int, asked: Asked, strength: float = 1.0) -> Run:
        """Set the scheduler's timesteps, of which the last `strength` are taken. Raises ValueError for none."""
        check_strength(strength)
        custom = own_schedule(self.scheduler, asked.timesteps, asked.sigmas)
        if custom:
            self.scheduler.set_timesteps(device=self.device, **custom)
            steps = len(self.scheduler.timesteps)
        else:
            self.scheduler.set_timesteps(steps, device=self.device)
        taken = min(int(steps * strength), steps)
        if taken < 1:
            raise ValueError(f"strength={strength} of num_inference_steps={steps} leaves no step to take")
        return Run(steps, steps - taken, custom)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The noise to start from, (B, C, H/8, W/8), drawn or given, at the scheduler's scale."""
        shape = self._latent_shape(batch_size, num_channels_latents, height, width)
        noise = draw_noise(shape, generator, torch.device(device), dtype) if latents is None else latents.to(device)
        return noise * self.scheduler.init_noise_sigma

    def _latent_shape(self, batch: int, channels: int, height: int, width: int) -> torch.Size:
        factor = self.vae_scale_factor
        if height % factor or width % factor:
            raise ValueError(f"height={height}, width={width}: must be multiples of {factor}")
        return torch.Size((batch, channels, height // factor, width // factor))

    def prepare_extra_step_kwargs(self, generator: Generators, eta: float) -> dict[str, Any]:
        """Of the two, those that this scheduler's `step` takes."""
        return step_arguments(self.scheduler, eta=eta, generator=generator)

    def _sampling(self, run: Run, latents: Tensor, asked: Asked, state: dict[str, Any]) -> Sampling:
        """The call's arguments as minisd's. Guidance is in `predict_noise`: callbacks may change all that it reads."""

        def predict_noise(x: Tensor, t: Tensor, *_: Any) -> Tensor:
            guided = self.do_classifier_free_guidance
            x = torch.cat([x, x]) if guided else x
            text = self._told(state)
            if asked.cross_attention_kwargs:  # a UNet of the program's own need not know them
                text["cross_attention_kwargs"] = asked.cross_attention_kwargs
            eps = self.unet(x, t, **text, return_dict=False)[0]
            if not guided:
                return eps
            negative, positive = eps.chunk(2)
            return guide(negative, positive, self._guidance_scale, self._guidance_rescale)

        height, width = (side * self.vae_scale_factor for side in latents.shape[2:])
        return Sampling(
            steps=run.steps,
            guidance_scale=1.0,
            height=height,
            width=width,
            generator=asked.generator,
            scheduler=cast(Scheduler, LoopScheduler(self.scheduler, run.custom)),
            eta=asked.eta,
            predict_noise=predict_noise,
        )

    def _told(self, state: dict[str, Any]) -> dict[str, Any]:
        """What the UNet is told beside latents and timestep."""
        return {"encoder_hidden_states": state["prompt_embeds"]}

    def _run(self, steps: Iterator[Step], run: Run, state: dict[str, Any], asked: Asked) -> Tensor:
        """Run the loop to its end, or until a callback interrupts: the latents."""
        start = run.start * self.scheduler.order
        timesteps = self.scheduler.timesteps[start:]
        extra_calls = len(timesteps) - (run.steps - run.start) * self.scheduler.order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for step in steps:
                state["latents"] = step.latents
                if asked.callback_on_step_end is not None:
                    index = step.index - start
                    self._call_back(asked, index, timesteps[index], state)
                    step.latents = state["latents"]
                if step.index - start >= extra_calls or step.index - start == len(timesteps) - 1:
                    self._call_back_plainly(asked, step.index - start, timesteps, state["latents"])
                bar.update()
                if self._interrupt:
                    break
        return state["latents"]

    def _call_back(self, asked: Asked, index: int, t: Tensor, state: dict[str, Any]) -> None:
        """Show the program the tensors it asked for, and take what it changed."""
        assert asked.callback_on_step_end is not None
        shown = {name: state[name] for name in asked.callback_on_step_end_tensor_inputs}
        changed = asked.callback_on_step_end(self, index, t, shown)
        if not isinstance(changed, dict):
            raise TypeError(f"callback_on_step_end: must return a dict of tensors, not {shortened(changed)}")
        state.update({name: value for name, value in changed.items() if name in self._callback_tensor_inputs})

    def _call_back_plainly(self, asked: Asked, index: int, timesteps: Tensor, latents: Tensor) -> None:
        """`callback`, as diffusers called it before `callback_on_step_end`: after whole steps only."""
        every, order = asked.callback_steps or 1, self.scheduler.order
        whole = index == len(timesteps) - 1 or (index + 1) % order == 0
        if asked.callback is not None and whole and index % every == 0:
            asked.callback(index // order, timesteps[index], latents)

    def _finish(self, latents: Tensor, asked: Asked) -> Any:
        """Latents -> `.images`, decoded unless latents were asked for."""
        images = latents
        if asked.output_type != "latent":
            decoded = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            images = self.image_processor.postprocess(decoded, asked.output_type)
        return Output(images=images, nsfw_content_detected=None) if asked.return_dict else (images, None)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Any:
        """Scaled latents (B, 4, H/8, W/8) -> a numpy array (B, H, W, 3) in [0, 1]."""
        decoded = self.vae.decode(1 / self.vae.config.scaling_factor * latents, return_dict=False)[0]
        return self.image_processor.postprocess(decoded, "np")

    def run_safety_checker(self, image: Any, device: Any = None, dtype: Any = None) -> tuple[Any, None]:
        """The images as they are, and None: there is no safety checker here."""
        return image, None

    numpy_to_pil = staticmethod(VaeImageProcessor.numpy_to_pil)

    def _encode_images(self, images: Tensor, generator: Generators) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents, sampled. With a list of generators, one by one."""
        if isinstance(generator, Sequence):
            one_by_one = [sampled(self.vae.encode(images[i : i + 1]), generator[i]) for i in range(len(images))]
            latents = torch.cat(one_by_one)
        else:
            latents = sampled(self.vae.encode(images), generator)
        return self.vae.config.scaling_factor * latents


def ids_of(tokenizer: Any, texts: list[str]) -> Tensor:
    """Texts (B of them) -> ids (B, 77), padded and cut off."""
    length = tokenizer.model_max_length
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def sampled(encoded: Any, generator: Any) -> Tensor:
    """Latents out of what a VAE's `encode` gave; AutoencoderTiny draws nothing."""
    latents: Tensor = encoded.latents if "latents" in encoded else encoded.latent_dist.sample(generator)
    return latents
