"""A digest of all weights of a model: every byte of every parameter and buffer.

Weights in CPU memory are hashed anew at each call, at about the speed of memory, because an edit
through `.data` or numpy leaves no other trace. Weights on a GPU are copied out and hashed once;
later calls compare a checksum over all bytes, computed on the GPU. Weights offloaded to disk are
hashed once per state (modification time and size) of their file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor, nn

from patchsweep.errors import ModelError
from patchsweep.models.offload import named_weights
from patchsweep.models.page_cache import extent_of

CHUNK_BYTES = 1 << 24  # per thread
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# model -> name of a weight -> (state at the time of hashing, digest)
_known: WeakKeyDictionary[nn.Module, dict[str, tuple[Hashable, str]]] = WeakKeyDictionary()
# model -> (stamp of all weights, their digest)
_stamped: WeakKeyDictionary[nn.Module, tuple[Hashable, str]] = WeakKeyDictionary()


def weights_digest(model: nn.Module) -> str:
    """Return 32 hex digits of the names, dtypes, shapes and bytes of all weights.

    The digest does not depend on where the weights are or how a bridge wraps their modules.
    """
    stamp = weights_stamp(model)
    total = xxhash.xxh3_128()
    known = _known.setdefault(model, {})
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, weight, file in _all_weights(model):
            state = _state(weight, file)
            if state is None:
                digest = _hash(weight, pool.map)
            elif name in known and known[name][0] == state:
                digest = known[name][1]
            else:
                digest = _hash(weight, pool.map)
                known[name] = (state, digest)
            total.update(f"{name} {digest}\n".encode())
    _stamped[model] = (stamp, total.hexdigest())
    return total.hexdigest()


def known_digest(model: nn.Module) -> str:
    """Return the last `weights_digest` of `model`, recomputed if torch counted an edit since."""
    stamp = weights_stamp(model)
    if stamp is not None and model in _stamped and _stamped[model][0] == stamp:
        return _stamped[model][1]
    return weights_digest(model)


def weights_stamp(model: nn.Module) -> Hashable:
    """Return the addresses of all weights and torch's count of edits to each.

    Edits by torch operations change the stamp; edits through `.data` or numpy do not. None if a
    tensor was made under `torch.inference_mode`, where torch does not count edits.
    """
    weights = (*model.parameters(), *model.buffers())
    if any(weight.is_inference() for weight in weights):
        return None
    return tuple((weight.data_ptr(), weight._version) for weight in weights)


def tensor_digest(tensor: Tensor) -> str:
    """Return 32 hex digits of the dtype, shape and bytes of a tensor."""
    return _hash(tensor, map)


def checksum(weight: Tensor) -> tuple[int, ...]:
    """Return two sums over all elements of `weight` as integers, computed on its device.

    One sum weights rows by their index, the other columns, so that swapped rows or columns change
    a sum too.
    """
    bits = weight.detach().contiguous().view(_INTEGERS[weight.element_size()])
    bits = bits.reshape(-1, weight.shape[-1] if weight.ndim > 1 else 1)
    sums = [bits.sum(dim, dtype=torch.int64) for dim in (0, 1)]
    weighted = [(s * torch.arange(1, len(s) + 1, device=s.device)).sum() for s in sums]
    return tuple(torch.stack(weighted).tolist())


def _all_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, str | None]]:
    """Yield (name in the Hugging Face model, values, file if offloaded to disk) per weight."""
    for name, weight, stored in named_weights(model):
        extent = None if stored is None else extent_of(stored, name.rpartition(".")[2])
        yield _plain(name), weight, None if extent is None else extent.file
    moving = {f"{name}.{buffer}" for name, m in model.named_modules() for buffer in _moving(m)}
    for name, buffer in model.named_buffers():
        if name not in moving and not buffer.is_meta:
            yield _plain(name), buffer, None


def _plain(name: str) -> str:
    return name.replace("_original_component.", "")


def _moving(module: nn.Module) -> list[str]:
    """Return buffers that a forward pass rewrites: rotary frequencies that depend on length."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        named = {f"{layer_type}_inv_freq": kind for layer_type, kind in kinds.items()}
    else:
        named = {"inv_freq": kinds}
    return [name for name, kind in named.items() if kind == "longrope" or "dynamic" in str(kind)]


def _state(weight: Tensor, file: str | None) -> Hashable:
    """Return a key that changes with the weight; None in CPU memory, where only hashing tells."""
    if file is not None:
        stat = os.stat(file)
        return file, stat.st_mtime_ns, stat.st_size
    if weight.device.type == "cpu":
        return None
    return weight.dtype, weight.shape, checksum(weight)


def _hash(weight: Tensor, each: Callable[..., Iterator[bytes]]) -> str:
    """Hash one weight; `each` is a `map`, serial or threaded, for hashing chunks."""
    try:
        data = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    except NotImplementedError as error:
        raise ModelError(
            f"weights of the class {type(weight.detach()).__name__} cannot be read as bytes, by "
            "which a run knows its model; load it without this quantisation"
        ) from error
    chunks = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    total = xxhash.xxh3_128(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    for part in each(xxhash.xxh3_128_digest, chunks):
        total.update(part)
    return total.hexdigest()
