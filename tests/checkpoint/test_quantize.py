"""Quantized folders, as compressed-tensors and transformers read them."""

import json

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export, import_folder
from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.checkpoint.packed import pack, unpack
from flagscale_like.checkpoint.quantize import quantize, quantize_folder
from flagscale_like.data.index_file import write_index
from flagscale_like.errors import ConversionError
from flagscale_like.families.quantization import Scheme
from tests.commands import command, run_commands
from tests.families import tiny

SCHEMES = [(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 123])
def test_packing_is_the_librarys(bits, columns):
    generator = torch.Generator().manual_seed(0)
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (5, columns), dtype=torch.int8, generator=generator)
    assert torch.equal(pack(values, bits), pack_to_int32(values, bits))
    assert torch.equal(pack(values.T, bits).T, pack_to_int32(values, bits, packed_dim=0))
    assert torch.equal(unpack(pack(values, bits), bits, columns), values)


@pytest.mark.parametrize(("bits", "symmetric"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_at_most_half_a_step_off_unless_it_was_cut_off(bits, symmetric, dtype):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = quantize(weight, Scheme(bits=bits, group_size=16, symmetric=symmetric))
    assert found.scale.dtype == dtype
    step = found.scale.float().repeat_interleave(16, dim=1)
    inside = (found.values > -(1 << (bits - 1))) & (found.values < (1 << (bits - 1)) - 1)
    assert inside.float().mean() > 0.7
    error = (found.dequantize() - weight.float()).abs()
    assert (error[inside] <= step[inside] * 0.501).all()
    # The least error over the ranges is no more than that of the whole range.
    assert error.square().mean().sqrt() < (0.12 if bits == 4 else 0.01) * weight.float().std()


def test_a_group_of_zeros_stays_zero():
    weight = torch.zeros(3, 32)
    for symmetric in (True, False):
        found = quantize(weight, Scheme(bits=4, group_size=8, symmetric=symmetric))
        assert torch.equal(found.dequantize(), weight)


def test_zero_points_pay_where_weights_are_one_sided():
    weight = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    errors = [
        (quantize(weight, Scheme(bits=4, group_size=32, symmetric=s)).dequantize() - weight).norm()
        for s in (True, False)
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(("bits", "symmetric"), SCHEMES)
def test_transformers_loads_a_quantized_folder_and_computes_with_the_dequantized_weights(bits, symmetric, tmp_path):
    source = tiny.make("llama3", tmp_path)
    scheme = Scheme(bits=bits, group_size=16, symmetric=symmetric)
    summary = quantize_folder(source, tmp_path / "small", scheme)
    assert summary.matrices == 2 * 7
    assert summary.bytes_after < summary.bytes_before
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if name.startswith("model.layers.") and weight.dim() == 2:
            weights[name] = quantize(weight, scheme).dequantize()
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    exact = plain.eval()(tiny.ids()).logits
    plain.load_state_dict(weights)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    with torch.no_grad():
        found, expected = small.eval()(tiny.ids()).logits, plain(tiny.ids()).logits
    assert (found - expected).abs().max() < 1e-4
    assert (found - exact).abs().max() > 1e-3  # it is not the folder it was made from
    read = HfFolder(tmp_path / "small")  # and so does the native reader
    for name, weight in weights.items():
        assert torch.equal(read.hf_tensor(name), weight), name


def test_a_quantized_folder_is_evaluated_imported_and_exported_as_the_numbers_it_stands_for(tmp_path):
    source = tiny.make("qwen2", tmp_path, torch.bfloat16)
    import_folder(source, tmp_path / "native")
    export(CheckpointReader(tmp_path / "native"), tmp_path / "hf", max_file_bytes=40_000, dtype="stored")
    quantize_folder(tmp_path / "hf", tmp_path / "small", Scheme(bits=4, group_size=16, symmetric=False))
    ids = tiny.ids().flatten().numpy().astype(np.int32)
    (tmp_path / "x.bin").write_bytes(ids.tobytes())
    write_index(tmp_path / "x.idx", [np.array([len(ids)], np.int32)], np.dtype(np.int32))
    lines = [
        ["evaluate", "--hf", "small", "--data", "x", "--seq-length", "24"],
        ["convert", "import", "--hf", "small", "--out", "imported"],
        ["convert", "export", "--checkpoint", "imported", "--out", "plain"],
        ["evaluate", "--hf", "plain", "--data", "x", "--seq-length", "24"],
        ["convert", "quantize", "--hf", "small", "--out", "again", "--group-size", "16"],
    ]
    (outcomes,) = run_commands(lines, tmp_path)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0, 0, 0, 13], outcomes
    assert "weights are INT4 in groups of 16; they are read as the numbers that they stand for" in outcomes[0].printed
    assert outcomes[0].printed.splitlines()[-1] == outcomes[3].printed.splitlines()[-1]
    assert "is quantized already" in outcomes[4].error
    whole, plain = HfFolder(tmp_path / "small"), HfFolder(tmp_path / "plain")
    assert all(torch.equal(whole.full(key), plain.full(key)) for key in whole.keys())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(dict(model.named_parameters())[name], plain.hf_tensor(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(quant_method="gptq"),
            "quantization_config is of 'gptq' in a form that is not read; read are",
        ),
        (lambda c: c.update(format="float-quantized"), "of 'compressed-tensors' in a form that is not read"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="channel"), "in a form that is not read"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=3), "in a form that is not read"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(symmetric=False), "weight_zero_point is missing"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=8), "weight_scale has shape"),
        (lambda c: c["config_groups"].clear(), "in a form that is not read"),
    ],
)
def test_other_quantizations_are_refused_with_those_that_are_read(change, message, tmp_path):
    quantize_folder(tiny.make("llama", tmp_path), tmp_path / "small", Scheme(bits=4, group_size=16))
    config = json.loads((tmp_path / "small/config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "small/config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message) as error:
        HfFolder(tmp_path / "small")
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_of_several_files_keeps_them_with_an_index_that_fits(tmp_path):
    import_folder(tiny.make("qwen2", tmp_path, torch.bfloat16), tmp_path / "native")
    export(CheckpointReader(tmp_path / "native"), tmp_path / "hf", max_file_bytes=40_000)
    quantize_folder(tmp_path / "hf", tmp_path / "small", Scheme(bits=4, group_size=16, symmetric=False))
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    held = {}
    for file in (tmp_path / "small").glob("*.safetensors"):
        held |= dict.fromkeys(load_file(file), file.name)
    assert index["weight_map"] == held
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_wrong_numbers_are_refused_with_both(tmp_path):
    source = tiny.make("llama", tmp_path)
    with pytest.raises(
        ConversionError, match=r"down_proj\.weight has 80 columns, .* \(32\) must divide: group size 16 would do"
    ):
        quantize_folder(source, tmp_path / "small", Scheme(group_size=32))
    with pytest.raises(ConversionError, match=r"bits \(3\) must be 4 or 8"):
        Scheme(bits=3)
    with pytest.raises(ConversionError, match=r"group_size \(12\) must be a positive multiple of 8"):
        Scheme(group_size=12)
    assert not (tmp_path / "small").exists()


def test_the_command_line_quantizes(tmp_path):
    source = tiny.make("llama", tmp_path)
    arguments = ["--hf", str(source), "--out", str(tmp_path / "small"), "--bits", "4", "--group-size", "16"]
    result = command("convert", "quantize", *arguments, "--no-symmetric")
    assert result.returncode == 0, result.stderr
    assert "14 matrices in INT4" in result.stdout
    assert "transformers loads it with compressed-tensors: pip install 'flagscale_like[quantized]'" in result.stdout
