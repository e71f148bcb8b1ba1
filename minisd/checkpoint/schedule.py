"""What a checkpoint says of its noise schedule: above all, what its UNet predicts, noise (epsilon) or v.

That is not in the weights. It may stand in a folder's scheduler_config.json, in metadata (minisd's own or
`modelspec.prediction_type`), in an empty tensor called `v_pred` or `ztsnr`, or in a `.yaml` beside the file. All of
them are read here, once; who is followed is the order of `claims`. This file needs the standard library only; where
there is a `.yaml`, PyYAML, which comes with huggingface_hub.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisd.checks import PREDICTION_TYPES, check_schedule
from minisd.config import SD15
from minisd.files import CheckpointError, read_text, shown

MAX_YAML = 1 << 20  # bytes; CompVis' v1-inference.yaml has 2,000

# How programs spell what a UNet predicts -> diffusers' prediction_type.
SPELLINGS = {
    "epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction",
    "v-prediction": "v_prediction", "vpred": "v_prediction", "sample": "sample", "x0": "sample",
}  # fmt: skip
METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
OURS = "metadata minisd.config"


@dataclass(frozen=True)
class Stated:
    """Where a schedule may be stated."""

    own: Mapping[str, Any] | None  # scheduler_config.json, or what minisd wrote into the metadata
    where: str  # that file, or OURS behind the file's name
    tensors: Collection[str]
    metadata: Mapping[str, str]
    beside: Path | None  # the single file, beside which a .yaml may be
    usual: str | None  # what such a model predicts, if it does not say so


@dataclass(frozen=True)
class Schedule:
    """A noise schedule under diffusers' names; what was said about it, and by whom; what a person should know."""

    settings: dict[str, Any]
    hints: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def prediction(self) -> str:
        """What the UNet predicts: "epsilon", "v_prediction" or "sample"."""
        return str(self.settings.get("prediction_type", "epsilon"))


def understand(stated: Stated, prediction: str | None) -> Schedule:
    """The schedule that is meant. `prediction`, if given, overrides what the files say of the prediction type.

    Raises CheckpointError for a schedule that is impossible, ValueError for another `prediction`.
    """
    if prediction not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction={prediction!r}: must be one of {', '.join(PREDICTION_TYPES)}")
    settings = checked_schedule(stated.own, stated.where) if stated.own is not None else dict(SD15.scheduler)
    notes: list[str] = []
    found = [("prediction=", prediction)] if prediction else []
    found += list(claims(stated, notes))
    if not found and stated.usual is not None:
        found = [("as usual for SD 2.x", stated.usual)]
        notes.append(f"does not say what its UNet predicts: {stated.usual} as usual for SD 2.x (prediction=...)")
    if found:
        settings["prediction_type"] = found[0][1]
        others = [f"{where} says {kind}" for where, kind in found[1:] if kind != found[0][1]]
        if others and not prediction:
            notes.append(
                f"{found[0][0]} says {found[0][1]}, {', '.join(others)}; the first is followed (prediction=...)"
            )
    unusual = any(kind != "epsilon" for _, kind in found)
    hints = [f"prediction type: {kind} ({by})" for by, kind in found if unusual]
    if "ztsnr" in stated.tensors:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        hints.append("zero terminal SNR (tensor ztsnr)")
    if settings.get("rescale_betas_zero_snr") and settings.get("prediction_type", "epsilon") == "epsilon":
        notes.append("zero terminal SNR with epsilon prediction divides by zero at the first step (prediction=...)")
    return Schedule(settings, tuple(hints), tuple(notes))


def claims(stated: Stated, notes: list[str]) -> Iterator[tuple[str, str]]:
    """Who says what of the prediction type, most trustworthy first."""
    if "v_pred" in stated.tensors:
        yield "tensor v_pred", "v_prediction"
    if stated.own is not None and "prediction_type" in stated.own:
        yield OURS if OURS in stated.where else Path(stated.where).name, stated.own["prediction_type"]
    for name in METADATA:
        if name in stated.metadata:
            yield from understood(f"metadata {name}", stated.metadata[name], notes)
    for ending in (".yaml", ".yml"):
        if stated.beside is not None and (path := stated.beside.with_suffix(ending)).exists():
            yield from understood(path.name, parameterization(path, notes), notes)


def understood(where: str, value: object, notes: list[str]) -> Iterator[tuple[str, str]]:
    """A claim in diffusers' words; what nobody knows goes to `notes`."""
    if isinstance(value, str) and value.strip().lower() in SPELLINGS:
        yield where, SPELLINGS[value.strip().lower()]
    elif value is not None:
        notes.append(f"{where} says that the UNet predicts {shown(repr(value), 40)}, which is unknown (prediction=...)")


def parameterization(path: Path, notes: list[str]) -> object:
    """`model.params.parameterization` of CompVis' configuration: "eps", "v" or "x0"; None where it is not stated."""
    import yaml

    try:
        value = yaml.safe_load(read_text(path, MAX_YAML))
        for name in ("model", "params", "parameterization"):
            value = value.get(name) if isinstance(value, dict) else None
    except (CheckpointError, yaml.YAMLError, RecursionError, ValueError) as error:
        notes.append(f"{path.name}, beside the file, cannot be read ({shown(type(error).__name__)})")
        return None
    return value


def checked_schedule(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a noise schedule. Raises CheckpointError for values that are impossible.

    `_class_name` is among them where the files name another scheduler than DDIM, for who asks for the model's own.
    """
    settings = {name: value for name, value in stored.items() if not name.startswith("_")}
    kind = stored.get("_class_name")
    own = {"_class_name": kind} if isinstance(kind, str) and kind != "DDIMScheduler" else {}
    try:
        check_schedule(settings)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return settings | own
