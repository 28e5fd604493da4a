"""Scores on downstream tasks: lm-evaluation-harness asks the native model.

The harness (Gao et al.) has the tasks, their prompts and their metrics. This module answers its three requests: how likely a
continuation is, how likely a whole text is, and what the model writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import DataError
from flagscale_like.figures import fixed
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Sampling

UNLIMITED = 4096  # tokens of a request where the model has no longest sequence


class NativeModel(TemplateLM):
    """A language model on this process, as the harness asks one.

    A text begins as the tokenizer has it (Tokenizer.before_text). A request that is too long loses its beginning.

    Args:
        batch_size: requests of one length that are scored together, and texts that are drawn at a time. Nothing is padded.
    """

    def __init__(self, engine: Engine, words: Tokenizer, *, batch_size: int = 1) -> None:
        super().__init__()
        self.model, self.words, self.batch_size = engine.model.eval(), words, batch_size
        self.own = OwnEngine(engine, rows=batch_size, decode=words.decode)
        self.max_length = self.model.arch.longest_sequence or UNLIMITED
        self._begin = words.decode_one(words.bos) if words.bos is not None else None

    @property
    def eot_token_id(self) -> int:
        return self.words.eod

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.words.eod if self.words.bos is None else self.words.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begins = self._begin is not None and string.startswith(self._begin)
        before = [] if add_special_tokens is False or begins else self.words.before_text
        return before + self.words.encode_batch([string])[0]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each request, the continuation's log-probability in nats, and whether it is the likeliest at every token."""
        rows = [(context + new)[-(self.max_length + 1) :] for _, context, new in requests]
        counts = [min(len(new), self.max_length) for _, _, new in requests]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        while order:
            length = len(rows[order[0]])
            batch = [i for i in order[: self.batch_size] if len(rows[i]) == length]
            order = order[len(batch) :]
            logits = self._logits([rows[i][:-1] for i in batch])  # [b, s, v]
            for i, row in zip(batch, logits, strict=True):
                wanted = torch.tensor(rows[i][-counts[i] :], device=row.device)
                scores = row[-counts[i] :].log_softmax(-1)  # [new tokens, v]
                value = scores.gather(1, wanted[:, None]).sum().item()
                found[i] = (value, bool((scores.argmax(-1) == wanted).all()))
        return found

    def _logits(self, rows: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor(rows, device=next(self.model.parameters()).device)
        return self.model(ids, None, None)[..., : self.model.arch.vocab_size].float()

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            found.append(sum(value for value, _ in parts))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [self._asked(number, *request.args) for number, request in enumerate(requests)]
        found = {rollout.prompt: rollout.ids for rollout in self.own.generate_each(asked)}
        return [
            postprocess_generated_text(
                self.words.decode(found[number]), stop=list(sampling.stop_strings), think_end_token=None
            )
            for number, (_, sampling) in enumerate(asked)
        ]

    def _asked(self, number: int, context: str, options: dict[str, Any]) -> tuple[Prompt, Sampling]:
        options = {**normalize_gen_kwargs(options)}
        stop, most = handle_stop_sequences(options.get("until"), eos=None), int(options["max_gen_toks"])
        if most >= self.max_length:
            raise DataError(f"the task asks for {most} new tokens, the model takes {self.max_length} in all")
        sampling = Sampling(
            most,
            temperature=float(options.get("temperature", 0.0)),
            top_p=float(options.get("top_p", 1.0)),
            stop=(self.words.eod,),
            stop_strings=tuple(word for word in stop if word),
        )
        return Prompt(self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id], number), sampling


def read_task(path: Path) -> dict[str, Any]:
    """A task in a YAML file of the harness's form. Its data files are found from the file's folder.

    Raises:
        DataError: it cannot be read, or names code (!function), which is not run.
    """
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        code = "!function" in str(error)
        reason = "names code (!function), which is not run" if code else str(error).splitlines()[0]
        raise DataError(f"{path}: {reason}") from None
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise DataError(f"{path}: is no task of lm-evaluation-harness: it has no `task`, its name")
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    if files is not None:
        task["dataset_kwargs"]["data_files"] = _beside(files, path.parent)
    return task


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _beside(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    return files if "://" in str(files) else str(folder.absolute() / str(files))


def score_tasks(
    engine: Engine,
    words: Tokenizer,
    tasks: Sequence[str],
    *,
    batch_size: int = 1,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks.

    Args:
        tasks: names of the harness, whose data it fetches from the Hugging Face hub, or paths of YAML files.
        shots: examples before each question; None for the task's own number.
        limit: questions of each task, from the first on; None for all.

    Returns:
        the harness's numbers by task: "acc,none" and "acc_stderr,none", for example.

    Raises:
        DataError: a task is not known, or its file or its data cannot be read.
    """
    named = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_defaults=bool(named))  # reads thousands of files
    unknown = [task for task in named if not manager.match_tasks([task])]
    if unknown:
        raise DataError(
            f"task {unknown[0]}: lm-evaluation-harness has none of this name: give one that `lm_eval ls tasks` lists, or a "
            "YAML file"
        )
    chosen = [*named, *(read_task(Path(task)) for task in tasks if task not in named)]
    try:
        found = simple_evaluate(
            NativeModel(engine, words, batch_size=batch_size),
            tasks=chosen,
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"tasks {', '.join(tasks)}: {' '.join(str(error).split())[:300]}") from error
    return json.loads(json.dumps(found["results"], default=str))


def lines_of(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each number of each task, with its standard error where there is one."""
    lines = []
    for task, numbers in results.items():
        for key, value in numbers.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            spread = f" +- {fixed(error)}" if isinstance(error, float) else ""
            lines.append(f"{task}: {metric}{'' if kind == 'none' else f' ({kind})'} {fixed(value)}{spread}")
    return lines
