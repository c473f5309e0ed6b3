"""``qsharded.inspect``: sound folders of every format pass, and each kind of damage is named."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qsharded import inspect
from qsharded.checkpoint.files import FileRecord
from qsharded.checkpoint.manifest import Manifest, write_manifest
from qsharded.checkpoint.report import inspect_path
from qsharded.quant import formats
from tests.adapters import write_adapter
from tests.checkpoints import packed_by_bitsandbytes, write_checkpoint

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as leave:
        inspect.main([str(path)])
    return leave.value.code, capsys.readouterr().out


def change(file: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def pack(folder: Path, packed: Callable[[str, Tensor], dict[str, Tensor]], method: str) -> Path:
    """Put packed weights in the place of every projection."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors.update(packed(name, tensors.pop(name)))

    change(folder / "model.safetensors", edit)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"quantization_config": {"quant_method": method}}))
    return folder


def by_us(name: str, weight: Tensor, nested: bool = True) -> dict[str, Tensor]:
    w = formats.quantize(weight, double_quant=nested)
    if not nested:
        return {name: w.codes, f"{name}_absmax": w.absmax.view(torch.uint8)}
    return {
        name: w.codes,
        f"{name}_absmax": w.absmax_codes,
        f"{name}_absmax_scales": w.absmax_scales,
        f"{name}_absmax_offset": w.absmax_offset,
    }


def by_bitsandbytes(name: str, weight: Tensor, nested: bool = True, storage: torch.dtype = torch.uint8) -> dict:
    return packed_by_bitsandbytes(name, weight, "nf4", 64, nested, storage)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_sound_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], shards: int) -> None:
    write_checkpoint(tmp_path, shards=shards, tie_word_embeddings=False)
    status, text = inspected(tmp_path, capsys)
    assert status == 0
    assert text.endswith("sound\n")
    assert "Hugging Face checkpoint of a llama, in bfloat16" in text
    linear = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 192) * 2
    assert f"linear weights {linear:,}" in " ".join(text.split())
    assert f"embedding and head {2 * 97 * 128 * 2:,}" in " ".join(text.split())
    for file in tmp_path.glob("*.safetensors"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in text


def test_sound_packed_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writers = {
        "ours": (by_us, "qsharded"),
        "ours-plain": (lambda name, w: by_us(name, w, nested=False), "qsharded"),
        "nested": (by_bitsandbytes, "bitsandbytes"),
        "plain": (lambda name, w: by_bitsandbytes(name, w, nested=False), "bitsandbytes"),
        "bf16": (lambda name, w: by_bitsandbytes(name, w, storage=torch.bfloat16), "bitsandbytes"),
    }
    for name, (packed, method) in writers.items():
        (tmp_path / name).mkdir()
        folder = pack(write_checkpoint(tmp_path / name), packed, method)
        status, text = inspected(folder, capsys)
        assert status == 0, text
        assert f"packed by {method}" in text
        codes = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 192) // 2
        assert f"codes {codes:,}" in " ".join(text.split()), name


def remove(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def spoil(name: str, place: int = 3) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].view(-1).__setitem__(place, torch.nan)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (spoil(WEIGHT), f"{WEIGHT} holds nan at [0, 3]"),
        (remove(WEIGHT), f"{WEIGHT} is missing"),
        (put("model.layers.7.mlp.up_proj.weight", torch.ones(2)), "model.layers.7.mlp.up_proj.weight has no place"),
        (put(WEIGHT, torch.ones(192, 64)), f"{WEIGHT} is [192, 64], config.json asks for [192, 128]"),
        (put(WEIGHT, torch.ones(192, 128, dtype=torch.int8)), f"{WEIGHT} is I8, must be BF16 or F16 or F32"),
    ],
)
def test_the_first_bad_tensor_of_a_model_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edit: Callable[[dict[str, Tensor]], None],
    complaint: str,
) -> None:
    change(write_checkpoint(tmp_path) / "model.safetensors", edit)
    status, text = inspected(tmp_path, capsys)
    assert status == 1
    assert f"DAMAGED: {complaint}" in text or f"DAMAGED: model.safetensors: {complaint}" in text


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (remove(f"{WEIGHT}_absmax"), f"{WEIGHT}_absmax is missing"),
        (put(WEIGHT, torch.ones(192, 32, dtype=torch.uint8)), f"{WEIGHT} is [192, 32], config.json asks for [192, 64]"),
        (spoil(f"{WEIGHT}_absmax_scales", 1), f"model.safetensors: {WEIGHT}_absmax_scales holds nan at [1]"),
    ],
)
def test_the_first_bad_tensor_of_a_packed_model_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[dict[str, Tensor]], None], complaint: str
) -> None:
    change(pack(write_checkpoint(tmp_path), by_us, "qsharded") / "model.safetensors", edit)
    status, text = inspected(tmp_path, capsys)
    assert status == 1
    assert f"DAMAGED: {complaint}" in text


def test_files_and_index_that_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, shards=3)
    index = tmp_path / "model.safetensors.index.json"
    read = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": read["weight_map"] | {"ghost": "model-00001-of-00003.safetensors"}}))
    assert "DAMAGED: model.safetensors.index.json names ghost, which no file holds" in inspected(tmp_path, capsys)[1]
    index.write_text(json.dumps(read))
    cut = tmp_path / "model-00002-of-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert "is cut off" in inspected(tmp_path, capsys)[1]
    cut.write_bytes(cut.read_bytes()[:4])
    text = inspected(tmp_path, capsys)[1]
    assert "DAMAGED: model-00002-of-00003.safetensors is no safetensors file or cut off" in text
    assert "is missing" not in text
    cut.unlink()
    assert "DAMAGED: model-00002-of-00003.safetensors is missing" in inspected(tmp_path, capsys)[1]


def test_a_model_that_is_not_ours_to_train_is_read_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"model_type": "no_such_model"}))
    status, text = inspected(tmp_path, capsys)
    assert status == 0
    assert "note: names and shapes were not checked" in text
    change(tmp_path / "model.safetensors", spoil(WEIGHT))
    assert inspected(tmp_path, capsys)[0] == 1


def test_the_hubs_cache_vouches_for_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    blob = tmp_path / hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(blob)
    file.symlink_to(blob)
    assert "as the Hub's cache says" in inspected(tmp_path, capsys)[1]
    blob.write_bytes(blob.read_bytes()[:-2] + b"ab")
    status, text = inspected(tmp_path, capsys)
    assert status == 1
    assert "DAMAGED: model.safetensors is damaged: its SHA-256 is" in text


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), write_checkpoint(tmp_path_factory.mktemp("base")))


def copied(adapter: Path, to: Path) -> Path:
    to.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (to / name).write_bytes((adapter / name).read_bytes())
    return to


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (spoil(A), f"adapter_model.safetensors: {A} holds nan at [0, 3]"),
        (remove(A), f"{A.replace('lora_A', 'lora_B')} has no lora_A beside it"),
        (put(A, torch.ones(3, 128)), "lora_A is [3, 128], lora_B [128, 4], adapter_config.json gives rank 4"),
    ],
)
def test_adapters(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    adapter: Path,
    edit: Callable[[dict[str, Tensor]], None],
    complaint: str,
) -> None:
    folder = copied(adapter, tmp_path)
    status, text = inspected(folder, capsys)
    assert status == 0, text
    # q_proj 128x128 and down_proj 128x192 of two layers, rank 4, fp32 (as PEFT keeps what trains)
    assert f"adapters {2 * 4 * (128 + 128 + 192 + 128) * 4:,}" in " ".join(text.split())
    change(folder / "adapter_model.safetensors", edit)
    status, text = inspected(folder, capsys)
    assert status == 1
    assert complaint in text


def test_an_adapter_whose_configuration_is_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path
) -> None:
    config = copied(adapter, tmp_path) / "adapter_config.json"
    config.write_text(config.read_text()[:-5])
    status, text = inspected(tmp_path, capsys)
    assert status == 1
    assert "adapter_config.json is not valid JSON" in text


def write_training_checkpoint(folder: Path, adapter: Path) -> Path:
    """The files of one, and a manifest of their hashes."""
    copied(adapter, folder / "adapter")
    state = {f"{A}:exp_avg": torch.zeros(4, 128), f"{A}:exp_avg_sq": torch.ones(4, 128), f"{A}:step": torch.tensor(3.0)}
    save_file(state, folder / "optimizer-00000-of-00001.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": 3}))
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    write_manifest(folder, Manifest(3, 1, {name: record((folder / name).read_bytes()) for name in names}))
    return folder


def record(content: bytes) -> FileRecord:
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def test_a_sound_training_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: Path) -> None:
    status, text = inspected(write_training_checkpoint(tmp_path, adapter), capsys)
    assert status == 0, text
    assert "training checkpoint of step 3" in text
    assert f"optimizer: exp_avg_sq {4 * 128 * 4:,}" in " ".join(text.split())
    assert text.count("as manifest.json says") == 4


def damage_state(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps({"step": 4}))


def damage_optimizer(folder: Path) -> None:
    change(folder / "optimizer-00000-of-00001.safetensors", spoil(f"{A}:exp_avg"))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (damage_state, "state.json is damaged: its size or SHA-256 is not the one in manifest.json"),
        (damage_optimizer, f"optimizer-00000-of-00001.safetensors: {A}:exp_avg holds nan at [0, 3]"),
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "manifest.json is missing: the checkpoint was not written",
        ),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json is damaged: its format is not"),
        (
            lambda folder: (folder / "optimizer-00000-of-00001.safetensors").unlink(),
            "optimizer-00000-of-00001.safetensors is missing, manifest.json names it",
        ),
    ],
)
def test_a_damaged_training_checkpoint(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    adapter: Path,
    damage: Callable[[Path], None],
    complaint: str,
) -> None:
    damage(write_training_checkpoint(tmp_path, adapter))
    status, text = inspected(tmp_path, capsys)
    assert status == 1
    assert any(complaint in line for line in text.splitlines() if line.startswith("DAMAGED: "))


def test_paths_that_hold_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, complaint in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "holds no model, adapter or")):
        with pytest.raises(SystemExit) as leave:
            inspect.main(["--path", str(path)])
        assert leave.value.code == 1
        assert complaint in capsys.readouterr().err
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match=r"did you mean .*adapter\?"):
        inspect_path(tmp_path)


def test_a_file_alone(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3), "y": torch.zeros(2, 2, dtype=torch.int64)}, tmp_path / "a.safetensors")
    assert inspect_path(tmp_path / "a.safetensors").classes == {"F32": 12, "I64": 32}


def test_a_packed_file_alone(tmp_path: Path) -> None:
    nan = torch.full((64, 64), 0x7FFF, dtype=torch.int16).view(torch.bfloat16)  # as numbers; as codes nothing amiss
    tensors = {WEIGHT: nan, f"{WEIGHT}_absmax": torch.zeros(64, 4, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    assert inspect_path(tmp_path / "model-00001-of-00002.safetensors").problems == []
    save_file({WEIGHT: nan}, tmp_path / "plain.safetensors")
    assert len(inspect_path(tmp_path / "plain.safetensors").problems) == 1


def test_what_a_packed_checkpoint_keeps_in_16_bits_is_told(tmp_path: Path) -> None:
    """A layer of 100 columns, and experts in one tensor, of a model that transformers alone reads."""
    weights = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 8, 64, dtype=torch.bfloat16),
        "model.layers.0.odd.weight": torch.zeros(4, 100, dtype=torch.bfloat16),
        "model.layers.0.q_proj.weight": torch.zeros(8, 32, dtype=torch.uint8),
        "model.layers.0.q_proj.weight_absmax": torch.zeros(8, 4, dtype=torch.uint8),
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"model_type": "mixtral", "quantization_config": {"quant_method": "qsharded"}}'
    )
    report = inspect_path(tmp_path)
    assert report.classes["experts in one tensor"] == 2 * 8 * 64 * 2
    total = 2048 + 800 + 256 + 32
    expected = f"of {total:,} bytes 2,848 are not packed: 800 of linear weights and 2,048 of experts in one tensor"
    assert expected in report.notes
