"""UNet and VAE decoder converted by OpenVINO, for each shape once; conversions stay in the user's cache folder.

A conversion's name is the hash of weights and shapes, and beside it lies the hash of its files: one that is damaged is
made again. It holds whole weights, so LoRAs and taps, which hook into layers, are refused.
"""

import copy
import hashlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minisd.checkpoint.save import into_place
from minisd.unet import UNet
from minisd.vae import Decoder
from minisd.warn import warn


class Converted:
    """A network's forward by OpenVINO; mixed into its class by `prepare`."""

    def forward(self: Any, *inputs: Tensor) -> Tensor:
        """As the network's own, without gradients. Raises ValueError where layers have hooks."""
        first = inputs[0]
        if any(module._forward_hooks or module._forward_pre_hooks for module in list(self.modules())[1:]):
            raise ValueError("LoRAs and taps do not reach into engine='openvino': load the model with another engine")
        if len(inputs) > 1:  # one timestep for each image
            inputs = (first, torch.as_tensor(inputs[1]).expand(len(first)).float(), inputs[2])
        arrays = [value.detach().float().contiguous().numpy() for value in inputs]
        weights = tuple((weight.data_ptr(), weight._version) for weight in self.parameters())
        key = (weights, tuple(array.shape for array in arrays))
        compiled = self.__dict__.setdefault("compiled", {})
        if key not in compiled:
            compiled.clear()  # a converted network holds all the weights: one shape at a time
            compiled[key] = load(self, [torch.from_numpy(array) for array in arrays])
        return torch.from_numpy(compiled[key](arrays)[0].copy()).to(first.dtype)


class ConvertedUNet(Converted, UNet):
    """The UNet by OpenVINO."""


class ConvertedDecoder(Converted, Decoder):
    """The VAE's decoder by OpenVINO."""


def prepare(network: nn.Module) -> None:
    """Convert the UNet, or the VAE's decoder, at its first call. Raises ValueError on an accelerator."""
    part = getattr(network, "decoder", network)
    if next(part.parameters()).device.type != "cpu":
        raise ValueError("engine='openvino' works on the CPU: load the model with device='cpu', or another engine")
    part.__class__ = ConvertedUNet if isinstance(part, UNet) else ConvertedDecoder


def load(network: nn.Module, inputs: list[Tensor]) -> Any:
    """The network compiled for `inputs`: from the cache, or converted and put there."""
    import openvino

    core = openvino.Core()
    half = next(network.parameters()).dtype == torch.bfloat16
    folder = cache() / name_of(network, inputs)
    if is_whole(folder):
        model: Any = core.read_model(folder / "model.xml")
    else:
        print(f"converting the {type(network).__name__[9:]} for OpenVINO, once for this shape", file=sys.stderr)
        model = convert(network, inputs)
        try:
            keep(model, folder)
        except OSError as error:
            warn(f"the conversion cannot be kept, and is made again next time: {error}")
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16" if half else "f32"})


def convert(network: nn.Module, inputs: list[Tensor]) -> Any:
    """The network as OpenVINO's model with the shapes of `inputs`, in float32."""
    import openvino

    plain = copy.copy(network) if next(network.parameters()).dtype == torch.float32 else copy.deepcopy(network).float()
    plain.__class__ = UNet if isinstance(network, UNet) else Decoder
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: sizes are constants here: one conversion a shape
        return openvino.convert_model(plain, example_input=tuple(inputs), input=[list(x.shape) for x in inputs])


def name_of(network: nn.Module, inputs: list[Tensor]) -> str:
    """The hash of what the conversion depends on."""
    import openvino

    digest = hashlib.sha256(f"{openvino.__version__} {network.config if isinstance(network, UNet) else ''}".encode())
    digest.update(str([tuple(value.shape) for value in inputs]).encode())
    for name, weight in network.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(memoryview(weight.detach().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def cache() -> Path:
    """The folder of conversions, under the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisd" / "openvino"


def checksum(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("model.xml", "model.bin"):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether a conversion is there, as it was written."""
    try:
        return (folder / "sha256").read_text(encoding="ascii") == checksum(folder)
    except (OSError, ValueError):
        return False


def keep(model: Any, folder: Path) -> None:
    """Write a conversion whole, or not at all. Raises OSError."""
    import openvino

    def write(place: Path) -> None:
        place.mkdir()
        openvino.save_model(model, place / "model.xml", compress_to_fp16=False)
        (place / "sha256").write_text(checksum(place), encoding="ascii")

    into_place(folder, write)
