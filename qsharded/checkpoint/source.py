"""Where weights come from: a Hugging Face checkpoint read row by row, or random numbers of the same shapes."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qsharded.seeds import derived_seed

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DOWNLOADED = ["*.json", "*.jinja", "tokenizer.model"]
_NOT_DOWNLOADED = ["consolidated*.safetensors", "original/*"]  # the same weights once more, in their makers' formats
# What old checkpoints store though config.json gives it: the rotary frequencies, and a tied head beside its embedding.
# (An untied head is among the model's own tensors.)
RECOMPUTED = (".rotary_emb.inv_freq", "lm_head.weight")
_READABLE = {"F32", "F16", "BF16"}


class WeightSource(Protocol):
    """Named tensors of which any run of rows can be read alone."""

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the tensors are just these, of these shapes."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor, on the CPU in the dtype it is stored in."""


def find_checkpoint(path_or_id: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or a Hub repository's snapshot, downloaded if need be.

    Args:
        path_or_id: a folder, or a Hub id.
        revision: of a Hub id.
        weights: whether the weights are downloaded too, or only what describes the model and its tokenizer.

    Raises:
        ValueError: neither a folder nor the form of a Hub id, a revision given for a folder, or the Hub's refusal.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for Hub ids, but {folder} is a folder")
        return folder
    if str(path_or_id).count("/") != 1 or str(path_or_id).startswith((".", "/", "~")):
        raise ValueError(f"{path_or_id} is neither a folder nor a Hub id such as meta-llama/Llama-3.1-8B")
    import huggingface_hub  # here: a local folder needs no Hub client

    wanted = [*_DOWNLOADED, "*.safetensors"] if weights else _DOWNLOADED
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(path_or_id), revision=revision, allow_patterns=wanted, ignore_patterns=_NOT_DOWNLOADED
            )
        )
    except Exception as error:  # of HTTP, of the connection, of the id: its kinds change with the client's versions
        raise ValueError(f"{path_or_id} is no local folder, and the Hub did not give it: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ValueError: missing, not JSON, or not an object; the message names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


@dataclass(frozen=True)
class SafetensorsFolder:
    """The safetensors of a checkpoint folder, one file or an index of shards; no file is read beyond what is asked."""

    folder: Path

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        if (self.folder / _INDEX).exists():
            return self._read_index()
        path = self.folder / _SINGLE
        if not path.exists():
            raise ValueError(f"{self.folder} holds neither {_SINGLE} nor {_INDEX}")
        return dict.fromkeys(self._open(path).keys(), path)

    def _read_index(self) -> dict[str, Path]:
        weight_map = read_json(self.folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{self.folder / _INDEX} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str):
                raise ValueError(f"{self.folder / _INDEX}: weight_map must name a file for {name}, got {file!r}")
        files = {file: self._inside(file) for file in set(weight_map.values())}
        held = {file: set(self._open(path).keys()) for file, path in files.items()}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise ValueError(f"{_INDEX} places {name} in {file}, which does not hold it")
        return {name: files[file] for name, file in weight_map.items()}

    def _inside(self, file: str) -> Path:
        """The path of an index entry. By its words, not resolved: the Hub's cache is made of links."""
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file or parts.suffix != ".safetensors":
            raise ValueError(f"{self.folder / _INDEX} points outside its folder: {file!r}")
        if not (self.folder / parts).is_file():
            raise ValueError(f"{_INDEX} names {file}, which is missing from {self.folder}")
        return self.folder / parts

    @cached_property
    def _opened(self) -> dict[Path, Any]:
        return {}

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            try:
                self._opened[path] = safe_open(path, framework="pt").__enter__()
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or incomplete: {error}") from None
        return self._opened[path]

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the file's header gives."""
        return tuple(self._slice(name).get_shape())

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._file_of[name]

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the tensors are just these, of these shapes and a readable dtype."""
        _refuse(shapes.keys() - self._file_of.keys(), f"{self.folder} lacks")
        surplus = [name for name in self._file_of.keys() - shapes.keys() if not name.endswith(RECOMPUTED)]
        _refuse(surplus, f"{self.folder} holds tensors that the model has no place for:")
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise ValueError(f"{self.file_of(name)}: {name} is {self.shape(name)}, config.json asks for {shape}")
            if self._slice(name).get_dtype() not in _READABLE:
                raise ValueError(f"{self.file_of(name)}: {name} is {self._slice(name).get_dtype()}, not {_READABLE}")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor, on the CPU in the dtype it is stored in."""
        return self._slice(name)[start:stop]

    def _slice(self, name: str) -> Any:
        return self._open(self._file_of[name]).get_slice(name)


def _refuse(names: Iterable[str], complaint: str) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{complaint} {', '.join(names[:5])}{more}")


@dataclass(frozen=True)
class RandomWeights:
    """Normal weights (norms: ones) for a model's shape, the same for any number of ranks: rows are drawn in fixed runs.

    Attributes:
        seed: of the numbers.
        std: of the matrices.
        device: where they are drawn; two kinds of device draw different numbers.
    """

    seed: int
    std: float
    device: torch.device
    shapes: dict[str, tuple[int, ...]]

    _RUN = 1024

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Take the shapes as they are."""
        self.shapes.update(shapes)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor, bf16."""
        shape = self.shapes[name]
        if len(shape) == 1:
            fill = torch.ones if name.endswith("norm.weight") else torch.zeros
            return fill(stop - start, dtype=torch.bfloat16, device=self.device)
        first = start // self._RUN * self._RUN
        runs = [self._run(name, row, shape) for row in range(first, stop, self._RUN)]
        drawn = torch.cat(runs) if runs else torch.empty(0, shape[1], dtype=torch.bfloat16, device=self.device)
        return drawn[start - first : stop - first]

    def _run(self, name: str, row: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(derived_seed(self.seed, name, row))
        size = (min(self._RUN, shape[0] - row), *shape[1:])
        return (torch.randn(size, generator=generator, device=self.device) * self.std).bfloat16()
