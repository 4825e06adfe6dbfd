"""The text file for Prometheus' node exporter."""

import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from asr_train.errors import RecipeError
from asr_train.prometheus import check_prometheus, write_prometheus


def test_the_file_has_a_gauge_for_each_figure_named_after_the_run(tmp_path):
    path = tmp_path / "collector" / "wavefleet.prom"
    write_prometheus(str(path), "minds14", {"step": 10, "loss": 2.5, "ledger/compute": 0.75})
    write_prometheus(str(path), "minds14", {"step": 20, "loss": 1.5, "ledger/compute": 0.8})
    found = {}
    for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
        for sample in family.samples:
            assert (family.type, sample.labels) == ("gauge", {"run": "minds14"})
            found[sample.name] = sample.value
    assert found == {"wavefleet_step": 20, "wavefleet_loss": 1.5, "wavefleet_ledger_compute": 0.8}
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_library_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(
        RecipeError, match=r"log.prometheus: needs prometheus-client: pip install 'wavefleet\[trackers\]'"
    ):
        check_prometheus()
