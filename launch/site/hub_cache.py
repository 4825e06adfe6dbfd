"""A profile's cache filled from the hub where there is internet, for jobs that read from it alone."""

import os
import sys
from collections.abc import Sequence

from asr_train.config import Recipe
from asr_train.errors import EXIT_DONE, RunError
from asr_train.recipe import on_hub
from launch.child import run_child
from launch.site.cluster import environment
from launch.site.cluster_config import Cluster


def fill(arguments: Sequence[str], recipe: Recipe, cluster: Cluster) -> None:
    """Fill the profile's cache with what a recipe names on the hub.

    Args:
        arguments: the recipe's file and `key=value` changes.
        recipe: what that is.
        cluster: the profile; nothing is done where it has no cache.

    Raises:
        RunError: it could not be had.
    """
    if cluster.cache is None or not any(on_hub(recipe)):
        return
    command = [sys.executable, "-m", "asr_train.fetch", *arguments]
    if run_child(command, env=online(cluster)).exit_code != EXIT_DONE:
        raise RunError(f"{cluster.cache} could not be filled, and jobs read from nowhere else; see above")


def online(cluster: Cluster) -> dict[str, str]:
    """The environment of a program that uses the profile's cache here, where there is internet."""
    return {**os.environ, **{name: value for name, value in environment(cluster).items() if name != "HF_HUB_OFFLINE"}}
