"""Thresholds of an adaptive sweep, and the sample that decided them; a store records both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchsweep.errors import ConfigError
from patchsweep.spec.plan import Ints
from patchsweep.spec.spec import Request
from patchsweep.store.difference import ADAPTIVE
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
        return {
            "tolerance": request.spec.tolerance,
            "sites": {
                name: {
                    "theta": sample.level[0],
                    "tau": sample.level[1],
                    "says": "exact: no thresholds met the tolerance on the sample, so every patch "
                    "was run"
                    if sample.level == EXACTLY
                    else "within the tolerance on the sample",
                    "sample_token_layers": sample.share,
                    "n": len(sample.patches),
                    "largest_error": _by_metric(request, np.abs(sample.error).max(axis=1)),
                    "median_error": _by_metric(request, np.median(np.abs(sample.error), axis=1)),
                    "error_by_effect": _by_effect(request, sample),
                    "patches": sample.patches.tolist(),
                    "values": sample.values.tolist(),
                    "effect": sample.effect.tolist(),
                    "error": sample.error.tolist(),
                }
                for name, sample in self.samples.items()
            },
        }

    @classmethod
    def recorded(cls, attrs: Mapping[str, Any] | None, request: Request) -> Calibration | None:
        """Return the calibration that a store's attributes hold; None: there is none."""
        if attrs is None or ADAPTIVE not in attrs:
            return None
        return cls.of_attributes(attrs[ADAPTIVE], request)

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


def _by_metric(request: Request, numbers: Values) -> dict[str, float]:
    return {m.name: float(x) for m, x in zip(request.metrics, numbers, strict=True)}


def _by_effect(request: Request, sample: Sample) -> dict[str, list[float]]:
    """Return, per metric, the largest error in each quarter of the sample, by size of effect."""
    parts = {}
    for i, metric in enumerate(request.metrics):
        order = np.argsort(np.abs(sample.effect[i]))
        quarters = np.array_split(np.abs(sample.error[i])[order], 4)
        parts[metric.name] = [float(quarter.max(initial=0.0)) for quarter in quarters]
    return parts
