# %% [markdown]
# # Ablating heads: three ways, by class
#
# To say that a head matters is to say that something changes when its output is replaced. By what?
# By zeros, by its mean, or by what it would have been on another prompt (resample): all three are
# in use, and they answer different questions. `patchsweep.heads.study` ablates every head in each
# way, classes the heads by what they do, and puts the answers side by side.

# %%
import numpy as np
import patchsweep as ps
from patchsweep.analyses.heads import effects
from plots import bars, heat_map, picture, scatter

model = ps.load_model("smollm2-135m")
texts = (  # the sentence, its subject, the other name, and where the other name stands
    ("When John and Mary went to the shops, {} gave the bag to", "John", "Mary", 4),
    ("When Tom and James went to the park, {} gave the ball to", "James", "Tom", 2),
    ("When Dan and Sid went to the shops, {} gave an apple to", "Sid", "Dan", 2),
    ("After Martin and Amy went to the park, {} gave a drink to", "Amy", "Martin", 2),
)
pairs = ps.PromptPairs.from_strings(
    model,
    clean=[text.format(subject) for text, subject, _, _ in texts],
    corrupted=[text.format(other) for text, _, other, _ in texts],
    answers=[(f" {other}", f" {subject}") for _, subject, other, _ in texts],
    labels=[{"IO": (io, io + 1), "S2": (10, 11), "end": (14, 15)} for *_, io in texts],
)
ds = ps.study(model, pairs, ablations=["resample", "mean", "zero"], optimal=None)
clean, corrupted = ds.base_metric.mean().item(), ds.source_metric.mean().item()
print(f"logit difference: {clean:.2f} on clean prompts, {corrupted:.2f} on corrupted ones")

# %% [markdown]
# ## Which head is what
#
# Induction, previous-token and duplicate-token heads are found by how they attend on repeated
# random words (TransformerLens's `detect_head`). The others are classes of the [IOI
# paper](https://arxiv.org/abs/2211.00593), measured on these pairs: a *name mover* looks from the
# last token at the indirect object and speaks for it in the logits, a *negative* one against it;
# an *S-inhibition* head looks at the repeated name and works through the queries of the name
# movers; a *backup* begins to speak when the name movers are held still.

# %%
members = {}
for name in ds.head_class.values:
    mask = ds.member.sel(head_class=name).values
    members[str(name)] = [f"a{layer}.h{head}" for layer, head in np.argwhere(mask)]
    shown = ", ".join(members[name]) if len(members[name]) < 20 else f"{len(members[name])} heads"
    print(f"{name:16}{shown}")

# %% [markdown]
# Every class of GPT-2's circuit is here, with heads of its own. The name movers of this model are
# four heads of layer 23; a20.h0 does for them what S-inhibition heads do in GPT-2. Before reading
# on, though, look at who is *not* in the list.

# %%
change = effects(ds).sel(metric="logit_diff").mean("pair")  # [ablation, layer, head]


def foremost(ablation: str, n: int = 8) -> dict[str, float]:
    """The heads with the largest effect."""
    values = change.sel(ablation=ablation).values
    best = np.argsort(-np.abs(values), axis=None)[:n]
    at = zip(*np.unravel_index(best, values.shape), strict=True)
    return {f"a{layer}.h{head}": float(values[layer, head]) for layer, head in at}


for ablation in ("resample", "mean", "zero"):
    print(f"{ablation:9}" + "  ".join(f"{h} {v:+.2f}" for h, v in foremost(ablation).items()))

a23h3 = {"layer": 23, "head": 3}
seen = ds.attention.sel(a23h3).mean("pair")
print(
    f"a23.h3: direct effect {ds.direct.sel(a23h3).mean().item():.2f}, looks at S2 "
    f"{seen.sel(place='S2').item():.2f}, at IO {seen.sel(place='IO').item():.2f}"
)

# %%
picture(
    *(
        heat_map(change.sel(ablation=name), range(9), name, limit=4, unit="logits")
        for name in ("resample", "mean", "zero")
    ),
    scatter(
        {
            name: (change.sel(ablation="resample"), change.sel(ablation=name))
            for name in ("mean", "zero")
        },
        "Every head: change of the logit difference",
        x_name="resample",
        y_name="mean or zero",
        size=(300, 270),
    ),
    alt="Maps of the change of the logit difference by layer and head. a23.h3, a20.h0, a17.h4 and "
    "a29.h1 are dark in all three; under mean and zero many early heads are too.",
)

# %% [markdown]
# **a23.h3 has the largest effect in all three ways and no class.** It looks at the *repeated* name
# and writes to the logits itself, against that name and for the other. GPT-2's circuit has no such
# head: there, what looks at the repeated name acts through queries, and what acts on the logits
# looks at the other name. Classes that were made for one model are a place to start, not a list to
# tick off.

# %%
assert all(next(iter(foremost(name))) == "a23.h3" for name in ("resample", "mean", "zero"))
assert "a23.h3" in members["other"]
assert seen.sel(place="S2") > 0.5
assert ds.direct.sel(a23h3).mean() > 4
assert set(members["name_mover"]) == {"a23.h0", "a23.h1", "a23.h2", "a23.h7"}
assert "a20.h0" in members["s_inhibition"]
assert "a17.h4" in members["induction"]
assert members["negative"] == ["a24.h4"]

# %% [markdown]
# ## How far the ways disagree, class by class
#
# `mean_effect` is the mean change over the heads of a class; `disagreement` the mean distance of a
# head's change from that under resample, in logits.

# %%
effect = ds.mean_effect.sel(metric="logit_diff")
apart = ds.disagreement.sel(metric="logit_diff")
print("class            heads   resample   mean    zero    mean apart   zero apart")
for name in ds.table_class.values:
    row = [effect.sel(table_class=name, ablation=a).item() for a in ("resample", "mean", "zero")]
    row += [apart.sel(table_class=name, ablation=a).item() for a in ("mean", "zero")]
    heads = int(ds.n_heads.sel(table_class=name, ablation="mean"))
    print(
        f"{name:16} {heads:4}    {row[0]:+.2f}     {row[1]:+.2f}   {row[2]:+.2f}     "
        f"{row[3]:.2f}         {row[4]:.2f}"
    )
same = ds.rank_correlation.sel(metric="logit_diff", table_class="all")
print({str(a): round(same.sel(ablation=a).item(), 2) for a in ("mean", "zero")}, "rank correlation")
a24h4 = {"layer": 24, "head": 4}
speaks, held = (ds[v].sel(a24h4).mean().item() for v in ("direct", "direct_without_movers"))
print(
    f"a24.h4's direct effect: {speaks:+.2f}, with the name movers held at their means {held:+.2f}"
)

# %%
shown = ["induction", "previous_token", "name_mover", "negative", "s_inhibition", "other"]
picture(
    *(
        bars(
            {c: effect.sel(table_class=c, ablation=name).item() for c in shown},
            name,
            unit="mean change of the logit difference",
            width=310,
            span=(-2.6, 1.7),
        )
        for name in ("resample", "mean", "zero")
    ),
    alt="By class: under resample name movers lower the logit difference when ablated and the "
    "negative head raises it; under mean and zero both signs are reversed.",
)

# %% [markdown]
# - **Name movers and the negative head change sign.** Resampled, name movers cost the answer and
#   the negative head spares it, as their names say. Set to zero or to a mean it is the other way
#   round. Resample puts in what the head does when the *other* name is repeated, so that it works
#   for the wrong name; zero and mean only take it out, and then other heads may make up for it.
#   a24.h4 is such a head: while the name movers work, it speaks against the answer; held still,
#   for it.
# - **S-inhibition** comes out at less than half. Resampled, a20.h0 points the name movers to the
#   wrong name; taken out, it points them nowhere.
# - **Previous-token heads** seem to matter under mean and zero, and not under resample. They do
#   the same in both prompts, so that there is nothing to resample; what they do is needed all the
#   same.
# - Over all 270 heads the orders hardly agree. Four heads are among the foremost eight in all
#   three ways, so a short list survives; a ranking does not.
#
# So: resample for what *decides* between two answers, mean or zero for what the answer *needs*,
# and neither without saying which. A fourth way, constants trained to do the least harm (optimal
# ablation, [arXiv 2409.09951](https://arxiv.org/abs/2409.09951)), is what `optimal=` adds; it
# trains for some minutes, and is left out here.

# %%
mover, negative = (
    {a: effect.sel(table_class=c, ablation=a).item() for a in effect.ablation.values}
    for c in ("name_mover", "negative")
)
assert mover["resample"] < 0 < mover["mean"]
assert mover["zero"] > 0
assert negative["resample"] > 0 > negative["mean"]
assert negative["zero"] < 0
assert "a24.h4" in members["backup"]
assert speaks < 0 < held
inhibition = effect.sel(table_class="s_inhibition")
assert inhibition.sel(ablation="resample") < 2 * inhibition.sel(ablation="mean") < 0
previous = abs(effect.sel(table_class="previous_token"))
assert previous.sel(ablation="resample") < 0.1 * previous.sel(ablation="mean")
assert abs(same).sel(ablation=["mean", "zero"]).max() < 0.3
four = {"a23.h3", "a20.h0", "a17.h4", "a29.h1"}
assert all(four <= set(foremost(name)) for name in ("resample", "mean", "zero"))
