"""Files of dictionaries: the layouts of SAELens and of Gemma Scope."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from patchsweep.arguments import user_path
from patchsweep.errors import ConfigError
from patchsweep.spec.sites import SITES

WEIGHTS = ("sae_weights.safetensors", "params.safetensors", "params.npz")
# hook points of SAELens -> sites; those of the same name as a site's
_SITE_OF = {site.hook: site.name for site in SITES.values() if site.layered}
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
# no part of a latent's patch: they belong to the error term
_IGNORED = ("w_skip", "affine_skip_connection")
_ORDER = ("w_enc", "w_dec", "b_enc", "b_dec")
_ARCHITECTURES = (
    "standard", "jumprelu", "topk", "transcoder", "skip_transcoder", "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)  # fmt: skip


def read_dictionary(
    path: str | Path, site: str | None, layer: int | None, reads: str | None, k: int | None
) -> dict[str, Any]:
    """Return the fields of the dictionary at `path`, a file or its folder; fp32, nothing left to
    fold. The other arguments go before what the file says.

    Raises:
        ConfigError: see `Dictionary.from_safetensors`.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"path={path!r} must be a file, such as 'sae_weights.safetensors'")
    file = _file(user_path(path))
    arrays = {name.lower(): x for name, x in _arrays(file).items()}
    config = _config(file.parent / "cfg.json")
    metadata = config.get("metadata") or config.get("meta") or {}
    settings = {**config, **metadata}
    _check(file, settings, arrays)
    place = settings.get("hook_name") or settings.get("hook_point")
    out = settings.get("hook_name_out") or None
    encoder, decoder = (arrays[name] for name in ("w_enc", "w_dec"))
    bias = arrays["b_enc"]
    k = _k(file, settings, k)
    transcoder = out is not None and out != place
    # SAELens takes the decoder's bias from the input of an autoencoder unless it says otherwise
    if config and settings.get("apply_b_dec_to_input", True) and not transcoder:
        bias = bias - arrays["b_dec"] @ encoder
    if settings.get("rescale_acts_by_decoder_norm") and k is not None:
        norm = decoder.norm(dim=-1)
        encoder, bias, decoder = encoder * norm, bias * norm, decoder / norm.unsqueeze(-1)
    own_site, own_layer = _place(out if transcoder else place)
    site, layer = site or own_site, own_layer if layer is None else layer
    if site is None or layer is None:
        raise ConfigError(
            f"{file} does not say where its dictionary belongs; give site and layer, "
            "such as site='resid_post', layer=12"
        )
    return {
        "encoder": encoder.float().contiguous(),
        "decoder": decoder.float().contiguous(),
        "encoder_bias": bias.float(),
        "decoder_bias": arrays["b_dec"].float(),
        "threshold": arrays["threshold"].float() if "threshold" in arrays else None,
        "k": k,
        "site": site,
        "layer": layer,
        "reads": reads or (_template(str(place)) if transcoder else None),
    }


def check_weights(what: str, weights: Mapping[str, Tensor]) -> None:
    """Check encoder, decoder, their biases and the threshold (in that order) against each other.

    Raises:
        ConfigError: one has another shape, or is not finite.
    """
    names = [*weights]
    encoder, decoder = (weights[name] for name in names[:2])
    for name in names[:2]:
        if weights[name].ndim != 2:
            raise ConfigError(
                f"{name} of {what} has the shape {list(weights[name].shape)}; give an encoder "
                "[width, latent] and a decoder [latent, width]"
            )
    latents, width = encoder.shape[1], decoder.shape[1]
    wanted = [tuple(encoder.shape), (latents, width), (latents,), (width,), (latents,)]
    for (name, found), shape in zip(weights.items(), wanted, strict=False):
        if tuple(found.shape) != shape:
            raise ConfigError(
                f"{name} of {what} has the shape {list(found.shape)}, and with an encoder "
                f"[width, latent] of {list(encoder.shape)} it must have {list(shape)}"
            )
        if not bool(found.isfinite().all()):
            raise ConfigError(f"{name} of {what} must be finite; give its numbers")


def _file(path: Path) -> Path:
    """Return the file of weights at `path` or in it."""
    if path.is_dir():
        inside = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not inside:
            raise ConfigError(
                f"{path} holds none of {', '.join(WEIGHTS)}; give the file of a dictionary"
            )
        return inside[0]
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; give the weights of a dictionary")
    return path


def _arrays(file: Path) -> dict[str, Tensor]:
    """Return the arrays of a file in fp64."""
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as data:
                return {name: torch.from_numpy(np.asarray(data[name], float)) for name in data}
        return {name: x.double() for name, x in load_file(file, device="cpu").items()}
    except (OSError, ValueError, BadZipFile, SafetensorError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); give a safetensors file, or an npz file of arrays"
        ) from error


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is no JSON ({error}); give the cfg.json of SAELens") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds no JSON object; give the cfg.json of SAELens")
    return config


def _check(file: Path, settings: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> None:
    """Raise unless the dictionary is a sum of latents, with nothing else to do at run time."""
    missing = [name for name in _ORDER if name not in arrays]
    scale = arrays.get("scaling_factor")
    known = {*_ORDER, *_IGNORED, "threshold", "scaling_factor"}
    strange = [name for name in arrays if name not in known]
    if missing or strange:
        fault = f"lacks {missing[0]}" if missing else f"holds {strange[0]!r} besides"
        raise ConfigError(
            f"{file} {fault}; a dictionary has W_enc, W_dec, b_enc, b_dec, and a threshold if it "
            "is a JumpReLU (gated and other kinds cannot be patched latent by latent here)"
        )
    check_weights(
        str(file), {name: arrays[name] for name in (*_ORDER, "threshold") if name in arrays}
    )
    if scale is not None and not bool((scale == 1).all()):
        raise ConfigError(f"{file} has a scaling_factor of other numbers than 1; fold it first")
    architecture = settings.get("architecture") or "standard"
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{file} is of architecture={architecture!r}; use {', '.join(_ARCHITECTURES)}"
        )
    if "jumprelu" in architecture and "threshold" not in arrays:
        raise ConfigError(f"{file} is of architecture={architecture!r} and lacks a threshold")
    norm = settings.get("normalize_activations")
    if norm not in (None, False, "none"):
        raise ConfigError(
            f"{file} has normalize_activations={norm!r}, which scales activations at run time; "
            "fold the factor into the weights (fold_activation_norm_scaling_factor of SAELens) and "
            "save it again"
        )
    function = settings.get("activation_fn") or settings.get("activation_fn_str") or "relu"
    if function not in ("relu", "topk", "jumprelu"):
        raise ConfigError(f"{file} has activation_fn={function!r}; use relu, topk or jumprelu")
    if settings.get("hook_head_index") is not None:
        raise ConfigError(
            f"{file} is of one head (hook_head_index={settings['hook_head_index']}); use a "
            "dictionary of z with all heads"
        )


def _k(file: Path, settings: Mapping[str, Any], given: int | None) -> int | None:
    """Return k of a top-k dictionary; None of another one."""
    function = settings.get("activation_fn") or settings.get("activation_fn_str")
    says = settings.get("k") or (settings.get("activation_fn_kwargs") or {}).get("k")
    if given is not None or (settings.get("architecture") != "topk" and function != "topk"):
        return given
    if says is None:
        raise ConfigError(f"{file} is a top-k dictionary and does not say its k; give k")
    return int(says)


def _place(hook: Any) -> tuple[str | None, int | None]:
    """Return the site and the layer of a hook's name; None: it is that of no site."""
    match = None if hook is None else _HOOK.fullmatch(str(hook))
    if match is None or match[2] not in _SITE_OF:
        return None, None
    return _SITE_OF[match[2]], int(match[1])


def _template(hook: str) -> str:
    """Return a hook's name with `{layer}` for its layer, or the name of its site."""
    match = _HOOK.fullmatch(hook)
    if match is None:
        return hook
    return _SITE_OF.get(match[2], f"blocks.{{layer}}.{match[2]}")
