"""A user's mistake in one line, whoever found it: patchsweep, Hydra or OmegaConf."""

from __future__ import annotations

import re

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, ValidationError

from patchsweep.errors import PatchsweepError
from patchsweep.store.backends.credentials import scrub
from patchsweep.store.contents import printable

# a launcher's name in Hydra's message -> what brings it
_EXTRAS = {"submitit": "slurm", "joblib": "joblib", "ray": "ray"}


def one_line(error: BaseException) -> str | None:
    """What the user did wrong and what to do; None if the error is no mistake of the user's."""
    if isinstance(error, PatchsweepError):
        return printable(scrub(_joined(str(error))))
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
        not_there = re.match(r"Could not override '([^']+)'", text)
        if not_there:
            from patchsweep.cli.keys import elsewhere  # here, since it loads the model library

            return elsewhere(not_there[1], getattr(cause, "object_type", None))
        if text.startswith("Error merging override") and isinstance(cause, ValidationError):
            return scrub(_wrong_type(cause))
        if isinstance(cause, OmegaConfBaseException):
            text += f" ({_omegaconf(cause)})"
        for launcher, extra in _EXTRAS.items():
            if f"hydra/launcher/{launcher}" in text:
                text += f'; that launcher is an extra: pip install "patchsweep[{extra}]"'
        return text
    return None


def _wrong_type(error: ValidationError) -> str:
    """Such as "task.n_pairs='x' must be a whole number"."""
    first = str(error.msg or error).splitlines()[0]
    told = re.match(r"Value '(.*?)' .*(Integer|Float|bool)\b", first)
    if "is not a ListConfig" in first:
        return f"{error.full_key} must be a list, such as [a,b]"
    if told is None:
        return f"{error.full_key}: {first}"
    kinds = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
    return f"{error.full_key}={told[1]!r} must be {kinds[told[2]]}"


def _omegaconf(error: OmegaConfBaseException) -> str:
    first = str(error.msg or error).splitlines()[0]
    key = getattr(error, "full_key", None)
    missing = re.search(r"missing mandatory value: (\w+)", first, re.IGNORECASE)
    if missing:
        return f"{key or missing[1]} is needed; give {key or missing[1]}=..."
    if isinstance(error, InterpolationResolutionError):
        first += "; ${...} stands for a key's value, such as ${model.name}"
    return f"{key}: {first}" if key and key not in first else first


def _joined(text: str) -> str:
    """The lines in one, without where Hydra looked and without schemas, which nobody chooses."""
    text = re.sub(r"^Config search path:.*", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.fullmatch(r"(\w+_)?schema", line)]
    return re.sub(r"([.:;,]);", r"\1", "; ".join(lines))
