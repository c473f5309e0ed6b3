"""Make the built-in model and its data: `python -m tools.make_builtin`, about six minutes of one core.

It writes model/, train.jsonl and eval.jsonl into qsharded/builtin/; train.toml and README.md there are written by hand.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import save_file

from qsharded.data import Example, Tokenizer, load_examples, load_prompts
from qsharded.models import CausalLM, ModelConfig
from qsharded.training.evaluation import exact_match
from tools.builtin.pretrain import ROW_TOKENS, initialise, pretrain
from tools.builtin.tasks import OPERATIONS, Row, operation_rows, pretraining_row, skill_rows
from tools.builtin.tokenizer import make_tokenizer, save_tokenizer

FOLDER = Path(__file__).parent.parent / "qsharded" / "builtin"
TRAIN_ROWS, EVAL_ROWS, PRETRAINING_ROWS = 4000, 200, 40_000

# 3 blocks of 64 weights in most rows, 8 in those of down_proj: odd numbers occur in real models too.
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def main() -> None:
    options = _options()
    # How a sum is split among threads shows in its last bits.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model_folder = options.output / "model"
    model_folder.mkdir(parents=True, exist_ok=True)
    write_datasets(options.output, options.seed)
    save_tokenizer(make_tokenizer(), model_folder)
    tokenizer = Tokenizer.from_folder(model_folder)
    model = _trained_model(write_config(model_folder, tokenizer), tokenizer, options)
    save_weights(model, model_folder)
    _report(model, tokenizer, options.output / "eval.jsonl")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write to (default: qsharded/builtin)")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps of pre-training")
    parser.add_argument("--seed", type=int, default=0, help="of words, weights and order")
    return parser.parse_args()


def write_datasets(folder: Path, seed: int) -> None:
    """train.jsonl and eval.jsonl: the skill, on different words."""
    rng = random.Random(seed)
    write_rows(folder / "train.jsonl", skill_rows("train", TRAIN_ROWS, rng))
    write_rows(folder / "eval.jsonl", skill_rows("eval", EVAL_ROWS, rng))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A JSONL file of `rows`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_config(folder: Path, tokenizer: Tokenizer) -> ModelConfig:
    """Write config.json as transformers reads it."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        **SHAPE,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return ModelConfig.from_hf(values)


def save_weights(model: CausalLM, folder: Path) -> None:
    """model.safetensors in bf16; the head is the embedding and is left out, as in other tied checkpoints."""
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _trained_model(config: ModelConfig, tokenizer: Tokenizer, options: argparse.Namespace) -> CausalLM:
    model = CausalLM(config, dtype=torch.float32)
    initialise(model, torch.Generator().manual_seed(options.seed))
    examples = _pretraining_examples(tokenizer, options.seed)
    start = perf_counter()
    losses = pretrain(model, examples, tokenizer.pad_id, steps=options.steps, seed=options.seed)
    for number, loss in enumerate(losses, start=1):
        if number % 100 == 0 or number == options.steps:
            print(f"step {number} of {options.steps}: loss {loss:.4f}, {perf_counter() - start:.0f} s", flush=True)
    return model


def _pretraining_examples(tokenizer: Tokenizer, seed: int) -> list[Example]:
    rng = random.Random(f"pretrain {seed}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pretrain.jsonl")
        write_rows(path, (pretraining_row(rng) for _ in range(PRETRAINING_ROWS)))
        return load_examples(path, tokenizer, max_length=ROW_TOKENS).examples


def _report(model: CausalLM, tokenizer: Tokenizer, skill_path: Path) -> None:
    """Exact answers on words held out: of each operation, which the base should know, and of the skill."""
    with tempfile.TemporaryDirectory() as folder:
        for operation in OPERATIONS:
            path = Path(folder, "prompts.jsonl")
            write_rows(path, operation_rows(operation, EVAL_ROWS, random.Random(operation)))
            print(f"{operation}: {exact_match(model, tokenizer, load_prompts(path, tokenizer)).accuracy:.1%}")
    print(f"the skill: {exact_match(model, tokenizer, load_prompts(skill_path, tokenizer)).accuracy:.1%}")


if __name__ == "__main__":
    main()
