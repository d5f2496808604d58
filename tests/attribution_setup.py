"""What the tests of attribution share: requests on tiny models, and a method's estimates."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from patchsweep.attribution import Attribution, Method, get_methods
from patchsweep.data.pairs import PromptPairs
from patchsweep.spec.batch import Batch, make_batches
from patchsweep.spec.spec import Request, SweepSpec, make_request
from subjects import CLEAN, CORRUPTED, model

NAMES = [(" Mary", " John"), (" Anna", " Paul"), (" Lucy", " Tom"), (" Emma", " James")]


def pairs_of(name: str, n: int) -> PromptPairs:
    """Indirect-object pairs with other names; the first is the demo pair."""
    clean = [CLEAN.replace(" Mary", a).replace(" John", b) for a, b in NAMES[:n]]
    corrupted = [CORRUPTED.replace(" Mary", a).replace(" John", b) for a, b in NAMES[:n]]
    return PromptPairs.from_strings(
        model(name), clean=clean, corrupted=corrupted, answers=NAMES[:n]
    )


def block(name: str, sites: list[str], n_pairs: int = 1, **options: Any) -> tuple[Request, Batch]:
    """A request, and its first batch."""
    request = make_request(model(name), pairs_of(name, n_pairs), SweepSpec(sites, **options))
    batch = make_batches(
        request.pairs, range(n_pairs), request.direction, request.read, torch.device("cpu")
    )[0]
    return request, batch


def cells(
    name: str, sites: list[str], method: str | Method, n_pairs: int = 1, **options: Any
) -> dict[str, np.ndarray]:
    """Per site `[metric, pair, layer, pos, unit]`."""
    request, _ = block(name, sites, n_pairs, **options)
    chosen = get_methods([method])
    return dict(Attribution(request, chosen).run(chosen[0], range(n_pairs)).cells)
