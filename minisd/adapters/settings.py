"""What is said about an adapter beside its tensors: its alphas, and whether it does what minisd does not apply.

PEFT writes an `adapter_config.json` beside the weights; diffusers writes the same settings into the file's metadata,
as "unet.lora_alpha" (a pipeline's `save_lora_weights`) or "lora_alpha" (a model's `save_lora_adapter`).
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisd.adapters.targets import COMPONENTS, Target
from minisd.checkpoint.header import Files
from minisd.files import CheckpointError, read_json_object, shown

CONFIG = "adapter_config.json"
MAX_ALPHA = 1_000_000  # people take 1 to a few hundred
APPLIED = ("LORA", "LOHA", "LOKR")

# A module name in a pattern is a regular expression to PEFT. Without brackets, and with few repetitions, none of them
# takes long; nobody writes others for a UNet.
PATTERN = re.compile(r"[\w.\\^$|*+?\[\]-]{1,300}")
MOST_REPETITIONS = 3

# Methods that PEFT trains on weights that it changed before: the adapter alone is not the change.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {})
REFUSED: dict[str, str] = {
    "bias": "it changes biases too",
    "lora_bias": "it has biases of its own",
    "modules_to_save": "it has whole modules besides",
    "trainable_token_indices": "it has trained tokens besides",
    "target_parameters": "it changes single parameters",
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it is switched on by tokens of the prompt (aLoRA)",
    "use_qalora": "it is a QALoRA",
}


@dataclass(frozen=True)
class Settings:
    """PEFT's settings by component; empty where the file says none."""

    path: Path
    of_component: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, files: Files, file: Path) -> "Settings":
        """Those in the metadata of `file`, else those beside it. Raises CheckpointError for what is broken."""
        try:
            said = json.loads(files.metadata.get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise CheckpointError(f"{files.path}: its metadata holds a broken lora_adapter_metadata")
        beside, peft = file.with_name(CONFIG), any(name.startswith("base_model.model.") for name in files.tensors)
        common = read_json_object(beside) if peft and beside.is_file() else {}
        prefixes = tuple(f"{component}." for component in COMPONENTS)
        common |= {name: value for name, value in said.items() if not name.startswith(prefixes)}
        own = {
            prefix[:-1]: {name[len(prefix) :]: value for name, value in said.items() if name.startswith(prefix)}
            for prefix in prefixes
        }
        return cls(files.path, {component: common | special for component, special in own.items()})

    def check(self, targets: Iterable[Target], roles: Iterable[str]) -> None:
        """Raise CheckpointError, by name, for settings that minisd does not apply to these layers."""
        roles = set(roles)
        for component in {target.component for target in targets}:
            settings = self.of_component.get(component, {})
            kind = settings.get("peft_type")
            if kind is not None and kind not in APPLIED:
                raise self.refusal(f"peft_type={shown(kind)}", f"only {', '.join(APPLIED)} are applied")
            for name, reason in REFUSED.items():
                if settings.get(name) not in NEUTRAL:
                    raise self.refusal(f"{name}={shown(settings[name], 40)}", f"{reason}, which minisd does not apply")
            first = str(settings.get("init_lora_weights")).lower()
            if first.startswith(CHANGED_BASE):
                raise self.refusal(
                    f"init_lora_weights={shown(first, 40)}",
                    "it belongs to weights that were changed before; PEFT can convert it "
                    "(save_pretrained with path_initial_model_for_weight_conversion)",
                )
            if settings.get("use_dora") is True and not roles & {"magnitude", "dora_scale"}:
                raise self.refusal("use_dora=True", "but the file has no magnitudes")

    def refusal(self, setting: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: its settings say {setting}: {reason}")

    def alpha(self, target: Target, rank: int, name: str) -> float | None:
        """The alpha of a layer, which its product is multiplied by after a division by `rank`; None if none is said.

        `name`: "lora_alpha", or "alpha" for LoHa and LoKr.
        """
        settings = self.of_component.get(target.component, {})
        alpha = self.special(settings.get("alpha_pattern"), target, settings.get(name))
        if alpha is None:
            return None
        stabilised = name == "lora_alpha" and settings.get("use_rslora")  # divided by the root of the rank
        return number(alpha) * (math.sqrt(rank) if stabilised else 1)  # (Kalajdzievski 2023, arXiv:2312.03732)

    def rank(self, target: Target) -> int | None:
        """The rank of a layer, for changes whose shapes do not tell it."""
        settings = self.of_component.get(target.component, {})
        rank = self.special(settings.get("rank_pattern"), target, settings.get("r"))
        return rank if isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank <= MAX_ALPHA else None

    def special(self, patterns: Any, target: Target, general: Any) -> Any:
        """The value of the first pattern that means this layer, as PEFT looks it up; else the `general` one."""
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if self.matcher(pattern)(target.diffusers):
                return value
        return general

    def matcher(self, pattern: str) -> Callable[[str], Any]:
        """PEFT's rule: the pattern is the end of a module's name, after a dot or from its beginning."""
        if PATTERN.fullmatch(pattern) and sum(map(pattern.count, "*+?")) <= MOST_REPETITIONS:
            try:
                return re.compile(rf"(.*\.)?({pattern})$").match
            except re.error:
                pass
        raise CheckpointError(f"{self.path}: its settings have the pattern {shown(pattern)}, which is none for layers")


def number(alpha: Any) -> float:
    """An alpha from a file, if it is a number that a change can be multiplied by; else NaN."""
    sound = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) <= MAX_ALPHA
    return float(alpha) if sound else math.nan
