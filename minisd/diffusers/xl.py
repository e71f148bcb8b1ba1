"""`StableDiffusionXLPipeline` and its siblings from images: two text encoders, and sizes beside the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from minisd.checkpoint.load import Checkpoint
from minisd.diffusers.arguments import Asked, Run, listed, matching
from minisd.diffusers.assembly import NETWORKS, NO_EXTRAS
from minisd.diffusers.image_to_image import StableDiffusionImg2ImgPipeline
from minisd.diffusers.inpainting import StableDiffusionInpaintPipeline
from minisd.diffusers.loading import Source
from minisd.diffusers.models.network import Network
from minisd.diffusers.outputs import Output
from minisd.diffusers.refusing import accept, parameters
from minisd.diffusers.text_encoder import CLIPTextModelWithProjection
from minisd.diffusers.text_to_image import StableDiffusionPipeline, ids_of
from minisd.files import read_json_object
from minisd.noise import Generators, draw_noise
from minisd.sampling import Step
from minisd.tasks.image_to_image import denoise_from

NO_WATERMARK: dict[str, tuple[Any, ...]] = {"add_watermarker": (None, False)}
ZEROS = "force_zeros_for_empty_prompt"
Four = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # prompt, negative prompt, and the pooled vectors of both


class StableDiffusionXLPipeline(StableDiffusionPipeline):
    """Text to picture with SDXL: `pipe(prompt).images`."""

    _parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    _absent = ("image_encoder", "feature_extractor")
    _networks: ClassVar[dict[str, type[Network]]] = {**NETWORKS, "text_encoder_2": CLIPTextModelWithProjection}
    _paddings: ClassVar[dict[str, str | None]] = {"tokenizer": None, "tokenizer_2": "!"}
    _usual_scheduler = "EulerDiscreteScheduler"
    _corrections: ClassVar[dict[str, Any]] = {}
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = (
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "add_text_embeds",
        "add_time_ids",
        "negative_pooled_prompt_embeds",
        "negative_add_time_ids",
    )

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        force_zeros_for_empty_prompt: bool = True,
        **extras: Any,
    ) -> None:
        """From its parts. Raises NotCoveredError for a watermark."""
        accept(type(self).__name__, extras, NO_EXTRAS | NO_WATERMARK, parameters(self.__init__))  # type: ignore[misc]
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler)
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.force_zeros = force_zeros_for_empty_prompt

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Source, *args: Any, **others: Any) -> Any:
        """As that of `StableDiffusionPipeline`, with the second text encoder and tokenizer."""
        watermark = {"add_watermarker": others.pop("add_watermarker", None)}
        accept(f"{cls.__name__}.from_pretrained", watermark, NO_WATERMARK, [])
        return super().from_pretrained(pretrained_model_name_or_path, *args, **others)

    @classmethod
    def _settings(cls, checkpoint: Checkpoint) -> dict[str, Any]:
        index = checkpoint.path / "model_index.json"
        stated = read_json_object(index) if index.exists() else {}
        return {ZEROS: stated.get(ZEROS, True)}

    # ------------------------------------------------ text

    def encode_prompt(  # type: ignore[override]
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: str | torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> Four:
        """Texts -> (prompt, negative prompt, pooled prompt, pooled negative prompt), or what was given instead.

        `prompt_2`, `negative_prompt_2`: for the second text encoder, where it is to read something else. Without a
        negative prompt its two are zeros, as SDXL was trained.
        """
        if lora_scale is not None:
            self._scale_loras(lora_scale)
        positive, pooled = prompt_embeds, pooled_prompt_embeds
        if positive is None:
            positive, pooled = self._embed_both(listed("prompt", prompt), prompt_2, clip_skip)
        assert positive is not None
        if pooled is None:
            raise ValueError("pooled_prompt_embeds: are needed beside prompt_embeds")
        negative, negative_pooled = negative_prompt_embeds, negative_pooled_prompt_embeds
        if do_classifier_free_guidance and negative is None:
            if negative_prompt is None and self.force_zeros:
                negative, negative_pooled = torch.zeros_like(positive), torch.zeros_like(pooled)
            else:
                texts = matching(negative_prompt, prompt, len(positive))
                negative, negative_pooled = self._embed_both(texts, negative_prompt_2, None)
        four = positive, negative, pooled, negative_pooled
        return tuple(self._placed(one, device, num_images_per_prompt) for one in four)  # type: ignore[return-value]

    def _placed(self, tensor: Tensor | None, device: Any, copies: int) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.to(device=device or self.device, dtype=self.unet.dtype).repeat_interleave(copies, dim=0)

    def _embed_both(self, texts: list[str], other: Any, clip_skip: int | None) -> tuple[Tensor, Tensor]:
        """(B, 77, D), the last layer's but one of both encoders, and the pooled vector (B, P) of the second."""
        states, pooled = [], None
        both = (self.tokenizer, self.text_encoder, texts), (self.tokenizer_2, self.text_encoder_2, other or texts)
        for tokenizer, encoder, wanted in both:
            several = [wanted] * len(texts) if isinstance(wanted, str) else wanted
            encoded = encoder(ids_of(tokenizer, several).to(encoder.device), output_hidden_states=True)
            states.append(encoded.hidden_states[-2 - (clip_skip or 0)])
            pooled = encoded[0]
        assert pooled is not None
        return torch.cat(states, dim=-1), pooled

    # ------------------------------------------------ the call

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> Any:
        """Generate images of `prompt`: `.images`, `num_images_per_prompt` for each. Arguments: see `Asked`.

        Sizes are (height, width), and the crop's corner (top, left). The negative prompt's are the prompt's unless both
        of its sizes are given. `denoising_end`, a share of all timesteps: stop there, for a refiner to go on.
        """
        asked, batch = self._understand(locals())
        self._guidance_rescale = guidance_rescale
        own_height, own_width = self._own_size()
        height, width = height or own_height, width or own_width
        state = self._told_of(locals(), asked, batch, (height, width))
        run = self._first_step(num_inference_steps, asked)
        channels, dtype = self.unet.config.in_channels, state["prompt_embeds"].dtype
        x = self.prepare_latents(batch, channels, height, width, dtype, self.device, asked.generator, latents)
        sampling = self._sampling(run, x, asked, state)
        steps = self._core().denoise(state["prompt_embeds"][-batch:], sampling, latents=x, start=0)
        return self._finish(self._run(self._until(steps, run, denoising_end), run, state, asked), asked)

    def _told_of(
        self, given: dict[str, Any], asked: Asked, batch: int, size: tuple[int, int], own: bool = False
    ) -> dict[str, Any]:
        """The texts and sizes of a call, encoded. `own`: the negative prompt has sizes of its own in any case."""
        original, target = given["original_size"] or size, given["target_size"] or size
        ids = others = [*original, *given["crops_coords_top_left"], *target]
        named = given["negative_original_size"], given["negative_target_size"]
        if own or None not in named:
            corner = given["crops_coords_top_left" if own else "negative_crops_coords_top_left"]  # as diffusers has it
            others = [*(named[0] or original), *corner, *(named[1] or target)]
        return self._encoded_with(given, asked, ids, others, batch)

    def _until(self, steps: Iterator[Step], run: Run, share: float | None) -> Iterator[Step]:
        """The steps as far as `share` of all timesteps."""
        if share is None or not 0 < share < 1:
            return steps
        last = round(self.scheduler.config.num_train_timesteps * (1 - share))
        return islice(steps, int((self.scheduler.timesteps[run.start * self.scheduler.order :] >= last).sum()))

    def _encoded_with(
        self, given: dict[str, Any], asked: Asked, ids: list[int], negative_ids: list[int], batch: int
    ) -> dict[str, Any]:
        """What callbacks may change: what the UNet is told, the negative half first where there is guidance."""
        positive, negative, pooled, negative_pooled = self.encode_prompt(
            given["prompt"],
            given["prompt_2"],
            self.device,
            asked.num_images_per_prompt,
            self.do_classifier_free_guidance,
            asked.negative_prompt,
            given["negative_prompt_2"],
            asked.prompt_embeds,
            asked.negative_prompt_embeds,
            given["pooled_prompt_embeds"],
            given["negative_pooled_prompt_embeds"],
            (asked.cross_attention_kwargs or {}).get("scale", 1.0),
            asked.clip_skip,
        )
        numbers, others = (
            torch.tensor([some], dtype=positive.dtype, device=self.device).repeat(batch, 1)
            for some in (ids, negative_ids)
        )
        halves = {"prompt_embeds": (negative, positive), "add_text_embeds": (negative_pooled, pooled)}
        halves["add_time_ids"] = (others, numbers)
        guided = self.do_classifier_free_guidance and negative is not None
        told = {name: torch.cat(both) if guided else both[1] for name, both in halves.items()}  # type: ignore[arg-type]
        beside = {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
        return {**told, **beside, "negative_add_time_ids": others}

    def _told(self, state: dict[str, Any]) -> dict[str, Any]:
        added = {"text_embeds": state["add_text_embeds"], "time_ids": state["add_time_ids"]}
        return {**super()._told(state), "added_cond_kwargs": added}

    def _finish(self, latents: Tensor, asked: Asked) -> Any:
        images = super()._finish(latents, asked)[0]
        return Output(images=images) if asked.return_dict else (images,)


class StableDiffusionXLImg2ImgPipeline(StableDiffusionXLPipeline, StableDiffusionImg2ImgPipeline):
    """Picture to picture with SDXL: noise is added to `image`, and taken away again under `prompt`."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: Any = None,
        strength: float = 0.3,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> Any:
        """Generate `prompt` from `image`: `.images`. `strength` as in `StableDiffusionImg2ImgPipeline`, sizes as above.

        The negative prompt's sizes are the prompt's unless given, and its crop's corner is the prompt's.
        `denoising_start`, for a refiner, is not covered.
        """
        asked, batch = self._understand(locals())
        self._guidance_rescale = guidance_rescale
        pixels = self.image_processor.preprocess(image).to(device=self.device, dtype=self.unet.dtype)
        run = self._first_step(num_inference_steps, asked, strength)
        clean = self._clean_latents(pixels, batch, asked.generator)
        noise = draw_noise(clean.shape, asked.generator, self.device, self.unet.dtype)
        height, width = (side * self.vae_scale_factor for side in clean.shape[2:])
        state = self._told_of(locals(), asked, batch, (height, width), own=True)
        sampling = self._sampling(run, clean, asked, state)
        steps = denoise_from(self._core(), state["prompt_embeds"][-batch:], clean, noise, sampling, run.start)
        return self._finish(self._run(self._until(steps, run, denoising_end), run, state, asked), asked)


class StableDiffusionXLInpaintPipeline(StableDiffusionXLPipeline, StableDiffusionInpaintPipeline):
    """Painting into a mask with SDXL."""

    _callback_tensor_inputs = (*StableDiffusionXLPipeline._callback_tensor_inputs, "mask", "masked_image_latents")

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: None = None,
        strength: float = 0.9999,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> Any:
        """Generate `prompt` in `image` where `mask_image` is white: `.images`. See `StableDiffusionInpaintPipeline`."""
        asked, batch = self._understand(locals())
        self._guidance_rescale = guidance_rescale
        own = self._own_size()
        size = height or own[0], width or own[1]
        state = self._told_of(locals(), asked, batch, size, own=True)
        run = self._first_step(num_inference_steps, asked, strength)
        region = self._region(locals(), asked, size, batch)
        steps = self._inside(region, run, state, asked, noised=strength < 1 and latents is None)
        return self._finish(self._run(self._until(steps, run, denoising_end), run, state, asked), asked)
