"""Reference prompts that means are taken over, and a check that there are enough of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import user_path
from patchsweep.data.pairs import PromptPair, PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.spec.interventions import Intervention, Mean
from patchsweep.spec.sites import Site

# Fewest activations behind a mean. With fewer, the patched prompt itself contributes more than a
# quarter of the mean; with one, the mean is the prompt's own activation and the patch does nothing.
LEAST = 4
_OVER = {
    "position": "different prompts of one length, position by position",
    "all": "all positions of the prompts",
    "label": "all positions of one label",
}
MeansFrom = PromptPairs | str | Path | None


def load_reference(means_from: MeansFrom, model: TransformerBridge) -> PromptPairs | None:
    """Return `means_from` if it holds pairs; read them if it is a path of a file.

    Raises:
        PromptError: the file does not hold pairs, see `PromptPairs.from_file`.
        ConfigError: `means_from` is no path.
    """
    if means_from is None or isinstance(means_from, PromptPairs):
        return means_from
    if not isinstance(means_from, str | Path):
        raise ConfigError(f"means_from={means_from!r} must be PromptPairs or a file of them")
    return PromptPairs.from_file(model, user_path(means_from))


def with_reference(
    intervention: Intervention, means_from: MeansFrom, model: TransformerBridge
) -> Intervention:
    """Return `intervention` with its means over the clean prompts of `means_from`; None: as it is.

    Raises:
        ConfigError: the intervention takes no means.
        PromptError: the file does not hold pairs.
    """
    if means_from is None:
        return intervention
    if not isinstance(intervention, Mean):
        raise ConfigError(
            f"means_from is for the interventions mean, mean_all and mean_label, got "
            f"intervention={intervention.name}; leave means_from out"
        )
    return replace(intervention, reference=load_reference(means_from, model))


def check_means(
    intervention: Intervention, pairs: Sequence[PromptPair], sites: Iterable[Site]
) -> None:
    """Check that each mean used by patches of `pairs` is taken over at least `LEAST` activations.

    Raises:
        ConfigError: a mean is taken over fewer; the text names the pairs.
    """
    if not isinstance(intervention, Mean):
        return
    patterns = [site.is_pattern for site in sites]
    behind = _behind(intervention, pairs, any(patterns))
    needed: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        for key in _needed(intervention, pair, patterns):
            if behind[key] < LEAST:
                needed.setdefault(key, []).append(number)
    if not needed:
        return
    few = "; ".join(
        f"{key}: {behind[key]} ({_numbers(numbers)} {'needs' if len(numbers) == 1 else 'need'} it)"
        for key, numbers in needed.items()
    )
    whose = "the clean prompts" if intervention.reference is None else "the prompts of means_from"
    others = [name for name in ("mean_all", "mean_label") if name != intervention.name]
    raise ConfigError(
        f"intervention={intervention.name} takes means over {_OVER[intervention.per]}, and needs "
        f"{LEAST} behind each; {whose} have for {few}; add pairs, or give prompts of your own by "
        "means_from=" + ("" if any(patterns) else f", or take intervention={' or '.join(others)}")
    )


def means_attrs(
    intervention: Intervention, pairs: Sequence[PromptPair], sites: Iterable[Site]
) -> dict[str, Any]:
    """Return the results' attribute `means`: the prompts, and each mean's number of activations.

    {} if the intervention takes no means.
    """
    if not isinstance(intervention, Mean):
        return {}
    reference, patterns = intervention.reference, any(site.is_pattern for site in sites)
    attrs: dict[str, Any] = {
        "per": intervention.per,
        "over": "the clean prompts of the run" if reference is None else "prompts of means_from",
        "n_prompts": len(reference or pairs),
        "behind": dict(sorted(_behind(intervention, pairs, patterns).items())),
    }
    if reference is not None:
        attrs["prompts"] = reference.content_hash()
    return {"means": attrs}


def _behind(mean: Mean, pairs: Sequence[PromptPair], patterns: bool) -> Counter[str]:
    """Count, per mean, the activations of different prompts that enter it.

    With `patterns`, means of attention patterns count too; they are by length for every `mean.per`.
    """
    counts: Counter[str] = Counter()
    different = {(*pair.clean, *pair.answer[:-1]): pair for pair in mean.reference or pairs}
    for tokens, pair in different.items():
        counts[_of_length(len(tokens))] += mean.per == "position" or patterns
        counts["all positions"] += (mean.per != "position") * len(tokens)
        for label, (first, stop) in pair.labels.items() if mean.per == "label" else ():
            counts[f"label {label!r}"] += stop - first
    return +counts  # without zeros


def _needed(mean: Mean, pair: PromptPair, patterns: Sequence[bool]) -> Iterable[str]:
    """Yield the names of the means that patches of `pair` take."""
    if mean.per == "position" or any(patterns):
        yield _of_length(len(pair) + len(pair.answer) - 1)  # all of an answer but its last token
    if mean.per != "position" and not all(patterns):
        yield "all positions"
        if mean.per == "label":
            yield from (f"label {label!r}" for label in pair.labels)


def _of_length(length: int) -> str:
    return f"{length} tokens"


def _numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"{'pair' if len(numbers) == 1 else 'pairs'} {shown}"
