"""bf16 sweeps that prove themselves: fast products, and their error measured in the same run.

`<site>` holds fp32 values where a patch was run again, else those of the bf16 packed batches;
`<site>_bf16` holds those of the bf16 packed batches everywhere, so their difference where both are
exact is the measured error. Both are set on the fp32 base run: value = base + (patched - base of
the bf16 run). `<site>_noise` is the noise floor of what was not run again, see `noise`.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import replace

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
from patchsweep.spec.spec import Request, blocks_of
from patchsweep.store.layout import Unit, Variable
from patchsweep.sweeps.exact import Block, Captured, Captures, ExactWork
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.layout import dims_of, shape_of
from patchsweep.sweeps.noise import Floor, identity_patches, noise_variables, null_cost, site_of

# patches of a unit that are run again in fp32: its largest effects, and a random sample
N_LARGEST = 24
N_SAMPLE = 8


def recheck_variables(request: Request) -> tuple[Variable, ...]:
    """The variables of a bf16 sweep besides the sites' own."""
    blocks = blocks_of(request.plans)
    found = []
    for plan in request.plans:
        name = plan.site.name
        found.append(
            Variable(
                name=name + BF16,
                dims=dims_of(plan),
                shape=shape_of(plan, len(request.metrics)),
                unit=blocks[name],
                attrs={
                    "long_name": f"patched metric at {name}, by bf16 products alone",
                    "role": "bf16",
                    "site": name,
                },
            )
        )
    return (*found, *noise_variables(request))


def recheck_cost(request: Request) -> int:
    """Token-layers, at most, of what runs again in fp32 and of the null patches."""
    blocks, total = blocks_of(request.plans), 0.0
    for plan in request.plans:
        n_pairs, n_layers = blocks[plan.site.name]
        n_units = -(-plan.shape[0] // n_pairs) * -(-plan.shape[1] // n_layers)
        again = n_units * (len(request.metrics) * N_LARGEST + N_SAMPLE)
        total += min(plan.n_live, again) * plan.token_layers / max(1, plan.n_live)
    return round(total) + null_cost(request)


def check_proof(request: Request) -> None:
    """See that bf16 products have something to be proven by.

    Raises:
        ConfigError: the exact values would be no fp32 ones, or the weights are packed.
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


class RecheckedWork:
    """Patches with bf16 products, the largest and a sample run again in fp32.

    Raises:
        ConfigError: the packed runner, which alone has bf16 products, does not suit the model.
    """

    def __init__(self, request: Request, choice: RunnerChoice) -> None:
        if not isinstance(choice.runner, PackedRunner):
            raise ConfigError(
                f"precision=bf16 needs the packed runner, but {choice.reason}; use precision=model"
            )
        self.request = request
        self.exact = ExactWork(request, choice.runner)
        self.plans = self.exact.plans
        self.runner = PackedRunner(
            request.bridge,
            request.sites,
            choice.runner.max_tokens,
            "bf16",
            compute_dtype=request.compute_dtype,
        )
        # one for both: how much may be kept in memory, and the unembedding, which stays exact
        self.runner.budget, self.runner.unembed = choice.runner.budget, choice.runner.unembed
        self.captures = Captures(request, self.runner)

    def __contains__(self, variable: str) -> bool:
        return _site_of(variable) in self.plans

    def cost(self, unit: Unit) -> int:
        """See `Work`; the proof is a few patches more and not counted."""
        return self.exact.cost(unit) if unit.variable in self.plans else 0

    def n_live(self, unit: Unit) -> int:
        """See `Work`."""
        return self.exact.n_live(unit) if unit.variable in self.plans else 0

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """See `Work`: those of the fp32 runs."""
        return self.exact.references(unit)

    def together(self, unit: Unit) -> Hashable:
        """See `Work`: a site's variables come from the same packed batches."""
        return self.exact.together(replace(unit, variable=_site_of(unit.variable)))

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """See `Work`."""
        metrics, pairs = self.request.metrics, units[0].pairs
        proofs = [
            _Recheck(self.plans[unit.variable], unit, metrics)
            for unit in units
            if unit.variable in self.plans
        ]
        both = list(zip(self.captures.of(pairs), self.exact.captures.of(pairs), strict=True))
        for low, exact in both:
            live = [proof.fill_dead(exact) for proof in proofs]
            null = [proof.identity_patches(low) for proof in proofs]
            found = self.runner.run_together(low.loaded, live, metrics, null)
            for i, proof in enumerate(proofs):
                proof.put_bf16(low, exact, live[i].patches, found[i].numpy())
                proof.put_noise(low, null[i].patches, found[len(live) + i].numpy())
        again = [proof.foremost() for proof in proofs]
        for (_, exact), sets in zip(both, zip(*again, strict=True), strict=True):
            found = self.exact.runner.run_together(exact.loaded, sets, metrics)
            for proof, ran, values in zip(proofs, sets, found, strict=True):
                proof.put_exact(ran.patches, values.numpy())
        blocks = {name: block for proof in proofs for name, block in proof.blocks().items()}
        return [blocks[unit.variable] for unit in units]


class _Recheck:
    """One unit of a site: its bf16 values, what was run again, and the noise."""

    def __init__(self, plan: SitePlan, unit: Unit, metrics: Sequence[Metric]) -> None:
        self.plan, self.unit, self.metrics = plan, unit, metrics
        n_metrics = len(metrics)
        # the same sample in every run of a unit, whichever process does it
        self._seed = [zlib.crc32(plan.site.name.encode()), unit.pair_block, unit.layer_block]
        self._merged, self._raw = Block(plan, unit, n_metrics), Block(plan, unit, n_metrics)
        self._floor = Floor(plan, unit.pairs, n_metrics)
        self._ran: list[tuple[Ints, Values]] = []  # per batch: live patches, effects

    def fill_dead(self, exact: Captured) -> PatchSet:
        """Put the base metric where nothing changes; gives the patches to run."""
        self._raw.fill_dead(exact)
        return PatchSet(self.plan, self._merged.fill_dead(exact))

    def identity_patches(self, low: Captured) -> PatchSet:
        """Those of the batch; one unit of a pair tells the noise."""
        return identity_patches(self.plan, low.batch.pairs if self.unit.layer_block == 0 else ())

    def put_bf16(self, low: Captured, exact: Captured, live: Ints, values: Values) -> None:
        """Keep what the bf16 packed batches gave, on the fp32 base run."""
        plan = self.plan
        effect = check_cells(values, plan, live, self.metrics) - low.base_of(plan, live)
        on_exact = exact.base_of(plan, live) + effect
        self._raw.put(live, on_exact)
        self._merged.put(live, on_exact)
        self._ran.append((live, effect))

    def put_noise(self, low: Captured, patches: Ints, values: Values) -> None:
        """Keep what null patches changed."""
        self._floor.put(patches, values - low.base_of(self.plan, patches))

    def foremost(self) -> list[PatchSet]:
        """Per batch the patches to run again: the largest effects of each metric of the whole
        unit, and a random sample."""
        effect = np.concatenate([effect for _, effect in self._ran], axis=1)
        n = effect.shape[1]
        largest = np.argsort(-np.abs(effect), axis=1)[:, :N_LARGEST].ravel()
        sample = np.random.default_rng(self._seed).choice(n, min(N_SAMPLE, n), replace=False)
        chosen = np.zeros(n, dtype=bool)
        chosen[largest] = chosen[sample] = True
        ends = np.cumsum([len(live) for live, _ in self._ran])[:-1]
        return [
            PatchSet(self.plan, live[again])
            for (live, _), again in zip(self._ran, np.split(chosen, ends), strict=True)
        ]

    def put_exact(self, again: Ints, values: Values) -> None:
        """Keep fp32 values where patches were run again."""
        self._merged.put(again, check_cells(values, self.plan, again, self.metrics))

    def blocks(self) -> dict[str, Values]:
        """Variable -> values of its unit."""
        name = self.plan.site.name
        return {
            name: self._merged.values(),
            name + BF16: self._raw.values(),
            name + NOISE: self._floor.values,
        }


def _site_of(variable: str) -> str:
    return site_of(variable).removesuffix(BF16)
