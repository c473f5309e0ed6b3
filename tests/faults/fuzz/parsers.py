"""The readers of untrusted files, each with valid files to begin from and what it may say of a bad one."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from qsharded.checkpoint import packed_format
from qsharded.checkpoint.adapter import CONFIG_FILE, read_lora_config
from qsharded.checkpoint.source import INDEX, SafetensorsFolder, read_header
from qsharded.data.records import read_rows
from qsharded.data.tokenizer import Tokenizer
from qsharded.models import ModelConfig
from qsharded.models.rope import rope_tables
from qsharded.quant import blockwise8, formats
from qsharded.quant.formats import QuantFormat
from qsharded.utils.untrusted_json import read_json
from tests.checkpoints import LLAMA
from tests.data.folders import chat, make_folder
from tests.faults.fuzz.mutations import hostile, mutated_bytes
from tests.models.variants import VARIANTS


@dataclass(frozen=True)
class Parser:
    """One reader. ``case`` reads what the seed makes of the file; its ValueError must match ``names``."""

    case: Callable[[Random], Any]
    names: str


def parsers(folder: Path) -> dict[str, Parser]:
    """All of them, with their files in ``folder``."""
    makers = {
        "config": _config, "index": _index, "tokenizer settings": _tokenizer_settings, "tokenizer": _tokenizer,
        "adapter config": _adapter_config, "quant state": _quant_state, "quantization config": _quantization_config,
        "safetensors header": _safetensors_header, "rows": _rows,
    }  # fmt: skip
    found = {}
    for name, make in makers.items():
        (folder / name).mkdir()
        found[name] = make(folder / name)
    return found


def _config(folder: Path) -> Parser:
    configs = [LLAMA, *VARIANTS.values()]
    path = folder / "config.json"

    def case(random: Random) -> None:
        path.write_bytes(hostile(random.choice(configs), random))
        config = ModelConfig.from_hf(read_json(path))
        for rope in {config.rope, *config.rope_of_layer} - {None}:
            rope_tables(rope, config.head_dim, torch.zeros(1, 2, dtype=torch.long), torch.float32)

    return Parser(case, r"config\.json( is|:| must hold) .")


def _index(folder: Path) -> Parser:
    names = ["a.safetensors", "part/b.safetensors"]  # beside a model.safetensors no index need be read
    (folder / "part").mkdir()
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.zeros(2)}, folder / name)
    valid = {"metadata": {"total_size": 16}, "weight_map": {"t0": names[0], "t1": names[1]}}

    def case(random: Random) -> None:
        (folder / INDEX).write_bytes(hostile(valid, random))
        SafetensorsFolder(folder).names()

    return Parser(case, re.escape(INDEX))


def _tokenizer_settings(folder: Path) -> Parser:
    valid = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "add_bos_token": True,
        "added_tokens_decoder": {"900": {"content": "<new>", "special": True, "lstrip": False}},
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    }
    make_folder(folder, eos_token="</s>")

    def case(random: Random) -> None:
        generation = random.random() < 0.2
        written = {"eos_token_id": [1, 2], "max_length": 3} if generation else valid
        name = "generation_config.json" if generation else "tokenizer_config.json"
        (folder / name).write_bytes(hostile(written, random))
        try:
            used(Tokenizer.from_folder(folder))
        finally:
            (folder / name).unlink()

    return Parser(case, re.escape(str(folder)) + "|tokenizer_config|chat template")


def _tokenizer(folder: Path) -> Parser:
    make_folder(folder, eos_token="</s>")
    path = folder / "tokenizer.json"
    valid = json.loads(path.read_text())
    valid["model"]["vocab"] = dict(list(valid["model"]["vocab"].items())[:300])
    valid["model"]["merges"] = valid["model"]["merges"][:20]

    def case(random: Random) -> None:
        path.write_bytes(hostile(valid, random))
        used(Tokenizer.from_folder(folder))

    return Parser(case, re.escape(str(folder)))


def used(tokenizer: Tokenizer) -> None:
    """All that a run asks a tokenizer when it starts."""
    assert tokenizer.vocab_size > 0
    assert isinstance(tokenizer.eos_ids, tuple)
    assert tokenizer.special_texts is not None
    tokenizer.decode(tokenizer.with_bos(tokenizer.encode("a b")))


def _adapter_config(folder: Path) -> Parser:
    valid = {
        "peft_type": "LORA", "base_model_name_or_path": "m", "revision": None, "r": 8, "lora_alpha": 16,
        "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "use_rslora": False, "rank_pattern": {"k_proj": 4},
        "alpha_pattern": {"k_proj": 2.5}, "modules_to_save": ["norm"], "bias": "none", "init_lora_weights": True,
    }  # fmt: skip

    def case(random: Random) -> None:
        (folder / CONFIG_FILE).write_bytes(hostile(valid, random))
        lora = read_lora_config(folder)
        for name in ("model.layers.0.self_attn.q_proj", "lm_head"):
            assert lora.is_target(name) in (True, False)
            assert lora.is_saved(name) or (lora.rank(name) >= 1 and lora.scaling(name) >= 0)

    return Parser(case, re.escape(CONFIG_FILE))


def _quant_state(folder: Path) -> Parser:
    state = packed_format.bitsandbytes_state(QuantFormat("nf4", 64), 4, 64, torch.bfloat16, 0.5)
    valid = json.loads(state.numpy().tobytes())
    name, path = "a.weight", folder / "model.safetensors"
    parts = {
        name: torch.zeros(128, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.zeros(4, dtype=torch.uint8),
        f"{name}.nested_absmax": torch.zeros(1),
        f"{name}.quant_map": formats.codebook(quant_type="nf4"),
        f"{name}.nested_quant_map": blockwise8.dynamic_map(),
    }

    def case(random: Random) -> None:
        said = bytearray(hostile(valid, random) or b" ")
        stored = {f"{name}.quant_state.bitsandbytes__nf4": torch.frombuffer(said, dtype=torch.uint8)}
        save_file(parts | stored, path)
        source = SafetensorsFolder(folder)
        form = packed_format.StorageFormat("bitsandbytes", True, QuantFormat("nf4"))
        form.as_stored(source, name).parts(source, name, 4, 64)

    return Parser(case, re.escape(str(path)) + r": .*a\.weight")


def _quantization_config(folder: Path) -> Parser:
    own = packed_format.own_config()
    theirs = packed_format.bitsandbytes_config("nf4", torch.bfloat16, {"a"})
    path = folder / "config.json"

    def case(random: Random) -> None:
        path.write_bytes(hostile(LLAMA | {"quantization_config": random.choice((own, theirs))}, random))
        config = read_json(path)
        ModelConfig.from_hf(config)
        packed_format.read_storage_format(config)

    return Parser(case, r"config\.json( is|:| must hold) .|quantization_config: .")


def _safetensors_header(folder: Path) -> Parser:
    path = folder / "a.safetensors"
    save_file({"b": torch.ones(3, 4), "c": torch.zeros(0), "d": torch.ones(2, dtype=torch.uint8)}, path, {"x": "y"})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    valid, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def case(random: Random) -> None:
        if random.random() < 0.7:
            header = hostile(valid, random)
            path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        else:
            path.write_bytes(mutated_bytes(raw, random))
        read_header(path)

    return Parser(case, re.escape(str(path)))


def _rows(folder: Path) -> Parser:
    valid = {"messages": chat("a", "b"), "tools": [{"type": "function"}], "n": 3}
    path = folder / "rows.jsonl"

    def case(random: Random) -> None:
        path.write_bytes(hostile(valid, random) + b"\n")
        list(read_rows(path))

    return Parser(case, re.escape(str(path)))
