"""What the patches that were not run may hide: random subsets of them, patched jointly.

The bound follows AtP* (Kramár et al., arXiv 2403.00745, section on diagnostics). For each patch,
the mean metric of the subsets that hold it minus the mean of those that do not estimates its
effect among random others; a one-sided Welch test rejects "|effect| >= theta". "Some patch is >=
theta" takes the largest p-value, so it is rejected at the stated level for every theta above

    max over patches of |difference of means| + t * (Welch standard error).

**Assumption**: a patch's effect among random others says what its effect alone is. Patches that
cancel or stand in for one another (backup heads) can hide from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from patchsweep.forward.grad import GradientModel, Heads, Place, Prefix
from patchsweep.spec.batch import Batch
from patchsweep.spec.interventions import values_of
from patchsweep.spec.metrics import Logits, compute
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.spec import Request
from patchsweep.sweeps.screen_settings import Screen

Values = NDArray[np.float32]
# tokens of one pass of jointly patched rows
MAX_TOKENS = 4096


class Subsets:
    """Random subsets of patches, each patched in one forward pass."""

    def __init__(
        self, request: Request, tape: GradientModel, plan: SitePlan, screen: Screen
    ) -> None:
        self.request, self.tape, self.plan, self.screen = request, tape, plan, screen

    def bounds(self, rest: NDArray[np.int64], pairs: range) -> Values:
        """[metric, pair] of `pairs`, above which no patch of `rest` is, at the stated level."""
        found = np.zeros((len(self.request.metrics), len(pairs)), np.float32)
        for batch in self.request.batches(pairs):
            run = self.capture(batch)
            for row, pair in enumerate(batch.pairs):
                mine = rest[self.plan.pair[rest] == pair]
                if len(mine):
                    found[:, pair - pairs.start] = self._bound(batch, row, mine, run)
        return found

    def _bound(
        self, batch: Batch, row: int, patches: NDArray[np.int64], run: BaseRun
    ) -> NDArray[np.float64]:
        rng = np.random.default_rng([self.screen.seed, batch.pairs[row]])
        member = draw_members(rng, self.screen.subsets, len(patches), self.screen.share)
        start = int(min(self.plan.start[patches].min(), batch.reads[0]))
        rows = max(1, MAX_TOKENS // (batch.length - start))
        parts = [
            self.patched(batch, row, patches, member[i : i + rows], run, start)
            for i in range(0, len(member), rows)
        ]
        effects = np.concatenate(parts, axis=1)
        return np.array([upper_bound(effect, member, self.screen.level) for effect in effects])

    @torch.no_grad()
    def capture(self, batch: Batch) -> BaseRun:
        site, tape = self.plan.site, self.tape
        keys: list[Tensor] = []
        values: list[Tensor] = []
        base: list[Tensor] = []

        def keep(layer: int, heads: Heads) -> None:
            keys.append(heads.k)
            values.append(heads.v)

        logits = tape.forward(
            batch.base,
            lambda place, x: base.append(place.flat(x).clone()),
            batch.reads,
            sites=[site],
            on_attention=keep,
        )
        source, source_logits = tape.activations(batch.source, batch.reads, [site])
        donors = [
            values_of(self.request.intervention, site, layer, b, s, batch.spans)
            for layer, (b, s) in enumerate(zip(base, source[site.name], strict=True))
        ]
        return BaseRun(donors, keys, values, logits, source_logits)

    @torch.no_grad()
    def patched(
        self,
        batch: Batch,
        row: int,
        patches: NDArray[np.int64],
        member: NDArray[np.bool_],
        run: BaseRun,
        start: int,
    ) -> NDArray[np.float64]:
        """Metrics `[metric, subset]` of the subsets `member` `[subset, patch]` of one pair."""
        n = len(member)
        masks = torch.from_numpy(self._masks(patches, member, batch.length)).to(batch.base.device)

        def visit(place: Place, x: Tensor) -> None:
            mask = masks[:, place.layer, start:]  # [subset, pos, unit]
            if not bool(mask.any()):
                return
            flat = place.flat(x)
            donor = run.donors[place.layer][row]
            if place.is_pattern:
                place.write(x, torch.where(mask.transpose(1, 2)[..., None], donor[:, start:], flat))
                return
            n_units = mask.shape[-1]
            new = torch.where(
                mask[..., None],
                donor[start:].unflatten(-1, (n_units, -1)),
                flat.unflatten(-1, (n_units, -1)),
            )
            place.write(x, new.flatten(-2))

        logits = self.tape.forward(
            batch.base[row].expand(n, -1),
            visit,
            batch.reads,
            sites=[self.plan.site],
            prefix=Prefix(
                start,
                [k[row].expand(n, *k.shape[1:]) for k in run.keys],
                [v[row].expand(n, *v.shape[1:]) for v in run.values],
            ),
        )
        targets = torch.stack([batch.answer[row], batch.wrong[row]])  # [2, read]
        chosen = logits.gather(2, targets.T.expand(n, -1, -1))
        seen = Logits(
            chosen[..., 0],
            chosen[..., 1],
            logits,
            run.logits[row].expand(n, -1, -1),
            run.source_logits[row].expand(n, -1, -1),
        )
        found: NDArray[np.float64] = compute(self.request.metrics, seen).double().cpu().numpy()
        return found

    def _masks(
        self, patches: NDArray[np.int64], member: NDArray[np.bool_], length: int
    ) -> NDArray[np.bool_]:
        """[subset, layer, pos, unit] what each subset replaces."""
        plan = self.plan
        units = plan.axes.units
        n_units = 1 if units is None else self.request.shape.n_units(plan.site)
        n_layers = plan.n_layers if plan.site.layered else 1
        masks = np.zeros((len(member), n_layers, length, n_units), dtype=bool)
        cells = plan.cells(patches)
        for column in range(len(patches)):
            which = [0] if units is None else list(units[cells.unit_set[column]])
            span = slice(int(cells.start[column]), int(cells.stop[column]))
            for layer in plan.axes.layers[cells.layer_set[column]]:
                for unit in which:
                    masks[:, layer, span, unit] |= member[:, column, None]
        return masks


@dataclass(frozen=True)
class BaseRun:
    """What subsets of patches share."""

    donors: list[Tensor]  # per layer, as `Place.flat` gives them
    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor  # [pair, read, d_vocab] of the base run
    source_logits: Tensor


def draw_members(
    rng: np.random.Generator, n_subsets: int, n_patches: int, share: float
) -> NDArray[np.bool_]:
    """[subset, patch]: each patch is in the same number of subsets, drawn at random, two at least
    and out of two at least."""
    n_in = min(max(2, round(share * n_subsets)), n_subsets - 2)
    ranks = rng.random((n_subsets, n_patches)).argsort(axis=0)
    member: NDArray[np.bool_] = ranks < n_in
    return member


def upper_bound(metric: NDArray[np.float64], member: NDArray[np.bool_], level: float) -> float:
    """The smallest theta for which "some patch has |effect| >= theta" is rejected at `level`.

    `metric` `[subset]` of the patched runs, `member` `[subset, patch]`. Welch's test, one-sided.
    """
    held = member.astype(np.float64)
    n_in, n_out = held.sum(axis=0), (1 - held).sum(axis=0)
    centred = metric - metric.mean()
    mean_in, mean_out = centred @ held / n_in, centred @ (1 - held) / n_out
    var_in = ((centred[:, None] - mean_in) ** 2 * held).sum(axis=0) / (n_in - 1)
    var_out = ((centred[:, None] - mean_out) ** 2 * (1 - held)).sum(axis=0) / (n_out - 1)
    a, b = var_in / n_in, var_out / n_out
    error = np.sqrt(a + b)
    freedom = (a + b) ** 2 / np.maximum(a**2 / (n_in - 1) + b**2 / (n_out - 1), 1e-300)
    quantile = stats.t.ppf(1 - level, np.maximum(freedom, 1.0))
    return float((np.abs(mean_in - mean_out) + quantile * error).max())
