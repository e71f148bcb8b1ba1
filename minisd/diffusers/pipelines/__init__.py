"""The pipelines by name, and those that find out by themselves which one a folder names."""

from __future__ import annotations

from typing import Any, ClassVar

from minisd.checkpoint.hub import resolve
from minisd.diffusers.assembly import Assembly
from minisd.diffusers.image_to_image import StableDiffusionImg2ImgPipeline
from minisd.diffusers.inpainting import StableDiffusionInpaintPipeline
from minisd.diffusers.loading import Source
from minisd.diffusers.pixel import DDIMPipeline, DDPMPipeline
from minisd.diffusers.refusing import NotCoveredError
from minisd.diffusers.text_to_image import StableDiffusionPipeline
from minisd.diffusers.xl import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from minisd.files import read_json_object

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
]

KINDS: tuple[Any, ...] = (
    StableDiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    DDPMPipeline,
    DDIMPipeline,
)
PIPELINES: dict[str, Any] = {kind.__name__: kind for kind in KINDS}


class DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained(folder)`: the pipeline whose class the folder names."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Source, **settings: Any) -> Any:
        """The pipeline in a folder or hub repository. Raises NotCoveredError for a class that minisd has not."""
        folder = resolve(pretrained_model_name_or_path)
        name = read_json_object(folder / "model_index.json").get("_class_name")
        if name not in PIPELINES:
            raise NotCoveredError(
                f"{folder}: {name} is not covered by minisd.diffusers, which has {', '.join(PIPELINES)}"
            )
        return PIPELINES[str(name)].from_pretrained(pretrained_model_name_or_path, **settings)


class AutoPipeline:
    """A task's pipeline for whatever Stable Diffusion a folder holds. Base of the three."""

    kind: ClassVar[type[StableDiffusionPipeline]]

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: Source, **settings: Any) -> Any:
        """As `from_pretrained` of the task's own pipeline."""
        return cls.kind.from_pretrained(pretrained_model_or_path, **settings)

    @classmethod
    def from_pipe(cls, pipeline: Assembly, **parts: Any) -> Any:
        """The task's pipeline with another's parts, which are shared; `parts` replace some."""
        return cls.kind.from_pipe(pipeline, **parts)


class AutoPipelineForText2Image(AutoPipeline):
    """Text to image."""

    kind = StableDiffusionPipeline


class AutoPipelineForImage2Image(AutoPipeline):
    """Image to image."""

    kind = StableDiffusionImg2ImgPipeline


class AutoPipelineForInpainting(AutoPipeline):
    """Inpainting."""

    kind = StableDiffusionInpaintPipeline
