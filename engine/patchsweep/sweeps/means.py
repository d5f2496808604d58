"""Means stored beside a store: the first process of a run computes them, the others read them.

A file `<store>.means/<reader>-<digest>.safetensors` holds the means of all sites of a run and their
provenance: the model with every byte of its weights, the prompts' tokens, what the mean averages
over, and the versions of the libraries. The digest in its name is that of the provenance, so runs
with other prompts or weights have their own files and never replace one that another run may need.
A file also holds a digest of its means: a damaged file is computed anew, and a file whose name and
provenance disagree is refused.

Writes are atomic and the first file stays, so two processes that start at once use the same means.
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

from patchsweep.errors import StoreError
from patchsweep.models.compute import name_of
from patchsweep.spec.interventions import Mean, MeanKey, Prompts, Reader
from patchsweep.spec.spec import Request
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.base import PARTIAL, Folder
from patchsweep.sweeps.identity import model_identity, versions

FORMAT = 2
SUFFIX = ".means"
_TOLD = "patchsweep"  # the only key of the file's metadata, since the order of several is random


@dataclass(frozen=True)
class MeansFolder:
    """The folder beside a store with the means of a run's interventions."""

    url: str  # of the store
    storage_options: Mapping[str, Any] | None  # of the store
    model: Mapping[str, Any]  # `identity.model_identity`

    def get(
        self,
        per: str,
        prompts: Sequence[Prompts],
        reader: Reader,
        compute: Callable[[], dict[MeanKey, Tensor]],
    ) -> dict[MeanKey, Tensor]:
        """Return the stored means; if there are none, store and return those of `compute`.

        Raises:
            StoreError: a file's name and provenance disagree, or the storage fails.
        """
        provenance = self._provenance(per, prompts, reader)
        key = _file_of(provenance)
        folder = open_folder(self.url, self.storage_options).beside(SUFFIX)
        device = prompts[0].tokens.device
        kept = self._read(folder, key, provenance, device)
        if kept is not None:
            return kept
        tensors = {_text(key): mean.cpu().contiguous() for key, mean in compute().items()}
        metadata = {_TOLD: _text({"provenance": provenance, "digest": _digest(tensors)})}
        folder.make()
        folder.sweep()
        data = save(tensors, metadata)
        is_new = folder.put_new(key, data)  # False: another process was first
        if not is_new and self._read(folder, key, provenance, device) is None:
            folder.put(key, data)  # replaces a damaged file
        kept = self._read(folder, key, provenance, device)
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
        content = _read(folder.read(key))
        if content is None:
            return None
        stored, means = content
        if stored != provenance:
            differs = next(
                k for k in {**provenance, **stored} if stored.get(k) != provenance.get(k)
            )
            raise StoreError(
                f"{folder.shown}/{key} holds the means of something else ({differs} differs from "
                "this run's), though it has the name of this run's means; delete it and run the "
                "same command again"
            )
        return {_key(name): mean.to(device) for name, mean in means.items()}


def check_means(store: str | Path, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Return a line for each damaged or misplaced file of means beside `store`."""
    folder = open_folder(store, storage_options).beside(SUFFIX)
    problems = []
    for key in (key for key in folder.list() if not key.endswith(PARTIAL)):
        content = _read(folder.read(key))
        if content is None:
            problems.append(f"{key} is not as it was written; the same run computes it anew")
        elif key != _file_of(content[0]):
            problems.append(f"{key} holds the means of something else; delete it")
    return [f"{folder.shown}/{problem}" for problem in problems]


def keep_means(
    request: Request, store: str | Path, storage_options: Mapping[str, Any] | None
) -> Request:
    """Return `request` with an intervention that stores its means, if any, beside `store`."""
    if not isinstance(request.intervention, Mean):
        return request
    model = {
        **model_identity(request.bridge),
        "compute_dtype": name_of(request.compute_dtype),
    }
    folder = MeansFolder(str(store), storage_options, model)
    return replace(request, intervention=replace(request.intervention, kept=folder))


def _file_of(provenance: Mapping[str, Any]) -> str:
    """Return the name of the file for means of `provenance`."""
    digest = hashlib.sha256(_text(provenance).encode()).hexdigest()[:16]
    return f"{provenance.get('reader')}-{digest}.safetensors"


def _hash(prompts: Sequence[Prompts], *, spans: bool) -> str:
    """Hash all tokens in their order and groups, and the labels' spans if `spans`."""
    content = [
        [group.tokens.tolist(), [sorted(labels.items()) for labels in group.spans if spans]]
        for group in prompts
    ]
    return hashlib.sha256(_text(content).encode()).hexdigest()[:32]


def _read(data: bytes | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return provenance and means of a file; None if it is missing or damaged.

    The header is JSON after eight bytes that hold its length.
    """
    if data is None:
        return None
    try:
        (length,) = struct.unpack("<Q", data[:8])
        record = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_TOLD])
        provenance, means = record["provenance"], load(data)
        intact = isinstance(provenance, dict) and record["digest"] == _digest(means)
        for name in means:
            _key(name)
    except (SafetensorError, struct.error, KeyError, TypeError, ValueError, RecursionError):
        return None
    return (provenance, means) if intact else None


def _digest(means: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(means):
        mean = means[name]
        digest.update(f"{name} {mean.dtype} {tuple(mean.shape)} ".encode())
        digest.update(mean.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _key(text: str) -> MeanKey:
    """Parse a tensor's name, the inverse of `_text`."""
    site, layer, group = json.loads(text)
    return str(site), int(layer), group
