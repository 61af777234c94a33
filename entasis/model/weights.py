"""A model as files: `model.safetensors` and `shape.json`."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from entasis import files
from entasis.errors import Damaged, UserError
from entasis.model.transformer import Transformer
from entasis.shape import layout
from entasis.shape.shapes import ModelShape

WEIGHTS, SHAPE, TOKENIZER = "model.safetensors", "shape.json", "tokenizer.json"
BELONGS, CONTENT = "entasis", "content"
"""The one key of the weights' metadata (of several, safetensors writes now one first, now another) holds JSON: under
`content` the hash of all tensors, and those of the files beside them. Files of earlier versions have none."""


def save(model: Transformer, folder: str | Path) -> None:
    """Writes both files into an existing folder that is this process's own, each aside first.

    The metadata of the weights says what belongs together: hashes of the tensors, of `shape.json` and of the
    `tokenizer.json` that lies there. Raises `DiskFull`.
    """
    folder = Path(folder)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    files.write_text(folder / SHAPE, json.dumps(model.shape.to_dict(), indent=1) + "\n", locked=True)
    content = content_hash((name, tensor_hash(x)) for name, x in tensors.items())
    metadata = {BELONGS: json.dumps({CONTENT: content, **hashes_beside(folder)})}
    need = sum(x.nbytes for x in tensors.values())
    with files.aside(folder / WEIGHTS, need=need, locked=True) as partial:
        save_file(tensors, partial, metadata=metadata)


def home_of(source: Path) -> Path:
    """Where the tokenizer and the recipe of a model lie: those of a checkpoint, and of a run's raw weights, with the run."""
    folder = source.resolve()
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    # Any model may be called so, and lie beside a recipe; only a run has an environment.json.
    if (folder.name == "raw" or run != folder.parent) and (run / "environment.json").is_file():
        return run
    return source


def hashes_beside(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that the weights in `folder` belong to, by name."""
    return {name: files.hash_of(folder / name) for name in (SHAPE, TOKENIZER) if (folder / name).is_file()}


def tensor_hash(x: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, size and values."""
    digest = hashlib.sha256(f"{x.dtype} {list(x.shape)}".encode())
    digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def content_hash(tensors: Iterable[tuple[str, str]]) -> str:
    """One hash of the hashes of named tensors, in whatever order they come."""
    return hashlib.sha256("\n".join(sorted(f"{name} {told}" for name, told in tensors)).encode()).hexdigest()


class StoredWeights:
    """The weights in a folder, read one tensor at a time.

    Raises `UserError` when a file is missing and when tensors and shape do not belong together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / WEIGHTS
        self.shape = read_shape(folder)
        self.sizes = layout.sizes(self.shape)
        self.dtypes: dict[str, torch.dtype] = {}
        with self.open() as file:
            if odd := sorted(set(self.sizes) ^ set(file.keys())):
                what = "is missing" if odd[0] in self.sizes else "does not belong to the shape"
                raise UserError(f"{self.path}: tensor {odd[0]} {what}")
            self._told = json.loads((file.metadata() or {}).get(BELONGS, "{}"))
            for name, size in self.sizes.items():
                part = file.get_slice(name)
                if (found := tuple(part.get_shape())) != size:
                    raise UserError(f"{self.path}: {name} is {list(found)}, the shape says {list(size)}")
                if (dtype := _DTYPES.get(part.get_dtype())) is None:
                    raise UserError(
                        f"{self.path}: {name} is {part.get_dtype()}, which no weights of ours are"
                    )
                self.dtypes[name] = dtype

    @contextlib.contextmanager
    def open(self, device: torch.device | str = "cpu") -> Iterator[safe_open]:
        """The opened file. Raises `UserError` where it is missing, `Damaged` where it is no safetensors file."""
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as file:
                yield file
        except FileNotFoundError as error:
            raise UserError(
                f"{self.folder}: no {WEIGHTS}; is it a finished run or an imported model?"
            ) from error
        except (SafetensorError, json.JSONDecodeError) as error:
            raise Damaged(
                f"damaged: {self.path} is no longer a safetensors file, or cut short ({error})"
            ) from error

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored. The file is opened anew, as one mapping kept open comes to hold all of it in memory."""
        with self.open() as file:
            return file.get_tensor(name)

    @property
    def has_hash(self) -> bool:
        """Whether the file says what its tensors were when it was saved."""
        return CONTENT in self._told

    def check(self, hashes: Iterable[tuple[str, str]]) -> None:
        """Raises `Damaged` where the tensors' hashes (name, hash), or files beside them, are not those that were saved."""
        if self.has_hash and content_hash(hashes) != self._told[CONTENT]:
            raise Damaged(
                f"damaged: {self.path} does not hold the weights that were saved; restore it, or make it again"
            )
        for name, now in hashes_beside(self.folder).items():
            if self._told.get(name, now) != now:
                raise Damaged(
                    f"damaged: {self.folder / name} is not the file that {WEIGHTS} was saved with; restore it"
                )

    def verify(self) -> None:
        """Reads everything once. Raises `Damaged` where anything was changed after the weights were saved."""
        self.check((name, tensor_hash(self.read(name))) for name in self.sizes)


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
) -> Transformer:
    """The model in a folder, in the dtype it was saved in unless told otherwise.

    Raises `UserError` when a file is missing, when tensors and shape do not belong together, or (`Damaged`) when
    anything was changed after the weights were saved.
    """
    stored = StoredWeights(folder)
    with torch.device("meta"):
        model = Transformer(stored.shape, attention=attention)  # type: ignore[arg-type]
    tensors, hashes = {}, []
    with stored.open(device) as file:
        for name in stored.sizes:
            x = file.get_tensor(name)
            if stored.has_hash:
                hashes.append((name, tensor_hash(x)))
            tensors[name] = x if dtype is None else x.to(dtype)
    stored.check(hashes)
    model.load_state_dict(tensors, assign=True)
    return model


def fingerprint(folder: str | Path) -> str:
    """The hash of the weights in a folder: of the tensors where the file says it, else of the file. Raises `UserError`."""
    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get(BELONGS, "{}"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {WEIGHTS}; is it a finished run or an imported model?") from error
    except (SafetensorError, json.JSONDecodeError) as error:
        raise Damaged(f"damaged: {path} is no longer a safetensors file, or cut short ({error})") from error
    return told.get(CONTENT) or files.hash_of(path)


def read_shape(folder: str | Path) -> ModelShape:
    """The `shape.json` of a folder. Raises `UserError`."""
    path = Path(folder) / SHAPE
    try:
        return ModelShape.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {SHAPE}; is it a finished run or an imported model?") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise Damaged(f"damaged: {path} is not a shape ({error})") from error
