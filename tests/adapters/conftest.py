"""diffusers' pipeline and minisd's model over the same folder, for tests that load things into them."""

import pytest
import torch

import minisd


@pytest.fixture(scope="package")
def pair(twin):
    """(diffusers, minisd): copies of their own, because these tests change them."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(twin[1])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, minisd.StableDiffusion.load(twin[1])


@pytest.fixture
def inputs():
    """Latents, a timestep, context and ids for the twin."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return latents, torch.tensor(500), torch.randn(2, 77, 128, generator=generator)
