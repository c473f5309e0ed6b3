"""The self-check at the start: it passes in every mode, and says what differs where anything does."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from qsharded import train
from qsharded.checkpoint.adapter import trainable
from qsharded.checkpoint.load import Outline
from qsharded.config import TrainConfig
from qsharded.distributed.choose_layout import SHARDED, Layout
from qsharded.distributed.fsdp import layers_of
from qsharded.distributed.layer_twin import LayerTwin
from qsharded.distributed.world import World, mesh_of, start_world
from qsharded.fused import forwards
from qsharded.lora.config import LoRAConfig
from qsharded.lora.layer import LoRALinear
from qsharded.models import CausalLM
from qsharded.training.self_check import SelfCheckFailed, self_check
from qsharded.utils.checkpointing_modes import Checkpointing
from qsharded.utils.sharding import local
from tests.checkpoints import write_checkpoint
from tests.distributed.harness import run_ranks
from tests.distributed.test_train import arguments

TOKENS = 48
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"checkpointing": "full"},
    "offloaded": {"checkpointing": "offloaded"},
    "cpu-offload": {"checkpointing": "full", "layout": Layout(on_host=True)},
    "replicated": {"layout": Layout(replicated=True)},
    "split vocabulary": {"layout": Layout(vocab_parallel=True)},
    "hsdp": {"replicas": 2},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 adapters": {"lora": LoRAConfig(r=4, dtype=torch.bfloat16)},
    "norms in full": {"lora": LoRAConfig(r=4, modules_to_save=("input_layernorm",))},
    "the second layer": {"lora": LoRAConfig(r=4, target_modules=r".*layers\.1\.mlp\..*")},
}


def world_of_ranks() -> World:
    """This rank's; it is left with the test."""
    return start_world() if torch.distributed.is_initialized() else World.single_process(torch.device("cpu"))


def built(world: World, folder: Path, mode: dict[str, Any]) -> tuple[CausalLM, LayerTwin]:
    lora, dtype = mode.get("lora", LoRAConfig(r=4, lora_dropout=0.5)), mode.get("dtype", torch.float32)
    outline = Outline.of(folder, lora, dtype, random_init=False, model_code=mode.get("code", "auto"))
    twin = LayerTwin(outline.model)
    checkpointing = Checkpointing(mode.get("checkpointing", "none"))
    mesh, layout = mesh_of(world, mode.get("replicas", 1)), mode.get("layout", SHARDED)
    return outline.filled(mesh, world.device, layout=layout, checkpointing=checkpointing, seed=0), twin


def check(world: World, model: CausalLM, twin: LayerTwin) -> str:
    """Its line, or its refusal; the model is as it was before."""
    before = {name: local(parameter).detach().clone() for name, parameter in trainable(model)}
    config = TrainConfig(model="m", dataset="d", max_length=TOKENS)
    try:
        said = self_check(config, world, model.train(), twin)
    except SelfCheckFailed as error:
        said = str(error)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
    for name, parameter in trainable(model):
        assert torch.equal(local(parameter), before[name]), name
    assert all(module.training for module in model.modules())
    return said


def lines_of(folder: Path, modes: list[dict[str, Any]]) -> list[str]:
    world = world_of_ranks()
    return [check(world, *built(world, folder, mode)) for mode in modes]


def exact(line: str, layer: int = 0) -> bool:
    return f"layer {layer} computes as its bytes unsharded: output within 0.0" in line


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), hidden_size=192, intermediate_size=320)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_mode_passes(llama: Path, world_size: int) -> None:
    left_out = {"hsdp", "replicated"} if world_size == 1 else set()
    modes = {name: mode for name, mode in MODES.items() if name not in left_out}
    ask = (llama, list(modes.values()))
    for said in run_ranks(lines_of, world_size, *ask) if world_size > 1 else [lines_of(*ask)]:
        for name, line in zip(modes, said, strict=True):
            assert ("gather probe exact" in line) == (world_size > 1), name
            if name == "bf16":
                assert "computes as its bytes unsharded: output within " in line, (name, line)
            else:
                assert exact(line, layer=int(name == "the second layer")), (name, line)


def damaged_gather(model: CausalLM) -> None:
    """FSDP2's own copies, which rewrite NaN patterns: all that this needs is another gather than ours."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(DefaultAllGather())


def on_last_rank(change: Callable[[CausalLM], None]) -> Callable[[CausalLM], None]:
    def changed(model: CausalLM) -> None:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            change(model)

    return changed


def wrong_output(model: CausalLM) -> None:
    layer = next(layers_of(model))
    forward = layer.forward
    layer.forward = lambda x, *others, **named: 1.5 * forward(x, *others, **named)


class KeepsOwn(DefaultReduceScatter):
    """This rank's gradient, where the mean over all is asked for."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])


def own_for_mean(model: CausalLM) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(KeepsOwn())


def lost_gradient(model: CausalLM) -> None:
    """Of the B of an adapter, whose layer's twin has lost it alike."""
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.base_layer.out_features == 320:  # up_proj and gate_proj
            module.__class__ = Detached


class Detached(LoRALinear):
    def update(self, x: Tensor) -> Tensor:
        narrow = nn.functional.linear(x, self.lora_A.weight)
        return nn.functional.linear(narrow, self.lora_B.weight.detach()) * self.scaling

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:  # one of its own, so that nobody fuses it
        return base_output + self.update(x)


def base_trains(model: CausalLM) -> None:
    next(layers_of(model)).get_parameter("input_layernorm.weight").requires_grad_(True)


BREAKS: dict[str, tuple[Callable[[CausalLM], None], str]] = {
    "bytes": (damaged_gather, "was computed with other bytes than its weight has"),
    "output": (on_last_rank(wrong_output), "on rank 1: the output differs by"),
    "means": (own_for_mean, "the gradient of mlp.down_proj.lora_A.weight differs by "),
    "adapter": (lost_gradient, "mlp.gate_proj.lora_B.weight trains, and has no gradient"),
    "base": (base_trains, "input_layernorm.weight is frozen, and has a gradient"),
}


def refusals(folder: Path) -> list[str]:
    world = world_of_ranks()
    return [refusal(world, folder, damage) for damage, _ in BREAKS.values()]


def refusal(world: World, folder: Path, damage: Callable[[CausalLM], None]) -> str:
    # in fp32 FSDP2 gathers bytes beside adapters of another dtype, unharmed
    model, twin = built(world, folder, {"dtype": torch.bfloat16} if damage is damaged_gather else {})
    damage(model)
    try:
        return self_check(TrainConfig(model="m", dataset="d", max_length=TOKENS), world, model, twin)
    except SelfCheckFailed as error:
        return str(error)


def test_what_is_broken_is_refused_by_all_ranks_in_the_same_words(llama: Path) -> None:
    first, second = run_ranks(refusals, 2, llama)
    assert first == second
    for (which, (_, words)), said in zip(BREAKS.items(), first, strict=True):
        assert said.startswith("self-check: layer 0 is not what it is without sharding, fusing and checkpointing"), (
            which
        )
        assert words in said, which
        assert "--self-check never" in said


@pytest.mark.parametrize("broken", [True, False])
def test_a_run_prints_one_line_or_stops_before_it_claims_its_folder(
    model: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: bool,
) -> None:
    fused = forwards.fused_forward
    if broken:
        monkeypatch.setattr(forwards, "fused_forward", lambda *given: 1.5 * fused(*given))
    words = arguments(model, dataset, tmp_path / "out", max_steps=1, eval_split=0, lora_dropout=0)
    with pytest.raises(SystemExit) if broken else contextlib.nullcontext():
        train.main(words)
    out, err = capsys.readouterr()
    lines = [line for line in (out + err).splitlines() if "self-check: " in line]
    assert len(lines) == 1
    assert lines[0].startswith("qsharded.train: error: self-check: layer 0 is not" if broken else "self-check: layer 0")
    assert (tmp_path / "out" / "run.json").exists() != broken
    if broken:
        train.main([*words, "--self-check", "never"])
        assert "self-check: left out (--self-check never)" in capsys.readouterr().out
