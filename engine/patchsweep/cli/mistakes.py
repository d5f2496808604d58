"""A user's mistake in one line, whoever found it: patchsweep, Hydra or OmegaConf."""

from __future__ import annotations

import re

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from patchsweep.cli.keys import elsewhere
from patchsweep.errors import PatchsweepError
from patchsweep.store.credentials import scrub

# a launcher's name in Hydra's message -> what brings it
_EXTRAS = {"submitit": "slurm", "joblib": "joblib", "ray": "ray"}


def one_line(error: BaseException) -> str | None:
    """What the user did wrong and what to do; None if the error is no mistake of the user's."""
    if isinstance(error, PatchsweepError):
        return scrub(_joined(str(error)))
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf(error)
    if isinstance(error, OverrideParseException):
        return scrub(
            f"{error.override} cannot be read: brackets and quotes must come in pairs; put a value "
            "that holds some, or spaces or commas, in quotes of its own, such as \"key='a, b'\""
        )
    if isinstance(error, HydraException):
        text = scrub(_joined(str(error)))
        not_there = re.match(r"Could not override '([^']+)'", text)
        if not_there:
            return elsewhere(not_there[1], getattr(error.__cause__, "object_type", None))
        if isinstance(error.__cause__, OmegaConfBaseException):
            text += f" ({_omegaconf(error.__cause__)})"
        for launcher, extra in _EXTRAS.items():
            if f"hydra/launcher/{launcher}" in text:
                text += f'; that launcher is an extra: pip install "patchsweep[{extra}]"'
        return text
    return None


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
