"""The thresholds of an adaptive run, and the sample that decides them; a store records both.

The sample runs exactly and at several levels of the thresholds.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchsweep.errors import ConfigError
from patchsweep.spec.finite import names_of
from patchsweep.spec.plan import Ints
from patchsweep.spec.spec import Request
from patchsweep.sweeps.executor import Values

Level = tuple[float, float]
# (theta in units of the tolerance, tau) from loose to strict; a site gets the loosest one whose
# largest error on its sample is within `MARGIN` times the tolerance
LEVELS = ((0.3, 0.01), (0.2, 0.006), (0.1, 0.003), (0.03, 0.001), (0.01, 3e-4), (0.003, 1e-4))
MARGIN = 1 / 3
N_AT_ONCE = 3  # levels that are tried first, together; the others follow if none is enough
# patches of the sample, per site: as many of the largest estimates as random live ones
N_EACH = 12  # and a quarter of the root of the number of live patches
# pairs that the sample comes from, evenly spread over the run's
N_PAIRS = 4
EXACTLY = (0.0, 0.0)  # thresholds that leave nothing asleep
Ran = tuple[Values, Values, Ints]  # values, linear parts, token-layers of one set


@dataclass(frozen=True)
class Sample:
    """The thresholds of one site, and its patches that were run both ways."""

    level: Level  # theta in units of the tolerance, and tau; `EXACTLY`
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

    level: Level
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


@dataclass(frozen=True, eq=False)
class Part:
    """The sample's patches of one site and one captured batch, with their exact values."""

    captured: Any
    chosen: Any  # the patches, as `Runs` takes them
    patches: Ints  # numbers of the patches, ascending
    exact: Values  # [metric, patch]
    base: Values  # [metric, patch] of the unpatched base runs
    tolerance: Values  # [metric, patch or 1] in units of the metric
    token_layers: int  # of the exact runs

    def within(self, values: Values) -> bool:
        """Whether the largest error is within `MARGIN` times the tolerance."""
        return bool((np.abs(values - self.exact) <= MARGIN * self.tolerance).all())


# runs patches of a captured batch, each set of them at its level
Runs = Callable[[Any, Sequence[Any], Sequence[Level]], list[Ran]]


def sampled_pairs(n_pairs: int) -> list[int]:
    """Return the pairs that samples come from, evenly spread over the run's."""
    last = n_pairs - 1
    return sorted({round(i * last / max(1, N_PAIRS - 1)) for i in range(N_PAIRS)})


def n_each(n_live: int, n_pairs: int) -> int:
    """Return how many patches of each kind one of `n_pairs` sampled pairs gives."""
    return -(-(N_EACH + math.isqrt(n_live) // 4) // n_pairs)


def sample_rows(site: str, pair: int, sizes: Values, n: int) -> Ints:
    """Return the indices of the `n` largest sizes and of as many random ones, ascending; the same
    in every process."""
    largest = np.argsort(-sizes, kind="stable")[:n]
    rng = np.random.default_rng([zlib.crc32(site.encode()), pair])
    random = rng.choice(len(sizes), min(n, len(sizes)), replace=False)
    return np.unique(np.concatenate([largest, random]))


def calibrate(parts: Mapping[str, Sequence[Part]], run: Runs) -> dict[str, Sample]:
    """Return, per site, its sample at the loosest thresholds with errors within the tolerance.

    All sites have parts of the same batches, in the same order.
    """
    still_open, samples = dict(parts), {}
    for levels in (LEVELS[:N_AT_ONCE], LEVELS[N_AT_ONCE:]):
        by_level = _at_levels(still_open, run, levels)
        for name, of_site in [*still_open.items()]:
            for level, results in zip(levels, by_level, strict=True):
                pairs = zip(of_site, results[name], strict=True)
                if all(part.within(values) for part, (values, _, _) in pairs):
                    samples[name] = _sample_of(of_site, level, results[name])
                    del still_open[name]
                    break
    for name, of_site in still_open.items():
        exactly = [(part.exact, np.zeros_like(part.exact), np.zeros(0, int)) for part in of_site]
        samples[name] = _sample_of(of_site, EXACTLY, exactly)
    return samples


def _at_levels(
    sites: Mapping[str, Sequence[Part]], run: Runs, levels: Sequence[Level]
) -> list[dict[str, list[Ran]]]:
    """Return the results of all parts by level and site; levels and sites share batches."""
    by_level: list[dict[str, list[Ran]]] = [{name: [] for name in sites} for _ in levels]
    for of_batch in zip(*sites.values(), strict=True):
        chosen = [part.chosen for part in of_batch]
        of_each = [level for level in levels for _ in chosen]
        results = iter(run(of_batch[0].captured, chosen * len(levels), of_each))
        for of_level in by_level:
            for name in sites:
                of_level[name].append(next(results))
    return by_level


def _sample_of(parts: Sequence[Part], level: Level, results: Sequence[Ran]) -> Sample:
    """Return one site's sample with the errors of `results`, by part."""
    columns = []
    for part, (values, _, _) in zip(parts, results, strict=True):
        columns.append((part.patches, part.exact, part.exact - part.base, values - part.exact))
    ran = sum(float(token_layers.sum()) for _, _, token_layers in results)
    share = 1.0 if level == EXACTLY else ran / max(1, sum(part.token_layers for part in parts))
    return Sample(
        level, share, *(np.concatenate(column, axis=-1) for column in zip(*columns, strict=True))
    )
