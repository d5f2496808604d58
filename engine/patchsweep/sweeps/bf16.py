"""bf16 sweeps with a recheck: fast products, and their error measured in the same run.

`<site>_bf16` holds the values of the bf16 packed batches. `<site>` holds fp32 values for rechecked
patches and the bf16 values for the others, so the difference of the two at rechecked patches is the
measured error. bf16 values are relative to the fp32 base run: value = base + (patched - base of the
bf16 run). `<site>_noise` is the noise floor of the bf16 values, see `noise`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from patchsweep.errors import ConfigError
from patchsweep.models.compute import name_of
from patchsweep.models.quantised import first_packed
from patchsweep.results.rounding import BF16, NOISE
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec.finite import check_cells
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints, PatchSet, SitePlan
from patchsweep.spec.shards import blocks_of
from patchsweep.spec.spec import Request
from patchsweep.store.layout import Unit, Variable
from patchsweep.sweeps.exact import Block, Captured, Captures, ExactWork, SiteWork
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.layout import noise_variables, site_variables
from patchsweep.sweeps.noise import Floor, identity_patches, null_cost

# patches of a shard that are run again in fp32: its largest effects, and a random sample
N_LARGEST = 24
N_SAMPLE = 8


def recheck_variables(request: Request) -> tuple[Variable, ...]:
    """Return the variables of a bf16 sweep besides `<site>`."""
    words = {BF16: "patched metric at {}, by bf16 products alone"}
    return (*site_variables(request, words), *noise_variables(request))


def recheck_cost(request: Request) -> int:
    """Return an upper limit of the token-layers of the fp32 recheck and the identity patches."""
    blocks, total = blocks_of(request.plans), 0.0
    for plan in request.plans:
        n_pairs, n_layers = blocks[plan.site.name]
        n_units = -(-plan.shape[0] // n_pairs) * -(-plan.shape[1] // n_layers)
        n_rechecked = n_units * (len(request.metrics) * N_LARGEST + N_SAMPLE)
        total += min(plan.n_live, n_rechecked) * plan.token_layers / max(1, plan.n_live)
    return round(total) + null_cost(request)


def check_proof(request: Request) -> None:
    """Check that bf16 values can be rechecked in fp32.

    Raises:
        ConfigError: the compute dtype is not fp32, or the weights are packed.
    """
    packed = first_packed(request.bridge)
    if packed is not None:
        raise ConfigError(
            f"precision=bf16 multiplies plain weights in bf16, and {packed}, which multiplies by "
            "code of its own; use precision=model"
        )
    if request.compute_dtype != torch.float32:
        raise ConfigError(
            "precision=bf16 proves its values by float32 ones, and this sweep would compute those "
            f"in {name_of(request.compute_dtype)}; use compute_dtype=float32, or precision=model"
        )


class RecheckedWork(SiteWork):
    """Runs patches with bf16 products, and the largest effects and a sample again in fp32.

    The recheck is a few patches more, and is not counted.

    Raises:
        ConfigError: the runner is not the packed one, the only one with bf16 products.
    """

    suffixes = (BF16, NOISE)

    def __init__(self, request: Request, choice: RunnerChoice) -> None:
        if not isinstance(choice.runner, PackedRunner):
            raise ConfigError(
                f"precision=bf16 needs the packed runner, but {choice.reason}; use precision=model"
            )
        self.exact = ExactWork(request, choice.runner)
        self.runner = PackedRunner(
            request.bridge,
            request.sites,
            choice.runner.max_tokens,
            "bf16",
            compute_dtype=request.compute_dtype,
        )
        # both runners share the memory budget and the unembedding, which stays fp32
        self.runner.budget, self.runner.unembed = choice.runner.budget, choice.runner.unembed
        super().__init__(request, Captures(request, self.runner))

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """See `Work`: the metrics of the fp32 runs."""
        return self.exact.references(unit)

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """See `Work`."""
        metrics, pairs = self.request.metrics, units[0].pairs
        rechecks = [
            _Recheck(self.plans[unit.variable], unit, metrics)
            for unit in units
            if unit.variable in self.plans
        ]
        both = list(zip(self.captures.of(pairs), self.exact.captures.of(pairs), strict=True))
        for low, exact in both:
            live = [recheck.fill_dead(exact) for recheck in rechecks]
            null = [recheck.identity_patches(low) for recheck in rechecks]
            results = self.runner.run_together(low.loaded, live, metrics, null)
            for i, recheck in enumerate(rechecks):
                recheck.put_bf16(low, exact, live[i].patches, results[i].numpy())
                recheck.put_noise(low, null[i].patches, results[len(live) + i].numpy())
        selected = [recheck.top_k() for recheck in rechecks]
        for (_, exact), sets in zip(both, zip(*selected, strict=True), strict=True):
            results = self.exact.runner.run_together(exact.loaded, sets, metrics)
            for recheck, ran, values in zip(rechecks, sets, results, strict=True):
                recheck.put_exact(ran.patches, values.numpy())
        blocks = {name: block for recheck in rechecks for name, block in recheck.blocks().items()}
        return [blocks[unit.variable] for unit in units]


class _Recheck:
    """One shard of a site: bf16 values, fp32 values of rechecked patches, and the noise floor."""

    def __init__(self, plan: SitePlan, unit: Unit, metrics: Sequence[Metric]) -> None:
        self.plan, self.unit, self.metrics = plan, unit, metrics
        n_metrics = len(metrics)
        # every process draws the same sample for a shard
        self._seed = [zlib.crc32(plan.site.name.encode()), unit.pair_block, unit.layer_block]
        self._merged, self._raw = Block(plan, unit, n_metrics), Block(plan, unit, n_metrics)
        self._floor = Floor(plan, unit.pairs, n_metrics)
        self._ran: list[tuple[Ints, Values]] = []  # per batch: live patches, effects

    def fill_dead(self, exact: Captured) -> PatchSet:
        """Set dead patches to the base metric and return the live ones."""
        self._raw.fill_dead(exact)
        return PatchSet(self.plan, self._merged.fill_dead(exact))

    def identity_patches(self, low: Captured) -> PatchSet:
        """Return the batch's identity patches; none unless the shard holds the first layers."""
        return identity_patches(self.plan, low.batch.pairs if self.unit.layer_block == 0 else ())

    def put_bf16(self, low: Captured, exact: Captured, live: Ints, values: Values) -> None:
        """Keep bf16 values, shifted to the fp32 base run."""
        plan = self.plan
        effect = check_cells(values, plan, live, self.metrics) - low.base_of(plan, live)
        shifted = exact.base_of(plan, live) + effect
        self._raw.put(live, shifted)
        self._merged.put(live, shifted)
        self._ran.append((live, effect))

    def put_noise(self, low: Captured, patches: Ints, values: Values) -> None:
        """Keep the changes by identity patches."""
        self._floor.put(patches, values - low.base_of(self.plan, patches))

    def top_k(self) -> list[PatchSet]:
        """Return the patches to recheck, per batch: the largest effects of each metric over the
        whole shard, and a random sample."""
        effect = np.concatenate([effect for _, effect in self._ran], axis=1)
        n = effect.shape[1]
        largest = np.argsort(-np.abs(effect), axis=1)[:, :N_LARGEST].ravel()
        sample = np.random.default_rng(self._seed).choice(n, min(N_SAMPLE, n), replace=False)
        selected = np.zeros(n, dtype=bool)
        selected[largest] = selected[sample] = True
        ends = np.cumsum([len(live) for live, _ in self._ran])[:-1]
        return [
            PatchSet(self.plan, live[again])
            for (live, _), again in zip(self._ran, np.split(selected, ends), strict=True)
        ]

    def put_exact(self, again: Ints, values: Values) -> None:
        """Keep the fp32 values of rechecked patches."""
        self._merged.put(again, check_cells(values, self.plan, again, self.metrics))

    def blocks(self) -> dict[str, Values]:
        """Return variable -> values of its shard."""
        name = self.plan.site.name
        return {
            name: self._merged.values(),
            name + BF16: self._raw.values(),
            name + NOISE: self._floor.values,
        }
