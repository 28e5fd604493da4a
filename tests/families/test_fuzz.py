"""A config.json with any value in any place is read or refused in one line, and Baichuan's versions are told apart."""

import copy
import json
import random

import pytest

from flagscale_like.errors import ConversionError
from flagscale_like.families import read_config
from flagscale_like.families.settings import Settings
from tests.families import tiny

ODD = (
    *(None, True, False, -1, 0, 0.0, 1.5, 1e20, -1e300, 10**30, 2**63, float("nan"), float("inf")),
    *("", "x", "NaN", "\ud800", [], [None], [1, "x"], {}, {"rope_type": "llama3"}, {"factor": -1}, [[[]]]),
)
SCALING = {**tiny.LLAMA3, "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0, "mscale": 1.0, "truncate": True}
BASES = [
    {**tiny.SHAPE, "model_type": "llama", "rope_scaling": SCALING, "rope_theta": 1e4},
    {**tiny.SHAPE, "model_type": "qwen2", "rope_parameters": SCALING, "max_window_layers": 0, "sliding_window": 5},
    {**tiny.SHAPE, "model_type": "mistral", "head_dim": 8, "sliding_window": 7},
    *tiny.CUSTOM.values(),
    *(
        {**tiny.SHAPE, **changes, "model_type": name.partition("-")[0], "rms_norm_eps": 1e-6}
        for name, (_, changes) in tiny.MIXTURES.items()
    ),
]


def mutations(count, seed):
    """Configurations with one to three odd values, some of them inside a scaling."""
    source = random.Random(seed)
    for _ in range(count):
        values = json.loads(json.dumps(source.choice(BASES)))
        for _ in range(source.randint(1, 3)):
            inner = [v for v in values.values() if isinstance(v, dict) and v]
            place = source.choice(inner) if inner and source.random() < 0.4 else values
            key = source.choice([*place, "architectures", "model_type", "rope_scaling", "head_dim"])
            place[key] = copy.deepcopy(source.choice(ODD))
        yield values


def test_odd_values_are_read_or_refused_in_one_line(tmp_path):
    path, read = tmp_path / "config.json", 0
    for values in mutations(1200, seed=1):
        path.write_text(json.dumps(values), encoding="utf-8")
        try:
            read_config(tmp_path)
            read += 1
        except ConversionError as error:
            text = str(error)
            assert len(text.splitlines()) == 1, (values, text)
            assert len(text) < 2000, (values, text)
    assert 0 < read < 1200


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' * 100_000, "not valid JSON"),
        ("[]", "must be a JSON object, found list"),
        ("\x00", "not valid JSON"),
    ],
)
def test_what_is_no_configuration_is_refused(text, part, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=part):
        read_config(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConversionError, match="not valid JSON"):
        Settings.read(tmp_path)


SEVEN, THIRTEEN = {"max_position_embeddings": 4096}, {"model_max_length": 4096}
FIRST, OTHERS = {"architectures": ["BaiChuanForCausalLM"]}, {"architectures": ["BaichuanForCausalLM"]}


@pytest.mark.parametrize(
    ("published", "family"),
    [
        (SEVEN | FIRST | {"vocab_size": 64000}, "baichuan"),
        (THIRTEEN | OTHERS | {"vocab_size": 64000}, "baichuan"),
        (SEVEN | THIRTEEN | OTHERS | {"vocab_size": 125696}, "baichuan2"),
        (THIRTEEN | OTHERS | {"vocab_size": 125696}, "baichuan2"),
        # With tokens added.
        (SEVEN | FIRST | {"vocab_size": 64010}, "baichuan"),
        (SEVEN | THIRTEEN | OTHERS | {"vocab_size": 125700}, "baichuan2"),
        (THIRTEEN | OTHERS | {"vocab_size": 125700, "z_loss_weight": 0}, "baichuan2"),
        (THIRTEEN | OTHERS | {"vocab_size": 125700, "norm_head": True}, "baichuan2"),
        (THIRTEEN | OTHERS | {"vocab_size": 125700, "norm_head": False}, "baichuan"),
        (THIRTEEN | OTHERS | {"vocab_size": 125700}, None),
    ],
)
def test_the_version_of_baichuan_is_told_or_the_folder_is_refused(published, family, tmp_path):
    shape = {k: v for k, v in tiny.PLAIN.items() if k not in ("vocab_size", "max_position_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "model_type": "baichuan", **published}))
    if family is None:
        with pytest.raises(ConversionError, match=r'add "norm_head": false for Baichuan, true for Baichuan2'):
            read_config(tmp_path)
    else:
        assert read_config(tmp_path)[0].name == family
