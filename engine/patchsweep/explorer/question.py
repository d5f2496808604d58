"""What the page asks: a pair of prompts and what to patch, checked; and as a command and Python."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import one_of
from patchsweep.data.alignment import END
from patchsweep.data.chat import CHAT
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, PromptError
from patchsweep.spec.metrics import METRICS
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import Request, SweepSpec, make_request
from patchsweep.sweeps.adaptive import check_adaptive

CHOICES = tuple(
    name
    for name, site in SITES.items()
    if site.layered and site.unit != "neuron" and not site.cells
)
CHOSEN = ("resid_pre", "attn_out", "mlp_out", "z")
DIRECTIONS = ("denoising", "noising")
INTERVENTIONS = ("resample", "zero")
TOLERANCES = (None, "0.1%", "0.3%", "1%", "3%", "10%")
MAX_CHARACTERS = 100_000

# a tokenizer must not serve two threads at once
_tokenizing = threading.Lock()


@dataclass(frozen=True)
class Question:
    """One pair of prompts, and what to patch in it.

    Raises:
        ConfigError: a choice is not one of those above.
        PromptError: a text is missing or too long.
    """

    clean: str
    corrupted: str
    answer: str  # right after `clean`
    wrong_answer: str  # right after `corrupted`
    sites: tuple[str, ...] = CHOSEN
    metric: str = "logit_diff"
    direction: str = DIRECTIONS[0]
    intervention: str = INTERVENTIONS[0]
    tolerance: str | None = None  # None: every patch runs exactly
    chat: bool = False  # the prompts are messages of a user, for the tokenizer's own template

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted", "answer", "wrong_answer"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text:
                words = name.replace("_", " ")
                raise PromptError(f"the {words} is empty; write a text")
            if len(text) > MAX_CHARACTERS:
                raise PromptError(
                    f"{name} has {len(text):,} characters, at most {MAX_CHARACTERS:,}; shorten it"
                )
        if not self.sites:
            raise ConfigError("no site is chosen; choose at least one, such as resid_pre")
        for site in self.sites:
            one_of("sites", site, CHOICES)
        one_of("metric", self.metric, tuple(METRICS))
        one_of("direction", self.direction, DIRECTIONS)
        one_of("intervention", self.intervention, INTERVENTIONS)
        if self.tolerance not in TOLERANCES:
            known = ", ".join(str(x) for x in TOLERANCES)
            raise ConfigError(f"tolerance={self.tolerance!r} is not known; use one of {known}")
        if not isinstance(self.chat, bool):
            raise ConfigError(f"chat={self.chat!r} must be true or false")

    @classmethod
    def of(cls, given: Any) -> Question:
        """Return the question that the page sent as JSON.

        Raises:
            PatchsweepError: it is not one.
        """
        if not isinstance(given, Mapping):
            raise ConfigError(f"a question is a JSON object, got {type(given).__name__}; send one")
        known = {field.name for field in fields(cls)}
        if unknown := set(given) - known:
            raise ConfigError(f"{sorted(unknown)[0]!r} is no part of a question; leave it out")
        settings = dict(given)
        for name in ("clean", "corrupted", "answer", "wrong_answer"):
            settings.setdefault(name, "")
        if "sites" in settings:
            if not isinstance(settings["sites"], list):
                raise ConfigError(f"sites={settings['sites']!r} must be a list of sites")
            # in the order of the page, so that equal questions are equal
            settings["sites"] = tuple(sorted(settings["sites"], key=_rank))
        return cls(**settings)

    def pairs(self, model: TransformerBridge) -> PromptPairs:
        """Return the pair, tokenised.

        Raises:
            PromptError: the prompts do not fit the model or each other.
        """
        with _tokenizing:
            try:
                return PromptPairs.from_strings(
                    model,
                    [self.clean],
                    [self.corrupted],
                    [(self.answer, self.wrong_answer)],
                    template=CHAT if self.chat else None,
                    align=END,
                )
            except PromptError as error:  # there is one pair alone
                raise PromptError(str(error).removeprefix("pair 0: ")) from error

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `sweep`, but for model, pairs, sites and place."""
        return {
            "metrics": self.metric,
            "direction": self.direction,
            "intervention": self.intervention,
            "tolerance": self.tolerance,
        }

    def request(self, model: TransformerBridge, pairs: PromptPairs) -> Request:
        """Return the sweep, checked and planned; runs nothing.

        Raises:
            PatchsweepError: a setting does not fit the model.
        """
        request = make_request(model, pairs, SweepSpec(self.sites, **self.settings()), aligned=True)
        if self.tolerance is not None:
            check_adaptive(request, {})
        return request

    def command(self, model: str) -> str:
        """Return the command line that runs the same sweep of the model called `model`."""
        texts = ("clean", "corrupted", "answer", "wrong_answer")
        words = [
            f"model={model}",
            "model.dtype=float32",
            "task=strings",
            *(f"task.{name}={_written(getattr(self, name))}" for name in texts),
            *(["task.template=chat"] if self.chat else []),
            "task.align=end",
            f"sites=[{','.join(self.sites)}]",
            f"metric={self.metric}",
            f"direction={self.direction}",
            f"intervention={self.intervention}",
            *([f"tolerance={self.tolerance}"] if self.tolerance else []),
            "store=runs/explored.zarr",
        ]
        return "patchsweep run " + " ".join(shlex.quote(word) for word in words)

    def python(self, model: str) -> str:
        """Return the Python that runs the same sweep of the model called `model`."""
        optional = f"    tolerance={self.tolerance!r},\n" if self.tolerance else ""
        template = "    template='chat',\n" if self.chat else ""
        return (
            "import patchsweep as ps\n\n"
            f"model = ps.load_model({model!r})\n"
            "pairs = ps.PromptPairs.from_strings(\n"
            "    model,\n"
            f"    clean=[{self.clean!r}],\n"
            f"    corrupted=[{self.corrupted!r}],\n"
            f"    answers=[({self.answer!r}, {self.wrong_answer!r})],\n"
            f"{template}"
            "    align='end',\n"
            ")\n"
            "ds = ps.sweep(\n"
            "    model,\n"
            "    pairs,\n"
            f"    {list(self.sites)!r},\n"
            f"    {self.metric!r},\n"
            f"    direction={self.direction!r},\n"
            f"    intervention={self.intervention!r},\n"
            f"{optional}"
            "    store='runs/explored.zarr',\n"
            ")\n"
        )


def _rank(site: Any) -> int:
    return CHOICES.index(site) if site in CHOICES else len(CHOICES)


def _written(text: str) -> str:
    """Return a prompt as a word of the command line: one that is in quotes keeps them."""
    return QuotedString(text, Quote.single).with_quotes() if text[0] in "'\"" else text
