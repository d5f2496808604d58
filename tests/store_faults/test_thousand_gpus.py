"""Requests of a store on S3, and what docs/thousand_gpus.md computes from their number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import patchsweep as ps
import pytest
from patchsweep.cli import main
from patchsweep.cli.schema.task import BuiltinTask

pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
pytest.importorskip("moto", reason="needs moto: pip install 'moto[server]'")

from store_faults.flaky_s3 import FlakyS3, serve

PAGE = (Path(__file__).parents[2] / "docs" / "thousand_gpus.md").read_text(encoding="utf-8")
PAIRS, SITES = 48, ["resid_pre", "z"]  # of the page's run
READS, WRITES = 5500, 3500  # a second, under one prefix of S3


def number(text: str) -> int:
    return int(text.replace(",", ""))


def row(begin: str) -> tuple[int, int]:
    """Requests in all, and PUT and DELETE, of the row that begins so."""
    match = re.search(rf"^\| {re.escape(begin)}[^|]*\| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.M)
    assert match, begin
    return number(match[1]), number(match[2])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyS3]:
    import s3fs

    with serve() as one:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "key",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": one.url,
        }.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem(endpoint_url=one.url).mkdir("thousand")
        yield one


@pytest.mark.slow
def test_requests_are_those_of_the_page(server: FlakyS3) -> None:
    model = ps.load_model("tiny:llama")
    pairs = BuiltinTask(name="ioi", n_pairs=PAIRS).load(model)
    units = sum(site.n_units for site in ps.plan(model, pairs, SITES).sites)
    assert (units, len(pairs)) == (4, PAIRS)

    store = "s3://thousand/run.zarr"
    words = ["run", "model=tiny:llama", "task=ioi", f"task.n_pairs={PAIRS}", f"store={store}"]
    words.append(f"sites=[{','.join(SITES)}]")

    def counted() -> tuple[int, int]:
        before = server.n_requests, server.n_writes
        assert main(words) == 0
        return server.n_requests - before[0], server.n_writes - before[1]

    parts = [("a process begins, and makes", 1), ("a unit:", units), ("a pair, once:", PAIRS)]
    parts.append(("a process ends", 1))
    said = [sum(n * row(name)[kind] for name, n in parts) for kind in (0, 1)]
    assert counted() == pytest.approx(said, abs=4)  # a heartbeat more in a slow run

    before = server.n_requests
    assert main(["status", store]) == 0
    assert server.n_requests - before == row("`status`")[0]
    assert counted() == row("a process begins on this complete store")
    before = server.n_requests
    ps.open_store(store).load()
    assert server.n_requests - before == row("`open_store(...).load()`")[0]


def test_rates_follow_from_the_counts() -> None:
    (unit, unit_writes), (pair, pair_writes) = row("a unit:"), row("a pair, once:")
    assert f"n·({unit} + {pair}p)/s requests" in PAGE
    assert f"n·({unit_writes} + {pair_writes}p)/s write" in PAGE
    assert f"{WRITES:,} writes and {READS:,} reads a second" in PAGE
    writes, reads = unit_writes + pair_writes, unit + pair - unit_writes - pair_writes
    assert f"{writes} writes and {reads} reads a unit" in PAGE
    rates = re.findall(r"^\| ([\d.]+) \| ([\d,]+) \| ([\d,]+) \| \w", PAGE, re.M)
    assert len(rates) == 4
    for seconds, written, read in rates:
        assert number(written) == pytest.approx(1000 * writes / float(seconds), rel=5e-3)
        assert number(read) == pytest.approx(1000 * reads / float(seconds), rel=5e-3)
    limit = 1000 * reads / READS
    assert f"reads reach it at s = {limit:.1f} seconds" in PAGE

    begins = row("a process begins on this complete store")[0]
    assert f"{begins // PAIRS} a pair" in PAGE
    of_all = 1000 * 100 * (begins // PAIRS)
    assert f"{of_all / 1e6:.1f} million requests, {of_all / READS:.0f} s at {READS:,}" in (
        PAGE.replace("\n", " ")
    )
    assert 100 * of_all / READS / 3600 == pytest.approx(11, abs=0.5)
