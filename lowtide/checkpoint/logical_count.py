"""The number of parameters of a packed model, as diffusers counts those of a float model."""

from dataclasses import dataclass

from torch import nn

from lowtide.nn.swap import packed_layers


@dataclass(frozen=True, eq=False)
class LogicalCount:
    """Takes the place of `model.num_parameters`: a packed weight counts its values, not its bytes.

    A class, because a function inside a function could not be pickled.
    """

    root: nn.Module

    def __call__(
        self,
        only_trainable: bool = False,  # noqa: FBT001, FBT002 - the signature is diffusers'
        exclude_embeddings: bool = False,  # noqa: FBT001, FBT002
    ) -> int:
        sizes = {
            f"{name}.weight": layer.rows_and_columns().numel()
            for name, layer in packed_layers(self.root)
        }
        left_out: set[str] = set()
        if exclude_embeddings:
            for name, module in self.root.named_modules():
                if isinstance(module, nn.Embedding):
                    left_out.add(f"{name}.weight")
        return sum(
            sizes.get(name, parameter.numel())
            for name, parameter in self.root.named_parameters()
            if name not in left_out and (parameter.requires_grad or not only_trainable)
        )
