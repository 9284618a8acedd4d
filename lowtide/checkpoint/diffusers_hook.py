"""The hook into diffusers: from_pretrained and save_pretrained know packed models.

diffusers has no public registration of quantizers. Like other libraries, this module adds to its
two tables. `import lowtide` is enough.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from lowtide.checkpoint.adapters import without_adapters
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
from lowtide.checkpoint.own_maps import Span, spans, with_own_maps
from lowtide.errors import BadInput
from lowtide.nn.plan import FORMAT_VERSION, Plan
from lowtide.nn.swap import skeleton

NAME = "lowtide"


class LowtideMethod(str, Enum):
    """diffusers reads the method's `.value`, and its own enum cannot be extended."""

    LOWTIDE = NAME


@dataclass
class LowtideConfig(QuantizationConfigMixin):
    """What config.json says of a packed model. The plan is in the safetensors file."""

    format_version: int = FORMAT_VERSION
    method: str = ""
    summary: dict[str, object] = field(default_factory=dict)
    # diffusers declares its own enum here, which cannot be extended.
    quant_method: str = LowtideMethod.LOWTIDE  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        method = LowtideMethod.LOWTIDE
        self.quant_method = method  # pyright: ignore[reportIncompatibleVariableOverride]

    def to_dict(self) -> dict[str, object]:
        return {
            "quant_method": NAME,
            "format_version": self.format_version,
            "method": self.method,
            "summary": self.summary,
        }

    def to_diff_dict(self) -> dict[str, object]:
        return self.to_dict()


class LowtideQuantizer(DiffusersQuantizer):
    """Builds the packed skeleton on meta, checks every tensor, and writes the plan when saving.

    The ignored overrides: diffusers' base methods have no body, so a type checker takes them to
    return None.
    """

    quantization_config: LowtideConfig
    requires_calibration = True
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: LowtideConfig, **kwargs: object):
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan | None = None
        self.hashes: dict[str, bytes] = {}
        self.names: list[str] = []
        self.places: dict[str, Span] = {}

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        check_version(self.quantization_config.format_version)

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        for path in checkpoint_files:
            header = read_metadata(path)
            self.plan = Plan.from_json(header[PLAN])
            self.hashes = hashes_by_name(loaded_keys, header[HASHES])
        self.names = loaded_keys
        self.places = spans(checkpoint_files)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        # The loader casts every float tensor to torch_dtype, except those with a part of their name
        # in this list. It reads the list itself, so the list is changed in place.
        keep_in_float32: list[str] = kwargs["keep_in_fp32_modules"]
        parts = ("scale", "smooth", "lowtide_correction")
        keep_in_float32 += [part for part in parts if part not in keep_in_float32]
        with torch.device("meta"):
            skeleton(model, self._known_plan())
        verify_names(model, self.names)
        _register(model, self.quantization_config)

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        state = with_own_maps(state_dict, self.places)
        verify(state, self.hashes)
        return state

    def _process_model_after_weight_loading(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, **kwargs: object
    ) -> nn.Module:
        if empty := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
            raise BadInput(
                f"found no data for {empty[0]}",
                "every tensor of the plan",
                "copy the whole checkpoint again",
            )
        # The import comes late: this module is imported while diffusers is still being imported.
        from lowtide import runtime

        runtime.fuse(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = True
    ) -> tuple[dict, dict]:
        state, plan = without_adapters(state_dict, self._known_plan())
        return state, metadata(plan, state)

    def _known_plan(self) -> Plan:
        """The plan, which is known once a header was read or `attach` gave it."""
        assert self.plan is not None
        return self.plan

    @property
    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def supports_safetensors_serialization(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: nn.Module, plan: Plan) -> None:
    """Make diffusers save this packed model as a quantized one."""
    config = LowtideConfig(method=plan.method, summary=plan.summary)
    quantizer = LowtideQuantizer(config, pre_quantized=True)
    quantizer.plan = plan
    # diffusers keeps both on a model without declaring them.
    attributes: dict[str, object] = {"hf_quantizer": quantizer, "is_quantized": True}
    for name, value in attributes.items():
        setattr(model, name, value)
    _register(model, config)


def _register(model: nn.Module, config: LowtideConfig) -> None:
    cast(ConfigMixin, model).register_to_config(quantization_config=config.to_dict())


# Registered on import: lowtide/__init__ imports this module as soon as diffusers' tables are there.
auto.AUTO_QUANTIZER_MAPPING[NAME] = LowtideQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = LowtideConfig
