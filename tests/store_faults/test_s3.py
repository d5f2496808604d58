"""Object stores: the same code and content as on a disk, with failing requests and rivals."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from patchsweep.cli import main
from patchsweep.cli.main import EXIT_MISTAKE
from patchsweep.errors import StoreError
from patchsweep.store.backends.address import open_folder
from patchsweep.store.journal import Journal, read_journal
from patchsweep.store.lease import Leases
from patchsweep.store.status import store_status
from patchsweep.store.store import Store
from store_checks import checksums, verify_structure

from store_faults.runs import run, small_layout, values_of

pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
pytest.importorskip("moto", reason="needs moto: pip install 'moto[server]'")

from store_faults.flaky_s3 import KINDS, FlakyS3, serve

Observed = Callable[[str, str], None]
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.fixture(scope="module")
def server() -> Iterator[FlakyS3]:
    with serve() as flaky:
        yield flaky


@pytest.fixture
def s3(server: FlakyS3, monkeypatch: pytest.MonkeyPatch) -> FlakyS3:
    """The server in good health, with credentials in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server.every, server.kinds = None, KINDS
    server.failed.clear()
    return server


@pytest.fixture
def options(s3: FlakyS3) -> dict[str, Any]:
    """Options of the storage library: where the server is, and how long to wait for an answer."""
    return {
        "client_kwargs": {"endpoint_url": s3.url},
        "config_kwargs": {"read_timeout": 0.6, "retries": {"max_attempts": 5}},
    }


@pytest.fixture
def url(options: dict[str, Any]) -> str:
    import s3fs

    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem(**options).mkdir(bucket)
    return f"s3://{bucket}/runs/ioi.zarr"


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    run(path)
    return checksums(path)


def test_store_on_s3_equals_the_one_on_disk(
    url: str, options: dict[str, Any], on_disk: dict[str, str]
) -> None:
    run(url, storage_options=options, journal=True)
    assert checksums(url, storage_options=options) == on_disk
    with xr.open_zarr(url, consolidated=False, storage_options=options) as ds:
        assert ds["z"].dims == ("metric", "pair", "layer", "pos", "head")
        assert ds.coords["base_token"].values[1, 2].startswith("token 1 2")
    status = store_status(url, storage_options=options)
    assert status.complete
    assert [p.state for p in status.processes] == ["finished"]
    assert verify_structure(Store.open(url, storage_options=options)) == []


@pytest.mark.parametrize(
    "n_units", [4, pytest.param(12, marks=pytest.mark.slow)], ids=lambda n: f"{n}-units"
)
def test_one_request_in_ten_failing_gives_the_same_content(
    n_units: int,
    s3: FlakyS3,
    url: str,
    options: dict[str, Any],
    on_disk: dict[str, str],
    observed: Observed,
) -> None:
    if n_units == 4:  # backing off takes its time: the quick test makes the store in peace
        Store.create_or_resume(url, small_layout(), storage_options=options)
    s3.every = 10
    run(url, only=slice(n_units), storage_options=options, journal=True)
    s3.every = None
    run(url, storage_options=options)
    assert checksums(url, storage_options=options) == on_disk
    assert set(s3.failed) == set(KINDS)
    events = [event["event"] for event in read_journal(url, storage_options=options)]
    assert events == ["started", *["unit"] * n_units, "finished"]
    observed("S3: one request in ten fails (500, 503, timeout, lost answer)", "the same content")


def test_run_that_gives_up_says_so_and_resumes(
    s3: FlakyS3,
    url: str,
    options: dict[str, Any],
    on_disk: dict[str, str],
    observed: Observed,
) -> None:
    options["config_kwargs"]["retries"]["max_attempts"] = 1
    store = Store.create_or_resume(url, small_layout(), storage_options=options)
    first, second, *_ = store.units()
    store.write(first, values_of(store.variables[first.variable], first))
    s3.every, s3.kinds = 1, ("500",)
    with pytest.raises(StoreError) as caught:
        store.write(second, values_of(store.variables[second.variable], second))
    text = str(caught.value)
    assert "did not after its library's retries" in text
    assert "run the same command again: finished units are kept" in text
    with pytest.raises(StoreError, match="did not after its library's retries"):
        Store.create_or_resume(url, small_layout(), storage_options=options)
    s3.every = None
    assert store.is_done(first)
    assert not store.is_done(second)
    run(url, storage_options=options)
    assert checksums(url, storage_options=options) == on_disk
    observed("S3 stays away", "StoreError: see to the network and the credentials; resumed")


def test_credentials_reach_neither_store_nor_journal_nor_errors(
    s3: FlakyS3, url: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options["config_kwargs"]["retries"]["max_attempts"] = 1
    run(url, storage_options=options)
    with Journal(url, storage_options=options) as journal:
        journal.started(["run", f"store=s3://user:{SECRET}@host/x"], n_units=1)
        journal.warning(f"the key {SECRET} was refused")
    for suffix in ("", ".journal", ".leases"):
        folder = open_folder(url, options)
        folder = folder.beside(suffix) if suffix else folder
        everything = b"".join(folder.read(key) or b"" for key in folder.list())
        assert SECRET.encode() not in everything
        assert b"AKIA" not in everything
    s3.every, s3.kinds = 1, ("500",)
    with pytest.raises(StoreError) as caught:
        Store.open(url, storage_options=options)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__  # the library's own text is not shown beneath


def test_two_processes_cannot_claim_one_unit_on_s3(
    s3: FlakyS3, url: str, options: dict[str, Any]
) -> None:
    folders = [open_folder(url, options).beside(".leases") for _ in range(2)]
    mine, rival = (Leases(folder) for folder in folders)
    s3.every, s3.kinds = 5, ("lost answer",)
    assert mine.claim(["z/0.0", "z/0.1"]) == ["z/0.0", "z/0.1"]
    assert rival.claim(["z/0.0", "z/0.1", "z/0.2"]) == ["z/0.2"]
    assert mine.claim(["z/0.0", "z/0.2"]) == ["z/0.0"]
    mine.release(["z/0.0"])
    assert rival.claim(["z/0.0"]) == ["z/0.0"]
    rival.close()
    mine.close()
    assert folders[0].list() == []


def test_wrong_bucket_is_refused_with_its_name(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"s3://no-such-bucket-here/x\.zarr"):
        Store.create_or_resume(
            "s3://no-such-bucket-here/x.zarr", small_layout(), storage_options=options
        )


@pytest.mark.parametrize("words", [["status"], ["verify"], ["report", "-o", "page.html"]])
@pytest.mark.parametrize("place", ["away", "with-credentials"])
def test_verbs_say_in_one_line_that_the_server_is_away_or_the_address_is_wrong(
    words: list[str],
    place: str,
    s3: FlakyS3,
    url: str,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(url, storage_options=options)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.every, s3.kinds = 1, ("500",)
    if place == "with-credentials":
        url = url.replace("s3://", f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@")
    capsys.readouterr()
    verb, *rest = words
    assert main([verb, url, *rest]) == EXIT_MISTAKE
    told = "".join(capsys.readouterr())
    assert told.count("\n") == 1
    assert told.startswith("patchsweep: ")
    assert "AKIA" not in told
    assert SECRET not in told
    assert not (tmp_path / "page.html").exists()
