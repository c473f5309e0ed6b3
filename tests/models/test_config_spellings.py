"""config.json files that say in another way what is computed here; transformers is the reference."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qsharded import generate, merge, quantize, train
from qsharded.models import ModelConfig
from qsharded.models.config_spellings import ignoring
from qsharded.models.rope import rope_tables
from tests.adapters import write_adapter
from tests.checkpoints import write_chat_checkpoint, write_chat_rows
from tests.models.test_config import LLAMA

MISTRAL = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 4}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "said",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0, "original_max_position_embeddings": 32}},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 16, "attention_factor": 3.0}},
        {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
        {"rope_scaling": YARN | {"factor": None}},
        {"rope_scaling": {"rope_type": "yarn", "factor": None}},
        {"rope_scaling": YARN | {"factor": None, "mscale": 0.7, "mscale_all_dim": 1.3}},
        {"rope_scaling": YARN | {"factor": 8.0, "low_freq_factor": 1.0}},
        {"rope_scaling": YARN | {"factor": None}, "original_max_position_embeddings": 16},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 16},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "original_max_position_embeddings": 16},
        {"original_max_position_embeddings": 16},
    ],
    ids=str,
)
def test_ropes_are_what_transformers_makes_of_them(tmp_path: Path, said: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | said))
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    positions = torch.arange(LLAMA["max_position_embeddings"])[None]
    theirs = rotary(torch.zeros(1, 1, 8), positions)
    config = ModelConfig.from_hf(LLAMA | said)
    ours = rope_tables(config.rope, config.head_dim, positions, torch.float32)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=2e-5)  # fp32 angles of up to 127 radians


EXTRAS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LLAMA, {"architectures": ["LLaMAForCausalLM"]}),
    (LLAMA, {"layer_types": ["full_attention"] * 3}),
    (LLAMA, {"use_sliding_window": False}),
    (LLAMA, {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1}),
    (MISTRAL | {"sliding_window": None}, {"layer_types": ["full_attention"] * 3}),
    (MISTRAL, {"use_sliding_window": False, "max_window_layers": 1}),
    (LLAMA, {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}),
    (LLAMA, {"num_experts": 0, "num_experts_per_tok": 0, "mlp_only_layers": [], "output_router_logits": False}),
    (LLAMA, {"keys_to_ignore_at_inference": ["past_key_values"]}),
    (LLAMA, {"resid_pdrop": 0.0, "hidden_dropout": 0.0, "classifier_dropout": 0.1}),
]


@pytest.mark.parametrize(("plain", "extra"), EXTRAS, ids=str)
def test_extras_change_nothing_here_as_in_transformers(
    tmp_path: Path, plain: dict[str, Any], extra: dict[str, Any]
) -> None:
    assert ModelConfig.from_hf(plain | extra) == ModelConfig.from_hf(plain)
    said = []
    for described in (plain, plain | extra):
        (tmp_path / "config.json").write_text(json.dumps(described))
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
        model = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}[plain["model_type"]](config).eval()
        with torch.no_grad():
            said.append(model(torch.arange(20)[None]).logits)
    assert torch.equal(*said)


@pytest.mark.parametrize(
    ("described", "complaint"),
    [
        (LLAMA | {"num_experts": 8}, "'num_experts' is 8"),
        (LLAMA | {"use_sliding_window": True}, "'use_sliding_window'"),
        (LLAMA | {"sliding_window": 4}, "'sliding_window'"),
        (LLAMA | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "'layer_types'"),
        (MISTRAL | {"layer_types": ["full_attention"] * 3}, "'layer_types'"),
        (LLAMA | {"hidden_dropout": 0.1}, "'hidden_dropout' is 0.1"),
        (LLAMA | {"architectures": ["LLaMAModel"]}, "LLaMAModel"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "'yarn' needs 'factor'"),
    ],
    ids=str,
)
def test_what_would_change_something_is_refused(described: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ModelConfig.from_hf(described)


def test_the_refusal_of_another_family_names_the_road_through_transformers() -> None:
    with pytest.raises(ValueError, match=r"Others can be trained through transformers and PEFT.*quantization_config="):
        ModelConfig.from_hf(LLAMA | {"model_type": "mamba"})


def test_a_key_is_passed_over_where_the_user_says_so_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    odd = LLAMA | {"logit_softcap": 30.0, "other": 1}
    with ignoring(["logit_softcap", "other"]):
        assert ModelConfig.from_hf(odd) == ModelConfig.from_hf(LLAMA)
        ModelConfig.from_hf(odd)
    assert caplog.text.count("'logit_softcap' (30.0) is passed over") == 1
    with ignoring(["other"]), pytest.raises(ValueError, match=r"'logit_softcap' .* --ignore-config-key logit_softcap"):
        ModelConfig.from_hf(odd)
    with pytest.raises(ValueError, match="'logit_softcap'"):
        ModelConfig.from_hf(odd)


def test_a_key_that_is_read_is_not_passed_over() -> None:
    with ignoring(["hidden_size", "rope_theta", "tie_word_embeddings"]):
        config = ModelConfig.from_hf(LLAMA | {"rope_theta": 70.0, "tie_word_embeddings": True})
    assert (config.hidden_size, config.rope.rope_theta, config.tie_word_embeddings) == (32, 70.0, True)


def test_every_command_that_reads_a_model_takes_the_option(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    model = write_chat_checkpoint(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(described | {"odd": 1}))
    rows = write_chat_rows(tmp_path / "rows.jsonl", 4)
    commands: list[tuple[Any, list[str]]] = [
        (train.main, ["--dataset", str(rows), "--output-dir", str(tmp_path / "out"), "--max-steps", "1"]),
        (generate.main, ["--prompt", "a", "--max-new-tokens", "2"]),
        (merge.main, ["--adapter", str(adapter), "--output", str(tmp_path / "merged")]),
        (quantize.main, ["--output", str(tmp_path / "packed")]),
    ]
    caplog.set_level(logging.INFO)
    for command, flags in commands:
        with pytest.raises(SystemExit):
            command(["--model", str(model), *flags])
        assert "--ignore-config-key odd passes over it" in capsys.readouterr().err
        caplog.clear()
        command(["--model", str(model), *flags, "--ignore-config-key", "odd"])
        assert "config key 'odd' (1) is passed over" in caplog.text
