"""Importing this first keeps torch out of a process that only needs the store.

`patchsweep/__init__.py` loads the whole library, which takes seconds; the store's modules stand
on their own. Only for processes that run nothing else.
"""

import sys
from importlib.util import find_spec
from types import ModuleType

spec = find_spec("patchsweep")
assert spec is not None
package = ModuleType("patchsweep")
package.__path__ = list(spec.submodule_search_locations or ())
package.__spec__ = spec
sys.modules.setdefault("patchsweep", package)
