"""The wheel, installed outside the repository, runs by its own command line and needs no Triton."""

from __future__ import annotations

import base64
import gzip
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOREIGN = "raise ImportError('Triton is not here')\n"


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """The output of a command that succeeds, in an environment without this repository."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("patchsweep-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel. Its dependencies are lent by this one, by a .pth file:
    without the editable patchsweep, and with a Triton that cannot be imported."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    lent = Path(sysconfig.get_path("purelib"))
    # a plain path line: the lender's own .pth files, the editable install among them, stay unread
    (site / "lent.pth").write_text(f"{lent}\n")
    (site / "triton").mkdir()
    (site / "triton" / "__init__.py").write_text(FOREIGN)
    return folder / "venv"


def test_dependencies_have_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(">=" in requirement for requirement in project["dependencies"])
    assert not any("triton" in requirement for requirement in project["dependencies"])


def test_constraints_are_what_is_installed_here() -> None:
    from importlib.metadata import PackageNotFoundError, version

    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#") or not line:
            continue
        name, _, pinned = line.partition("==")
        try:
            assert version(name).partition("+")[0] == pinned, line
        except PackageNotFoundError:
            continue  # an extra that is not installed


@pytest.mark.slow
def test_wheel_carries_configs_report_and_kernels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"patchsweep/conf/{path.relative_to(ROOT / 'conf')}" in names
    for name in (
        "patchsweep/py.typed",
        "patchsweep/report/plotly-cartesian.min.js.gz",
        "patchsweep/explorer/explorer.css",
        "patchsweep/explorer/explorer.js",
        "patchsweep/report/maps.js",
        "patchsweep/report/report.js",
        "patchsweep/report/style.css",
        "patchsweep/report/unpack.js",
    ):
        assert name in names
    assert any(name.startswith("patchsweep_kernels/") for name in names)
    assert not any(name.startswith(("tests/", "conf/", "engine/")) for name in names)


@pytest.mark.slow
def test_wheel_imports_without_triton(environment: Path, tmp_path: Path) -> None:
    code = (
        "import patchsweep, patchsweep_kernels, sys\n"
        "assert 'triton' not in sys.modules\n"
        "print(patchsweep.__file__)\n"
        "try:\n"
        "    import triton\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    where, error = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(environment), "patchsweep must come from the wheel"
    assert error == "Triton is not here"


@pytest.mark.slow
def test_wheel_runs_the_demo_sweep_by_its_command_line(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin" / "patchsweep"
    run(command, "run", "model=tiny", "task=ioi_demo", "sites=demo", "store=a.zarr", cwd=tmp_path)
    assert "sound and complete" in run(command, "verify", "a.zarr", cwd=tmp_path)
    assert "complete" in run(command, "status", "a.zarr", cwd=tmp_path)
    run(command, "report", "a.zarr", cwd=tmp_path)
    plotly = (ROOT / "engine/patchsweep/report/plotly-cartesian.min.js.gz").read_bytes()
    page = (tmp_path / "report.html").read_text()
    packed = re.findall(r'data-script="gzip">([^<]+)<', page)
    scripts = [gzip.decompress(base64.b64decode(script)) for script in packed]
    assert gzip.decompress(plotly) in scripts, "the page draws without a network"
    assert "All is well" in run(command, "demo", "--model", "tiny:gpt2", cwd=tmp_path)


@pytest.mark.slow
def test_store_opens_where_patchsweep_is_not_installed(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin" / "patchsweep"
    run(command, "run", "model=tiny", "task=ioi_demo", "sites=demo", "store=a.zarr", cwd=tmp_path)
    code = (
        "import sys; sys.modules['patchsweep'] = None\n"
        "import xarray\n"
        "ds = xarray.open_zarr('a.zarr', consolidated=False)\n"
        "print(ds['z'].dims, [*ds['base_token'].values[0]])\n"
    )
    out = run(environment / "bin" / "python", "-c", code, cwd=tmp_path)
    assert "('metric', 'pair', 'layer', 'pos', 'head')" in out
    assert "' Mary'" in out
