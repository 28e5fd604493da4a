"""Scores on tasks of our own data: the native model's equal those of lm-evaluation-harness' own reader of the folder."""

import json

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from flagscale_like.errors import DataError
from flagscale_like.recipes.tasks import lines_of, read_task
from tests.commands import run_commands
from tests.families import published

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl, train: colours.jsonl}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "The {{thing}} is"
doc_to_choice: "{{colours}}"
doc_to_target: "{{colours.index(colour)}}"
target_delimiter: " "
num_fewshot: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "The {{thing}} is {{colour}}. The {{thing}} is {{colour}} and not another one of the colours."
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "The {{thing}} is"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["e"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: bleu, aggregation: bleu, higher_is_better: true}]
"""
THINGS = {"sky": "blue", "grass": "green", "snow": "white", "night": "black", "sun": "yellow", "rose": "red"}
COLOURS = sorted(THINGS.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer that begins a text with <s>, and three tasks beside it."""
    out = tmp_path_factory.mktemp("tasks")
    published.make("Llama-2-7b-hf", out)
    records = [{"thing": t, "colour": c, "colours": COLOURS, "written": "anything at all"} for t, c in THINGS.items()]
    (out / "colours.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (out / f"{name}.yaml").write_text(text)
    return out


def test_scores_of_the_native_model_equal_the_harness_own_of_the_export(folder):
    files = [word for name in ("choice", "rolling", "writing") for word in ("--tasks", f"{folder}/{name}.yaml")]
    hf = ["--hf", str(folder / "Llama-2-7b-hf")]
    lines = [
        ["evaluate", *hf, *files, "--micro-batch-size", "4", "--out", "scores.json"],
        ["evaluate", *hf, "--tasks", f"{folder}/choice.yaml", "--shots", "2", "--limit", "3"],
        ["evaluate", *hf, "--tasks", f"{folder}/choice.yaml", "--data", "x"],
        ["evaluate", *hf, "--tasks", f"{folder}/choice.yaml", "--tp", "2"],
        ["evaluate", *hf, "--tasks", "no_such_task"],
    ]
    (outcomes,) = run_commands(lines, folder)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0, 10, 10, 11], outcomes
    assert "task no_such_task: lm-evaluation-harness has none of this name" in outcomes[4].error
    ours = json.loads((folder / "scores.json").read_text())
    tasks = [read_task(folder / f"{name}.yaml") for name in ("choice", "rolling", "writing")]
    reader = HFLM(str(folder / "Llama-2-7b-hf"), dtype="float32", device="cpu", batch_size=1)
    manager = TaskManager(include_defaults=False)
    theirs = simple_evaluate(reader, tasks=tasks, bootstrap_iters=1000, task_manager=manager)["results"]
    numbers = {
        (task, key) for task, found in theirs.items() for key, value in found.items() if isinstance(value, float)
    }
    assert len(numbers) > 5
    for task, key in numbers:
        assert ours[task][key] == pytest.approx(theirs[task][key], rel=1e-5), (task, key)
    assert all(line in outcomes[0].printed for line in lines_of(ours))
    assert f"colours: acc {theirs['colours']['acc,none']:.4f} +- " in outcomes[0].printed


def test_a_task_that_names_code_is_not_run(tmp_path):
    for text, message in (
        ("task: x\ndoc_to_text: !function evil.run\n", r"names code \(!function\), which is not run"),
        ("group: x\n", "is no task of lm-evaluation-harness"),
        ("task: [", "while parsing"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(DataError, match=message):
            read_task(tmp_path / "x.yaml")
