"""Small files that change a model: LoRA (`lora.py`) and textual inversion (`textual_inversion.py`); see README.md."""
