"""Changes of latents: which of them a patch gives another activation, at which positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.forward.casting import cast_while
from patchsweep.runners.hook_points import forward
from patchsweep.runners.hooked import LOGIT_BYTES
from patchsweep.spec.batch import Batch
from patchsweep.spec.dictionary import Dictionary
from patchsweep.spec.interventions import Intervention, takes_source, values_of
from patchsweep.spec.plan import Bools, Ints
from patchsweep.spec.sites import Site
from patchsweep.sweeps.joint import JointRequest

Floats = NDArray[np.float32]


def latent_site(dictionary: Dictionary) -> Site:
    """Return what interventions take the latents of a dictionary for: a site of one layer."""
    return Site(dictionary.name, dictionary.name, layered=False)


@dataclass(frozen=True)
class Changes:
    """Latents of one dictionary whose activation a patch changes; one entry a patch."""

    pair: Ints  # number of the pair
    pos: Ints
    latent: Ints
    change: Floats  # patched activation minus that of the base run

    def __len__(self) -> int:
        return len(self.pair)

    def rows(self, batch: Batch) -> Ints:
        """Return the row of the batch of each change."""
        return np.searchsorted(batch.pairs, self.pair).astype(np.int64)

    def at(self, index: Ints | Bools) -> Changes:
        """Return the changes `index`."""
        return Changes(*(getattr(self, f.name)[index] for f in fields(self)))


class LatentReader:
    """Reads the activations of dictionaries' latents from runs of the bridge."""

    def __init__(
        self,
        bridge: TransformerBridge,
        dictionaries: Sequence[Dictionary],
        compute_dtype: torch.dtype,
    ) -> None:
        self.bridge, self.compute_dtype = bridge, compute_dtype
        self.dictionaries = tuple(dictionaries)

    @torch.no_grad()
    def __call__(
        self, tokens: Int[Tensor, "prompt pos"]
    ) -> list[Float[Tensor, "prompt pos latent"]]:
        """Return the latents of each dictionary, fp32."""
        size = max(1, LOGIT_BYTES // (4 * tokens.shape[1] * int(self.bridge.cfg.d_vocab)))
        parts = [self._read(rows) for rows in tokens.split(size)]
        return [torch.cat(of_one) for of_one in zip(*parts, strict=True)]

    def _read(self, tokens: Tensor) -> list[Tensor]:
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any, name: str) -> None:
            kept[name] = x.detach().clone()

        names = dict.fromkeys(one.hook for one in self.dictionaries)
        with cast_while(self.bridge, self.compute_dtype):
            forward(self.bridge, tokens, (), [(name, partial(keep, name=name)) for name in names])
        return [
            one.encode(kept[one.hook].reshape(*tokens.shape, -1).to(one.encoder.device))
            for one in self.dictionaries
        ]

    def activations(self, tokens: Tensor) -> Mapping[str, Sequence[Tensor]]:
        """Return the latents as activations of `latent_site`, as interventions take them."""
        read = self(tokens)
        return {one.name: [x] for one, x in zip(self.dictionaries, read, strict=True)}


def find_changes(
    request: JointRequest, reader: LatentReader, intervention: Intervention
) -> list[Changes]:
    """Return, for each dictionary, every patch of one latent that changes its activation.

    Left out as dead: latents with the same activation before and after (silent ones among them),
    positions behind the last that is read, and, where values come from the source run, those before
    the first token in which base and source differ.
    """
    found: list[list[Changes]] = [[] for _ in reader.dictionaries]
    for own in request.batches(range(len(request.pairs))):
        batch = next(iter(request.sources(own).values()), own)  # with another pair's source runs
        for i, changes in enumerate(_of_batch(batch, reader, intervention)):
            found[i].append(changes)
    return [
        Changes(*(np.concatenate([getattr(x, f.name) for x in parts]) for f in fields(Changes)))
        for parts in found
    ]


def _of_batch(batch: Batch, reader: LatentReader, intervention: Intervention) -> list[Changes]:
    base, source = reader(batch.base), reader(batch.source)
    differs = (batch.base != batch.source).cpu().numpy()
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), batch.length)
    able = np.broadcast_to(np.arange(batch.length) <= batch.reads[-1], differs.shape)
    if takes_source(intervention):
        able = able & (np.arange(batch.length) >= first[:, None])
    changes = []
    for one, b, s in zip(reader.dictionaries, base, source, strict=True):
        values = values_of(intervention, latent_site(one), 0, b, s, batch.spans)
        change = (values - b).cpu().numpy()
        row, pos, latent = np.nonzero((change != 0) & able[:, :, None])
        pair = np.array(batch.pairs, np.int64)[row]
        changes.append(Changes(pair, pos, latent, change[row, pos, latent].astype(np.float32)))
    return changes
