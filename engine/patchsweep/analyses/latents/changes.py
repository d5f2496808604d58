"""Changes of latents: which of them a patch gives another activation, at which positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.forward.casting import cast_while
from patchsweep.runners.hook_points import forward, keeping
from patchsweep.runners.hooked import LOGIT_BYTES
from patchsweep.spec.batch import Batch
from patchsweep.spec.dictionary import Dictionary
from patchsweep.spec.interventions import Intervention, takes_source, values_of
from patchsweep.spec.plan import Bools, Ints
from patchsweep.spec.sites import Site
from patchsweep.sweeps.joint import JointRequest

Floats = NDArray[np.float32]
_MANY = 2**32  # above the number of any latent, for `Changes.key`


def latent_site(dictionary: Dictionary) -> Site:
    """Return what interventions take the latents of a dictionary for: a site of one layer."""
    return Site(dictionary.name, dictionary.name, layered=False)


@dataclass(frozen=True)
class Changes:
    """Latents whose activation a patch changes; one entry a patch, dictionary by dictionary."""

    dictionary: Ints  # number of the dictionary
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

    @property
    def key(self) -> Ints:
        """One number for dictionary and latent; `unkeyed` returns the two."""
        return self.dictionary * _MANY + self.latent


def unkeyed(key: Ints) -> tuple[Ints, Ints]:
    """Return dictionary and latent of keys."""
    return key // _MANY, key % _MANY


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
        kept, reads = keeping(dict.fromkeys(one.hook for one in self.dictionaries))
        with cast_while(self.bridge, self.compute_dtype):
            forward(self.bridge, tokens, (), reads)
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
) -> Changes:
    """Return every patch of one latent that changes its activation.

    Left out as dead: latents with the same activation before and after (silent ones among them),
    positions behind the last that is read, and, where values come from the source run, those before
    the first token in which base and source differ.
    """
    parts: list[Changes] = []
    for own in request.batches(range(len(request.pairs))):
        batch = next(iter(request.sources(own).values()), own)  # with another pair's source runs
        parts += _of_batch(batch, reader, intervention)
    found = Changes(*(np.concatenate([getattr(x, f.name) for x in parts]) for f in fields(Changes)))
    return found.at(np.argsort(found.dictionary, kind="stable"))


def _of_batch(batch: Batch, reader: LatentReader, intervention: Intervention) -> list[Changes]:
    base, source = reader(batch.base), reader(batch.source)
    differs = batch.differs.cpu().numpy()
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), batch.length)
    able = np.broadcast_to(np.arange(batch.length) <= batch.reads[-1], differs.shape)
    if takes_source(intervention):
        able = able & (np.arange(batch.length) >= first[:, None])
    changes = []
    for i, (one, b, s) in enumerate(zip(reader.dictionaries, base, source, strict=True)):
        values = values_of(intervention, latent_site(one), 0, b, s, batch.spans)
        change = (values - b).cpu().numpy()
        row, pos, latent = np.nonzero((change != 0) & able[:, :, None])
        pair, size = np.array(batch.pairs, np.int64)[row], change[row, pos, latent]
        own = np.full_like(pair, i)
        changes.append(Changes(own, pair, pos, latent, size.astype(np.float32)))
    return changes
