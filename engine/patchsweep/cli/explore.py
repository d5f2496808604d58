"""`patchsweep explore`: serves a page on this machine that sweeps two typed prompts."""

from __future__ import annotations

from importlib.util import find_spec

from patchsweep.cli import parsers
from patchsweep.errors import ConfigError

_NEEDED = ("starlette", "uvicorn")


def main(arguments: list[str]) -> int:
    """Serve until interrupted; return 0."""
    options = parsers.explore(arguments)
    lacking = [name for name in _NEEDED if find_spec(name) is None]
    if lacking:
        raise ConfigError(
            f'explore needs {" and ".join(lacking)}, an extra: pip install "patchsweep[explore]"'
        )
    from transformers.utils import logging as transformers_logging

    from patchsweep.cli.console import stdout
    from patchsweep.explorer.serve import serve
    from patchsweep.models import load_model

    console = stdout()
    transformers_logging.disable_progress_bar()
    console.print(f"loading {options.model}")
    model = load_model(options.model)
    serve(model, options.model, options.port, lambda url: console.print(f"open {url}"))
    return 0
