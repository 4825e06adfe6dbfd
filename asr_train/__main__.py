"""`python -m asr_train RECIPE [key=value ...]` trains; `accelerate launch -m asr_train RECIPE` does on many GPUs."""

import sys

from asr_train.errors import run_main
from asr_train.train import main

if __name__ == "__main__":
    sys.exit(run_main(main))
