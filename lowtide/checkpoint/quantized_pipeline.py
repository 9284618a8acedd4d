"""Quantized: a pipeline with a packed denoiser, and how it is saved."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import HfApi
from torch import nn

from lowtide import sampling
from lowtide.checkpoint import adapters, bare_modules, facts, folders, model_card, provenance, seal
from lowtide.distributed.world import join
from lowtide.errors import BadInput
from lowtide.nn.plan import Plan
from lowtide.report.wording import counted, size
from lowtide.sampling.pipelines import Pipeline


@dataclass(repr=False)
class Quantized:
    """A pipeline with a packed denoiser, its plan, and the report of the run that made it."""

    pipe: Pipeline
    plan: Plan
    report: dict[str, Any]

    def __repr__(self) -> str:
        """Quantized(DDIMPipeline, tfmq W4A8, 64 layers, 0.612 MB)"""
        facts = [type(self.pipe).__name__]
        if bits := self.plan.summary:
            facts.append(f"{self.plan.method} W{bits['weights']}A{bits['inputs']}")
        facts.append(counted(len(self.plan.layers), "layer"))
        if account := self.report.get("account"):
            facts.append(size(account["total"]))
        return f"Quantized({', '.join(facts)})"

    @property
    def model(self) -> nn.Module:
        return sampling.denoiser(self.pipe)

    def save(self, folder: str | Path) -> Path:
        """Write an ordinary diffusers folder, whole or not at all.

        An older model in its place is replaced if lowtide wrote it and it holds no other files.
        Of the processes of torchrun, which all call this, the first one writes.
        """
        self._check_saveable()
        with join().inside(folders.written_beside(Path(folder))) as fresh:
            if fresh is not None:
                self.write(fresh)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the files of the diffusers folder into a folder that exists."""
        self._check_saveable()
        with sampling.quiet_libraries():
            if isinstance(self.pipe, sampling.ModulePipeline):
                bare_modules.write_bare(self.pipe, facts.packed_plan(self.model), folder)
            else:
                cast(DiffusionPipeline, self.pipe).save_pretrained(folder)
        seal.finish(folder)
        if record := self._record():
            record.write(folder)
        if isinstance(self.pipe, sampling.ModulePipeline):
            return
        if facts.packed_plan(self.model).summary:
            model_card.write(folder, self._card(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Save into a temporary folder, with its model card, and upload that.

        Returns:
            The address of the commit.
        """
        hub = HfApi(token=token)
        repo = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as place:
            folder = self.save(Path(place) / repo_id.rpartition("/")[2])
            message = commit_message or "Upload a model quantized by lowtide"
            options = {"commit_message": message, "create_pr": create_pr}
            return str(hub.upload_folder(repo_id=repo, folder_path=folder, **options))

    def run_report(self) -> dict[str, Any]:
        """The report of the run without what lowtide.json has in fields of its own."""
        own = ("source", "settings", "without")
        return {name: value for name, value in self.report.items() if name not in own}

    def _record(self) -> provenance.Provenance | None:
        """The record of the run that made the model, if this is its result."""
        if "settings" not in self.report:
            return None
        return provenance.Provenance(
            command=provenance.command(),
            source=self.report["source"],
            fingerprint=self.report["fingerprint"],
            method=self.plan.method,
            settings=self.report["settings"],
            without=tuple(self.report["without"]),
            report=self.plan.summary | self.run_report(),
        )

    def _card(self, folder: Path) -> model_card.CardFacts:
        source = self.report.get("source", named_by(self.pipe))
        return model_card.facts_of(self.model, folder, source, type(self.pipe).__name__)

    def _check_saveable(self) -> None:
        adapters.check_saveable(self.pipe)
        sampling.check_no_image_adapter(self.model, "save")
        if isinstance(self.pipe, sampling.ModulePipeline):
            bare_modules.check_bare(self.pipe)
            if not facts.packed_plan(self.model).layers:
                raise BadInput(
                    f"found a {type(self.model).__name__} in float, which is no diffusers model",
                    "a packed one",
                    "save its state with torch.save",
                )


def named_by(pipe: Pipeline) -> str:
    """What the pipeline was loaded from, as diffusers remembers it; empty if it was not."""
    config = getattr(pipe, "config", {})
    return str(config.get("_name_or_path") or "")


def save(model: Quantized | DiffusionPipeline, folder: str | Path) -> Path:
    """Write a pipeline, float or packed, as an ordinary diffusers folder, whole or not at all.

    An older model in its place is replaced if lowtide wrote it and it holds no other files.

    Args:
        model: what `quantize` or `reschedule` returned, or a pipeline.
        folder: where it goes.

    Returns:
        The folder.

    Examples:
        >>> import lowtide, tempfile
        >>> place = tempfile.mkdtemp()
        >>> lowtide.save(lowtide.load("zoo:digits"), f"{place}/digits").name
        'digits'
    """
    if isinstance(model, Quantized):
        return model.save(folder)
    return Quantized(cast(Pipeline, model), Plan(), {}).save(folder)
