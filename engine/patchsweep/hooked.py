"""The hooked runner: whole batched forward passes through the bridge, patched by its hooks.

Slower than waves and right for every model that the bridge supports; it is also the oracle
that the wave runner is checked against.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.batch import Batch
from patchsweep.errors import SiteError
from patchsweep.interventions import Intervention
from patchsweep.metrics import Logits, Metric, compute
from patchsweep.planner import Ints, PatchSet, Plan, SitePlan
from patchsweep.running import running
from patchsweep.sites import SITES, Site

# the logits of one batched forward pass stay within this many bytes
LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Loaded:
    """A batch with the values to patch in and the unpatched logits."""

    batch: Batch
    donors: dict[str, list[Tensor]]  # site -> per layer [pair, pos, width] (pattern: its own)
    base_logits: Float[Tensor, "pair read d_vocab"]
    source_logits: Float[Tensor, "pair read d_vocab"]


class _Write(NamedTuple):
    """What one patch replaces in a forward pass."""

    row: int  # of the forward pass
    pair: int  # row of the batch, whose values are patched in
    unit_set: int
    span: slice  # positions


class HookedRunner:
    """Exact patches by hooks; one forward pass per layer and batch of patches.

    Raises:
        SiteError: the model has no hook for one of `sites`.
    """

    name = "hooked"
    joins = False

    def __init__(self, bridge: TransformerBridge, sites: Sequence[Site]) -> None:
        self.bridge = bridge
        self.sites = tuple(sites)
        self.n_layers = int(bridge.cfg.n_layers)
        self._checked = False
        known = bridge.hook_dict
        for site in sites:
            for hook in self._hooks(site):
                if hook not in known:
                    raise SiteError(
                        f"site {site.name}: this model has no hook {hook}; "
                        "leave the site out for this architecture"
                    )

    def _hooks(self, site: Site) -> list[str]:
        return [site.hook_name(layer) for layer in range(self.n_layers if site.layered else 1)]

    @torch.no_grad()
    def check(self, tokens: Tensor) -> None:
        """See that patches at the sites can work in this model.

        Raises:
            SiteError: a hook never fires, or fires where a new value changes nothing.
        """
        self._run(tokens)
        if not any(site.is_pattern for site in self.sites):
            return
        # bridges that leave attention to the model show its pattern only afterwards
        hooks = [
            (SITES["pattern"].hook_name(layer), lambda x, hook: x.zero_())
            for layer in range(self.n_layers)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = self._forward(tokens, fwd_hooks=hooks)
        if torch.equal(changed, self.bridge(tokens)):
            raise SiteError(
                "site pattern: this model's hook_pattern fires after attention was computed, so "
                "a patch there does nothing; leave the site out or use runner=wave"
            )

    @torch.no_grad()
    def activations(self, tokens: Tensor) -> Mapping[str, Sequence[Tensor]]:
        """See `Runner`."""
        return self._run(tokens)[1]

    def _forward(self, tokens: Tensor, fwd_hooks: list[Any]) -> Tensor:
        """The bridge's logits; its per-head results are computed only while a sweep needs them."""
        with running(self.bridge):
            before = bool(getattr(self.bridge.cfg, "use_attn_result", False))
            if any(site.name == "result" for site in self.sites) and not before:
                self.bridge.set_use_attn_result(True)
            try:
                logits: Tensor = self.bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks)
            finally:
                if bool(getattr(self.bridge.cfg, "use_attn_result", False)) != before:
                    self.bridge.set_use_attn_result(before)
        return logits

    def _run(self, tokens: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Logits and the activations of the sites.

        Raises:
            SiteError: a hook did not fire.
        """
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any, name: str) -> None:
            kept[name] = x.detach().clone()

        hooks = [
            (name, lambda x, hook, name=name: keep(x, hook, name))
            for site in self.sites
            for name in self._hooks(site)
        ]
        logits = self._forward(tokens, fwd_hooks=hooks)
        found: dict[str, list[Tensor]] = {}
        for site in self.sites:
            missing = [name for name in self._hooks(site) if name not in kept]
            if missing:
                raise SiteError(
                    f"site {site.name}: the hook {missing[0]} never fired in this model, so a "
                    "patch there would do nothing; leave the site out"
                )
            layers = [kept[name] for name in self._hooks(site)]
            if not site.is_pattern and layers[0].shape[:2] != tokens.shape:
                raise SiteError(
                    f"site {site.name}: its activation has the shape {tuple(layers[0].shape)}, "
                    "which is not [batch, pos, ...]; leave the site out"
                )
            self._check_heads(site, layers[0])
            if not site.is_pattern:
                layers = [x.reshape(*tokens.shape, -1) for x in layers]
            found[site.name] = layers
        return logits, found

    def _check_heads(self, site: Site, x: Tensor) -> None:
        """Refuse a hook that cuts `x` elsewhere than between heads (seen with latent attention)."""
        n_heads = int(self.bridge.cfg.n_heads)
        if site.unit != "head" or site.is_pattern or x.ndim != 4 or x.shape[2] == n_heads:
            return
        raise SiteError(
            f"site {site.name}: its hook sees {x.shape[2]} parts where the model has {n_heads} "
            "heads; leave the site out or use runner=wave"
        )

    @torch.no_grad()
    def load(self, batch: Batch, intervention: Intervention) -> Loaded:
        """See `Runner`."""
        if not self._checked:
            self.check(batch.base[:1])
            self._checked = True
        base_logits, base = self._run(batch.base)
        source_logits, source = self._run(batch.source)
        reads = list(batch.reads)
        return Loaded(
            batch=batch,
            donors={
                site.name: [
                    intervention.values(site, layer, b, s, batch.spans)
                    for layer, (b, s) in enumerate(
                        zip(base[site.name], source[site.name], strict=True)
                    )
                ]
                for site in self.sites
            },
            base_logits=base_logits[:, reads].float(),
            source_logits=source_logits[:, reads].float(),
        )

    def references(
        self, loaded: Loaded, metrics: Sequence[Metric]
    ) -> tuple[Float[Tensor, "metric pair"], Float[Tensor, "metric pair"]]:
        """See `Runner`."""
        pair = torch.arange(len(loaded.batch.base), device=loaded.base_logits.device)
        return (
            self._metrics(loaded, loaded.base_logits, pair, metrics),
            self._metrics(loaded, loaded.source_logits, pair, metrics),
        )

    def run(
        self, loaded: Loaded, plan: SitePlan, patches: Ints, metrics: Sequence[Metric]
    ) -> Float[Tensor, "metric patch"]:
        """See `Runner`."""
        return self.run_together(loaded, [PatchSet(plan, patches)], metrics)[0]

    @torch.no_grad()
    def run_together(
        self, loaded: Loaded, sets: Sequence[PatchSet], metrics: Sequence[Metric]
    ) -> list[Float[Tensor, "metric patch"]]:
        """See `Runner`; a row of a forward pass is one patch, whatever its site and layer."""
        batch = loaded.batch
        local = batch.local
        sizes = [len(chosen.patches) for chosen in sets]
        which = np.repeat(np.arange(len(sets)), sizes)  # [patch of all sets] its set
        patch = np.concatenate([chosen.patches for chosen in sets])
        values = torch.empty(len(metrics), len(patch), device="cpu")
        size = max(1, LOGIT_BYTES // (4 * batch.length * self.bridge.cfg.d_vocab))
        for part in np.array_split(np.arange(len(patch)), -(-len(patch) // size) or 1):
            if not len(part):
                continue
            hooks: list[Any] = []
            pair = np.empty(len(part), dtype=np.int64)  # row of the batch
            for i, chosen in enumerate(sets):
                rows = np.flatnonzero(which[part] == i)
                patches = patch[part[rows]]
                pair[rows] = [local[p] for p in chosen.plan.pair[patches].tolist()]
                hooks += self._hooks_of(loaded, chosen.plan, patches, rows)
            index = torch.from_numpy(pair).to(batch.base.device)
            logits = self._forward(batch.base[index], fwd_hooks=hooks)
            read = logits[:, list(batch.reads)].float()
            values[:, part] = self._metrics(loaded, read, index, metrics).cpu()
        return list(values.split(sizes, dim=1))

    def _hooks_of(
        self, loaded: Loaded, plan: Plan, patches: Ints, rows: Ints
    ) -> list[tuple[str, Callable[[Tensor, Any], Tensor]]]:
        """Hooks that put patch `patches[i]` of `plan` into row `rows[i]` of a forward pass."""
        local = loaded.batch.local
        by_layer: dict[int, list[_Write]] = {}
        cells = zip(rows.tolist(), *(x.tolist() for x in plan.cells(patches)), strict=True)
        for row, pair, layer_set, unit_set, start, stop in cells:
            write = _Write(row, local[pair], unit_set, slice(start, stop))
            for layer in plan.axes.layers[layer_set]:
                by_layer.setdefault(layer, []).append(write)
        return [
            (plan.site.hook_name(layer), self._patch(loaded, plan, written, layer))
            for layer, written in by_layer.items()
        ]

    def _patch(
        self, loaded: Loaded, plan: Plan, written: Sequence[_Write], layer: int
    ) -> Callable[[Tensor, Any], Tensor]:
        """A hook that replaces what the patches of `written` cover."""
        donor = loaded.donors[plan.site.name][layer]
        units = plan.axes.units

        # in place, so that a residual stream is replaced for every reader of it
        def patch(x: Tensor, hook: Any) -> Tensor:
            for i, pair, unit_set, span in written:
                which = slice(None) if units is None else list(units[unit_set])
                if plan.axes.n_sources:
                    src = unit_set % plan.axes.n_sources
                    x[i, which, span, src] = donor[pair, which, span, src].to(x)
                    continue
                if plan.site.is_pattern:
                    x[i, which, span] = donor[pair, which, span].to(x)
                    continue
                target = x[i].reshape(x.shape[1], -1) if x.ndim == 4 else x[i]
                new = donor[pair]
                if units is not None:
                    n_units = self._n_units(plan.site, x)
                    target = rearrange(target, "pos (unit d) -> pos unit d", unit=n_units)
                    new = rearrange(new, "pos (unit d) -> pos unit d", unit=n_units)
                    target[span, which] = new[span, which].to(x)
                else:
                    target[span] = new[span].to(x)
                x[i] = target.reshape(x[i].shape)
            return x

        return patch

    def _n_units(self, site: Site, x: Tensor) -> int:
        if x.ndim == 4:
            return x.shape[2]
        return x.shape[2] if site.unit == "neuron" else int(self.bridge.cfg.n_heads)

    def _metrics(
        self,
        loaded: Loaded,
        full: Float[Tensor, "row read d_vocab"],
        pair: Tensor,
        metrics: Sequence[Metric],
    ) -> Float[Tensor, "metric row"]:
        batch = loaded.batch
        answer = full.gather(2, batch.answer[pair].unsqueeze(-1)).squeeze(-1)
        wrong = full.gather(2, batch.wrong[pair].unsqueeze(-1)).squeeze(-1)
        base, source = loaded.base_logits[pair], loaded.source_logits[pair]
        return compute(metrics, Logits(answer, wrong, full, base, source))
