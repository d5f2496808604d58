"""Which runner a sweep gets, and the self-test that tells."""

from patchsweep.selection.choose import TOLERANCE, Choice, RunnerName, choose_runner

__all__ = ["TOLERANCE", "Choice", "RunnerName", "choose_runner"]
