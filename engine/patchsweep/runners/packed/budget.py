"""How much memory a sweep may take: tokens of a packed batch, bytes of caches."""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.models.memory import free_memory, keep_freed_memory
from patchsweep.models.offload import device_of, is_offloaded

# tokens of a packed batch on a CPU whose memory holds the weights: from there on more of them gain
# nothing
CPU_TOKENS = 4096
# a GPU is busy with that many tokens at any width of a model; more of them gain nothing
GPU_TOKENS = 16384
# no packed batch is smaller, unless it is asked for
LEAST_TOKENS = 256
# shares of the memory that is free: the activations of one packed batch, the caches of a batch
WAVE_SHARE = 0.2
CACHE_SHARE = 0.3


def default_max_tokens(bridge: TransformerBridge) -> int:
    """Most tokens of one packed batch where nobody said how many.

    As many as keep the device busy and fit a share of its free memory; where weights are loaded for
    each packed batch as many as fit, since every further packed batch reads the weights again.
    """
    offloaded = is_offloaded(bridge.original_model)
    device = device_of(bridge)
    fitting = int(WAVE_SHARE * free_memory(device) / bytes_per_token(bridge))
    enough = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return max(LEAST_TOKENS, fitting if offloaded else min(enough, fitting))


def default_cache(bridge: TransformerBridge) -> int:
    """Bytes of activations that stay in memory where nobody said how many."""
    return int(CACHE_SHARE * free_memory(device_of(bridge)))


def keep_batch_memory(bridge: TransformerBridge) -> None:
    """Keep what one packed batch frees for the next one, where the model runs on a CPU that holds
    it."""
    device = device_of(bridge)
    if device.type == "cpu" and not is_offloaded(bridge.original_model):
        keep_freed_memory(int(WAVE_SHARE * free_memory(device)))


def bytes_per_token(bridge: TransformerBridge) -> int:
    """Bytes that one token of a packed batch takes at the widest place of a block, roughly."""
    cfg = bridge.cfg
    d_mlp = int(cfg.d_mlp or 4 * cfg.d_model)
    heads = int(cfg.n_heads) * int(cfg.d_head)
    # the stream, its norm, the residual sum; q, k, v and z; gate, up and their product; and fp32
    # copies, in which norms and attention are computed
    width = 4 * int(cfg.d_model) + 4 * heads + 3 * d_mlp
    return 4 * width
