"""latent-diffusion's UNet and decoder written plainly, with the names of CompVis' checkpoints."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


class Residual(nn.Module):
    """ResBlock of openaimodel.py; `resample`: +1 doubles the resolution, -1 halves it."""

    def __init__(self, channels, out, time, *, scale_shift=False, resample=0):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        conv = nn.Conv2d(channels, out, 3, padding=1)
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, out * (1 + scale_shift)))
        last = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(norm(out), nn.SiLU(), nn.Dropout(0), last)
        same = channels == out
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out, 1)

    def moved(self, x: Tensor) -> Tensor:
        if self.resample > 0:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample < 0 else x

    def forward(self, x, emb):
        h = self.in_layers[2](self.moved(self.in_layers[1](self.in_layers[0](x))))
        x = self.moved(x)
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + emb)
        return self.skip_connection(x) + self.out_layers[3](self.out_layers[1](h))


class JointAttention(nn.Module):
    """AttentionBlock with QKVAttentionLegacy: rows of qkv are (heads, 3, width)."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        batch, channels, *_size = x.shape
        flat = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(flat)).reshape(batch * self.heads, -1, flat.shape[2])
        width = qkv.shape[1] // 3
        q, k, v = qkv.split(width, dim=1)
        weight = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(width)
        h = torch.einsum("bts,bcs->bct", weight.softmax(-1), v)
        return (flat + self.proj_out(h.reshape(batch, channels, -1))).reshape(x.shape)


class Cross(nn.Module):
    """CrossAttention of attention.py."""

    def __init__(self, channels, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0))

    def forward(self, x, context):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weight = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out((weight @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, channels, context, heads):
        super().__init__()
        self.attn1 = Cross(channels, channels, heads)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(
            Gated(channels), nn.Dropout(0), nn.Linear(4 * channels, channels)
        )
        self.attn2 = Cross(channels, context, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class Transformer(nn.Module):
    """SpatialTransformer of attention.py."""

    def __init__(self, channels, context, heads):
        super().__init__()
        self.norm = norm(channels, 1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, context, heads)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        h = self.transformer_blocks[0](h, context).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """UNetModel of openaimodel.py, from the parameters of a YAML."""

    def __init__(self, params: dict):
        super().__init__()
        self.params = params
        width = params["model_channels"]
        time = 4 * width
        scaled = params.get("use_scale_shift_norm", False)
        resamples = params.get("resblock_updown", False)

        def residual(channels, out, resample=0):
            return Residual(channels, out, time, scale_shift=scaled, resample=resample)

        def attention(channels):
            if params.get("use_spatial_transformer"):
                return Transformer(channels, params["context_dim"], params["num_heads"])
            if "num_heads" in params:
                return JointAttention(channels, params["num_heads"])
            return JointAttention(channels, channels // params["num_head_channels"])

        self.time_embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        conv_in = nn.Conv2d(params["in_channels"], width, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv_in])])
        widths = [width]
        channels = width
        levels = list(enumerate(params["channel_mult"]))
        for level, factor in levels:
            for _ in range(params["num_res_blocks"]):
                block = [residual(channels, factor * width)]
                channels = factor * width
                if 2**level in params["attention_resolutions"]:
                    block.append(attention(channels))
                self.input_blocks.append(nn.ModuleList(block))
                widths.append(channels)
            if level < len(levels) - 1:
                last = residual(channels, channels, -1) if resamples else Down(channels)
                self.input_blocks.append(nn.ModuleList([last]))
                widths.append(channels)
        self.middle_block = nn.ModuleList(
            [residual(channels, channels), attention(channels), residual(channels, channels)]
        )
        self.output_blocks = nn.ModuleList()
        for level, factor in reversed(levels):
            for number in range(params["num_res_blocks"] + 1):
                block = [residual(channels + widths.pop(), factor * width)]
                channels = factor * width
                if 2**level in params["attention_resolutions"]:
                    block.append(attention(channels))
                if level and number == params["num_res_blocks"]:
                    block.append(residual(channels, channels, 1) if resamples else Up(channels))
                self.output_blocks.append(nn.ModuleList(block))
        last = nn.Conv2d(width, params["out_channels"], 3, padding=1)
        self.out = nn.Sequential(norm(width), nn.SiLU(), last)

    def forward(self, x, t, context=None):
        half = self.params["model_channels"] // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angles = t[:, None].float() * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))

        def run(block, h):
            for part in block:
                if isinstance(part, Residual):
                    h = part(h, emb)
                elif isinstance(part, Transformer):
                    h = part(h, context)
                else:
                    h = part(h)
            return h

        held = []
        for block in self.input_blocks:
            x = run(block, x)
            held.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, held.pop()], dim=1))
        return self.out(x)
