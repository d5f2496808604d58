"""Means kept beside a store: computed by the first process of a run, read by all others.

A file `<store>.means/<reader>-<digest>.safetensors` holds the means of every site of a run and
says of what they were made: the model with every byte of its weights, the prompts' tokens, over
what the mean was taken, the versions of the libraries. The digest in its name is that of this
provenance, so other prompts or weights never find the file and never replace it, which a run in
progress may still need; they make their own. A file also holds a digest of its means: one that is
damaged is computed anew, and one whose name and provenance disagree is refused.

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

from patchsweep.errors import StoreError
from patchsweep.models.compute import name_of
from patchsweep.spec.interventions import Mean, MeanKey, Prompts, Reader
from patchsweep.spec.spec import Request
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.base import PARTIAL, Folder
from patchsweep.sweeps.identity import model_identity, versions

FORMAT = 2
SUFFIX = ".means"
_TOLD = "patchsweep"  # one key of the file's metadata: of several, the order would be by chance


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
        if not folder.put_new(key, data := save(tensors, metadata)):
            kept = self._read(folder, key, provenance, device)  # another process was first
            if kept is not None:
                return kept
            folder.put(key, data)  # in place of a damaged one
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
        found = _read(folder.read(key))
        if found is None:
            return None
        told, means = found
        if told != provenance:
            differs = next(k for k in {**provenance, **told} if told.get(k) != provenance.get(k))
            raise StoreError(
                f"{folder.shown}/{key} holds the means of something else ({differs} differs from "
                "this run's), though it has the name of this run's means; delete it and run the "
                "same command again"
            )
        return {_key(name): mean.to(device) for name, mean in means.items()}


def check_means(store: str | Path, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """A line for each file of means beside `store` that is not as it was written."""
    folder = open_folder(store, storage_options).beside(SUFFIX)
    problems = []
    for key in (key for key in folder.list() if not key.endswith(PARTIAL)):
        found = _read(folder.read(key))
        if found is None:
            problems.append(f"{key} is not as it was written; the same run computes it anew")
        elif key != _file_of(found[0]):
            problems.append(f"{key} holds the means of something else; delete it")
    return [f"{folder.shown}/{problem}" for problem in problems]


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


def _file_of(provenance: Mapping[str, Any]) -> str:
    """The name of the file that holds means of `provenance`."""
    digest = hashlib.sha256(_text(provenance).encode()).hexdigest()[:16]
    return f"{provenance.get('reader')}-{digest}.safetensors"


def _hash(prompts: Sequence[Prompts], *, spans: bool) -> str:
    """A hash of all tokens, in their order and groups; of the labels' spans where they matter."""
    content = [
        [group.tokens.tolist(), [sorted(labels.items()) for labels in group.spans if spans]]
        for group in prompts
    ]
    return hashlib.sha256(_text(content).encode()).hexdigest()[:32]


def _read(data: bytes | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Provenance and means of a file; None if there is none, or not what was written.

    Its header is JSON behind eight bytes that give the header's length.
    """
    if data is None:
        return None
    try:
        (length,) = struct.unpack("<Q", data[:8])
        told = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_TOLD])
        provenance, means = told["provenance"], load(data)
        intact = isinstance(provenance, dict) and told["digest"] == _digest(means)
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
    """What `_text` made a tensor's name of."""
    site, layer, which = json.loads(text)
    return str(site), int(layer), which
