"""The table of the interface `glyph`: every token's text drawn by a font, and the drawings turned to their principal axes.

    bits_VP, 0 and 1            →  centre, PCA, the first d_model components, rows of length 1

The text of a token is what it decodes to; bytes that are no character alone are written `\\xe2`, control characters by
their escape (`\\n`). It is drawn without smoothing, `pixels` high, from the left; what is wider is squeezed to `pixels`.
The papers do not say how they place long tokens: that is our reading. Different tokens may look the same (Latin, Greek
and Cyrillic A do): collisions are counted, not removed.

Drawing takes Pillow (`pip install 'entasis[glyph]'`) and seconds to minutes, so drawings and tables are kept in the
user's cache folder under hashes of all that they are made from. Needs no torch.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import decoders

from entasis import files
from entasis.data.tokenizer import Tokenizer, byte_symbols
from entasis.data.tokenizer import load as load_tokenizer
from entasis.errors import UserError
from entasis.shape.interfaces import Glyph, Insight
from entasis.shape.shapes import ModelShape

if TYPE_CHECKING:
    from PIL import ImageFont

_UNIFONT = (
    "/usr/share/fonts/opentype/unifont/unifont.otf",
    "/usr/share/fonts/unifont/unifont.otf",
    "/usr/share/fonts/truetype/unifont/unifont.ttf",
)
_DRAWN_FROM = 64
"""A squeezed pixel is set where a quarter of what falls on it is."""


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """A token as text in which nothing is invisible but spaces; empty for an id without a token."""
    symbol = tokenizer.library.id_to_token(token)
    if symbol is None:
        return ""
    values = byte_symbols()
    if isinstance(tokenizer.library.decoder, decoders.ByteLevel) and all(c in values for c in symbol):
        text = bytes(values[c] for c in symbol).decode("utf-8", errors="backslashreplace")
    else:
        text = symbol.replace("▁", " ")
    return "".join(
        c if c.isprintable() or c == " " else c.encode("unicode_escape").decode("ascii") for c in text
    )


def bitmaps(interface: Glyph, vocabulary: int, tokenizer: Path) -> np.ndarray:
    """The drawings [V, pixels²] of 0 and 1; ids that have no token are blank. Raises `UserError`."""
    pixels, chosen = interface.pixels, load_tokenizer(tokenizer)
    font, content = _font(interface)
    key = _hash(content, f"{chosen.hash} {pixels} {vocabulary} {_versions()}".encode())
    packed = _cached(f"drawn-{key}", lambda: _draw(chosen, font, vocabulary, pixels))
    return np.unpackbits(packed, axis=1, count=pixels**2)


def identity(bits_VP: np.ndarray) -> str:
    """The hash that a shape has as `interface.bitmaps`."""
    return _hash(np.packbits(bits_VP, axis=1).tobytes(), repr(bits_VP.shape).encode())


def settle(interface: Glyph, vocabulary: int, tokenizer: Path) -> Glyph:
    """The interface with the hash of its drawings. Raises `UserError` where it has that of others."""
    found = identity(bitmaps(interface, vocabulary, tokenizer))
    if interface.bitmaps not in (None, found):
        raise UserError(
            f"interface glyph: font {interface.font} draws this tokenizer's tokens otherwise here than where the shape "
            "was made (interface.bitmaps); use the same font and versions, or leave bitmaps out"
        )
    return interface.replaced(bitmaps=found)


def table(interface: Glyph, shape: ModelShape, tokenizer: Path) -> np.ndarray:
    """The table [V, D] in fp32. Raises `UserError` where the drawings are others than those of `interface.bitmaps`."""
    found = settle(interface, shape.vocabulary, tokenizer).bitmaps
    return _cached(
        f"table-{found}-{shape.d_model}",
        lambda: _rotate(bitmaps(interface, shape.vocabulary, tokenizer), shape.d_model),
    )


def insight(interface: Glyph, shape: ModelShape, tokenizer: Path) -> Insight:
    """Rank of the table and how many tokens it tells apart."""
    table_VD = table(interface, shape, tokenizer)
    distinct = _count_rows(np.packbits(bitmaps(interface, shape.vocabulary, tokenizer), axis=1))
    rank = int(np.linalg.matrix_rank(table_VD.T.astype(np.float64) @ table_VD))
    if shape.norm_placement != "pre":
        return Insight(rank, False, distinct, distinct)
    if shape.norm == "layernorm":
        table_VD = table_VD - table_VD.mean(1, keepdims=True)
    mean_square = (table_VD**2).mean(1, keepdims=True)
    normed = np.round(table_VD / np.sqrt(mean_square + shape.norm_eps), 4) + np.float32(0)
    return Insight(rank, False, distinct, _count_rows(normed), int((mean_square < 1e-12).sum()))


def describe(interface: Glyph, shape: ModelShape, tokenizer: Path) -> dict[str, Any]:
    """What a run keeps of its table: the drawings' and the font's hash, and how many drawings differ."""
    bits_VP = bitmaps(interface, shape.vocabulary, tokenizer)
    return {
        "font": interface.font,
        "font_hash": hashlib.sha256(_font(interface)[1]).hexdigest(),
        "drawn_with": _versions(),
        "bitmaps": identity(bits_VP),
        "table": _hash(table(interface, shape, tokenizer).tobytes()),
        "distinct": _count_rows(np.packbits(bits_VP, axis=1)),
        "tokens": shape.vocabulary,
    }


def _rotate(bits_VP: np.ndarray, width: int) -> np.ndarray:
    x_VP = bits_VP.astype(np.float64)
    x_VP -= x_VP.mean(0)
    sizes, axes_PP = np.linalg.eigh(x_VP.T @ x_VP)
    axes_PP = axes_PP[:, np.argsort(-sizes, kind="stable")][:, :width]
    # An axis has no direction of its own: its largest number is made positive.
    axes_PP = axes_PP * np.sign(axes_PP[np.abs(axes_PP).argmax(0), np.arange(width)])
    x_VD = x_VP @ axes_PP
    return (x_VD / np.linalg.norm(x_VD, axis=1, keepdims=True).clip(min=1e-12)).astype(np.float32)


def _draw(tokenizer: Tokenizer, font: ImageFont.FreeTypeFont, vocabulary: int, pixels: int) -> np.ndarray:
    """Packed bits [V, pixels² / 8] of every token."""
    from PIL import Image, ImageDraw

    result = np.zeros((vocabulary, pixels * pixels), bool)
    for token in range(vocabulary):
        text = text_of(tokenizer, token)
        # Thousands of characters would be squeezed to nothing, and take memory.
        width = min(64 * pixels, max(pixels, round(font.getlength(text[:256]))))
        image = Image.new("1", (width, pixels))
        ImageDraw.Draw(image).text((0, 0), text[:256], fill=1, font=font)
        if width > pixels:
            squeezed = image.convert("L").resize((pixels, pixels), Image.Resampling.BOX)
            result[token] = (np.asarray(squeezed) >= _DRAWN_FROM).flatten()
        else:
            result[token] = np.asarray(image).flatten()
    return np.packbits(result, axis=1)


def _font(interface: Glyph) -> tuple[ImageFont.FreeTypeFont, bytes]:
    """The font, as high as the drawing, and what identifies it. Raises `UserError`."""
    try:
        import PIL
        from PIL import ImageFont
    except ImportError as error:
        raise UserError("interface glyph needs Pillow: pip install 'entasis[glyph]'") from error
    name, pixels = interface.font, interface.pixels
    if name == "pillow":
        font = ImageFont.load_default(pixels)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise UserError("interface glyph: this Pillow has no FreeType; give interface.font=FILE.ttf")
        return _fit(font, pixels), f"pillow {PIL.__version__}".encode()
    path = Path(name)
    if name == "unifont":
        found = next((p for p in map(Path, _UNIFONT) if p.is_file()), None)
        if found is None:
            raise UserError(
                "interface glyph: Unifont is not here; install it (apt-get install fonts-unifont), give "
                "interface.font=FILE.ttf, or interface.font=pillow for Latin letters only"
            )
        path = found
    try:
        content = path.read_bytes()
        return _fit(ImageFont.truetype(io.BytesIO(content), pixels), pixels), content
    except OSError as error:
        raise UserError(f"interface glyph: font {path} cannot be read ({error})") from error


def _fit(font: ImageFont.FreeTypeFont, pixels: int) -> ImageFont.FreeTypeFont:
    height = sum(font.getmetrics())
    return font.font_variant(size=pixels * pixels / height) if height > pixels else font


def _versions() -> str:
    from PIL import __version__, features

    return f"Pillow {__version__}, FreeType {features.version('freetype2')}"


def _count_rows(x: np.ndarray) -> int:
    rows = np.ascontiguousarray(x).view(np.dtype((np.void, x.dtype.itemsize * x.shape[1])))
    return len(np.unique(rows))


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _cached(name: str, make: Any) -> np.ndarray:
    """`make()`, or what it gave before; a cache that cannot be read or written costs time only."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "entasis" / "glyphs" / f"{name}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        result, buffer = make(), io.BytesIO()
    np.save(buffer, result, allow_pickle=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, buffer.getvalue())
    except OSError:
        pass
    return result
