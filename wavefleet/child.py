"""`python -m wavefleet.child VERB ...`: the command, as a child that saves and stops when its parent is gone."""

import ctypes
import os
import signal
import sys
from typing import Final

from asr_train.stop import PR_SET_PDEATHSIG
from launch.cli import main

PARENT: Final = "WAVEFLEET_PARENT"  # in the environment: process number of who started us

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.environ.get(PARENT, "") not in ("", str(os.getppid())):  # it died before we asked
            sys.exit(128 + signal.SIGTERM)
    sys.exit(main())
