"""Reference prompts: what means are taken over, and whether there are enough of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.pairs import PromptPair, PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.spec.interventions import Intervention, Mean
from patchsweep.spec.sites import Site

# activations behind a mean. Of fewer, more than a quarter of it is the patched prompt's own; a mean
# of one is the prompt itself, and patches nothing
LEAST = 4
_OVER = {
    "position": "different prompts of one length, position by position",
    "all": "all positions of the prompts",
    "label": "all positions of one label",
}
MeansFrom = PromptPairs | str | Path | None


def load_reference(means_from: MeansFrom, model: TransformerBridge) -> PromptPairs | None:
    """The pairs themselves, or those of the JSONL file (see `PromptPairs.from_jsonl`).

    Raises:
        PromptError: the file holds something else than pairs.
    """
    if means_from is None or isinstance(means_from, PromptPairs):
        return means_from
    return PromptPairs.from_jsonl(model, Path(means_from).expanduser())


def with_reference(
    intervention: Intervention, means_from: MeansFrom, model: TransformerBridge
) -> Intervention:
    """`intervention`, its means taken over the clean prompts of `means_from`, if that is given.

    Raises:
        ConfigError: the intervention has no means.
        PromptError: the file holds something else than pairs.
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
    """See that enough activations stand behind each mean that patches of `pairs` take.

    Raises:
        ConfigError: there are fewer than `LEAST`; the text names the pairs.
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
    short = "; ".join(
        f"{key}: {behind[key]} ({_numbers(numbers)} {'needs' if len(numbers) == 1 else 'need'} it)"
        for key, numbers in needed.items()
    )
    whose = "the clean prompts" if intervention.reference is None else "the prompts of means_from"
    others = [name for name in ("mean_all", "mean_label") if name != intervention.name]
    raise ConfigError(
        f"intervention={intervention.name} takes means over {_OVER[intervention.per]}, and needs "
        f"{LEAST} behind each; {whose} have for {short}; add pairs, or give prompts of your own by "
        "means_from=" + ("" if any(patterns) else f", or take intervention={' or '.join(others)}")
    )


def means_attrs(
    intervention: Intervention, pairs: Sequence[PromptPair], sites: Iterable[Site]
) -> dict[str, Any]:
    """What results say of their means: how many activations stand behind each, and whose.

    {} where nothing is a mean.
    """
    if not isinstance(intervention, Mean):
        return {}
    reference = intervention.reference
    found: dict[str, Any] = {
        "per": intervention.per,
        "over": "the clean prompts of the run" if reference is None else "prompts of means_from",
        "n_prompts": len(reference or pairs),
        "behind": dict(sorted(_behind(intervention, pairs, _any_pattern(sites)).items())),
    }
    if reference is not None:
        found["prompts"] = reference.content_hash()
    return {"means": found}


def _behind(mean: Mean, pairs: Sequence[PromptPair], patterns: bool) -> Counter[str]:
    """Per mean how many activations of different prompts enter it.

    Means of `patterns` are by length, whatever the kind of the mean.
    """
    found: Counter[str] = Counter()
    different = {(*pair.clean, *pair.answer[:-1]): pair for pair in mean.reference or pairs}
    for tokens, pair in different.items():
        found[_of_length(len(tokens))] += mean.per == "position" or patterns
        found["all positions"] += (mean.per != "position") * len(tokens)
        for label, (first, stop) in pair.labels.items() if mean.per == "label" else ():
            found[f"label {label!r}"] += stop - first
    return +found  # without zeros


def _any_pattern(sites: Iterable[Site]) -> bool:
    return any(site.is_pattern for site in sites)


def _needed(mean: Mean, pair: PromptPair, patterns: Sequence[bool]) -> Iterable[str]:
    """The names of the means that patches of `pair` take."""
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
