"""`import_model`: someone's checkpoint becomes a folder that `entasis.model.weights.load` opens.

    from entasis.interop.importing import import_model
    result = import_model("SmolLM2-135M/", "models/smollm2")

Everything is checked before the first byte is written; then tensors pass through one at a time into a
folder beside the target, which is renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from entasis import __version__
from entasis.errors import UserError
from entasis.interop import gguf_families, hf_unequal, hub, weights_writer  # noqa: F401  (registers itself)
from entasis.interop.aside import new_folder
from entasis.interop.gguf_reader import GGUFFile
from entasis.interop.gguf_tokenizer import tokenizer_of
from entasis.interop.hf_families import family_of
from entasis.interop.hf_folder import HFFolder
from entasis.interop.hf_tokenizer import TokenizerFiles, check_vocabulary, files_of_folder, given
from entasis.interop.plan import Piece, Plan, pieces
from entasis.interop.settings import shown
from entasis.model import weights
from entasis.shape.shapes import ModelShape

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
    """A source whose plan has been made and checked."""

    source: HFFolder | GGUFFile
    family: str
    format: str
    plan: Plan
    pieces: dict[str, Piece]
    tokenizer: TokenizerFiles
    files: list[Path]


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
    source = HFFolder(path)
    family = family_of(source.config)
    plan = family.read(source.config, len(source.sizes))
    sizes, tied = dict(source.sizes), None
    if plan.shape.tied_embeddings:
        # Some write the tied head too. It may be left out only when it really is the embedding.
        tied = sizes.pop(f"{plan.modules['head']}.weight", None)
    parts = pieces(plan, sizes, path.name)
    if tied is not None:
        _check_tied(source, plan)
    files = given(tokenizer) if tokenizer else files_of_folder(path, family.name)
    check_vocabulary(files, plan.shape.vocabulary)
    return _Opened(
        source, family.name, "huggingface", plan, parts, files, [path / "config.json", *source.files]
    )


def _check_tied(source: HFFolder, plan: Plan) -> None:
    head, embedding = (f"{plan.modules[m]}.weight" for m in ("head", "embedding.tokens"))
    if not torch.equal(source.read(head), source.read(embedding)):
        raise UserError(f"{source.path.name}: the config ties {head} to {embedding}, but the two differ")


def _open_gguf(path: Path, tokenizer: Path | None) -> _Opened:
    source = GGUFFile(path)
    try:
        family, plan = gguf_families.plan_of(source)
        parts = pieces(plan, source.sizes, path.name)
        files = given(tokenizer) if tokenizer else tokenizer_of(source)
        check_vocabulary(files, plan.shape.vocabulary)
    except BaseException:
        source.close()
        raise
    return _Opened(source, family, "gguf", plan, parts, files, source.files)


def _write(
    opened: _Opened, folder: Path, dtype: torch.dtype | None, progress: Callable[[int, int], None] | None
) -> ImportResult:
    plan = opened.plan
    kind, mixed = _dtype(opened, dtype)
    described = {name: (kind, piece.size) for name, piece in opened.pieces.items()}
    parameters = sum(torch.Size(piece.size).numel() for piece in opened.pieces.values())
    with new_folder(folder, parameters * kind.itemsize) as aside:
        _write_json(aside / "shape.json", plan.shape.to_dict())
        for name, content in opened.tokenizer.contents.items():
            _write_bytes(aside / name, content)
        tensors = _tensors(opened, kind, parameters, progress)
        belongs = weights.hashes_beside(aside)
        digest = weights_writer.write(aside / weights.WEIGHTS, described, tensors, belongs)
        _write_json(aside / "provenance.json", _provenance(opened, digest))
    return ImportResult(
        folder=str(folder),
        family=opened.family,
        format=opened.format,
        shape=plan.shape,
        parameters=parameters,
        tensors=len(described),
        dtype=_name(kind),
        tokenizer=bool(opened.tokenizer.contents),
        chat_template=opened.tokenizer.chat_template,
        notes=plan.notes + mixed + opened.tokenizer.notes,
    )


def _dtype(opened: _Opened, asked: torch.dtype | None) -> tuple[torch.dtype, tuple[str, ...]]:
    """The one dtype of the written weights, and a note where that rounds some of the source's.

    Unless asked otherwise it is that of most parameters; where any are quantised float32, which holds
    exactly what their blocks say. GGUF files of half precision keep their norms in float32.
    """
    counts: Counter[torch.dtype | None] = Counter()
    for piece in opened.pieces.values():
        counts[opened.source.dtype(piece.source)] += torch.Size(piece.size).numel()
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
    """Our parameters in order. One tensor of theirs is held, so a fused one is read once."""
    held, tensor, done = "", torch.empty(0), 0
    for name, piece in opened.pieces.items():
        if piece.source != held:
            tensor = torch.empty(0)  # lets the last one go before the next comes
            held, tensor = piece.source, opened.source.read(piece.source)
        part = piece.cut(tensor)
        if not part.isfinite().all():
            raise UserError(f"{_where(opened, piece)} holds numbers that are not finite (NaN or infinity)")
        part = part.to(dtype)
        if not part.isfinite().all():
            raise UserError(
                f"{_where(opened, piece)} has numbers too large for {_name(dtype)}; choose another --dtype"
            )
        yield name, part
        done += part.numel()
        if progress:
            progress(done, total)


def _where(opened: _Opened, piece: Piece) -> str:
    return f"{opened.source.path.name}: tensor {shown(piece.source)}"


def _provenance(opened: _Opened, digest: str) -> dict[str, Any]:
    return {
        "imported_by": f"entasis {__version__}",
        "format": opened.format,
        "family": opened.family,
        "source": [{"file": path.name, "sha256": _hash(path)} for path in opened.files],
        "model.safetensors": {"sha256": digest},
        "notes": list(opened.plan.notes + opened.tokenizer.notes),
    }


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
