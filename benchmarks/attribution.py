"""What attribution costs beside the bare passes that its arithmetic needs.

    python benchmarks/attribution.py [N_PAIRS ...]

Prints a Markdown table. The pairs are those of the task `ioi` on the bundled model, and differ from
some token on; a last row has one pair of about 300 tokens that differ in the last 20. "Bare" is a
forward pass of the source prompts, and forward and backward passes of the same rows and live tokens
(those from the first difference on, one row per node) through the model's own modules, without any
patch, hook or estimate. Both are timed in turn, and the smaller of several times counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import patchsweep as ps
import torch
from patchsweep.attribution import Attribution, IntegratedInputs, IntegratedSite, get_methods
from patchsweep.attribution.budget import token_layers_per_pass
from patchsweep.spec.spec import SweepSpec, make_request
from transformer_lens.model_bridge import TransformerBridge

SITES = ["resid_pre", "attn_out", "mlp_out", "z"]
N_TIMES = 2
FILLER = "The weather was fine that day and many people walked along the river to see the boats. "


class Bare:
    """Passes of rows of one length through the plain Hugging Face model."""

    def __init__(self, bridge: TransformerBridge) -> None:
        self.model = bridge.original_model
        self.width = int(bridge.cfg.d_model)
        self.blocks = int(bridge.cfg.n_layers)
        self.most = token_layers_per_pass(bridge, 20)

    def forward(self, rows: int, length: int) -> None:
        """Run `rows` prompts forward."""
        with torch.no_grad():
            self._run(torch.randn(rows, length, self.width), 0)

    def both(self, rows: int, length: int, first: int = 0) -> None:
        """Run rows forward and backward, from block `first` on, in passes that fit in memory."""
        size = max(1, self.most // (length * (self.blocks - first)))
        for i in range(0, rows, size):
            n = min(size, rows - i)
            x = torch.randn(n, length, self.width).requires_grad_()
            self._run(x, first).sum().backward()

    def entering(self, rows: int, length: int) -> None:
        """Run `rows` more rows from each block on, forward and backward."""
        group: list[int] = []
        held = 0
        for block in range(self.blocks):
            for _ in range(rows):
                cost = length * (self.blocks - block)
                if group and held + cost > self.most:
                    self._group(group, length)
                    group, held = [], 0
                group.append(block)
                held += cost
        self._group(group, length)

    def _group(self, starts: list[int], length: int) -> None:
        rotary = self._rotary(length)
        x = torch.empty(0, length, self.width)
        for block in range(starts[0], self.blocks):
            new = starts.count(block)
            if new:
                x = torch.cat([x, torch.randn(new, length, self.width).requires_grad_()])
            x = self.model.model.layers[block](x, position_embeddings=rotary)
        self.model.lm_head(self.model.model.norm(x[:, -1:])).sum().backward()

    def _run(self, x: torch.Tensor, first: int) -> torch.Tensor:
        rotary = self._rotary(x.shape[1])
        for block in self.model.model.layers[first:]:
            x = block(x, position_embeddings=rotary)
        logits: torch.Tensor = self.model.lm_head(self.model.model.norm(x[:, -1:]))
        return logits

    def _rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(length).unsqueeze(0)
        both: tuple[torch.Tensor, torch.Tensor] = self.model.model.rotary_emb(
            torch.empty(1, length, self.width), positions
        )
        return both


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def long_pair(model: TransformerBridge) -> ps.PromptPairs:
    """Return a pair of about 300 tokens that differ in the last 20."""
    filler = (FILLER * 40).split()

    def text(names: str) -> str:
        return (
            f"{' '.join(filler[:250])} Then, when {names} went to the store, John gave a drink to"
        )

    return ps.PromptPairs.from_strings(
        model,
        clean=[text("Mary and John")],
        corrupted=[text("Paul and John")],
        answers=[(" Mary", " Paul")],
    )


def rows(model: TransformerBridge, pairs: ps.PromptPairs, *, slow: bool) -> list[str]:
    """Return the lines of the table for one set of pairs."""
    request = make_request(model, pairs, SweepSpec(SITES))
    batches = request.batches(range(len(pairs)))
    bare = Bare(model)
    shapes = [
        (len(b.pairs), b.length, b.length - b.first_difference()) for b in batches
    ]  # pairs, tokens, live tokens

    def passes(nodes: int, base: int = 0) -> None:
        for n, length, live in shapes:
            bare.forward(n, length)
            if base:
                bare.forward(n, live)
            bare.both(n * nodes, live)

    def per_layer(nodes: int) -> None:
        for n, length, live in shapes:
            bare.forward(n, length)
            bare.forward(n, live)
            bare.entering(n * nodes * len(SITES), live)

    def node_method(name: object) -> Callable[[], object]:
        (method,) = get_methods([name])  # type: ignore[list-item]
        attribution = Attribution(request, [method])
        return lambda: attribution.run(method, range(len(pairs)))

    cases: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("atp", node_method("atp"), lambda: passes(1)),
        ("relp", node_method("relp"), lambda: passes(1)),
        ("ig_inputs, 10 nodes", node_method(IntegratedInputs(10)), lambda: passes(10, 1)),
        ("EAP", lambda: ps.edges(model, pairs), lambda: passes(1)),
        ("EAP-IG, 5 nodes", lambda: ps.edges(model, pairs, steps=5), lambda: passes(5, 1)),
        ("EAP-IG, 20 nodes", lambda: ps.edges(model, pairs, steps=20), lambda: passes(20, 1)),
    ]
    if slow:
        cases.append(
            ("ig, 5 nodes, four sites", node_method(IntegratedSite(5)), lambda: per_layer(5))
        )
    lines = []
    lengths = "/".join(sorted({f"{length} ({live})" for _, length, live in shapes}))
    for name, run, least in cases:
        if len(pairs) == 1:
            run()  # what is measured once per model
        times = [(seconds(run), seconds(least)) for _ in range(N_TIMES)]
        here, there = (min(column) for column in zip(*times, strict=True))
        lines.append(
            f"| {len(pairs)} | {lengths} | {name} | {here:.2f} | {there:.2f} | {here / there:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Print the table."""
    counts = [int(x) for x in sys.argv[1:]] or [1, 8, 64]
    model = ps.load_model("smollm2-135m", device="cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    print("| pairs | tokens (live) | method | s | bare passes, s | ratio |")
    print("|---|---|---|---|---|---|")
    for n in counts:
        rows(model, ps.load_task(model, "ioi", n, seed=0), slow=n == 1)
    rows(model, long_pair(model), slow=False)


if __name__ == "__main__":
    main()
