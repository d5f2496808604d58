"""One digest of all weights of a model: every byte of every parameter and buffer.

Where numbers are kept, weights in memory are hashed anew each time, at about the speed of memory:
an edit in place through `.data` or numpy leaves no other mark. Weights on a GPU are copied out and
hashed once; afterwards a checksum made on the GPU, over all bytes, tells whether they are still the
same. Weights that rest on disk are hashed once for each state of their file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor, nn

from patchsweep.models.offload import named_weights
from patchsweep.models.page_cache import extent_of

CHUNK_BYTES = 1 << 24  # hashed by one thread
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# model -> name of a weight -> (state in which it was hashed, its digest)
_known: WeakKeyDictionary[nn.Module, dict[str, tuple[Hashable, str]]] = WeakKeyDictionary()
# model -> (stamp of all weights, their digest)
_stamped: WeakKeyDictionary[nn.Module, tuple[Hashable, str]] = WeakKeyDictionary()


def weights_digest(model: nn.Module) -> str:
    """32 hex digits that follow from the names, dtypes, shapes and bytes of all weights.

    They are the same wherever the weights are, and however a bridge wraps their modules.
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
    """The last `weights_digest` of `model`, made anew where torch has counted an edit since."""
    stamp = weights_stamp(model)
    if stamp is not None and model in _stamped and _stamped[model][0] == stamp:
        return _stamped[model][1]
    return weights_digest(model)


def weights_stamp(model: nn.Module) -> Hashable:
    """Where all weights are and how often each was edited, as far as torch counts that.

    Edits by torch operations change it, those through `.data` or numpy do not. None for tensors
    made under `torch.inference_mode`, whose edits are not counted.
    """
    weights = (*model.parameters(), *model.buffers())
    if any(weight.is_inference() for weight in weights):
        return None
    return tuple((weight.data_ptr(), weight._version) for weight in weights)


def tensor_digest(tensor: Tensor) -> str:
    """32 hex digits that follow from the dtype, shape and bytes of a tensor."""
    return _hash(tensor, map)


def checksum(weight: Tensor) -> tuple[int, ...]:
    """Two sums over all bits of `weight`, made on its device.

    Rows are weighted by their number in one, columns in the other, so that rows or columns that
    change places are noticed too.
    """
    bits = weight.detach().contiguous().view(_INTEGERS[weight.element_size()])
    bits = bits.reshape(-1, weight.shape[-1] if weight.ndim > 1 else 1)
    sums = [bits.sum(dim, dtype=torch.int64) for dim in (0, 1)]
    weighted = [(s * torch.arange(1, len(s) + 1, device=s.device)).sum() for s in sums]
    return tuple(torch.stack(weighted).tolist())


def _all_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, str | None]]:
    """Name, values and, of weights that rest on disk, the file; names are the plain model's."""
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
    """Buffers that a forward pass sets anew: rotary frequencies that follow the prompt's length."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        named = {f"{layer_type}_inv_freq": kind for layer_type, kind in kinds.items()}
    else:
        named = {"inv_freq": kinds}
    return [name for name, kind in named.items() if kind == "longrope" or "dynamic" in str(kind)]


def _state(weight: Tensor, file: str | None) -> Hashable:
    """What an earlier digest can be told by; None: by nothing, the bytes are hashed anew."""
    if file is not None:
        stat = os.stat(file)
        return file, stat.st_mtime_ns, stat.st_size
    if weight.device.type == "cpu":
        return None
    return weight.dtype, weight.shape, checksum(weight)


def _hash(weight: Tensor, each: Callable[..., Iterator[bytes]]) -> str:
    """The digest of one weight; `each` maps a function over chunks, in several threads or not."""
    data = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    chunks = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    total = xxhash.xxh3_128(f"{weight.dtype} {tuple(weight.shape)} ".encode())
    for part in each(xxhash.xxh3_128_digest, chunks):
        total.update(part)
    return total.hexdigest()
