# %% [markdown]
# # Factual recall: where a landmark becomes a city
#
# "The Eiffel Tower is in the city of" ends in Paris because the model knows something about three
# tokens. Where is it looked up, and how does it get to the end? [Meng et al.] traced facts in
# GPT-2 XL by adding noise to the subject. Here the corrupted prompt names another landmark, which
# asks not what the model needs in order to say a city, but what decides *which*.
#
# [Meng et al.]: https://arxiv.org/abs/2202.05262

# %%
import patchsweep as ps
import torch
from plots import bars, heat_map, lines, picture

model = ps.load_model("smollm2-135m")
TEMPLATE = "The {} is in the city of"
landmarks = {  # names of three tokens each
    "Eiffel Tower": " Paris",
    "Louvre Museum": " Paris",
    "Colosseum": " Rome",
    "Brandenburg Gate": " Berlin",
    "Golden Gate Bridge": " San",
    "Hagia Sophia": " Istanbul",
    "Statue of Liberty": " New",
    "Sydney Opera House": " Sydney",
}
names = list(landmarks)
others = [names[i] for i in (2, 3, 5, 4, 5, 0, 1, 6)]  # in the corrupted prompt
pairs = ps.PromptPairs.from_strings(
    model,
    clean=[TEMPLATE.format(name) for name in names],
    corrupted=[TEMPLATE.format(other) for other in others],
    answers=[(landmarks[n], landmarks[o]) for n, o in zip(names, others, strict=True)],
    labels=[{"first": (2, 3), "middle": (3, 4), "last": (4, 5), "subject": (2, 5), "end": (9, 10)}]
    * len(names),
)

# %% [markdown]
# ## Does it know?
#
# A sweep over facts that the model does not know explains nothing. (The built-in task `facts` has
# many more, of five relations; `patchsweep task check facts` says how many SmolLM2 knows.)

# %%
with torch.no_grad():
    odds = model(torch.tensor([pair.clean for pair in pairs]))[:, -1].softmax(-1)
for pair, row in zip(pairs, odds, strict=True):
    best = int(row.argmax())
    print(f"{pair.clean_tokens[2:5]!s:38} {model.tokenizer.decode([best])!r} {row[best]:.2f}")
    assert best == pair.answer[0]  # the first guess, every time

# %% [markdown]
# ## Token by token
#
# Labels name the tokens, so that pairs are averaged over places that mean the same; `subject`
# spans all three and patches them together. Fractions are ratios of means over the eight pairs.

# %%
sites = ["resid_pre", "attn_out", "mlp_out"]
spots = ["first", "middle", "last", "subject", "end"]
found = ps.sweep(model, pairs, sites, positions=spots)
recovered = {site: ps.summary.recovered_mean(found, site)[0] for site in sites}
ends = {run: found[f"{run}_metric"].mean().item() for run in ("source", "base")}
print(f"mean logit difference: {ends['source']:.2f} clean, {ends['base']:.2f} corrupted")
picture(
    *(
        heat_map(recovered[site], spots, site, limit=1, cell=(34, 11))
        for site in ("resid_pre", "attn_out", "mlp_out")
    ),
    lines(
        {spot: recovered["resid_pre"].sel(pos=spot) for spot in spots},
        "Residual stream entering the layer",
        y_name="recovered",
        size=(330, 290),
    ),
    alt="The stream at the subject holds everything until layer 23, where attention at the last "
    "token takes over at once. MLPs matter at the subject in layers 0 to 8, attention there in "
    "layers 1 and 3 alone.",
)

# %% [markdown]
# One step carries the fact: **attention of layer 23 at the last token** recovers three quarters,
# and no other attention layer there more than a twentieth. Before it the subject's tokens hold
# everything, after it they hold next to nothing.
#
# Which token of the subject? In GPT-2 XL it is the last one (there single states recover most, and
# the MLPs that matter sit at layers around 15 of 48). Here the *middle* one holds half and the
# last a third: the pieces that tell these names apart are ` E` + `iffel`, ` Lou` + `vre`, ` Col` +
# `osse`, while ` Tower`, ` Museum` or `um` say little. It does not all come together at the last
# token, and it need not, since the head that reads it can look at all three.

# %%
stream = recovered["resid_pre"]
moved = recovered["attn_out"].sel(pos="end")
assert stream.sel(pos="subject", layer=slice(0, 21)).min() > 0.95
assert stream.sel(pos="end", layer=23) < 0.1
assert stream.sel(pos="end", layer=24) > 0.75
assert moved.sel(layer=23) > 0.7
assert abs(moved.drop_sel(layer=23)).max() < 0.06
assert stream.sel(pos="middle", layer=20) > stream.sel(pos="last", layer=20) + 0.1

# %% [markdown]
# ## MLPs or attention
#
# Single layers share the work, so layers are patched in windows of six, as Meng et al. patch
# windows of ten: a tuple of layers is one patch.

# %%
windows = [tuple(range(first, first + 6)) for first in range(25)]
wide = ps.sweep(model, pairs, ["attn_out", "mlp_out"], layers=windows, positions=["subject", "end"])
at = {
    f"{word} at the {spot}": ps.summary.recovered_mean(wide, site)[0].sel(pos=spot)
    for word, site in (("MLPs", "mlp_out"), ("attention", "attn_out"))
    for spot in ("subject", "end")
}
for name, values in at.items():
    most = int(values[1:].argmax()) + 1  # MLP 0 stands for the token itself: left out
    print(f"{name}: at most {values[most]:.2f}, layers {most} to {most + 5}")

# %% [markdown]
# MLP 0 alone recovers everything, which says no more than that it reads the token. Past it, MLPs
# at the subject recover more than half in a window of early layers, and keep mattering up to layer
# 13 or so. Attention at the subject recovers a third, in the first layers alone, where it joins
# the pieces of the name. So the division of labour is that of GPT-2 XL (there 6.6 % against 1.6 %
# of probability at the last subject token): **MLPs enrich the subject, attention fetches it**. At
# the last token MLPs have a share again once layer 23 has fetched it: a third, in reading it out.

# %%
assert at["MLPs at the subject"][1:].max() > 0.5
assert at["attention at the subject"][1:].max() < 0.4
assert at["attention at the subject"][4:].max() < 0.1
assert at["attention at the end"].max() > 0.75
assert at["MLPs at the end"][:18].max() < 0.05
assert 0.25 < at["MLPs at the end"].max() < 0.45

# %% [markdown]
# ## The head that fetches it

# %%
late = ps.sweep(model, pairs, ["z", "pattern"], layers=range(18, 30), positions=["end"])
share = {
    site: {f"a{e.layer}.h{e.head}": e.recovered for e in ps.summary.largest(late, site, n=108)}
    for site in ("z", "pattern")
}
foremost = list(share["z"])[:6]
with torch.no_grad():
    _, cache = model.run_with_cache(torch.tensor([pair.clean for pair in pairs]))
looks = cache["blocks.23.attn.hook_pattern"][:, 4, 9]  # of a23.h4, from the last token
picture(
    bars(
        {head: share["z"][head] for head in foremost}, "z at the end, recovered", span=(-0.3, 0.4)
    ),
    bars(
        {head: share["pattern"].get(head, 0.0) for head in foremost},
        "pattern at the end, recovered",
        span=(-0.3, 0.4),
    ),
    heat_map(
        looks,
        ["start", "The", "first", "middle", "last", "is", "in", "the", "city", "of"],
        "a23.h4 looks from the end at",
        limit=1,
        rows=names,
        row_name="landmark",
        cell=(30, 18),
    ),
    alt="a23.h4 recovers most; its pattern nothing. It looks at the subject's three tokens, mostly "
    "at the middle one.",
)

# %%
print({head: round(share["z"][head], 2) for head in foremost})
print(
    f"a23.h4's attention: first {looks[:, 2].mean():.2f}, middle {looks[:, 3].mean():.2f}, "
    f"last {looks[:, 4].mean():.2f}"
)
assert foremost[0] == "a23.h4"
assert share["pattern"]["a23.h4"] < 0.05
assert looks[:, 3].mean() > looks[:, 4].mean() > looks[:, 2].mean()

# %% [markdown]
# Two fifths of the fact pass a single head, a23.h4, which looks at the subject whichever it is:
# its pattern recovers nothing, its values everything. It looks at `vre`, `enburg` and `iffel`, at
# ` Sydney`, and where the last token tells most (` Sophia`, ` Liberty`) at that. In layer 29 heads
# 0 and 1 pull against and for the answer, as they do on [indirect
# objects](activation_patching.md), so they hardly belong to the fact.
