"""Rebuilds the request of a store, to run its cells again, on a model and task that the user names.

A store is data and may come from anybody. The store names its cells (sites, layers, positions,
heads, registered metrics and interventions). The command line, and never the store, decides which
files are opened, which weights are loaded and which functions are called.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from patchsweep.cli.app import as_config, compose
from patchsweep.cli.schema.run import RunConfig, SitesConfig, read_intervention
from patchsweep.errors import ConfigError, StoreError
from patchsweep.spec.directions import Scale
from patchsweep.spec.spec import Request, SweepSpec, make_request
from patchsweep.store.difference import IDENTITY
from patchsweep.store.store import Store
from patchsweep.sweeps.identity import request_difference

NAMED = ("model", "task", "metric")  # groups that the command line names


def recorded_spec(store: Store) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Return sites, metrics and other fields of the `SweepSpec` that a command recorded in `store`.

    They are values and registered names. A metric of somebody's own is no name.

    Raises:
        StoreError: the store has no such config, or its fields have other types.
        ConfigError: it holds several interventions.
    """
    try:
        config = store.attrs["provenance"]["config"]
        sites = SitesConfig(**config["sites"])
        metrics, precision = config["metric"]["names"], config["precision"]
        intervention = read_intervention(config["intervention"])
        selection = {
            "direction": config["direction"],
            "intervention": intervention,
            "read": config["metric"]["read"],
            "layers": sites.layers,
            "positions": sites.positions,
            "heads": sites.heads,
            "neurons": sites.neurons,
        }
    except (KeyError, TypeError):
        raise StoreError(
            "the store holds no config of a `patchsweep run`, so its cells cannot be run "
            "again; only stores of the command line can"
        ) from None
    if isinstance(intervention, Mapping):
        raise ConfigError(
            "the store holds several interventions, whose values are not run again; leave "
            "model and task out to check its files"
        )
    if (
        not (isinstance(sites.names, list) and isinstance(metrics, list))
        or not isinstance(intervention, str | int | float | Scale)
        or not all(isinstance(name, str) for name in (*sites.names, precision))
    ):
        raise StoreError(
            "the store's config names sites or an intervention that are no names; do not trust it"
        )
    return sites.names, metrics, selection


def run_again(store: Store, words: Sequence[str], verb: str) -> tuple[Request, RunConfig]:
    """Return the store's request on the model and task of `words`, and the config of `words`.

    Raises:
        PatchsweepError: `words` set other keys, or name another model, task or metric than the
            store was made with.
    """
    groups = {word.lstrip("+~").partition("=")[0].partition(".")[0] for word in words}
    if unknown := sorted(groups.difference(NAMED)):
        raise ConfigError(
            f"{unknown[0]}=... is told by the store itself; name {', '.join(NAMED)} alone"
        )
    sites, metrics, selection = recorded_spec(store)
    if not groups.issuperset(NAMED[:2]):
        raise ConfigError(
            f"name what is to be run again: patchsweep {verb} STORE model=... task=..."
            + said_by(store)
        )
    config = _composed(verb, words)
    if "metric" in groups:
        metrics = config.metric.metrics()
    elif not all(isinstance(name, str) for name in metrics):
        raise ConfigError(
            "the store has metrics of somebody's own; name them yourself if you trust them: "
            "metric.names=[...], as for `patchsweep run`"
        )
    model = config.model.load()
    pairs = config.task.load(model)
    request = make_request(model, pairs, SweepSpec(sites, metrics, **selection), aligned=True)
    _check_same(store, request)
    return request, config


def said_by(store: Store) -> str:
    """Return the model and task recorded in the store as text for a message; may be empty."""
    try:
        config = store.attrs["provenance"]["config"]
        words = [f"model={config['model']['name']}", *_task_words(config["task"])]
    except (KeyError, TypeError, AttributeError):
        return ""
    text = " ".join(shlex.quote(word) for word in words)
    if not text.isprintable() or len(text) > 300:
        return ""
    return f" (the store says: {text})"


def _task_words(task: Mapping[str, Any]) -> list[str]:
    if "name" not in task:
        return [f"task={task['path']}" if "path" in task else "task=strings ..."]
    words = [f"task={task['name']}"]
    words += [f"task.{key}={task[key]}" for key in ("n_pairs", "seed") if task.get(key)]
    return words + [f"task.options.{key}={value}" for key, value in task["options"].items()]


def _composed(verb: str, words: Sequence[str]) -> RunConfig:
    configs: list[RunConfig] = []

    def job(cfg: DictConfig) -> None:
        configs.append(as_config(cfg))

    compose(verb, list(words), job)
    return configs[0]


def _check_same(store: Store, request: Request) -> None:
    difference = request_difference(request, store.attrs)
    if difference is None and not isinstance(store.attrs.get(IDENTITY), Mapping):
        difference = "the store does not say which weights and prompts it was made with"
    if difference is not None:
        raise StoreError(
            f"nothing can be run again: {difference}; name the model, the prompts and the metrics "
            "that the store was made with" + said_by(store)
        )
