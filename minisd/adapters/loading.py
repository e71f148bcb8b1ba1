"""What a model can be given on top of its weights: LoRAs and added tokens. `StableDiffusion.adapters` is one of these.

In: files. Out: the same model, changed until they are unloaded; no weight of its own is ever written to. The work is
done in `lora.py` and `textual_inversion.py`, which are imported when they are first needed.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from minisd.adapters.lora import Loaded, LoRA
    from minisd.adapters.textual_inversion import Plain


class Adapters:
    """The LoRAs (Hu et al. 2021, arXiv:2106.09685) and textual inversions (Gal et al. 2022) loaded into one model.

    `model` has `modules` ("unet", "text_encoder", ...), a `tokenizer` and a `config`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.loras: list[Loaded] = []
        self.embeddings: dict[str, Tensor] = {}  # the added tokens, with their vectors (n, D)
        self._plain: Plain | None = None  # tokenizer and token embedding without them

    def load_lora(self, path: str | os.PathLike[str], scale: float = 1.0) -> "LoRA":
        """Add the LoRA at `path` with strength `scale`, 1 being the one it was trained at; again for more of them.

        `path`: a safetensors file, or a folder as PEFT saves it. No weight is touched: each change stands beside its
        layer until `unload_lora`. Embeddings in the same file become tokens, as `load_embedding` adds them. Returns
        what was loaded. Warns where nothing tells the LoRA's alpha. Raises FileNotFoundError for a path that is not
        there, `minisd.CheckpointError` for what is no LoRA or does not fit (it says which layers, and why), ValueError
        for a scale that is no number; the model is as before then.
        """
        from minisd.adapters.lora import attach, open_lora
        from minisd.warn import warn

        model = self.model
        lora = open_lora(path, model.config)
        loaded = attach(lora, {name: part for name, part in model.modules.items() if name != "vae"}, scale)
        try:
            self._add(lora.words)
        except ValueError:
            loaded.remove()
            raise
        self.loras.append(loaded)
        if note := lora.note():
            warn(note)
        return lora

    def unload_lora(self, path: str | os.PathLike[str] | None = None) -> None:
        """Remove the LoRA of this path, or all of them. Raises ValueError for one that is not loaded."""
        leaving = [one for one in self.loras if path is None or one.lora.path == Path(os.path.expanduser(path))]
        if path is not None and not leaving:
            raise ValueError(f"{path}: is not loaded ({', '.join(str(one.lora.path) for one in self.loras) or 'none'})")
        for one in leaving:
            one.remove()
            self.loras.remove(one)
            for word in one.lora.words.keys() & self.embeddings.keys():
                self.unload_embedding(word)

    def load_embedding(self, path: str | os.PathLike[str] | Tensor, token: str | None = None) -> list[str]:
        """Add the tokens in the textual-inversion file at `path`; returns them, for use in prompts.

        `token` names the token; otherwise the file does, by what is in it or by its own name. A tensor (n, D) will do
        in the place of a path, for SDXL as wide as both text encoders. Raises FileNotFoundError for a path that is not
        there, `minisd.CheckpointError` for what is no embedding or one for another model, ValueError for a token that
        the vocabulary has already or that no prompt can contain (an empty one, one with spaces).
        """
        from minisd.adapters.textual_inversion import open_embedding

        found = open_embedding(path, token, [encoder.config.width for encoder in self._encoders()])
        self._add(found)
        return list(found)

    def _add(self, found: dict[str, Tensor]) -> None:
        """Add tokens to those that are there."""
        from minisd.adapters.textual_inversion import Plain

        if not found:
            return
        for word in found.keys() & self.embeddings.keys():
            raise ValueError(f"token={word!r}: is loaded already; choose another name with token=")
        tables = [encoder.token_embedding.weight for encoder in self._encoders()]
        plain = self._plain or Plain(self.model.tokenizer, tables)
        self._use(plain, {**self.embeddings, **found})

    def unload_embedding(self, token: str | None = None) -> None:
        """Remove one added token, or all. Raises ValueError for one that is not loaded."""
        if token is not None and token not in self.embeddings:
            raise ValueError(f"token={token!r}: is not loaded ({', '.join(self.embeddings) or 'none'})")
        if self._plain is not None:
            left = {word: vectors for word, vectors in self.embeddings.items() if token not in (None, word)}
            self._use(self._plain, left)

    def _use(self, plain: "Plain", words: dict[str, Tensor]) -> None:
        """Give the model the tokenizer and the token embedding that have these tokens added, and no others."""
        self.model.tokenizer, tables = plain.with_words(words)
        for encoder, table in zip(self._encoders(), tables, strict=True):
            encoder.take_table(table)
        self.embeddings, self._plain = words, plain if words else None

    def _encoders(self) -> list[Any]:
        """The text encoder, and SDXL's second."""
        return [self.model.text_encoder, *([second] if (second := getattr(self.model, "text_encoder_2", None)) else [])]

    def merged(self, states: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """State dicts by component with the loaded LoRAs merged into the weights, as they are to be saved."""
        if not self.loras:
            return states
        from minisd.adapters.lora import bake

        return bake(states, self.loras)
