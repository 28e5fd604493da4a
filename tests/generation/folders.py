"""A tiny Hugging Face folder that can be asked in words."""

import torch
import transformers

from flagscale_like.data.tokenizer import train_bpe

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = "user: a line of text, and then another one.\nassistant: yes, and one more line.\n" * 40


def make_folder(folder, vocab_size=300, positions=96):
    """A llama with random weights, a byte-level tokenizer and a chat template."""
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    train_bpe([TEXT], vocab_size, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
