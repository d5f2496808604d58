"""The command line: groups, short forms, mistakes in one line, slices, signals, verify."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import xarray as xr
import yaml
from patchsweep.cli import main
from patchsweep.cli.main import EXIT_DONE, EXIT_MISTAKE, EXIT_STOPPED, VERBS
from patchsweep.cli.schema.run import (
    FileTask,
    MetricConfig,
    ModelConfig,
    NamedMethods,
    RunConfig,
    RunnerConfig,
    SitesConfig,
    StoreConfig,
    file_name,
)
from patchsweep.cli.verify import EXIT_PROBLEMS
from patchsweep.errors import ConfigError
from patchsweep.store.journal import read_journal
from patchsweep.store.save import save_dataset
from patchsweep.store.status import EXIT_INCOMPLETE
from patchsweep.store.store import Store
from patchsweep.tasks import TASKS
from store_checks import checksums

CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("model", "task", "sites", "method", "metric", "store", "runner")
TINY = ["model=tiny", "task=ioi_demo"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in an empty folder, its signal handlers put back at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PATCHSWEEP_DEBUG", raising=False)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in kept.items():
        signal.signal(number, handler)


def patchsweep(*words: str) -> int:
    return main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that tells of the mistake in this command."""
    assert patchsweep(*words) == EXIT_MISTAKE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def process(*words: str, **env: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "patchsweep", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def test_every_verb_is_a_module_and_in_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert patchsweep("--help") == EXIT_DONE
    usage = capsys.readouterr().out
    for verb in VERBS:
        assert f"  {verb}" in usage
    assert patchsweep("--version") == EXIT_DONE
    assert re.fullmatch(r"patchsweep \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert "is no verb; use one of run," in refused(capsys, "sweep")
    assert "did you mean verify?" in refused(capsys, "verfy")


def test_every_choice_begins_with_a_schema_and_is_in_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        patchsweep("run", "--help")
    assert exit_.value.code == 0
    help_text = capsys.readouterr().out
    for group in GROUPS:
        listed = re.search(
            rf"^ +{group} +(.*?)(?=\n +or |\n +\w+ {{2,}}|\n\n)", help_text, re.M | re.S
        )
        assert listed is not None, group
        assert sorted(re.findall(r"\w+", listed[1])) == choices(group)
        for name in choices(group):
            defaults = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())["defaults"]
            assert defaults[0].endswith("schema")
            assert defaults[1] == "_self_"
    for launcher in choices("hydra/launcher"):
        assert launcher in help_text


def test_every_task_has_a_file_with_its_options() -> None:
    assert set(choices("task")) == {*TASKS, "jsonl", "strings"}
    for name, task in TASKS.items():
        config = yaml.safe_load((CONF / "task" / f"{name}.yaml").read_text())
        assert config["name"] == name
        assert config.get("options", {}) == task.options()


def test_run_leaves_nothing_but_its_store(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert patchsweep("run", *TINY, "sites=[resid_pre,z]") == EXIT_DONE
    name = "tiny-llama-ioi_demo.zarr"
    assert os.listdir(here) == ["runs"]
    assert sorted(os.listdir(here / "runs")) == [name, f"{name}.journal", f"{name}.leases"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5, "a line of what begins, one a unit, and two in the end"
    events = [event["event"] for event in read_journal(here / "runs" / name)]
    assert events == ["started", "unit", "unit", "finished"]
    with xr.open_zarr(here / "runs" / name, consolidated=False) as ds:
        assert ds["z"].notnull().all()


def test_second_run_does_nothing_and_another_run_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", *TINY, "sites=resid_pre", "store=a.zarr"]
    assert patchsweep(*command) == EXIT_DONE
    before = checksums(here / "a.zarr")
    assert patchsweep(*command) == EXIT_DONE
    assert "0 units, 0 live patches" in capsys.readouterr().out
    text = refused(capsys, *command, "metric=prob")
    assert "belongs to another run" in text
    assert checksums(here / "a.zarr") == before


MISTAKES = {
    "unknown-key": (["run", "model.nam=x"], "model.nam"),
    "unknown-choice": (["run", "task=nothing"], "nothing"),
    "wrong-type": (["run", "runner.max_tokens=many"], "many"),
    "missing-value": (["run", "model=hf"], "model.name"),
    "unknown-runner": (["run", "runner.name=fast"], "use auto, packed or hooked"),
    "no-list": (["run", "sites.layers=x"], "must be an index or a list"),
    "unknown-site": (["run", *TINY, "sites=resid"], "use one of"),
    "unknown-metric": (["run", *TINY, "metric=accuracy"], "use one of"),
    "layer": (["run", *TINY, "sites=z", "sites.layers=[7]"], "past the last layer 2"),
    "position": (["run", *TINY, "sites=z", "sites.positions=[99]"], "past the last position"),
    "direction": (["run", *TINY, "direction=up"], "denoising"),
    "slice": (["run", *TINY, "slice=2", "n_slices=2", "store=a.zarr"], "use 0..1"),
    "family": (["run", "model=tiny:bert", "task=ioi_demo"], "use one of"),
    "option": (["run", "model=tiny", "task=ioi", "task.options.order=x"], "use one of"),
    "no-file": (["run", "model=tiny", "task=none.jsonl"], "none.jsonl"),
    "no-store": (["status", "none.zarr"], "there is no store"),
    "nothing-to-verify": (["verify", "none.zarr"], "there is no store"),
    "nothing-to-report": (["report", "none.zarr"], "none.zarr"),
    "task": (["task", "check", "nothing"], "use one of"),
    "launcher": (["run", "-m", *TINY, "hydra/launcher=ray_local"], "patchsweep[ray]"),
}


@pytest.mark.parametrize(("words", "part"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistake_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    part: str,
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("a mistake was noticed only after a forward pass")

    monkeypatch.setattr(sys.modules["patchsweep.sweeps.api"], "prepare_runner", never)
    assert part in refused(capsys, *words)


def test_unknown_choice_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "run", "task=nothing")
    assert all(name in text for name in choices("task"))
    assert "schema" not in text
    assert "search path" not in text


def test_jsonl_mistake_names_file_and_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "pairs.jsonl").write_text('{"clean": "a"}\n')
    assert "pairs.jsonl, line 1" in refused(capsys, "run", "model=tiny", "task=pairs.jsonl")


def test_plan_prints_the_cost_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert patchsweep("plan", *TINY) == EXIT_DONE
    out = capsys.readouterr().out
    for word in (
        "patches",
        "live",
        "packed batches",
        "token-layers",
        "a loop needs",
        "FLOPs",
        "seconds",
    ):
        assert word in out
    assert "'<s>' 'When' ' John' ' and' ' Mary' ' went' ... ' gave'" in out
    assert "' milk' ' to', then ' Mary' or ' John' (17 tokens)" in out
    assert os.listdir(here) == []


def test_start_token_can_be_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["task.clean=John went to", "task.corrupted=Mary went to", "task.answer=' it'"]
    words += ["task=strings", "task.wrong_answer=' they'", "task.prepend_bos=false"]
    assert patchsweep("plan", "model=tiny", *words) == EXIT_DONE
    assert "first prompt    'John' ' went' ' to', then ' it' or ' they' (3 tokens)" in (
        capsys.readouterr().out
    )


def test_slices_write_what_one_process_writes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a work item of three sites, and z in two blocks of layers
    monkeypatch.setattr("patchsweep.spec.shards.UNIT_TOKENS", 400)
    sweep = ["run", *TINY, "sites=[resid_pre,attn_out,mlp_out,z]"]
    assert patchsweep(*sweep, "store=one.zarr") == EXIT_DONE
    sliced = ["-m", "slice=range(0,3)", "n_slices=3", "hydra.sweep.dir=jobs", "store=many.zarr"]
    assert patchsweep(*sweep, *sliced) == EXIT_DONE
    assert checksums(here / "many.zarr") == checksums(here / "one.zarr")
    assert patchsweep(*sweep, "store=many.zarr", "slice=1", "n_slices=3") == EXIT_DONE
    assert checksums(here / "many.zarr") == checksums(here / "one.zarr")


def test_unpatched_metrics_do_not_depend_on_the_order_of_slices(here: Path) -> None:
    # many pairs: sites with many patches a pair have smaller blocks of pairs than others would
    sweep = ["run", "model=tiny", "task=ioi", "task.n_pairs=24", "sites=[resid_pre,z]"]
    for index, order in enumerate(([0, 1], [1, 0])):
        for part in order:
            words = [f"store={index}.zarr", f"slice={part}", "n_slices=2"]
            assert patchsweep(*sweep, *words) == EXIT_DONE
    assert checksums(here / "0.zarr") == checksums(here / "1.zarr")


def test_status_and_verify_tell_incomplete_by_their_exit_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchsweep.spec.shards.UNIT_TOKENS", 250)  # too few for both sites at once
    sweep = ["run", *TINY, "sites=[resid_pre,z]", "store=a.zarr", "n_slices=2"]
    assert patchsweep(*sweep, "slice=0") == EXIT_DONE
    assert patchsweep("status", "a.zarr") == EXIT_INCOMPLETE
    assert patchsweep("verify", "a.zarr", "-n", "8", *TINY) == EXIT_INCOMPLETE
    assert "0 of 2" in capsys.readouterr().out
    assert patchsweep(*sweep, "slice=1") == EXIT_DONE
    assert patchsweep("status", "a.zarr") == EXIT_DONE
    assert patchsweep("verify", "a.zarr", *TINY) == EXIT_DONE
    assert "24 run again" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["intervention=mean_all", "sites=[z,mlp_out]"],
        ["direction=noising", "sites=[q,k,v]", "metric=[prob,logit]"],
        ["sites=z", "sites.positions=all", "sites.heads=[[0,1],2]"],
        ["sites=resid_post", "sites.layers=[1,[0,2]]", "sites.positions=[S2,end]"],
    ],
    ids=" ".join,
)
def test_verify_runs_again_what_the_config_says(words: list[str]) -> None:
    made = ["model=tiny", "task=ioi", "task.n_pairs=3"]
    assert patchsweep("run", *made, "store=a.zarr", *words) == EXIT_DONE
    assert patchsweep("verify", "a.zarr", *made, "--seed", "0") == EXIT_DONE


def test_verify_finds_a_changed_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert patchsweep("run", *TINY, "sites=resid_pre", "store=a.zarr") == EXIT_DONE
    store = Store.open("a.zarr")
    (unit,) = store.units()
    variable = store.variables["resid_pre"]
    values = store.dataset()["resid_pre"].values + np.float32(0.01)
    (Path("a.zarr") / variable.flag_key(unit)).unlink()
    (Path("a.zarr") / variable.shard_key(unit)).unlink()
    store.write(unit, values)
    assert patchsweep("verify", "a.zarr") == EXIT_DONE  # its digest is right
    assert patchsweep("verify", "a.zarr", *TINY) == EXIT_PROBLEMS
    assert "run again gives" in capsys.readouterr().out


def test_verify_finds_a_damaged_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert patchsweep("run", *TINY, "sites=resid_pre", "store=a.zarr") == EXIT_DONE
    store = Store.open("a.zarr")
    shard = Path("a.zarr") / store.variables["resid_pre"].shard_key(store.units()[0])
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    assert patchsweep("verify", "a.zarr") == EXIT_PROBLEMS
    assert "PROBLEM resid_pre/0.0" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signal_ends_the_run_after_the_unit_in_hand(here: Path, number: signal.Signals) -> None:
    # the hooked runner takes long enough to be caught at work
    words = ["run", "model=tiny", "task=ioi", "task.n_pairs=32", "runner=hooked", "store=a.zarr"]
    running = process(*words)
    deadline = time.monotonic() + 60
    while not any(e["event"] == "unit" for e in read_journal(here / "a.zarr")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == EXIT_STOPPED, err
    assert f"{number.name}: stopped" in err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    last = read_journal(here / "a.zarr")[-1]
    assert last["event"] == "interrupted"
    left = len(Store.open(here / "a.zarr").pending())
    assert 0 < left < len(Store.open(here / "a.zarr").units())
    assert not list((here / "a.zarr.leases" / "units").rglob("*@*")), "its leases are given back"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHSWEEP_DEBUG", "1")
    with pytest.raises(ConfigError):
        patchsweep("run", "runner.name=fast")


def test_report_is_written(here: Path) -> None:
    assert patchsweep("run", *TINY, "sites=[resid_pre,z]", "store=a.zarr") == EXIT_DONE
    assert patchsweep("report", "a.zarr", "-o", "out/r.html") == EXIT_DONE
    assert (here / "out" / "r.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("out", "part"),
    [
        ("folder", "must be a file"),
        ("a.zarr/zarr.json/r.html", "a file is in the way"),
        ("", "a file"),
    ],
)
def test_report_that_cannot_be_written_is_told(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    out: str,
    part: str,
) -> None:
    monkeypatch.setattr("patchsweep.report.page_of", lambda *of: "page")
    (here / "folder").mkdir()
    save_dataset(xr.Dataset(attrs={"kind": "lens"}), here / "a.zarr")
    assert part in refused(capsys, "report", "a.zarr", "-o", out)


def test_report_on_a_full_disk_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *args: object, **options: object) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("patchsweep.report.page_of", lambda *of: "page")
    monkeypatch.setattr(Path, "write_text", full)
    save_dataset(xr.Dataset(attrs={"kind": "lens"}), here / "a.zarr")
    assert "No space left on device" in refused(capsys, "report", "a.zarr", "-o", "r.html")
    assert os.listdir(here) == ["a.zarr"]


@pytest.mark.parametrize(
    ("verb", "then"),
    [
        ("run", "; the same command goes on"),
        ("edges", "; the same command goes on"),
        ("plan", ""),
    ],
)
def test_interrupt_says_what_the_same_command_will_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, then: str
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchsweep.cli.app.expand", interrupt)
    assert patchsweep(verb) == EXIT_STOPPED
    assert capsys.readouterr().err == f"patchsweep: interrupted{then}\n"


def test_task_list_and_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert patchsweep("task", "list") == EXIT_DONE
    listed = capsys.readouterr().out
    assert all(name in listed for name in TASKS)
    words = ["--model", "tiny:llama", "--n-pairs", "2"]
    assert patchsweep("task", "check", "ioi", *words) == EXIT_DONE
    assert "ioi" in capsys.readouterr().out


def test_demo_on_a_tiny_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # a second demo runs for real too
        assert patchsweep("demo", "--model", "tiny:llama", "--out", "d") == EXIT_DONE
        out = capsys.readouterr().out
        assert "All is well: 24 random cells" in out
        assert "4/4 z/0.0" in out
    assert (here / "d" / "report.html").exists()


@pytest.mark.parametrize("wrong", [float("nan"), 1.0])
def test_demo_with_wrong_cells_is_not_well(
    here: Path,
    wrong: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def off(*args: Any, **more: Any) -> Any:
        ds = ps.sweep(*args, **more)
        return ds.assign({name: ds[name] + wrong for name in ds.data_vars})

    monkeypatch.setattr("patchsweep.cli.demo.sweep", off)
    assert patchsweep("demo", "--model", "tiny:llama", "--out", "d") != EXIT_DONE
    out = capsys.readouterr().out
    assert "All is well" not in out
    assert "NOT well" in out


def test_store_without_a_config_is_refused_by_verify(capsys: pytest.CaptureFixture[str]) -> None:
    bridge = ps.load_model("tiny:llama")
    ps.sweep(bridge, ps.load_task(bridge, "ioi_demo"), "resid_pre", store="a.zarr")
    assert patchsweep("verify", "a.zarr", *TINY) == EXIT_MISTAKE
    assert "holds no config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny:llama", "tiny-llama"),
        ("meta/Llama-3.2-1B", "Llama-3.2-1B"),
        ("./folder/", "folder"),
        ("/", "model"),
    ],
)
def test_store_name_comes_from_the_model(name: str, expected: str) -> None:
    assert file_name(name) == expected


@pytest.mark.parametrize(
    ("method", "variables"),
    [
        (["method=[exact,atp]"], {"z", "z_atp"}),
        (["method=ig", "method.n_steps=2"], {"z_ig"}),
        (["method=screen", "method.k=5", "method.subsets=8"], {"z", "z_atp", "z_bound"}),
    ],
    ids=["named", "ig", "screen"],
)
def test_method_reaches_the_sweep_and_verify(method: list[str], variables: set[str]) -> None:
    made = ["model=tiny", "task=ioi", "task.n_pairs=3"]
    sweep = [*made, "sites=z", *method]
    assert patchsweep("plan", *sweep) == EXIT_DONE
    assert patchsweep("run", *sweep, "store=a.zarr") == EXIT_DONE
    found = Store.open("a.zarr").variables
    assert variables <= set(found)
    assert patchsweep("verify", "a.zarr", *made) == EXIT_DONE


def test_compare_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sites=[resid_pre,z]", "method=[exact,atp]", "store=a.zarr"]
    assert patchsweep("run", *TINY, *words) == EXIT_DONE
    assert patchsweep("compare", "a.zarr") == EXIT_DONE
    assert "Pearson" in capsys.readouterr().out
    assert patchsweep("compare", "a.zarr", "--json") == EXIT_DONE
    assert {site["site"] for site in json.loads(capsys.readouterr().out)["sites"]} == {
        "resid_pre",
        "z",
    }


def test_gpu_number_is_no_part_of_what_a_run_is() -> None:
    config = RunConfig(model=ModelConfig(name="tiny:llama", device="cuda:3"), task=FileTask("a"))
    config.sites, config.method = SitesConfig(["z"]), NamedMethods(["exact"])
    config.metric, config.store = MetricConfig(["prob"]), StoreConfig("a.zarr")
    config.runner, config.slice, config.n_slices = RunnerConfig("auto"), 1, 2
    kept = config.identity()
    assert kept["model"]["device"] == "cuda"
    assert not {"store", "slice", "n_slices"} & set(kept)


def test_metric_of_the_user_by_its_target(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "my_metrics.py").write_text(
        "def top_logit(logits):\n    return logits[:, 0].max(dim=-1).values\n"
    )
    monkeypatch.syspath_prepend(here)
    own = "metric.names=[logit_diff,{_target_: my_metrics.top_logit, version: 1}]"
    assert patchsweep("run", *TINY, "sites=[mlp_out]", own, "store=a.zarr") == EXIT_DONE
    ds = xr.open_zarr("a.zarr", consolidated=False)
    assert list(ds.metric.values) == ["logit_diff", "top_logit"]
    assert float(ds["mlp_out"].sel(metric="top_logit").min()) > 0
    assert patchsweep("verify", "a.zarr", *TINY) == EXIT_MISTAKE  # not by the store's word
    assert patchsweep("verify", "a.zarr", "-n", "4", *TINY, own) == EXIT_DONE


def test_metric_target_that_does_not_exist_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    own = "metric.names=[{_target_: no_such_module.metric}]"
    assert patchsweep("run", *TINY, own, "store=a.zarr") == EXIT_MISTAKE
    assert "give _target_ as module.function" in capsys.readouterr().err


def test_bf16_on_the_command_line(here: Path) -> None:
    words = ["sites=heads", "precision=bf16", "store=a.zarr"]
    assert patchsweep("run", *TINY, *words) == EXIT_DONE
    assert {"z", "z_bf16", "z_noise"} <= set(xr.open_zarr("a.zarr", consolidated=False))
    assert patchsweep("verify", "a.zarr", "-n", "6", *TINY) == EXIT_DONE
    assert patchsweep("report", "a.zarr") == EXIT_DONE


def test_compare_draws_an_exact_sample_for_estimates_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["sites=[z,mlp_out]", "method=atp", "store=a.zarr"]
    assert patchsweep("run", *TINY, *words) == EXIT_DONE
    assert patchsweep("compare", "a.zarr") == EXIT_MISTAKE  # nothing to compare with
    capsys.readouterr()
    assert patchsweep("compare", "a.zarr", "--sample", "12", "--json", *TINY) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert {site["site"] for site in found["sites"]} == {"z", "mlp_out"}
    assert patchsweep("compare", "a.zarr", "--sample", "-1", *TINY) == EXIT_MISTAKE
    assert patchsweep("compare", "a.zarr", "--sample", "12") == EXIT_MISTAKE
    assert "name what is to be run again" in capsys.readouterr().err
