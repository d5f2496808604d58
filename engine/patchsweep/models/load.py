"""`load_model`: loads a model by name as a `TransformerBridge` in evaluation mode."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from patchsweep.arguments import true_or_false, user_path
from patchsweep.errors import ModelError
from patchsweep.models.device_map import (
    DeviceMap,
    MaxMemory,
    Placement,
    as_placement,
    choose_device,
)
from patchsweep.models.gguf import BUNDLED, bundled_folder, dequantised_folder
from patchsweep.models.memory import is_out_of_memory
from patchsweep.models.meta import meta_bridge
from patchsweep.models.offload import is_offloaded, main_device
from patchsweep.models.page_cache import forget_after_use
from patchsweep.models.quantised import casts_attention, check_each_row, keep_portable
from patchsweep.models.tiny import TINY_FAMILIES, tiny_model
from patchsweep.models.wrapping import check_same, compare_wrapping, logits_of, prompts_of, settle

_MERGE = (
    "An adapter is no model by itself; merge it into its base model first, with "
    "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), and give "
    "that folder"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "float32",
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Load the model called `name`, wrapped by TransformerLens, in evaluation mode.

    `name` is `smollm2-135m` (bundled, no download), `tiny:<family>` (random weights,
    no download), a GGUF file, a local folder, or a Hugging Face name. Code from the model's
    repository runs only with `trust_remote_code=True`.

    `accelerate` places a model that does not fit one device: `device_map` is `auto`, `balanced`,
    `balanced_low_0`, `sequential`, or a mapping from module names to GPU numbers, `cpu` and `disk`;
    it excludes `device`. `max_memory` limits what the named maps may fill, such as
    `{0: "60GiB", "cpu": "100GiB"}`; default: most of the free memory. Weights that stay on disk
    are read from the model's safetensors files; `offload_folder` holds those that must be rewritten
    first (other formats, fused experts).

    Raises:
        ModelError: the model, its file, its family or `dtype` is unknown, or the weights cannot be
            placed as `device_map` says.
    """
    placement = as_placement(device_map, max_memory, offload_folder)
    return _load(name, device, dtype, placement, revision, trust_remote_code, weights=True)


def meta_model(
    name: str,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "float32",
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Return the model of `load_model` for plans, without weights if the architecture allows it.

    Raises:
        ModelError: as `load_model`.
    """
    placement = as_placement(device_map, max_memory, offload_folder)
    return _load(name, device, dtype, placement, revision, trust_remote_code, weights=False)


def _load(
    name: str,
    device: str | None,
    dtype: str | torch.dtype,
    placement: Placement | None,
    revision: str | None,
    trust_remote_code: bool,
    *,
    weights: bool,
) -> TransformerBridge:
    if not isinstance(name, str) or not name.strip():
        raise ModelError(
            f"model name {name!r} must be a text: a Hugging Face name, a folder, a GGUF file, "
            "'smollm2-135m' or 'tiny:<family>'"
        )
    if revision is not None and not isinstance(revision, str):
        raise ModelError(f"revision={revision!r} must be a text, such as 'main'")
    true_or_false("trust_remote_code", trust_remote_code, error=ModelError)
    device, dtype = choose_device(device, placement), as_dtype(dtype)
    if name.startswith("tiny:"):
        return _tiny(name, device, dtype, placement)
    source = _source_of(name)
    common: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "local_files_only": os.path.isdir(source),
    }
    try:
        # the model was trained with a start token; tokenizers saved by hand often do not add it
        tokenizer = AutoTokenizer.from_pretrained(source, add_bos_token=True, **common)
        if not weights:
            bridge = meta_bridge(name, source, tokenizer, device, dtype, placement, common)
            if bridge is not None:
                return bridge
        placed = {} if placement is None else placement.arguments()
        hf_model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="eager", **placed, **common
        )
    except (ImportError, RuntimeError) as error:  # of a library that packs weights
        if not _is_quantised(source, common) or is_out_of_memory(error):
            raise
        raise ModelError(
            f"the quantised weights of {name!r} need what is not here: {str(error).rstrip('.')}; "
            "use weights that are not quantised, or quantised by bitsandbytes"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model {name!r} could not be loaded: {str(error).rstrip('.')}; use "
            "'smollm2-135m' (embedded), 'tiny:<family>', a GGUF file, a local folder, or a Hugging "
            "Face name that is cached or reachable"
        ) from error
    if getattr(hf_model, "_hf_peft_config_loaded", False):  # an adapter by Hugging Face name
        raise ModelError(f"model {name!r} is an adapter of PEFT. {_MERGE}")
    if device is not None:
        hf_model.to(device)
    return as_bridge(name, hf_model, tokenizer)


def _tiny(
    name: str, device: str | None, dtype: torch.dtype, placement: Placement | None
) -> TransformerBridge:
    family = name.removeprefix("tiny:")
    if family not in TINY_FAMILIES:
        known = ", ".join(sorted(TINY_FAMILIES))
        raise ModelError(f"tiny family {family!r} is not known; use one of {known}")
    if placement is not None:
        raise ModelError(f"device_map is for models of files; {name} fits any device: use device")
    hf_model, tokenizer = tiny_model(family)
    hf_model.to(device=device, dtype=dtype)
    return as_bridge(name.replace(":", "-"), hf_model, tokenizer)


def _source_of(name: str) -> str:
    """Return the folder or Hugging Face name that `name` refers to."""
    if name in BUNDLED:
        return str(bundled_folder(name))
    if name.endswith(".gguf"):
        return str(dequantised_folder(Path(name)))
    if name.startswith((".", "/", "~")) or Path(name).exists():
        return str(_checked_folder(name, user_path(name)))
    return name


def _checked_folder(name: str, folder: Path) -> Path:
    """Return `folder` unchanged if it holds a complete model; `name` is what the user wrote."""
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "does not exist"
        raise ModelError(
            f"model {name!r} {reason}; give a folder that save_pretrained wrote, or a .gguf file"
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{name!r} holds an adapter of PEFT. {_MERGE}")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{name!r} holds no config.json, so it is not a model folder; "
            "give the folder that save_pretrained wrote"
        )
    return folder


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of a name such as `float32`; a torch dtype is returned unchanged.

    Raises:
        ModelError: the name is not a key of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _is_quantised(source: str, common: Mapping[str, Any]) -> bool:
    """Whether the configuration of the model in `source` says that its weights are quantised."""
    config = AutoConfig.from_pretrained(source, **common)
    return getattr(config, "quantization_config", None) is not None


def as_bridge(name: str, hf_model: PreTrainedModel, tokenizer: Any) -> TransformerBridge:
    """Wrap `hf_model` by TransformerLens, in evaluation mode.

    Raises:
        ModelError: the bridge and `hf_model` compute different logits, or TransformerLens cannot
            wrap its quantised weights.
    """
    hf_model.eval()
    keep_portable(hf_model)
    # the bridge records its own default dtype unless it gets the model's
    arguments = {"hf_model": hf_model, "tokenizer": tokenizer, "dtype": hf_model.dtype}
    if is_offloaded(hf_model):
        return _offloaded_bridge(name, hf_model, arguments)
    prompts = prompts_of(hf_model.config.get_text_config().vocab_size, tokenizer)
    own = logits_of(hf_model, prompts, hf_model.get_input_embeddings().weight.device)
    try:
        bridge = TransformerBridge.boot_transformers(name, **arguments)
    except NotImplementedError as error:  # q, k and v in one quantised matrix
        if getattr(hf_model, "hf_quantizer", None) is None:
            raise
        reason = str(error).partition(". ")[0]
        raise ModelError(f"{reason}; load {name} without quantisation") from error
    mapped = getattr(hf_model, "hf_device_map", None)
    settle(bridge, bridge.cfg.device if mapped else hf_model.device)
    if casts_attention(bridge) is None:
        wrapping = compare_wrapping(bridge, prompts, own)
        if not wrapping.same:
            check_each_row(bridge)  # then the two differ in what shares a batch
        check_same(bridge, wrapping)
    return bridge


def _offloaded_bridge(
    name: str, hf_model: PreTrainedModel, arguments: dict[str, Any]
) -> TransformerBridge:
    # oneDNN caches up to 1024 matrix products, about 1 MB each, and each layer of a packed batch
    # has new shapes: an offloaded model's process lacks the memory for this cache
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # hide the device map: from one with offloaded weights the bridge would take the embedding's
    # device as the device of the tokens, and refuse GPUs; its components run where accelerate's do
    device = main_device(hf_model)
    device_map = hf_model.__dict__.pop("hf_device_map")
    bridge = TransformerBridge.boot_transformers(name, device=device, **arguments)
    hf_model.hf_device_map = device_map
    forget_after_use(hf_model)
    return settle(bridge, device)
