"""One-line messages for a user's mistake, raised by patchsweep, Hydra or OmegaConf."""

from __future__ import annotations

import re
import sys
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

from patchsweep.cli.early import ANY, fields_of, flat, groups
from patchsweep.errors import PatchsweepError, printable
from patchsweep.store.backends.credentials import scrub

if TYPE_CHECKING:
    from omegaconf.errors import OmegaConfBaseException, ValidationError

# a launcher's name in Hydra's message -> the extra that installs it
_EXTRAS = {"submitit": "slurm", "joblib": "joblib", "ray": "ray"}


def one_line(error: BaseException) -> str | None:
    """Return the message with rule, value and remedy; None if the error is no user's mistake."""
    if isinstance(error, PatchsweepError):
        return printable(scrub(_joined(str(error))))
    if "hydra" not in sys.modules:  # `status` does without
        return None
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException, ValidationError

    if isinstance(error, OmegaConfBaseException):
        return _omegaconf(error)
    if isinstance(error, OverrideParseException):
        return scrub(
            f"{error.override} cannot be read: brackets and quotes must come in pairs; put a value "
            "that holds some, or spaces or commas, in quotes of its own, such as \"key='a, b'\""
        )
    if isinstance(error, HydraException):
        text = scrub(_joined(str(error)))
        cause = error.__cause__
        if choice := re.search(
            r"Could not find '([^/']+)/([^']+)'; Available options in '\1': (.*)", text
        ):
            group, given, known = choice.groups()
            return f"{group}={given} is not known; use one of {known.replace('; ', ', ')}"
        unknown_key = re.match(r"Could not override '([^']+)'", text)
        if unknown_key:
            return _elsewhere(unknown_key[1], getattr(cause, "object_type", None))
        if text.startswith("Error merging override") and isinstance(cause, ValidationError):
            return scrub(_wrong_type(cause))
        if isinstance(cause, OmegaConfBaseException):
            text += f" ({_omegaconf(cause)})"
        for launcher, extra in _EXTRAS.items():
            if f"hydra/launcher/{launcher}" in text:
                text += f'; that launcher is an extra: pip install "patchsweep[{extra}]"'
        return text
    return None


def _elsewhere(key: str, chosen: type | None) -> str:
    """Return the error message for a `key` that the chosen class of its group does not have."""
    from hydra.conf import HydraConf
    from omegaconf import OmegaConf

    group, _, name = key.partition(".")
    if group == "hydra":
        known = OmegaConf.to_container(OmegaConf.structured(HydraConf))
        near = get_close_matches(key, list(flat(cast(dict[str, Any], known), "hydra.")))
        meant = f"did you mean {near[0]}? " if near else ""
        return f"key {key!r} is not known; {meant}`patchsweep run --hydra-help` says more"
    classes = groups().get(group, {})
    if any(fields_of(one).get(name) is ANY for one in classes):
        return f"{key} is a mapping; give its entries one by one, such as {key}.name=value"
    owners = [
        schema.partition("_")[0]
        for one, schema in classes.items()
        if name.partition(".")[0] in fields_of(one)
    ]
    text = f"key {key!r} is not known here"
    if chosen is not None and is_dataclass(chosen):
        names = ", ".join(fields_of(chosen.__name__))
        text += f"; those of the {group} that was chosen are {names}"
    if owners and "schema" not in owners:
        text += f"; {name} belongs to {' and '.join(f'{group}={owner}' for owner in owners)}"
    return text


def _wrong_type(error: ValidationError) -> str:
    """Return a message such as "task.n_pairs='x' must be a whole number"."""
    first = str(error.msg or error).splitlines()[0]
    match = re.match(r"Value '(.*?)' .*(Integer|Float|bool)\b", first)
    if "is not a ListConfig" in first:
        return f"{error.full_key} must be a list, such as [a,b]"
    if re.match(r"Cannot assign \w+ to Dict", first):
        return (
            f"{error.full_key} is a mapping; give its entries one by one, such as "
            f"{error.full_key}.name=value"
        )
    if match is None:
        return f"{error.full_key}: {first}"
    kinds = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
    return f"{error.full_key}={match[1]!r} must be {kinds[match[2]]}"


def _omegaconf(error: OmegaConfBaseException) -> str:
    from omegaconf.errors import InterpolationResolutionError

    first = str(error.msg or error).splitlines()[0]
    key = getattr(error, "full_key", None)
    missing = re.search(r"missing mandatory value: (\w+)", first, re.IGNORECASE)
    if missing:
        return f"{key or missing[1]} is needed; give {key or missing[1]}=..."
    if isinstance(error, InterpolationResolutionError):
        first += "; ${...} stands for a key's value, such as ${model.name}"
    return f"{key}: {first}" if key and key not in first else first


def _joined(text: str) -> str:
    """Join lines into one, without Hydra's search path and without schemas, which users ignore."""
    text = re.sub(r"^Config search path:.*", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.fullmatch(r"(\w+_)?schema", line)]
    return re.sub(r"([.:;,]);", r"\1", "; ".join(lines))
