"""Hugging Face checkpoints: where they are, and their safetensors read row by row."""

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qsharded.checkpoint import read_ahead, safetensors_header
from qsharded.checkpoint.mxfp4 import is_mxfp4
from qsharded.checkpoint.row_chunks import RowChunk
from qsharded.utils import heartbeat
from qsharded.utils.untrusted_json import map_of, read_json, require, shown, text

INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
DESCRIBING = ["*.json", "*.jinja", "tokenizer.model"]
"""Patterns of the files that describe a model or an adapter, and its tokenizer."""
_NOT_DOWNLOADED = ["consolidated*.safetensors", "original/*"]  # the same weights once more, in their makers' formats
# What old checkpoints store though config.json gives it: the rotary frequencies, and a tied head beside its embedding.
# (An untied head is among the model's own tensors.)
RECOMPUTED = (".rotary_emb.inv_freq", "lm_head.weight")
_INDEX = {"weight_map": map_of(text(1024), 1 << 20)}
_PREFIX, _BARE_EMBEDDING = "model.", "embed_tokens.weight"
_READABLE = {"F32", "F16", "BF16"}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


# How multimodal models prefix their text part's tensors -> the names in a model of text: as transformers writes files,
# and as its modules are called since 4.52.
_TEXT_PREFIXES = (
    (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
    (("model.language_model.", "model."), ("lm_head.", "lm_head.")),
)


_FURTHER = "mtp."  # layers that predict further tokens, which transformers ignores too


def _of_style(stored: str) -> tuple[tuple[str, str], ...]:
    return next((style for style in _TEXT_PREFIXES if any(stored.startswith(prefix) for prefix, _ in style)), ())


def is_of_text(stored: str) -> bool:
    """Whether a tensor of a multimodal model's files is its text part's."""
    return bool(_of_style(stored))


def text_name(stored: str) -> str:
    """What a text part's tensor is called in a model of text."""
    return next(ours + stored.removeprefix(theirs) for theirs, ours in _of_style(stored) if stored.startswith(theirs))


def find_checkpoint(path_or_id: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or a Hub repository's snapshot, downloaded if need be.

    Args:
        path_or_id: a folder, or a Hub id.
        revision: of a Hub id.
        weights: whether the weights are downloaded too, or only what describes the model and its tokenizer.

    Raises:
        ValueError: neither a folder nor the form of a Hub id, a folder of something else, a revision given for a
            folder, or the Hub's refusal.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for Hub ids, but {folder} is a folder")
        _refuse_no_model(folder)
        return folder
    if not is_hub_id(str(path_or_id)):
        raise ValueError(f"{path_or_id} is neither a folder nor a Hub id such as meta-llama/Llama-3.1-8B")
    return download(str(path_or_id), revision, [*DESCRIBING, "*.safetensors"] if weights else DESCRIBING)


def _refuse_no_model(folder: Path) -> None:
    """A tokenizer alone is enough for some commands; what is missing of a model is told by who needs it."""
    if (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter and no model: --adapter takes it, and --model the base that it is for"
        )
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder.resolve()} holds no model: its config.json is missing")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form of a Hub repository's id, ``owner/name``."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def download(hub_id: str, revision: str | None, wanted: Sequence[str]) -> Path:
    """The folder with the files of a Hub repository that match ``wanted``, patterns of names.

    Raises:
        ValueError: the Hub's refusal.
    """
    import huggingface_hub  # here: a local folder needs no Hub client

    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=list(wanted), ignore_patterns=_NOT_DOWNLOADED
            )
        )
    except Exception as error:  # of HTTP, of the connection, of the id: its kinds change with the client's versions
        raise ValueError(f"{hub_id} is no local folder, and the Hub did not give it: {error}") from error


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, its first byte there, their number, its dtype (in safetensors' words) and its
    shape."""

    path: Path
    first: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, in the order of its header.

    Raises:
        ValueError: it is damaged or incomplete.
    """
    size, entries = safetensors_header.read_checked(path)
    try:
        with safe_open(path, framework="pt"):
            pass  # that tensors and file fit each other is known now
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}") from None
    start = safetensors_header.data_start(size)
    return {
        name: Stored(
            path,
            start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            entry["dtype"],
            tuple(entry["shape"]),
        )
        for name, entry in entries.items()
    }


@dataclass(frozen=True)
class SafetensorsFolder:
    """The safetensors of a checkpoint folder, one file or an index of shards; no file is read beyond what is asked.

    Bytes are read, not mapped: mapped pages would count as this process's memory.

    Attributes:
        renamed: (the name of a tensor in the files, what it is called here), if one is called otherwise. Names that
            lack ``model.``, as those of a model saved without its head, get it without being told.
        is_wrapped: the folder is a multimodal model's; here its text part's tensors alone are seen, by the names that
            they have in a model of text.
        has_others: what is not the decoder's is seen too: other parts, layers that predict further tokens.
        called: name in the files -> name here, of all that are called otherwise by rule; ``renamed`` comes after it.
        stacked: tensor of the model -> for each of its rows the tensors in the files that make it, behind each other.
        ignored: names in the files of tensors that the model has no use for.
    """

    folder: Path
    renamed: tuple[str, str] | None = None
    is_wrapped: bool = False
    has_others: bool = False
    called: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        ours = (name for name in self._in_files if not self._is_other(name))
        stored = {self.name_here(name): self._in_files[name] for name in ours}
        if self.renamed is not None:
            stored[self.renamed[1]] = stored.pop(self.renamed[0])
        return stored

    def names_in_files(self) -> list[str]:
        """What the files themselves call their tensors, ignored ones too."""
        return sorted(self._in_files)

    @cached_property
    def _is_bare(self) -> bool:
        return not (self.is_wrapped or self.called) and is_bare(self._in_files)

    @cached_property
    def index(self) -> Path | None:
        """The index of the files that are read; None: they are one file, whatever index may lie beside it."""
        single = self.folder / _SINGLE
        return None if single.exists() or not (self.folder / INDEX).exists() else self.folder / INDEX

    @cached_property
    def _in_files(self) -> dict[str, Stored]:
        if self.index is not None:
            return self._read_index()
        path = self.folder / _SINGLE
        if not path.exists():
            raise ValueError(f"{self.folder} holds neither {_SINGLE} nor {INDEX}")
        stored = read_header(_refuse_foreign(path, self.folder))
        self._refuse_other_shards(stored)
        return stored

    def _refuse_other_shards(self, single: dict[str, Stored]) -> None:
        """An index beside one file is most often left from before; transformers takes the file. But if all that it
        names is there and is another model, nobody can tell which of the two is meant."""
        if not (self.folder / INDEX).exists():
            return
        try:
            shards = self._read_index()
        except ValueError:
            return
        if not are_same_tensors(single, shards):
            files = sorted({stored.path.name for stored in shards.values()})
            raise ValueError(
                f"{self.folder} holds two different models: {_SINGLE}, and {files[0]} to {files[-1]}, which {INDEX} "
                "names. Remove the one that is not meant, an index included"
            )

    def _read_index(self) -> dict[str, Stored]:
        index = read_json(self.folder / INDEX)
        require(index, _INDEX, str(self.folder / INDEX))
        weight_map = index["weight_map"]
        if not weight_map:
            raise ValueError(f"{self.folder / INDEX} has no weight_map")
        files = {file: self._inside(file) for file in set(weight_map.values())}
        held = {file: read_header(path) for file, path in files.items()}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise ValueError(f"{INDEX} places {name} in {file}, which does not hold it")
        return {name: held[file][name] for name, file in weight_map.items()}

    def _inside(self, file: str) -> Path:
        """The path of an index entry."""
        parts = PurePosixPath(file)
        is_plain = file.isprintable() and "\\" not in file and parts.suffix == ".safetensors"
        if parts.is_absolute() or ".." in parts.parts or not is_plain:
            raise ValueError(f"{self.folder / INDEX} points outside its folder: {shown(file)}")
        if not _is_file(self.folder / parts):
            raise ValueError(f"{self.folder / INDEX} names {file}, which is missing from its folder")
        return _refuse_foreign(self.folder / parts, self.folder)

    def holds(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._stored

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._stored)

    def files(self) -> list[Path]:
        """Every file that holds tensors, sorted; of a multimodal model those of its other parts too."""
        return sorted({stored.path for stored in self._in_files.values()})

    def name_here(self, stored: str) -> str:
        """What a tensor of the files is called here (but for ``renamed``); another part's keeps its name."""
        if self._is_bare:
            return full_name(stored)
        return text_name(stored) if self.is_wrapped and is_of_text(stored) else self.called.get(stored, stored)

    def name_in_files(self, name: str) -> str:
        """What the files call what is called ``name`` here, whether it is there or to be added."""
        if self._is_bare:
            return name.removeprefix(_PREFIX)
        if not self.is_wrapped:
            return next((stored for stored, here in self.called.items() if here == name), name)
        stored = next(filter(is_of_text, self._in_files))
        prefixes = next((theirs, ours) for theirs, ours in _of_style(stored) if name.startswith(ours))
        return prefixes[0] + name.removeprefix(prefixes[1])

    def all_parts(self) -> "SafetensorsFolder":
        """The folder with all tensors, by their names in the files."""
        if not (self.other_parts() or self.called):
            return self
        return replace(self, is_wrapped=False, has_others=True, called={})

    def other_parts(self) -> list[str]:
        """The tensors that are not the decoder's, by their names in the files."""
        return sorted(filter(self._is_other, self._in_files))

    def _is_other(self, stored: str) -> bool:
        if self.has_others:
            return False
        return stored in self.ignored or stored.startswith(_FURTHER) or (self.is_wrapped and not is_of_text(stored))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the file's header gives."""
        return self._stored[name].shape

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._stored[name].path

    def dtype(self, name: str) -> torch.dtype:
        """What the tensor is stored in.

        Raises:
            ValueError: a type that no checkpoint read here holds.
        """
        stored = self._stored[name]
        if stored.dtype not in _DTYPES:
            raise ValueError(f"{stored.path}: {name} is {stored.dtype}, not one of {', '.join(_DTYPES)}")
        return _DTYPES[stored.dtype]

    def check(self, shapes: dict[str, tuple[int, ...]], packed: Iterable[str] = ()) -> None:
        """Raise ValueError unless the tensors are just these, of these shapes and a readable dtype, and ``packed``."""
        expected = {*shapes, *packed}
        _refuse(expected - self._stored.keys(), f"{self.folder} lacks")
        surplus = [name for name in self._stored.keys() - expected if not name.endswith(RECOMPUTED)]
        _refuse(surplus, f"{self.folder} holds tensors that the model has no place for:")
        for name, shape in shapes.items():
            stored = self._stored[name]
            if stored.shape != shape:
                raise ValueError(f"{stored.path}: {name} is {stored.shape}, config.json asks for {shape}")
            readable = {"U8"} if is_mxfp4(name) else _READABLE
            if stored.dtype not in readable:
                raise ValueError(f"{stored.path}: {name} is {stored.dtype}, not {readable}")

    def rows_at_once(self, row_bytes: int) -> int:
        """As many as fill a staging buffer."""
        return max(1, read_ahead.PIECE // row_bytes)

    def stream(self, chunks: Sequence[RowChunk], device: torch.device) -> Generator[Tensor, None, None]:
        """The bytes of each chunk in turn, uint8 on ``device``, good until the next is asked for; read ahead."""
        fills = [partial(self.read_into, chunk.name, chunk.start * chunk.row_bytes) for chunk in chunks]
        return read_ahead.read_ahead(fills, [chunk.nbytes for chunk in chunks], device)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor, on the CPU in the dtype it is stored in."""
        shape = self.shape(name)
        stop = min(stop, shape[0])
        row_bytes = math.prod(shape[1:]) * self.dtype(name).itemsize
        raw = self._bytes(name, start * row_bytes, stop * row_bytes)
        return raw.view(self.dtype(name)).view(stop - start, *shape[1:])

    def whole(self, name: str) -> Tensor:
        """The tensor, on the CPU in the dtype it is stored in."""
        return self._bytes(name, 0, self.nbytes(name)).view(self.dtype(name)).view(self.shape(name))

    def nbytes(self, name: str) -> int:
        """The size of the tensor as it is stored."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def _bytes(self, name: str, first: int, end: int) -> Tensor:
        raw = torch.empty(end - first, dtype=torch.uint8)
        self.read_into(name, first, raw)
        return raw

    def read_into(self, name: str, first: int, raw: Tensor) -> None:
        """Fill ``raw`` (uint8, on the CPU) with the tensor's bytes from byte ``first`` on.

        Raises:
            ValueError: the file has become shorter.
        """
        stored, left = self._stored[name], raw.numpy().data
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.first + first)
            while left:
                heartbeat.beat("reading weights")
                count = file.readinto(left)
                if not count:
                    raise ValueError(f"{stored.path} ends within {name}: it was changed while it was read")
                left = left[count:]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _refuse_foreign(path: Path, folder: Path) -> Path:
    """``path``, unless it is a link that leads out of ``folder`` to anywhere but the Hub's cache, which is made of
    links: a folder that was unpacked must not have another user's file read as its weights."""
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()) and not target.is_relative_to(_hub_cache()):
        raise ValueError(f"{path} is a link to {target}, outside its folder; put the file itself there")
    return path


def _hub_cache() -> Path:
    from huggingface_hub import constants  # here: a folder without such links needs no Hub client

    return Path(constants.HF_HUB_CACHE).resolve()


def is_bare(names: Iterable[str]) -> bool:
    """Whether tensors are called as in a model without its head, as ``layers.0...`` for ``model.layers.0...``."""
    names = set(names)
    return _BARE_EMBEDDING in names and not any(name.startswith(_PREFIX) for name in names)


def full_name(bare: str) -> str:
    """What a tensor is called in a model with its head."""
    return bare if bare.startswith("lm_head.") else _PREFIX + bare


def are_same_tensors(one: dict[str, Stored], other: dict[str, Stored]) -> bool:
    """Whether files hold the same names, shapes, dtypes and bytes; they are read as far as they are equal."""
    if {name: (t.dtype, t.shape) for name, t in one.items()} != {n: (t.dtype, t.shape) for n, t in other.items()}:
        return False
    return all(_have_same_bytes(tensor, other[name]) for name, tensor in one.items())


def _have_same_bytes(one: Stored, other: Stored) -> bool:
    left = one.nbytes
    with open(one.path, "rb") as first, open(other.path, "rb") as second:
        first.seek(one.first)
        second.seek(other.first)
        while left:
            size = min(left, read_ahead.PIECE)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _refuse(names: Iterable[str], complaint: str) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{complaint} {', '.join(names[:5])}{more}")
