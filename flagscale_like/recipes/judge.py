"""Pairs of answers in a file, judged: what `data judge` does. The result is what `data pairs` reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml
from pydantic import TypeAdapter, ValidationError

from flagscale_like.config import JudgeReward, Mixture, ModelReward, Reward
from flagscale_like.data.chat import BadConversationError, check_messages
from flagscale_like.errors import ConfigError, DataError
from flagscale_like.json_files import BAD_JSON, lines_of, replace_file
from flagscale_like.recipes.reinforce import open_generator
from flagscale_like.recipes.rounds import verdicts
from flagscale_like.rl.answers import Answer
from flagscale_like.rl.growing_file import GrowingFile
from flagscale_like.rl.rewards import Surroundings, build_reward, open_judge
from flagscale_like.rl.rewards.judge import Judge, Verdict
from flagscale_like.rl.rounds import PART
from flagscale_like.runtime.parallel import ParallelContext

KEYS = ("prompt", "first", "second")


@dataclass(frozen=True)
class Candidate:
    """A line: two answers to one prompt."""

    record: dict[str, Any]
    pair: tuple[Answer, Answer]


def read_reward(path: Path) -> Reward:
    """The reward, or judge, that a YAML file describes by the keys of rl.reward.

    Raises:
        ConfigError: it cannot be read, or is none; or it is a reward model, which reads tokens and not texts.
    """
    try:
        found = TypeAdapter(Reward).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    sources = found.sources if isinstance(found, Mixture) else (found,)
    if any(isinstance(source, ModelReward) and source.tokenizer != "text" for source in sources):
        raise ConfigError(f"{path}: a reward model reads texts here: give it tokenizer: text")
    return found


def read_candidates(path: Path) -> list[Candidate]:
    """The pairs of a file of JSON lines: `prompt`, a text or messages; `first` and `second`, texts; other keys are fields.

    Raises:
        DataError: the file cannot be read, or a line is no pair.
    """
    try:
        lines = lines_of(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_candidate(json.loads(line)))
            except (*BAD_JSON, BadConversationError) as error:
                raise DataError(f"{path}:{number}: {error}") from None
    if not found:
        raise DataError(f"{path}: holds no pair")
    return found


def _candidate(record: Any) -> Candidate:
    if not isinstance(record, dict) or any(record.get(key) is None for key in KEYS):
        raise ValueError("is no object with prompt, first and second")
    prompt, fields = record["prompt"], {key: value for key, value in record.items() if key not in KEYS}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages(prompt)
    for side in KEYS[1:]:
        if not isinstance(record[side], str):
            raise ValueError(f"{side} is {type(record[side]).__name__}, not a text")
    text = prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in messages)
    first, second = (Answer(text, record[side], fields, finish="stop", messages=messages) for side in KEYS[1:])
    return Candidate(record, (first, second))


def judge_file(path: Path, options: Reward, out: Path, ctx: ParallelContext, say: Callable[[str], None]) -> None:
    """Judge the pairs of a file, and write the decided ones as `data pairs` reads them. In one process.

    What was judged is kept part by part in OUT.verdicts.part, so that a command that was interrupted goes on.

    Raises:
        DataError: see read_candidates() and the judges; or `out` is there.
    """
    if out.exists():
        raise DataError(f"{out}: exists: choose another file or remove it")
    candidates = read_candidates(path)
    around = Surroundings(
        ctx,
        seq_length=4096,
        tokenizer=None,
        open_engine=lambda judge: open_generator(Path(judge.path or ""), ctx, precision="fp32"),
        say=say,
    )
    judge = open_judge(options, around) if isinstance(options, JudgeReward) else build_reward(options, around)
    file = GrowingFile(out.with_name(out.name + ".verdicts"), PART)
    marks = [_mark(candidate.record, options) for candidate in candidates]
    done = file.begin() * PART
    if [record.get("of") for record in file.records()] != marks[: len(file.records())]:
        raise DataError(
            f"{file.path}.part: holds verdicts on other pairs or of another judge: remove it to begin again"
        )
    for begin in range(done, len(candidates), PART):
        part = candidates[begin : begin + PART]
        found = verdicts(judge, [candidate.pair for candidate in part])
        of = marks[begin : begin + PART]
        file.add([{"verdict": verdict.value, "of": mark} for verdict, mark in zip(found, of, strict=True)])
    file.finish()
    decided = [Verdict(record["verdict"]) for record in file.records()]
    lines = [
        json.dumps(_judged(candidate.record, verdict), ensure_ascii=False) + "\n"
        for candidate, verdict in zip(candidates, decided, strict=True)
        if verdict in (Verdict.FIRST, Verdict.SECOND)
    ]
    replace_file(out, "".join(lines).encode("utf-8"))
    file.path.unlink()
    counts = ", ".join(f"{verdict.value} {decided.count(verdict):,}" for verdict in Verdict)
    say(f"{len(candidates):,} pairs: {counts}" + (f"; {judge.counts}" if isinstance(judge, Judge) else ""))
    say(f"wrote {len(lines):,} pairs to {out}; ties and what was not parsed are left out")


def _mark(record: dict[str, Any], options: Reward) -> str:
    """What a verdict is about, and whose it is."""
    return xxhash.xxh3_64_hexdigest((json.dumps(record, sort_keys=True) + options.model_dump_json()).encode())


def _judged(record: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    chosen, rejected = ("first", "second") if verdict is Verdict.FIRST else ("second", "first")
    rest = {key: value for key, value in record.items() if key not in ("first", "second")}
    if isinstance(record["prompt"], str):
        return rest | {"chosen": record[chosen], "rejected": record[rejected]}
    sides = {
        name: [{"role": "assistant", "content": record[key]}]
        for name, key in (("chosen", chosen), ("rejected", rejected))
    }
    return rest | sides
