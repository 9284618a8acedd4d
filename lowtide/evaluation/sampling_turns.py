"""Turns: models sample the same seeds in turns, so that machine load slows all alike.

What an interrupted command has finished is read from its records.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowtide import sampling
from lowtide.distributed.world import join
from lowtide.evaluation.compared_models import ComparedModel
from lowtide.evaluation.timed_sampling import ModelSamples, SampledBatch, sample_batch
from lowtide.report.grids import pixels
from lowtide.report.progress import track
from lowtide.stages.finished_work import FinishedWork


def sample_in_turns(
    models: Sequence[ComparedModel],
    request: sampling.Request,
    folder: Path | None,
    work: FinishedWork | None = None,
) -> dict[str, ModelSamples]:
    """The samples of each model by key; images are also written as FOLDER/<key>/<seed>.png.

    The first model is the reference. For each batch, all models sample one after another. Each
    process of torchrun samples its part of the batches, and keeps them in `work`.
    """
    samples = {model.key: ModelSamples() for model in models}
    world = join()
    batches = world.part(list(request.batches()))
    turns = chain.from_iterable(Turn(models, batch, work).parts() for batch in batches)
    own = list(track(turns, total=len(batches) * len(models), title="sampling images"))
    for key, part in world.gathered(own):
        samples[key].join(part)
    if folder is not None:
        for key, each in samples.items():
            _write_images(folder / key, np.concatenate(each.images), request.seeds)
    return samples


@dataclass
class Turn:
    """One batch of all models, of which the first is the reference.

    A record of a model holds its images and the squares of its errors. The samples of the reference
    at each step, which the errors are of, are on disk until the turn is over.
    """

    models: Sequence[ComparedModel]
    request: sampling.Request
    work: FinishedWork | None

    def parts(self) -> Iterator[tuple[str, ModelSamples]]:
        """The samples of each model, by its key."""
        first, *others = self.models
        known = self._recorded(self._name(first))
        own = samples_of(known) if known else self._measured(self.reference)
        yield first.key, own
        for model in others:
            yield model.key, self._part(model)
        if self.work and not known:
            self.work.record(self._name(first), tensors_of_samples(own))
            self.work.discard(self._path)

    def _part(self, model: ComparedModel) -> ModelSamples:
        known = self._recorded(self._name(model))
        if known:
            return samples_of(known)
        part = self._measured(sample_batch(model.pipe, self.request))
        if self.work:
            self.work.record(self._name(model), tensors_of_samples(part))
        return part

    def _measured(self, batch: SampledBatch) -> ModelSamples:
        samples = ModelSamples()
        samples.add(batch, self.reference)
        return samples

    @cached_property
    def reference(self) -> SampledBatch:
        """The reference's batch, with its samples at each step."""
        known = self._recorded(self._path)
        if known:
            return batch_of(known)
        batch = sample_batch(self.models[0].pipe, self.request)
        if self.work:
            self.work.record(self._path, tensors_of_batch(batch))
        return batch

    def _recorded(self, name: str) -> dict[str, Tensor] | None:
        return self.work.recorded(name) if self.work else None

    @property
    def _path(self) -> str:
        return f"path-from-{self.request.seeds[0]}"

    def _name(self, model: ComparedModel) -> str:
        return f"images-from-{self.request.seeds[0]}-{model.key}"


def tensors_of_batch(batch: SampledBatch) -> dict[str, Tensor]:
    """The tensors of a record."""
    samples = {f"sample {step}": sample for step, sample in enumerate(batch.samples)}
    return samples | {
        "images": torch.from_numpy(batch.images),
        "timesteps": torch.tensor(batch.timesteps),
        "seconds": torch.tensor(batch.seconds, dtype=torch.float64),
    }


def batch_of(record: Mapping[str, Tensor]) -> SampledBatch:
    """The batch of a record."""
    timesteps: list[int] = record["timesteps"].tolist()
    return SampledBatch(
        images=record["images"].numpy(),
        samples=[record[f"sample {step}"] for step in range(len(timesteps))],
        timesteps=timesteps,
        seconds=record["seconds"].tolist(),
    )


def tensors_of_samples(samples: ModelSamples) -> dict[str, Tensor]:
    """The tensors of a record."""
    return {
        "images": torch.from_numpy(np.concatenate(samples.images)),
        "latents": torch.from_numpy(np.concatenate(samples.latents)),
        "timesteps": torch.tensor(samples.timesteps),
        "calls": torch.tensor(samples.calls),
        "seconds": torch.tensor(samples.seconds, dtype=torch.float64),
        "squared_error": torch.as_tensor(samples.squared_error),
        "squared_reference": torch.as_tensor(samples.squared_reference),
    }


def samples_of(record: Mapping[str, Tensor]) -> ModelSamples:
    """The samples of a record."""
    return ModelSamples(
        images=[record["images"].numpy()],
        latents=[record["latents"].numpy()],
        timesteps=record["timesteps"].tolist(),
        calls=int(record["calls"]),
        seconds=record["seconds"].tolist(),
        squared_error=record["squared_error"].numpy(),
        squared_reference=record["squared_reference"].numpy(),
    )


def _write_images(folder: Path, images: np.ndarray, seeds: Sequence[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image, seed in zip(pixels(images), seeds, strict=True):
        channels = image.squeeze(2) if image.shape[2] == 1 else image
        Image.fromarray(channels).save(folder / f"{seed}.png")
