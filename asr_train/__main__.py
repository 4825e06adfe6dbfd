"""`python -m asr_train RECIPE [key=value ...]` trains; `accelerate launch -m asr_train RECIPE` does on many GPUs."""

import contextlib
import os
import sys

from asr_train.errors import run_main
from asr_train.train import main

if __name__ == "__main__":
    code = run_main(main)
    with contextlib.suppress(ValueError, OSError):  # closed: nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    # All is written by now. Taking the process groups down can hang: in torch 2.13 DDP's reducer holds the interpreter
    # while it waits for gloo's thread, which may be waiting for the interpreter.
    os._exit(code)
