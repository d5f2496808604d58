"""Memory budgets of a sweep: tokens of a packed batch, bytes of activation caches."""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.models.memory import free_memory, keep_freed_memory
from patchsweep.models.offload import device_of, is_offloaded

# tokens of a packed batch on a CPU with all weights in memory; larger batches are no faster
CPU_TOKENS = 4096
# tokens that keep a GPU busy for models of any width; larger batches are no faster
GPU_TOKENS = 16384
# smallest default
LEAST_TOKENS = 256
# fractions of free memory: for the activations of one packed batch, and for activation caches
WAVE_SHARE = 0.2
CACHE_SHARE = 0.3


def default_max_tokens(bridge: TransformerBridge) -> int:
    """Return the default of `max_tokens`, the most tokens of one packed batch.

    As many as keep the device busy and fit `WAVE_SHARE` of its free memory. With offloaded weights,
    as many as fit, since each packed batch reads all weights again.
    """
    offloaded = is_offloaded(bridge.original_model)
    device = device_of(bridge)
    fitting = int(WAVE_SHARE * free_memory(device) / bytes_per_token(bridge))
    enough = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return max(LEAST_TOKENS, fitting if offloaded else min(enough, fitting))


def default_cache(bridge: TransformerBridge) -> int:
    """Return the default of `cache_budget`, the bytes of activations that stay in memory."""
    return int(CACHE_SHARE * free_memory(device_of(bridge)))


def keep_batch_memory(bridge: TransformerBridge) -> None:
    """Keep memory that one packed batch frees for the next one; CPU without offloading only."""
    device = device_of(bridge)
    if device.type == "cpu" and not is_offloaded(bridge.original_model):
        keep_freed_memory(int(WAVE_SHARE * free_memory(device)))


def bytes_per_token(bridge: TransformerBridge) -> int:
    """Estimate the bytes that one token of a packed batch takes at the widest point of a block."""
    cfg = bridge.cfg
    d_mlp = int(cfg.d_mlp or 4 * cfg.d_model)
    heads = int(cfg.n_heads) * int(cfg.d_head)
    # the stream, its norm, the residual sum; q, k, v and z; gate, up and their product; and the
    # fp32 copies of norms and attention
    width = 4 * int(cfg.d_model) + 4 * heads + 3 * d_mlp
    return 4 * width
