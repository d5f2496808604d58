"""Classes of heads by measured behaviour; `Thresholds` holds all thresholds.

Behaviour on a task with names is attention from the last token, and effects of paths. Pairs
need the labels IO, S2 and end, as in the task `ioi`. The metric is the logit of the clean answer
minus that of the corrupted answer. Path patching (Wang et al. 2022, arXiv:2211.00593) puts the
corrupted prompt's values into paths of the clean run, so that behaviour common to both prompts does
not count. An effect is clean minus patched: the contribution of the path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits import exact_edges
from patchsweep.analyses.circuits.edge_batch import EdgeBatch, blocks_and_nodes
from patchsweep.analyses.circuits.exact import exact
from patchsweep.analyses.circuits.nodes import Edge, Reader
from patchsweep.analyses.heads.optimal import Head
from patchsweep.analyses.heads.scores import DETECTED
from patchsweep.arguments import head_places, number, whole_number
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.forward.capture import capture, watch
from patchsweep.forward.grad import frozen
from patchsweep.forward.site_locations import resolve_site
from patchsweep.forward.trace import Trace
from patchsweep.models.offload import device_of
from patchsweep.spec.batch import Batch, make_batches
from patchsweep.spec.metrics import METRICS
from patchsweep.spec.plan import ModelShape
from patchsweep.spec.sites import SITES

Mask = NDArray[np.bool_]  # [layer, head]
# classes that need a task with names, in the order of their measurement
ON_TASK = ("name_mover", "negative", "s_inhibition", "backup")
OTHER = "other"
CLASSES = (*DETECTED, *ON_TASK, OTHER)
LABELS = ("IO", "S2", "end")
PLACES = ("IO", "S2")  # labels whose attention from `end` is measured
METRIC = "logit_diff"
PAIRS_AT_ONCE = 16
Values = NDArray[np.float32]


@dataclass  # Hydra fills it, which a frozen one does not allow
class Thresholds:
    """Minimal scores for membership in a class; a head may belong to several classes."""

    induction: float = 0.3  # detect_head's score on repeated words; only half of them can score
    previous_token: float = 0.4  # likewise; all words can score
    duplicate_token: float = 0.15  # likewise; half of the words can score
    attention: float = 0.1  # attention from `end` to IO (movers) or S2 (S-inhibition)
    direct: float = 0.02  # direct effect on the logits, as a share of the gap
    queries: float = 0.02  # effect through the name movers' queries, as a share of the gap
    rise: float = 0.02  # rise of a backup's direct effect, as a share of the gap
    movers: int = 8  # number of strongest name movers to patch at queries and to hold at means

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = f"thresholds.{field.name}", getattr(self, field.name)
            number(name, value, above=0, error=ConfigError)
        whole_number("thresholds.movers", self.movers, error=ConfigError)


def has_labels(pairs: PromptPairs) -> bool:
    """Whether every pair has the labels `LABELS`."""
    return all(label in pair.labels for pair in pairs for label in LABELS)


class Behaviour:
    """Measures heads on one task.

    Raises:
        MethodError: the model's blocks cannot be split at the residual stream.
    """

    def __init__(self, model: TransformerBridge, pairs: PromptPairs, read: int) -> None:
        self.model, self.pairs, self.read = model, pairs, read
        self.blocks, self.nodes = blocks_and_nodes(model)
        self.shape = (len(pairs), self.nodes.n_layers, self.nodes.n_heads)
        self.points = resolve_site(self.blocks.unwrapped, SITES["z"]).points

    @torch.no_grad()
    def attention(self) -> Values:
        """Return [place, pair, layer, head]: the attention from `end` to IO and to S2."""
        pattern = resolve_site(self.blocks.unwrapped, SITES["pattern"])
        attention_to = np.full((len(PLACES), *self.shape), np.nan, np.float32)
        for batch in self._batches():
            run = capture(self.blocks.unwrapped, batch.base, [pattern])
            layers = torch.stack(run.sites["pattern"]).float().cpu().numpy()  # [layer, pair, ...]
            for row, (pair, spans) in enumerate(zip(batch.pairs, batch.spans, strict=True)):
                last = layers[:, row, :, spans["end"][1] - 1]  # [layer, head, src]
                for i, place in enumerate(PLACES):
                    attention_to[i, pair] = last[..., slice(*spans[place])].sum(axis=-1)
        return attention_to

    @torch.no_grad()
    def mean_z(self) -> list[Tensor]:
        """Return per layer [head, d_head] the mean of z over all positions of clean prompts."""
        point = resolve_site(self.blocks.unwrapped, SITES["z"])
        sums: list[Tensor] = []
        count = 0
        for batch in self._batches():
            z = capture(self.blocks.unwrapped, batch.base, [point]).sites["z"]
            batch_sums = [x.double().sum(dim=(0, 1)) for x in z]
            sums = (
                batch_sums if not sums else [a + b for a, b in zip(sums, batch_sums, strict=True)]
            )
            count += batch.base.numel()
        return [x.div(count).unflatten(-1, (self.nodes.n_heads, -1)) for x in sums]

    def direct(self, without: Sequence[Head] = ()) -> tuple[Values, Values]:
        """Return each head's direct effect on the logits, and the unpatched metrics.

        Effects are [pair, layer, head]; metrics are [run, pair], clean then corrupted. Heads in
        `without` have their mean z in both runs, at all positions.
        """
        values = np.full(self.shape, np.nan, np.float32)
        metric = np.full((2, len(self.pairs)), np.nan, np.float32)
        logits = Reader("logits", self.nodes.n_layers)
        heads = [sender for sender in self.nodes.senders if sender.kind == "head"]
        means = self.mean_z() if without else []
        with frozen(self.model):
            for batch in self._batches():
                with self._held(without, means):
                    base, source = (
                        self.blocks.trace(tokens, batch.reads)
                        for tokens in (batch.base, batch.source)
                    )
                edge_batch = self._edge_batch(batch, base, source)
                patched = exact(edge_batch, [Edge(head, logits) for head in heads])[0]
                ends = torch.stack([x[0] for x in edge_batch.references()])
                effect = (ends[0].unsqueeze(1) - patched).float().cpu().numpy()
                values[list(batch.pairs)] = effect.reshape(-1, *self.shape[1:])
                metric[:, list(batch.pairs)] = ends.float().cpu().numpy()
        return values, metric

    def through_queries(self, heads: Sequence[Head], movers: Sequence[Head]) -> Values:
        """Return the effects [pair, layer, head] of `heads` through the queries of later `movers`.

        Each is a sum over single paths to one mover's query; 0 without a later mover, NaN for
        heads that are not in `heads`.
        """
        values = np.full(self.shape, np.nan, np.float32)
        edges = []
        for layer, head in heads:
            values[:, layer, head] = 0
            edges += [
                (f"a{layer}.h{head}", f"a{at}.h{mover}.q") for at, mover in movers if at > layer
            ]
        if not edges:
            return values
        ds = exact_edges(self.model, self.pairs, edges, METRIC, direction="noising", read=self.read)
        effect = (ds["base_metric"] - ds["edge"]).isel(metric=0).transpose("pair", ...).values
        for i, (sender, _) in enumerate(edges):
            layer, head = (int(n) for n in sender[1:].split(".h"))
            values[:, layer, head] += effect[:, i]
        return values

    def _batches(self) -> Iterator[Batch]:
        for first in range(0, len(self.pairs), PAIRS_AT_ONCE):
            numbers = range(first, min(first + PAIRS_AT_ONCE, len(self.pairs)))
            yield from make_batches(
                self.pairs, numbers, "noising", self.read, device_of(self.model)
            )

    @contextmanager
    def _held(self, heads: Sequence[Head], means: Sequence[Tensor]) -> Iterator[None]:
        """Hold z of `heads` at their means in all runs inside this context."""

        def hold(layer: int, head: int, x: Tensor) -> None:
            mean = means[layer][head].to(x)
            size = len(mean)
            x[..., head * size : (head + 1) * size] = mean

        with ExitStack() as stack:
            for layer, head in heads:
                stack.enter_context(watch(self.points[layer], partial(hold, layer, head)))
            yield

    def _edge_batch(self, batch: Batch, base: Trace, source: Trace) -> EdgeBatch:
        layers = range(self.nodes.n_layers)
        return EdgeBatch(
            blocks=self.blocks,
            nodes=self.nodes,
            batch=batch,
            metrics=(METRICS[METRIC],),
            base=base,
            source=source,
            changes={
                "embed": [torch.zeros_like(base.resid[0])],
                "z": [source.z[i] - base.z[i] for i in layers],
                "mlp_out": [torch.zeros_like(base.part(i, "mlp_out")) for i in layers],
            },
            start=int(batch.differs.any(dim=0).int().argmax()),
        )


def detected_classes(scores: xr.DataArray, thresholds: Thresholds) -> dict[str, Mask]:
    """Return the classes by attention on repeated words; `scores` is [pattern, layer, head]."""
    return {
        name: scores.sel(pattern=name).transpose("layer", "head").values
        >= getattr(thresholds, name)
        for name in DETECTED
    }


def task_classes(
    behaviour: Behaviour, thresholds: Thresholds
) -> tuple[dict[str, Mask], xr.Dataset]:
    """Return the classes by behaviour on a task with names, and the measurements.

    The thresholds apply to means over pairs. The gap is the clean minus the corrupted logit
    difference; the share of an effect is effect / |gap|. Attention is from `end`:

    - name_mover: attends to IO, and its direct share is at least `direct`;
    - negative: attends to IO, and its direct share is at most -`direct`;
    - s_inhibition: attends to S2, and its share through the queries of later name movers is at
      least `queries` and larger than its |direct share|;
    - backup: its direct share is below `direct`, and reaches `direct` and rises by `rise` when
      the name movers are held at their means.

    Variables: `attention` [place, pair, layer, head], a probability; `direct`,
    `direct_without_movers` and `through_queries` [pair, layer, head], logits, NaN where not
    measured.
    """
    attention = behaviour.attention()
    direct, metric = behaviour.direct()
    gap = float(np.mean(metric[0] - metric[1]))
    to_io, to_s2 = attention.mean(axis=1)
    share = direct.mean(axis=0) / abs(gap)
    attends_to_io = to_io >= thresholds.attention
    mover, negative = (
        attends_to_io & (share >= thresholds.direct),
        attends_to_io & (share <= -thresholds.direct),
    )
    strongest = _strongest(share, mover, thresholds.movers)

    attends_to_s2 = to_s2 >= thresholds.attention
    through = behaviour.through_queries(_heads(attends_to_s2), strongest)
    queried = np.nan_to_num(through.mean(axis=0)) / abs(gap)
    inhibition = attends_to_s2 & (queried >= thresholds.queries) & (queried > np.abs(share))

    held = np.full_like(direct, np.nan)
    backup = np.zeros_like(mover)
    if strongest:
        held, _ = behaviour.direct(without=strongest)
        held_share = held.mean(axis=0) / abs(gap)
        backup = (share < thresholds.direct) & (held_share >= thresholds.direct)
        backup &= held_share - share >= thresholds.rise
    dims = ("pair", "layer", "head")
    measured = xr.Dataset(
        {
            "attention": (("place", *dims), attention, {"long_name": "attention from end"}),
            "direct": (dims, direct, {"long_name": "direct effect on the logit difference"}),
            "direct_without_movers": (dims, held),
            "through_queries": (dims, through),
        },
        attrs={
            "gap": gap,
            "task_metric": METRIC,
            "movers": [f"a{layer}.h{head}" for layer, head in strongest],
        },
    )
    masks = (mover, negative, inhibition, backup)
    return dict(zip(ON_TASK, masks, strict=True)), measured


def own_classes(
    given: Mapping[str, Sequence[Any]] | None, shape: ModelShape
) -> dict[str, tuple[Head, ...]]:
    """Return a user's own classes, name -> heads.

    Raises:
        ConfigError: a name is that of a measured class, or no text.
        PlanError: an entry names no head of the model.
    """
    if not isinstance(given, Mapping | None):
        raise ConfigError(f"classes={given!r} must map names to heads, {{'mine': [(9, 9)]}}")
    found = {}
    for name, heads in (given or {}).items():
        if not isinstance(name, str) or not name.strip() or name in CLASSES:
            raise ConfigError(
                f"classes has {name!r}; give a name of your own, none of {', '.join(CLASSES)}"
            )
        places = [heads] if isinstance(heads, str) else list(heads)
        found[name] = head_places(places, shape.n_layers, shape.n_heads, f"classes[{name!r}]")
    return found


def own_masks(own: Mapping[str, Sequence[Head]], scores: xr.DataArray) -> dict[str, Mask]:
    """Return the masks of a user's own classes, of the size of `scores` [.., layer, head]."""
    masks = {}
    for name, heads in own.items():
        masks[name] = np.zeros((scores.sizes["layer"], scores.sizes["head"]), dtype=bool)
        for layer, head in heads:
            masks[name][layer, head] = True
    return masks


def member_table(masks: dict[str, Mask]) -> xr.DataArray:
    """Return membership [head_class, layer, head]; `other` holds heads without a class."""
    own = [name for name in masks if name not in CLASSES]
    names = [*(name for name in CLASSES[:-1] if name in masks), *own, OTHER]
    other = ~np.any(list(masks.values()), axis=0)
    table = np.stack([masks.get(name, other) for name in names])
    return xr.DataArray(
        table,
        dims=("head_class", "layer", "head"),
        coords={"head_class": np.array(names, dtype=object)},
    )


def _heads(mask: Mask) -> list[Head]:
    return [(int(layer), int(head)) for layer, head in np.argwhere(mask)]


def _strongest(share: NDArray[np.floating], mask: Mask, n: int) -> list[Head]:
    """Return the `n` heads of `mask` with the largest share."""
    return sorted(_heads(mask), key=lambda at: -share[at])[:n]
