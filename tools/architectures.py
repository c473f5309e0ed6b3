"""What README and docs/models.md say of models that transformers' code computes: the list that the tests go through."""

import re

from tests.models.architecture_list import ARCHITECTURES, Architecture

_IN_README = re.compile(r"(<!-- architectures, by tools/architectures.py -->).*?(<!-- end -->)", re.DOTALL)
_HEAD = """## Through transformers' code

Any other causal language model of transformers runs by that library's own modelling code, with `pip install
'qsharded[transformers]'`: its modules with our packed linear layers and experts, loader, sharding, adapters and loss. A
line says so when a run starts; `--model-code transformers` takes this road for the native families too, and
`--model-code native` refuses it. Code that a checkpoint brings along is never run.

A training step of the same small model by both codes, on two CPU cores: [ours makes 1.04 (Llama), 1.02 (Qwen3) and 0.93
(Gemma 3) times the tokens/s](../benchmarks/results/model_code_cpu.json) of transformers' (`python -m
benchmarks.model_code`; `--shapes llama3-8b` on a GPU).

These are held to transformers and PEFT in `tests/distributed/test_architectures.py`, on one rank and on two: logits,
loss and the adapters' gradients within 1e-5 of each tensor's largest value in fp32, on the same packed weights. Others
run by the same code, and are refused by name where it does not fit them.

| architecture | `model_type` | `--packing` |
|---|---|---|
"""
_TAIL = """
- **Built** on the meta device from config.json alone
  ([qsharded/models/transformers_code](../qsharded/models/transformers_code)). Linear layers become
  packed ones, but for the head, and for those whose weight the model's code reads itself (Mamba's output projections):
  these are not adapted either. Experts become ours, packed and with adapters, where [their layout is
  known](mixtures-of-experts.md#through-transformers-code). Others (Llama 4's) and convolutions stay in 16 bits; a
  warning counts them, and so does the plan ("not quantized").
- **Read** by our loader: each rank reads its own rows, and no tensor is whole in 16 bits on any, but for one expert at
  a time where they are turned around. transformers' rules for renamed tensors and stacked experts are followed; a
  tensor whose layout it changes otherwise is refused by name. Tensors that the model's class ignores (`mtp.*`, say) are
  ignored, and `merge` carries them through.
- **Buffers** that no checkpoint holds, such as rotary frequencies, are initialised by the model's own code; one that it
  leaves unset is refused.
- **The loss** comes from hidden states, a chunk of logits at a time. What the model's forward does around its head is
  found by running it with stand-ins: nothing, a factor (Cohere's scale) or a soft-cap goes to our chunked loss,
  anything else (Phi's bias) runs in the model's own code, chunk by chunk.
- **Attention** is ours where the model's code supports FlashAttention: it then leaves masks to the attention function.
  Others (Llama 4's chunks) run PyTorch's with transformers' masks, which take memory in the square of the length.
- **Packing** is tried once the weights are there: the derivatives of one document's logits by another's embeddings must
  be zero to the last bit. A model whose layers carry a state or a convolution on is refused `--packing` by name.
- **Plans** run the model's own code on the meta device, one layer of each kind.
- Dropout that the model's config.json asks for is applied in training, as its code does.
"""


def section() -> str:
    """Of docs/models.md."""
    rows = (_row(model_type, architecture) for model_type, architecture in ARCHITECTURES.items())
    return _HEAD + "".join(rows) + _TAIL


def _row(model_type: str, architecture: Architecture) -> str:
    packing = "yes" if architecture.packs else "refused: layers carry something across documents"
    native = ", native too" if architecture.is_native else ""
    return f"| {architecture.title}{native} | `{model_type}` | {packing} |\n"


def in_readme(readme: str) -> str:
    """README with the architectures' names put in."""
    titles = ", ".join(architecture.title for architecture in ARCHITECTURES.values() if not architecture.is_native)
    return _IN_README.sub(rf"\g<1>{titles}\g<2>", readme)
