"""`patchsweep explore`: serves a page on this machine that sweeps two typed prompts."""

from __future__ import annotations

from importlib.util import find_spec

from patchsweep.cli.parser import Parser, at_least
from patchsweep.errors import ConfigError

_NEEDED = ("starlette", "uvicorn")


def main(arguments: list[str]) -> int:
    """Serve until interrupted; return 0."""
    parser = Parser(
        "patchsweep explore",
        description="One page in the browser, served on this machine alone: type two prompts and "
        "their answers, choose sites, and see the maps fill in; click a cell for its lens, its "
        "attention and its edges. Ctrl-C ends it.",
    )
    parser.add_argument("--model", default="smollm2-135m", help="as load_model takes it")
    parser.add_argument("--port", type=at_least(0), default=0, help="of this machine (a free one)")
    options = parser.parse_args(arguments)
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
