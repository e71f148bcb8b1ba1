"""Small files that change a model: LoRA (`lora.py`) and textual inversion (`textual_inversion.py`)."""

from minisd.adapters.loading import Adapters

__all__ = ["Adapters"]
