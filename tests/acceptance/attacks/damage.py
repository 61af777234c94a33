"""Ways in which a file comes to harm."""

from collections.abc import Callable
from pathlib import Path


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def one_byte_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x01
    path.write_bytes(content)


def zeroed_block(path: Path) -> None:
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    begin = next(i for i in range(third, len(content)) if content[i])  # zeros would stay what they are
    size = min(4096, max(1, third), len(content) - begin)
    content[begin : begin + size] = bytes(size)
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (empty, truncated, one_byte_flipped, zeroed_block, missing)
}
