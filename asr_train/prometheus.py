"""A training's latest figures as a text file that Prometheus' node exporter collects (its `textfile` collector)."""

import re
from collections.abc import Mapping
from pathlib import Path

from asr_train.errors import RecipeError


def check_prometheus() -> None:
    """Refuse a recipe that wants the file where the library is missing.

    Raises:
        RecipeError: prometheus-client is not installed.
    """
    try:
        import prometheus_client  # noqa: F401, PLC0415  an extra
    except ImportError:
        raise RecipeError("log.prometheus: needs prometheus-client: pip install 'wavefleet[trackers]'") from None


def write_prometheus(path: str, run: str, values: Mapping[str, float]) -> None:
    """Write gauges `wavefleet_<name>{run="..."}`, in one rename, so that a collector never reads half of them."""
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile  # noqa: PLC0415  an extra

    registry = CollectorRegistry()
    for name, value in values.items():
        gauge = Gauge(
            f"wavefleet_{re.sub('[^a-z0-9_]', '_', name)}", f"{name} of a training", ["run"], registry=registry
        )
        gauge.labels(run).set(value)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_to_textfile(path, registry)
