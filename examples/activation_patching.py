# %% [markdown]
# # Activation patching: one pair, every patch
#
# Take two prompts that differ in one name, run the model on the second, and put a single
# activation of the first in its place. If the answer of the first prompt comes back, that
# activation carried the difference. Doing this for every layer, position and head is the usual
# first look at a behaviour; [TransformerLens's demo] does it on GPT-2 small with a forward pass
# for each patch. Here the patches of a sweep share their passes, so the large sweeps (single heads
# at single positions; queries, keys, values and patterns) are cheap enough to run without thinking
# about it.
#
# [TransformerLens's demo]: https://github.com/TransformerLensOrg/TransformerLens/blob/main/demos/Activation_Patching_in_TL_Demo.ipynb

# %%
import numpy as np
import patchsweep as ps
import torch
from plots import bars, heat_map, lines, picture

model = ps.load_model("smollm2-135m")
pairs = ps.PromptPairs.from_strings(
    model,
    clean=["When John and Mary went to the shops, John gave a bottle of milk to"],
    corrupted=["When John and Mary went to the shops, Mary gave a bottle of milk to"],
    answers=[(" Mary", " John")],
)
tokens = pairs[0].corrupted_tokens  # those of the run that is patched
S2, END = 10, 16  # the name that is repeated, and the last token, where the answer is read
print(f"{len(tokens)} tokens: {tokens[S2]!r} at {S2}, {tokens[END]!r} at {END}")

# %% [markdown]
# ## What it costs
#
# `plan` counts tokens times layers, the unit in which forward passes are paid. A patch cannot
# change what lies before it, neither in position nor in depth, and most positions of this pair
# hold the same values in both runs: those patches are known without being run.

# %%
parts = ["resid_pre", "attn_out", "mlp_out"]
for sites, positions in ((parts, None), (["z"], None), (["z", "q", "k", "v", "pattern"], "all")):
    cost = ps.plan(model, pairs, sites, positions=positions)
    share = cost.token_layers / cost.loop_token_layers
    print(
        f"{', '.join(sites)}: {cost.n_patches} patches for {cost.token_layers} token-layers, "
        f"{share:.1%} of a pass per patch"
    )

# %% [markdown]
# ## Where the answer is, layer by layer
#
# The residual stream, and what attention and MLPs add to it, at each position. Values are
# recovered fractions: 0 is the corrupted run, 1 the clean one.

# %%
where = ps.sweep(model, pairs, parts)
base, source = where.base_metric.item(), where.source_metric.item()
print(f"logit difference: {base:.2f} corrupted, {source:.2f} clean")
recovered = {site: where.patchsweep.recovered(site)[0, 0] for site in parts}
for effect in ps.summary.largest(where, "attn_out", n=4):
    print(f"attention of layer {effect.layer} at {effect.token!r}: recovers {effect.recovered:.2f}")

# %%
titles = ("Residual stream entering the layer", "Attention's output", "MLP's output")
picture(
    *(
        heat_map(recovered[site], tokens, title, limit=1)
        for site, title in zip(parts, titles, strict=True)
    ),
    alt="Three maps of layer by token. The residual stream is red at the repeated name up to layer "
    "20 and at the last token from layer 21 on. Attention matters in layer 17 at the name, and in "
    "layers 20 and 23 at the last token. Of the MLPs only that of layer 0 stands out.",
)

# %% [markdown]
# The answer is decided at one token and then moved. Up to layer 19 everything sits at the repeated
# name: patching the stream there restores the clean answer whole. Two attention layers move it to
# the last token: after layer 20 half of it has arrived, after layer 23 nine tenths. In between
# attention works at the name itself, in layer 17. MLP 0 recovers everything as well, for a dull
# reason: it turns the embedding of a name into what later layers read, so to patch it is to patch
# the name.
#
# In TransformerLens's demo GPT-2 small shows the same picture with fewer layers: the name still
# recovers 0.92 entering layer 7 of 12, and the last token 0.94 entering layer 9.

# %%
stream = recovered["resid_pre"]
assert (stream[:20, S2] > 0.99).all()
assert abs(stream[24, END] - 0.89) < 0.02
assert 0.45 < stream[21, END] < 0.55
assert recovered["mlp_out"][0, S2] > 0.99
assert [e.layer for e in ps.summary.largest(where, "attn_out", n=3)] == [23, 20, 17]

# %% [markdown]
# ## Which heads
#
# `z` is what a head has gathered, before its output weights. First every head at every position
# (4,590 patches), then each head at all positions at once.

# %%
heads = ps.sweep(model, pairs, ["z"])
at = heads.patchsweep.recovered("z")[0, 0]
for effect in ps.summary.largest(heads, "z", n=8):
    print(f"a{effect.layer}.h{effect.head} at {effect.token!r}: {effect.recovered:+.2f}")

# %%
inside = ps.sweep(model, pairs, ["z", "q", "k", "v", "pattern"], positions="all")
whole = {site: inside.patchsweep.recovered(site)[0, 0] for site in ("z", "q", "k", "v", "pattern")}
picture(
    heat_map(at[:, S2], range(9), "z at the name", limit=0.6),
    heat_map(at[:, END], range(9), "z at the end", limit=0.6),
    *(
        heat_map(values, range(values.shape[1]), f"{site}, all positions", limit=0.6)
        for site, values in whole.items()
    ),
    columns=4,
    alt="Maps of layer by head: a23.h3, a20.h0 and a29.h1 recover most by their output, a29.h0 "
    "works against them; queries and patterns matter in a17.h4 and in layer 23; of the keys none; "
    "of the values key-value head 1 of layer 23 and head 0 of layer 20.",
)

# %% [markdown]
# Few heads do it, and each head's inputs tell how. A head can change because it looks elsewhere
# (its queries, keys, and so its pattern) or because it finds something else there (its values).

# %%
with torch.no_grad():
    _, cache = model.run_with_cache(torch.tensor([pairs[0].clean]))
print("head    z      q      pattern v of its group   looks in the clean run")
for layer, head, position in ((17, 4, S2), (20, 0, END), (23, 3, END), (23, 0, END), (29, 1, END)):
    looks = cache[f"blocks.{layer}.attn.hook_pattern"][0, head, position]
    most = int(looks[1:].argmax()) + 1  # the start token is where a head looks for nothing
    cells = [float(whole[site][layer, head]) for site in ("z", "q", "pattern")]
    cells.append(float(whole["v"][layer, head // 3]))  # three heads share a key-value head
    numbers = "  ".join(f"{cell:+.2f}" for cell in cells)
    seen, own = pairs[0].clean_tokens[most], pairs[0].clean_tokens[position]
    print(f"a{layer}.h{head}  {numbers}          {own!r} at {seen!r} ({most}), {looks[most]:.2f}")

# %% [markdown]
# - **a23.h3 and a20.h0** carry the answer by their *values*: they look from the last token at the
#   repeated name in both runs, and what changes is what they find there. The direct path of a23.h3
#   to the logits ([attribution patching](attribution_patching.md)) says that it writes to the
#   logits itself, against the name it finds and for the other.
# - **a17.h4** changes by its *queries*, at the repeated name. It looks at the word after the first
#   ` John`: an induction head, which tells that this name has been here before.
# - **a23.h0** changes by its queries too. At the last token it looks at ` Mary`, the answer.
# - **a29.h0** pulls the other way, and a29.h1 beside it pulls back as much.
#
# In GPT-2 small, by the [IOI paper](https://arxiv.org/abs/2211.00593), S-inhibition heads change
# the queries of name movers, which copy the other name. That step exists here ([the study by head
# class](head_ablation.md) finds it in a20.h0 and the queries of layer 23), and beside it a head
# that GPT-2's circuit lacks and that counts for most: a23.h3 reads the repeated name itself.

# %%
foremost = [f"a{e.layer}.h{e.head}" for e in ps.summary.largest(heads, "z", n=5)]
assert foremost == ["a23.h3", "a20.h0", "a29.h1", "a29.h0", "a17.h4"], foremost
assert whole["v"][23, 1] > 0.5
assert abs(whole["pattern"][23, 3]) < 0.05
assert whole["v"][20, 0] > 0.3
assert abs(whole["pattern"][20, 0]) < 0.05
assert whole["q"][17, 4] > 0.15
assert whole["q"][23, 0] > 0.1
assert whole["z"][29, 0] < -0.2

# %% [markdown]
# ## Answers of several tokens
#
# Few names are a single token of this tokenizer, and with `multi_token=True` they need not be. The
# answer's tokens but the last are appended to both prompts, and the metric reads them all:
# `log_prob` is the log-probability of the whole answer. (`logit_diff` would compare ` Rajesh` read
# behind ` Fat`, which says little.) A function of the logits (`[row, token, vocabulary]`) is a
# metric too, so one may ask for each token alone.

# %%
longer = ps.PromptPairs.from_strings(
    model,
    clean=["When Rajesh and Fatima went to the shops, Rajesh gave a bottle of milk to"],
    corrupted=["When Rajesh and Fatima went to the shops, Fatima gave a bottle of milk to"],
    answers=[(" Fatima", " Rajesh")],
    multi_token=True,
)
fat, ima = longer[0].answer


def first(logits: torch.Tensor) -> torch.Tensor:
    """Log-probability of the answer's first token."""
    return logits[:, 0].log_softmax(-1)[:, fat]


def second(logits: torch.Tensor) -> torch.Tensor:
    """Log-probability of its second token, after the first."""
    return logits[:, 1].log_softmax(-1)[:, ima]


found = ps.sweep(model, longer, ["resid_pre", "attn_out"], ["log_prob", first, second])
for name in found.metric.values:
    low, high = (found[f"{run}_metric"].sel(metric=name).item() for run in ("base", "source"))
    print(f"{name}: {low:.4f} corrupted, {high:.4f} clean")

# %%
labels = [str(token) for token in found.base_token.values[0]]
named = found.patchsweep.recovered("resid_pre").sel(metric="log_prob")[0]
attention = ps.summary.effect_mean(found, "attn_out").sel(metric="log_prob")[:, 19]
strongest = sorted(range(30), key=lambda layer: -abs(float(attention[layer])))[:6]
picture(
    heat_map(named, labels, "Residual stream, log_prob", limit=1),
    lines(
        {f"{labels[p]} ({p})": named[:, p] for p in (12, 13, 14, 19)},
        "The same at four positions",
        y_name="recovered",
        size=(330, 290),
    ),
    bars(
        {f"layer {layer}": float(attention[layer]) for layer in sorted(strongest)},
        "Attention at the last token of the prompt",
        unit="change of log_prob, nats",
    ),
    alt="The answer sits at both tokens of the repeated name until layer 20, then at the last "
    "token of the prompt; attention of layers 20 and 23 helps, that of layer 24 harms.",
)

# %% [markdown]
# The whole question is about the first token: after ` Fat` the model says `ima` in either run. Its
# first token already tells the two names apart and recovers three quarters from layer 0 on; the
# second token has nothing of its own at first, gathers the name in layers 2 to 17, and is as good
# a place for the patch by layer 19. From there the way is that of the pair above: attention in
# layers 20 and 23 moves it to the last token. Layer 24 works against it, much more strongly than
# for John and Mary: alone it costs more than the whole difference between the two runs.

# %%
assert (found.base_metric.sel(metric="second") > -0.01).all()
assert named[0, 12] > 0.7
assert abs(named[0, 13]) < 0.1
assert named[19, 13] > 0.7
assert np.argsort(-attention.values)[:2].tolist() == [23, 20]
assert attention.values.argmin() == 24
assert -attention.values.min() > (found.source_metric - found.base_metric)[0, 0]
