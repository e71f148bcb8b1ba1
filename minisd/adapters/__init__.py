"""Small files that change a model: LoRA (`lora.py`) and textual inversion (`embeddings.py`)."""


def path_and_scale(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.8" -> the path and 0.8; without a number the scale is 1."""
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0
