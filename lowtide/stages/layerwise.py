"""The layers of a block one after the other, each with what it reads in the quantized block and answers in the float one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lowtide.models import Unit
from lowtide.nn.precision import Precision
from lowtide.nn.swap import set_precision
from lowtide.stages.stream import Scene
from lowtide.stages.tape import Tape


@dataclass(frozen=True)
class LayerScene:
    """One layer of a scene. What it reads depends on the layers before it, so it is looked at when its turn has come."""

    scene: Scene
    unit: Unit

    @property
    def layer(self) -> nn.Module:
        return self.scene.job.model.get_submodule(self.unit.name)

    @cached_property
    def pairs(self) -> tuple[Tape, Tape]:
        """Inputs in the quantized block and answers in the float block, over all calls."""
        inputs, answers = Tape(self.scene.store), Tape(self.scene.store)
        with torch.no_grad():
            for call in range(len(self.scene.calls)):
                inputs.append(self.heard(call, True)[0])
                answers.append(self.heard(call, False)[1])
        set_precision(self.scene.module, Precision.WEIGHTS)
        return inputs, answers

    def heard(self, call: int, quantized: bool) -> tuple[Tensor, Tensor]:
        """What the layer reads and answers as the block runs on one call, quantized or in float on float inputs."""
        found: list[tuple[Tensor, Tensor]] = []
        set_precision(self.scene.module, Precision.of(weights=quantized, inputs=False))
        hook = self.layer.register_forward_hook(
            lambda layer, args, answer: found.append((args[0], answer))
        )
        try:
            self.scene.whole(call, quantized)
        finally:
            hook.remove()
        samples = len(self.scene.calls[call].arguments["timestep"])
        return tuple(value.expand(samples, *value.shape[1:]) for value in found[0])

    def loss(self, generator: torch.Generator) -> Tensor:
        """Squared distance on a random batch: summed over channels, averaged over the rest."""
        chosen = self.scene.choose(generator)
        self.scene.set_clock(chosen)
        x, answer = (self.scene.taken(tape, chosen) for tape in self.pairs)
        return (
            (self.layer(x).float() - answer.float())
            .square()
            .sum(1 if isinstance(self.layer, nn.Conv2d) else -1)
            .mean()
        )


def layers_of(scene: Scene) -> Iterator[LayerScene]:
    for name in scene.unit.layers:
        yield LayerScene(scene, replace(scene.unit, name=name, layers=(name,)))
