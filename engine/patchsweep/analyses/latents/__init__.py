"""Latents of dictionaries (sparse autoencoders, transcoders): exact patches, and estimates."""

from patchsweep.analyses.latents.findings import agreement, largest_latents
from patchsweep.analyses.latents.patches import latents
from patchsweep.spec.dictionary import Dictionary

__all__ = ["Dictionary", "agreement", "largest_latents", "latents"]
