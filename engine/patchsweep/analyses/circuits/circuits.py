"""`circuit`: faithfulness and completeness of circuits of nodes or edges, by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits.ablate import run_circuits
from patchsweep.analyses.circuits.edge_batch import (
    EdgeBatch,
    ExactBatches,
    Question,
    ablation_settings,
    ask,
    nodes_of,
    run_batches,
)
from patchsweep.analyses.circuits.results import Runs, circuit_dataset
from patchsweep.analyses.circuits.scores import (
    Ablation,
    circuit_scores,
    described_scores,
    method_name,
    method_settings,
    score_values,
)
from patchsweep.analyses.circuits.selection import (
    Floats,
    Growth,
    Level,
    Plan,
    RankBy,
    check_rank_by,
    make_plan,
    sizes_of,
)
from patchsweep.analyses.stages import Stages
from patchsweep.arguments import one_of
from patchsweep.attribution import Method
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import MethodError, PlanError
from patchsweep.forward.grad import frozen
from patchsweep.models.running import runs_model
from patchsweep.models.weights import tensor_digest
from patchsweep.spec.finite import check_finite, names_of
from patchsweep.spec.reference import MeansFrom
from patchsweep.spec.spec import MetricLike, SweepSpec

# largest rounding error of the runs with all or nothing ablated, as a share of the largest
# difference between base and source
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.3


@runs_model
def circuit(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    level: Level = "edges",
    method: str | Method = "atp",
    growth: Growth = "top",
    sizes: Sequence[float] | None = None,
    ablation: Ablation = "resample",
    scores: xr.DataArray | None = None,
    read: int = SweepSpec.read,
    rank_by: RankBy = "size",
    means_from: MeansFrom = SweepSpec.means_from,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Return the metrics and faithfulness of circuits of several sizes, run without the rest.

    `circuit_metric` [metric, pair, size] is the metric on the clean prompt with all nodes or
    edges outside the circuit ablated. `complement_metric` has the circuit ablated and all else
    kept, `empty_metric` [metric, pair] has everything ablated. `base_metric` and `source_metric`
    are those of the clean and the corrupted prompt.

        faithfulness(C) = (m(C) - m(empty)) / (m(clean) - m(empty)),   m: mean over the pairs

    [metric, size] is 1 where the circuit reproduces the model. `completeness` is the same fraction
    for the complement, so 0 where the rest of the model contributes nothing (Marks et al., arXiv
    2403.19647). Both are NaN where m(clean) - m(empty) is within rounding of 0; the attribute
    `undefined` then holds the reason, by metric. The attributes `cpr` and `cmd` are the areas of
    the faithfulness curve (see `selection.areas`), by metric.

    `rank` [node] or [sender, reader] is the order in which nodes or edges join, -1 where there is
    no such edge: a circuit of n edges holds the ranks below n. `score` determines the rank.
    Senders and readers are named as in `edges`; nodes are the senders without embed, which
    belongs to every circuit of nodes.

    Args:
        level: circuits of nodes (full heads and MLPs) or of edges.
        method: the method of the scores. Nodes: a method of `sweep` at all positions together,
            such as atp, ig or exact. Edges: eap (or atp, its synonym), eap_ig (or
            `IntegratedInputs(n_steps)`), or exact, which runs every edge.
        growth: top adds by rank of score; greedy, for edges, grows from the logits backwards, so
            that every edge is connected to the logits.
        rank_by: `size` ranks by |score|, largest first, as the MIB benchmark does for CMD;
            `signed` ranks by score, lowest first (its ablation lowers the metric most), as MIB
            does for CPR.
        sizes: shares of all nodes or edges (up to 1) or their numbers; default: MIB's ten.
        ablation: the ablated value: resample (the corrupted prompt's), mean, zero, or any other
            intervention of `edges`.
        scores: scores to rank by, one per node or edge as from `circuit_scores`, for example of
            other pairs; `method` is then not used.
        means_from: as in `patchsweep.sweep`, for mean ablation.
        config: config of the command line, kept in the provenance.
        stages: where and how the stages "scores" (or those of `circuit_scores`) and "circuits"
            run, see `patchsweep.analyses.stages`. Default: in memory.

    Raises:
        PatchsweepError: an argument breaks a rule; the text states the rule and a remedy.
        MethodError: the model's blocks cannot be split at the residual stream.
    """
    _check(level, growth)
    question = ask(model, pairs, metrics, "noising", ablation, read, means_from)
    check_rank_by(rank_by, question.metrics[0].name)
    nodes = nodes_of(model)
    n = nodes.n_edges if level == "edges" else len(nodes.senders) - 1
    sizes_of(sizes, n, level)  # raises before any forward pass
    if scores is not None:
        score_values(scores, nodes.if_all_parallel, level)  # likewise; only a run tells the blocks
    stages = Stages.of(stages)

    def compute() -> xr.Dataset:
        if scores is None:
            name = method_name(level, method)
            ranking = circuit_scores(
                model, pairs, question.metrics[0], level=level, method=method,
                ablation=question.intervention, read=read, stages=stages,
            )  # fmt: skip
        else:
            name, ranking = str(scores.attrs.get("method", "given")), scores
        batches = ExactBatches(question)
        with frozen(model):  # the first run determines which blocks are parallel
            values = score_values(ranking, batches.nodes, level)
        plan = make_plan(batches.nodes, level, growth, rank_by, sizes, values)
        found = run_batches(
            stages,
            "circuits",
            batches,
            {"circuits": {"run": len(plan.rows)}},
            lambda edge_batch: edge_batch.computed("circuits", _run(edge_batch, plan, question)),
            {"ranks": tensor_digest(torch.from_numpy(plan.ranks))},
        )
        stages.wait()
        base, source = found["base_metric"].values, found["source_metric"].values
        runs = Runs(found["circuits"].values, base, source)
        return circuit_dataset(question, plan, runs, name)

    settings = {
        **ablation_settings(question),
        "level": level,
        "method": method_settings(level, method) if scores is None else "scores",
        "scores": None if scores is None else described_scores(scores),
        "growth": growth,
        "rank_by": rank_by,
        "sizes": sizes,
    }
    return stages.analysis("circuit", model, pairs, settings, compute, config)


def _run(edge_batch: EdgeBatch, plan: Plan, question: Question) -> Floats:
    """Return the metrics [metric, pair, run] of `plan.rows`."""
    rows, row_of_circuit = plan.runs
    metrics = check_finite(
        run_circuits(edge_batch, plan.level, rows).cpu().numpy(),
        names_of(question.metrics),
        lambda pair, row: (
            f"a circuit of {rows[row].sum()} {plan.level} in pair {edge_batch.batch.pairs[pair]}"
        ),
    )[:, :, row_of_circuit]
    base, source = (x.cpu().numpy() for x in edge_batch.references())
    dtype = edge_batch.base.resid[0].dtype
    _check_ends(Runs(metrics, base, source), plan.level, question, dtype)
    return metrics


def _check_ends(
    runs: Runs,
    level: Level,
    question: Question,
    dtype: torch.dtype,
) -> None:
    """Raise unless runs with nothing and with everything ablated equal the unpatched runs.

    Raises:
        MethodError: they differ by more than rounding.
    """
    ends = [(runs.whole, runs.base, "with nothing ablated")]
    if level == "edges" and question.intervention.name == "resample":
        ends.append((runs.empty, runs.source, "with everything ablated"))
    for ablated, known, words in ends:
        gap = np.nanmax(np.abs(runs.base - runs.source), axis=1)
        worst = np.abs(ablated - known).max(axis=1)
        tolerance = TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
        for metric, error, scale in zip(question.metrics, worst, gap, strict=True):
            if not error <= tolerance * max(float(scale), 1e-3):
                raise MethodError(
                    f"the model taken apart, {words}, differs from the model by {error:.2g} in "
                    f"{metric.name}, where clean and corrupted prompts are {scale:.2g} apart: "
                    "something else than heads, MLPs and the logits reads or writes its residual "
                    "stream; sweep its sites instead"
                )


def _check(level: str, growth: str) -> None:
    one_of("level", level, get_args(Level), error=PlanError)
    one_of("growth", growth, get_args(Growth), error=PlanError)
    if growth == "greedy" and level == "nodes":
        raise PlanError(
            "growth=greedy follows edges back from the logits, and level=nodes has none; use "
            "growth=top or level=edges"
        )
