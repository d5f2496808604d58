"""Memory budgets of a sweep: tokens of a packed batch, bytes of activation caches."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.models.memory import free_memory, keep_freed_memory
from patchsweep.models.offload import device_of, is_offloaded
from patchsweep.models.quantised import n_parameters

# tokens of a packed batch on a CPU with all weights in memory; larger batches are no faster
CPU_TOKENS = 4096
# On a GPU a block's products must take longer than the host needs to launch the next block, and
# than reading its weights does. These are assumptions about the fastest devices at hand, not
# measurements: products a second, and the host's seconds for one block.
GPU_FLOPS = {torch.float32: 6e13, torch.bfloat16: 8e14, torch.float16: 8e14}
BLOCK_SECONDS = 1e-3
# Fewest and most: with fewer the products of wide models lose speed, more are never needed.
GPU_TOKENS = 16384
MOST_GPU_TOKENS = 131072
# smallest default
LEAST_TOKENS = 256
# fractions of free memory: for the activations of one packed batch, and for activation caches
WAVE_SHARE = 0.2
CACHE_SHARE = 0.3


def default_max_tokens(bridge: TransformerBridge, dtype: torch.dtype | None = None) -> int:
    """Return the default of `max_tokens`, the most tokens of one packed batch.

    As many as keep the device busy and fit `WAVE_SHARE` of its free memory. With offloaded weights,
    as many as fit, since each packed batch reads all weights again. `dtype`: of activations; None:
    the bridge's.
    """
    dtype = dtype or bridge.cfg.dtype
    offloaded = is_offloaded(bridge.original_model)
    device = device_of(bridge)
    on_cpu = device.type == "cpu"
    per_token = bytes_per_token(bridge) if on_cpu else gpu_bytes_per_token(bridge, dtype)
    fitting = int(WAVE_SHARE * free_memory(device) / per_token)
    if not on_cpu:  # a power of two: a little more or less free memory gives the same batches
        fitting = 1 << max(0, fitting.bit_length() - 1)
    enough = CPU_TOKENS if on_cpu else gpu_tokens(bridge, dtype)
    return max(LEAST_TOKENS, fitting if offloaded else min(enough, fitting))


def gpu_tokens(bridge: TransformerBridge, dtype: torch.dtype) -> int:
    """Return the tokens whose products in one block hide the host's work on the next one."""
    wanted = launch_bound_tokens(bridge, dtype)
    return min(MOST_GPU_TOKENS, max(GPU_TOKENS, 1 << wanted.bit_length()))


def launch_bound_tokens(bridge: TransformerBridge, dtype: torch.dtype) -> int:
    """Return the tokens whose products in one block take as long as the host's work on it."""
    blocks = list(getattr(bridge, "blocks", ()))
    if not blocks:
        return 0
    weights = sum(n_parameters(block) for block in blocks) / len(blocks)
    return round(BLOCK_SECONDS * GPU_FLOPS.get(dtype, 6e13) / (2 * max(1.0, weights)))


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


def gpu_bytes_per_token(bridge: TransformerBridge, dtype: torch.dtype) -> int:
    """Estimate the same on a GPU, where norms and attention make no copies in fp32.

    Attention and MLP take their widest tensors one after the other.
    """
    cfg = bridge.cfg
    d_mlp = int(cfg.d_mlp or 4 * cfg.d_model)
    heads = int(cfg.n_heads) * int(cfg.d_head)
    return dtype.itemsize * (4 * int(cfg.d_model) + max(3 * d_mlp, 5 * heads))
