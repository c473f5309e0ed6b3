"""What :mod:`benchmarks.data` works on: files of conversations of made-up words, and a tokenizer for them."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from random import Random

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.data.published import QWEN3

FILES, SMALL = 20, 1000
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 16_000


def prepare(folder: Path, rows: int) -> None:
    """Rows, a thousand rows, and a tokenizer; nothing where they are there."""
    if (folder / "model").is_dir():
        return
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    made_up_sentences()  # here, for all processes that are forked
    files = [(folder / "rows" / f"{number}.jsonl", rows // FILES, number) for number in range(FILES)]
    with multiprocessing.get_context("fork").Pool(min(FILES, len(os.sched_getaffinity(0)))) as pool:
        pool.starmap(write_rows, [*files, (folder / "small.jsonl", SMALL, FILES)], chunksize=1)
    write_tokenizer(folder)


def write_rows(path: Path, count: int, seed: int) -> None:
    """Conversations of one to four turns and some 340 tokens, of words that come as often as words do (Zipf)."""
    random = Random(seed)
    sentences = made_up_sentences()
    with path.open("w") as file:
        for _ in range(count):
            said = [
                " ".join(random.choices(sentences, k=random.randint(1, 7))) for _ in range(2 * random.randint(1, 4))
            ]
            messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
            file.write(json.dumps({"messages": messages}) + "\n")


@cache
def made_up_sentences() -> list[str]:
    """Of words of one to four syllables."""
    random = Random("words")
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "ou")]
    words = sorted({"".join(random.choices(syllables, k=random.randint(1, 4))) for _ in range(30_000)})
    weights = [*accumulate(1 / (rank + 3) for rank in range(len(words)))]
    random.shuffle(words)
    return [" ".join(random.choices(words, cum_weights=weights, k=random.randint(4, 20))) + "." for _ in range(50_000)]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE, trained on the small file."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=SPECIAL)
    tokenizer.train_from_iterator((text for text in islice(_contents(folder / "small.jsonl"), 4000)), trainer)
    (folder / "model").mkdir()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[-1], "chat_template": QWEN3}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings))


def _contents(path: Path) -> Iterator[str]:
    for line in path.open():
        yield from (message["content"] for message in json.loads(line)["messages"])
