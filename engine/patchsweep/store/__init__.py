"""One Zarr group per run, written unit by unit by any number of processes."""

from patchsweep.store.layout import Layout, Unit, Variable
from patchsweep.store.store import Store

__all__ = ["Layout", "Store", "Unit", "Variable"]
