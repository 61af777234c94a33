"""`import_model`: someone's checkpoint becomes a folder that `entasis.model.weights.load` opens.

    from entasis.interop.importing import import_model
    result = import_model("SmolLM2-135M/", "models/smollm2")

Everything is checked before the first byte is written; then tensors pass through one at a time into a
folder beside the target, which is renamed when it is complete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from entasis import __version__
from entasis.errors import UserError
from entasis.files import hash_of, new_folder
from entasis.grow import provenance
from entasis.interop import hub, name_map
from entasis.interop.config_reader import Description, shorten
from entasis.interop.hf_folder import HFFolder, find_member, read_json
from entasis.interop.hf_tokenizer import (
    TokenizerFiles,
    check_vocabulary,
    read_folder,
    with_generation_ends,
)
from entasis.interop.name_map import NameMap, StoredTensor
from entasis.model import weights, weights_writer
from entasis.shape.shapes import ModelShape

if TYPE_CHECKING:
    from entasis.interop.gguf_reader import GGUFFile

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ImportResult:
    """What was imported, and as what."""

    folder: str
    family: str
    format: str
    shape: ModelShape
    parameters: int
    tensors: int
    dtype: str
    tokenizer: bool
    chat_template: bool
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "shape": self.shape.to_dict(), "notes": list(self.notes)}


@dataclass(frozen=True)
class _Opened:
    """A source whose every tensor has been checked against its description."""

    source: HFFolder | GGUFFile
    family: str
    format: str
    description: Description
    tensors: list[StoredTensor]
    tokenizer: TokenizerFiles
    files: list[Path]
    layers: list[dict[str, Any]] | None = None
    """Where each layer came from, in a folder that we exported."""


def import_model(
    source: str | Path,
    folder: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportResult:
    """Imports a Hugging Face folder, `hf:ORGANISATION/MODEL` of its hub, or a GGUF file into the new folder `folder`.

    `dtype` is float32, float16 or bfloat16; None keeps that of most of the source's weights, and
    makes float32 of quantised ones, which is exactly what their blocks say. `tokenizer` is a tokenizer.json to use instead of the
    source's. `progress` is called with the parameters done and the parameters there are.

    Raises `UserError`, with nothing written, for a source that is damaged, inconsistent or of an
    unsupported kind, and for a `folder` that is not empty.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and not empty; name a new folder")
    path = hub.fetch(str(source)) if str(source).startswith(hub.PREFIX) else Path(source)
    opened = _open(path, Path(tokenizer) if tokenizer else None)
    try:
        return _write(opened, folder, DTYPES[dtype] if dtype else None, progress)
    finally:
        opened.source.close()


def _open(source: Path, tokenizer: Path | None) -> _Opened:
    if source.is_dir():
        return _open_folder(source, tokenizer)
    if source.is_file():
        return _open_gguf(source, tokenizer)
    raise UserError(f"{source}: is neither a folder with config.json and safetensors nor a GGUF file")


def _open_folder(path: Path, tokenizer: Path | None) -> _Opened:
    from entasis.interop import hf_unequal  # noqa: F401  (registers its families)
    from entasis.interop.hf_families import find_family

    source = HFFolder(path)
    family = find_family(source.config)
    description = family.read(source.config, len(source.sizes))
    names = family.names.as_in(source.sizes)
    tensors = name_map.list_tensors(names, description.shape, description.layers)
    sizes, tied = dict(source.sizes), None
    if description.shape.tied_embeddings:
        # Some write the tied head too. It may be left out only when it really is the embedding.
        tied = sizes.pop(f"{names.outer['head']}.weight", None)
    name_map.check(tensors, sizes, path.name, names.ignored)
    if tied is not None:
        _check_tied(source, names)
    files = read_folder(path, family.name, tokenizer)
    files = with_generation_ends(files, path, source.config.values)
    check_vocabulary(files, description.shape.vocabulary)
    paths = [path / "config.json", *source.files]
    layers = _read_layers(path, description.shape.n_layers)
    return _Opened(source, family.name, "huggingface", description, tensors, files, paths, layers)


def _read_layers(path: Path, n_layers: int) -> list[dict[str, Any]] | None:
    """The record of the layers in a folder that we exported.

    None in any other, and where there is no record of so many layers: the weights can be used without.
    """
    try:
        told: Any = read_json(find_member(path, "entasis.json")).get("layers")
        found = provenance.parse(told, n_layers, path)
        return found.to_list(frozen=[i for i, row in enumerate(told) if row.get("frozen")])
    except (UserError, OSError):
        return None


def _check_tied(source: HFFolder, names: NameMap) -> None:
    head, embedding = (f"{names.outer[module]}.weight" for module in ("head", "embedding.tokens"))
    if not torch.equal(source.read(head), source.read(embedding)):
        raise UserError(f"{source.path.name}: the config ties {head} to {embedding}, but the two differ")


def _open_gguf(path: Path, tokenizer: Path | None) -> _Opened:
    from entasis.interop import gguf_families
    from entasis.interop.gguf_reader import GGUFFile
    from entasis.interop.gguf_tokenizer import read_tokenizer

    source = GGUFFile(path)
    try:
        family, description = gguf_families.read_description(source)
        names = gguf_families.ARCHITECTURES[family].names
        tensors = name_map.list_tensors(names, description.shape, description.layers)
        name_map.check(tensors, source.sizes, path.name, names.ignored)
        files = read_tokenizer(source, tokenizer)
        check_vocabulary(files, description.shape.vocabulary)
    except BaseException:
        source.close()
        raise
    return _Opened(source, family, "gguf", description, tensors, files, source.files)


def _write(
    opened: _Opened, folder: Path, dtype: torch.dtype | None, progress: Callable[[int, int], None] | None
) -> ImportResult:
    shape = opened.description.shape
    kind, mixed = _choose_dtype(opened, dtype)
    described = {p.name: (kind, p.size) for tensor in opened.tensors for p in tensor.parameters}
    parameters = sum(tensor.count for tensor in opened.tensors)
    with new_folder(folder, need=parameters * kind.itemsize) as aside:
        _write_json(aside / "shape.json", shape.to_dict())
        for name, content in opened.tokenizer.contents.items():
            (aside / name).write_bytes(content)
        tensors = _tensors(opened, kind, parameters, progress)
        belongs = weights.hashes_beside(aside)
        digest = weights_writer.write(aside / weights.WEIGHTS, described, tensors, belongs)
        _write_json(aside / "provenance.json", _provenance(opened, digest))
    return ImportResult(
        folder=str(folder),
        family=opened.family,
        format=opened.format,
        shape=shape,
        parameters=parameters,
        tensors=len(described),
        dtype=_name(kind),
        tokenizer=bool(opened.tokenizer.contents),
        chat_template=opened.tokenizer.chat_template,
        notes=opened.description.notes + mixed + opened.tokenizer.notes,
    )


def _choose_dtype(opened: _Opened, asked: torch.dtype | None) -> tuple[torch.dtype, tuple[str, ...]]:
    """The one dtype of the written weights, and a note where that rounds some of the source's.

    Unless asked otherwise it is that of most parameters; where any are quantised float32, which holds
    exactly what their blocks say. GGUF files of half precision keep their norms in float32.
    """
    counts: Counter[torch.dtype | None] = Counter()
    for tensor in opened.tensors:
        counts[opened.source.dtype(tensor.name)] += tensor.count
    if asked is not None:
        return asked, ()
    most = counts.most_common(1)[0][0]
    if most is None or None in counts:
        return torch.float32, ()
    if len(counts) == 1:
        return most, ()
    others = sorted(_name(dtype) for dtype in counts if dtype and dtype != most)
    return most, (f"tensors of {' and '.join(others)} were made {_name(most)}, as most are; --dtype chooses",)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(
    opened: _Opened,
    dtype: torch.dtype,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Our parameters, in the order of the tensors that hold them: each is read once, and one is held at a time."""
    done = 0
    for stored in opened.tensors:
        where = f"{opened.source.path.name}: tensor {shorten(stored.name)}"
        tensor = opened.source.read(stored.name)
        if not tensor.isfinite().all():
            raise UserError(f"{where} holds numbers that are not finite (NaN or infinity)")
        tensor = tensor.to(dtype)
        if not tensor.isfinite().all():
            raise UserError(f"{where} has numbers too large for {_name(dtype)}; choose another --dtype")
        for name, part in stored.split(tensor):
            yield name, part
            del part  # else it would hold its tensor while the next is read
        done += stored.count
        del tensor
        if progress:
            progress(done, total)


def _provenance(opened: _Opened, digest: str) -> dict[str, Any]:
    return {
        "imported_by": f"entasis {__version__}",
        "format": opened.format,
        "family": opened.family,
        "source": [
            {"file": path.name, "sha256": hash_of(path)}
            for path in [*opened.files, *opened.tokenizer.sources]
        ],
        "model.safetensors": {"sha256": digest},
        "notes": list(opened.description.notes + opened.tokenizer.notes),
        **({"layers": opened.layers} if opened.layers else {}),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
