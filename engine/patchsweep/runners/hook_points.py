"""Hook points of a bridge: writing values at them, and checking which can be patched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

from patchsweep.errors import SiteError
from patchsweep.models.heartbeat import beat
from patchsweep.models.running import running
from patchsweep.spec.plan import ModelShape
from patchsweep.spec.sites import Site

Hook = tuple[str, Callable[[Tensor, Any], Tensor | None]]

# the residual stream: values are written in place, so that every later module sees them
STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_embed")

# hook points that fire only while a setting of the bridge is on: name's ending -> `set_<setting>`
SETTINGS = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "mlp_in": "use_hook_mlp_in",
    "attn_in": "use_attn_in",
}
_EXCLUDING = {"use_attn_in": "use_split_qkv_input", "use_split_qkv_input": "use_attn_in"}

# tokens of a prompt, and layers of a site, on which hook points are checked
N_TOKENS = 6
N_LAYERS = 4
# largest difference in logits, relative to the largest logit, that other rows of a batch can cause
# (experts process tokens of several rows together)
ROUNDING = 1e-5

# model -> (site, state of the bridge) -> why the site cannot be patched; "": it can
_known: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = WeakKeyDictionary()


def writing(hook_name: str, write: Callable[[Tensor], None]) -> Hook:
    """Return a hook in which `write` changes the output of the hook point `hook_name`.

    `write` gets a copy, which replaces the output: other consumers of the original tensor do not
    see the change, and components that compare identities notice it. At the residual stream
    (`STREAM`) `write` gets the tensor itself, so that the stream changes for every consumer.
    """
    in_place = hook_name.rpartition(".")[2] in STREAM

    def hook(x: Tensor, hook: Any) -> Tensor:
        # contiguous, so that vectors can be viewed as heads without a copy
        new = x if in_place else x.clone(memory_format=torch.contiguous_format)
        write(new)
        return new

    return hook_name, hook


def keeping(names: Iterable[str]) -> tuple[dict[str, Tensor], list[Hook]]:
    """Return hooks at `names`, and where they put copies of what they see, by name."""
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any, name: str) -> None:
        kept[name] = x.detach().clone()

    return kept, [(name, partial(keep, name=name)) for name in names]


def write_units(
    x: Tensor, row: int, new: Tensor, span: slice, units: slice | list[int], n_units: int
) -> None:
    """Write `new` `[pos, width]` into one row of `x` `[row, pos, ...]`, in place.

    Only positions `span` are written, and of the `n_units` heads (or neurons) only `units`.
    """
    target, values = (
        vectors.view(len(vectors), n_units, -1) for vectors in (x[row], new.contiguous())
    )
    target[span, units] = values[span, units]


def hooks_of(bridge: TransformerBridge, site: Site) -> list[str]:
    """Return the names of the site's hook points, layer by layer."""
    return [site.hook_name(i) for i in range(int(bridge.cfg.n_layers) if site.layered else 1)]


def forward(
    bridge: TransformerBridge, tokens: Tensor, writes: Sequence[Hook], reads: Sequence[Hook] = ()
) -> Tensor:
    """Return logits `[row, pos, d_vocab]` under hooks, with the bridge settings that they need.

    `reads` run after `writes`, so that they see the written values.

    Raises:
        SiteError: one of `writes` did not fire (a setting may stop other hooks from firing), the
            model lacks a setting that a hook needs, or two settings exclude each other.
    """
    beat()
    fired: set[int] = set()

    def noted(i: int, write: Callable[[Tensor, Any], Tensor | None]) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor | None:
            fired.add(i)
            return write(x, hook)

        return hook

    hooks = [(name, noted(i, write)) for i, (name, write) in enumerate(writes)]
    settings = _settings_on(bridge, [name for name, _ in (*writes, *reads)])
    with running(bridge), settings, _own_layer_norms(bridge), warnings.catch_warnings():
        # warnings that the bridge's arithmetic replaces a norm's while a hook edits it
        warnings.filterwarnings("ignore", module=r"transformer_lens\.")
        logits: Tensor = bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, *reads], use_cache=False)
    for i, (name, _) in enumerate(writes):
        if i not in fired:
            raise SiteError(f"the hook {name} does not fire beside the others; patch it by itself")
    return logits


@contextmanager
def _own_layer_norms(bridge: TransformerBridge) -> Iterator[None]:
    """Inside, LayerNorms that the bridge computes itself run as the model's own modules.

    For a vector of equal entries, such as a constant patch, the bridge's variance is rounding
    error, and each norm's division by sqrt(eps) makes it hundreds of times larger.
    """
    norms = [
        module
        for module in bridge.modules()
        if isinstance(module, NormalizationBridge)
        and isinstance(module.original_component, nn.LayerNorm)
        and not module.use_native_layernorm_autograd
    ]
    for norm in norms:
        norm.use_native_layernorm_autograd = True
    try:
        yield
    finally:
        for norm in norms:
            norm.use_native_layernorm_autograd = False


def check_names(bridge: TransformerBridge, sites: Sequence[Site]) -> None:
    """Check that the model has the hooks of `sites` and the settings that they need; runs nothing.

    Raises:
        SiteError: a hook or a setting is missing.
    """
    known = bridge.hook_dict
    for site in sites:
        for name in hooks_of(bridge, site):
            if name not in known:
                raise refused(site, f"this model has no hook {name}")
        try:
            with running(bridge), _settings_on(bridge, [site.hook_name(0)]):
                pass
        except SiteError as error:
            raise refused(site, str(error)) from error


def by_setting(bridge: TransformerBridge, sites: Sequence[Site]) -> list[list[Site]]:
    """Group `sites` by the bridge setting that they need; those that need none come first.

    Sites of a group can share a pass. Settings exclude each other and change which hooks fire.
    """
    points = bridge.hook_dict
    groups: dict[str, list[Site]] = {}
    for site in sites:
        name = site.hook_name(0)
        groups.setdefault(_setting_of(points[name], name) or "", []).append(site)
    return [groups[setting] for setting in sorted(groups)]


def refused(site: Site, reason: str) -> SiteError:
    """Return the error for a site that cannot be patched."""
    remedy = "leave the site out" + ("" if site.named else ", or use runner=packed")
    return SiteError(f"site {site.name}: {reason}; {remedy}")


@torch.no_grad()
def refusals(
    bridge: TransformerBridge, sites: Sequence[Site], shape: ModelShape, tokens: Tensor
) -> dict[Site, str]:
    """Return site -> reason, for those of `sites` that cannot be patched in this model.

    Runs a few of `tokens` `[1, pos]`.

    Raises:
        SiteError: the model has no hook of a site, or lacks the setting that it needs.
    """
    check_names(bridge, sites)
    known = _known.setdefault(bridge.original_model, {})
    state = (bridge.compatibility_mode, tuple(sorted(_settings(bridge).items())))
    new = [site for site in sites if (site, *state) not in known]
    for members in by_setting(bridge, new):
        unfit = _unfit(bridge, members, shape, tokens)
        rest = [site for site in members if site not in unfit]
        unfit |= _without_effect(bridge, rest, tokens)
        known.update({(site, *state): unfit.get(site, "") for site in members})
    reasons = {site: known[site, *state] for site in sites}
    return {site: reason for site, reason in reasons.items() if reason}


def _unfit(
    bridge: TransformerBridge, sites: Sequence[Site], shape: ModelShape, tokens: Tensor
) -> dict[Site, str]:
    """Return site -> reason, for sites whose hooks do not fire once a pass on `[batch, pos, ...]`.

    Two batches of different sizes are run, since one batch's axes may be ambiguous.
    """
    seen: dict[str, list[list[tuple[torch.dtype, tuple[int, ...]]]]] = {}
    sizes = []
    for n_rows, n_more in ((2, 0), (3, 1)):
        batch = _first_tokens(tokens, n_more).repeat(n_rows, 1)
        sizes.append(tuple(batch.shape))

        def see(x: Any, hook: Any, name: str) -> None:
            firing = (x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else (None, ())
            seen[name][-1].append(firing)  # type: ignore[arg-type]

        # sites may share a hook, as pattern and pattern_cell do
        names = dict.fromkeys(name for site in sites for name in hooks_of(bridge, site))
        for name in names:
            seen.setdefault(name, []).append([])
        reads = [(name, partial(see, name=name)) for name in names]
        forward(bridge, batch, (), reads)
    reasons = {}
    for site in sites:
        for name in hooks_of(bridge, site):
            reason = _why_unfit(site, shape, seen[name], sizes)
            if reason:
                reasons[site] = f"the hook {name} {reason}"
                break
    return reasons


def _why_unfit(site: Site, shape: ModelShape, firings: Any, sizes: Any) -> str:
    if not all(len(once) == 1 for once in firings):
        n_fired = max(len(once) for once in firings)
        if not n_fired:
            return "never fired in this model, so a patch there would do nothing"
        return f"fires {n_fired} times in one pass"
    (dtype, first), (_, second) = (once[0] for once in firings)
    if dtype is None or not dtype.is_floating_point:
        return f"sees {dtype} numbers, which are no activations"
    for seen, (rows, pos) in zip((first, second), sizes, strict=True):
        lead = (rows, shape.n_heads, pos, pos) if site.is_pattern else (rows, pos)
        if seen[: len(lead)] != lead or len(seen) < 3:
            axes = "[batch, head, pos, pos]" if site.is_pattern else "[batch, pos, ...]"
            return f"sees the shape {seen}, which is not {axes} of {rows} prompts of {pos} tokens"
    if site.unit is None or site.is_pattern:
        return ""
    n_units = shape.n_units(site)
    parts = first[2] if len(first) == 4 else n_units
    width = int(torch.Size(first[2:]).numel())
    if parts != n_units or width % n_units or (site.unit == "neuron" and width != n_units):
        plural = {"head": "heads", "kv_head": "key heads", "neuron": "neurons"}[site.unit]
        return f"sees the shape {first} where the model has {n_units} {plural}"
    return ""


def _without_effect(
    bridge: TransformerBridge, sites: Sequence[Site], tokens: Tensor
) -> dict[Site, str]:
    """Return site -> reason, for sites where a written value changes no logit in a few layers.

    Each row of one pass writes at one hook. It is compared with the same row of a pass in which the
    same hooks write nothing, so that rounding is the same in both.
    """
    tried: list[tuple[Site, str]] = []
    for site in sites:
        names = hooks_of(bridge, site)
        step = max(1, -(-len(names) // N_LAYERS))
        tried += [(site, name) for name in names[::-step]]  # the last layer is among them
    if not tried:
        return {}
    batch = _first_tokens(tokens).repeat(len(tried), 1)

    def leave(x: Tensor) -> None: ...

    def write(x: Tensor, row: int) -> None:
        x[row] = 2.0 * x[row].roll(1, dims=-1) + 1.0

    hooks = [writing(name, leave) for _, name in tried]
    before = forward(bridge, batch, hooks).float()
    hooks = [writing(name, partial(write, row=row)) for row, (_, name) in enumerate(tried)]
    after = forward(bridge, batch, hooks).float()
    change = (after - before).abs().flatten(1).amax(dim=1)
    same = (change <= ROUNDING * before.abs().max()).tolist()  # NaN is a change
    effect = {site for (site, _), nothing in zip(tried, same, strict=True) if not nothing}
    return {
        site: f"a value written at the hook {name} reaches no logit of this model, so a patch "
        "there would do nothing"
        for site, name in reversed(tried)
        if site not in effect
    }


def _first_tokens(tokens: Tensor, n_more: int = 0) -> Tensor:
    """Return `[1, pos]`: the first tokens, with the last of them repeated `n_more` more times."""
    few = tokens[:1, :N_TOKENS]
    return torch.cat([few, few[:, -1:].expand(-1, n_more)], dim=1)


def _setting_of(point: HookPoint, name: str) -> str | None:
    """Return the setting that the hook point called `name` needs to fire; None: it needs none."""
    # `name` may be an alias of a hook point that always fires, so the point's own name decides
    own = str(point.name or name)
    return next((setting for end, setting in SETTINGS.items() if own.endswith(end)), None)


def _settings(bridge: TransformerBridge) -> dict[str, bool]:
    return {name: bool(getattr(bridge.cfg, name, False)) for name in set(SETTINGS.values())}


@contextmanager
def _settings_on(bridge: TransformerBridge, hook_names: Sequence[str]) -> Iterator[None]:
    """Inside, the settings that the hooks need are on; on exit they are restored."""
    gated = [name for name in hook_names if name.endswith(tuple(SETTINGS))]
    points = bridge.hook_dict if gated else {}
    settings = (_setting_of(points[name], name) for name in gated)
    needed = {setting for setting in settings if setting is not None}
    if len(needed & set(_EXCLUDING)) > 1:
        raise SiteError(
            "hook_attn_in and hook_q_input, hook_k_input, hook_v_input exclude each other; patch "
            "them in two sweeps"
        )
    before = _settings(bridge)
    wanted = before | {_EXCLUDING[name]: False for name in needed if name in _EXCLUDING}
    wanted |= dict.fromkeys(needed, True)
    try:
        _switch(bridge, wanted)
        yield
    finally:
        _switch(bridge, before)


def _switch(bridge: TransformerBridge, wanted: Mapping[str, bool]) -> None:
    # off before on, since some exclude each other
    for name, on in sorted(wanted.items(), key=lambda item: item[1]):
        if bool(getattr(bridge.cfg, name, False)) == on:
            continue
        try:
            getattr(bridge, f"set_{name}")(on)
        except (NotImplementedError, ValueError) as error:
            raise SiteError(f"this model has no setting {name}") from error
