"""Fingerprints of base models: the same for the same weights however they are stored, others for other weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsharded.checkpoint import fingerprint
from qsharded.checkpoint.base_identity import BaseIdentity, CannotTell
from qsharded.checkpoint.fingerprint import Fingerprint
from qsharded.quantize import main as quantize
from tests.adapters import transformers_model
from tests.checkpoints import LLAMA, pack_by_bitsandbytes, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def with_tensors(model: Path, target: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    """A copy of a checkpoint in one file with its tensors and config.json changed."""
    target.mkdir()
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file({name: w.contiguous() for name, w in weights.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | config))
    return target


def nothing(weights: dict[str, Tensor]) -> None:
    pass


def difference(then: Path, now: Path) -> str | None:
    recorded = BaseIdentity.from_json(json.loads(json.dumps(BaseIdentity.of(then).to_json())))
    return recorded.difference(BaseIdentity.of(now), now)


def test_another_path_other_shards_and_what_transformers_saves_are_the_same(model: Path, tmp_path: Path) -> None:
    for number, size in enumerate(("100KB", "1GB")):
        transformers_model(model).save_pretrained(tmp_path / str(number), max_shard_size=size)
        assert difference(model, tmp_path / str(number)) is None
    assert len(list((tmp_path / "0").glob("*.safetensors"))) > 2
    assert difference(model, shutil.copytree(model, tmp_path / "copy")) is None


def test_a_tied_head_counts_once_under_either_name(model: Path, tmp_path: Path) -> None:
    tied = with_tensors(model, tmp_path / "tied", lambda w: w.pop("lm_head.weight"), tie_word_embeddings=True)

    def twice(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    def as_head(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")

    assert difference(tied, with_tensors(tied, tmp_path / "twice", twice)) is None
    assert difference(tied, with_tensors(tied, tmp_path / "head", as_head)) is None
    other = with_tensors(model, tmp_path / "other", nothing, tie_word_embeddings=True)  # its head is its own
    assert difference(tied, other) == "it holds lm_head.weight too"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_one_changed_number_is_found_and_its_tensor_and_file_named(model: Path, tmp_path: Path, name: str) -> None:
    def one_number(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[37] += 0.5

    found = difference(model, with_tensors(model, tmp_path / "other", one_number))
    tensors = len(load_file(model / "model.safetensors"))
    assert found == f"1 of {tensors} tensors differ, the first is {name} in model.safetensors"


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"rope_theta": 5e5}, "config.json's rope.rope_theta is 500000.0, it was 10000.0"),
        ({"rms_norm_eps": 1e-6}, "config.json's rms_norm_eps is 1e-06, it was 1e-05"),
        ({"max_position_embeddings": 512}, None),  # a limit that computes nothing
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "config.json's rope."),
        ({"torch_dtype": "float16", "eos_token_id": 3}, None),
    ],
)
def test_config_json_counts_where_it_changes_the_mathematics(
    model: Path, tmp_path: Path, config: dict[str, Any], complaint: str | None
) -> None:
    found = difference(model, with_tensors(model, tmp_path / "other", nothing, **config))
    assert (found or "").startswith(complaint) if complaint else found is None


def test_shape_dtype_and_names_count(model: Path, tmp_path: Path) -> None:
    def flat(weights: dict[str, Tensor]) -> None:
        weights["model.norm.weight"] = weights["model.norm.weight"].view(2, -1)

    def same_bytes(weights: dict[str, Tensor]) -> None:
        weights["model.norm.weight"] = weights["model.norm.weight"].view(torch.float16)

    for number, change in enumerate((flat, same_bytes)):
        assert "model.norm.weight" in str(difference(model, with_tensors(model, tmp_path / str(number), change)))
    lacking = with_tensors(model, tmp_path / "lacking", lambda weights: weights.pop("model.norm.weight"))
    assert difference(model, lacking) == "it lacks model.norm.weight"


def test_of_a_large_tensor_both_ends_and_places_between_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_SAMPLE", 64)
    monkeypatch.setattr(fingerprint, "_PLACES", 4)
    name = "model.embed_tokens.weight"
    size = 97 * 128 * 2
    places = [size - 64 if place == 3 else (size - 64) * place // 3 for place in range(4)]
    before = Fingerprint.of(model)

    def changed(byte: int) -> bool:
        def flip(weights: dict[str, Tensor]) -> None:
            weights[name].view(-1).view(torch.uint8)[byte] ^= 1

        folder = with_tensors(model, tmp_path / str(byte), flip)
        return Fingerprint.of(folder).tensors[name] != before.tensors[name]

    assert all(changed(byte) for place in places for byte in (place, place + 63))
    assert not changed(places[1] + 64)  # as the docstring says


def packed(model: Path, target: Path, *flags: str) -> Path:
    quantize(["--model", str(model), "--output", str(target), *flags])
    return target


@pytest.mark.parametrize("form", ["qsharded", "bitsandbytes"])
def test_a_packed_checkpoint_and_its_original_are_one_base(model: Path, tmp_path: Path, form: str) -> None:
    ours = packed(model, tmp_path / "packed", "--format", form)
    assert difference(model, ours) is None
    assert difference(ours, model) is None
    assert difference(ours, packed(model, tmp_path / "fp4", "--quant-type", "fp4")) is None
    (tmp_path / "other").mkdir()
    other = write_checkpoint(tmp_path / "other", seed=1)
    for then, now in ((other, ours), (ours, other), (packed(other, tmp_path / "other-packed"), ours)):
        assert "tensors differ" in str(difference(then, now))


def test_packed_bytes_that_were_changed_belong_to_no_original(model: Path, tmp_path: Path) -> None:
    ours = packed(model, tmp_path / "packed")
    weights = load_file(ours / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] ^= 1
    save_file(weights, ours / "model.safetensors")
    with pytest.raises(ValueError, match=r"packed was changed after it was packed: .*up_proj.*qsharded_base\.json"):
        BaseIdentity.of(ours)


def test_what_bitsandbytes_packed_is_known_by_its_own_bytes_alone(model: Path, tmp_path: Path) -> None:
    theirs = pack_by_bitsandbytes(model, tmp_path / "theirs", "nf4", 64, nested=True)
    assert difference(theirs, shutil.copytree(theirs, tmp_path / "copy")) is None
    for then, now in ((model, theirs), (theirs, model), (packed(model, tmp_path / "ours"), theirs)):
        with pytest.raises(CannotTell, match="does not say which weights it was packed from"):
            difference(then, now)
    (tmp_path / "other").mkdir()
    other = pack_by_bitsandbytes(write_checkpoint(tmp_path / "other", seed=1), tmp_path / "others", "nf4", 64, True)
    assert "tensors differ" in str(difference(theirs, other))
    rotated = with_tensors(model, tmp_path / "rotated", nothing, rope_theta=5e5)
    assert "rope_theta" in str(difference(theirs, rotated))


def test_random_weights_are_known_by_seed_and_shape(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    one, same, other = (BaseIdentity.of_random(tmp_path, seed, cpu) for seed in (1, 1, 2))
    assert one.difference(same, tmp_path) is None
    write_checkpoint(tmp_path)
    assert one.difference(other, tmp_path) == "it lacks random weights (seed 1, drawn on cpu)"
    assert "lacks random weights" in str(one.difference(BaseIdentity.of(tmp_path), tmp_path))


def test_a_file_that_was_cut_off_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "cut")
    whole = (model / "model.safetensors").read_bytes()
    for size in (0, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut/model\.safetensors is damaged or incomplete"):
            BaseIdentity.of(folder)
