"""tokens/s of the same model by our code and by transformers', a training step of each.

    python -m benchmarks.model_code [--shapes llama qwen3 gemma3] [--rounds 3] [--record FILE]

Small shapes of three families, so that a CPU will do; on a GPU, ``--shapes llama3-8b``. The two take turns, each in a
process of its own, and the medians of the rounds are kept: a machine at other work slows both.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_training import SHAPES
from benchmarks.record import command, environment, write
from benchmarks.train_step.__main__ import figures, run
from benchmarks.train_step.case import Case

_SMALL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_theta": 10000.0},
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 64,
        "query_pre_attn_scalar": 64,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
CASES = {name: Case(name, _SMALL | family, rows=2, length=256, steps=5) for name, family in _FAMILIES.items()}
CASES["llama3-8b"] = Case("llama3-8b", SHAPES["llama3-8b"])
CODES = ("native", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=CASES, default=list(_FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    rows = [measure(CASES[name], given.rounds) for name in given.shapes]
    for row in rows:
        print(json.dumps(row), flush=True)
    if given.record:
        write(given.record, environment() | {"command": command("benchmarks.model_code"), "rows": rows})


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """The median tokens/s of each code, and how much faster ours is.

    Raises:
        RuntimeError: a run failed; with its last line.
    """
    found: dict[str, list[float]] = {code: [] for code in CODES}
    for _ in range(rounds):
        for code in CODES:
            result = figures(case, run("qsharded", replace(case, model_code=code), ""))
            if "failed" in result:
                raise RuntimeError(f"{case.name} by {code}'s code: {result['failed']}")
            found[code].append(result["tokens_per_second"])
    medians = {code: round(statistics.median(values), 1) for code, values in found.items()}
    ratio = round(medians["native"] / medians["transformers"], 3)
    return {"shape": case.name, "tokens": case.tokens, "tokens_per_second": medians, "native_over_transformers": ratio}


if __name__ == "__main__":
    main()
