"""The lines that train the built-in model, or one of its size: what is asked of them is that they are right."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks import resume
from benchmarks.gpu_training import BUILTIN, LLAMA3, shape_options
from benchmarks.launch import flags_of, torchrun
from benchmarks.two_gpus.runner import Found, marked, own_mark
from qsharded.checkpoint.load import skeleton
from qsharded.distributed.vocab_parallel import is_large
from qsharded.models import ModelConfig
from qsharded.report.run_files import read_metrics

RANKS = 2
LEAST_EXACT = 0.99
# bf16 sums in another order move losses of these runs by up to 3e-4 and norms by 2e-3 (two ranks against one on a CPU,
# 8 steps); a row left out or counted twice of the 16 of a step moves both by percents, a wrong mean the norm by half.
LOSS_GAP, NORM_GAP = 1e-3, 1e-2
STEPS, ROWS_A_STEP, SAVED_AT = 8, 16, 4
SMALL: dict[str, Any] = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 2e-4,  # small, so that training does not carry differences on
    "save_steps": 0,
    "per_device_train_batch_size": 4,
}
UNEVALUATED: dict[str, Any] = {"eval_dataset": "", "exact_match_dataset": ""}
# embedding and head of 279 MB in bf16: large enough to be split
LARGE_VOCABULARY = LLAMA3 | {
    "hidden_size": 1088,
    "intermediate_size": 2176,
    "num_hidden_layers": 2,
    "num_attention_heads": 17,
    "num_key_value_heads": 1,
}
LENGTH = 256 if torch.cuda.is_available() else 16  # tokens of its rows
KILLED_AFTER, ENDED_WITHIN_S = 5, 60.0
PROMPTS = 12


def train(output: Path, ranks: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that the trainer's command logged."""
    subprocess.run(torchrun(ranks, "qsharded.train", flags_of(options | {"output_dir": output})), check=True)
    return read_metrics(output / "metrics.jsonl")


def small(ranks: int) -> dict[str, Any]:
    """A few steps of the built-in run, with as many rows a step for any number of ranks."""
    rows = SMALL["per_device_train_batch_size"] * ranks
    return SMALL | UNEVALUATED | {"gradient_accumulation_steps": ROWS_A_STEP // rows}


def built_in_run(folder: Path) -> Found:
    rows = train(folder / "builtin", RANKS, {})
    before, after = [row["exact_match"] for row in rows if "exact_match" in row]
    missed = [f"exact match {after:.1%}"] if after < LEAST_EXACT else []
    return Found({"exact_match_before": before, "exact_match_after": after}, missed)


def reference(folder: Path) -> Found:
    rows = train(folder / "reference", 1, small(1))
    return Found({"losses": [row["loss"] for row in rows]})


def mode(folder: Path, name: str, options: dict[str, Any]) -> Found:
    """A sharding mode against the reference."""
    rows = train(folder / name, RANKS, small(RANKS) | options)
    return as_expected(rows, read_metrics(folder / "reference" / "metrics.jsonl"))


def vocab_parallel(folder: Path) -> Found:
    own = folder / "split"
    assert is_large(skeleton(ModelConfig.from_hf(LARGE_VOCABULARY), None, torch.bfloat16)), "it would not be split"
    shape = shape_options(LARGE_VOCABULARY, own / "data", STEPS * ROWS_A_STEP, LENGTH) | {"random_init": True}
    one, two = [train(own / f"{ranks}", ranks, small(ranks) | shape) for ranks in (1, RANKS)]
    return as_expected(two, one)


def as_expected(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> Found:
    """How far losses and gradients lie from those of one GPU."""
    came, missed = {}, []
    for key, bound in (("loss", LOSS_GAP), ("grad_norm", NORM_GAP)):
        gaps = [abs(row[key] / other[key] - 1) for row, other in zip(rows, expected, strict=True)]
        came[f"largest_{key}_gap"] = max(gaps)
        if not all(gap <= bound for gap in gaps):  # NaN is not
            missed.append(key)
    return Found(came, missed)


def resumed(folder: Path) -> Found:
    run = resume.measure(folder / "resumed", "builtin", RANKS)
    missed = [key for key in ("losses_equal", "adapters_equal") if run[key] is not True]
    return Found({key: run[key] for key in ("losses_equal", "adapters_equal", "killed_at_step")}, missed)


def resumed_on_one(folder: Path) -> Found:
    own = folder / "on-one"
    whole = train(own / "two", RANKS, small(RANKS) | {"save_steps": SAVED_AT})
    checkpoint = own / "two" / "checkpoints" / f"step-{SAVED_AT:06}"
    rest = train(own / "one", 1, small(1) | {"resume_from_checkpoint": checkpoint})
    assert [row["step"] for row in rest] == list(range(SAVED_AT + 1, STEPS + 1))
    return as_expected(rest, whole[SAVED_AT:])


def generated(folder: Path) -> Found:
    rows = [json.loads(line)["messages"] for line in (BUILTIN / "eval.jsonl").read_text().splitlines()[:PROMPTS]]
    flags = flags_of({"model": BUILTIN / "model", "adapter": adapter(folder), "max_new_tokens": 32})
    flags += [f"--prompt={question['content']}" for question, _ in rows]
    one, two = [
        subprocess.run(torchrun(ranks, "qsharded.generate", flags), check=True, stdout=subprocess.PIPE).stdout.decode()
        for ranks in (1, RANKS)
    ]
    right = sum(answer["content"] in two.splitlines() for _, answer in rows)
    came = {"prompts": PROMPTS, "answered_right": right, "same": two == one}
    return Found(came, [] if two == one and len(two.splitlines()) >= PROMPTS else [f"one GPU: {one!r}, two: {two!r}"])


def merged(folder: Path) -> Found:
    flags = flags_of({"model": BUILTIN / "model", "adapter": adapter(folder), "output": folder / "merged"})
    subprocess.run([sys.executable, "-m", "qsharded.merge", *flags], check=True)
    inspected = subprocess.run([sys.executable, "-m", "qsharded.inspect", str(folder / "merged")], check=False)
    sums = _merge_error(folder)
    came = {"inspect_found": "a problem" if inspected.returncode else "nothing"} | sums
    missed = ["inspect"] * bool(inspected.returncode) + ["sums"] * bool(sums["wrong_weights"])
    return Found(came, missed + ["no layer changed"] * (not sums["layers_changed"]))


def _merge_error(folder: Path) -> dict[str, int]:
    """Weights that are not W + alpha / r B A, to one unit in the last place of bf16."""
    config = json.loads((adapter(folder) / "adapter_config.json").read_text())
    scale, wrong, changed = config["lora_alpha"] / config["r"], 0, 0
    files = [BUILTIN / "model", adapter(folder), folder / "merged"]
    base, lora, sums = [_tensors(file) for file in files]
    for name, weight in base.items():
        prefix = "base_model.model." + name.removesuffix(".weight")
        a, b = (lora.get(f"{prefix}.lora_{side}.weight") for side in "AB")
        update = 0 if a is None or b is None else scale * (b.double() @ a.double())
        expected = weight.double() + update
        bound = expected.abs() * 2**-7 + 1e-6  # what is left of fp32's error where W and the update cancel
        wrong += int(((sums[name].double() - expected).abs() > bound).sum())
        changed += int(not torch.equal(sums[name], weight))
    return {"wrong_weights": wrong, "layers_changed": changed}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping


def adapter(folder: Path) -> Path:
    """Of the built-in run."""
    path = folder / "builtin" / "adapter"
    assert path.is_dir(), "the built-in run has left no adapter"
    return path


def doctor(folder: Path) -> Found:
    done = subprocess.run([sys.executable, "-m", "qsharded.doctor"], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    broken = [line for line in done.stdout.splitlines() if line.startswith("BROKEN")]
    return Found({"exit_status": done.returncode}, broken or ["exit status"] * bool(done.returncode))


def optimizer_test(folder: Path) -> Found:
    chosen = ["-m", "gpu"] if torch.cuda.is_available() else ["-k", "steps_of_one_process", "-m", "not gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/distributed/test_optim.py"]
    done = subprocess.run([*command, *chosen], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    summary = done.stdout.strip().splitlines()[-1]
    missed = [] if not done.returncode and re.match(r"\d+ passed", summary) and "skipped" not in summary else [summary]
    return Found({"pytest": summary}, missed)


def gather(folder: Path) -> Found:
    record = folder / "gather.json"
    subprocess.run(torchrun(RANKS, "benchmarks.gather", ["--record", str(record)]), check=False)
    probe = json.loads(record.read_text())
    damaged = {key: probe[key]["modes_damaged"] for key in ("exact_gather", "streamed_from_host", "plain_fully_shard")}
    missed = [key for key in ("exact_gather", "streamed_from_host") if damaged[key]]
    if torch.cuda.is_available() and not damaged["plain_fully_shard"]:
        missed.append("plain_fully_shard: the probe sees no damage where it is known to be")
    return Found({"wire": probe["wire"], "modes": probe["modes"]} | damaged, missed)


def one_dies(folder: Path) -> Found:
    output, log = folder / "dies", folder / "dies.txt"
    options = SMALL | UNEVALUATED | {"max_steps": 10**6, "output_dir": output}
    with log.open("wb") as out:
        run = subprocess.Popen(torchrun(RANKS, "qsharded.train", flags_of(options)), stdout=out, stderr=out)
        while len(resume.losses(output)) < KILLED_AFTER:
            assert run.poll() is None, log.read_text()
            time.sleep(0.1)
        for pid in marked(own_mark(), "RANK=1"):
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        status = run.wait()
    seconds = time.monotonic() - killed
    text = log.read_text()
    print(text)
    # torchrun reports the rank that was killed; the other may say that it lost it, in one line
    tracebacks, lines = [len(re.findall(said, text, re.M)) for said in (r"^\[rank\d+\]: *Traceback", r": error\b.*: ")]
    found = {"ended_after_s": round(seconds, 1), "exit_status": status, "tracebacks": tracebacks, "error_lines": lines}
    missed = ["its end"] * (seconds > ENDED_WITHIN_S) + ["exit status"] * (not status)
    is_one_cause = text.count("Signal 9 (SIGKILL)") == 1 and not tracebacks and lines <= 1
    return Found(found, missed + ["one cause"] * (not is_one_cause))
