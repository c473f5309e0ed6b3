"""The generate command against transformers and PEFT on the same NF4 weights, and how it streams."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qsharded import generate as command
from qsharded import merge, train
from qsharded.config import parse, read_toml, write_toml
from qsharded.data import Tokenizer
from qsharded.generate import GenerateConfig, TextStream, main
from tests.adapters import recast, round_to_nf4, transformers_model, write_adapter
from tests.checkpoints import write_chat_rows, write_checkpoint
from tests.data.folders import make_folder
from tests.data.templates import CHATML

PROMPTS = ["What is 2+2?", "Grüße, 世界 👋"]
NEW = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 Llama with a chat tokenizer."""
    folder = make_folder(tmp_path_factory.mktemp("llama"), template=CHATML)
    return recast(write_checkpoint(folder, vocab_size=512), torch.float32)


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), checkpoint, modules_to_save=["lm_head"])


Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run the command and return what it prints."""

    def run(*flags: Any) -> str:
        dtype = [] if "--dtype" in flags else ["--dtype", "float32"]
        main([*dtype, "--max-new-tokens", str(NEW), *map(str, flags)])
        return capsys.readouterr().out

    return run


def answer(model: Any, tokenizer: Tokenizer, ids: list[int]) -> str:
    """What transformers says greedily, without special tokens."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": list(tokenizer.eos_ids), "pad_token_id": 0}
    rows = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)
    return tokenizer.decode(rows[0, len(ids) :].tolist(), skip_special_tokens=True)


def chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return tokenizer.encode(tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("raw", [False, True], ids=["chat", "raw"])
def test_greedy_answers_are_those_of_transformers_and_peft(
    checkpoint: Path, adapter: Path, say: Say, prompt: str, raw: bool
) -> None:
    tokenizer = Tokenizer.from_folder(checkpoint)
    ids = tokenizer.encode(prompt) if raw else chat_ids(tokenizer, prompt)
    model = round_to_nf4(transformers_model(checkpoint))
    flags = ["--model", checkpoint, "--prompt", prompt, *(["--raw"] if raw else [])]
    base = answer(model, tokenizer, ids)
    assert say(*flags) == base + "\n"
    adapted = answer(PeftModel.from_pretrained(model, adapter), tokenizer, ids)
    assert say(*flags, "--adapter", adapter) == adapted + "\n"
    assert adapted != base


def test_several_prompts_are_answered_by_themselves(checkpoint: Path, say: Say) -> None:
    alone = [say("--model", checkpoint, "--prompt", prompt) for prompt in PROMPTS]
    together = say("--model", checkpoint, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1])
    assert together == f"> {PROMPTS[0]}\n{alone[0]}> {PROMPTS[1]}\n{alone[1]}"


def test_sampling_is_by_the_seed_and_from_the_likeliest(checkpoint: Path, say: Say) -> None:
    flags = ["--model", checkpoint, "--prompt", PROMPTS[0]]
    greedy = say(*flags)
    drawn = [say(*flags, "--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({greedy, *drawn}) == 3
    assert say(*flags, "--temperature", 1.5, "--top-k", 1) == greedy
    assert say(*flags, "--temperature", 1.5, "--top-p", 1e-6) == greedy


def test_a_dash_reads_standard_input(checkpoint: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = say("--model", checkpoint, "--prompt", PROMPTS[1])
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPTS[1] + "\n"))
    assert say("--model", checkpoint, "--prompt", "-") == expected


def test_the_base_model_is_the_one_that_the_adapter_names(checkpoint: Path, adapter: Path, say: Say) -> None:
    flags = ["--adapter", adapter, "--prompt", PROMPTS[0]]
    assert say(*flags) == say(*flags, "--model", checkpoint)


def test_a_bfloat16_model_takes_an_adapter_and_modules_in_fp32(checkpoint: Path, adapter: Path, say: Say) -> None:
    assert say("--adapter", adapter, "--prompt", PROMPTS[0], "--dtype", "bfloat16").strip()


def test_without_a_chat_template_the_prompt_is_continued(tmp_path: Path, checkpoint: Path, say: Say) -> None:
    plain = make_folder(tmp_path / "plain", "byte-level-bos")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / file, plain)
    tokenizer = Tokenizer.from_folder(plain)
    expected = answer(round_to_nf4(transformers_model(plain)), tokenizer, [tokenizer.bos_id, *tokenizer.encode("Hi")])
    assert say("--model", plain, "--prompt", "Hi") == expected + "\n"
    assert say("--model", plain, "--prompt", "<s>Hi") == expected + "\n"  # no second BOS


def test_the_adapters_tokenizer_comes_first_and_both_end_the_answer(
    tmp_path: Path, checkpoint: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter", checkpoint)
    make_folder(adapter, template="{{ messages[0].content }}!", eos_token="<|eot_id|>")
    seen: dict[str, Any] = {}

    def nothing(_: Any, prompts: list[list[int]], **given: Any) -> list[list[int]]:
        seen.update(given, prompts=prompts)
        return [[]]

    monkeypatch.setattr(command, "generate", nothing)
    say("--adapter", adapter, "--prompt", "Hi")
    model_tokenizer, tokenizer = Tokenizer.from_folder(checkpoint), Tokenizer.from_folder(adapter)
    assert seen["prompts"] == [tokenizer.encode("Hi!")]
    assert {model_tokenizer.eos_id, tokenizer.eos_id, tokenizer.encode("<|im_end|>")[0]} <= set(seen["eos_ids"])


def test_text_appears_while_it_is_written(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokenizer.from_folder(checkpoint).encode("hé!")
    shown: list[str] = []

    def three_tokens(*_: Any, on_token: Callable[[int, int], None], **__: Any) -> list[list[int]]:
        for token in tokens:
            on_token(0, token)
            shown.append(capsys.readouterr().out)
        return [tokens]

    monkeypatch.setattr(command, "generate", three_tokens)
    main(["--model", str(checkpoint), "--prompt", "x"])
    assert shown == ["h", "", "é", "!"]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@pytest.mark.parametrize("before", ["", "The quick", "世"])
def test_streamed_text_is_whole_and_complete(tmp_path: Path, kind: str, before: str) -> None:
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path, kind))
    text = " brown fox\n\n jumps  über 世界 👩‍👩‍👧 and   rests."
    both, prompt = tokenizer.encode("x" + before + text), tokenizer.encode("x" + before)
    stream = TextStream(tokenizer, prompt)
    special = tokenizer.encode("<|im_end|>")[-1]
    pieces = [stream.add(token) for ordinary in both[len(prompt) :] for token in (special, ordinary)]
    assert both[: len(prompt)] == prompt
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 10
    assert stream.rest() == ""


def test_a_character_that_stays_incomplete_is_shown_at_the_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(make_folder(tmp_path))
    stream = TextStream(tokenizer, [])
    *start, _ = tokenizer.encode("a世")
    assert [stream.add(token) for token in start] == ["a"] + [""] * (len(start) - 1)
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"


def test_prompts_are_taken_as_they_are_from_flags_and_toml(tmp_path: Path) -> None:
    config = parse(["--model", "m", "--prompt", "a, b  c", "--prompt=- d"], GenerateConfig)
    assert config.prompt == ("a, b  c", "- d")
    path = tmp_path / "run.toml"
    path.write_text(write_toml(config))
    assert parse(["--config", str(path)], GenerateConfig) == config
    path.write_text('prompt = "one"')
    assert read_toml(path, GenerateConfig) == {"prompt": ("one",)}


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--model", "{checkpoint}"], 2, "--prompt is required"),
        (["--model", "{checkpoint}", "--prompt", " "], 1, "--prompt 1 of 1 is empty"),
        (["--model", "{checkpoint}", "--prompt", "x", "--top-p", "0"], 2, "--top-p must be above 0 and at most 1"),
        (["--model", "{checkpoint}", "--prompt", "x", "--top-k", "5"], 2, "give a --temperature above 0"),
        (["--model", "{checkpoint}", "--prompt", "x", "--adapter", "{run}"], 1, "did you mean {run}/adapter?"),
        (["--model", "{other}", "--prompt", "x", "--adapter", "{adapter}"], 1, "trained on {checkpoint}, --model is"),
        (["--model", "{small}", "--prompt", "x"], 1, "it is another model's tokenizer"),
        (["--adapter", "{nameless}", "--prompt", "x"], 2, "names no base model: give --model"),
        (["--model", "{adapter}", "--prompt", "x"], 1, "holds an adapter and no model: --adapter takes it"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path,
    checkpoint: Path,
    adapter: Path,
    flags: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = {"checkpoint": checkpoint, "adapter": adapter, "run": tmp_path / "run"}
    folders["other"] = write_checkpoint(make_folder(tmp_path / "other"), hidden_size=192, vocab_size=512)
    folders["small"] = write_checkpoint(make_folder(tmp_path / "small"), vocab_size=64)
    folders["nameless"] = tmp_path / "nameless"
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    for folder in (folders["run"] / "adapter", folders["nameless"]):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as raised:
        main([flag.format(**folders) for flag in flags])
    assert raised.value.code == status
    told = capsys.readouterr().err
    assert message.format(**folders) in told
    assert "Traceback" not in told


def broken(adapter: Path, target: Path, value: float) -> Path:
    """A copy of the adapter with one such value."""
    shutil.copytree(adapter, target)
    weights = load_file(target / "adapter_model.safetensors")
    weights["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][-1, 0] = value
    save_file(weights, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [torch.nan, -torch.inf], ids=str)
def test_an_adapter_that_is_not_finite_is_refused_by_all_that_read_it(
    tmp_path: Path, checkpoint: Path, adapter: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = broken(adapter, tmp_path / "adapter", value)
    rows = write_chat_rows(tmp_path / "rows.jsonl", 4)
    common = ["--model", str(checkpoint), "--adapter", str(damaged)]
    for run, flags in (
        (main, ["--prompt", "a"]),
        (train.main, ["--dataset", str(rows), "--output-dir", str(tmp_path / "out")]),
        (merge.main, ["--output", str(tmp_path / "merged")]),
    ):
        with pytest.raises(SystemExit) as raised:
            run([*common, *flags])
        assert raised.value.code == 1
        told = capsys.readouterr()
        assert re.search(
            r"layers\.1\.mlp\.down_proj\.(lora_B\.)?weight (holds NaN or infinity|is not finite)", told.err
        )
        assert not told.out


def test_a_base_whose_logits_overflow_is_refused_in_a_sentence(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every weight is finite, so that loading has nothing to say."""
    shutil.copytree(checkpoint, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["lm_head.weight"][:] = 3e38
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as raised:
        main(["--model", str(tmp_path / "model"), "--prompt", "a", "--dtype", "float32"])
    assert raised.value.code == 1
    told = capsys.readouterr().err
    assert "the model's logits are not finite" in told
    assert "Traceback" not in told
