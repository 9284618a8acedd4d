"""latent-diffusion's VQ and KL autoencoder written plainly, with the names of CompVis."""

import math

import torch
import torch.nn.functional as F
from compvis_models import norm
from torch import Tensor, nn


class Block(nn.Module):
    """ResnetBlock of model.py."""

    def __init__(self, channels, out):
        super().__init__()
        self.norm1 = norm(channels, 1e-6)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = norm(out, 1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """AttnBlock of model.py."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels, 1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))
        weight = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
        return x + self.proj_out((v @ weight.transpose(1, 2)).reshape(x.shape))


def middle(channels: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = Block(channels, channels)
    mid.attn_1 = Attention(channels)
    mid.block_2 = Block(channels, channels)
    return mid


def level(channels: int, out: int, blocks: int) -> nn.Module:
    part = nn.Module()
    widths = [channels] + [out] * (blocks - 1)
    part.block = nn.ModuleList([Block(width, out) for width in widths])
    part.attn = nn.ModuleList()
    return part


def resampling(channels: int, stride: int) -> nn.Module:
    part = nn.Module()
    part.conv = nn.Conv2d(channels, channels, 3, stride, padding=0 if stride == 2 else 1)
    return part


class Encoder(nn.Module):
    def __init__(self, dd: dict):
        super().__init__()
        self.conv_in = nn.Conv2d(dd["in_channels"], dd["ch"], 3, padding=1)
        self.down = nn.ModuleList()
        channels = dd["ch"]
        for number, factor in enumerate(dd["ch_mult"]):
            part = level(channels, factor * dd["ch"], dd["num_res_blocks"])
            channels = factor * dd["ch"]
            if number < len(dd["ch_mult"]) - 1:
                part.downsample = resampling(channels, 2)
            self.down.append(part)
        self.mid = middle(channels)
        self.norm_out = norm(channels, 1e-6)
        latent = dd["z_channels"] * (2 if dd["double_z"] else 1)
        self.conv_out = nn.Conv2d(channels, latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for part in self.down:
            for block in part.block:
                x = block(x)
            if hasattr(part, "downsample"):
                x = part.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv_out(F.silu(self.norm_out(through(self.mid, x))))


class Decoder(nn.Module):
    def __init__(self, dd: dict):
        super().__init__()
        channels = dd["ch"] * dd["ch_mult"][-1]
        self.conv_in = nn.Conv2d(dd["z_channels"], channels, 3, padding=1)
        self.mid = middle(channels)
        parts = []
        for number, factor in reversed(list(enumerate(dd["ch_mult"]))):
            part = level(channels, factor * dd["ch"], dd["num_res_blocks"] + 1)
            channels = factor * dd["ch"]
            if number:
                part.upsample = resampling(channels, 1)
            parts.insert(0, part)
        self.up = nn.ModuleList(parts)
        self.norm_out = norm(channels, 1e-6)
        self.conv_out = nn.Conv2d(channels, dd["out_ch"], 3, padding=1)

    def forward(self, z):
        x = through(self.mid, self.conv_in(z))
        for part in reversed(self.up):
            for block in part.block:
                x = block(x)
            if hasattr(part, "upsample"):
                x = part.upsample.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


def through(mid: nn.Module, x: Tensor) -> Tensor:
    return mid.block_2(mid.attn_1(mid.block_1(x)))


class Autoencoder(nn.Module):
    """VQModelInterface or AutoencoderKL."""

    def __init__(self, params: dict):
        super().__init__()
        dd = params["ddconfig"]
        embed = params["embed_dim"]
        twice = 2 if dd["double_z"] else 1
        self.encoder = Encoder(dd)
        self.decoder = Decoder(dd)
        self.quant_conv = nn.Conv2d(twice * dd["z_channels"], twice * embed, 1)
        self.post_quant_conv = nn.Conv2d(embed, dd["z_channels"], 1)
        if "n_embed" in params:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(params["n_embed"], embed)

    def encode(self, x: Tensor) -> Tensor:
        """The latents, or mean and logarithm of the variance."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        if hasattr(self, "quantize"):
            table = self.quantize.embedding.weight
            flat = z.permute(0, 2, 3, 1)
            nearest = torch.cdist(flat.flatten(0, 2), table).argmin(1)
            z = table[nearest].view(flat.shape).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(z))
