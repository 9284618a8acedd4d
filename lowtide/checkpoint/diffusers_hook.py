"""The hook into diffusers: from_pretrained and save_pretrained know packed models.

diffusers has no public registration of quantizers. Like other libraries, this module adds to its
two tables. `import lowtide` is enough.
"""

from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from lowtide.checkpoint.adapters import without_adapters
from lowtide.checkpoint.belonging import check_belongs
from lowtide.checkpoint.file_format import (
    HASHES,
    PLAN,
    check_version,
    hashes_by_name,
    metadata,
    read_metadata,
    verify,
    verify_kinds,
    verify_names,
    verify_plan,
    verify_shapes,
    verify_values,
)
from lowtide.checkpoint.logical_count import LogicalCount
from lowtide.checkpoint.own_maps import Span, spans, with_own_maps
from lowtide.checkpoint.quantization_config import NAME, WORDS, LowtideConfig
from lowtide.errors import BadInput
from lowtide.nn.clock import CLOCK
from lowtide.nn.dequantize import check_layers_alone, dequantize_modules
from lowtide.nn.plan import Plan
from lowtide.nn.swap import TIMESTEP, skeleton

FUSE = "fuse_projections"

if TYPE_CHECKING:
    from lowtide.checkpoint.data_free import PackedAsLoaded


class LowtideQuantizer(DiffusersQuantizer):
    """Builds the packed skeleton on meta, checks every tensor, and writes the plan when saving.

    A float model is packed as its weights arrive (checkpoint/data_free.py).

    The ignored overrides: diffusers' base methods have no body, so a type checker takes them to
    return None.
    """

    quantization_config: LowtideConfig
    requires_calibration = False
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: LowtideConfig, **kwargs: object):
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan | None = None
        self.hashes: dict[str, bytes] = {}
        self.names: list[str] = []
        self.places: dict[str, Span] = {}
        self.header: dict[str, str] = {}
        self.packing: PackedAsLoaded | None = None

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        check_version(self.quantization_config.format_version)

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        if not self.pre_quantized:
            return loaded_keys
        for path in checkpoint_files:
            header = read_metadata(path)
            verify_plan(header, path)
            check_belongs(header, self.quantization_config.seals, path)
            self.plan = Plan.from_json(header[PLAN])
            self.header = header
        self.names = loaded_keys
        self.places = spans(checkpoint_files)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.plan is None:
            # A float model: its folder, or a single file, has no plan.
            # Imports come late: this module is imported while diffusers is still being imported.
            from lowtide.checkpoint import data_free

            settings = self.quantization_config.settings()
            adapter = data_free.known_adapter(model)
            self.plan = data_free.data_free_plan(model, adapter, settings)
            self.packing = data_free.packed_as_loaded(model, adapter, self.plan)
            return
        # The loader casts every float tensor to torch_dtype, except those with a part of their name
        # in this list. It reads the list itself, so the list is changed in place.
        keep_in_float32: list[str] = kwargs["keep_in_fp32_modules"]
        parts = ("scale", "smooth", "lowtide_correction")
        keep_in_float32 += [part for part in parts if part not in keep_in_float32]
        _build_skeleton(model, self._known_plan())
        verify_names(model, self.names)
        self.hashes = hashes_by_name(self.names, self.header[HASHES])
        paths = {place.path for place in self.places.values()}
        verify_kinds(self.header, paths)
        verify_shapes(model, paths)

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """The clock of a model that is packed as it is loaded comes from no file."""
        if self.packing is None:
            return missing_keys
        return [name for name in missing_keys if not name.startswith(f"{CLOCK}.")]

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: object,
    ) -> bool:
        return self.packing is not None and self.packing.takes(param_name)

    def create_quantized_param(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        *args: object,
        **kwargs: object,
    ) -> None:
        assert self.packing is not None
        self.packing.pack(param_name, param_value.to(target_device))

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.names:
            return state_dict
        state = with_own_maps(state_dict, self.places)
        verify(state, self.hashes, self.header)
        return state

    def _process_model_after_weight_loading(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, **kwargs: object
    ) -> nn.Module:
        if self.packing is not None:
            self.packing.finish()
            self.packing = None
        if empty := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
            raise BadInput(
                f"found no data for {empty[0]}",
                "every tensor of the plan",
                "copy the whole checkpoint again",
            )
        if self.names:
            verify_values(model, self._known_plan())
        # The import comes late: this module is imported while diffusers is still being imported.
        from lowtide import runtime

        self.quantization_config = _register(model, self._known_plan())
        self.pre_quantized = True
        if TIMESTEP in signature(model.forward).parameters:
            runtime.fuse(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = True
    ) -> tuple[dict, dict]:
        if not safe_serialization:
            raise BadInput(
                "found safe_serialization=False",
                "safetensors, whose header holds the plan of a packed model",
                "leave safe_serialization out",
            )
        state, plan = without_adapters(state_dict, self._known_plan())
        return state, metadata(plan, state)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        """The float layers with the rounded weights. Inputs are not rounded any more."""
        from lowtide import runtime

        dtype = cast(torch.dtype, model.dtype)
        check_layers_alone(self._known_plan())
        runtime.unfuse(model)
        dequantize_modules(model, self._known_plan(), dtype)
        del model.__dict__["num_parameters"]
        for module in model.modules():
            module.__dict__.pop(FUSE, None)
        config = cast(dict[str, Any], model._internal_dict)
        kept = {name: value for name, value in config.items() if name != "quantization_config"}
        setattr(model, "_internal_dict", FrozenDict(kept))  # noqa: B010 - diffusers declares none
        return model

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


def _build_skeleton(model: nn.Module, plan: Plan) -> None:
    """Replace the layers of the network by empty ones, as the plan says."""
    try:
        with torch.device("meta"):
            skeleton(model, plan)
    except BadInput:
        raise
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        lines = str(error).splitlines() or [""]
        raise BadInput(
            f"found a plan that does not fit the network of config.json ({lines[0][:200]})",
            "layers and sizes that the network has",
            "copy or download the checkpoint again",
        ) from error


def refuse_fused_projections(*args: object, **kwargs: object) -> None:
    """Takes the place of a method of attention blocks that joins their weights into a new layer."""
    raise BadInput(
        "found fuse_qkv_projections on a packed model",
        "q, k and v as the layers that were quantized",
        "fuse the float model's before you quantize it, or leave it out",
    )


def attach(model: nn.Module, plan: Plan) -> None:
    """Make diffusers save this packed model as a quantized one."""
    quantizer = LowtideQuantizer(_register(model, plan), pre_quantized=True)
    quantizer.plan = plan
    # diffusers keeps both on a model without declaring them.
    attributes: dict[str, object] = {"hf_quantizer": quantizer, "is_quantized": True}
    for name, value in attributes.items():
        setattr(model, name, value)


def attach_bare(module: nn.Module, plan: Plan) -> None:
    """Let a packed module that is no model of diffusers know its plan."""
    quantizer = LowtideQuantizer(LowtideConfig.of(plan), pre_quantized=True)
    quantizer.plan = plan
    object.__setattr__(module, "hf_quantizer", quantizer)


def _register(model: nn.Module, plan: Plan) -> LowtideConfig:
    """Let the model's config say how it is quantized."""
    config = LowtideConfig.of(plan)
    cast(ConfigMixin, model).register_to_config(quantization_config=config)
    model.__dict__["num_parameters"] = LogicalCount(model)
    for module in model.modules():
        if callable(getattr(module, FUSE, None)):
            module.__dict__[FUSE] = refuse_fused_projections
    return config


# Registered on import: lowtide/__init__ imports this module as soon as diffusers' tables are there.
# A folder names the method in words that help where lowtide is missing; older folders do not.
for name in (NAME, WORDS):
    auto.AUTO_QUANTIZER_MAPPING[name] = LowtideQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = LowtideConfig
