"""The hook into peft: a LoRA on a packed layer is a branch in float, and fusing keeps it one.

peft has no public registration of layers for a LoRA that diffusers loads. This module changes the
two methods of its LoRA that put layers around others. Adapters of all other kinds read or change
the float weight, so they are refused on packed layers. `import lowtide` is enough: it imports this
module when peft is imported, and never otherwise.
"""

# peft is not among the packages that lowtide needs.
# pyright: reportMissingImports=false

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

from lowtide.checkpoint.adapters import adapted_layers
from lowtide.errors import BadInput
from lowtide.nn.feature_cache import Cached, ZeroFeatures
from lowtide.nn.float_layers import FloatLayer, conv_options, linear_options, replace_module
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.nn.request_features import PerRequest
from lowtide.nn.side_branch import SIDE, Factors, branch_layers, joined, side_branch
from lowtide.nn.split import SplitLayer
from lowtide.nn.swap import packed_layers

LOADED = "_hf_peft_config_loaded"
_PACKED = (PackedLinear, PackedConv2d, SplitLayer)
_REPLACED = (Cached, ZeroFeatures, PerRequest)
# Kinds of LoRA that change the weight itself, or read it: by the field of the configuration.
_VARIANTS = (
    "use_dora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)


class PackedLora(lora_layer.Linear):
    """peft's layer around a packed linear layer, a packed convolution, or a split one.

    Its forward pass is peft's own: the answer of the packed layer plus that of each adapter.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ):
        nn.Module.__init__(self)
        lora_layer.LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self.is_target_conv_1d_layer = False
        # What each fused adapter was when it was fused, and what the layer held before all of them.
        self.fused: dict[str, Factors] = {}
        self.before: list[list[Factors]] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        shape = _shape(module)
        if isinstance(shape, nn.Conv2d):
            return shape.in_channels, shape.out_channels
        return shape.in_features, shape.out_features

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter of this rank, as peft does beside a float layer."""
        check_config(config)
        if r <= 0:
            raise BadInput(f"found rank {r}", "a rank of at least 1", "correct the LoRA's file")
        base = self.get_base_layer()
        down, up = branch_layers(_shape(base), r, bias=config.lora_bias)
        device = next(base.parameters()).device
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (r**0.5 if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = False
        self.lora_bias[adapter_name] = config.lora_bias
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        self.lora_A[adapter_name] = _made(down, device)
        self.lora_B[adapter_name] = _made(up, device)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(
        self,
        safe_merge: bool = False,  # noqa: FBT001, FBT002 - as peft calls it
        adapter_names: list[str] | None = None,
    ) -> None:
        """Make adapters a branch of the packed layer, which computes the same with it."""
        names = [
            name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A
        ]
        parts = _parts(self.get_base_layer())
        if names and not self.merged:
            self.before = [[] if part.side is None else [part.side.factors()] for part in parts]
        for name in names:
            down = cast(FloatLayer, self.lora_A[name])
            up = cast(FloatLayer, self.lora_B[name])
            factors = Factors.scaled(down, up, self.scaling[name])
            if safe_merge and not (factors.down.isfinite().all() and factors.up.isfinite().all()):
                raise BadInput(
                    f"found NaN or infinity in the LoRA {name}",
                    "finite weights",
                    "download the LoRA again, or leave it out",
                )
            self.fused[name] = factors
            self.merged_adapters.append(name)
        self._place()

    def unmerge(self) -> None:
        """Take the branch off again. The packed codes were never touched."""
        self.merged_adapters.clear()
        self.fused.clear()
        self._place()

    def _place(self) -> None:
        """Give the packed layer the branch of all fused adapters, and of what it held before."""
        start = 0
        parts = _parts(self.get_base_layer())
        for part, before in zip(parts, self.before, strict=False):
            stop = start + _inputs(part)
            factors = [*before, *(each.part(start, stop) for each in self.fused.values())]
            groups = part.groups if isinstance(part, nn.Conv2d) else 1
            part._modules[SIDE] = side_branch(part, joined(factors, groups)) if factors else None
            start = stop


def _made(layer: FloatLayer, device: torch.device) -> FloatLayer:
    """The layer with memory on this device, and torch's own random start."""
    made = layer.to_empty(device=device)
    made.reset_parameters()
    return made


def _parts(base: nn.Module) -> list[Any]:
    """The packed layers of a base layer: itself, or the two of a split one."""
    return [base.first, base.second] if isinstance(base, SplitLayer) else [base]


def _inputs(layer: FloatLayer) -> int:
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def _shape(base: nn.Module) -> FloatLayer:
    """A float layer in the shape of the base layer, without data."""
    first, *others = _parts(base)
    inputs = sum(map(_inputs, [first, *others]))
    if isinstance(first, nn.Conv2d):
        convolution = conv_options(first)
        convolution["in_channels"] = inputs
        return nn.Conv2d(**convolution)
    options = linear_options(first)
    options["in_features"] = inputs
    return nn.Linear(**options)


def check_config(config: LoraConfig) -> None:
    """A plain LoRA, whose branch can stand beside a weight that is not changed."""
    found = [name for name in _VARIANTS if getattr(config, name, None)]
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
        found.append(f"init_lora_weights={config.init_lora_weights}")
    if found:
        name = "DoRA" if found == ["use_dora"] else f"LoRA with {found[0]}"
        raise BadInput(
            f"found a {name} on a packed model",
            "a plain LoRA, which leaves the weights as they are",
            "load it into the float model and quantize that with fuse_lora=True",
        )


def check_kind(tuner: BaseTuner, model: nn.Module) -> None:
    """No other adapter than a LoRA goes into a packed model, such as LoKr, LoHa, OFT or IA3."""
    if not isinstance(tuner, LoraModel) and any(packed_layers(model)):
        raise BadInput(
            f"found a {type(tuner).__name__.removesuffix('Model')} on a packed model",
            "a plain LoRA, which leaves the weights as they are",
            "load it into the float model and quantize that with fuse_lora=True",
        )


def _replaced(base: nn.Module, name: str) -> BadInput:
    return BadInput(
        f"found a LoRA on {name}, whose answers this packed model holds as a table",
        "a LoRA on layers that run",
        "quantize again with the LoRA and fuse_lora=True (--fuse-lora), or with a method that runs "
        "the temporal layers, such as minmax",
    )


def _install() -> None:
    """Let peft's LoRA make a PackedLora around a packed layer, and undo what fails half-way."""
    create: Callable[..., Any] = LoraModel._create_new_module
    inject: Callable[..., None] = BaseTuner.inject_adapter

    def create_new_module(
        lora_config: LoraConfig, adapter_name: str, target: Any, **kwargs: Any
    ) -> nn.Module:
        is_wrapped = isinstance(target, BaseTunerLayer)
        base = cast(nn.Module, target.get_base_layer() if is_wrapped else target)
        if isinstance(base, _REPLACED):
            raise _replaced(base, kwargs.get("target_name", ""))
        if isinstance(base, _PACKED):
            return PackedLora(cast(nn.Module, target), adapter_name, lora_config, **kwargs)
        return create(lora_config, adapter_name, target, **kwargs)

    def inject_adapter(
        self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        if any(packed_layers(model)):
            with _undone(model):
                check_config(cast(LoraConfig, self.peft_config[adapter_name]))
        before = {layer for _, layer in adapted_layers(model)}
        try:
            inject(self, model, adapter_name, *args, **kwargs)
        except BadInput:
            _take_back(model, adapter_name, before)
            raise

    def inject_other(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with _undone(model):
            check_kind(self, model)
        inject(self, model, *args, **kwargs)

    LoraModel._create_new_module = staticmethod(create_new_module)
    LoraModel.inject_adapter = inject_adapter
    BaseTuner.inject_adapter = inject_other


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """After an error, diffusers does not take the model for one that has an adapter."""
    try:
        yield
    except BadInput:
        if LOADED in vars(model) and "peft_config" not in vars(model):
            model.__dict__[LOADED] = False
        raise


def _take_back(model: nn.Module, adapter_name: str, before: set[nn.Module]) -> None:
    """Remove an adapter that was not added everywhere, and the layers of peft that it brought."""
    for name, layer in list(adapted_layers(model)):
        if layer not in before:
            replace_module(model, name, layer.get_base_layer())
        elif adapter_name in layer.r:
            layer.delete_adapter(adapter_name)


_install()
