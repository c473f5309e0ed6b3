"""TRL's SFTTrainer trains adapters on PackedLinear layers, where it is installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import qsharded
from qsharded.integrations import peft as integration
from qsharded.integrations.peft import PackedLoraLinear
from qsharded.integrations.transformers import QShardedConfig
from qsharded.nn import PackedLinear

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

MODEL = Path(qsharded.__file__).parent / "builtin" / "model"


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    integration.install()
    yield
    integration.uninstall()


def test_two_steps_of_sft_train_the_adapters_alone(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, quantization_config=QShardedConfig())
    packed = {name: m.packed().tensors[0].clone() for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    rows = [{"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "T-A-C"}]}] * 4
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
            bf16=False, learning_rate=1e-2, save_strategy="no", logging_steps=1,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]  # both steps see the same row
    adapted = {
        n.removeprefix("base_model.model."): m
        for n, m in trainer.model.named_modules()
        if isinstance(m, PackedLoraLinear)
    }
    assert adapted.keys() == packed.keys()
    for name, layer in adapted.items():
        assert torch.equal(layer.base_layer.packed().tensors[0], packed[name])
        assert layer.lora_B["default"].weight.abs().sum() > 0
