"""Convert a checkpoint of CompVis' latent-diffusion code into a diffusers folder."""

from lowtide.workflows.compvis.conversion import convert_to_folder, converted

__all__ = ["convert_to_folder", "converted"]
