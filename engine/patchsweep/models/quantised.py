"""Quantised models: their modules with packed weights, and checks of what these cannot do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import ConfigError, MethodError, ModelError

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# names of the buffers in which some libraries keep packed weights
_PACKED_BUFFERS = ("qweight", "weight_packed", "W_q")


@dataclass(frozen=True)
class Packed:
    """A module with packed (quantised) weights."""

    name: str
    kind: str  # name of its class
    dtype: torch.dtype  # dtype of the stored weights

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} is a {self.kind} with packed weights ({dtype})"


def first_packed(bridge: TransformerBridge) -> Packed | None:
    """Return the first module with quantised weights; None if the model is not quantised."""
    packed = (_packed(name, module) for name, module in bridge.original_model.named_modules())
    return next((module for module in packed if module is not None), None)


def _packed(name: str, module: nn.Module) -> Packed | None:
    stored = [p.dtype for p in module._parameters.values() if p is not None]
    stored += [
        b.dtype for key, b in module._buffers.items() if b is not None and key in _PACKED_BUFFERS
    ]
    packed_dtypes = [dtype for dtype in stored if dtype not in PLAIN]
    return Packed(_plain(name), type(module).__name__, packed_dtypes[0]) if packed_dtypes else None


def keep_portable(model: nn.Module) -> None:
    """Keep 4-bit weights of bitsandbytes in the layout that every machine multiplies in full.

    On a CPU with instructions for bf16, the first forward pass would turn them for good into one
    whose products are in bf16, depend on the number of rows (FP4), and have no gradient.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_gradients(bridge: TransformerBridge) -> None:
    """Check that gradients pass through the packed modules, by a trial of one module of each class.

    A kernel without a backward pass gives a constant. The gradient of a metric would still come
    through the residual stream, and lack what the module does.

    Raises:
        MethodError: a module of a class gives no gradient, or the width of its input is not known.
    """
    tried: set[type[nn.Module]] = set()
    for name, module in bridge.original_model.named_modules():
        packed = _packed(name, module)
        if packed is None or type(module) in tried:
            continue
        tried.add(type(module))
        width = getattr(module, "in_features", getattr(module, "infeatures", None))
        if not isinstance(width, int) or not _gives_gradient(module, width, bridge.cfg.dtype):
            remedy = "load the model with dtype=bfloat16 or float32, or in NF4, or use method=exact"
            if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
                # of bitsandbytes: a forward pass turned it into a layout without gradients
                remedy = "load it by load_model before it runs, or use method=exact"
            raise MethodError(
                f"{packed}, whose code gives no gradient, so attribution would lack what it does; "
                f"{remedy}"
            )


def _gives_gradient(module: nn.Module, width: int, dtype: torch.dtype) -> bool:
    weights = (*module.parameters(), *module.buffers())
    with torch.enable_grad():
        x = torch.ones(1, width, dtype=dtype, device=weights[0].device, requires_grad=True)
        output = module(x)
        if not output.requires_grad:
            return False
        try:
            (gradient,) = torch.autograd.grad(output.float().sum(), x)
        except (RuntimeError, NotImplementedError):  # its backward pass says that there is none
            return False
    return bool(gradient.any())


def _plain(name: str) -> str:
    """Return a module's name in the Hugging Face model, without the bridge's wrappers."""
    return name.replace("_original_component.", "").removesuffix("._original_component")


def check_each_row(bridge: TransformerBridge) -> None:
    """Check that each row of a batch is computed independently of the others.

    Raises:
        ModelError: LLM.int8 looks for outlier columns over all rows of a batch.
    """
    for name, module in bridge.original_model.named_modules():
        if type(module).__name__ != "Linear8bitLt":
            continue
        state = getattr(module, "state", None)
        if float(getattr(state, "threshold", math.inf)) > 0:
            raise ModelError(
                f"{_plain(name)} is a Linear8bitLt, which looks for "
                "outlier columns over all rows of a batch: a patch's value would depend on the "
                "patches that share its batch, so no value is exact; load the model in NF4, in "
                "bfloat16, or with llm_int8_threshold=0"
            )


def casts_attention(bridge: TransformerBridge) -> tuple[int, torch.dtype] | None:
    """Return the first block whose attention output the bridge casts to 8 bits, and the dtype.

    None if there is no such block. Such a bridge cannot run; the modules inside it can.
    """
    for layer, block in enumerate(getattr(bridge, "blocks", ())):
        o = getattr(getattr(block, "attn", None), "o", None)
        weight = getattr(getattr(o, "original_component", None), "weight", None)
        dtype = weight.dtype if isinstance(weight, torch.Tensor) else torch.float32
        if dtype.is_floating_point and dtype not in PLAIN:
            return layer, dtype
    return None


def check_hooks(bridge: TransformerBridge) -> None:
    """Check that the bridge, whose hooks the hooked runner uses, can run.

    Raises:
        ConfigError: it casts the output of attention to 8 bits.
    """
    cast = casts_attention(bridge)
    if cast is not None:
        raise ConfigError(
            f"the weights behind block {cast[0]}'s attention are {cast[1]}, to which the bridge "
            "casts what attention gives, so its hooks cannot run this model; use runner=packed"
        )


def n_parameters(block: nn.Module) -> int:
    """Count the weights of a block; a quantised linear layer counts its unquantised weights."""
    total = 0
    for module in block.modules():
        own = {name: p.numel() for name, p in module._parameters.items() if p is not None}
        if isinstance(module, nn.Linear):
            total += module.in_features * module.out_features + own.get("bias", 0)
        else:
            total += sum(own.values())
    return total
