"""Models by name: bundled, tiny random, GGUF files, local folders, Hugging Face."""

from patchsweep.models.load import load_model, meta_model
from patchsweep.models.tiny import TINY_FAMILIES

__all__ = ["TINY_FAMILIES", "load_model", "meta_model"]
