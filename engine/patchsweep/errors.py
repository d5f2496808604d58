"""What a user can get wrong. Each error says the rule, the value and the remedy."""


class PatchsweepError(ValueError):
    """A mistake that the user can mend; raised before any forward pass runs."""


class PromptError(PatchsweepError):
    """Prompts, answers, labels or a task that cannot be swept."""


class SiteError(PatchsweepError):
    """A site that is unknown, or that this model does not have."""


class MetricError(PatchsweepError):
    """A metric that is unknown, or that does not fit the pairs or the method."""


class PlanError(PatchsweepError):
    """Layers, positions or heads out of range, or a plan with nothing in it."""


class ModelError(PatchsweepError):
    """A model that cannot be found, verified, loaded or swept."""


class StoreError(PatchsweepError):
    """A store that belongs to another run, cannot be written, or is damaged."""


class DamagedError(StoreError):
    """A store whose files are not as they were written."""


class ConfigError(PatchsweepError):
    """A setting whose value or combination makes no sense."""


class MethodError(PatchsweepError):
    """An attribution method that does not fit the metric, the site or the model."""
