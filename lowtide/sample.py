"""The trajectory: the pipeline's own sampler, listened to at the denoiser's door.

Calibration, sampling and evaluation all read this one loop. It runs the pipeline's own `__call__`, so that scheduler,
guidance and text encoders are exactly the user's; each image has a random generator of its own, so that image k depends on
seed k alone, whatever the batch.
"""

import json
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from lowtide import zoo
from lowtide.absorb import absorbing, check_eta, stepping
from lowtide.errors import BadInput
from lowtide.labelled import LabelledPipeline
from lowtide.models import ARCHITECTURES


@dataclass(frozen=True)
class Request:
    """Which images: one per seed. Prompts and labels are dealt to images by seed.

    `eta`: how much noise DDIM adds on the way, from 0 (none) to 1 (as much as DDPM); None is the pipeline's own, which is 0.
    """

    steps: int = 50
    seeds: tuple[int, ...] = (0,)
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    guidance: float | None = None
    batch: int = 16
    size: int | None = None
    eta: float | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise BadInput("found no seeds", "at least one", "give --seeds, such as --seeds 0-63")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"found {name} {getattr(self, name)}", "at least 1", f"give a larger --{name}")
        check_eta(self.eta)

    def batches(self) -> Iterator["Request"]:
        for start in range(0, len(self.seeds), self.batch):
            yield replace(self, seeds=self.seeds[start : start + self.batch])

    def dealt(self, things: tuple) -> list:
        return [things[seed % len(things)] for seed in self.seeds]


@dataclass(frozen=True)
class Moment:
    """One call of the denoiser: its place in the loop, the timestep of each sample, all arguments by name, and the answer."""

    index: int
    t: Tensor
    arguments: dict[str, Any]
    eps: Tensor


class ModulePipeline:
    """The smallest pipeline: any module called (sample, timestep), a scheduler, and the shape of one sample."""

    def __init__(self, unet: nn.Module, scheduler: Any, shape: tuple[int, ...]):
        self.unet, self.scheduler, self.shape = unet, scheduler, shape

    @torch.no_grad()
    def __call__(self, batch_size: int, generator: list[torch.Generator], num_inference_steps: int, output_type: str) -> Any:
        parameter = next(self.unet.parameters())
        x = torch.stack([torch.randn(self.shape, generator=each) for each in generator]).to(parameter)
        self.scheduler.set_timesteps(num_inference_steps)
        # Flow-matching schedulers start from plain noise and scale nothing, so they lack both names.
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(self.scheduler, "scale_model_input", lambda x, t: x)
        own = {"generator": generator} if takes_generator(self.scheduler) else {}
        for t in self.scheduler.timesteps:
            eps = self.unet(scaled(x, t), t)
            x = self.scheduler.step(eps if isinstance(eps, Tensor) else eps[0], t, x, **own).prev_sample
        return Images((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy())


@dataclass(frozen=True)
class Images:
    """What a pipeline answers with."""

    images: np.ndarray


def denoiser_name(pipe: Any) -> str:
    """Which component of the pipeline is called at every step."""
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise BadInput(f"found {type(pipe).__name__} without unet or transformer", "a diffusion pipeline", "load another model")


def denoiser(pipe: Any) -> nn.Module:
    return getattr(pipe, denoiser_name(pipe))


def unconditional(pipe: Any, request: Request) -> dict[str, Any]:
    if not isinstance(pipe, ModulePipeline) and next(denoiser(pipe).parameters()).dtype == torch.bfloat16:
        reason = f"found a {type(pipe).__name__} in bfloat16, of which diffusers makes no pictures"
        raise BadInput(reason, "float16 or float32", "convert it")
    return {"batch_size": len(request.seeds)}


def label_guided(pipe: Any, request: Request) -> dict[str, Any]:
    if not request.labels:
        raise BadInput(
            "found a class-conditional model and no labels", "the classes to draw", "give --labels, such as --labels 0-9"
        )
    guidance = {} if request.guidance is None else {"guidance_scale": request.guidance}
    return {"class_labels": request.dealt(request.labels)} | guidance


def prompted(pipe: Any, request: Request) -> dict[str, Any]:
    guidance = {} if request.guidance is None else {"guidance_scale": request.guidance}
    size = {} if request.size is None else {"height": request.size, "width": request.size}
    return {"prompt": request.dealt(request.prompts or read_prompts(None))} | guidance | size


def binned(pipe: Any, request: Request) -> dict[str, Any]:
    """PixArt moves sizes to its own list of them; a size that was asked for stays."""
    return prompted(pipe, request) | ({} if request.size is None else {"use_resolution_binning": False})


WORDS = ("prompts", "guidance", "size")
HEEDED = {unconditional: (), label_guided: ("labels", "guidance"), prompted: WORDS, binned: WORDS}

DRIVERS: dict[str, Callable[[Any, Request], dict[str, Any]]] = {
    "DDPMPipeline": unconditional,
    "DDIMPipeline": unconditional,
    "LDMPipeline": unconditional,
    "ModulePipeline": unconditional,
    "DiTPipeline": label_guided,
    "LabelledPipeline": label_guided,
    "StableDiffusionPipeline": prompted,
    "StableDiffusionXLPipeline": prompted,
    "PixArtAlphaPipeline": binned,
    "PixArtSigmaPipeline": binned,
    "StableDiffusion3Pipeline": prompted,
    "FluxPipeline": prompted,
}


def read_prompts(path: str | Path | None) -> tuple[str, ...]:
    """One prompt a line; without a file, the built-in list."""
    path = Path(path) if path else Path(__file__).with_name("prompts.txt")
    if not path.exists():
        raise BadInput(f"found no file {path}", "a text file with one prompt a line", "check the path")
    lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not lines:
        raise BadInput(f"found no prompt in {path}", "one prompt a line", "write some, or leave --prompts away")
    return lines


def call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """What the pipeline is called with for one batch."""
    driver = DRIVERS.get(type(pipe).__name__)
    if driver is None:
        raise BadInput(f"found {type(pipe).__name__}", f"one of {', '.join(DRIVERS)}", "write a driver in lowtide/sample.py")
    check_heeded(pipe, request)
    check_model_labels(pipe, request)
    check_steps(pipe.scheduler, request.steps)
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    steps = {"num_inference_steps": request.steps, "generator": generators, "output_type": "np"}
    return steps | driver(pipe, request) | noise_asked(pipe, request)


def noise_asked(pipe: Any, request: Request) -> dict[str, float]:
    """eta, of a pipeline that takes it and a scheduler that heeds it: Stable Diffusion would drop it for any but DDIM's."""
    if request.eta is None:
        return {}
    if not all("eta" in signature(each).parameters for each in (pipe.__call__, pipe.scheduler.step)):
        raise BadInput(
            f"found eta {request.eta:g} for a {type(pipe).__name__} with a {type(pipe.scheduler).__name__}",
            "a pipeline and a scheduler that take it, such as DDIM's",
            "leave --eta away, or change the pipeline's scheduler",
        )
    return {"eta": request.eta}


def heeded(pipe: Any) -> tuple[str, ...]:
    """What of a request this pipeline hears of."""
    return HEEDED[DRIVERS[type(pipe).__name__]]


def check_heeded(pipe: Any, request: Request) -> None:
    """Nothing may be asked for that this pipeline would not hear of."""
    kind = type(pipe).__name__
    for name in ("prompts", "labels", "guidance", "size"):
        if name not in heeded(pipe) and getattr(request, name) not in (None, ()):
            takes = f"a pipeline that takes it; {kind} takes {' and '.join(heeded(pipe)) or 'nothing of the kind'}"
            raise BadInput(f"found {name} for a {kind}", takes, f"leave --{name} away")


def check_model_labels(pipe: Any, request: Request) -> None:
    """Labels must be classes that the model has; a UNet that needs them needs a pipeline that gives them."""
    config = getattr(denoiser(pipe), "config", {})
    classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    if classes and (wrong := [label for label in request.labels if not 0 <= label < classes]):
        raise BadInput(f"found label {wrong[0]}", f"0 to {classes - 1}", "choose labels the model was trained on")
    if config.get("num_class_embeds") and DRIVERS[type(pipe).__name__] is not label_guided:
        found = f"found a class-conditional model in a {type(pipe).__name__}, which gives it no labels"
        raise BadInput(found, "a pipeline that passes labels", "wrap it in a pipeline with class_labels")


def check_steps(scheduler: Any, steps: int) -> None:
    """No more steps than the model was trained on; PNDM's first steps, where it takes them, want four."""
    config = getattr(scheduler, "config", {})
    most = config.get("num_train_timesteps", steps)
    if steps > most:
        raise BadInput(f"found {steps} steps", f"at most {most}, those of the model's training", "give fewer --steps")
    if steps < 4 and config.get("skip_prk_steps") is False:
        name = type(scheduler).__name__
        raise BadInput(f"found {steps} steps for {name}", "at least 4", "give more --steps, or set its skip_prk_steps")


def takes_generator(scheduler: Any) -> bool:
    return "generator" in signature(scheduler.step).parameters


@contextmanager
def own_noise(scheduler: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """LDM, DiT, SD3 and Flux give a scheduler that adds noise no generator: here each image gets its own."""
    step = scheduler.step

    @wraps(step)
    def seeded(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        # DiT steps both halves of a guided batch and keeps the first.
        options.setdefault("generator", generators * (len(sample) // len(generators)))
        return step(model_output, timestep, sample, *args, **options)

    if not takes_generator(scheduler):
        yield
        return
    with stepping(scheduler, seeded):
        yield


def run_pipeline(pipe: Any, request: Request) -> np.ndarray:
    """One batch of images, in [0, 1], channels last."""
    arguments = call_arguments(pipe, request)
    quiet = getattr(pipe, "set_progress_bar_config", None)
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    if quiet:
        quiet(disable=True)
    try:
        with torch.no_grad(), absorbing(pipe.scheduler, denoiser(pipe)), own_noise(pipe.scheduler, arguments["generator"]):
            images = pipe(**arguments).images
    finally:
        if quiet:
            pipe._progress_bar_config = before
    return np.asarray(images, dtype=np.float32)


def images(pipe: Any, request: Request, track: Callable = lambda batches, total: batches) -> np.ndarray:
    """All images, N x height x width x channels.

    An image alone and in a batch agree to about 1e-6 (relative L2), not bit for bit: a matrix product of another size sums
    in another order.
    """
    if getattr(pipe, "safety_checker", None) is not None:
        warnings.warn("this pipeline's safety checker may answer with black images, which spoils comparisons", stacklevel=2)
    batches = list(request.batches())
    return np.concatenate([run_pipeline(pipe, batch) for batch in track(batches, len(batches))])


def trajectory(pipe: Any, request: Request, *, keep: Collection[int] | None = None) -> Iterator[Moment]:
    """Every call of the denoiser (or those whose index is in `keep`), batch by batch; in memory is one batch's moments."""
    for batch in request.batches():
        heard: list[Moment] = []
        with listening(denoiser(pipe), heard, keep):
            run_pipeline(pipe, batch)
        yield from heard


@contextmanager
def listening(model: nn.Module, heard: list[Moment], keep: Collection[int] | None) -> Iterator[None]:
    """Write down what goes in and out of the denoiser."""
    names, indices = tuple(signature(model.forward).parameters), count()

    def listen(module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        index = next(indices)
        if keep is None or index in keep:
            heard.append(moment(index, dict(zip(names, args, strict=False)) | kwargs, result))

    hook = model.register_forward_hook(listen, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def timesteps(pipe: Any, request: Request) -> list[float]:
    """The value the denoiser sees at each call, in order: heard from one image, because solvers call as often as they like."""
    return [float(heard.t[0]) for heard in trajectory(pipe, replace(request, seeds=request.seeds[:1]))]


def moment(index: int, arguments: dict[str, Any], result: Any) -> Moment:
    """What was heard, off the device; the timestep spelled out for each sample."""
    kept = {name: kept_value(value) for name, value in arguments.items() if value is not None}
    samples = len(next(iter(kept.values())))
    kept["timestep"] = torch.as_tensor(kept["timestep"]).reshape(-1).expand(samples).clone()
    eps = result if isinstance(result, Tensor) else result[0]
    return Moment(index, kept["timestep"], kept, kept_value(eps))


def kept_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: kept_value(part) for name, part in value.items()}
    return value


def example(pipe: Any) -> dict[str, Tensor] | None:
    """One call's inputs, for a denoiser that no architecture describes."""
    if not isinstance(pipe, ModulePipeline):
        return None
    return {"sample": torch.zeros(2, *pipe.shape), "timestep": torch.zeros(2)}


def as_pipeline(model: nn.Module, scheduler: Any = None, shape: tuple[int, ...] | None = None) -> Any:
    """A pipeline around a bare denoiser."""
    if isinstance(model, UNet2DModel):
        kind = LabelledPipeline if model.config.num_class_embeds else DDIMPipeline
        return kind(model, scheduler or DDIMScheduler())
    if type(model) in ARCHITECTURES or scheduler is None or shape is None:
        raise BadInput(
            f"found a bare {type(model).__name__}", "the pipeline it belongs to", "pass the pipeline (or scheduler and shape)"
        )
    return ModulePipeline(model, scheduler, shape)


def load_pipeline(source: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline from zoo:NAME, a local diffusers folder, or a hub id."""
    name, folder = str(source), local_folder(source)
    if folder and not (folder / "model_index.json").exists():
        return bare_model(folder, dtype)
    if not folder and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise BadInput(f"found no folder {name}", "a hub id, a local diffusers folder, or zoo:NAME", "check the path")
    own = folder and class_name(folder / "model_index.json") == LabelledPipeline.__name__
    return loaded(LabelledPipeline if own else DiffusionPipeline, folder or name, dtype)


def local_folder(source: str | Path) -> Path | None:
    """Where the source lies on this machine, if it does."""
    name = str(source)
    folder = zoo.folder(name.removeprefix("zoo:")) if name.startswith("zoo:") else Path(name)
    return folder if folder.is_dir() else None


def bare_model(folder: Path, dtype: torch.dtype) -> Any:
    """A folder that holds one model and no pipeline."""
    kind = class_name(folder / "config.json")
    if kind is None:
        raise BadInput(f"found no model in {folder.name}", "model_index.json or config.json of diffusers", "check the path")
    if kind != UNet2DModel.__name__:
        raise BadInput(f"found a bare {kind}", "a pipeline folder with model_index.json", "save the whole pipeline")
    return as_pipeline(loaded(UNet2DModel, folder, dtype))


def class_name(config: Path) -> str | None:
    """The class that a config.json or a model_index.json names, if it is one of diffusers' kind."""
    try:
        fields = json.loads(config.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return fields.get("_class_name") if isinstance(fields, dict) else None


def loaded(kind: Any, source: Path | str, dtype: torch.dtype) -> Any:
    """from_pretrained, with what goes wrong said in one sentence."""
    try:
        return kind.from_pretrained(source, dtype=dtype)
    except BadInput:
        raise
    except Exception as error:
        if isinstance(error.__cause__, BadInput):
            raise error.__cause__ from error
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"found {source} unreadable ({reason})", "a complete diffusers model", "copy or download it again"
        ) from error
