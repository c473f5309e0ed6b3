"""Models and tokenizers in GGUF: what stands in the file, and that llama.cpp computes the same with it."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import qsharded
from qsharded import merge
from tests.adapters import recast, transformers_model, write_adapter
from tests.checkpoints import write_checkpoint
from tests.utils.test_durable_files import room_in_a_file

gguf = pytest.importorskip("gguf")
from qsharded.integrations import gguf_tensors  # noqa: E402
from qsharded.integrations.gguf import write_gguf  # noqa: E402
from qsharded.integrations.gguf_tokenizer import pre_tokenizer_name  # noqa: E402
from qsharded.utils.durable_files import NotWritten  # noqa: E402

BUILTIN = Path(qsharded.__file__).parent / "builtin" / "model"
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
LINEAR_ROPE = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3_ROPE = {"rope_scaling": {"rope_type": "llama3", **_LLAMA3}}


def write_model(folder: Path, **config: Any) -> Path:
    """Random weights with the built-in model's tokenizer."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder)
    return write_checkpoint(folder, vocab_size=262, **config)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys and tensors, dequantized to fp32 by the gguf package."""
    reader = gguf.GGUFReader(path)
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


def test_the_file_says_what_the_checkpoint_says(tmp_path: Path) -> None:
    write_gguf(write_model(tmp_path / "model", **LINEAR_ROPE), tmp_path / "model.gguf", "mine")
    said, tensors = read(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "mine",
        "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
        "llama.block_count": 2,
        "llama.embedding_length": 128,
        "llama.feed_forward_length": 192,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 32,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "llama.context_length": 256,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert expected.items() <= said.items()
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert len(tensors) == len(stored)
    plain = {"token_embd": "model.embed_tokens", "output": "lm_head", "blk.1.attn_v": "model.layers.1.self_attn.v_proj"}
    for name, original in plain.items():
        assert torch.equal(tensors[f"{name}.weight"], stored[f"{original}.weight"].float())
    query = stored["model.layers.0.self_attn.q_proj.weight"].float()
    # head 2 begins at row 64; rows 3 and 3 + 16 of a head of 32 turn together
    assert torch.equal(tensors["blk.0.attn_q.weight"][64 + 2 * 3], query[64 + 3])
    assert torch.equal(tensors["blk.0.attn_q.weight"][64 + 2 * 3 + 1], query[64 + 3 + 16])


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.float32, "F32")])
def test_matrices_keep_their_dtype_and_vectors_are_fp32(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    write_gguf(recast(write_model(tmp_path / "model"), dtype), tmp_path / "model.gguf", "m")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == kind
    assert kinds["output_norm.weight"] == "F32"


def merged_into(output: Path, checkpoint: Path, adapter: Path, *options: str) -> Path:
    merge.main(["--adapter", str(adapter), "--model", str(checkpoint), "--output", str(output), *options])
    return output


# By the names of the file: how the checkpoint calls a tensor, and its type beside Q8_0 and beside Q4_0.
QUANTIZED = {
    "blk.1.ffn_down.weight": ("model.layers.1.mlp.down_proj.weight", "Q8_0", "Q4_0"),
    "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", "Q8_0", "Q4_0"),
    "token_embd.weight": ("model.embed_tokens.weight", "Q8_0", "Q4_0"),
    "output.weight": ("lm_head.weight", "Q8_0", "Q8_0"),
    "blk.0.attn_norm.weight": ("model.layers.0.input_layernorm.weight", "F32", "F32"),
}
# Of the largest weight of a block of 32. Q8_0 has 127 steps to each side, and errs by half of one; Q4_0 has 8 to one
# side and 7 to the other, where it may err by a whole one. The scale is rounded to F16, by up to 2**-11 of itself.
ERROR = {"Q8_0": 0.5 / 127 + 2**-11, "Q4_0": 1 / 8 + 2**-11}


@pytest.mark.parametrize("number", [0, 1], ids=["q8_0", "q4_0"])
def test_quantized_tensors_are_the_packages_own_of_the_merged_ones(tmp_path: Path, number: int) -> None:
    wanted = ["Q8_0", "Q4_0"][number]
    checkpoint = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", checkpoint)
    stored = load_file(merged_into(tmp_path / "plain", checkpoint, adapter) / "model.safetensors")
    options = ["--format", "gguf", "--gguf-type", wanted.lower()]
    reader = gguf.GGUFReader(merged_into(tmp_path / "gguf", checkpoint, adapter, *options) / "model.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{wanted}"]
    assert reader.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, (original, *kinds) in QUANTIZED.items():
        kind, weight = kinds[number], stored[original].float()
        if name.endswith("attn_q.weight"):  # rows 0 and 16 of each head of 32 in turn, 1 and 17, ...
            order = torch.arange(128).view(4, 2, 16).transpose(1, 2).flatten()
            weight = weight[order]
        assert found[name].tensor_type.name == kind, name
        expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
        assert found[name].data.tobytes() == expected.tobytes(), name
        if kind != "F32":
            back = torch.from_numpy(gguf.quants.dequantize(found[name].data, found[name].tensor_type).copy())
            largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
            assert ((back - weight).abs() <= ERROR[kind] * largest).all(), name


def test_f16_holds_what_bf16_held_or_says_so(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model")
    write_gguf(checkpoint, tmp_path / "model.gguf", "m", "f16")
    weights = load_file(checkpoint / "model.safetensors")
    stored = weights["lm_head.weight"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    [head] = [tensor for tensor in reader.tensors if tensor.name == "output.weight"]
    assert head.tensor_type.name == "F16"
    assert torch.equal(torch.from_numpy(head.data.copy()), stored.half())
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_F16
    stored[0, 0] = 70_000  # bf16 goes far beyond
    save_file(
        load_file(checkpoint / "model.safetensors") | {"lm_head.weight": stored}, checkpoint / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"output\.weight holds values that F16 does not"):
        write_gguf(checkpoint, tmp_path / "model.gguf", "m", "f16")


def test_a_tied_embedding_is_the_head_that_keeps_8_bits_and_torn_blocks_keep_16(tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model", tie_word_embeddings=True, intermediate_size=200)
    write_gguf(checkpoint, tmp_path / "model.gguf", "m", "q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.ffn_up.weight"]) == ("Q8_0", "Q4_0")
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 200


def test_rows_are_quantized_a_few_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_model(tmp_path / "model")
    write_gguf(checkpoint, tmp_path / "whole.gguf", "m", "q4_0")
    monkeypatch.setattr(gguf_tensors, "_ELEMENTS_AT_ONCE", 900)
    write_gguf(checkpoint, tmp_path / "parts.gguf", "m", "q4_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()


def test_a_type_is_for_gguf_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        merge.main(["--adapter", "a", "--model", "m", "--output", "o", "--gguf-type", "q8_0"])
    assert "--gguf-type q8_0 is for --format gguf, got --format safetensors" in capsys.readouterr().err


def test_the_stretched_frequencies_of_llama_3_are_a_tensor(tmp_path: Path) -> None:
    write_gguf(write_model(tmp_path / "model", **LLAMA3_ROPE), tmp_path / "model.gguf", "m")
    divisors = read(tmp_path / "model.gguf")[1]["rope_freqs.weight"]
    # waves of 2 pi < 32/4 positions are kept, those longer than 32 slowed eightfold: pair 0 and pairs from 3 on
    assert divisors.shape == (16,)
    assert divisors[0] == 1
    torch.testing.assert_close(divisors[3:], torch.full((13,), 8.0), rtol=1e-6, atol=0)
    assert 1 < divisors[1] < divisors[2] < 8


def test_a_tied_head_is_left_out(tmp_path: Path) -> None:
    write_gguf(BUILTIN, tmp_path / "model.gguf", "m")
    _, tensors = read(tmp_path / "model.gguf")
    assert "output.weight" not in tensors
    assert "token_embd.weight" in tensors


def test_merging_writes_one_file(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", BUILTIN)
    for form in ("safetensors", "gguf"):
        merged_into(tmp_path / form, BUILTIN, adapter, "--format", form)
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"model.gguf", "README.md"}
    said, tensors = read(tmp_path / "gguf" / "model.gguf")
    assert said["general.name"] == "gguf"
    merged = load_file(tmp_path / "safetensors" / "model.safetensors")
    assert torch.equal(tensors["blk.0.ffn_down.weight"], merged["model.layers.0.mlp.down_proj.weight"].float())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}, "latest 64 tokens"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not written"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_gguf(write_model(tmp_path / "model", **config), tmp_path / "model.gguf", "m")


def test_what_is_refused_is_refused_before_weights_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model", rope_scaling={"rope_type": "yarn", "factor": 2.0})
    adapter = write_adapter(tmp_path / "adapter", model)
    monkeypatch.setattr(merge, "merge_weights", None)
    monkeypatch.setattr(merge, "errors_named", lambda *_: nullcontext())
    with pytest.raises(ValueError, match="rope_type 'yarn' is not written to GGUF"):
        merge.main(
            ["--adapter", str(adapter), "--model", str(model), "--output", str(tmp_path / "o"), "--format", "gguf"]
        )


def tokenizer(pre_tokenizer: Any, **model: Any) -> dict[str, Any]:
    return {
        "model": {"type": "BPE", "merges": [["a", "b"]], **model},
        "pre_tokenizer": pre_tokenizer,
        "normalizer": None,
    }


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split(regex: str) -> dict[str, Any]:
    steps = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, byte_level(False)]
    return {"type": "Sequence", "pretokenizers": steps}


# As the tokenizer.json of these models has it.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(True)]}


@pytest.mark.parametrize(
    ("steps", "name"),
    [(split(LLAMA3), "llama-bpe"), (split(QWEN), "qwen2"), (DIGITS, "smollm"), (byte_level(True), "gpt-2")],
)
def test_known_pre_tokenizers_have_the_names_of_llama_cpp(steps: dict[str, Any], name: str) -> None:
    assert pre_tokenizer_name(tokenizer(steps)) == name


def test_unknown_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is not known to be one of llama\.cpp"):
        pre_tokenizer_name(tokenizer(split(r"\p{L}+|\s")))
    with pytest.raises(ValueError, match=r"is not known to be one of llama\.cpp"):
        pre_tokenizer_name(tokenizer(byte_level(False)))
    assert pre_tokenizer_name(tokenizer(byte_level(False), merges=[])) == "gpt-2"  # nothing to cut
    with pytest.raises(ValueError, match="not byte-level BPE"):
        pre_tokenizer_name(tokenizer({"type": "Metaspace"}, byte_fallback=True))
    with pytest.raises(ValueError, match="not byte-level BPE"):
        pre_tokenizer_name(tokenizer(byte_level(True)) | {"normalizer": {"type": "Lowercase"}})


TEXTS = ["<|begin|><|user|>cat<|end|><|assistant|>", "<|begin|><|user|>Zoe's 12,345  dogs<|end|><|assistant|>"]


@pytest.mark.parametrize(
    "config",
    [None, {}, QWEN2, QWEN3, LINEAR_ROPE, LLAMA3_ROPE],
    ids=["built-in", "llama", "qwen2", "qwen3", "linear", "llama3"],
)
def test_llama_cpp_says_the_same_tokens(tmp_path: Path, config: dict[str, Any] | None) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = BUILTIN if config is None else recast(write_model(tmp_path / "model", **config), torch.float32)
    write_gguf(folder, tmp_path / "model.gguf", "m")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=128, n_threads=1, verbose=False)
    ours, ids_of = transformers_model(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ids_of(text, add_special_tokens=False).input_ids
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
        expected = ours.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=-1)[0].tolist()
        theirs.reset()
        stream = theirs.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
        assert [next(stream) for _ in range(16)] == expected[len(ids) :]


def test_a_file_that_does_not_fit_is_named_and_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")
    with pytest.raises(NotWritten, match=r"model\.gguf was not written: .*; it takes [\d,]+ bytes, "):  # noqa: SIM117
        with room_in_a_file(20_000):
            write_gguf(BUILTIN, target, "m")
    assert (target.read_bytes(), list(tmp_path.iterdir())) == (b"old", [target])
