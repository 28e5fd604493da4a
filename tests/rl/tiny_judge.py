"""A tiny model that really judges: it has learned to name the answer with more capital letters."""

import random
from pathlib import Path

import torch
import transformers

from flagscale_like.data.tokenizer import Tokenizer, train_bpe

QUESTION = "{prompt}={first}|{second}>"
PLACES = 96


def make_judge(folder: Path, *, steps: int = 90) -> Path:
    """A Hugging Face folder, its tokenizer of bytes, and question.txt: a judge of texts of a few letters.

    It is trained on questions whose answers are of X, Y, Z or of a, b, c: the answer of capital letters is the better one.
    Where both are of one kind it has learned nothing, and takes what stands first or last. It has learned to write such
    questions, too: after `p=` it draws an answer of either kind.
    """
    train_bpe(["plain words for a plain tokenizer"], 257, folder)
    (folder / "question.txt").write_text(QUESTION)
    tokenizer, draw = Tokenizer(folder), random.Random(0)
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=260,
        max_position_embeddings=PLACES,
        bos_token_id=tokenizer.eod,
        eos_token_id=tokenizer.eod,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        rows, places = [], []
        for _ in range(24):
            sides = [
                "".join(draw.choices("XYZ", k=draw.randint(1, 8))),
                "".join(draw.choices("abc", k=draw.randint(1, 8))),
            ]
            right = draw.randint(0, 1)
            first, second = sides[::-1] if right else sides
            text = QUESTION.replace("{prompt}", "p" * draw.randint(1, 4)).replace("{first}", first)
            ids = tokenizer.encode_batch([text.replace("{second}", second) + "AB"[right]])[0] + [tokenizer.eod]
            places.append(len(ids))
            rows.append(ids)
        width = max(places)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels, verdicts = torch.full_like(ids, -100), torch.full_like(ids, -100)
        for row, length in enumerate(places):
            labels[row, :length] = ids[row, :length]
            verdicts[row, length - 2 : length] = ids[row, length - 2 : length]
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = sum(torch.nn.functional.cross_entropy(logits, wanted[:, 1:].flatten()) for wanted in (labels, verdicts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return folder
