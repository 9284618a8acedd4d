"""Every option of lowtide, spelled once: of a quantization, of a request, of an evaluation.

The annotations say type, bounds, help text and help panel. Python, the command line, recipe files
and the JSON beside a checkpoint all read them from here.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta

from lowtide.errors import BadInput
from lowtide.machine.device_names import AUTO, EXAMPLE, KINDS
from lowtide.validation import Count, Share, as_tuple, check

MethodName = Literal[
    "best", "minmax", "ptq4dm", "qdiffusion", "ptqd", "tfmq", "temporal_cache", "tcaq",
    "efficientdm", "mpq",
]  # fmt: skip
ProfileName = Literal["full", "paper", "tfmq", "qdiffusion", "ptq4dm", "ptqd", "efficientdm", "mpq"]
SchedulerName = Literal[
    "ddim", "ddpm", "pndm", "dpmsolver++", "unipc", "euler", "euler_a", "heun", "lms", "deis", "lcm"
]
SpacingName = Literal["leading", "trailing", "linspace", "quadratic"]
GATES = ("min-psnr", "max-lpips", "max-fd-increase")
# The metrics of an evaluation by name: without a data set, and with one.
METRIC_NAMES = ("psnr", "ssim", "lpips", "latent_mse", "clip", "is")
DATASET_METRIC_NAMES = ("fd", "sfd", "kd", "precision", "recall", "fid", "sfid", "kid")
LARGEST_BATCH = 16


def _help(text: str, panel: str, ge: int | None = None, le: int | None = None) -> Meta:
    """Help text and panel of an option, and its bounds."""
    return Meta(description=text, extra={"panel": panel}, ge=ge, le=le)


MACHINE = "Machine"
BITS = "Bits"
CALIBRATION = "Calibration"
LEARNING = "Learning"
IMAGES = "Images"
MEASURES = "Measures and gates"

Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Label = Annotated[int, Meta(ge=0)]
Bits = Annotated[
    Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32],
    Meta(title="1 to 8, or 16 or 32 to leave them in float"),
]
# What a request for images and a calibration have in common.
Steps = Annotated[int, _help("Sampling steps.", CALIBRATION, ge=1)]
Prompts = Annotated[
    Sequence[str], _help("Prompts to draw; without any, a built-in list.", CALIBRATION)
]
Labels = Annotated[Sequence[Label], _help("Classes to draw, such as 0-9 or 1,5.", CALIBRATION)]
Guidance = Annotated[
    float | None, _help("Guidance scale; the pipeline's own if not given.", CALIBRATION)
]
Eta = Annotated[
    Share | None,
    _help("Noise that DDIM adds, 0 to 1; the pipeline's own, 0, if not given.", CALIBRATION),
]
SamplerChoice = Annotated[
    SchedulerName | None, _help("Sampler; the pipeline's own if not given.", CALIBRATION)
]
Spacing = Annotated[
    SpacingName | None,
    _help(
        "How the timesteps are spread; the sampler's own if not given. quadratic: DDIM's, close "
        "together near the image.",
        CALIBRATION,
    ),
]
Size = Annotated[
    Count | None,
    _help("Height and width of the images; the pipeline's own if not given.", CALIBRATION),
]
Pictures = Annotated[
    str | None,
    _help("A folder of pictures, for pipelines that start from one.", CALIBRATION),
]
# Arguments of a pipeline's call by name.
CallValues = Mapping[str, object]
Call = Annotated[
    CallValues,
    _help(
        "More arguments of the pipeline's call, such as a negative prompt. A path of a picture "
        "stands for the picture.",
        CALIBRATION,
    ),
]
Device = Annotated[
    str,
    _help(
        "Where models that are named by path compute: auto (the accelerator there is), "
        f"{', '.join(KINDS)}, or a number such as {EXAMPLE}.",
        MACHINE,
    ),
]

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    _help("Type of the float weights of a model that is named by path; auto: float32.", MACHINE),
]
Place = Annotated[
    Literal["auto", "whole", "blocks"],
    _help(
        "What is on an accelerator: the whole denoiser, or the block at work. auto: what fits.",
        MACHINE,
    ),
]

# Options of single stages: values by the name of a stage and the name of its field.
StageOptions = Mapping[str, Mapping[str, object]]
# Keywords of `quantize` and `plan`: the fields of Settings and `without`; each checks what it gets.
Options = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What to quantize to, and how much to spend on it; `lowtide quantize --help` explains each.

    `stages` sets options of single stages by name, such as {"omq": {"plus": True}}.
    """

    weights: Annotated[Bits, _help("Bits per weight: 1 to 8, 16 or 32 for float.", BITS)] = 4
    inputs: Annotated[Bits, _help("Bits per input: 1 to 8, 16 or 32 for float.", BITS)] = 8
    group: Annotated[
        Count | None,
        _help("Number of weights that share a scale factor, such as 64.", BITS),
    ] = None
    profile: Annotated[
        ProfileName,
        _help(
            "full: every layer; paper: what the released code of the method's paper quantizes; "
            "or that of another paper by name.",
            BITS,
        ),
    ] = "full"
    ends: Annotated[
        Bits | None,
        _help("Bits per weight of the first and the last layer; the profile's if not given.", BITS),
    ] = None
    end_inputs: Annotated[
        Bits | None,
        _help("Bits per input of the first and the last layer; the profile's if not given.", BITS),
    ] = None
    keep_float: Annotated[
        Sequence[str],
        _help("Layers and modules to leave in float, by name: conv_out,mid_block.*", BITS),
    ] = ()
    softmax: Annotated[
        Bits | None,
        _help("Bits of the softmax of attention; the profile's if not given.", BITS),
    ] = None
    temporal: Annotated[
        Bits | None,
        _help("Bits per weight of the temporal block; the profile's if not given.", BITS),
    ] = None
    temporal_inputs: Annotated[
        Bits | None,
        _help("Bits per input of the temporal block; the profile's if not given.", BITS),
    ] = None
    steps: Steps = 50
    images: Annotated[int, _help("Calibration images.", CALIBRATION, ge=1, le=1_000_000)] = 32
    calibration_steps: Annotated[
        int, _help("Timesteps whose inputs serve reconstruction, evenly spread.", CALIBRATION, ge=1)
    ] = 25
    prompts: Prompts = ()
    labels: Labels = ()
    guidance: Guidance = None
    eta: Eta = None
    scheduler: SamplerChoice = None
    spacing: Spacing = None
    size: Size = None
    pictures: Pictures = None
    call: Call = field(default_factory=dict)
    seed: Annotated[
        int,
        _help("Seed of all random draws in calibration and learning.", CALIBRATION, ge=0, le=2**32),
    ] = 0
    memory: Annotated[
        int,
        _help(
            "Bytes of calibration data to hold in memory; the rest goes to disk.", CALIBRATION, ge=0
        ),
    ] = 128 << 20
    iters: Annotated[
        int, _help("Rounding iterations per block; the papers use 20000.", LEARNING, ge=1)
    ] = 1000
    batch: Annotated[
        int, _help("Samples of one learning iteration.", LEARNING, ge=1, le=1_000_000)
    ] = 16
    scope: Annotated[
        Literal["block", "layer"],
        _help("What is rounded together: block (BRECQ) or layer (AdaRound).", LEARNING),
    ] = "block"
    drop: Annotated[
        Share | None,
        _help("Chance that an input is not rounded while a block learns, 0.5 for QDrop.", LEARNING),
    ] = None
    range_iters: Annotated[
        int,
        _help(
            "Iterations that learn the input ranges of each block; 0: the method's own.",
            LEARNING,
            ge=0,
        ),
    ] = 0
    early_stop: Annotated[
        bool, _help("Stop a block when its loss is flat and its roundings are decided.", LEARNING)
    ] = False
    only_schedule: Annotated[
        bool,
        _help("A smaller file that samples with this schedule only, without reschedule.", LEARNING),
    ] = False
    device: Device = AUTO
    dtype: Dtype = AUTO
    place: Place = AUTO
    stages: Annotated[StageOptions, _help("Options of single stages, by name.", LEARNING)] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        _hold_tuples(self)
        check(Settings, vars(self))
        if self.drop is not None and self.scope == "layer":
            raise BadInput(
                "found drop with scope layer",
                "blocks, which QDrop is about",
                "leave one of them out",
            )

    @property
    def calibration_batch(self) -> int:
        """Images of one calibration batch: as many as divide all images evenly, at most 16.

        Batches have one size, because graphs are recorded for one.
        """
        return max(size for size in range(1, LARGEST_BATCH + 1) if self.images % size == 0)


def settings_from(options: Mapping[str, object]) -> Settings:
    """Settings from keywords, with an error that names what exists."""
    names = [known.name for known in fields(Settings)]
    if unknown := sorted(set(options) - set(names)):
        raise BadInput(
            f"found setting {unknown[0]!r}", f"one of {', '.join(names)}", "check the spelling"
        )
    return replace(Settings(), **options)


def _hold_tuples(settings: "Settings | Request | EvaluationSettings") -> None:
    """Hold lists and ranges as tuples, so that equal settings are equal and stay so."""
    for name, value in list(vars(settings).items()):
        object.__setattr__(settings, name, as_tuple(value))


T = TypeVar("T")
Seeds = Annotated[Sequence[Seed], _help("One image per seed, such as 0-63.", IMAGES)]
Batch = Annotated[int, _help("Images drawn at once.", IMAGES, ge=1, le=1_000_000)]


@dataclass(frozen=True)
class Request:
    """Which images to draw: one per seed. Prompts and labels are assigned to images by seed."""

    steps: Steps = 50
    seeds: Seeds = (0,)
    prompts: Prompts = ()
    labels: Labels = ()
    guidance: Guidance = None
    batch: Batch = 16
    size: Size = None
    eta: Eta = None
    scheduler: SamplerChoice = None
    spacing: Spacing = None
    pictures: Pictures = None
    call: Call = field(default_factory=dict)

    def __post_init__(self) -> None:
        _hold_tuples(self)
        check(Request, vars(self))
        check_seeds(self.seeds)

    def batches(self) -> Iterator["Request"]:
        """The same request in parts of `batch` images."""
        for start in range(0, len(self.seeds), self.batch):
            yield replace(self, seeds=self.seeds[start : start + self.batch])

    def by_seed(self, items: Sequence[T]) -> list[T]:
        """The prompt or the label of each seed."""
        return [items[seed % len(items)] for seed in self.seeds]


def check_seeds(seeds: Sequence[int]) -> None:
    """At least one seed, and none twice."""
    if not seeds:
        raise BadInput("found no seeds", "at least one", "give --seeds, such as --seeds 0-63")
    repeated = [seed for seed, count in Counter(seeds).items() if count > 1]
    if repeated:
        raise BadInput(f"found seed {repeated[0]} twice", "each seed once", "give each seed once")


def _optional(text: str) -> Meta:
    """Help of an option whose default is the calibration's own value."""
    return _help(f"{text}; as in the calibration if not given.", IMAGES)


def _gate(text: str) -> Meta:
    return _help(f"Gate: {text}.", MEASURES)


@dataclass(frozen=True)
class EvaluationSettings:
    """How models are compared, for `evaluate`, `compare` and the command line.

    None or empty means: seeds 0 to 63, and else as the model was quantized.
    """

    seeds: Annotated[Sequence[Seed] | None, _help("One image per seed, such as 0-63.", IMAGES)] = (
        None
    )
    steps: Annotated[Count | None, _optional("Sampling steps")] = None
    batch: Annotated[Count | None, _help("Images drawn at once; 16 if not given.", IMAGES)] = None
    prompts: Annotated[Sequence[str] | None, _optional("Prompts to draw")] = None
    labels: Annotated[Sequence[Label] | None, _optional("Classes to draw, such as 0-9")] = None
    guidance: Annotated[float | None, _optional("Guidance scale")] = None
    eta: Annotated[Share | None, _optional("Noise that DDIM adds, 0 to 1")] = None
    scheduler: Annotated[SchedulerName | None, _optional("Sampler")] = None
    spacing: Annotated[SpacingName | None, _optional("How the timesteps are spread")] = None
    size: Annotated[Count | None, _optional("Height and width of the images")] = None
    pictures: Annotated[str | None, _optional("A folder of pictures to start from")] = None
    call: Annotated[
        CallValues | None,
        _optional("More arguments of the pipeline's call, with paths of pictures"),
    ] = None
    metrics: Annotated[
        Sequence[str] | None,
        _help(
            f"Some of {','.join(METRIC_NAMES)}; with --dataset also "
            f"{','.join(DATASET_METRIC_NAMES)}.",
            MEASURES,
        ),
    ] = None
    dataset: Annotated[
        str | None,
        _help("What good images look like: a folder of them, or statistics in an .npz.", MEASURES),
    ] = None
    min_psnr: Annotated[float | None, _gate("the least PSNR to the reference, in dB")] = None
    max_lpips: Annotated[float | None, _gate("the largest LPIPS to the reference")] = None
    max_fd_increase: Annotated[
        float | None, _gate("how much farther from --dataset than the reference")
    ] = None
    device: Device = AUTO

    def __post_init__(self) -> None:
        _hold_tuples(self)
        check(EvaluationSettings, vars(self))
        if self.seeds is not None:
            check_seeds(self.seeds)

    @property
    def limits(self) -> dict[str, float]:
        """The limits of the gates that are set, by the gates' names."""
        limits = {name: getattr(self, field_of_gate(name)) for name in GATES}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @property
    def request_fields(self) -> dict[str, object]:
        """The fields of Request that are set."""
        values = {each.name: getattr(self, each.name) for each in fields(Request)}
        return {name: value for name, value in values.items() if value not in (None, (), {})}


def field_of_gate(gate: str) -> str:
    """The field that holds a gate's limit."""
    return gate.replace("-", "_")
