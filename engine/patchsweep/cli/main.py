"""Dispatches to a verb; reports a user's mistake in one line and returns an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

# exit codes for scripts; `status` and `verify` add 3 and 4
EXIT_DONE = 0
EXIT_FAILED = 1  # an internal error, with a traceback
EXIT_MISTAKE = 2  # a mistake in the command, or in a file or model that it names
EXIT_STOPPED = 75  # stopped by a signal; `run` keeps finished units, the same command resumes

# verb -> what it does; each is a module of this package with `main(arguments) -> exit code`
VERBS = {
    "run": "run a sweep and write its values to a store; the same command again goes on",
    "plan": "say what a run will cost, without running it",
    "status": "how far the run of a store has come",
    "verify": "check a store: its files, and a sample of its values run again",
    "edges": "score every edge between components, run the foremost exactly, store both",
    "circuit": "grow circuits from node or edge scores, run each without the rest; store it",
    "acdc": "prune edges one by one while the metric stays; store what is left",
    "multiverse": "measure a circuit's faithfulness in every way there is; store the range",
    "lens": "what the model would say at each layer, of a patched run too; store it",
    "trace": "noise a subject, restore states one by one: where a fact passes; store it",
    "latents": "patch every latent of sparse autoencoders or transcoders; store the effects",
    "attention": "rank heads by attention attribution, store their patterns and predictions",
    "heads": "ablate every head in several ways, class the heads, compare the ways; store it",
    "explore": "serve a page on this machine: two typed prompts, their maps, a click on a cell",
    "compare": "how far the attribution in a store agrees with its exact effects",
    "report": "write a store as one self-contained HTML page",
    "task": "list the built-in tasks, or score a model on one",
    "demo": "sweep a real model, check the values against a TransformerLens loop, write a report",
}
RESUMABLE = (
    "run", "edges", "circuit", "acdc", "multiverse", "lens", "trace", "latents", "attention",
    "heads",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_DONE if words else EXIT_MISTAKE
    verb, *rest = words
    if verb == "--version":
        print(f"patchsweep {version('patchsweep')}")
        return EXIT_DONE
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        print(
            f"patchsweep: {verb!r} is no verb; {meant}use one of {', '.join(VERBS)}",
            file=sys.stderr,
        )
        return EXIT_MISTAKE
    if os.environ.get("PATCHSWEEP_DEBUG"):
        from patchsweep.cli.early import refuse

        refuse(verb, rest)
        return int(import_module(f"patchsweep.cli.{verb}").main(rest))
    return _guarded(verb, rest)


def usage() -> str:
    """Return the usage text with all verbs."""
    lines = "\n".join(f"  {verb:12}{what}" for verb, what in VERBS.items())
    return (
        f"usage: patchsweep VERB ...\n\n{lines}\n\n"
        "patchsweep VERB --help says more; patchsweep --version says the version."
    )


def _guarded(verb: str, rest: list[str]) -> int:
    from patchsweep.cli.early import refuse
    from patchsweep.cli.stop import GOES_ON, Stopped
    from patchsweep.store.backends.credentials import scrub

    try:
        refuse(verb, rest)
        return int(import_module(f"patchsweep.cli.{verb}").main(rest))
    except Stopped as stopped:
        print(f"patchsweep: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        then = f"; {GOES_ON}" if verb in RESUMABLE else ""
        print(f"patchsweep: interrupted{then}", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        from patchsweep.cli.mistakes import one_line  # a local import: only errors need it

        text = one_line(error)
        if text is None:
            print(scrub(traceback.format_exc()), file=sys.stderr, end="")
            return EXIT_FAILED
        print(f"patchsweep: {text}", file=sys.stderr)
        return EXIT_MISTAKE
