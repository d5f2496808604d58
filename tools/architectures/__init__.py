"""Architectures that patchsweep was tried on, tiny and random: `families_table()`."""

from tools.architectures.table import Cell, Row, families_table, tiny_bridge

__all__ = ["Cell", "Row", "families_table", "tiny_bridge"]
