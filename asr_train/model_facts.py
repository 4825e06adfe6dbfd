"""What a recipe's model says before it is built, for programs without transformers: values on stdin, JSON on stdout.

`python -m asr_train.model_facts` reads a recipe's plain values as JSON and prints `{"config": ...}`, the transformers
config that a training of it would begin with, or `{"problem": ...}`. Nothing is fetched where HF_HUB_OFFLINE is set.
"""

import json
import sys
from typing import Any

from asr_train.errors import ModelError
from asr_train.model_config import load_model_config
from asr_train.recipe import decode_recipe


def main() -> int:
    """Answer one question."""
    recipe = decode_recipe(json.load(sys.stdin))
    try:
        answer: dict[str, Any] = {"config": load_model_config(recipe.model, recipe.trust_remote_code).to_dict()}
    except ModelError as error:
        answer = {"problem": str(error)}
    json.dump(answer, sys.stdout, default=str)
    return 0


if __name__ == "__main__":
    sys.exit(main())
