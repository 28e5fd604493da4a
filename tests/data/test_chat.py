"""Conversations: every form of a record, which tokens count with any chat template, and what is refused by file and line."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from flagscale_like.checkpoint.hf import generation_settings
from flagscale_like.data.chat import (
    BadConversationError,
    ChatTokenizer,
    NothingCountsError,
    check_messages,
    copy_with_template,
    parse_record,
    read_template,
)
from flagscale_like.data.conversations import conversations_at, mask_of
from flagscale_like.data.index_file import read_lengths
from flagscale_like.data.inspect import describe_index
from flagscale_like.data.preprocess import preprocess, preprocess_chat
from flagscale_like.data.shards import ChatOptions
from flagscale_like.data.table import DocumentTable
from flagscale_like.data.tokenizer import Tokenizer
from flagscale_like.errors import DataError
from tests.commands import invoke
from tests.data.chats import CHAT, CHATML, FORGETS, MARKED, TOOLS, make_tokenizer, write_chats
from tests.harness import REPOSITORY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tok")


def counted(chat: ChatTokenizer, messages, tools=None) -> list[str]:
    """The texts of consecutive tokens that count."""
    encoded = chat.encode(check_messages(messages), tools)
    edges = np.flatnonzero(np.diff(np.r_[0, encoded.weights != 0, 0]))
    return [
        chat.tokenizer.decode(encoded.ids[start:stop].tolist(), special=True)
        for start, stop in zip(edges[::2], edges[1::2], strict=True)
    ]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "by marks"])
def test_the_tokens_that_count_are_those_of_transformers_on_a_marked_template(folder, template):
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    found = ChatTokenizer(folder, template).encode(check_messages(CHAT))
    assert found.ids.tolist() == theirs["input_ids"]
    assert found.weights.tolist() == theirs["assistant_masks"]
    assert counted(ChatTokenizer(folder, template), CHAT) == ["It is four. 三<|im_end|>", "Five.<|im_end|>"]


def test_weights_of_messages_go_to_their_tokens(folder):
    messages = [*CHAT[:2], {**CHAT[2], "weight": 0}, CHAT[3], {**CHAT[4], "weight": 0.5}]
    for template in (CHATML, MARKED):
        found = ChatTokenizer(folder, template).encode(check_messages(messages))
        assert set(found.weights.tolist()) == {0.0, 0.5}
        assert counted(ChatTokenizer(folder, template), messages) == ["Five.<|im_end|>"]
    assert counted(ChatTokenizer(folder, CHATML, train="last"), CHAT) == ["Five.<|im_end|>"]
    assert counted(ChatTokenizer(folder, MARKED, train="last"), CHAT) == ["Five.<|im_end|>"]


def test_a_template_that_forgets_is_refused_unless_only_the_last_answer_counts(folder):
    with pytest.raises(
        BadConversationError, match=r"message 3: .* renders this answer differently once other messages"
    ):
        ChatTokenizer(folder, FORGETS).encode(CHAT)
    last = ChatTokenizer(folder, FORGETS, train="last")
    assert counted(last, CHAT) == ["Five.<|im_end|>"]  # neither the generation prompt nor an empty thought
    thinks = [*CHAT[:4], {**CHAT[4], "reasoning": "two and three"}]
    assert counted(last, thinks) == ["<think>\ntwo and three\n</think>\n\nFive.<|im_end|>"]


def test_tools_and_what_they_say_go_through_the_template(folder):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    record = {
        "messages": [
            CHAT[1],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            CHAT[2],
        ],
        "tools": json.dumps([{"name": "add"}]),
    }
    found, chat = parse_record(json.dumps(record)), ChatTokenizer(folder, TOOLS)
    assert counted(chat, found.messages, found.tools) == [
        '<call>{"name": "add", "arguments": {"a": 2}}<|im_end|>',
        "It is four. 三<|im_end|>",
    ]
    assert '[{"name": "add"}]' in chat.text(found.messages, found.tools)


def test_every_form_of_a_record_is_read_by_its_keys():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    forms = [
        {"messages": turns, "id": 3},
        {"prompt": "q", "completion": "a"},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [turns[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    ]
    for form in forms:
        assert parse_record(json.dumps(form)).messages == turns
    share = {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert parse_record(json.dumps(share)).messages == [{"role": "system", "content": "s"}, *turns]
    earlier = parse_record(json.dumps({"prompt": turns + turns[:1], "completion": turns[1:]})).messages
    assert [m.get("weight") for m in earlier] == [None, 0.0, None, None]


BAD = {
    "truncated": ('{"messages": [{"role": "user", "con', "no JSON"),
    "other keys": ('{"instruction": "q"}', "has the keys instruction: give one of messages"),
    "two forms": ('{"messages": [], "prompt": "q"}', "has messages and prompt"),
    "no object": ("[1]", "is list, not an object"),
    "unknown role": ('{"messages": [{"role": "bot", "content": "q"}]}', "message 1: unknown role 'bot': give system"),
    "unknown speaker": ('{"conversations": [{"from": "bing", "value": "q"}]}', "message 1: unknown role 'bing'"),
    "number": ('{"messages": [{"role": "user", "content": 3}]}', "message 1: the content is int, not text"),
    "image": ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "parts that are not text"),
    "weight": ('{"messages": [{"role": "assistant", "content": "a", "weight": -1}]}', "message 1: weight is -1"),
    "user weight": ('{"messages": [{"role": "user", "content": "a", "weight": 1}]}', "only an assistant's counts"),
    "no completion": ('{"prompt": "q"}', "prompt and completion are str and NoneType"),
    "tools": ('{"messages": [{"role": "user", "content": "q"}], "tools": "{"}', "tools is text, but no JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_record_that_is_no_conversation_is_refused_with_the_reason(name):
    line, reason = BAD[name]
    with pytest.raises(BadConversationError) as error:
        parse_record(line)
    assert reason in str(error.value)


def test_a_conversation_without_a_counted_token_is_refused(folder):
    chat = ChatTokenizer(folder)
    with pytest.raises(NothingCountsError, match="has no assistant's message"):
        chat.encode(CHAT[:2])
    with pytest.raises(NothingCountsError, match="no token counts"):
        chat.encode([CHAT[1], {**CHAT[2], "weight": 0}])
    with pytest.raises(BadConversationError, match="the chat template refuses it: no users here"):
        ChatTokenizer(folder, "{{ raise_exception('no users here') }}").encode(CHAT)
    with pytest.raises(DataError, match="the chat template is not valid Jinja, line 1"):
        ChatTokenizer(folder, "{% for %}")
    with pytest.raises(DataError, match="has no chat template: give one with --template FILE"):
        ChatTokenizer(make_tokenizer(folder.parent / "bare", None))


def options(folder, **changes):
    return replace(ChatOptions(read_template(folder) or ""), **changes)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_of_conversations_becomes_tokens_weights_and_a_table(folder, tmp_path, workers):
    source = write_chats(tmp_path / "chats.jsonl", 60)
    report, own = preprocess_chat(
        [source], folder, tmp_path / "chats", options(folder), workers=workers, shard_bytes=2000
    )
    chat, lines = ChatTokenizer(folder), source.read_text().splitlines()
    ids, masks = IndexedDataset(str(tmp_path / "chats")), IndexedDataset(mask_of(tmp_path / "chats"))
    table = DocumentTable(tmp_path / "chats")
    for number, line in enumerate(lines):
        expected = chat.encode(parse_record(line).messages)
        assert ids.get(number).tolist() == expected.ids.tolist()
        assert masks.get(number).tolist() == expected.weights.tolist()
        assert table.place(number) == (str(source), number + 1)
    assert masks.get(0).dtype == np.uint8
    assert (report.documents, own) == (60, folder)
    assert conversations_at(tmp_path / "chats").counted == sum(int(masks.get(n).sum()) for n in range(60))
    assert not list(tmp_path.glob("*.shards"))


def test_fractions_are_kept_as_floats(folder, tmp_path):
    source = tmp_path / "x.jsonl"
    lines = [{"messages": CHAT}, {"messages": [CHAT[1], {**CHAT[2], "weight": 0.25}]}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    preprocess_chat([source], folder, tmp_path / "x", options(folder))
    masks = IndexedDataset(mask_of(tmp_path / "x"))
    assert [set(masks.get(n).tolist()) for n in range(2)] == [{0.0, 1.0}, {0.0, 0.25}]
    plain = "\n".join(map(str, describe_index(tmp_path / "x", folder, samples=2)))
    assert "«It is four. 三<|im_end|>»[0.25]" in plain
    coloured = list(describe_index(tmp_path / "x", folder, samples=1, colour=True))[-1]
    assert [str(coloured)[s.start : s.end] for s in coloured.spans if s.style == "bold green"] == [
        "It is four. 三<|im_end|>",
        "Five.<|im_end|>",
    ]


def test_a_conversation_too_long_is_refused_dropped_or_cut_and_counted(folder, tmp_path):
    source = tmp_path / "x.jsonl"
    short, long = [CHAT[1], CHAT[4]], [CHAT[1], {"role": "assistant", "content": "z" * 90}]
    late = [{"role": "user", "content": "z" * 90}, CHAT[4]]
    source.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (short, long, late)))
    with pytest.raises(DataError, match=r"x.jsonl:2: takes \d+ places of a row of 60: give a larger --length"):
        preprocess_chat([source], folder, tmp_path / "refuse", options(folder, length=60))
    assert not list(tmp_path.glob("refuse*"))
    dropped, _ = preprocess_chat([source], folder, tmp_path / "drop", options(folder, length=60, long="drop"))
    assert (dropped.documents, dropped.dropped["longer than 60"].documents) == (1, 2)
    with pytest.raises(DataError, match=r"x.jsonl:3: no token of its first 61 counts: leave such .* --skip-empty"):
        preprocess_chat([source], folder, tmp_path / "cut", options(folder, length=60, long="cut"))
    cut, _ = preprocess_chat(
        [source], folder, tmp_path / "cut", options(folder, length=60, long="cut", skip_empty=True)
    )
    assert (cut.documents, cut.counts["cut"], cut.dropped["without a counted token"].documents) == (2, 1, 1)
    assert read_lengths(str(tmp_path / "cut")).tolist()[1] == 61


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            b'{"messages": [{"role": "user", "content": "q"}]}',
            "has no assistant's message: leave such conversations out",
        ),
        (b'{"messages": [{"role": "bot", "content": "q"}]}', "message 1: unknown role 'bot'"),
        (b'{"messages": [{"role": "user", "con', "no JSON"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not UTF-8 at byte"),
        (b'{"prompt": "\\ud800", "completion": "a"}', "has an unpaired surrogate"),
    ],
    ids=["no answer", "role", "truncated", "not UTF-8", "surrogate"],
)
def test_a_bad_line_is_named_by_file_and_line_also_in_a_later_shard(folder, tmp_path, line, reason):
    source = write_chats(tmp_path / "x.jsonl", 40)
    source.write_bytes(source.read_bytes() + line + b"\n")
    with pytest.raises(DataError) as error:
        preprocess_chat([source], folder, tmp_path / "x", options(folder), shard_bytes=1500)
    assert f"{source}:41: {reason}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.idx").exists()


def test_the_command_says_what_it_wrote_and_inspect_marks_what_counts(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_chats(tmp_path / "x.jsonl", 9)
    (tmp_path / "marked.jinja").write_text(MARKED)
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write(json.dumps({"messages": CHAT}) + "\nnot JSON\n")
    words = ["data", "chat", "x.jsonl", "--tokenizer", os.path.relpath(folder, tmp_path), "--out", "x"]
    assert invoke(words).error.startswith("error: x.jsonl:11: no JSON")
    made = invoke([*words, "--bad-lines", "skip", "--template", "marked.jinja", "--length", "150"])
    assert made.exit_code == 0, made.error
    assert "10 conversations, " in made.printed
    assert "a run names the tokenizer x-tokenizer, which has the chat template" in made.printed
    assert "note:" not in made.printed
    assert read_template("x-tokenizer") == MARKED
    assert invoke(words).error == "error: x.idx: exists: choose another prefix, or replace it with --overwrite"
    shown = invoke(["data", "inspect", "x", "--samples", "10", "--tokenizer", "x-tokenizer"]).printed
    assert "<|im_start|>assistant\n«It is four. 三<|im_end|>»\n<|im_start|>user" in shown
    assert "packed into rows of 150: " in shown
    assert "conversation 9, x.jsonl:10, " in shown
    with pytest.raises(DataError, match="holds conversations of `data chat`"):
        preprocess([tmp_path / "x.jsonl"], folder, tmp_path / "x")
    bare = make_tokenizer(tmp_path / "bare", None)
    found = invoke(["data", "chat", "x.jsonl", "--tokenizer", str(bare), "--out", "y"])
    assert "has no chat template: give one with --template FILE" in found.error
    assert Tokenizer(folder).decode_one(1) == "<|im_end|>"


def test_a_copy_of_the_tokenizer_says_every_token_that_ends_an_answer(folder, tmp_path):
    copy_with_template(folder, MARKED, tmp_path / "same")
    assert not (tmp_path / "same/generation_config.json").exists()
    starts = CHATML.replace("<|im_end|>", "<|im_start|>")
    copy_with_template(folder, starts, tmp_path / "other")
    assert json.loads((tmp_path / "other/generation_config.json").read_text())["eos_token_id"] == [1, 0]
    assert ChatTokenizer(tmp_path / "other").end == 0
    with pytest.raises(DataError, match="is there with another chat template"):
        copy_with_template(folder, MARKED, tmp_path / "other")
    copy_with_template(folder, MARKED, tmp_path / "other", replace=True)
    assert read_template(tmp_path / "other") == MARKED
    ids = {"eos_token_id": 1, "bos_token_id": 5}
    found = generation_settings(tmp_path / "same", ids)
    assert found == {"_from_model_config": True, **ids}
    (tmp_path / "same/generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    assert generation_settings(tmp_path / "same", ids) == {"eos_token_id": [1, 0], "bos_token_id": 5}


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SHIPPED = {
    "plain": "### user\nq\n### assistant\na<|im_end|>\n### user\nr\n### assistant\nb<|im_end|>\n",
    "aquilachat2-7b": "<|startofpiece|>q<|endofpiece|>a</s><|startofpiece|>r<|endofpiece|>b</s>",
    "aquilachat2-16k": SYSTEM + "###Human: q###Assistant: a</s>Human: r###Assistant: b</s>",
    "baichuan2-chat": "<reserved_106>q<reserved_107>a<reserved_106>r<reserved_107>b<|im_end|>",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_templates_render_the_published_formats_and_count_the_answers(folder, name):
    whole = SHIPPED[name]
    chat = ChatTokenizer(folder, (REPOSITORY / f"examples/sft/templates/{name}.jinja").read_text())
    messages = [
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    ]
    assert chat.text(messages) == whole
    assert whole.startswith(chat.text(messages[:3], prompt=True))
    answers = "".join(counted(chat, messages))
    assert answers.replace("</s>", "").replace("<|im_end|>", "").replace(" ", "") == "ab"
