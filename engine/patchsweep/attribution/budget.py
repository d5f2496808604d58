"""How many rows one differentiable pass holds: its graph keeps the activations of every block."""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.models.offload import device_of

# bytes of activations that the graph of one pass may keep. A constant, since sums of other parts
# have other last bits, and a resumed run must write the same bytes
CPU_BYTES = 2 * 2**30
GPU_BYTES = 16 * 2**30


def token_layers_per_pass(bridge: TransformerBridge, length: int) -> int:
    """Return the tokens times blocks of one pass, for prompts of `length` tokens."""
    budget = CPU_BYTES if device_of(bridge).type == "cpu" else GPU_BYTES
    return max(1, budget // bytes_per_token_layer(bridge, length))


def bytes_per_token_layer(bridge: TransformerBridge, length: int) -> int:
    """Estimate the bytes that autograd keeps of one token in one block."""
    cfg = bridge.cfg
    heads = int(cfg.n_heads) * int(cfg.d_head)
    d_mlp = int(cfg.d_mlp or 4 * cfg.d_model)
    # the stream, two norms with their fp32 copies and squares; q, k, v before and after rotary and
    # z; gate, its activation, up and their product; scores, pattern and its copy for the values
    width = 12 * int(cfg.d_model) + 8 * heads + 5 * d_mlp + 3 * int(cfg.n_heads) * length
    return 4 * width
