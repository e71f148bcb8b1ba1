"""transformers' `CLIPTextModel`, as programs over diffusers use it: minisd's text encoder as transformers' tree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd import layers
from minisd.diffusers.models.attention_processor import split_heads
from minisd.diffusers.models.network import Format, Network
from minisd.diffusers.outputs import Config, output
from minisd.diffusers.refusing import NotCoveredError, accept, parameters
from minisd.text_encoder import FeedForward, TextEncoder, TextLayer


class CLIPTextEmbeddings(nn.Module):
    """Where ids become vectors: `minisd.text_encoder`'s two tables, under transformers' names."""

    position_ids: Tensor

    def __init__(self, core: TextEncoder) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = core.token_embedding, core.position_embedding
        positions = torch.arange(core.config.context_length)[None]  # (1, 77)
        self.register_buffer("position_ids", positions, persistent=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, T), or vectors in their place (B, T, D) -> vectors with positions (B, T, D)."""
        if inputs_embeds is None:
            inputs_embeds = self.token_embedding(input_ids)
        length, longest = inputs_embeds.shape[-2], self.position_ids.shape[-1]
        if length > longest:
            raise ValueError(f"{length} tokens: this text encoder takes at most {longest}")
        positions = self.position_ids[:, :length] if position_ids is None else position_ids
        return inputs_embeds + self.position_embedding(positions)


class CLIPAttention(nn.Module):
    """`minisd.layers.Attention` over what comes before: causal."""

    def __init__(self, core: layers.Attention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = core.q.out_features, core.heads
        self.head_dim = self.embed_dim // self.num_heads
        self.scale = self.head_dim**-0.5
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = core.k, core.v, core.q, core.out

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """(B, T, D) -> (B, T, D), and None for the attention weights."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (split_heads(project(hidden_states), self.num_heads) for project in projections)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, h, T, d)
        return self.out_proj(x.transpose(1, 2).reshape(hidden_states.shape)), None


class Activation(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)


class QuickGELUActivation(Activation):
    """`minisd.layers.quick_gelu`."""


class CLIPMLP(nn.Module):
    """`minisd.text_encoder.FeedForward`."""

    def __init__(self, core: FeedForward) -> None:
        super().__init__()
        quick = core.activation is layers.quick_gelu
        self.activation_fn = (QuickGELUActivation if quick else Activation)(core.activation)
        self.fc1, self.fc2 = core.expand, core.contract

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class CLIPEncoderLayer(nn.Module):
    """`minisd.text_encoder.TextLayer`."""

    def __init__(self, core: TextLayer) -> None:
        super().__init__()
        self.embed_dim = core.self_attn.q.out_features
        self.self_attn, self.layer_norm1 = CLIPAttention(core.self_attn), core.self_attn_norm
        self.mlp, self.layer_norm2 = CLIPMLP(core.feed_forward), core.feed_forward_norm

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = hidden_states + self.self_attn(self.layer_norm1(hidden_states), attention_mask=attention_mask)[0]
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """`minisd.text_encoder`'s layers, for programs that bring vectors of their own."""

    def __init__(self, layers: Iterable[TextLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(layer) for layer in layers)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = False,
        return_dict: bool | None = True,
        **others: Any,
    ) -> Any:
        """(B, T, D) -> `.last_hidden_state` (B, T, D), before the final norm; `.hidden_states` if asked for.

        Attention is causal always: a `causal_attention_mask` is checked to say so, and not needed.
        """
        accept("encoder", others, {"is_causal": (True,), "output_attentions": (None, False)}, parameters(self.forward))
        check_mask(attention_mask)
        check_causal(causal_attention_mask)
        states = [inputs_embeds]
        for layer in self.layers:
            states.append(layer(states[-1]))
        extra = {"hidden_states": tuple(states)} if output_hidden_states else {}
        return output(return_dict, last_hidden_state=states[-1], **extra)


def check_mask(mask: Tensor | None) -> None:
    """Raises NotCoveredError for a mask that hides anything: Stable Diffusion was trained to see the padding too."""
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise NotCoveredError("attention_mask: masks that hide tokens are not covered by minisd.diffusers; give none")


def check_causal(mask: Tensor | None) -> None:
    """Raises NotCoveredError for a mask (..., T, T) that does not hide just what comes later."""
    if mask is not None and not torch.equal(mask < 0, torch.ones_like(mask, dtype=torch.bool).triu(1)):
        raise NotCoveredError("causal_attention_mask: masks that are not causal are not covered by minisd.diffusers")


class CLIPTextModel(Network):
    """`minisd.text_encoder.TextEncoder`, in the pieces that transformers' model has."""

    component, kind = "text_encoder", TextEncoder
    format = Format.of(component)
    default_dtype = None  # as transformers has it since its version 5

    def grow(self, core: TextEncoder) -> None:
        self.embeddings, self.encoder = CLIPTextEmbeddings(core), CLIPEncoder(core.layers)  # type: ignore[arg-type]
        self.final_layer_norm = core.final_norm

    @classmethod
    def paths(cls, config: Any) -> dict[str, str]:
        """Files have the names that transformers gave before its version 5.6, with "text_model." before all."""
        return {ours: theirs.removeprefix("text_model.") for ours, theirs in super().paths(config).items()}

    def saved_state(self) -> Mapping[str, Tensor]:
        return {f"text_model.{name}": tensor for name, tensor in self.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """From names with "text_model." before them, or without."""
        plain = {name.removeprefix("text_model."): tensor for name, tensor in state_dict.items()}
        plain.pop("embeddings.position_ids", None)  # not a weight: older files have it
        return super().load_state_dict(plain, strict=strict, assign=assign)

    @property
    def text_model(self) -> CLIPTextModel:
        """Before its version 5.6 transformers had the pieces in here."""
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = False,
        return_dict: bool | None = True,
        **others: Any,
    ) -> Any:
        """Ids (B, T) -> `.last_hidden_state` (B, T, D), `.pooler_output` (B, D): the end token's vector.

        With `output_hidden_states` also `.hidden_states`: before the first layer, and after each, without final norm.
        """
        accept("CLIPTextModel", others, {"output_attentions": (None, False)}, parameters(self.forward))
        ids = input_ids.view(-1, input_ids.shape[-1])
        encoded = self.encoder(self.embeddings(ids, position_ids), attention_mask, output_hidden_states=True)
        last = self.final_layer_norm(encoded.last_hidden_state)
        ends = ids.argmax(dim=-1)  # the end token's id is the largest
        pooled = last[torch.arange(len(ids), device=last.device), ends]
        extra = {"hidden_states": encoded.hidden_states} if output_hidden_states else {}
        return output(return_dict, last_hidden_state=last, pooler_output=pooled, **extra)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.token_embedding = value  # type: ignore[assignment]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, **others: Any) -> nn.Module:
        """Give the token embedding another number of rows; returns it. New ones are the mean of the old.

        (transformers draws them around that mean: a program sets them, or trains them.)
        """
        accept("resize_token_embeddings", others, {"pad_to_multiple_of": (None,), "mean_resizing": (True, False)}, [])
        old = self.embeddings.token_embedding
        if new_num_tokens is None or new_num_tokens == len(old.weight):
            return old
        kept = old.weight.data[:new_num_tokens]
        added = old.weight.data.mean(dim=0).expand(new_num_tokens - len(kept), -1)
        table = nn.Parameter(torch.cat([kept, added]), requires_grad=old.weight.requires_grad)
        self.__dict__["_core"].take_table(table)  # in place: whoever holds the layer has the new rows
        self.config = Config({**self.config, "vocab_size": new_num_tokens})
        return old

    def _build_causal_attention_mask(self, batch: int, length: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, T, T), the lowest number where a token must not look: transformers' own, before its version 4.28."""
        return torch.full((batch, 1, length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)


class CLIPTextModelWithProjection(CLIPTextModel):
    """The same with the pooled vector projected: SDXL's second text encoder."""

    component = "text_encoder_2"
    format = Format.of(component)

    def grow(self, core: TextEncoder) -> None:
        super().grow(core)
        assert core.projection is not None
        self.text_projection = core.projection

    def saved_state(self) -> Mapping[str, Tensor]:
        prefixes = {name: "" if name.startswith("text_projection") else "text_model." for name in self.state_dict()}
        return {f"{prefixes[name]}{name}": tensor for name, tensor in self.state_dict().items()}

    def forward(self, *args: Any, return_dict: bool | None = True, **others: Any) -> Any:
        """Ids (B, T) -> `.text_embeds` (B, P), and what `CLIPTextModel` gives but the pooled vector."""
        found = super().forward(*args, **others)
        embeds = self.text_projection(found.pop("pooler_output"))
        return output(return_dict, text_embeds=embeds, **found)
