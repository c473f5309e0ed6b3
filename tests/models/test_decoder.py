from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qsharded.models import CausalLM, ModelConfig
from qsharded.models.attention_inputs import AttentionInputs
from qsharded.models.rope import RopeConfig

from .families import FAMILIES, VOCAB, gradients, our_model, pair, random_ids, transformers_model

# fp32, 3 layers, logits up to about 10: two orders of the same sums differ by a few 1e-6.
ATOL = 1e-5
LENGTH = 40


def logits_with(family: str, **changes: object) -> Tensor:
    model = pair(family)[1]
    changed = CausalLM(replace(model.config, **changes), dtype=torch.float32)
    changed.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        return changed(random_ids(2, LENGTH))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str) -> None:
    theirs, ours = pair(family)
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("llama3", {"rope": RopeConfig(rope_theta=500.0)}),
        ("llama-linear", {"rope": RopeConfig()}),
        ("llama-yarn", {"rope": RopeConfig(rope_theta=100.0)}),
        ("llama-tied-biased", {"qkv_bias": False}),
        ("llama-tied-biased", {"mlp_bias": False}),
        ("mistral-window", {"layer_windows": ()}),
        ("qwen2-window", {"layer_windows": (None, None, 5)}),
        ("qwen3", {"qk_norm": False}),
    ],
    ids=str,
)
def test_the_parity_test_would_notice_a_missing_feature(family: str, without: dict[str, object]) -> None:
    assert (logits_with(family) - logits_with(family, **without)).abs().max() > 1000 * ATOL


@pytest.mark.parametrize("family", ["llama3", "qwen3-layer-types", "smollm2"])
def test_gradients_equal_those_of_transformers(family: str) -> None:
    theirs, ours = pair(family)
    ids = random_ids(2, LENGTH)
    theirs(ids, labels=ids).loss.backward()
    targets = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), dim=1)
    (ours(ids, targets_BS=targets) / (2 * LENGTH - 2)).backward()
    expected, got = gradients(theirs), gradients(ours)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        # Both sum the same fp32 terms in another order; gradients reach about 1.
        torch.testing.assert_close(gradient, expected[name], atol=ATOL, rtol=1e-4, msg=name)


def test_loss_is_the_fp32_sum_over_trained_tokens() -> None:
    model = pair("llama2")[1]
    ids, targets = random_ids(2, 12), random_ids(2, 12, seed=1)
    targets[0, 3:7] = -100
    loss = model(ids, targets_BS=targets)
    expected = nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_a_replaced_head_gives_the_same_loss() -> None:
    config = ModelConfig(VOCAB, 32, 48, 1, 2, 2, 16, 64)
    model = CausalLM(config, dtype=torch.float32)
    ids, targets = random_ids(2, 12), random_ids(2, 12, seed=1)
    targets[0, 3:7] = -100
    expected = model(ids, targets_BS=targets)
    model.lm_head = nn.Sequential(model.lm_head)
    torch.testing.assert_close(model(ids, targets_BS=targets), expected)


def test_last_only_gives_the_last_position() -> None:
    model = pair("llama2")[1]
    ids = random_ids(2, 12)
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


def test_dynamic_rope_refuses_rows_whose_rotation_would_depend_on_the_batch() -> None:
    model = pair("llama-dynamic")[1]
    with pytest.raises(ValueError, match=r"65 tokens.*dynamic.*max_position_embeddings = 64"):
        model(random_ids(1, 65))


@pytest.mark.parametrize("family", ["llama-tied-biased", "qwen3-layer-types"])
def test_meta_construction_has_no_buffers_and_loses_nothing(family: str) -> None:
    whole = pair(family)[1]
    with torch.device("meta"):
        model = CausalLM(whole.config, dtype=torch.float32)
    assert list(model.buffers()) == []
    model.to_empty(device="cpu")
    model.tie_weights()
    model.load_state_dict(whole.state_dict())
    assert torch.equal(model(random_ids(1, 9)), whole(random_ids(1, 9)))


def test_tied_weights_are_one_parameter_on_meta_too() -> None:
    config = replace(pair("smollm2")[1].config)
    with torch.device("meta"):
        model = CausalLM(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    model.to_empty(device="cpu")
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", ["llama3", "qwen3-layer-types"])
def test_a_layer_compiles_to_one_graph(family: str, masked: bool) -> None:
    model = pair(family)[1]
    layer = model.model.layers[0]
    torch.manual_seed(0)
    x = torch.randn(2, 10, model.config.hidden_size)
    tables = [torch.randn(2, 10, model.config.head_dim) for _ in range(2)]
    inputs = AttentionInputs(*tables, mask_BST=torch.ones(10, 10).tril().bool()[None, None] if masked else None)
    torch._dynamo.reset()
    results = []
    for run in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        leaf = x.clone().requires_grad_()
        y = run(leaf, inputs)
        y.square().sum().backward()
        results.append({"y": y, "x": leaf.grad, **gradients(layer)})
    torch.testing.assert_close(*results)


def test_bf16_model_runs_in_bf16_with_an_fp32_loss() -> None:
    whole = pair("qwen3")[1]
    model = CausalLM(whole.config)
    model.load_state_dict(whole.state_dict())
    ids = random_ids(2, 16)
    assert model(ids).dtype == torch.bfloat16
    assert model(ids, targets_BS=ids).dtype == torch.float32


# transformers 4's spelling, of which 5.23 still reads every key: both must make the same model of it.
_OLD = {
    "_name_or_path": "someone/model",
    "torch_dtype": "float32",
    "transformers_version": "4.44.2",
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
OLD_CONFIGS = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "pretraining_tp": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
    },
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "rope_theta": 200.0,
        "sliding_window": 6,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 1,
        "rope_theta": 300.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "sliding_window": 6,
        "use_sliding_window": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "max_window_layers": 1,
        "rope_scaling": None,
        "rope_theta": 400.0,
        "sliding_window": 6,
        "use_sliding_window": True,
    },
}


@pytest.mark.parametrize("family", OLD_CONFIGS)
def test_transformers_4_spelling_gives_the_same_logits(family: str) -> None:
    config = _OLD | OLD_CONFIGS[family]
    theirs = transformers_model(config)
    ours = our_model(config, theirs.state_dict())
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=ATOL, rtol=0)
