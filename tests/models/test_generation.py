import copy

import pytest
import torch
from torch import Tensor, nn

from qsharded.models import CausalLM, KVCache
from qsharded.models.generation import LogitsNotFinite, generate
from qsharded.models.sampling import Sampling

from .families import VOCAB, pair, random_ids

FAMILIES = ["llama3", "mistral-window", "qwen2-window", "qwen3"]
PROMPTS = [random_ids(n, seed=n).tolist() for n in (3, 9, 1, 14)]
NEW = 12


def greedy(model: CausalLM, prompts: list[list[int]], **settings: object) -> list[list[int]]:
    return generate(model, prompts, **{"max_new_tokens": NEW, "eos_ids": ()} | settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [(20,), (1,) * 20, (7, 1, 9, 3)], ids=str)
def test_cached_logits_equal_a_whole_forward(family: str, chunks: tuple[int, ...]) -> None:
    model = pair(family)[1]
    ids = random_ids(2, 20)
    cache = KVCache(model.config.num_hidden_layers, 20)
    with torch.no_grad():
        cached = torch.cat([model(part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(cached, model(ids), atol=1e-5, rtol=0)
    assert cache.length == 20


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(family: str) -> None:
    theirs, ours = pair(family)
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        assert greedy(ours, [prompt]) == [expected[0, len(prompt) :].tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_equals_its_prompts_one_by_one(family: str) -> None:
    model = pair(family)[1]
    assert greedy(model, PROMPTS) == [greedy(model, [prompt])[0] for prompt in PROMPTS]


def test_a_row_stops_before_its_eos_while_others_go_on() -> None:
    model = pair("llama2")[1]
    free = greedy(model, PROMPTS)
    eos = free[1][4]
    expected = [row[: row.index(eos)] if eos in row else row for row in free]
    assert greedy(model, PROMPTS, eos_ids=[eos, VOCAB + 7]) == expected
    assert len({len(row) for row in expected}) > 1


def test_stops_early_once_every_row_has_stopped() -> None:
    model = pair("llama2")[1]
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    tokens = greedy(model, [PROMPTS[1]], eos_ids=range(VOCAB))
    hook.remove()
    assert tokens == [[]]
    assert lengths == [len(PROMPTS[1])]


def test_on_token_sees_every_token_in_order() -> None:
    model = pair("llama2")[1]
    seen: list[list[int]] = [[] for _ in PROMPTS]
    eos = greedy(model, PROMPTS)[1][4]
    tokens = greedy(model, PROMPTS, eos_ids=[eos], on_token=lambda row, token: seen[row].append(token))
    assert seen == tokens


def test_dropout_is_off_meanwhile_and_the_mode_returns() -> None:
    model = CausalLM(pair("llama2")[1].config, dtype=torch.float32)
    model.model.norm = nn.Sequential(model.model.norm, nn.Dropout(0.5))
    model.train()
    assert greedy(model, PROMPTS) == greedy(model, PROMPTS)
    assert model.training


def test_sampling_depends_on_the_seed_alone() -> None:
    model = pair("llama2")[1]
    first, again, other = (greedy(model, PROMPTS, temperature=2.0, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_sampling_of_the_likeliest_alone_is_greedy(settings: dict[str, float]) -> None:
    model = pair("llama2")[1]
    assert greedy(model, PROMPTS, **({"temperature": 1.0} | settings)) == greedy(model, PROMPTS)


PROBABILITIES = torch.tensor([0.05, 0.4, 0.02, 0.25, 0.28])
DRAWS = 20_000


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ((1.0, 0, 1.0), PROBABILITIES),
        ((0.5, 0, 1.0), PROBABILITIES**2),
        ((1.0, 2, 1.0), torch.tensor([0, 0.4, 0, 0, 0.28])),
        ((1.0, 0, 0.6), torch.tensor([0, 0.4, 0, 0, 0.28])),
        ((1.0, 0, 0.7), torch.tensor([0, 0.4, 0, 0.25, 0.28])),
        # Of the three likeliest, rescaled to 0.43, 0.30 and 0.27, two already reach 0.7.
        ((1.0, 3, 0.7), torch.tensor([0, 0.4, 0, 0, 0.28])),
    ],
    ids=str,
)
def test_sampling_frequencies(settings: tuple[float, int, float], weights: Tensor) -> None:
    expected = weights / weights.sum()
    logits, sampling = PROBABILITIES.log().expand(DRAWS, -1), Sampling(*settings)
    noise = sampling.noise(logits)
    assert noise is not None
    drawn = sampling.choose(logits, noise.exponential_(generator=torch.Generator().manual_seed(0)))
    got = drawn.bincount(minlength=5) / DRAWS
    # Five standard deviations of a binomial count; a token of probability 0 must never come.
    assert ((got - expected).abs() <= 5 * (expected * (1 - expected) / DRAWS).sqrt()).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, r"temperature .* got -1\.0"),
        ({"top_k": -1}, "top_k .* got -1"),
        ({"top_p": 0.0}, r"top_p .* got 0\.0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(changes: dict[str, object], message: str) -> None:
    settings = {"prompts": PROMPTS, "max_new_tokens": 1, "eos_ids": ()} | changes
    with pytest.raises(ValueError, match=message):
        generate(pair("llama2")[1], **settings)


def test_a_full_cache_and_mixed_document_ids_are_errors() -> None:
    model = pair("llama2")[1]
    cache = KVCache(model.config.num_hidden_layers, 6)
    model(random_ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match="holds 6 tokens; 4 \\+ 3 do not fit"):
        model(random_ids(1, 3), cache=cache)
    with pytest.raises(ValueError, match="every call"):
        model(random_ids(1, 1), cache=cache, document_ids_BS=torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_choose_no_token(value: float, temperature: float) -> None:
    """The likeliest of NaN would be token 0 for ever, which may print as nothing at all."""
    model = copy.deepcopy(pair("llama3")[1])
    with torch.no_grad():
        model.lm_head.weight[7, 3] = value
    with pytest.raises(LogitsNotFinite, match="the model's logits are not finite"):
        greedy(model, PROMPTS[:1], temperature=temperature)
