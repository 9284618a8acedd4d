"""Names of tensors: those of CompVis' latent-diffusion code, and what diffusers calls them.

Each function takes the name of one tensor and returns its new names: one, or three for a joint
projection of q, k and v. A name that no rule knows is an error.

diffusers converts the UNet of Stable Diffusion and the KL autoencoder itself
(diffusers.loaders.single_file_utils), and the tests hold these rules equal to it. Its functions do
not serve here: they know no attention with a joint q, k, v, no VQ model and no table of classes,
and leave out unknown names without a word.
"""

import re
from dataclasses import dataclass

from lowtide.errors import BadInput

UNET = "model.diffusion_model."
EMA = "model_ema."
AUTOENCODER = "first_stage_model."
CONDITION = "cond_stage_model."
# What sampling does not need: the noise schedule, which the config repeats, and training's state.
UNUSED = re.compile(
    r"betas|(sqrt_)?(one_minus_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])"
    r"|lvlb_weights|logvar|scale_factor|cond_ids|model_ema\..*|first_stage_model\.loss\..*"
    r"|first_stage_model\.model_ema\..*"
)

_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_AUTOENCODER = {"norm_out": "conv_norm_out", "nin_shortcut": "conv_shortcut"}
QKV = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class UNetLayout:
    """What the names of a UNet's blocks depend on.

    layers: residual blocks of a level. attended: for each level from the outside in, whether it has
    attention. transformer: whether that is a transformer, which reads a condition.
    """

    layers: int
    attended: tuple[bool, ...]
    transformer: bool

    def names(self, name: str) -> tuple[str, ...]:
        """The diffusers names of a tensor of the UNet, whose prefix is taken off."""
        place, rest = self._place(name)
        if place.split(".")[-2:-1] == ["attentions"] and not self.transformer:
            return _attention_names(place, rest)
        return (f"{place}.{_renamed(rest, _RESIDUAL)}",)

    def _place(self, name: str) -> tuple[str, str]:
        """The module of diffusers, and what is left of the name."""
        for theirs, ours in _ENDS.items():
            if name.startswith(f"{theirs}."):
                return ours, name.removeprefix(f"{theirs}.")
        if found := re.fullmatch(r"input_blocks\.(\d+)\.([01])\.(.+)", name):
            return self._down(int(found[1]) - 1, int(found[2]), found[3])
        if found := re.fullmatch(r"output_blocks\.(\d+)\.([012])\.(.+)", name):
            return self._up(int(found[1]), int(found[2]), found[3])
        raise unknown(UNET + name)

    def _down(self, number: int, part: int, rest: str) -> tuple[str, str]:
        level, layer = divmod(number, self.layers + 1)
        block = f"down_blocks.{level}"
        if layer == self.layers:
            conv = rest.removeprefix("op.")
            return (f"{block}.downsamplers.0", rest if conv == rest else f"conv.{conv}")
        return f"{block}.{'attentions' if part else 'resnets'}.{layer}", rest

    def _up(self, number: int, part: int, rest: str) -> tuple[str, str]:
        level, layer = divmod(number, self.layers + 1)
        block = f"up_blocks.{level}"
        if part == 0:
            return f"{block}.resnets.{layer}", rest
        if part == 1 and self.attended[len(self.attended) - 1 - level]:
            return f"{block}.attentions.{layer}", rest
        return f"{block}.upsamplers.0", rest


def autoencoder_names(name: str, levels: int) -> tuple[str, ...]:
    """The diffusers names of a tensor of a VQ or KL autoencoder, whose prefix is taken off."""
    if found := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", name):
        place = f"{found[1]}.mid_block.resnets.{int(found[2]) - 1}"
        return (f"{place}.{_renamed(found[3], _AUTOENCODER)}",)
    if found := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(.+)", name):
        return _attention_names(f"{found[1]}.mid_block.attentions.0", found[2])
    if found := re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)", name):
        is_down = found[1] == "encoder.down"
        level = int(found[2]) if is_down else levels - 1 - int(found[2])
        return _level_names(f"{found[1]}_blocks.{level}", found[3], name)
    if re.fullmatch(r"(encoder|decoder)\.(conv_in|conv_out|norm_out)\.(weight|bias)", name):
        half, _, rest = name.partition(".")
        return (f"{half}.{_renamed(rest, _AUTOENCODER)}",)
    if re.fullmatch(r"((post_)?quant_conv\.(weight|bias)|quantize\.embedding\.weight)", name):
        return (name,)
    raise unknown(AUTOENCODER + name)


def _level_names(place: str, rest: str, name: str) -> tuple[str, ...]:
    """A tensor of one resolution of an encoder or a decoder."""
    if found := re.fullmatch(r"block\.(\d+)\.(.+)", rest):
        return (f"{place}.resnets.{found[1]}.{_renamed(found[2], _AUTOENCODER)}",)
    if found := re.fullmatch(r"attn\.(\d+)\.(.+)", rest):
        return _attention_names(f"{place}.attentions.{found[1]}", found[2])
    if found := re.fullmatch(r"(down|up)sample\.conv\.(weight|bias)", rest):
        return (f"{place}.{found[1]}samplers.0.conv.{found[2]}",)
    raise unknown(AUTOENCODER + name)


def _attention_names(place: str, rest: str) -> tuple[str, ...]:
    layer, _, kind = rest.rpartition(".")
    if layer == "qkv":
        return tuple(f"{place}.{part}.{kind}" for part in QKV)
    if layer not in _ATTENTION:
        raise unknown(f"{place}.{rest}")
    return (f"{place}.{_ATTENTION[layer]}.{kind}",)


def _renamed(rest: str, rules: dict[str, str]) -> str:
    """The name with its first part replaced, where a rule names it."""
    for theirs, ours in rules.items():
        if rest.startswith(f"{theirs}."):
            return ours + rest.removeprefix(theirs)
    return rest


def ema_name(name: str) -> str:
    """What the moving average of a tensor of the UNet, whose prefix is taken off, is called."""
    return EMA + ("diffusion_model." + name).replace(".", "")


def unknown(name: str) -> BadInput:
    return BadInput(
        f"found the tensor {name}, which no rule knows",
        "a checkpoint of latent-diffusion's own code with the config that it was trained with",
        "check --config",
    )
