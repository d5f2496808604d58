"""Architectures that patchsweep was tried on, tiny and random: `families_table()`."""

from patchsweep.families.table import Cell, Row, families_table, tiny_bridge

__all__ = ["Cell", "Row", "families_table", "tiny_bridge"]
