"""The identity of a run: everything that determines its numbers, and a hash of the whole.

An identity is plain JSON, so that it can be read and compared part by part (`store.difference`
describes differences in words). Token ids identify prompts, bytes identify weights and tensors, and
names with parameters identify patchsweep's own metrics, interventions and methods. A user's
function has no content to compare: the name and version that the user gives identify it, and
without a version nothing does.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.pairs import PromptPair, PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.models.compute import compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.models.weights import known_digest, tensor_digest, weights_digest
from patchsweep.spec.interventions import (
    MEAN_NAMES,
    Base,
    Custom,
    Intervention,
    Mean,
    Resample,
    Shuffle,
    Zero,
)
from patchsweep.spec.metrics import BUILT_IN, Metric
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.spec import Experiment, Request
from patchsweep.store.difference import (
    DIGEST,
    IDENTITY,
    PAIR_DIGITS,
    UNVERSIONED,
    identity_difference,
    unversioned,
)

PACKAGES = ("patchsweep", "torch", "transformers", "transformer-lens")
# packages whose code is identified by the versions above, directly or as a requirement
_LIBRARIES = {"torch", "transformers", "transformer_lens", "accelerate", "patchsweep"}
# keys of a model's config that do not affect the logits or that the weights determine
_NOT_CONTENT = {"transformers_version", "dtype", "id2label", "label2id", "problem_type"}


def identity_of(
    kind: str,
    model: TransformerBridge,
    pairs: PromptPairs,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the identity of a run of `kind` (sweep, edges, ...) with `settings`.

    The digest of the weights is that of the last read, by `read_weights` or after an edit that
    torch counts. So call `read_weights` before comparing identities.
    """
    return sealed(
        {
            "kind": kind,
            "model": model_identity(model),
            "prompts": prompts_identity(pairs),
            "compute_dtype": _name(compute_dtype_of(model)),
            **described(settings),
            "versions": versions(),
        }
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages whose code computes the numbers."""
    return {name: version(name) for name in PACKAGES}


def read_weights(model: TransformerBridge) -> None:
    """Hash every byte of the weights, so that later identities include all edits."""
    weights_digest(model.original_model)


def sealed(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return `parts` of an identity with a hash of all of them."""
    rest = {key: value for key, value in parts.items() if key != DIGEST}
    return {DIGEST: _hash(rest), **rest}


def refuse_unversioned(identity: Mapping[str, Any]) -> None:
    """Raise if results to be stored depend on a function without a version.

    Raises:
        ConfigError: `identity` holds such a function.
    """
    function = unversioned(identity)
    if function is not None:
        raise ConfigError(
            f"{function}: a store must know which function its numbers came from; give it a name "
            "and a version, as in Metric.of_logits(function, name='peak', version='1') or "
            "Custom(function, name='steer', version='1'), and a new version whenever it changes; "
            "or leave the store out"
        )


def model_identity(model: TransformerBridge) -> dict[str, Any]:
    """Return the model's class, code, configuration and weights digest."""
    plain: Any = model.original_model
    kind = type(plain)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "code": _own_code(plain),
        "attention": str(getattr(plain.config, "_attn_implementation", None)),
        "device": device_of(model).type,
        "dtype": ", ".join(sorted({_name(p.dtype) for p in plain.parameters()})),
        "config": _config(plain.config.to_dict()),
        "weights": known_digest(plain),
    }


def prompts_identity(pairs: Sequence[PromptPair]) -> dict[str, Any]:
    """Return hashes of the prompts' and answers' token ids and of the labels' spans.

    `each` joins `PAIR_DIGITS` hex digits per pair, to find the first pair that differs.
    """
    content = {
        "clean prompts": [list(pair.clean) for pair in pairs],
        "corrupted prompts": [list(pair.corrupted) for pair in pairs],
        "answers": [[list(pair.answer), list(pair.wrong_answer)] for pair in pairs],
        "labels": [
            {name: list(span) for name, span in sorted(pair.labels.items())} for pair in pairs
        ],
    }
    each = (_hash(part)[:PAIR_DIGITS] for part in zip(*content.values(), strict=True))
    return {
        "n_pairs": len(pairs),
        **{name: _hash(values) for name, values in content.items()},
        "each": "".join(each),
    }


def request_settings(request: Request) -> dict[str, Any]:
    """Return the settings of a request besides its model and its pairs."""
    return {
        **question_settings(request),
        "compute_dtype": _name(request.compute_dtype),
        "sites": sites_identity(request.plans),
    }


def request_difference(request: Request, attrs: Mapping[str, Any]) -> str | None:
    """Return why `request` cannot reproduce the values of a store with attributes `attrs`; None if
    it can, or if the store has no identity."""
    stored = attrs.get(IDENTITY)
    if not isinstance(stored, Mapping):
        return None
    read_weights(request.bridge)
    identity = {
        "model": model_identity(request.bridge),
        "prompts": prompts_identity(request.pairs),
        **request_settings(request),
    }
    theirs = {key: stored[key] for key in identity if key in stored}
    if isinstance(stored.get("model"), Mapping):
        # ignore the device: other hardware rounds differently, and values have a tolerance
        theirs["model"] = {**stored["model"], "device": identity["model"]["device"]}
    return identity_difference(identity, theirs)


def question_settings(question: Experiment) -> dict[str, Any]:
    """Return intervention, direction, metrics, read position, and whether patch values come from
    the source run, which determines the dead patches."""
    return {
        "intervention": intervention_words(question.intervention),
        "from_source": question.intervention.from_source,
        "direction": question.direction,
        "metrics": [metric_words(metric) for metric in question.metrics],
        "read": question.read,
    }


def sites_identity(plans: Iterable[SitePlan]) -> dict[str, Any]:
    """Return, per site, its hook and the sets of layers, positions and units that are patched."""
    identity: dict[str, Any] = {}
    for plan in plans:
        site, axes = plan.site, plan.axes
        identity[site.name] = {
            "hook": site.hook,
            "layers": _sets(axes.layers) if site.layered else None,
            "positions": "all" if axes.positions is None else _sets([(p,) for p in axes.positions]),
        }
        if site.unit is not None:
            units = None if axes.units is None else axes.units[:: axes.n_sources or 1]
            identity[site.name][f"{site.unit}s"] = "all" if units is None else _sets(units)
    return identity


def metric_words(metric: Metric) -> str:
    """Describe the metric; equal texts mean equal numbers, unless they name no version."""
    return metric.name if metric in BUILT_IN else _own(metric, metric.name, metric.parameters)


def intervention_words(intervention: Intervention) -> str:
    """Describe the intervention; equal texts mean equal values, unless they name no version."""
    if type(intervention) is Custom and not callable(intervention.value):
        return f"constant {_constant(intervention.value)}"
    if type(intervention) is Mean:
        name, reference = MEAN_NAMES[intervention.per], intervention.reference
        if reference is None:  # a mean over the run's own prompts, which the identity holds
            return name
        return f"{name} over {len(reference)} prompts, {_hash(prompts_identity(reference))[:16]}"
    if type(intervention) in (Resample, Base, Zero, Shuffle):
        return type(intervention).__name__.lower()
    parameters: dict[str, Any] = {}
    if is_dataclass(intervention) and type(intervention) is not Custom:
        parameters = _parameters(intervention)
    return _own(intervention, intervention.name, parameters)


def method_identity(method: Any) -> dict[str, Any]:
    """Return the settings of an attribution method, and the name of a user's class."""
    settings = _parameters(method)
    if type(method).__module__.partition(".")[0] != "patchsweep":
        settings["method"] = _own(method, type(method).__qualname__, {})
    return settings


def described(value: Any) -> Any:
    """Describe `value` by its content, as JSON: equal descriptions mean equal values.

    Raises:
        TypeError: it holds something without comparable content, such as a function.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, np.generic):
        return described(value.item())
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        return described(value.tolist())
    if isinstance(value, np.ndarray):
        return described(torch.from_numpy(np.ascontiguousarray(value)))
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)} {_name(value.dtype)} {tensor_digest(value)}"
    if isinstance(value, Mapping):
        return {str(key): described(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [described(inner) for inner in value]
    if isinstance(value, torch.dtype):
        return _name(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: described(getattr(value, f.name)) for f in fields(value)}
    raise TypeError(f"{value!r} has no content that can be compared")


# fields of metrics, interventions and methods that are not parameters
_NO_PARAMETERS = {
    "name", "version", "at_base", "needs_source", "states", "from_source", "default_direction",
}  # fmt: skip


def _parameters(thing: Any) -> dict[str, Any]:
    """Return the described fields of a dataclass; omits functions, which the version identifies."""
    parameters = {}
    for f in fields(thing):
        if f.init and not f.name.startswith("_") and f.name not in _NO_PARAMETERS:
            with suppress(TypeError):
                parameters[f.name] = described(getattr(thing, f.name))
    return parameters


def _own(thing: Any, name: str, parameters: Mapping[str, Any]) -> str:
    """Describe a user's object by name, parameters and version."""
    listed = "".join(f", {key}={value}" for key, value in parameters.items())
    label = getattr(thing, "version", None)
    return f"{name}{listed}, " + (UNVERSIONED if label is None else f"version {label}")


def _constant(value: Any) -> Any:
    return float(value) if isinstance(value, int | float) else described(value)


def _sets(sets: Sequence[tuple[Any, ...]]) -> str:
    """Describe an axis: `0..29`, or `0,3,5+6` if 5 and 6 are patched together."""
    words: list[str | list[int]] = []  # a list: first and last of consecutive indices
    for members in sets:
        if len(members) == 1 and isinstance(members[0], int | np.integer):
            index = int(members[0])
            if words and isinstance(words[-1], list) and words[-1][1] + 1 == index:
                words[-1][1] = index
            else:
                words.append([index, index])
        else:
            words.append("+".join(map(str, members)))
    return ",".join(
        word if isinstance(word, str) else "..".join(map(str, dict.fromkeys(word)))
        for word in words
    )


def _config(values: Mapping[str, Any]) -> dict[str, Any]:
    config = {}
    for key, value in sorted(values.items()):
        if not key.startswith("_") and key not in _NOT_CONTENT:
            try:
                config[key] = described(value)
            except TypeError:  # a library's object, such as the settings of a quantisation
                config[key] = str(value)
    return config


def _own_code(model: nn.Module) -> str | None:
    """Hash the files that define the model's modules, except libraries; None if there are none."""
    names = {type(module).__module__ for module in model.modules()}
    files = [
        getattr(sys.modules.get(name), "__file__", None)
        for name in sorted(names)
        if name.partition(".")[0] not in _LIBRARIES
    ]
    if not files:
        return None
    content = b"".join(Path(file).read_bytes() for file in files if file is not None)
    return hashlib.sha256(content).hexdigest()[:32]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
