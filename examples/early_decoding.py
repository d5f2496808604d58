# %% [markdown]
# # Early decoding, or which sublayer turns Poland into Warsaw
#
# Read the residual stream after every sublayer through the model's last norm and unembedding, and
# see what the model would say if it stopped there (the [logit lens]). Take one sublayer's write
# away and see what it says then. Both are easily read as "this sublayer brings the answer in".
# This page asks the question in four ways, and gets three answers.
#
# [logit lens]: https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens

# %%
import patchsweep as ps
from patchsweep.analyses.logit_lens import Patch
from plots import bars, lines, picture

model = ps.load_model("smollm2-135m")
pairs = ps.PromptPairs.from_strings(
    model,
    clean=["The capital of Poland is"],
    corrupted=["The capital of Germany is"],
    answers=[(" Warsaw", " Berlin")],
    labels=[{"subject": " Poland", "end": " is"}],
)

# %% [markdown]
# ## 1. What each place says
#
# `lens` reads the clean prompt at every layer, point and position. `resid_mid` lies between
# attention and MLP, so the steps from `resid_pre` to `resid_mid` to `resid_post` are one sublayer
# each.

# %%
decoded = ps.lens(model, pairs).isel(run=0, pair=0, pos=-1)
for layer, point in (
    (21, "resid_post"),
    (22, "resid_post"),
    (23, "resid_mid"),
    (23, "resid_post"),
    (26, "resid_post"),
    (28, "resid_post"),
    (29, "resid_mid"),
    (29, "resid_post"),
):
    place = decoded.sel(layer=layer, point=point)
    guesses = " ".join(repr(str(token)) for token in place.top_token.values[:3])
    print(
        f"layer {layer} {point:10}  ' Warsaw': {place.answer_prob.item():.4f}, "
        f"{int(place.answer_rank):5} tokens above; first: {guesses}"
    )

# %%
places = decoded.sel(point=["resid_mid", "resid_post"]).stack(place=("layer", "point"))
picture(
    lines(
        {"' Warsaw'": places.answer_rank + 1, "' Berlin'": places.wrong_rank + 1},
        "Rank of the two cities after every sublayer",
        x_name="sublayer (attention 0, MLP 0, attention 1, ...)",
        y_name="rank, 1 is best",
        log=True,
        size=(560, 230),
    ),
    alt="Both cities rank in the ten thousands until attention of layer 23 lifts Warsaw; it stays "
    "in the hundreds and reaches rank 1 with the very last MLP.",
)

# %% [markdown]
# For the lens nothing happens until the end. Attention of layer 23 lifts ` Warsaw` from rank
# 30,000 to 5,000, and the last MLP alone makes it the first guess. Read naively: *MLP 29 turns
# Poland into Warsaw.*

# %%
rank = decoded.answer_rank
assert rank.sel(layer=22, point="resid_post") > 5 * rank.sel(layer=23, point="resid_mid")
assert rank.sel(layer=29, point="resid_mid") > 50
assert rank.sel(layer=29, point="resid_post") == 0

# %% [markdown]
# ## 2. What the model says without each sublayer
#
# `sublayers` removes every sublayer's write, one at a time, and runs on without it: sixty runs in
# one sweep.

# %%
removed = ps.sublayers(model, pairs)
change = (removed.without - removed.whole).sel(metric="log_prob")[0]
named = {
    f"{'MLP' if str(kind) == 'mlp' else 'attention'} {layer}": change.sel(
        sublayer=kind, layer=layer
    ).item()
    for layer in change.layer.values
    for kind in change.sublayer.values
}
worst = sorted(named, key=named.__getitem__)[:12]
picture(
    bars(
        {name: named[name] for name in worst},
        "Log-probability of ' Warsaw' without it",
        unit="change in nats; the twelve that cost most",
        width=420,
    ),
    alt="Without MLPs 0, 1, 2, 8 or 11, or attention 0 or 1, the answer is lost; then come MLP 29, "
    "MLP 22 and attention 23.",
)

# %% [markdown]
# By this measure the early layers do it: MLPs 0, 2, 11 and 8 and attention of layers 0 and 1. But
# without MLP 0 or 2 ` Warsaw` is not just overtaken, it falls behind more than ten thousand
# tokens. A removal shows what an answer *needs*, and an answer needs a working model.

# %%
assert {"MLP 0", "MLP 2", "MLP 11", "attention 1"} <= set(worst[:6])
assert {"MLP 29", "MLP 22", "attention 23"} <= set(worst)
ranks = removed.without.sel(metric="rank", sublayer="mlp")[0]
assert min(ranks[0], ranks[2]) > 10_000

# %% [markdown]
# ## 3. What turns Berlin into Warsaw
#
# Which sublayer tells Poland from Germany? Put each one's write of the Polish prompt into the
# German one, at each token.

# %%
patched = ps.sweep(model, pairs, ["attn_out", "mlp_out"])
print(
    f"' Warsaw' over ' Berlin': {patched.base_metric.item():.2f} after Germany, "
    f"{patched.source_metric.item():.2f} after Poland"
)
for site in ("attn_out", "mlp_out"):
    for effect in ps.summary.largest(patched, site, n=5):
        print(f"  {site} {effect.layer:2} at {effect.token!r}: recovers {effect.recovered:+.2f}")

# %% [markdown]
# Now MLP 29 does not count, and **attention of layer 23** is nearly all that separates the two: it
# brings what earlier layers made of the country's name to the last token. (MLP 0 at the country
# recovers everything: it is where the token is read.)

# %%
end = patched.patchsweep.recovered("attn_out")[0, 0, :, -1]
last_mlps = patched.patchsweep.recovered("mlp_out")[0, 0, :, -1]
assert end.argmax() == 23
assert end[23] > 0.85
assert last_mlps[29] < 0.1

# %% [markdown]
# ## 4. The lens of a patched run
#
# The two views meet when the lens looks at a patched run: after Germany, with one write replaced
# by that after Poland.

# %%
patches = {
    "nothing": (),
    "attention 23": Patch("attn_out", 23, "end"),
    "MLP 29": Patch("mlp_out", 29, "end"),
    "both": (Patch("attn_out", 23, "end"), Patch("mlp_out", 29, "end")),
}
curves, finals = {}, {}
for name, patch in patches.items():
    seen = ps.lens(model, pairs, which="corrupted", patch=patch).isel(run=-1, pair=0, pos=-1)
    after = seen.sel(point="resid_post")
    curves[name] = after.answer_log_prob - after.wrong_log_prob
    final = after.sel(layer=29)
    finals[name] = (final.answer_prob.item(), final.wrong_prob.item())
    warsaw, berlin = finals[name]
    print(
        f"{name + ' patched:':23} ' Warsaw' {warsaw:.3f}, ' Berlin' {berlin:.3f}, "
        f"first {str(final.top_token.values[0])!r}"
    )

# %%
picture(
    lines(
        {f"{name} patched": curve for name, curve in curves.items()},
        "Log-odds of ' Warsaw' over ' Berlin', after Germany",
        y_name="nats",
        size=(520, 240),
    ),
    alt="With attention 23 patched the log-odds leave those of the plain run at layer 23 and end "
    "above zero; with MLP 29 patched alone they stay with the plain run.",
)

# %% [markdown]
# With attention 23 alone the first guess is Warsaw, more surely than after Poland itself. MLP 29's
# write, taken from the Polish run, changes next to nothing: the last MLP makes a city readable, it
# does not choose it. So the lens saw the place where the answer becomes readable, the removals saw
# what the model cannot do without, and the patch saw what decides. They are answers to different
# questions; only the last one is "which sublayer turns Germany's answer into Poland's". Where the
# fact itself comes from, before layer 23 fetches it, is asked in [factual
# recall](factual_recall.md).

# %%
assert finals["attention 23"][0] > max(0.3, finals["attention 23"][1])
assert abs(finals["MLP 29"][1] - finals["nothing"][1]) < 0.05
assert finals["MLP 29"][0] < 0.01
