"""Screening: attribution ranks all patches, the exact engine runs the foremost, and random subsets
of the rest bound what was missed."""

from patchsweep.screening.settings import Screen

__all__ = ["Screen"]
