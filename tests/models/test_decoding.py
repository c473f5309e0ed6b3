"""Steps that CUDA graphs replay give the tokens of plain steps. On a CPU, recorded operations stand in for graphs."""

from pathlib import Path

import pytest
import torch

from qsharded.checkpoint import load_model
from qsharded.models import CausalLM, decoding
from qsharded.models.generation import LogitsNotFinite, generate

from .families import pair, random_ids
from .graph_replays import recorded
from .parity import ids, load
from .variants import VARIANTS

PROMPTS = [random_ids(n, seed=n).tolist() for n in (3, 9, 1, 14)]
FAMILIES = ["llama3", "mistral-window", "qwen2-window", "llama-tied-biased"]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys the graph sees, of each capture."""
    keys: list[int] = []

    def capture(step: object) -> object:
        keys.append(step.__self__._keys)  # type: ignore[attr-defined]
        return recorded(step)  # type: ignore[arg-type]

    monkeypatch.setattr(decoding, "_captures_on", lambda model: True)
    monkeypatch.setattr(decoding, "captured", capture)
    monkeypatch.setattr(decoding, "KEYS_AT_ONCE", 8)
    return keys


def tokens(model: CausalLM, graphs: bool, **settings: object) -> list[list[int]]:
    return generate(model, PROMPTS, **{"max_new_tokens": 21, "eos_ids": (), "graphs": graphs} | settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_plain_steps(family: str, captures: list[int]) -> None:
    model = pair(family)[1]
    assert tokens(model, graphs=True) == tokens(model, graphs=False)
    # 14 + 1 tokens after the prompt, the first step plain, and then wider graphs up to the 35
    assert captures == [16, 24, 32, 40]


def test_sampled_tokens_are_those_of_plain_steps(captures: list[int]) -> None:
    model, settings = pair("llama3")[1], {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 3}
    assert tokens(model, graphs=True, **settings) == tokens(model, graphs=False, **settings)
    assert captures


def test_rows_without_padding_and_other_numbers_of_rows(captures: list[int]) -> None:
    model = pair("qwen2-window")[1]
    for count in (1, 2):
        plain, graphed = (
            generate(model, [PROMPTS[3]] * count, max_new_tokens=9, eos_ids=(), graphs=graphs)
            for graphs in (False, True)
        )
        assert plain == graphed
    assert len(captures) == 2 * 2


def test_rows_stop_before_their_eos(captures: list[int]) -> None:
    model, seen = pair("llama2")[1], []
    eos = tokens(model, graphs=False)[1][4]
    stopped = tokens(model, graphs=True, eos_ids=[eos], on_token=lambda row, token: seen.append((row, token)))
    assert stopped == tokens(model, graphs=False, eos_ids=[eos])
    assert sorted(seen) == sorted((row, token) for row, of_row in enumerate(stopped) for token in of_row)


@pytest.mark.parametrize("new", [1, 2, 3])
def test_short_answers(new: int, captures: list[int]) -> None:
    model = pair("llama3")[1]
    assert tokens(model, True, max_new_tokens=new) == tokens(model, False, max_new_tokens=new)
    assert len(captures) == (new > 2)


def test_logits_that_are_not_finite_are_found_in_a_graph_too(captures: list[int]) -> None:
    model, seen = pair("llama3")[1], []

    def spoil(row: int, token: int) -> None:
        seen.append(token)
        if len(seen) == 1:
            model.lm_head.weight[7, 3] = torch.nan

    weight = model.lm_head.weight.detach().clone()
    try:
        with pytest.raises(LogitsNotFinite):
            tokens(model, graphs=True, on_token=spoil)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)
    assert seen


# whose layers keep a state, whose scores are capped, whose rotation depends on how long the text becomes, whose experts
# are chosen on the host
NOT_REPLAYED = (
    "qwen3_5",
    "gemma2",
    "phi3-longrope",
    "phi3-su",
    "qwen3_moe",
    "mixtral",
    "glm4_moe",
    "deepseek_v",
    "gpt_oss",
    "qwen3_next",
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_with_adapters(variant: str, captures: list[int]) -> None:
    model, row = load(variant).eval(), ids()[0].tolist()
    plain, graphed = (
        generate(model, [row[:13], row[13:15]], max_new_tokens=8, eos_ids=(), graphs=graphs) for graphs in (False, True)
    )
    assert plain == graphed
    assert bool(captures) == (variant == "gemma2-no-caps" or not variant.startswith(NOT_REPLAYED))


def test_without_a_gpu_nothing_is_replayed() -> None:
    assert not decoding.can_replay(pair("llama3")[1])


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 1}], ids=str)
def test_graphs_replay_what_steps_compute(
    settings: dict[str, float], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the token: the same kernels, launched one by one."""
    ours = load_model(model, device="cuda").eval()
    assert decoding.can_replay(ours)
    monkeypatch.setattr(decoding, "KEYS_AT_ONCE", 16)  # several graphs
    asked = {"max_new_tokens": 40, "eos_ids": (), "graphs": True} | settings
    replayed = generate(ours, PROMPTS, **asked)
    monkeypatch.setattr(decoding, "captured", lambda step: step)
    assert replayed == generate(ours, PROMPTS, **asked)
