"""Files from outside that are nonsense, absurd, or point elsewhere: refused by name, in bounded time and memory."""

import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from qsharded.checkpoint.adapter import open_weights, read_lora_config
from qsharded.checkpoint.source import INDEX, SafetensorsFolder, read_header
from qsharded.data.tokenizer_files import read_templates
from qsharded.lora import config as lora_config
from qsharded.lora.layer import add_lora
from qsharded.models import ModelConfig
from qsharded.utils.untrusted_json import check, integer, list_of, map_of, number, parse, read_json, text
from tests.checkpoints import LLAMA
from tests.faults.fuzz.mutations import NASTY
from tests.faults.fuzz.parsers import Parser, parsers
from tests.faults.fuzz.run import run_cases

SHORT = 300  # cases for each parser; python -m tests.faults.fuzz has the long form


def test_mutated_files_end_in_named_errors_or_are_read(tmp_path: Path) -> None:
    for name, parser in parsers(tmp_path).items():
        ends, failures, slowest = run_cases(name, parser, seed=1, cases=SHORT)
        assert failures == []
        assert {"accepted", "refused"} == set(ends), name
        assert slowest < 2, name


def test_the_harness_notices_a_parser_that_names_nothing() -> None:
    def case(random: Random) -> None:
        raise random.choice((KeyError("x"), ValueError("x"), RecursionError("x"), ValueError("file.json: key")))

    ends, failures, _ = run_cases("p", Parser(case, r"file\.json: "), seed=0, cases=40)
    assert len(ends) < 40
    assert {failure.split(": ")[1] for failure in failures} == {"KeyError", "names nothing", "RecursionError"}


# found by the fuzz harness: the scale of attention divides by the logarithm of this length
LONGROPE = {
    "original_max_position_embeddings": 1,
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0] * (LLAMA["hidden_size"] // LLAMA["num_attention_heads"] // 2),
        "long_factor": [2.0] * (LLAMA["hidden_size"] // LLAMA["num_attention_heads"] // 2),
    },
}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": "192"}, "hidden_size must be an integer from 1 to 4,194,304 or null, got '192'"),
        ({"hidden_size": -64}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 1,000"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"rope_theta": 0}, "rope_theta must be a number above 1"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number"),
        ({"model_type": []}, "model_type must be a string"),
        ({"architectures": [[]]}, "architectures has 0, which must be a string"),
        ({"vocab_size": 10**400}, "vocab_size must be an integer from 1 to 2,147,483,647 or null, got an integer of"),
        ({"rope_scaling": []}, "rope_scaling must hold a JSON object, got list"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "rope_scaling: factor must be a number"),
        ({"quantization_config": 7}, "quantization_config must hold a JSON object"),
        (LONGROPE, "original_max_position_embeddings must be above 1 for rope_type 'longrope', got 1"),
    ],
)
def test_nonsense_in_a_config_is_refused_by_its_key(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match="config") as refused:
        ModelConfig.from_hf(LLAMA | changes)
    assert str(refused.value).startswith("config.json: " + complaint)


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"[" * 100_000, "it is nested too deeply"),
        (b"[" * 70 + b"]" * 70, "nested too deeply, over 64 levels"),
        (b'{"a": ' * 70 + b"1" + b"}" * 70, "nested too deeply, over 64 levels"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' comes twice"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"9" * 5_000, "is not valid JSON: Exceeds the limit"),
        (b"\xff", "not UTF-8 at byte 0"),
        (rb'["\ud800"]', "half of a surrogate pair"),
        (b" " * 1_001, "has 1,001 bytes of JSON, more than 1,000"),
    ],
)
def test_a_json_text_is_looked_at_as_a_whole(raw: bytes, complaint: str) -> None:
    longest = 1_000 if complaint.startswith("has") else 1 << 20
    with pytest.raises(ValueError, match=r"^file") as refused:
        parse(raw, "file", longest=longest)
    assert complaint in str(refused.value)
    assert parse(b"[" * 64 + b"]" * 64, "file") is not None


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"config\.json has 1,099,511,627,776 bytes of JSON, more than"):
        read_json(path)


@pytest.mark.parametrize("value", NASTY, ids=lambda value: repr(value)[:20])
def test_a_kind_never_fails_itself(value: Any) -> None:
    kinds = (integer(0, 3), number(0, 1), text(3), list_of(integer(1, 2), 2), map_of(text(3), 2))
    for kind in kinds:
        if kind.holds(value):
            check({"key": value}, {"key": kind}, "file")
        else:
            with pytest.raises(ValueError, match=r"^file: key ") as refused:
                check({"key": value}, {"key": kind}, "file")
            assert len(str(refused.value)) < 400
    assert number(0, 1).holds(value) == (value in (0.5, 1, 1e-300) and value is not True)


def write_header(path: Path, header: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def test_600_000_empty_tensors_are_refused_before_they_are_read(tmp_path: Path) -> None:
    entry = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(entry % number for number in range(600_000)) + "}"
    path = write_header(tmp_path / "model.safetensors", header.encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_header, open_weights):
        with pytest.raises(ValueError, match=r"model\.safetensors lists 600,000 tensors, more than 200,000"):
            read(path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 2 * len(header)


def test_a_header_that_has_a_key_twice_is_refused(tmp_path: Path) -> None:
    one = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    path = write_header(tmp_path / "model.safetensors", b"{" + one + b"," + one + b"}")
    for read in (read_header, open_weights):
        with pytest.raises(ValueError, match=r"model\.safetensors is not valid JSON: the key 'a' comes twice"):
            read(path)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_link_out_of_the_folder_is_refused_but_into_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    elsewhere, cache, folder = (tmp_path / name for name in ("elsewhere", "cache", "folder"))
    name = "part.safetensors" if indexed else "model.safetensors"
    for place in (elsewhere, cache, folder):
        place.mkdir()
        save_file({"a": torch.zeros(2)}, place / "blob")
    if indexed:
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for target, allowed in ((cache / "blob", True), (folder / "blob", True), (elsewhere / "blob", False)):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        if allowed:
            assert SafetensorsFolder(folder).names() == ["a"]
        else:
            with pytest.raises(ValueError, match=rf"{name} is a link to .*elsewhere/blob, outside its folder"):
                SafetensorsFolder(folder).names()


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
@pytest.mark.parametrize("read", [read_json, read_header, open_weights])
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, kind: str, read: Any) -> None:
    """A pipe would be waited for, and /dev/zero be read until the memory is full."""
    path = tmp_path / "config.json"
    {"a pipe": os.mkfifo, "a device": lambda path: path.symlink_to("/dev/zero"), "a folder": os.mkdir}[kind](path)
    with pytest.raises(ValueError, match=r"config\.json is no regular file"):
        read(path)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, link_to_zeros, Path.mkdir])
def test_no_more_is_one_in_the_place_of_a_chat_template(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "additional_chat_templates" / "rag.jinja"
    path.parent.mkdir()
    make(path)
    with pytest.raises(ValueError, match=r"rag\.jinja is no regular file"):
        read_templates(tmp_path, {})


def test_a_chat_template_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'chat_template.jinja'} is not UTF-8 at byte 1")):
        read_templates(tmp_path, {})


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "alpha_pattern", "exclude_modules"])
def test_a_pattern_that_goes_back_and_forth_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(lora_config, "_SECONDS", 0.2)
    pattern = "(([a-z_.0-9]+)+)+X"
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    settings[key] = {pattern: 4} if key.endswith("_pattern") else pattern
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    whole = nn.Module()
    whole.layers_of_a_long_name_of_its_own = model
    with pytest.raises(ValueError, match=r"takes more than 0\.2 s of CPU time"):
        add_lora(whole, read_lora_config(tmp_path))
