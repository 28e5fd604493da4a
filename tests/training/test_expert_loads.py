"""The load of the experts: what a run reports of it, and that a resumed run reports the same."""

import json

import pytest

from flagscale_like.json_files import read_records
from flagscale_like.training.metrics import read_metrics
from flagscale_like.training.report import read_story
from tests import faults
from tests.harness import run_ranks, tiny_config

EXPERTS = {"count": 4, "top_k": 2, "ffn_hidden_size": 48, "score": "sigmoid", "bias_rate": 0.003, "dense_layers": 1}


def loads(run_dir):
    return [
        {name: value for name, value in record.items() if name.startswith("experts/")} | {"step": record["step"]}
        for record in read_metrics(run_dir)
        if "experts/entropy" in record
    ]


@pytest.mark.parametrize("layout", [{"pp": 2}, {"tp": 2, "sp": True, "ep": 2}], ids=["pp2", "tp2 sp ep2"])
def test_a_run_reports_its_experts_load_and_a_resumed_run_the_same(layout, tmp_path):
    changes = {"model__experts": EXPERTS, "monitors__experts": {"interval": 3, "dead": 0.95}, "parallel": layout}
    whole, parted = (tiny_config(tmp_path / name, train__steps=6, **changes) for name in ("whole", "parted"))
    run_ranks(2, faults.train_run, whole)
    run_ranks(
        2, faults.train_run, parted.model_copy(update={"train": parted.train.model_copy(update={"exit_at_step": 4})})
    )
    run_ranks(2, faults.train_run, parted)
    found = loads(whole.run_dir)
    assert found == loads(parted.run_dir)
    assert [record["step"] for record in found] == [3, 6]
    for record in found:
        for layer in (1, 2, 3):
            tokens = record[f"experts/tokens/layers.{layer}"]
            assert sum(tokens) == 3 * 8 * 32 * 2  # steps, rows, tokens of a row, top_k
            assert record[f"experts/largest-load/layers.{layer}"] == pytest.approx(4 * max(tokens) / sum(tokens))
            assert 1.0 < record[f"experts/entropy/layers.{layer}"] < 1.3863  # log 4
            assert 0 < record[f"experts/bias-range/layers.{layer}"] <= 0.0361
        assert "experts/tokens/layers.0" not in record  # a dense layer
        of_layers = [record[f"experts/tokens/layers.{layer}"] for layer in (1, 2, 3)]
        assert record["experts/dead"] == sum(4 * n / sum(one) < 0.95 for one in of_layers for n in one)
    events = read_records(tmp_path / "whole" / "events.jsonl")
    assert {event["kind"] for event in events} <= {f"experts/dead/layers.{layer}" for layer in (1, 2, 3)}
    assert "of 4 experts got less than 0.95 of an even share of the last 3 steps' tokens" in events[0]["message"]
    assert [json.dumps(e | {"time": 0}) for e in events] == [
        json.dumps(e | {"time": 0}) for e in read_records(tmp_path / "parted" / "events.jsonl")
    ]
    charts = dict(read_story(tmp_path / "whole").charts)
    assert {"experts/largest-load", "experts/entropy"} <= charts.keys()
