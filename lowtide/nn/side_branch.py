"""Side branch: a low-rank layer in float beside a packed one, which is how it holds a LoRA.

The packed layer reads its input on its grid, and the branch reads the same input in float. Their
sum is the layer with the LoRA, so no weight is rounded again and no code changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.nn.float_layers import FloatLayer, conv_options, linear_options
from lowtide.nn.plan import SidePlan

SIDE = "side"
DOWN = f"{SIDE}.down.weight"
BIAS = f"{SIDE}.up.bias"


@dataclass(frozen=True)
class Factors:
    """The tensors of a branch: `up(down(x)) + bias`.

    `down` is rank x inputs (x kernel), `up` is outputs x rank (x 1 x 1), `bias` is (outputs,).
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None

    @classmethod
    def scaled(cls, down: FloatLayer, up: FloatLayer, scale: float) -> "Factors":
        """Copies of the weights of two layers, with the scale in the second of them."""
        bias = None if up.bias is None else _times(up.bias, scale)
        return cls(down.weight.detach().clone(), _times(up.weight, scale), bias)

    def part(self, start: int, stop: int) -> "Factors":
        """The branch on these channels of the input; the first part has the bias."""
        if stop - start == self.down.shape[1]:
            return self
        bias = None if start else self.bias
        return Factors(self.down[:, start:stop].contiguous(), self.up, bias)


def _times(tensor: Tensor, scale: float) -> Tensor:
    """The product in the tensor's own type if it holds all of its values, else in float32."""
    product = tensor.detach().float() * scale
    own = product.to(tensor.dtype)
    return own if torch.equal(own.float(), product) else product


def joined(parts: Sequence[Factors], groups: int) -> Factors:
    """One branch that is the sum of these: their ranks side by side, in each group of a layer."""
    if len(parts) == 1:
        return parts[0]
    kind = torch.float32
    for part in parts:
        kind = torch.promote_types(kind, torch.promote_types(part.down.dtype, part.up.dtype))
    grouped = [part.down.to(kind).unflatten(0, (groups, -1)) for part in parts]
    biases = [part.bias.to(kind) for part in parts if part.bias is not None]
    return Factors(
        torch.cat(grouped, 1).flatten(0, 1),
        torch.cat([part.up.to(kind) for part in parts], 1),
        torch.stack(biases).sum(0) if biases else None,
    )


class Addition(NamedTuple):
    """What a branch adds to the weight and the bias of a float layer."""

    weight: Tensor
    bias: Tensor | None

    def added_to(self, bias: nn.Parameter | None) -> nn.Parameter | None:
        if self.bias is None:
            return bias
        return _fixed(self.bias if bias is None else bias.detach() + self.bias)


class SideBranch(nn.Module):
    """The branch as two float layers, each of which reads its input in the type of its weight."""

    def __init__(self, down: FloatLayer, up: FloatLayer):
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, input: Tensor) -> Tensor:
        low = self.down(input.to(self.down.weight.dtype))
        return self.up(low.to(self.up.weight.dtype))

    def factors(self) -> Factors:
        bias = None if self.up.bias is None else self.up.bias.detach()
        return Factors(self.down.weight.detach(), self.up.weight.detach(), bias)

    def as_addition(self, layer: FloatLayer) -> Addition:
        """The branch as a change of the weight of its layer."""
        factors = self.factors()
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise BadInput(
                f"found a LoRA beside a convolution of {layer.groups} groups",
                "one whose branch a weight can hold",
                "unfuse the LoRA first",
            )
        product = factors.up.float().flatten(1) @ factors.down.float().flatten(1)
        bias = None if factors.bias is None else factors.bias.float()
        return Addition(product.reshape(-1, *factors.down.shape[1:]), bias)


def side_branch(layer: FloatLayer, factors: Factors) -> SideBranch:
    """The branch with these factors, beside this layer."""
    plan = SidePlan(rank=len(factors.down), bias=factors.bias is not None)
    branch = empty_branch(layer, plan)
    branch.down.weight = _fixed(factors.down)
    branch.up.weight = _fixed(factors.up)
    if factors.bias is not None:
        branch.up.bias = _fixed(factors.bias)
    return branch.train(layer.training)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def empty_branch(layer: FloatLayer, plan: SidePlan) -> SideBranch:
    """A branch of this rank in the shape of the layer, on the meta device.

    `down` reads the input as the layer does; `up` mixes its answer pixel by pixel.
    """
    down, up = branch_layers(layer, plan.rank, bias=plan.bias)
    return SideBranch(down, up).requires_grad_(False)


def branch_layers(layer: FloatLayer, rank: int, *, bias: bool) -> tuple[FloatLayer, FloatLayer]:
    """The two float layers of a branch, on the meta device."""
    if isinstance(layer, nn.Conv2d):
        options = conv_options(layer)
        options["out_channels"] = rank
        options["groups"] = 1
        options["bias"] = False
        shape = (rank, layer.out_channels, 1)
        return nn.Conv2d(**options), nn.Conv2d(
            *shape, groups=layer.groups, bias=bias, device="meta"
        )
    linear = linear_options(layer)
    linear["out_features"] = rank
    linear["bias"] = False
    return nn.Linear(**linear), nn.Linear(rank, layer.out_features, bias=bias, device="meta")


def side_plans(state: dict[str, Tensor]) -> dict[str, SidePlan]:
    """The branches of a model by the name of their layer, from the names and shapes of a state."""
    suffix = f".{DOWN}"
    layers = {name.removesuffix(suffix): name for name in state if name.endswith(suffix)}
    return {
        layer: SidePlan(rank=len(state[name]), bias=f"{layer}.{BIAS}" in state)
        for layer, name in layers.items()
    }


def add_branches(root: nn.Module, plans: dict[str, SidePlan]) -> None:
    """Give layers empty branches, which a checkpoint then fills."""
    for name, plan in plans.items():
        layer = root.get_submodule(name)
        layer.side = empty_branch(cast(FloatLayer, layer), plan)
