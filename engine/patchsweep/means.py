"""Means kept beside a store: computed by the first process of a run, read by all others.

A file `<store>.means/<reader>-<digest>.safetensors` holds the means of every site of a run and
says of what they were made: the model with every byte of its weights, the prompts' tokens, over
what the mean was taken, the versions of the libraries. The digest in its name is that of this
provenance, so other prompts or weights never find the file and never replace it, which a run in
progress may still need; they make their own. A file whose name and content disagree is damaged and
refused.

Files are put whole and the first one stays: of two processes that start at once, both go on with
the same means, whichever was first.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from patchsweep.compute import name_of
from patchsweep.errors import StoreError
from patchsweep.identity import model_identity, versions
from patchsweep.interventions import Mean, MeanKey, Prompts, Reader
from patchsweep.request import Request
from patchsweep.store.address import open_folder
from patchsweep.store.folder import Folder

FORMAT = 2
SUFFIX = ".means"
_PROVENANCE = "provenance"  # key of the file's metadata


@dataclass(frozen=True)
class MeansFolder:
    """The means of a run's interventions, beside its store."""

    url: str  # the store's
    storage_options: Mapping[str, Any] | None  # the store's
    model: Mapping[str, Any]  # `identity.model_identity`

    def get(
        self,
        per: str,
        prompts: Sequence[Prompts],
        reader: Reader,
        compute: Callable[[], dict[MeanKey, Tensor]],
    ) -> dict[MeanKey, Tensor]:
        """The kept means; what `compute` gives, now kept, if there are none yet.

        Raises:
            StoreError: a file is damaged, or the storage fails.
        """
        provenance = self._provenance(per, prompts, reader)
        digest = hashlib.sha256(_text(provenance).encode()).hexdigest()[:16]
        key = f"{reader.name}-{digest}.safetensors"
        folder = open_folder(self.url.rstrip("/") + SUFFIX, self.storage_options)
        device = prompts[0].tokens.device
        kept = self._read(folder, key, provenance, device)
        if kept is not None:
            return kept
        tensors = {_text(key): mean.cpu().contiguous() for key, mean in compute().items()}
        folder.make()
        folder.sweep()
        folder.put_new(key, save(tensors, {_PROVENANCE: _text(provenance)}))
        kept = self._read(folder, key, provenance, device)  # another process may have been first
        if kept is None:
            raise StoreError(f"{folder.shown} has lost {key}; run the same command again")
        return kept

    def _provenance(self, per: str, prompts: Sequence[Prompts], reader: Reader) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "versions": versions(),
            "model": dict(self.model),
            "per": per,
            "reader": reader.name,
            "sites": {site.name: site.hook for site in reader.sites},
            "n_prompts": sum(len(group.tokens) for group in prompts),
            "prompts": _hash(prompts, spans=per == "label"),
        }

    @staticmethod
    def _read(
        folder: Folder, key: str, provenance: Mapping[str, Any], device: torch.device
    ) -> dict[MeanKey, Tensor] | None:
        data = folder.read(key)
        if data is None:
            return None
        remedy = "delete it and run the same command again"
        try:
            found = _provenance_of(data)
            means = {_key(name): mean.to(device) for name, mean in load(data).items()}
        except (SafetensorError, struct.error, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{folder.shown}/{key} cannot be read; {remedy}") from error
        if found != provenance:
            differs = next(k for k in {**provenance, **found} if found.get(k) != provenance.get(k))
            raise StoreError(
                f"{folder.shown}/{key} holds the means of something else ({differs} differs from "
                f"this run's), though it has the name of this run's means; {remedy}"
            )
        return means


def keep_means(
    request: Request, store: str | Path, storage_options: Mapping[str, Any] | None
) -> Request:
    """`request`, with an intervention that keeps its means beside `store`, if it has any."""
    if not isinstance(request.intervention, Mean):
        return request
    model = {
        **model_identity(request.bridge),
        "compute_dtype": name_of(request.compute_dtype),
    }
    folder = MeansFolder(str(store), storage_options, model)
    return replace(request, intervention=replace(request.intervention, kept=folder))


def _hash(prompts: Sequence[Prompts], *, spans: bool) -> str:
    """A hash of all tokens, in their order and groups; of the labels' spans where they matter."""
    content = [
        [group.tokens.tolist(), [sorted(labels.items()) for labels in group.spans if spans]]
        for group in prompts
    ]
    return hashlib.sha256(_text(content).encode()).hexdigest()[:32]


def _provenance_of(data: bytes) -> dict[str, Any]:
    """What a file says of itself: its header is JSON behind eight bytes that give its length."""
    (length,) = struct.unpack("<Q", data[:8])
    found: dict[str, Any] = json.loads(
        json.loads(data[8 : 8 + length])["__metadata__"][_PROVENANCE]
    )
    return found


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _key(text: str) -> MeanKey:
    """What `_text` made a tensor's name of."""
    site, layer, which = json.loads(text)
    return str(site), int(layer), which
