"""Names of a UNet's tensors as ComfyUI knows them, which are those of latent-diffusion's code.

`lowtide convert` has the opposite rules (workflows/compvis/names.py); a test holds both together.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.errors import BadInput

_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PLACE = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ComfyNames:
    """layers: residual blocks of a level. attended: whether each up block has attention."""

    layers: int
    attended: Sequence[bool]

    def of(self, name: str) -> str:
        """The name of one tensor."""
        for ours, theirs in _ENDS.items():
            if name.startswith(f"{ours}."):
                return theirs + _inner(name.removeprefix(ours))
        found = _PLACE.fullmatch(name)
        if not found:
            raise BadInput(
                f"found the tensor {name}, which ComfyUI's UNets do not have",
                "a UNet of Stable Diffusion 1, 2 or XL",
                "choose another --to",
            )
        way, level, kind, layer, rest = found.groups()
        if way == "down":
            return self._down(int(level), kind, int(layer), rest)
        return self._up(int(level), kind, int(layer), rest)

    def _down(self, level: int, kind: str, layer: int, rest: str) -> str:
        first = 1 + level * (self.layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + self.layers}.0.op.{rest.removeprefix('conv.')}"
        part = 1 if kind == "attentions" else 0
        return f"input_blocks.{first + layer}.{part}{_inner(f'.{rest}')}"

    def _up(self, level: int, kind: str, layer: int, rest: str) -> str:
        first = level * (self.layers + 1)
        if kind == "upsamplers":
            part = 2 if self.attended[level] else 1
            return f"output_blocks.{first + self.layers}.{part}.{rest}"
        part = 1 if kind == "attentions" else 0
        return f"output_blocks.{first + layer}.{part}{_inner(f'.{rest}')}"


def _inner(rest: str) -> str:
    """The names inside a residual block; those of a transformer are the same."""
    layer, _, kind = rest.removeprefix(".").rpartition(".")
    return f".{_RESIDUAL.get(layer, layer)}.{kind}" if layer else f".{kind}"
