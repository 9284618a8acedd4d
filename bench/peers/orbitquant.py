"""OrbitQuant: rotated linears in a codebook; needs no calibration and leaves convolutions alone."""

from pathlib import Path

from orbitquant import OrbitQuantConfig, OrbitQuantLinear, quantize_model
from safetensors.torch import save_file
from torch import nn

from peers.task import Held, Packed, Recipe, Task

PACKAGES = ("orbitquant",)


def fit(task: Task, names: list[str] | None = None) -> Packed:
    """Its own choice of linears and of what keeps more bits, or the named ones at equal bits."""
    alike = {"lowbit_boundary_protection": 0, "lowbit_interior_protection": False}
    asked = {} if names is None else {"modules_to_convert": names, **alike}
    config = OrbitQuantConfig(
        weight_bits=task.bits.weights, activation_bits=task.bits.inputs, **asked
    )
    model = task.model
    quantize_model(model, config)
    return Packed(model, held(model), lambda folder: save(model, folder), "inputs: per row")


def inner_linears(task: Task) -> Packed:
    """All but the first and the last layer, as lowtide rounds them."""
    layers = task.adapter.layers()
    return fit(task, [name for name in task.inner if isinstance(layers[name], nn.Linear)])


def held(model: nn.Module) -> dict[str, Held]:
    return {
        name: Held(layer.weight_bits, layer.activation_bits)
        for name, layer in model.named_modules()
        if isinstance(layer, OrbitQuantLinear)
    }


def save(model: nn.Module, folder: Path) -> None:
    """What its artifacts hold: the state as safetensors."""
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


RECIPES = {
    "its own choice of layers": Recipe(fit),
    "inner linears at equal bits": Recipe(inner_linears),
}
