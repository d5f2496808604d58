"""A bound on the effects of patches that were not run, from random subsets patched jointly.

The bound follows AtP* (Kramár et al., arXiv 2403.00745, section on diagnostics). The mean metric of
the subsets with a patch, minus the mean of those without it, estimates the patch's effect among
random others; a one-sided Welch test rejects "|effect| >= theta". "Some patch is >= theta" has the
largest p-value of all patches, so it is rejected at level alpha for every theta above

    max over patches of |difference of means| + t * (Welch standard error).

**Assumption**: a patch's effect among random others equals its effect alone. The bound can miss
patches that cancel or back each other up (backup heads).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from patchsweep.forward.grad import GradientModel, Heads, Place
from patchsweep.forward.pattern import Prefix
from patchsweep.spec.batch import Batch
from patchsweep.spec.finite import Values
from patchsweep.spec.interventions import values_of
from patchsweep.spec.metrics import Logits, compute
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.spec import Request
from patchsweep.sweeps.screen_settings import Screen

# tokens of one forward pass of jointly patched rows
MAX_TOKENS = 4096


class Subsets:
    """Random subsets of patches, each patched in one forward pass."""

    def __init__(
        self, request: Request, gradients: GradientModel, plan: SitePlan, screen: Screen
    ) -> None:
        self.request, self.gradients, self.plan, self.screen = request, gradients, plan, screen

    def bounds(self, rest: NDArray[np.int64], pairs: range) -> Values:
        """Return `[metric, pair]`: the bound on |effect| of the patches `rest` of each pair."""
        bounds = np.zeros((len(self.request.metrics), len(pairs)), np.float32)
        for batch in self.request.batches(pairs):
            run = self.capture(batch)
            for row, pair in enumerate(batch.pairs):
                patches = rest[self.plan.pair[rest] == pair]
                if len(patches):
                    bounds[:, pair - pairs.start] = self._bound(batch, row, patches, run)
        return bounds

    def _bound(
        self, batch: Batch, row: int, patches: NDArray[np.int64], run: BaseRun
    ) -> NDArray[np.float64]:
        rng = np.random.default_rng([self.screen.seed, batch.pairs[row]])
        member = draw_members(rng, self.screen.subsets, len(patches), self.screen.inclusion)
        start = int(min(self.plan.start[patches].min(), batch.reads[0]))
        rows = max(1, MAX_TOKENS // (batch.length - start))
        parts = [
            self.patched(batch, row, patches, member[i : i + rows], run, start)
            for i in range(0, len(member), rows)
        ]
        effects = np.concatenate(parts, axis=1)
        return np.array([upper_bound(effect, member, self.screen.alpha) for effect in effects])

    @torch.no_grad()
    def capture(self, batch: Batch) -> BaseRun:
        """Run base and source prompts; keep patch values, keys and values per layer, and logits."""
        site, gradient_model = self.plan.site, self.gradients
        keys: list[Tensor] = []
        values: list[Tensor] = []
        base: list[Tensor] = []

        def keep(layer: int, heads: Heads) -> None:
            keys.append(heads.k)
            values.append(heads.v)

        logits = gradient_model.forward(
            batch.base,
            lambda place, x: base.append(place.flat(x).clone()),
            batch.reads,
            sites=[site],
            on_attention=keep,
        )
        source = gradient_model.activations(batch.source, batch.source_reads, [site])
        patch_values = [
            values_of(self.request.intervention, site, layer, b, batch.at_base(s), batch.spans)
            for layer, (b, s) in enumerate(zip(base, source.sites[site.name], strict=True))
        ]
        return BaseRun(patch_values, keys, values, logits, source.logits)

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
        """Return `[metric, subset]` of the subsets `member` `[subset, patch]` of one pair."""
        n = len(member)
        masks = torch.from_numpy(self._masks(patches, member, batch.length)).to(batch.base.device)

        def hook(place: Place, x: Tensor) -> None:
            mask = masks[:, place.layer, start:]  # [subset, pos, unit]
            if not bool(mask.any()):
                return
            flat = place.flat(x)
            patch = run.patch_values[place.layer][row]
            if place.is_pattern:
                place.write(x, torch.where(mask.transpose(1, 2)[..., None], patch[:, start:], flat))
                return
            n_units = mask.shape[-1]
            new = torch.where(
                mask[..., None],
                patch[start:].unflatten(-1, (n_units, -1)),
                flat.unflatten(-1, (n_units, -1)),
            )
            place.write(x, new.flatten(-2))

        logits = self.gradients.forward(
            batch.base[row].expand(n, -1),
            hook,
            batch.reads,
            sites=[self.plan.site],
            prefix=None
            if start == 0
            else Prefix(
                start,
                [k[row : row + 1, :, :start] for k in run.keys],
                [v[row : row + 1, :, :start] for v in run.values],
            ),
        )
        targets = torch.stack([batch.answer[row], batch.wrong[row]])  # [2, read]
        target_logits = logits.gather(2, targets.T.expand(n, -1, -1))  # [subset, read, 2]
        metric_inputs = Logits(
            target_logits[..., 0],
            target_logits[..., 1],
            logits,
            run.logits[row].expand(n, -1, -1),
            run.source_logits[row].expand(n, -1, -1),
        )
        values: NDArray[np.float64] = (
            compute(self.request.metrics, metric_inputs).double().cpu().numpy()
        )
        return values

    def _masks(
        self, patches: NDArray[np.int64], member: NDArray[np.bool_], length: int
    ) -> NDArray[np.bool_]:
        """Return `[subset, layer, pos, unit]`: the cells that each subset replaces."""
        plan = self.plan
        units = plan.axes.units
        n_units = 1 if units is None else self.request.shape.n_units(plan.site)
        n_layers = plan.n_layers if plan.site.layered else 1
        masks = np.zeros((len(member), n_layers, length, n_units), dtype=bool)
        cells = plan.cells(patches)
        for column in range(len(patches)):
            unit_set = [0] if units is None else list(units[cells.unit_set[column]])
            span = slice(int(cells.start[column]), int(cells.stop[column]))
            for layer in plan.axes.layers[cells.layer_set[column]]:
                for unit in unit_set:
                    masks[:, layer, span, unit] |= member[:, column, None]
        return masks


@dataclass(frozen=True)
class BaseRun:
    """Captured activations and logits that all subsets of a batch share."""

    patch_values: list[Tensor]  # patch values per layer, in the form of `Place.flat`
    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor  # [pair, read, d_vocab] of the base run
    source_logits: Tensor


def draw_members(
    rng: np.random.Generator, n_subsets: int, n_patches: int, inclusion: float
) -> NDArray[np.bool_]:
    """Draw `[subset, patch]` memberships at random, with the same number of subsets per patch: at
    least two with it and two without it. `inclusion`: probability that a subset has a patch."""
    n_in = min(max(2, round(inclusion * n_subsets)), n_subsets - 2)
    ranks = rng.random((n_subsets, n_patches)).argsort(axis=0)
    member: NDArray[np.bool_] = ranks < n_in
    return member


def upper_bound(metric: NDArray[np.float64], member: NDArray[np.bool_], alpha: float) -> float:
    """Return the smallest theta for which "some patch has |effect| >= theta" is rejected.

    `metric` `[subset]` of the patched runs, `member` `[subset, patch]`, `alpha`: level of the
    one-sided Welch test.
    """
    inside = member.astype(np.float64)
    n_in, n_out = inside.sum(axis=0), (1 - inside).sum(axis=0)
    centred = metric - metric.mean()
    mean_in, mean_out = centred @ inside / n_in, centred @ (1 - inside) / n_out
    var_in = ((centred[:, None] - mean_in) ** 2 * inside).sum(axis=0) / (n_in - 1)
    var_out = ((centred[:, None] - mean_out) ** 2 * (1 - inside)).sum(axis=0) / (n_out - 1)
    a, b = var_in / n_in, var_out / n_out
    error = np.sqrt(a + b)
    freedom = (a + b) ** 2 / np.maximum(a**2 / (n_in - 1) + b**2 / (n_out - 1), 1e-300)
    quantile = stats.t.ppf(1 - alpha, np.maximum(freedom, 1.0))
    return float((np.abs(mean_in - mean_out) + quantile * error).max())
