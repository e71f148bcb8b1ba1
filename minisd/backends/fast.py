"""Float32 linear layers by oneDNN: up to 1.2 times as fast on a CPU, with another rounding.

The weights are packed at the first call and stay beside the layer's own, so that LoRAs, saving and training go on.
"""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """A linear layer whose weight is also there in oneDNN's order of memory, made anew when the weight changes."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        weight = self.weight
        if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        rows = x.numel() // x.shape[-1]
        state = (weight.data_ptr(), weight._version, rows)
        if self.__dict__.get("packed_from") != state:
            self.__dict__["packed"] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            self.__dict__["packed_from"] = state
        done: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.__dict__["packed"], self.bias, "none", [], "")
        return done


def prepare(network: nn.Module) -> None:
    """Turn every linear layer into a packed one; its weights, hooks and name stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear
