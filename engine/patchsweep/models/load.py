"""`load_model`: one name in, one `TransformerBridge` in evaluation mode out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from patchsweep.errors import ModelError
from patchsweep.models.embedded import EMBEDDED, embedded_folder
from patchsweep.models.gguf import dequantised_folder
from patchsweep.models.tiny import TINY_FAMILIES, tiny_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "float32",
    device_map: str | dict[str, str | int] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """The model called `name`, wrapped by TransformerLens, in evaluation mode.

    `name` is `smollm2-135m` (embedded, no download), `tiny:<family>` (random weights,
    no download), a GGUF file, a local folder, or a Hugging Face name. `device_map` places
    the layers of a model that does not fit one device (accelerate); it excludes `device`.
    Code from the model's repository runs only with `trust_remote_code=True`.

    Raises:
        ModelError: the model, its file or its family is unknown, or `dtype` is.
    """
    torch_dtype = as_dtype(dtype)
    if device is not None and device_map is not None:
        raise ModelError(
            f"device={device!r} and device_map={device_map!r} exclude each other; give one"
        )
    if device is None and device_map is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"

    if name.startswith("tiny:"):
        family = name.removeprefix("tiny:")
        if family not in TINY_FAMILIES:
            known = ", ".join(sorted(TINY_FAMILIES))
            raise ModelError(f"tiny family {family!r} is not known; use one of {known}")
        hf_model, tokenizer = tiny_model(family)
        hf_model.to(device=device, dtype=torch_dtype)
        return as_bridge(name.replace(":", "-"), hf_model, tokenizer)

    source: str = name
    if name in EMBEDDED:
        source = str(embedded_folder(name))
    elif name.endswith(".gguf"):
        source = str(dequantised_folder(Path(name)))
    elif name.startswith((".", "/", "~")) or Path(name).is_dir():
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{name!r} holds no config.json, so it is not a model folder; "
                "give the folder that save_pretrained wrote"
            )
        source = str(folder)
    return _pretrained(
        source,
        name=name,
        device=device,
        dtype=torch_dtype,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name such as `float32`; a torch dtype passes through."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _pretrained(
    source: str,
    *,
    name: str,
    device: str | None,
    dtype: torch.dtype,
    device_map: str | dict[str, str | int] | None,
    revision: str | None,
    trust_remote_code: bool,
) -> TransformerBridge:
    local = os.path.isdir(source)
    common: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "local_files_only": local,
    }
    try:
        # attention layers that the bridge rebuilds need the start token which the model was
        # trained with; tokenizers saved by hand often forget to add it
        tokenizer = AutoTokenizer.from_pretrained(source, add_bos_token=True, **common)
        hf_model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map=device_map, attn_implementation="eager", **common
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {name!r} could not be loaded: {error}. Use 'smollm2-135m' (embedded), "
            f"'tiny:<family>', a GGUF file, a local folder, or a Hugging Face name that is "
            "cached or reachable"
        ) from error
    if device is not None:
        hf_model.to(device)
    return as_bridge(name, hf_model, tokenizer)


def as_bridge(name: str, hf_model: PreTrainedModel, tokenizer: Any) -> TransformerBridge:
    """`hf_model` wrapped by TransformerLens, in evaluation mode."""
    hf_model.eval()
    bridge = TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=tokenizer)
    bridge.eval()
    return bridge
