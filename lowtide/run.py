"""One run, from a model to a packed checkpoint: adapt, collect, assign, reconstruct, pack, save; then load and sample."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide import checkpoint, diffusers_hook, estimate, memory, record, sample
from lowtide.errors import BadInput
from lowtide.methods import METHODS, PAPERS, recipe_of
from lowtide.models import Adapter, Unit, adapt
from lowtide.nn.clock import CLOCK
from lowtide.nn.split import split_modules
from lowtide.nn.swap import packed_layers
from lowtide.plan import LayerPlan, Plan, settings_from, summarised
from lowtide.report import grids
from lowtide.stages.base import Job, recipe_digest, run_recipe


@dataclass
class Quantized:
    """A pipeline with a packed denoiser, and what is known of how it got there."""

    pipe: Any
    plan: Plan
    report: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        return sample.denoiser(self.pipe)

    def save(self, folder: str | Path) -> Path:
        """Write an ordinary diffusers folder, whole or not at all."""
        if isinstance(self.pipe, sample.ModulePipeline):
            raise BadInput(
                f"found a {type(self.model).__name__}, which diffusers cannot load",
                "a diffusers model",
                "keep `.model`, or make it a ModelMixin with a config and quantize that",
            )
        with checkpoint.written_beside(Path(folder)) as fresh:
            self.pipe.save_pretrained(fresh)
        return Path(folder)


def quantize(
    target: Any, *, method: str = "best", folder: str | Path | None = None, without: Sequence[str] = (), **options: Any
) -> Quantized:
    """Quantize a diffusers pipeline (or a bare UNet2DModel) in place and hand it back packed; a name is loaded first.

    `options` are the fields of lowtide.plan.Settings: weights, inputs, steps, prompts, labels, iters, ... With `folder`,
    finished units are kept there and an interrupted run goes on where it stopped, to the same bits. `without` leaves stages
    of the method's recipe out, by name, to see what each is worth; the option `stages` changes some, {"omq": {"plus": True}}.
    """
    settings = settings_from(options)
    recipe = recipe_of(method, settings, without)
    target = sample.load_pipeline(target) if isinstance(target, str | Path) else target
    pipe = sample.as_pipeline(target) if isinstance(target, nn.Module) else target
    model = sample.denoiser(pipe)
    check_model(model)
    model.requires_grad_(False)
    mark = fingerprint(model)
    digest = recipe_digest(recipe, settings, mark)
    job = Job(pipe, model.eval(), adapt(model, sample.example(pipe)), settings, method, Path(folder) / digest if folder else None)
    job.report |= {"fingerprint": mark, "options": settings.stages}
    run_recipe(recipe, job)
    return finish(job)


def finish(job: Job) -> Quantized:
    """The plan's summary, the hook into diffusers, and the report."""
    plan = summarised(job.plan, job.settings)
    if hasattr(job.model, "register_to_config"):
        diffusers_hook.attach(job.model, plan)
    job.report["account"] = checkpoint.account(job.model)
    job.report["float"] = plan.left
    job.report["kernels"] = dict(Counter(kernels(job.model).values()))
    job.report["float_share"] = float_share(job)
    return Quantized(job.pipe, plan, job.report)


def kernels(model: nn.Module) -> dict[str, str]:
    """What runs each packed layer."""
    return {name: "plain torch (reference, no faster twin is registered)" for name, _ in packed_layers(model)}


def float_share(job: Job) -> float:
    """The share of the model's parameters that stays in float, biases aside."""
    coded = [math.prod(job.adapter.all_layers[name].weight.shape) for name, layer in job.plan.layers.items() if layer.weight]
    biases = [module.bias.numel() for module in job.adapter.all_layers.values() if module.bias is not None]
    gone = sum(job.adapter.all_layers[name].weight.numel() for name in gone_layers(job.plan))
    whole = sum(parameter.numel() for parameter in job.adapter.meta.parameters()) - sum(biases) - gone
    return 1 - sum(coded) / whole


def gone_layers(plan: Plan) -> list[str]:
    """Temporal layers that a cache took the place of."""
    return [*(name for name, cache in plan.cached.items() if not cache.computed and not cache.kept), *plan.blank]


def check_model(model: nn.Module) -> None:
    """A model that can be quantized: finite weights, and not quantized yet."""
    if getattr(model, "is_quantized", False) or any(packed_layers(model)):
        raise BadInput("found a model that is quantized already", "a float model", "load the original")
    if hasattr(model, CLOCK):
        raise BadInput("found a model that a quantization which failed left half-way", "a float model", "load the original again")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise BadInput(f"found NaN or infinity in {name}", "finite weights", "repair or download the model again")


def quantize_to_folder(source: str, out: str | Path, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load, quantize, save; an interrupted run goes on from the folder beside `out`."""
    out = Path(out)
    checkpoint.check_place(out)
    settings = settings_from({name: value for name, value in options.items() if name != "without"})
    predicted, started = estimate.predict(source, method=method, **options), time.perf_counter()
    with memory.Peak() as peak:
        pipe = sample.load_pipeline(source)
        before = parameter_bytes(sample.denoiser(pipe))
        result = quantize(pipe, method=method, folder=out.with_name(f"{out.name}.run"), **options)
        result.save(out)
    size = {"float_bytes": before, "bytes": result.report["account"]["total"], "on_disk": on_disk(out)}
    size |= {"peak_bytes": peak.above, "predicted": estimate.totals(predicted)}
    whole = {"model": source, "method": method, "folder": str(out), "minutes": round((time.perf_counter() - started) / 60, 2)}
    found = whole | size | result.plan.summary | result.report
    written = (asdict(settings), tuple(options.get("without", ())), found)
    record.Record(record.command(), lasting(source), found["fingerprint"], method, *written).write(out)
    return found


def lasting(source: str) -> str:
    """The source as it can be found again from another folder."""
    home = None if source.startswith("zoo:") else sample.local_folder(source)
    return str(home.resolve()) if home else source


def parameter_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def on_disk(folder: Path) -> int:
    """Bytes of the denoiser's weight files."""
    homes = [home for name in ("unet", "transformer") if (home := folder / name).is_dir()] or [folder]
    return sum(path.stat().st_size for path in homes[0].glob("*.safetensors"))


def sample_to_folder(source: str, out: str | Path, request: sample.Request, track: Callable) -> dict[str, Any]:
    """One PNG per seed and a grid of them all."""
    pipe, out = sample.load_pipeline(source), Path(out)
    check_steps(sample.denoiser(pipe), request.steps)
    with checkpoint.written_beside(out, ("grid.png",)) as fresh:
        started = time.perf_counter()
        drawn = sample.images(pipe, request, track)
        seconds = time.perf_counter() - started
        grids.write_images(fresh, drawn, request.seeds)
    return {"folder": str(out), "images": len(drawn), "seconds_per_step": round(seconds / request.steps, 4)}


def check_steps(model: nn.Module, steps: int) -> None:
    """A packed model samples with the steps it knows."""
    if (asked := known_steps(model)) and steps != asked:
        way_out = f"use --steps {asked}, make one for {steps} with `lowtide reschedule`, or quantize again"
        raise BadInput(f"found {steps} steps", f"the {asked} it was calibrated for", way_out)


def known_steps(model: nn.Module) -> int | None:
    """How many steps a packed model was calibrated for, if anything in it depends on the step."""
    plan = packed_plan(model)
    return plan.summary["steps"] if plan.keyed else None


def packed_plan(model: nn.Module) -> Plan:
    """The plan of a packed model; an empty one for a float model, or one that others quantized."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer.plan if isinstance(quantizer, diffusers_hook.LowtideQuantizer) else Plan()


def inspect(source: str) -> dict[str, Any]:
    """Units, layers, bits and bytes of a model, float or packed."""
    pipe = sample.load_pipeline(source)
    model = sample.denoiser(pipe)
    folder, plan = sample.local_folder(source), packed_plan(model)
    adapter = float_adapter(model, plan)
    return {
        "model": source,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in adapter.meta.parameters()),
        "units": [describe_unit(adapter, unit) for unit in adapter.units()],
        "layers": [describe_layer(adapter, name, plan) for name in adapter.layers()],
        "float": plan.left,
        "timesteps": list(plan.timesteps),
        "account": checkpoint.account(model)
        | {"ideal": ideal_bytes(adapter, plan)}
        | ({"on_disk": on_disk(folder)} if folder else {}),
    }


def float_adapter(model: nn.Module, plan: Plan) -> Adapter:
    """The architecture of a float or packed model, from the float model's shapes alone."""
    with torch.device("meta"):
        floating = type(model).from_config(model.config)
        split_modules(floating, plan.splits)
        return adapt(floating)


def describe_unit(adapter: Adapter, unit: Unit) -> dict[str, Any]:
    weights = sum(adapter.all_layers[name].weight.numel() for name in unit.layers)
    return {"name": unit.name, "kind": unit.kind, "layers": len(unit.layers), "reads": list(unit.reads), "weights": weights}


def describe_layer(adapter: Adapter, name: str, plan: Plan) -> dict[str, Any]:
    weight, layer = adapter.all_layers[name].weight, plan.layers.get(name, LayerPlan(None, None))
    bits, inputs = (form.bits if form else 32 for form in (layer.weight, layer.input))
    return {"name": name, "shape": list(weight.shape), "weights": bits, "inputs": inputs, "per_step": layer.per_step}


def ideal_bytes(adapter: Adapter, plan: Plan) -> int:
    """Bits times weights, with no table and no padding, and four bytes for every other parameter."""
    layers = {name: adapter.all_layers[name].weight.numel() for name in adapter.layers()}
    rest = sum(parameter.numel() for parameter in adapter.meta.parameters()) - sum(layers.values())
    layers = {name: count for name, count in layers.items() if name not in gone_layers(plan)}
    forms = {name: plan.layers[name].weight for name in layers if name in plan.layers}
    bits = {name: average_bits(forms.get(name)) for name in layers}
    return round(sum(count * bits[name] / 8 for name, count in layers.items())) + 4 * rest


def average_bits(form: Any) -> float:
    if form is None:
        return 32
    return sum(form.bits) / len(form.bits) if isinstance(form.bits, tuple) else form.bits


def methods() -> list[dict[str, str]]:
    """Every method and what it is."""
    return [{"name": name, "what": PAPERS[name]} for name in METHODS]


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {checkpoint.tensor_hash(tensor)}".encode())
    return digest.hexdigest()


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a saved folder."""
    return sample.load_pipeline(folder, dtype)
