"""Hook points of a bridge: how a value is written at one, and which of them can be patched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

# the residual stream: what is written there is seen by every reader of the stream
STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_embed")

# hook points that fire only while a setting of the bridge is on: their ending -> `set_<setting>`
SETTINGS = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "mlp_in": "use_hook_mlp_in",
    "attn_in": "use_attn_in",
}
_EXCLUDING = {"use_attn_in": "use_split_qkv_input", "use_split_qkv_input": "use_attn_in"}

# tokens of a prompt, and layers of a site, with which hook points are tried out
N_TOKENS = 6
N_LAYERS = 4
# largest difference in logits, as a share of the largest logit, that other rows of a batch explain
# (experts take tokens of several rows together)
ROUNDING = 1e-5

# model -> (site, state of the bridge) -> why it cannot be patched; "": it can
_known: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = WeakKeyDictionary()


def writing(hook_name: str, write: Callable[[Tensor], None]) -> Hook:
    """A hook under which `write` changes what the hook point hands on.

    `write` gets a copy, which is handed on: other readers of the same tensor do not see it, and a
    component that tells an edit by the identity of what comes back does. At the residual stream
    (`STREAM`) `write` gets the tensor itself, so that the stream changes for every reader.
    """
    in_place = hook_name.rpartition(".")[2] in STREAM

    def hook(x: Tensor, hook: Any) -> Tensor:
        # contiguous, so that vectors can be cut into heads without a copy
        new = x if in_place else x.clone(memory_format=torch.contiguous_format)
        write(new)
        return new

    return hook_name, hook


def write_units(
    x: Tensor, row: int, new: Tensor, span: slice, units: slice | list[int], n_units: int
) -> None:
    """Put `new` `[pos, width]` into one row of `x` `[row, pos, ...]`, at `span` and in `units`
    (of the `n_units` parts of a vector) alone."""
    target, values = (
        vectors.view(len(vectors), n_units, -1) for vectors in (x[row], new.contiguous())
    )
    target[span, units] = values[span, units]


def hooks_of(bridge: TransformerBridge, site: Site) -> list[str]:
    """The names of the site's hook points, layer by layer."""
    return [site.hook_name(i) for i in range(int(bridge.cfg.n_layers) if site.layered else 1)]


def forward(
    bridge: TransformerBridge, tokens: Tensor, writes: Sequence[Hook], reads: Sequence[Hook] = ()
) -> Tensor:
    """Logits `[row, pos, d_vocab]` under hooks, with the settings on that they need.

    `reads` come after `writes`, so that they see what was written.

    Raises:
        SiteError: one of `writes` did not fire (a setting may keep other hooks from firing), the
            model has not the setting that one needs, or two settings exclude each other.
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
        # that the bridge's own arithmetic takes the place of a norm's while a hook edits it
        warnings.filterwarnings("ignore", module=r"transformer_lens\.")
        logits: Tensor = bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, *reads], use_cache=False)
    for i, (name, _) in enumerate(writes):
        if i not in fired:
            raise SiteError(f"the hook {name} does not fire beside the others; patch it by itself")
    return logits


@contextmanager
def _own_layer_norms(bridge: TransformerBridge) -> Iterator[None]:
    """Inside, LayerNorms whose formula the bridge spells out run as the model's own modules.

    Of a vector of equal entries, such as a constant that is patched in, the spelled-out variance is
    rounding, which the division by sqrt(eps) makes hundreds of times larger, once a norm.
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


def check_sites(
    bridge: TransformerBridge, sites: Sequence[Site], shape: ModelShape, tokens: Tensor
) -> None:
    """See that patches at `sites` can work, on a few of `tokens` `[1, pos]`.

    Raises:
        SiteError: one of them cannot be patched; the text says why.
    """
    for site, reason in refusals(bridge, sites, shape, tokens).items():
        raise _refused(site, reason)


def check_names(bridge: TransformerBridge, sites: Sequence[Site]) -> None:
    """See that the model has the hooks of `sites` and the settings that they need; nothing runs.

    Raises:
        SiteError: it has not.
    """
    known = bridge.hook_dict
    for site in sites:
        for name in hooks_of(bridge, site):
            if name not in known:
                raise _refused(site, f"this model has no hook {name}")
        try:
            with running(bridge), _settings_on(bridge, [site.hook_name(0)]):
                pass
        except SiteError as error:
            raise _refused(site, str(error)) from error


def by_setting(bridge: TransformerBridge, sites: Sequence[Site]) -> list[list[Site]]:
    """`sites` in groups that can be patched in one pass, those that need no setting first.

    Settings exclude each other, and change which other hooks fire.
    """
    points = bridge.hook_dict
    groups: dict[str, list[Site]] = {}
    for site in sites:
        name = site.hook_name(0)
        groups.setdefault(_setting_of(points[name], name) or "", []).append(site)
    return [groups[setting] for setting in sorted(groups)]


def _refused(site: Site, reason: str) -> SiteError:
    remedy = "leave the site out" + ("" if site.named else ", or use runner=packed")
    return SiteError(f"site {site.name}: {reason}; {remedy}")


@torch.no_grad()
def refusals(
    bridge: TransformerBridge, sites: Sequence[Site], shape: ModelShape, tokens: Tensor
) -> dict[Site, str]:
    """Site -> why it cannot be patched in this model, for those of `sites` that cannot.

    Raises:
        SiteError: the model has no hook of a site, or not the setting that it needs.
    """
    check_names(bridge, sites)
    known = _known.setdefault(bridge.original_model, {})
    state = (bridge.compatibility_mode, tuple(sorted(_settings(bridge).items())))
    new = [site for site in sites if (site, *state) not in known]
    for members in by_setting(bridge, new):
        found = _unfit(bridge, members, shape, tokens)
        rest = [site for site in members if site not in found]
        found |= _without_effect(bridge, rest, tokens)
        known.update({(site, *state): found.get(site, "") for site in members})
    reasons = {site: known[site, *state] for site in sites}
    return {site: reason for site, reason in reasons.items() if reason}


def _unfit(
    bridge: TransformerBridge, sites: Sequence[Site], shape: ModelShape, tokens: Tensor
) -> dict[Site, str]:
    """Sites whose hooks do not fire once a pass on `[batch, pos, ...]`, by two batches of other
    sizes; axes of one size alone could be told apart wrongly."""
    seen: dict[str, list[list[tuple[torch.dtype, tuple[int, ...]]]]] = {}
    sizes = []
    for n_rows, n_more in ((2, 0), (3, 1)):
        batch = _first_tokens(tokens, n_more).repeat(n_rows, 1)
        sizes.append(tuple(batch.shape))

        def see(x: Any, hook: Any, name: str) -> None:
            what = (x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else (None, ())
            seen[name][-1].append(what)  # type: ignore[arg-type]

        names = [name for site in sites for name in hooks_of(bridge, site)]
        for name in names:
            seen.setdefault(name, []).append([])
        reads = [(name, partial(see, name=name)) for name in dict.fromkeys(names)]
        forward(bridge, batch, (), reads)
    found = {}
    for site in sites:
        for name in hooks_of(bridge, site):
            reason = _why_unfit(site, shape, seen[name], sizes)
            if reason:
                found[site] = f"the hook {name} {reason}"
                break
    return found


def _why_unfit(site: Site, shape: ModelShape, firings: Any, sizes: Any) -> str:
    if not all(len(once) == 1 for once in firings):
        often = max(len(once) for once in firings)
        if not often:
            return "never fired in this model, so a patch there would do nothing"
        return f"fires {often} times in one pass"
    (dtype, first), (_, second) = (once[0] for once in firings)
    if dtype is None or not dtype.is_floating_point:
        return f"sees {dtype} numbers, which are no activations"
    for found, (rows, pos) in zip((first, second), sizes, strict=True):
        lead = (rows, shape.n_heads, pos, pos) if site.is_pattern else (rows, pos)
        if found[: len(lead)] != lead or len(found) < 3:
            axes = "[batch, head, pos, pos]" if site.is_pattern else "[batch, pos, ...]"
            return f"sees the shape {found}, which is not {axes} of {rows} prompts of {pos} tokens"
    if site.unit is None or site.is_pattern:
        return ""
    n_units = shape.n_units(site)
    parts = first[2] if len(first) == 4 else n_units
    width = int(torch.Size(first[2:]).numel())
    if parts != n_units or width % n_units or (site.unit == "neuron" and width != n_units):
        what = {"head": "heads", "kv_head": "key heads", "neuron": "neurons"}[site.unit]
        return f"sees the shape {first} where the model has {n_units} {what}"
    return ""


def _without_effect(
    bridge: TransformerBridge, sites: Sequence[Site], tokens: Tensor
) -> dict[Site, str]:
    """Sites where a written value changes no logit in any of a few layers.

    A row of one pass has one hook written. It is compared with the same row of a pass under the
    same hooks that write nothing, so that not even rounding differs elsewhere.
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
    """`[1, pos]`: the first tokens, and the last of them `n_more` times again."""
    few = tokens[:1, :N_TOKENS]
    return torch.cat([few, few[:, -1:].expand(-1, n_more)], dim=1)


def _setting_of(point: HookPoint, name: str) -> str | None:
    """The setting without which the hook point called `name` never fires; None: it needs none."""
    # another name may stand for a hook point that always fires, so its own name decides
    own = str(point.name or name)
    return next((setting for end, setting in SETTINGS.items() if own.endswith(end)), None)


def _settings(bridge: TransformerBridge) -> dict[str, bool]:
    return {name: bool(getattr(bridge.cfg, name, False)) for name in set(SETTINGS.values())}


@contextmanager
def _settings_on(bridge: TransformerBridge, hook_names: Sequence[str]) -> Iterator[None]:
    """The settings that the hooks need are on inside, and as they were afterwards.

    Raises:
        SiteError: this model has no such setting, or two of them exclude each other.
    """
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
    # off before on: some exclude each other
    for name, on in sorted(wanted.items(), key=lambda item: item[1]):
        if bool(getattr(bridge.cfg, name, False)) == on:
            continue
        try:
            getattr(bridge, f"set_{name}")(on)
        except (NotImplementedError, ValueError) as error:
            raise SiteError(f"this model has no setting {name}") from error
