"""The YAML of CompVis' latent-diffusion code, and the diffusers configurations it stands for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowtide.errors import BadInput
from lowtide.workflows.compvis.names import UNetLayout

Params = Mapping[str, Any]
# Options of the UNet that change nothing here, or that the rest of this file reads.
_READ = {
    *("image_size", "in_channels", "out_channels", "model_channels", "attention_resolutions"),
    *("num_res_blocks", "channel_mult", "num_heads", "num_head_channels", "num_heads_upsample"),
    *("dropout", "legacy", "use_checkpoint", "use_fp16", "use_spatial_transformer"),
    *("transformer_depth", "context_dim", "use_scale_shift_norm", "resblock_updown"),
    *("use_new_attention_order", "conv_resample", "dims", "n_embed", "num_classes"),
}


@dataclass(frozen=True)
class ModelConfig:
    """A model's parts, as the YAML describes them."""

    params: Params
    unet: Params
    autoencoder: Params
    is_vq: bool
    classes: int | None

    @property
    def levels(self) -> int:
        """Resolutions of the autoencoder."""
        return len(self.autoencoder["ddconfig"]["ch_mult"])


def read_config(path: Path) -> ModelConfig:
    """The model of a YAML file of latent-diffusion."""
    expected = "a config of latent-diffusion, such as cin256-v2.yaml"
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        first_stage = params["first_stage_config"]
        config = ModelConfig(
            params=params,
            unet=params["unet_config"]["params"],
            autoencoder=first_stage["params"],
            is_vq=_is_vq(first_stage["target"]),
            classes=_classes(params),
        )
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"found {path} unreadable ({reason})", expected, "check it") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"found no {error} in {path.name}", expected, "check --config") from error
    _check(config)
    return config


def _is_vq(target: str) -> bool:
    kind = target.rpartition(".")[2]
    if kind not in ("VQModelInterface", "VQModel", "AutoencoderKL"):
        raise BadInput(
            f"found the autoencoder {kind}",
            "VQModelInterface or AutoencoderKL",
            "convert a model of latents with one of them",
        )
    return kind != "AutoencoderKL"


def _classes(params: Params) -> int | None:
    """The number of classes of a class-conditional model; None for an unconditional one."""
    stage = params.get("cond_stage_config", "__is_unconditional__")
    if stage == "__is_unconditional__":
        return None
    kind = stage["target"].rpartition(".")[2]
    if kind != "ClassEmbedder":
        raise BadInput(
            f"found the condition {kind}",
            "a class-conditional or an unconditional model",
            "load a text-to-image model from the hub, such as CompVis/ldm-text2im-large-256",
        )
    return stage["params"].get("n_classes", 1000)


def _check(config: ModelConfig) -> None:
    """What diffusers' models cannot express is an error."""
    unet = config.unet
    if unknown := sorted(set(unet) - _READ):
        _refuse(f"{unknown[0]} in the UNet's config", "options that diffusers' UNets have")
    for name in ("use_new_attention_order", "n_embed", "num_classes"):
        if unet.get(name):
            _refuse(f"{name} in the UNet's config", f"a UNet without {name}")
    if unet.get("dims", 2) != 2 or not unet.get("conv_resample", True):
        _refuse("dims or conv_resample in the UNet's config", "2-D and convolutions that resample")
    if bool(unet.get("use_spatial_transformer")) != (config.classes is not None):
        _refuse("a transformer without a condition, or a condition without one", "both or none")
    if not {"num_heads", "num_head_channels"} & set(unet):
        _refuse("neither num_heads nor num_head_channels in the UNet's config", "one of them")
    if config.autoencoder["ddconfig"].get("attn_resolutions"):
        _refuse("attn_resolutions in the autoencoder's config", "attention in the middle alone")


def _refuse(found: str, expected: str) -> None:
    raise BadInput(f"found {found}", expected, "convert another model")


def _attended(unet: Params) -> tuple[bool, ...]:
    """For each level, whether it has attention."""
    resolutions = set(unet["attention_resolutions"])
    return tuple(2**level in resolutions for level in range(len(unet["channel_mult"])))


def head_width(config: ModelConfig) -> int | None:
    """Channels of a head, if all heads of an unconditional UNet have one width."""
    width = config.unet.get("num_head_channels", -1)
    return None if width == -1 else width


def unet_layout(config: ModelConfig) -> UNetLayout:
    return UNetLayout(
        layers=config.unet["num_res_blocks"],
        attended=_attended(config.unet),
        transformer=config.classes is not None,
    )


def unet_config(config: ModelConfig) -> dict[str, Any]:
    """The configuration of UNet2DConditionModel for a class-conditional model, else UNet2DModel."""
    unet = config.unet
    channels = [unet["model_channels"] * factor for factor in unet["channel_mult"]]
    common = {
        "sample_size": unet["image_size"],
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": unet["num_res_blocks"],
        "resnet_time_scale_shift": "scale_shift" if unet.get("use_scale_shift_norm") else "default",
    }
    if config.classes is None:
        return common | _unconditional(unet)
    return common | _conditional(unet, channels)


def _unconditional(unet: Params) -> dict[str, Any]:
    resamples = bool(unet.get("resblock_updown"))
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    down, up = plain if resamples else ("DownBlock2D", "UpBlock2D")
    attended = _attended(unet)
    kind = "resnet" if resamples else "conv"
    return {
        "down_block_types": ["AttnDownBlock2D" if each else down for each in attended],
        "up_block_types": ["AttnUpBlock2D" if each else up for each in reversed(attended)],
        "attention_head_dim": unet.get("num_head_channels", 8),
        # Without it, a middle block with scale and shift has no norm before its attention.
        "attn_norm_num_groups": 32,
        "downsample_type": kind,
        "upsample_type": kind,
    }


def _conditional(unet: Params, channels: list[int]) -> dict[str, Any]:
    if unet.get("resblock_updown"):
        _refuse("resblock_updown in a conditional UNet", "convolutions that resample")
    attended = _attended(unet)
    width = unet.get("num_head_channels", -1)
    heads = unet.get("num_heads", -1)
    return {
        "down_block_types": [
            "CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attended
        ],
        "up_block_types": [
            "CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attended)
        ],
        "cross_attention_dim": unet["context_dim"],
        # diffusers calls the number of heads so.
        "attention_head_dim": heads if width == -1 else [each // width for each in channels],
        "transformer_layers_per_block": unet.get("transformer_depth", 1),
    }


def autoencoder_config(config: ModelConfig, scaling_factor: float) -> dict[str, Any]:
    """The configuration of a VQModel or an AutoencoderKL."""
    parts = config.autoencoder["ddconfig"]
    channels = [parts["ch"] * factor for factor in parts["ch_mult"]]
    common = {
        "sample_size": parts["resolution"],
        "in_channels": parts["in_channels"],
        "out_channels": parts["out_ch"],
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": parts["num_res_blocks"],
        "scaling_factor": scaling_factor,
    }
    if not config.is_vq:
        return common | {"latent_channels": config.autoencoder["embed_dim"]}
    return common | {
        "latent_channels": parts["z_channels"],
        "num_vq_embeddings": config.autoencoder["n_embed"],
        "vq_embed_dim": config.autoencoder["embed_dim"],
    }


def scheduler_config(config: ModelConfig) -> dict[str, Any]:
    """DDIM as latent-diffusion samples: timesteps from 1, and the last step ends at t = 0."""
    params = config.params
    kinds = {"linear": "scaled_linear", "sqrt_linear": "linear"}
    kind = params.get("beta_schedule", "linear")
    if kind not in kinds:
        _refuse(f"beta_schedule {kind}", " or ".join(kinds))
    return {
        "num_train_timesteps": params["timesteps"],
        "beta_start": params["linear_start"],
        "beta_end": params["linear_end"],
        "beta_schedule": kinds[kind],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    }
