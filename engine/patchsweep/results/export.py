"""Results as files and tables for other tools: a DataFrame, Parquet, netCDF."""

from __future__ import annotations

from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

from patchsweep.arguments import user_path
from patchsweep.errors import ConfigError
from patchsweep.results import accessor as summary

if TYPE_CHECKING:
    import pandas as pd


def to_dataframe(ds: xr.Dataset, site: str | None = None) -> pd.DataFrame:
    """Return one row per cell that has run, with columns for its place and its numbers.

    `site` is a variable of exact values or estimates; default: all. Columns: `site`, `metric`,
    `pair`, those of `layer`, `pos`, `head`, `kv_head` and `neuron` that there are, tokens and
    answers, and `value` (the patched metric), `effect` and `recovered`. The run's attributes are in
    `.attrs`.

    Raises:
        SiteError: `site` is not in the Dataset.
    """
    import pandas as pd

    names = (*summary.sites(ds), *summary.estimates(ds)) if site is None else (site,)
    frames = []
    for name in names:
        numbers = {
            "value": summary.value(ds, name),
            "effect": summary.effect(ds, name),
            "recovered": summary.recovered(ds, name),
        }
        frame = xr.Dataset(numbers).to_dataframe().reset_index()
        frame.insert(0, "site", name)
        frames.append(frame[frame["value"].notna()])
    table = pd.concat(frames, ignore_index=True)
    last = ["value", "effect", "recovered"]
    table = table[[c for c in table.columns if c not in last] + last]
    table.attrs = dict(ds.attrs)
    return table


def to_parquet(ds: xr.Dataset, path: str | PathLike[str], site: str | None = None) -> Path:
    """Write `to_dataframe` to a Parquet file and return its path; pandas reads it, attributes too.

    Raises:
        SiteError: `site` is not in the Dataset.
        ConfigError: pyarrow is not installed, or the file cannot be written.
    """
    if find_spec("pyarrow") is None:
        raise ConfigError("Parquet needs the package pyarrow; pip install 'patchsweep[data]'")
    out = _file(path)
    table = to_dataframe(ds, site)
    try:
        table.to_parquet(out, index=False)
    except OSError as error:
        raise _unwritable(out, error) from error
    return out


def to_netcdf(ds: xr.Dataset, path: str | PathLike[str]) -> Path:
    """Write all of `ds` to a netCDF file and return its path; `xarray.open_dataset` reads it.

    netCDF 4 if h5netcdf or netCDF4 is installed, else netCDF 3.

    Raises:
        ConfigError: the file cannot be written.
    """
    out = _file(path)
    engines = {"h5netcdf": "h5netcdf", "netCDF4": "netcdf4"}
    engine = next((name for package, name in engines.items() if find_spec(package)), "scipy")
    try:
        ds.load().drop_encoding().to_netcdf(out, engine=engine)  # type: ignore[call-overload]
    except OSError as error:
        raise _unwritable(out, error) from error
    return out


def _file(path: str | PathLike[str]) -> Path:
    if not isinstance(path, str | PathLike) or user_path(Path(path)).is_dir():
        raise ConfigError(f"path={path!r} must be a file, such as 'effects.parquet'")
    return user_path(Path(path))


def _unwritable(out: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{str(out)!r} cannot be written ({error.strerror}); give another file")
