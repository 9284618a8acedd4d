"""LowtideConfig: what config.json says of a packed model, and how to quantize a float one."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, cast

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from lowtide.errors import BadInput
from lowtide.nn.plan import FORMAT_VERSION, Plan
from lowtide.settings import Bits, Settings

NAME = "lowtide"
# diffusers shows the name of the method to who has not imported lowtide.
WORDS = "lowtide (pip install lowtide, then import lowtide before loading)"


class LowtideMethod(str, Enum):
    """diffusers reads the method's `.value`, and its own enum cannot be extended."""

    LOWTIDE = WORDS


@dataclass(repr=False)
class LowtideConfig(QuantizationConfigMixin):
    """How diffusers' `from_pretrained` quantizes a float model, without data.

    Weights are rounded to nearest, on the range of the least error. Inputs are rounded by their own
    range as the model runs: by token in linear layers, by sample in convolutions. `quantize` has
    less error, because it calibrates.

    Args:
        weights: bits of the weights, 1 to 8. The first and the last layer have 8.
        inputs: bits of the inputs, 1 to 8, or 16 or 32 to leave them in float.
        group: how many weights share a scale factor, such as 64; None: those of an output channel.
        modules_to_not_convert: names of layers and modules to leave in float, such as
            ["conv_out", "mid_block.*"].

    Examples:
        >>> import lowtide
        >>> from diffusers import UNet2DModel
        >>> config = lowtide.LowtideConfig(weights=8, inputs=8)
        >>> folder = str(lowtide.load("zoo:digits").unet.config._name_or_path)
        >>> model = UNet2DModel.from_pretrained(folder, quantization_config=config)
        >>> model.config["quantization_config"].weights
        8
    """

    weights: int = 8
    inputs: int = 8
    group: int | None = None
    modules_to_not_convert: Sequence[str] | None = None
    # Of a packed model.
    format_version: int = FORMAT_VERSION
    method: str = ""
    summary: dict[str, object] = field(default_factory=dict)
    # Of the weights in the folder of this config.json; see checkpoint/belonging.py.
    seals: Sequence[str] = ()
    # diffusers declares its own enum here, which cannot be extended.
    quant_method: str = LowtideMethod.LOWTIDE  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        method = LowtideMethod.LOWTIDE
        self.quant_method = method  # pyright: ignore[reportIncompatibleVariableOverride]
        if isinstance(self.modules_to_not_convert, str):
            self.modules_to_not_convert = [self.modules_to_not_convert]
        if not isinstance(self.summary, dict):
            raise BadInput(
                f"found a quantization_config with summary {str(self.summary)[:40]!r}",
                "settings by name",
                "copy or download the folder again",
            )
        if not isinstance(self.seals, list | tuple):
            raise BadInput(
                f"found a quantization_config with seals {str(self.seals)[:40]!r}",
                "a list of hashes",
                "copy or download the folder again",
            )
        if self.summary:
            self._follow_summary()
        else:
            self.settings()

    def settings(self) -> Settings:
        """The settings of a quantization without data; an error if the bits are none."""
        if self.weights in (16, 32):
            raise BadInput(
                f"found {self.weights} bits for weights",
                "1 to 8",
                "leave quantization_config out for a float model",
            )
        kept = tuple(self.modules_to_not_convert or ())
        weights = cast(Bits, self.weights)
        inputs = cast(Bits, self.inputs)
        return Settings(weights, inputs, group=self.group, keep_float=kept)

    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        return_unused_kwargs: bool = False,  # noqa: FBT001, FBT002 - as in diffusers
        **kwargs: Any,
    ) -> Any:
        """What a config.json says; a field that is unknown is an error."""
        unknown = sorted(map(str, config_dict.keys() - {each.name for each in fields(cls)}))
        if unknown:
            raise BadInput(
                f"found a quantization_config with the unknown {unknown[0][:40]!r}",
                "the fields of this version",
                "upgrade lowtide, or copy or download the folder again",
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    @classmethod
    def of(cls, plan: Plan) -> "LowtideConfig":
        """What config.json says of a model with this plan."""
        return cls(method=plan.method, summary=plan.summary)

    def _follow_summary(self) -> None:
        """The fields of a packed model, as its summary has them."""
        self.weights = cast(int, self.summary.get("weights", self.weights))
        self.inputs = cast(int, self.summary.get("inputs", self.inputs))
        self.group = cast(int | None, self.summary.get("group"))
        self.modules_to_not_convert = cast(list[str] | None, self.summary.get("keep_float"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON; what is not set is left out."""
        content = {
            "quant_method": WORDS,
            "format_version": self.format_version,
            "weights": self.weights,
            "inputs": self.inputs,
            "group": self.group,
            "modules_to_not_convert": list(self.modules_to_not_convert or ()),
            "method": self.method,
            "summary": self.summary,
        }
        return {name: value for name, value in content.items() if value not in (None, "", [], {})}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
