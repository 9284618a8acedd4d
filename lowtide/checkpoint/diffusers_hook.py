"""The hook into diffusers: after `import lowtide`, from_pretrained and save_pretrained know packed models.

diffusers has no public registration for quantizers; what works, and what others do, is to add to its two tables.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from lowtide.checkpoint.file_format import (
    HASHES,
    PLAN,
    check_version,
    hashes_by_name,
    metadata,
    read_metadata,
    verify,
    verify_names,
)
from lowtide.errors import BadInput
from lowtide.nn.plan import FORMAT_VERSION, Plan
from lowtide.nn.swap import skeleton

NAME = "lowtide"


class LowtideMethod(str, Enum):
    """diffusers asks the method for `.value`, and its own enum is closed."""

    LOWTIDE = NAME


@dataclass
class LowtideConfig(QuantizationConfigMixin):
    """What config.json says: enough to know the file, little enough for a header. The plan lies in the safetensors."""

    format_version: int = FORMAT_VERSION
    method: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    quant_method: str = LowtideMethod.LOWTIDE

    def __post_init__(self) -> None:
        self.quant_method = LowtideMethod.LOWTIDE

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": NAME,
            "format_version": self.format_version,
            "method": self.method,
            "summary": self.summary,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class LowtideQuantizer(DiffusersQuantizer):
    """Builds the packed skeleton on meta, checks every tensor, and writes the plan when saving."""

    requires_calibration = True
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: LowtideConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan | None = None
        self.hashes: dict[str, bytes] = {}
        self.names: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        check_version(self.quantization_config.format_version)

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        for path in checkpoint_files:
            found = read_metadata(path)
            self.plan = Plan.from_json(found[PLAN])
            self.hashes = hashes_by_name(loaded_keys, found[HASHES])
        self.names = loaded_keys
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str], **kwargs: Any
    ) -> None:
        # The loader casts every float tensor to torch_dtype unless a part of its name stands in this very list.
        keep_in_fp32_modules += [
            part
            for part in ("scale", "smooth", "lowtide_correction")
            if part not in keep_in_fp32_modules
        ]
        with torch.device("meta"):
            skeleton(model, self.plan)
        verify_names(model, self.names)
        model.register_to_config(quantization_config=self.quantization_config.to_dict())

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        verify(state_dict, self.hashes)
        return state_dict

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if left := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
            raise BadInput(
                f"found no data for {left[0]}",
                "every tensor of the plan",
                "copy the whole checkpoint again",
            )
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = True
    ) -> tuple[dict, dict]:
        return state_dict, metadata(self.plan, state_dict)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def supports_safetensors_serialization(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: nn.Module, plan: Plan) -> None:
    """Make a packed model one that diffusers saves as quantized."""
    config = LowtideConfig(method=plan.method, summary=plan.summary)
    quantizer = LowtideQuantizer(config, pre_quantized=True)
    quantizer.plan = plan
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.register_to_config(quantization_config=config.to_dict())


# Registered on import: lowtide/__init__ brings this module in as soon as diffusers' tables are imported.
auto.AUTO_QUANTIZER_MAPPING[NAME] = LowtideQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = LowtideConfig
