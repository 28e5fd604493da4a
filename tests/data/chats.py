"""Chat templates and a small tokenizer with their tokens, for the tests of conversations."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    + PROMPT
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)
# As Qwen3's: thoughts of earlier turns are forgotten, and the last answer gets a block of thought, also an empty one.
FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% if loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
# Tools stand first; a call is JSON behind the answer, and what the tool says is a turn of its own.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    + PROMPT
)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "It is four. 三"},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Five."},
]


def make_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """A byte-level BPE of 300 ids with the tokens <|im_start|> and <|im_end|>."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([" ".join(m["content"] for m in CHAT) + " user assistant system"] * 20, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>")
    whole.chat_template = template
    whole.save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int, *, seed: int = 0, longest: int = 30) -> Path:
    """Conversations of random letters, of one or two turns, 10 to 4 * longest tokens each."""
    draw = random.Random(seed)

    def letters() -> str:
        return "".join(draw.choices("abcdefgh ", k=draw.randint(1, longest)))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            turns = draw.randint(1, 2)
            messages = [{"role": r, "content": letters()} for _ in range(turns) for r in ("user", "assistant")]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
