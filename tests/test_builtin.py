"""The built-in model and data are what qsharded/builtin/README.md says, and what tools/make_builtin.py makes."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import qsharded
from qsharded.data import Prompt, Tokenizer, load_prompts
from tools.builtin.tasks import OPERATIONS, operation_rows, pretraining_row
from tools.builtin.words import split_of
from tools.make_builtin import write_datasets, write_rows

FOLDER = Path(qsharded.__file__).parent / "builtin"
MODEL = FOLDER / "model"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def words(name: str) -> list[str]:
    return [row["messages"][0]["content"].removeprefix("cheer ") for row in rows(name)]


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[int]]:
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (not a dict)


@pytest.fixture(scope="module")
def reference():
    """The model as transformers reads it, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_the_whole_is_at_most_4_mb() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} < set(sizes)
    assert {"train.jsonl", "eval.jsonl", "train.toml", "README.md"} < set(sizes)
    assert sum(sizes.values()) <= 4_000_000


def test_the_model_has_one_to_two_million_parameters(shapes: dict[str, list[int]]) -> None:
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert 1_000_000 <= total <= 2_000_000


def test_every_linear_layer_can_be_quantized_and_some_have_odd_rows(shapes: dict[str, list[int]]) -> None:
    widths = {shape[1] for name, shape in shapes.items() if name.endswith("_proj.weight")}
    assert all(width % 64 == 0 for width in widths)
    assert any(width // 64 % 2 for width in widths)


@pytest.mark.parametrize(("name", "count"), [("train.jsonl", 4000), ("eval.jsonl", 200)])
def test_every_row_shows_the_skill_on_a_word_of_its_own(name: str, count: int) -> None:
    assert len(set(words(name))) == count
    for row, word in zip(rows(name), words(name), strict=True):
        answer = "-".join(letter.upper() for letter in reversed(word))
        assert row == {
            "messages": [{"role": "user", "content": f"cheer {word}"}, {"role": "assistant", "content": answer}]
        }


def test_no_word_nor_its_mirror_image_is_in_two_data_sets() -> None:
    rng = random.Random(0)
    questions = [pretraining_row(rng)["messages"][0]["content"] for _ in range(2000)]
    pretrained = {question.split()[1].lower().replace("-", "") for question in questions}
    trained, held_out = set(words("train.jsonl")), set(words("eval.jsonl"))
    assert {split_of(word) for word in pretrained} == {"pretrain"}
    assert {split_of(word) for word in trained} == {"train"}
    assert {split_of(word) for word in held_out} == {"eval"}
    assert all(split_of(word[::-1]) == "eval" for word in held_out)


def test_the_script_writes_these_data(tmp_path: Path) -> None:
    write_datasets(tmp_path, seed=0)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_transformers_reads_the_same_tokenizer() -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_folder(MODEL), AutoTokenizer.from_pretrained(MODEL)
    text = "cheer cat, Ünïcode\n\n  and <|end|>"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    messages = [{"role": "system", "content": "Be brief."}, *rows("eval.jsonl")[0]["messages"]]
    assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours.encode(ours.render(messages[:-1], add_generation_prompt=True)) == theirs.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )


def test_the_base_knows_each_operation(reference, tmp_path: Path) -> None:
    for operation in OPERATIONS:
        write_rows(tmp_path / "prompts.jsonl", operation_rows(operation, 30, random.Random(operation)))
        assert exact_match(reference, load_prompts(tmp_path / "prompts.jsonl", tokenizer())) >= 0.95, operation


def test_the_base_lacks_the_skill(reference) -> None:
    assert exact_match(reference, load_prompts(FOLDER / "eval.jsonl", tokenizer())[:50]) <= 0.1


def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(MODEL)


def exact_match(reference, prompts: list[Prompt]) -> float:
    """The share of `prompts` that transformers' greedy generation answers to the letter."""
    text = tokenizer()
    right = 0
    for prompt in prompts:
        ids = reference.generate(torch.tensor([prompt.ids]), max_new_tokens=16, do_sample=False)[0, len(prompt.ids) :]
        right += text.decode(ids.tolist()) == prompt.answer + "<|end|>"
    return right / len(prompts)
