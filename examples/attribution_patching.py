# %% [markdown]
# # Attribution patching: every patch from one gradient, and where it errs
#
# A patch changes an activation by some amount; the gradient says how much the metric changes with
# that activation. Their product estimates the patch, and one backward pass gives it for every
# activation at once. [Neel Nanda's demo and post] introduced this as attribution patching (AtP).
# Here estimates and exact patches come from the same call, so that each estimate can be checked
# before it is believed.
#
# [Neel Nanda's demo and post]: https://www.neelnanda.io/mechanistic-interpretability/attribution-patching

# %%
import numpy as np
import patchsweep as ps
from patchsweep.attribution.patterns import pattern_scores
from plots import heat_map, picture, scatter

model = ps.load_model("smollm2-135m")
texts = (  # the first three pairs of the demo; each sentence with its subject and the other name
    ("When John and Mary went to the shops, {} gave the bag to", "John", "Mary"),
    ("When Tom and James went to the park, {} gave the ball to", "James", "Tom"),
    ("When Dan and Sid went to the shops, {} gave an apple to", "Sid", "Dan"),
)
pairs = ps.PromptPairs.from_strings(
    model,
    clean=[text.format(subject) for text, subject, _ in texts],
    corrupted=[text.format(other) for text, _, other in texts],
    answers=[(f" {other}", f" {subject}") for _, subject, other in texts],
    labels=[{"S2": (10, 11), "end": (14, 15)}] * len(texts),
)
print(pairs[0].corrupted_tokens)

# %% [markdown]
# ## Estimates of everything
#
# Two forward passes and a backward pass give the residual stream, the layers' outputs, heads,
# queries, keys, values and attention patterns, at every layer and position. The variable `z_atp`
# holds the estimates of `z`, in logits of the metric.

# %%
parts = ["resid_pre", "attn_out", "mlp_out"]
inner = ["z", "q", "k", "v", "pattern"]
estimated = ps.sweep(model, pairs, parts + inner, method="atp")
tokens = [token or "(name etc.)" for token in ps.summary.shared_tokens(estimated)]
print(f"corrupted {estimated.base_metric.values.round(2)}")
print(f"clean     {estimated.source_metric.values.round(2)}")

# %%
means = {site: ps.summary.effect_mean(estimated, f"{site}_atp")[0] for site in parts + inner}
picture(
    *(heat_map(means[site], tokens, f"{site}, estimated", limit=6) for site in parts),
    alt="Estimated maps of layer by token: the residual stream is pale at the repeated name and "
    "dark at the last token from layer 20 on; of the attention layers, 23 stands out.",
)

# %%
summed = {site: means[site].sum("pos") for site in inner}
picture(
    *(
        heat_map(summed[site], range(summed[site].shape[1]), f"{site}, all positions", limit=4)
        for site in inner
    ),
    alt="Estimated maps of layer by head: a23.h3, a29.h1 and a29.h0 stand out by their output, "
    "a23.h0 and a24.h4 by their queries and patterns.",
)

# %% [markdown]
# ## The same patches, run
#
# Everything that matters happens at two tokens, the repeated name (S2) and the last one; so those
# are run exactly. The same call adds three ways to estimate: `atp`; `atp_star`, which takes
# queries and keys through the attention softmax exactly; and `ig_inputs`, which averages the
# gradient over ten steps from one prompt to the other.

# %%
both = ps.sweep(
    model,
    pairs,
    parts + inner,
    positions=["S2", "end"],
    method=["exact", "atp", "atp_star", "ig_inputs"],
)
agreement = ps.compare(both)
print("site       Pearson: atp  atp_star  ig_inputs   largest miss of atp")
for site in parts + inner:
    found = {m: agreement.of(site, m) for m in ("atp", "atp_star", "ig_inputs")}
    numbers = "      ".join(f"{a.pearson.value:.2f}" for a in found.values())
    miss = found["atp"].misses[0]
    print(
        f"{site:9s}           {numbers}        {miss.place} has {miss.exact:.2f}, "
        f"is given {miss.estimate:.2f}"
    )

# %%
exact = {site: ps.summary.effect_mean(both, site)[0] for site in parts + inner}
atp = {site: ps.summary.effect_mean(both, f"{site}_atp")[0] for site in parts + inner}
picture(
    *(
        scatter(
            {at: (exact[site].sel(pos=at), atp[site].sel(pos=at)) for at in ("S2", "end")},
            site,
            x_name="exact effect",
            y_name="estimate (logits)",
            size=(210, 190),
        )
        for site in parts + inner
    ),
    columns=4,
    alt="Eight scatters of estimate against exact effect. At the last token most points lie on the "
    "line of equality; at the repeated name many lie far below it.",
)

# %% [markdown]
# The post's summary is that the approximation is decent for small activations such as heads, and
# bad for big ones such as the residual stream. On this model that is half of it:
#
# - The **residual stream** is bad indeed. Patching the name at layer 0 turns the answer round, and
#   is given less than a tenth of its effect: a straight line along the gradient at ` Mary` does
#   not lead to ` John`. MLP 0, which reads that embedding, fares alike.
# - **Layer outputs and heads at the last token** are good from layer 21 on: close to what is read,
#   little can bend.
# - **Heads that act through other heads** come out badly, small activations as they are. a17.h4 at
#   the repeated name has the largest effect of all, and is given about an eighth of it; a20.h0 at
#   the last token is given a quarter. It is no fault of their own softmax: `z` is patched behind
#   it, and `atp_star`, which mends the softmax, says the same. What bends is what follows: a20.h0
#   acts through the queries of layer 23 ([the study by head class](head_ablation.md)), and a17.h4
#   comes before it.
# - **`ig_inputs`** sees more of them, because along the way between the prompts those later heads
#   come alive. It is the best for nearly every site, for ten times the price.
#
# So: an estimate near the logits may be believed; where other heads lie between, a small one means
# little. [Screening](../attribution.md#screening) runs the foremost estimates exactly, which is as
# good as the ranking is: here the head that counts most still comes eleventh.

# %%
pearson = {site: agreement.of(site, "atp").pearson.value for site in parts + inner}
assert pearson["resid_pre"] < 0.65
assert pearson["mlp_out"] < 0.8
assert pearson["z"] > 0.8
assert pearson["k"] > 0.95
assert atp["resid_pre"].sel(layer=0, pos="S2") < 0.1 * exact["resid_pre"].sel(layer=0, pos="S2")
missed = {"layer": 17, "head": 4, "pos": "S2"}
ranks = {
    name: 1 + int((abs(cells) > abs(cells.sel(missed))).sum())
    for name, cells in (("exact", exact["z"]), ("atp", atp["z"]))
}
star, ig = (
    ps.summary.effect_mean(both, f"z_{m}")[0].sel(missed).item() for m in ("atp_star", "ig_inputs")
)
print(
    f"a17.h4 at S2: exact {exact['z'].sel(missed):.2f}, atp {atp['z'].sel(missed):.2f}, "
    f"atp_star {star:.2f}, ig_inputs {ig:.2f}; rank {ranks['exact']} by exact, "
    f"{ranks['atp']} by atp"
)
assert ranks["exact"] == 1
assert 8 < ranks["atp"] < 15
assert atp["z"].sel(missed) < 0.2 * exact["z"].sel(missed)
assert ig > 0.4 * exact["z"].sel(missed)
second = {"layer": 20, "head": 0, "pos": "end"}
assert atp["z"].sel(second) < 0.3 * exact["z"].sel(second)
late = {"layer": slice(21, None), "pos": "end"}
assert abs(atp["z"] - exact["z"]).sel(late).max() < 0.5

# %% [markdown]
# ## Attention patterns, cell by cell
#
# For single cells of a pattern there is no patch that a model could meet, since rows sum to one.
# The product still says where a head's effect comes from. Heads are ranked by the sum of sizes;
# `patch` is their signed sum.

# %%
scores = pattern_scores(model, pairs)
foremost = scores.heads(n=6)
for head in foremost:
    print(
        f"a{head.layer}.h{head.head}: size {head.size:.2f}, patch {head.patch:+.2f}, most by "
        f"{head.dest} looking at {head.src}"
    )

# %% [markdown]
# Four of these are heads of layers 23 and 24 that look from the last token at the first ` Mary`,
# the answer; a24.h4 against it, the others for it. So there *are* name movers whose pattern
# changes, as in the [IOI paper](https://arxiv.org/abs/2211.00593). The two heads that move most
# (a23.h3, a20.h0) are missing here because their pattern stays as it is.

# %%
named = {f"a{head.layer}.h{head.head}": head for head in foremost}
assert named["a24.h4"].patch < 0 < named["a23.h0"].patch
assert named["a23.h0"].src.endswith("' Mary'")
assert "a23.h3" not in named
assert "a20.h0" not in named

# %% [markdown]
# ## Paths
#
# An edge is what one component writes, as far as one reader alone sees it (edge attribution
# patching, [arXiv 2310.10348](https://arxiv.org/abs/2310.10348)). All 70,651 of them are estimated
# for the first pair, and the foremost hundred run exactly.

# %%
edges = ps.screen_edges(model, pairs[:1], top=100)
verified = (edges["edge"] - edges.base_metric).values[0, 0]
guessed = edges.edge_estimate.values[0, 0]
ends = list(zip(edges.edge_sender.values, edges.edge_reader.values, strict=True))
print("edge                 estimate   exact")
for (sender, reader), guess, truth in list(zip(ends, guessed, verified, strict=True))[:12]:
    print(f"{sender + ' -> ' + reader:20s}    {guess:+.2f}   {truth:+.2f}")


# %%
def kind(reader: str) -> str:
    """What sort of reader it is."""
    if reader == "logits":
        return "logits"
    return "an MLP" if reader.startswith("m") else "a head's q, k or v"


kinds = {
    name: np.array([kind(r) == name for _, r in ends]) for name in map(kind, ("logits", "m1", "a1"))
}
picture(
    scatter(
        {f"into {name}": (verified[which], guessed[which]) for name, which in kinds.items()},
        "The hundred foremost edges",
        x_name="exact effect",
        y_name="estimate (logits)",
        size=(420, 300),
    ),
    alt="Estimate against exact effect of edges. Those into the logits lie on the line; some into "
    "MLPs and heads lie off it.",
)

# %% [markdown]
# Edges into the logits are estimated as good as exactly: nothing but the last norm lies behind
# them. `a23.h3 -> logits` comes first: the head that finds the repeated name writes to the logits
# itself. Edges into MLPs are the least to be trusted. `embed -> m0` has the largest effect of all
# that were run and is given a quarter of it; `a20.h0 -> m20` is given three times its size.

# %%
correlation = {
    name: np.corrcoef(verified[which], guessed[which])[0, 1] for name, which in kinds.items()
}
print({name: round(float(value), 3) for name, value in correlation.items()})
by_edge = {f"{s}->{r}": (g, t) for (s, r), g, t in zip(ends, guessed, verified, strict=True)}
assert correlation["logits"] > 0.99 > correlation["an MLP"]
assert ends[0] == ("a23.h3", "logits")
assert by_edge["embed->m0"][1] == verified.max()
assert by_edge["embed->m0"][0] < 0.3 * by_edge["embed->m0"][1]
assert by_edge["a20.h0->m20"][0] < 3 * by_edge["a20.h0->m20"][1]
