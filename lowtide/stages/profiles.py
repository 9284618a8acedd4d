"""Profiles: which bits each part of a network gets; one for each paper's released code, and `full`.

A layer belongs to the first part of this list that it fits:

    first, last       the layer that reads the sample, and the layer that answers
    time1, time2      the first two layers of the temporal block, which embed the timestep
    temporal          the rest of the temporal block
    shortcuts         convolutions around a residual block
    downsampling      convolutions that halve the resolution
    conv1d            q, k, v and output of blocks that are attention alone. In LDM's own UNets they
                      are convolutions of one axis, which most releases do not quantize
    entry             the first layer of the first block
    inner             all others

Attention has two parts more: `qkv`, the operands of its products, and `softmax`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lowtide.errors import BadInput
from lowtide.models import Adapter
from lowtide.sampling.drivers import Role
from lowtide.settings import Settings

RUN = "run"  # the bits that the run asks for
FLOAT = 32
Width = int | Literal["run"]

Part = Literal[
    "first", "last", "time1", "time2", "temporal", "shortcuts", "downsampling", "conv1d",
    "entry", "inner",
]  # fmt: skip
Widths = Mapping[Part, Width]
WORDS: dict[Part, str] = {
    "first": "first layer",
    "last": "last layer",
    "time1": "first temporal layer",
    "time2": "second temporal layer",
    "temporal": "temporal block",
    "shortcuts": "shortcut",
    "downsampling": "downsampling",
    "conv1d": "an attention of Conv1d",
    "entry": "first layer of the first block",
    "inner": "inner layer",
}
ENDS = frozenset[Part]({"first", "last"})
TEMPORAL = frozenset[Part]({"time1", "time2", "temporal"})


@dataclass(frozen=True)
class Profile:
    """What a released code quantizes, and to how many bits.

    weights, inputs: the parts whose bits are not those of the run.
    qkv, softmax: of attention; `prompted_softmax` in models that read a prompt.
    conv1d_pixels: attention is Conv1d in its pixel-space models too, not only in latent ones.
    """

    weights: Widths = field(default_factory=dict)
    inputs: Widths = field(default_factory=dict)
    qkv: Width = RUN
    softmax: Width = RUN
    prompted_softmax: Width | None = None
    conv1d_pixels: bool = False


# Names with skip or op are left out of most releases, and so is Conv1d.
_LEFT_OUT: Widths = {"shortcuts": FLOAT, "downsampling": FLOAT, "conv1d": FLOAT}
# EfficientDM, and MPQ-DM, which is built on it: quant_scripts/quant_model.py of both.
_EFFICIENTDM: Widths = {"first": 8, "last": 8, "time1": 8, "time2": 8, **_LEFT_OUT}

# What each released code does. `full` is lowtide's own: all that is a matrix product, and the ends
# with weights of 8 bits (decision 0008).
PROFILES: dict[str, Profile] = {
    "full": Profile(
        weights={"first": 8, "last": 8},
        inputs={"first": FLOAT, "last": FLOAT},
    ),
    # ModelTC/TFMQ-DM, quant/quant_model.py: names with skip, op or shortcut are left out, and
    # disable_out_quantization leaves layers 0, 2 and -1 and the inputs of 1 and 3 in float. The
    # quantizers of attention are made and never switched on.
    "tfmq": Profile(
        weights={"first": FLOAT, "last": FLOAT, "time1": FLOAT, **_LEFT_OUT},
        inputs={
            "first": FLOAT,
            "last": FLOAT,
            "time1": FLOAT,
            "time2": FLOAT,
            "entry": FLOAT,
            **_LEFT_OUT,
        },
        qkv=FLOAT,
        softmax=FLOAT,
    ),
    # Xiuyu-Li/q-diffusion, qdiff/quant_model.py: every Conv2d, Conv1d and Linear at the bits of the
    # run, ends and shortcuts too. --sm_abit is 8 by default, and 16 for Stable Diffusion.
    "qdiffusion": Profile(softmax=8, prompted_softmax=16),
    # 42Shawn/PTQ4DM, QDrop/quant/quant_model.py: set_first_last_layer_to_8bit takes the first layer
    # of the temporal block for the first layer. Outputs are rounded there, so that what the network
    # reads stays in float. Its networks are those of improved-diffusion.
    "ptq4dm": Profile(
        weights={"time1": 8, "last": 8, "conv1d": FLOAT},
        inputs={"first": FLOAT, "time1": FLOAT, "last": 8, "conv1d": FLOAT},
        qkv=FLOAT,
        softmax=FLOAT,
        conv1d_pixels=True,
    ),
    # ziplab/PTQD, quant_scripts/brecq_quant_model.py: layers 0, 2 and -1 at 8 bits, and the input
    # of the last one in float (disable_network_output_quantization).
    "ptqd": Profile(
        weights={"first": 8, "last": 8, "time1": 8, **_LEFT_OUT},
        inputs={"first": 8, "last": FLOAT, "time1": 8, **_LEFT_OUT},
        qkv=FLOAT,
        softmax=FLOAT,
    ),
    # ThisisBillhe/EfficientDM: layers 0, 1, 2 and -1 at 8 bits, weights and inputs.
    "efficientdm": Profile(
        weights=_EFFICIENTDM,
        inputs=_EFFICIENTDM,
        qkv=FLOAT,
        softmax=FLOAT,
    ),
    # cantbebetter2/MPQ-DM: as EfficientDM.
    "mpq": Profile(
        weights=_EFFICIENTDM,
        inputs=_EFFICIENTDM,
        qkv=FLOAT,
        softmax=FLOAT,
    ),
}


def parts_of_layers(adapter: Adapter) -> dict[str, Part]:
    """The part of each layer, in forward order."""
    first, last = adapter.ends()
    temporal: list[str] = []
    for unit in adapter.temporal():
        temporal += unit.layers
    in_order: list[tuple[Part, Iterable[str]]] = [
        ("first", [first]),
        ("last", [last]),
        ("time1", temporal[:1]),
        ("time2", temporal[1:2]),
        ("temporal", temporal[2:]),
        ("shortcuts", adapter.shortcuts()),
        ("downsampling", adapter.downsamplers()),
        ("conv1d", adapter.attention_blocks()),
        ("entry", [unit.layers[0] for unit in adapter.blocks()[:1]]),
    ]
    found: dict[str, Part] = {}
    for part, names in in_order:
        for name in names:
            found.setdefault(name, part)
    return {name: found.get(name, "inner") for name in adapter.layers()}


@dataclass(frozen=True)
class Bits:
    """The bits of every part, for the settings and the role of one run's denoiser."""

    settings: Settings
    role: Role

    @property
    def profile(self) -> Profile:
        return PROFILES[self.settings.profile]

    def weight(self, part: Part) -> int:
        asked = self._asked(part, self.settings.ends, self.settings.temporal)
        return _bits(self._width(self.profile.weights, part), self.settings.weights, asked)

    def input(self, part: Part) -> int:
        asked = self._asked(part, self.settings.end_inputs, self.settings.temporal_inputs)
        return _bits(self._width(self.profile.inputs, part), self.settings.inputs, asked)

    @property
    def qkv(self) -> int:
        return _bits(self.profile.qkv, self.settings.inputs, None)

    @property
    def softmax(self) -> int:
        width = self.profile.softmax
        if self.role.prompted and self.profile.prompted_softmax is not None:
            width = self.profile.prompted_softmax
        return _bits(width, self.settings.inputs, self.settings.softmax)

    def _width(self, widths: Widths, part: Part) -> Width:
        is_linear = part == "conv1d" and not (self.role.latents or self.profile.conv1d_pixels)
        return RUN if is_linear else widths.get(part, RUN)

    def _asked(self, part: Part, ends: int | None, temporal: int | None) -> int | None:
        """What the settings ask for this part, if anything."""
        if part in ENDS:
            return ends
        return temporal if part in TEMPORAL else None


def _bits(width: Width, run: int, asked: int | None) -> int:
    """What is asked for, else the profile's bits; a run in float leaves all of the kind in it."""
    if asked is not None:
        return asked
    return run if width == RUN or run > 8 else width


def check_parts(adapter: Adapter, settings: Settings) -> None:
    """Raise where the model has none of the parts whose bits are set."""
    if settings.softmax is not None and not adapter.attentions():
        _refuse("softmax", "attention")
    for name in ("temporal", "temporal_inputs"):
        if getattr(settings, name) is not None and not adapter.temporal():
            _refuse(name, "temporal block")


def _refuse(option: str, part: str) -> None:
    raise BadInput(
        f"found {option} with a model that has no {part}",
        f"a model with one, or no {option}",
        f"leave {option} out",
    )
