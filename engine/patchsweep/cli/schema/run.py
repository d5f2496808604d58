"""The config of a run: dataclasses that Hydra fills from `conf/` and from the command line.

Each config group has its dataclasses here, registered as `<group>/schema...`. Every file of
`conf/<group>/` begins with its schema, so that Hydra refuses a wrong key or type when it composes
the config. `cli.app` converts the config to a `RunConfig` once, with `OmegaConf.to_object`;
everything below takes dataclasses.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, OmegaConf
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_runner, is_whole
from patchsweep.attribution import IntegratedInputs, IntegratedSite, Method
from patchsweep.attribution.quadrature import Path
from patchsweep.cli.early import OF_SWEEPS
from patchsweep.cli.schema.task import BuiltinTask, FileTask, TaskConfig, TextTask
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.models import load_model, meta_model
from patchsweep.spec.directions import Scale
from patchsweep.spec.metrics import Metric
from patchsweep.spec.spec import MetricLike, SweepSpec
from patchsweep.sweeps.methods import MethodLike
from patchsweep.sweeps.screen_settings import Screen

# its log of an object that cannot be imported repeats the error that it raises
logging.getLogger("hydra.utils").disabled = True
_SCALE = re.compile(r"scale\((.*)\)")
# keys of the run's place, which do not change results; they stay out of provenance
PLACES = ("store", "slice", "n_slices")
# keys of memory limits, which do not change results either
ROOM = (("model", "max_memory"), ("model", "offload_folder"), ("runner", "cache_budget"))


@dataclass
class ModelConfig:
    """The model, its device and its precision; see `patchsweep.load_model`."""

    name: str = MISSING  # smollm2-135m, tiny:<family>, a Hugging Face name, a folder, a GGUF file
    device: str | None = None  # such as cuda:1; null: a GPU if there is one
    dtype: str = "float32"  # float32, bfloat16 or float16
    device_map: Any = None  # auto and its like, or modules to devices: for big models
    max_memory: Any = None  # device to bytes that auto may fill, such as {0: 60GiB, cpu: 100GiB}
    offload_folder: str | None = None  # for weights on disk that cannot stay in the model's files
    revision: str | None = None  # of a Hugging Face model
    trust_remote_code: bool = False  # run code from the model's repository

    def load(self) -> TransformerBridge:
        """Load the model."""
        return load_model(**asdict(self))

    def sketch(self) -> TransformerBridge:
        """Return the model for a plan: on the meta device if its architecture allows that."""
        return meta_model(**asdict(self))


@dataclass
class SitesConfig:
    """The patches of a sweep. Lists hold indices, or lists of indices to patch together."""

    names: list[str] = MISSING  # such as [resid_pre, z]
    layers: Any = None  # null: each layer by itself; negative ones count from the end
    # null: each; a list of indices or labels, negative ones from the end; labels: all of them; end:
    # the last; all: one patch over all
    positions: Any = None
    heads: Any = None  # null: each; or all, for one patch over all heads
    neurons: Any = None  # of mlp_post: a list, or all

    def __post_init__(self) -> None:
        for key in ("layers", "positions", "heads", "neurons"):
            value = getattr(self, key)
            words = {"layers": (), "positions": ("labels", "end", "all")}.get(key, ("all",))
            if value is None or is_whole(value) or value in words:
                continue
            if not isinstance(value, list):
                wanted = ", or ".join(["an index or a list", *words])
                raise ConfigError(f"sites.{key}={value!r} must be {wanted}, such as [0,1]")
            setattr(self, key, [tuple(v) if isinstance(v, list) else v for v in value])


@dataclass
class MethodConfig:
    """The method that computes effects; one of the classes below."""

    def methods(self) -> list[MethodLike]:
        """Return the argument `method` of `sweep`."""
        raise ConfigError("a method is needed; give method=exact, method=screen or method=atp")


@dataclass
class NamedMethods(MethodConfig):
    """Exact patches, or attribution methods by name; several methods share a store."""

    names: list[str] = MISSING

    def methods(self) -> list[MethodLike]:
        return list(self.names)


@dataclass
class IntegratedMethod(MethodConfig):
    """Integrated gradients."""

    over: str = MISSING  # site: over the site's activation; inputs: over the embedding
    n_steps: Any = None  # nodes of the path, or auto; null: the method's own number
    rule: str = Path.rule  # gauss, or left: as the EAP-IG package has it, which converges slowly
    rtol: float = Path.rtol  # with n_steps=auto: error over the largest estimate of pair and site

    def methods(self) -> list[MethodLike]:
        methods: dict[str, IntegratedSite | IntegratedInputs] = {
            "site": IntegratedSite(),
            "inputs": IntegratedInputs(),
        }
        if self.over in methods:
            usual = methods[self.over]
            steps = usual.n_steps if self.n_steps is None else self.n_steps
            return [replace(usual, n_steps=steps, rule=self.rule, rtol=self.rtol)]  # type: ignore[arg-type]
        raise ConfigError(f"method.over={self.over!r} is not known; use site or inputs")


@dataclass
class ScreenMethod(MethodConfig):
    """Attribution ranks all patches, the top-k run exactly; see `patchsweep.screening.Screen`."""

    by: str = str(Screen.by)  # the method that ranks
    k: int = Screen.k  # patches of each site that run exactly
    margin: float | None = Screen.margin  # until the k-th effect is so much above what remains
    subsets: int = Screen.subsets  # random subsets per pair and site, for the bound; 0: no bound
    inclusion: float = Screen.inclusion  # probability that a subset holds a patch
    alpha: float = Screen.alpha  # level of the bound's test
    seed: int = Screen.seed

    def methods(self) -> list[MethodLike]:
        return [Screen(**asdict(self))]


def one_method(config: MethodConfig, otherwise: str) -> str | Method:
    """Return the one attribution method of `config`.

    Raises:
        ConfigError: it has several, or a screen; the message is `otherwise`.
    """
    methods = config.methods()
    if len(methods) != 1 or not isinstance(methods[0], str | Method):
        raise ConfigError(otherwise)
    return methods[0]


@dataclass
class MetricConfig:
    """The metrics that are computed from logits."""

    # names, or {_target_: module.function, name: peak, version: 1} over [row, read, d_vocab]
    names: list[Any] = MISSING
    read: int = SweepSpec.read  # prompt position whose logits are read; -1 is the last

    def metrics(self) -> list[MetricLike]:
        """Return the argument `metrics` of `sweep`.

        Raises:
            ConfigError: a `_target_` cannot be imported, or is missing.
        """
        return [_own(name) if isinstance(name, Mapping) else name for name in self.names]


def _own(target: Mapping[str, Any]) -> MetricLike:
    """Return a custom metric: a function, or an object of a class built with arguments.

    `name` and `version` identify it; a `Metric` has its own.
    """
    if "_target_" not in target:
        raise ConfigError(
            f"metric {dict(target)!r} names no function; give _target_ as module.function"
        )
    settings = dict(target)
    name, version = settings.pop("name", None), settings.pop("version", None)
    try:
        if set(settings) == {"_target_"}:
            made = get_object(settings["_target_"])
            made = made() if isinstance(made, type) else made
        else:
            made = instantiate(settings)
        if isinstance(made, Metric):
            return made
        return Metric.of_logits(
            made,
            name=str(name or getattr(made, "__name__", type(made).__name__)),
            version=None if version is None else str(version),
            parameters={key: value for key, value in settings.items() if key != "_target_"},
        )
    except (InstantiationException, ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f"metric {dict(target)!r} cannot be made: {error}; give _target_ as module.function, "
            "on the Python path"
        ) from error


def read_intervention(given: Any) -> Any:
    """Return what `sweep` takes for a value of the key `intervention`.

    It is a name, a number, `scale(0.5)`, or a mapping of names to such.

    Raises:
        ConfigError: the factor of a scale is no number.
    """
    if isinstance(given, Mapping):
        return {str(name): _one(value) for name, value in given.items()}
    return _one(given)


def _one(given: Any) -> Any:
    scale = _SCALE.fullmatch(given) if isinstance(given, str) else None
    if scale is None:
        return given
    try:
        return Scale(float(scale[1]))
    except ValueError:
        raise ConfigError(
            f"intervention={given} has the factor {scale[1]!r}; give a number, as in scale(0.5)"
        ) from None


@dataclass
class StoreConfig:
    """The store that receives the values."""

    path: str = MISSING  # a folder or a URL
    storage_options: dict[str, Any] = field(default_factory=dict)  # for fsspec; no credentials


@dataclass
class RunnerConfig:
    """The runner and its limits."""

    name: str = MISSING  # auto (a probe chooses), packed or hooked
    max_tokens: int | None = None  # most tokens of one packed batch; null: what suits the machine
    cache_budget: float | None = None  # bytes of activations in memory; null: a share of the free

    @property
    def cache_bytes(self) -> int | None:
        """Return the budget of the activation cache in bytes."""
        return None if self.cache_budget is None else int(self.cache_budget)

    def __post_init__(self) -> None:
        check_runner(self.name, self.max_tokens, self.cache_budget)


@dataclass
class RunConfig:
    """The config of one run."""

    model: ModelConfig = MISSING
    task: TaskConfig = MISSING
    sites: SitesConfig = MISSING
    method: MethodConfig = MISSING
    metric: MetricConfig = MISSING
    store: StoreConfig = MISSING
    runner: RunnerConfig = MISSING
    # resample, zero, mean, mean_all, mean_label, shuffle, a number or scale(0.5); or several at
    # once: a mapping of names to such
    intervention: Any = SweepSpec.intervention
    # denoising or noising; null: what suits the intervention
    direction: str | None = SweepSpec.direction
    means_from: str | None = None  # JSONL of the pairs that means are taken over; null: the task's
    # model: products in compute_dtype; bf16: bf16 products, the largest effects run again
    precision: str = SweepSpec.precision
    # auto: float32 for weights of 16 bits, else their own dtype; float32; or model: their own
    compute_dtype: str = SweepSpec.compute_dtype
    # the largest error, in units of the metric or such as 1%; null: every patch runs exactly
    tolerance: Any = SweepSpec.tolerance
    slice: int = 0  # this process does every n_slices-th work item of units, from this one on
    n_slices: int = 1

    def spec(self, model: TransformerBridge) -> SweepSpec:
        """Return the `SweepSpec`."""
        return SweepSpec(
            self.sites.names,
            self.metric.metrics(),
            direction=self.direction,  # type: ignore[arg-type]
            intervention=SweepSpec.intervention if self.has_several else self.read_intervention(),
            layers=self.sites.layers,
            positions=self.sites.positions,
            heads=self.sites.heads,
            neurons=self.sites.neurons,
            read=self.metric.read,
            means_from=self.reference(model),
            method=self.method.methods(),
            precision=self.precision,  # type: ignore[arg-type]
            compute_dtype=self.compute_dtype,  # type: ignore[arg-type]
            tolerance=self.tolerance,
        )

    def settings(self) -> dict[str, Any]:
        """Return the other arguments of `sweep` and `plan`: runner, limits and store."""
        return {
            "store": self.store.path,
            "storage_options": self.store.storage_options,
            "slice_index": self.slice,
            "n_slices": self.n_slices,
            "runner": self.runner.name,
            "max_tokens": self.runner.max_tokens,
            "cache_budget": self.runner.cache_bytes,
            **({"intervention": self.read_intervention()} if self.has_several else {}),
        }

    @property
    def has_several(self) -> bool:
        """Whether `intervention` maps names to interventions, which run in one sweep."""
        return isinstance(self.intervention, Mapping)

    def read_intervention(self) -> Any:
        """Return the intervention, or several by name, as `sweep` takes it."""
        return read_intervention(self.intervention)

    def reference(self, model: TransformerBridge) -> PromptPairs | None:
        """Return the pairs over which means are taken, read like the task's; None: the task's."""
        if self.means_from is None:
            return None
        read = FileTask(
            path=self.means_from,
            multi_token=getattr(self.task, "multi_token", False),
            prepend_bos=getattr(self.task, "prepend_bos", None),
            template=getattr(self.task, "template", None),
            align=getattr(self.task, "align", None),
            columns=getattr(self.task, "columns", {}),
        )
        return read.load(model)

    def identity(self) -> dict[str, Any]:
        """Return the config that defines the results, equal in all slices; part of provenance."""
        kept = {key: value for key, value in asdict(self).items() if key not in PLACES}
        for group, key in ROOM:
            del kept[group][key]
        if self.tolerance is None:  # as in the stores of versions without it
            del kept["tolerance"]
        for key in ("template", "columns", "align"):
            if not kept["task"].get(key):
                kept["task"].pop(key, None)
        if self.model.device is not None:  # cuda, whichever of the GPUs it is
            kept["model"]["device"] = self.model.device.partition(":")[0]
        return kept


@dataclass
class AnalysisRun(RunConfig):
    """The config of an analysis: its own keys, and those of a sweep that it uses."""

    # read from the source by `cli.early`, so literals
    uses: ClassVar[tuple[str, ...]] = ()  # of `early.OF_SWEEPS`; it refuses the others
    subject: ClassVar[str] = ""  # begins the message that refuses one, such as `edges have`
    instead: ClassVar[dict[str, str]] = {}  # key -> another message; also of keys inside groups

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the analysis other than model, pairs, means and config.

        Its own keys are arguments of the same name, and so are those that it uses of a sweep's.
        """
        of_all = {f.name for f in fields(RunConfig)}
        by_name = [f.name for f in fields(self) if f.name not in of_all]
        by_name += [x for x in ("direction", "compute_dtype", "tolerance") if x in self.uses]
        settings = {name: getattr(self, name) for name in by_name}
        if "intervention" in self.uses:
            settings["intervention"] = self.read_intervention()
        if "metric" in self.uses:
            settings |= {"metrics": self.metric.metrics(), "read": self.metric.read}
        if "runner" in self.uses:
            settings |= {"runner": self.runner.name, "max_tokens": self.runner.max_tokens}
        return settings

    def identity(self) -> dict[str, Any]:
        """Return the config that defines the results, without keys that only sweeps use."""
        unused = set(OF_SWEEPS).difference(self.uses)
        return {key: value for key, value in super().identity().items() if key not in unused}


def file_name(text: str) -> str:
    """Return the last part of `text` (a model's name or folder) as a valid file name."""
    return re.sub(r"[^\w.-]+", "-", text.rstrip("/").rpartition("/")[2]) or "model"


def of_verb(job: str) -> str:
    """Return the suffix of the default store's name for a verb other than `run`."""
    return "" if job == "patchsweep" else f"-{job}"


# here, at import, since a launcher's process resolves the config without composing one
OmegaConf.register_new_resolver("file_name", file_name, replace=True)
OmegaConf.register_new_resolver("of_verb", of_verb, replace=True)

# group -> its classes and, in the same order, the names of their schemas in the config store
GROUPS: dict[str, dict[type, str]] = {
    "model": {ModelConfig: "schema"},
    "task": {BuiltinTask: "schema", FileTask: "jsonl_schema", TextTask: "strings_schema"},
    "sites": {SitesConfig: "schema"},
    "method": {
        NamedMethods: "schema",
        IntegratedMethod: "ig_schema",
        ScreenMethod: "screen_schema",
    },
    "metric": {MetricConfig: "schema"},
    "store": {StoreConfig: "schema"},
    "runner": {RunnerConfig: "schema"},
}


def register() -> None:
    """Register the schemas with Hydra."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for group, classes in GROUPS.items():
        for one, name in classes.items():
            store.store(group=group, name=name, node=one)
