"""Models whose weights are elsewhere until a block runs: equal values, each weight once a packed
batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import patchsweep as ps
import pytest
import torch
from big_model import write_model
from patchsweep.errors import ModelError
from patchsweep.forward.unwrapped import Unsupported, UnwrappedModel
from patchsweep.models import load_model, meta_model
from patchsweep.models.offload import is_offloaded
from patchsweep.models.tiny import tiny_model
from patchsweep.models.weights import weights_digest
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.spec.plan import PatchSet
from patchsweep.spec.spec import Request, SweepSpec, make_request
from patchsweep.store.attributes import attributes
from patchsweep.sweeps.cost import estimate, weights_of
from subjects import CLEAN, CORRUPTED
from transformer_lens.model_bridge import TransformerBridge

# one split over CPU and disk, of a Llama; all of it on disk for the others
MAPS: dict[str, dict[str, str | int]] = {
    "llama": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "gpt2": {"": "disk"},  # learned positions, fused q, k and v
    "gemma3": {"": "disk"},  # norms inside the attention, two rotary tables
    "mixtral": {"": "disk"},  # experts, which are rewritten to the offload folder
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def saved(folder: Path, family: str) -> Path:
    path = folder / family
    for part in tiny_model(family):
        part.save_pretrained(path)
    return path


@cache
def offloaded(folder: Path, family: str) -> TransformerBridge:
    return load_model(
        str(saved(folder, family)),
        device_map=MAPS[family],
        offload_folder=folder / f"{family}-rewritten",
    )


@cache
def in_memory(folder: Path, family: str) -> TransformerBridge:
    return load_model(str(saved(folder, family)), device="cpu")


def pairs_of(bridge: TransformerBridge) -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(bridge, [CLEAN], [CORRUPTED], [(" Mary", " John")])


def request_of(bridge: TransformerBridge, sites: list[str]) -> Request:
    return make_request(bridge, pairs_of(bridge), SweepSpec(sites, ["logit_diff"]))


@pytest.mark.parametrize("family", list(MAPS))
def test_offloaded_sweep_equals_in_memory_sweep_bit_for_bit(folder: Path, family: str) -> None:
    sites = ["embed", "resid_pre", "resid_post", "z", "q", "pattern", "mlp_out"]
    found = [
        ps.sweep(
            bridge, pairs_of(bridge), sites, ["logit_diff", "kl_base", "rank"], runner="packed"
        )
        for bridge in (in_memory(folder, family), offloaded(folder, family))
    ]
    assert is_offloaded(offloaded(folder, family).original_model)
    for name in sites:
        assert float(np.ptp(found[0][name].values)) > 0
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
    provenance = [attributes(ds)["provenance"]["weights_hash"] for ds in found]
    assert provenance[0] == provenance[1]


def test_a_packed_fetches_each_offloaded_weight_once_and_keeps_none(folder: Path) -> None:
    bridge = offloaded(folder, "llama")
    request = request_of(bridge, ["resid_pre"])
    runner = PackedRunner(bridge, request.sites, max_tokens=10_000)
    traffic, weights = runner.unwrapped.traffic, weights_of(request)
    loaded = runner.load(request.batches([0])[0], request.intervention)
    assert traffic.n_bytes == weights.fetched > 0
    runner.references(loaded, request.metrics)  # which tries the unembedding out, once
    plan = request.plans[0]
    live = plan.live_patches()
    for first in (
        0,
        1,
        2,
    ):  # the first block that a packed batch visits: those below are not fetched
        patches = live[plan.entry[live] >= first]
        before = traffic.n_bytes
        runner.run(loaded, plan, patches, request.metrics)
        rows = 2 * 4 * int(bridge.cfg.d_model)  # of the unembedding
        assert traffic.n_bytes - before == sum(weights.blocks[first:]) + rows
    # matrices of a block on disk; its norms are kept
    assert {p.is_meta for p in runner.unwrapped.blocks[2].parameters() if p.ndim > 1} == {True}
    assert not any(p.is_meta for p in runner.unwrapped.blocks[2].parameters() if p.ndim == 1)
    assert not any(p.is_meta for p in runner.unwrapped.blocks[0].parameters())


def test_weights_are_let_go_when_a_block_fails(folder: Path) -> None:
    unwrapped = UnwrappedModel(offloaded(folder, "llama"))
    with pytest.raises(TypeError):
        unwrapped.blocks[1](torch.zeros(1, 2, 32), no_such_argument=1)
    assert all(p.is_meta for p in unwrapped.blocks[1].parameters() if p.ndim > 1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_probe_takes_the_packed_runner_for_an_offloaded_model(folder: Path, family: str) -> None:
    bridge = offloaded(folder, family)
    ds = ps.sweep(bridge, pairs_of(bridge), ["resid_pre", "z"])
    assert attributes(ds)["provenance"]["runner"] == "packed"


@pytest.mark.parametrize("method", ["atp", "ig", "relp"])
def test_attribution_on_an_offloaded_model_equals_that_in_memory(folder: Path, method: str) -> None:
    found = [
        ps.sweep(bridge, pairs_of(bridge), ["z"], method=method)[f"z_{method}"]
        for bridge in (in_memory(folder, "llama"), offloaded(folder, "llama"))
    ]
    assert float(np.ptp(found[0].values)) > 0
    np.testing.assert_array_equal(*found)


def test_bf16_products_of_an_offloaded_model_equal_those_in_memory(folder: Path) -> None:
    found = [
        ps.sweep(bridge, pairs_of(bridge), "z", runner="packed", precision="bf16")["z"]
        for bridge in (in_memory(folder, "llama"), offloaded(folder, "llama"))
    ]
    np.testing.assert_array_equal(*found)


def test_plan_knows_what_will_be_fetched_without_the_weights(folder: Path) -> None:
    path = str(saved(folder, "llama"))
    sketch = meta_model(path, device_map=MAPS["llama"])
    assert all(p.is_meta for p in sketch.original_model.parameters())
    costs = [
        estimate(request_of(bridge, ["resid_pre", "z"]), max_tokens=200)
        for bridge in (sketch, offloaded(folder, "llama"))
    ]
    assert costs[0].weights == costs[1].weights
    assert costs[0].read_bytes == costs[1].read_bytes
    bridge = offloaded(folder, "llama")
    runner = PackedRunner(bridge, request_of(bridge, ["resid_pre", "z"]).sites, max_tokens=200)
    request = request_of(bridge, ["resid_pre", "z"])
    loaded = runner.load(request.batches([0])[0], request.intervention)
    sets = [PatchSet(plan, plan.live_patches()) for plan in request.plans]
    runner.run_together(loaded, sets, request.metrics)
    # the plan leaves out what the unembedding takes: a few rows a packed batch, and one trial of
    # the whole
    left_out = runner.unwrapped.traffic.n_bytes - costs[1].read_bytes
    assert left_out == weights_of(request).around + costs[1].n_batches * 2 * 4 * 32


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_auto_fills_the_cpu_up_to_max_memory_and_leaves_the_rest_on_disk(
    folder: Path, family: str
) -> None:
    path = str(saved(folder, family))
    arguments = {"device_map": "auto", "max_memory": {"cpu": "150KB"}}
    maps = [
        make(path, **arguments).original_model.hf_device_map  # type: ignore[arg-type]
        for make in (load_model, meta_model)
    ]
    assert {"cpu", "disk"} == set(maps[0].values())
    assert maps[0] == maps[1]


def test_a_block_split_over_devices_is_left_to_the_hooked_runner(folder: Path) -> None:
    bridge = load_model(str(saved(folder, "llama")), device_map={"": "disk"})
    q = bridge.blocks[1].attn.q.original_component
    q._hf_hook.execution_device = "cuda:1"
    with pytest.raises(Unsupported, match=r"block 1 is split over cpu and cuda:1"):
        UnwrappedModel(bridge)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"device_map": "everywhere"}, "auto, balanced"),
        ({"max_memory": {"cpu": "1GB"}}, "is for a device_map"),
        ({"device": "cpu", "device_map": "auto"}, "exclude each other"),
        ({"device_map": "auto"}, "fits any device"),
    ],
)
def test_impossible_places_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        load_model("tiny:llama", **arguments)  # type: ignore[arg-type]


def test_weights_that_must_be_rewritten_need_a_folder(folder: Path) -> None:
    with pytest.raises(ModelError, match="offload_folder"):
        load_model(str(saved(folder, "mixtral")), device_map={"": "disk"})


def test_plainly_loaded_weights_are_mapped_from_the_file(folder: Path) -> None:
    bridge = in_memory(folder, "llama")
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(saved(folder, "llama")) in line
    ]
    address = bridge.blocks[0].mlp.gate.original_component.weight.data_ptr()
    assert any(first <= address < last for first, last in mapped)
    other = offloaded(folder, "llama")
    assert weights_digest(bridge.original_model) == weights_digest(other.original_model)


@pytest.mark.parametrize("device_map", [None, {"": "disk"}])
def test_bridge_knows_the_dtype_of_its_weights(
    folder: Path, device_map: dict[str, str | int] | None
) -> None:
    # the probe's tolerance and the store's provenance go by it
    bridge = load_model(str(saved(folder, "llama")), dtype="bfloat16", device_map=device_map)
    assert bridge.cfg.dtype == torch.bfloat16
    ds = ps.sweep(bridge, pairs_of(bridge), ["resid_pre", "z"])
    assert attributes(ds)["provenance"]["dtype"] == "bfloat16"
    assert attributes(ds)["provenance"]["runner"] == "packed"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("runner", ["packed", "hooked"])
def test_offloaded_weights_of_16_bits_are_computed_with_in_fp32(
    folder: Path, family: str, runner: str
) -> None:
    path, rewritten = str(saved(folder, family)), folder / f"{family}-bf16"
    models = (
        load_model(path, dtype="bfloat16", device="cpu"),
        load_model(path, dtype="bfloat16", device_map=MAPS[family], offload_folder=rewritten),
    )
    tokens = torch.tensor([pairs_of(models[1])[0].clean])
    before = models[1](tokens)
    found = [ps.sweep(m, pairs_of(m), ["z", "embed"], layers=[1], runner=runner) for m in models]
    assert attributes(found[1])["provenance"]["compute_dtype"] == "float32"
    for name in ("z", "embed"):
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-5)
    assert torch.equal(models[1](tokens), before)  # accelerate fetches its weights again


CAP = 768 * 2**20  # bytes, for everything that the process has: interpreter, libraries' data, pages


@contextmanager
def memory_group(n_bytes: int) -> Iterator[Path]:
    """The folder of a control group that may hold `n_bytes`; skips where there can be none."""
    version_1 = Path("/sys/fs/cgroup/memory")
    limit = "memory.limit_in_bytes" if version_1.is_dir() else "memory.max"
    folder = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"pst{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            (folder / limit).write_text(str(n_bytes))
        except OSError as error:
            # RLIMIT_DATA is no way out: it counts mapped files, which take no memory of their own
            pytest.skip(f"the memory of a control group cannot be limited here: {error}")
        if Path("/proc/swaps").read_text().count("\n") > 1:
            pytest.skip("there is swap, so a limit on memory would prove nothing")
        yield folder
    finally:
        folder.rmdir()


def forget_files(folder: Path) -> None:
    """Take the files of `folder` out of the page cache, where they would be on nobody's account."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.slow
def test_model_four_times_the_memory_reads_each_weight_once_a_packed(
    tmp_path: Path,
) -> None:
    if shutil.disk_usage(tempfile.gettempdir()).free < 8e9:
        pytest.skip("the model takes 3.3 GB of disk")
    script = Path(__file__).with_name("big_model.py")

    def sweep(result: str, *group: str) -> dict[str, np.ndarray]:
        command = [sys.executable, str(script), str(folder), str(tmp_path / result), *group]
        subprocess.run(command, check=True, timeout=900)
        return dict(np.load(tmp_path / result))

    with tempfile.TemporaryDirectory() as name, memory_group(CAP) as group:
        folder = Path(name)
        n_bytes = write_model(folder)
        assert n_bytes >= 4 * CAP
        forget_files(folder)
        capped = sweep("capped.npz", str(group / "cgroup.procs"))
        free = sweep("free.npz")
    for site in ("resid_pre", "z"):
        assert float(np.nanmax(free[site]) - np.nanmin(free[site])) > 0.05  # patches do something
        # the same operations on the same bits, whatever memory there is
        np.testing.assert_array_equal(capped[site], free[site])
    batches = capped["is_packed"]
    assert batches.sum() >= 4
    assert (capped["fetched"] <= n_bytes).all()
    # what the disk gave, per capture or packed batch: the model's size, and pages of libraries
    assert (capped["from_disk"] <= 1.1 * n_bytes).all(), capped["from_disk"] / n_bytes
    # packed batches that visit all blocks must really read them: memory holds a quarter of the
    # weights
    whole = batches & (capped["first_block"] == 0)
    assert (capped["from_disk"][whole] >= 0.75 * n_bytes).all()
    assert int(capped["peak_anonymous"]) < CAP
    print(
        f"model {n_bytes / 1e9:.2f} GB, cap {CAP / 1e6:.0f} MB, "
        f"peak without pages of files {capped['peak_anonymous'] / 1e6:.0f} MB, "
        f"first block of each pass {capped['first_block'].tolist()}, read of the model's size "
        f"{np.round(capped['from_disk'] / n_bytes, 3).tolist()}, "
        f"of what was fetched {np.round(capped['from_disk'] / capped['fetched'], 3).tolist()}"
    )
