"""Thresholds of an adaptive sweep, and the sample that decided them; a store records both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchsweep.errors import ConfigError
from patchsweep.spec.finite import names_of
from patchsweep.spec.plan import Ints
from patchsweep.spec.spec import Request
from patchsweep.sweeps.executor import Values

EXACTLY = (0.0, 0.0)  # thresholds that leave nothing asleep
Ran = tuple[Values, Values, Ints]  # values, linear parts, token-layers of one set


@dataclass(frozen=True)
class Sample:
    """The thresholds of one site, and its patches that were run both ways."""

    level: tuple[float, float]  # theta in units of the tolerance, and tau; `EXACTLY`
    share: float  # of the exact token-layers that the adaptive runs took
    patches: Ints  # [patch] numbers in the site's plan, ascending
    values: Values  # [metric, patch] exact
    effect: Values  # [metric, patch] exact - base
    error: Values  # [metric, patch] adaptive - exact, at the chosen thresholds


@dataclass(frozen=True)
class Calibration:
    """The thresholds of a run, and the samples that decided them."""

    samples: Mapping[str, Sample]  # by site

    def attributes(self, request: Request) -> dict[str, Any]:
        """Return what a store records."""
        names = names_of(request.metrics)
        return {
            "tolerance": request.spec.tolerance,
            "sites": {
                name: {
                    **SampleSummary.of(sample).attributes(names),
                    "patches": sample.patches.tolist(),
                    "values": sample.values.tolist(),
                    "effect": sample.effect.tolist(),
                    "error": sample.error.tolist(),
                }
                for name, sample in self.samples.items()
            },
        }

    @classmethod
    def of_attributes(cls, recorded: Mapping[str, Any], request: Request) -> Calibration:
        """Return the calibration of `request` that `attributes` recorded.

        Raises:
            ConfigError: it is damaged.
        """
        n_metrics, samples = len(request.metrics), {}
        try:
            for plan in request.plans:
                site = recorded["sites"][plan.site.name]
                patches = np.array(site["patches"], np.int64)
                samples[plan.site.name] = Sample(
                    (float(site["theta"]), float(site["tau"])),
                    float(site["sample_token_layers"]),
                    patches,
                    *(
                        np.array(site[key], np.float32).reshape(n_metrics, len(patches))
                        for key in ("values", "effect", "error")
                    ),
                )
            return cls(samples)
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                "the store does not hold the thresholds of its tolerance; write to a new store"
            ) from None


@dataclass(frozen=True)
class SampleSummary:
    """What a run says of the sample of one site: its thresholds and its errors."""

    level: tuple[float, float]
    share: float
    n: int  # patches
    errors: Values  # [metric, 6] largest, median, and the largest of each quarter by size of effect

    @classmethod
    def of(cls, sample: Sample) -> SampleSummary:
        """Return what is said of `sample`."""
        size = np.abs(sample.error)
        rows = []
        for error, effect in zip(size, np.abs(sample.effect), strict=True):
            quarters = np.array_split(error[np.argsort(effect)], 4)
            of_quarters = [quarter.max(initial=0.0) for quarter in quarters]
            rows.append([error.max(), np.median(error), *of_quarters])
        return cls(sample.level, sample.share, len(sample.patches), np.array(rows, np.float32))

    def attributes(self, metrics: Sequence[str]) -> dict[str, Any]:
        """Return what a store records."""

        def by_metric(numbers: Values) -> dict[str, Any]:
            return dict(zip(metrics, numbers.tolist(), strict=True))

        return {
            "theta": self.level[0],
            "tau": self.level[1],
            "says": "exact: no thresholds met the tolerance on the sample, so every patch was run"
            if self.level == EXACTLY
            else "within the tolerance on the sample",
            "sample_token_layers": self.share,
            "n": self.n,
            "largest_error": by_metric(self.errors[:, 0]),
            "median_error": by_metric(self.errors[:, 1]),
            "error_by_effect": by_metric(self.errors[:, 2:]),
        }
