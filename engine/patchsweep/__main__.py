"""`python -m patchsweep` is the command line."""

import sys

from patchsweep.cli import main

sys.exit(main())
