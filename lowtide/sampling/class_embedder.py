"""The table of classes of a latent diffusion model, which its UNet reads as one token of text."""

# diffusers imports its classes lazily and does not declare them as exports. It finds out how a
# component is loaded from ModelMixin being in the same module.
# pyright: reportPrivateImportUsage=false

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class ClassEmbedder(ModelMixin, ConfigMixin):
    """One vector for each class: (batch,) to (batch, 1, width)."""

    @register_to_config
    def __init__(self, classes: int = 1001, width: int = 512):
        super().__init__()
        self.embedding = nn.Embedding(classes, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels)[:, None]
