"""Errors that users can cause. Each message says the rule, the value and the remedy."""


class PatchsweepError(ValueError):
    """A mistake that the user can correct; raised before any forward pass runs."""


class PromptError(PatchsweepError):
    """Prompts, answers, labels or a task do not fit a sweep."""


class SiteError(PatchsweepError):
    """A site is unknown, or this model does not have it."""


class MetricError(PatchsweepError):
    """A metric is unknown, or does not fit the pairs or the method."""


class PlanError(PatchsweepError):
    """Layers, positions or heads are out of range, or a plan is empty."""


class ModelError(PatchsweepError):
    """A model cannot be found, verified, loaded or swept."""


class StoreError(PatchsweepError):
    """A store belongs to another run, cannot be written, or is damaged."""


class DamagedError(StoreError):
    """Files of a store differ from what was written."""


class ConfigError(PatchsweepError):
    """A setting has a value, or stands in a combination, that makes no sense."""


class MethodError(PatchsweepError):
    """An attribution method does not fit the metric, the site or the model."""


def printable(text: str) -> str:
    """Replace the control and direction characters of untrusted text, for a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
