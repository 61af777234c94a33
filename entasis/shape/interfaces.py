"""Token interfaces: how ids become the vectors that the first layer reads, without torch.

    interface: {kind: binary, order: interleaved, values: bits, stored: true}

A kind is one class here, its fields being its options, and one module registered under the same name in
`entasis.model.interfaces`. Layout, counts, selectors and `entasis shape` follow from the class. Only `learned` is ever
trained; what a frozen kind keeps in the weights is an entry of the layout that no selector reaches. The output head is
the shape's own in either case, so a frozen table cannot be tied to it.

Sources: arXiv 2507.04886 (glyph), 2507.07129 (binary, growing on a frozen table), 2605.09751 (affine and random codes).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from entasis.configuration import Settings, parse
from entasis.errors import UserError
from entasis.registry import Registry, advise

if TYPE_CHECKING:
    import numpy as np

    from entasis.shape.shapes import ModelShape

Seed = Annotated[int, Field(ge=0, lt=2**63)]
FULL, CODES = "embedding.tokens.weight", "embedding.tokens.codes"
"""Names of the two kinds of stored table: a vector for each token, or a code of a few bits."""


@dataclass(frozen=True)
class Insight:
    """What a table of vectors tells apart; None where nothing can be said before training."""

    rank: int
    """Of the table, tokens × channels."""
    rank_is_bound: bool = False
    distinct: int | None = None
    """Different vectors."""
    distinct_after_norm: int | None = None
    """Different vectors behind the first norm, to six decimals; as `distinct` where no norm reads the table."""
    vanishing: int = 0
    """Tokens whose vector the first norm turns into zero."""


class Interface(Settings):
    """One way for tokens to enter."""

    model_config = ConfigDict(frozen=True)
    learns: ClassVar[bool] = False

    def table(self, shape: ModelShape) -> tuple[str, tuple[str, ...], int] | None:
        """(name, axes, length of the last) of what the weights hold; None: computed from the id."""
        return FULL, ("vocabulary", "residual"), shape.d_model

    def check(self, shape: ModelShape) -> None:
        """Refuses options that do not go with the shape. Raises `UserError`."""

    def insight(self, shape: ModelShape) -> Insight | None:
        """Rank and injectivity; None where they depend on a tokenizer."""
        return Insight(min(shape.vocabulary, shape.d_model), rank_is_bound=True)


INTERFACES: Registry[type[Interface]] = Registry("interface kind")


def read(source: object, where: str = "shape: interface") -> Interface:
    """The interface in `{kind: NAME, option: value, …}`. Raises `UserError`."""
    if isinstance(source, Interface):
        return source
    if not isinstance(source, Mapping) or "kind" not in source:
        raise UserError(f"{where} is {str(source)[:60]!r}; write {{kind: NAME}} with the kind's options")
    if not isinstance(source["kind"], str) or source["kind"] not in INTERFACES:
        raise UserError(f"{where}.kind is {source['kind']!r}; {advise(source['kind'], INTERFACES)}")
    return parse(INTERFACES[source["kind"]], {k: v for k, v in source.items() if k != "kind"}, where)


def name_of(interface: Interface) -> str:
    """The name that an interface's kind is registered by."""
    return next(name for name, kind in INTERFACES.items() if type(interface) is kind)


def to_dict(interface: Interface) -> dict[str, Any]:
    """What a file holds; `read` reads it back."""
    return {"kind": name_of(interface), **interface.model_dump()}


@INTERFACES.register("learned")
class Learned(Interface):
    """A table that is trained. With `trainable: not embedding` in later stages it is learned, then frozen."""

    learns: ClassVar[bool] = True


@INTERFACES.register("random")
class Random(Interface):
    """A table drawn as a learned one would be, N(0, std²), and never trained: the control."""

    std: Annotated[float, Field(gt=0, le=1000)] = 0.02
    seed: Seed | None = None
    """Null: the recipe's; then it is the very table that a learned one begins with."""

    def insight(self, shape: ModelShape) -> Insight:
        """Full rank and all different with probability one."""
        n = shape.vocabulary
        return Insight(min(n, shape.d_model), False, n, n)


@INTERFACES.register("glyph")
class Glyph(Interface):
    """The token's text drawn by a font; PCA of the pixels, rows of length 1 (`entasis.data.glyphs`)."""

    font: str = "unifont"
    """`unifont` where the system has it, `pillow` for the Latin font that Pillow brings, or a TTF or OTF file."""
    pixels: Annotated[int, Field(ge=4, le=128)] = 32
    """Height and width; their square is the most that d_model may be."""
    bitmaps: str | None = None
    """Hash of all drawings, filled in when a run begins: what the table is made of, whatever the font is called."""

    def check(self, shape: ModelShape) -> None:
        if shape.d_model > self.pixels**2:
            raise UserError(
                f"shape: interface glyph has {self.pixels}² = {self.pixels**2} pixels, fewer than d_model "
                f"{shape.d_model}; raise interface.pixels"
            )

    def insight(self, shape: ModelShape) -> None:
        """Depends on tokenizer and font: `entasis shape … --tokenizer FILE` draws them."""


class Codes(Interface):
    """A code of a few bits for each token, spread over the channels."""

    order: Literal["tiled", "interleaved"] = "tiled"
    """`tiled`: channel j carries bit j mod K. `interleaved`: each bit fills d_model / K channels in a row, as the
    papers' `repeat_interleave` does."""
    values: Literal["balanced", "signs", "bits"] = "balanced"
    """`bits`: 0 and 1, as in the papers. `signs`: -1 and 1. `balanced`: those times a fixed pattern of signs that has as
    many of each for every bit as go into its channels, so that no code is constant over the channels and LayerNorm leaves all of them."""

    def n_bits(self, shape: ModelShape) -> int:
        """K, the length of a code."""
        raise AssertionError("each kind has its own")

    def codes(self, shape: ModelShape) -> np.ndarray:
        """Bits [V, K] of every token."""
        raise AssertionError("each kind has its own")

    def check(self, shape: ModelShape) -> None:
        bits = self.n_bits(shape)
        if 2**bits < shape.vocabulary:
            raise UserError(
                f"shape: interface.bits is {bits}, too few for a vocabulary of {shape.vocabulary}; "
                f"it takes {(shape.vocabulary - 1).bit_length()}"
            )
        if bits > shape.d_model:
            raise UserError(
                f"shape: interface.bits is {bits}, more than the {shape.d_model} channels of d_model"
            )
        if self.order == "interleaved" and shape.d_model % bits:
            raise UserError(
                f"shape: interface.order is interleaved, but {bits} bits do not divide d_model {shape.d_model}; "
                "use tiled"
            )

    def spread(self, shape: ModelShape) -> np.ndarray:
        """[D, K]: which bit each channel carries, with its sign."""
        import numpy as np

        bits, channel = self.n_bits(shape), np.arange(shape.d_model)
        tiled = self.order == "tiled"
        bit = channel % bits if tiled else channel // (shape.d_model // bits)
        flipped = (channel // bits if tiled else channel) % 2 == 1
        result = np.zeros((shape.d_model, bits))
        result[channel, bit] = np.where(flipped & (self.values == "balanced"), -1.0, 1.0)
        return result

    def insight(self, shape: ModelShape) -> Insight:
        """Exact: the norm of a spread code is found from the code, in K dimensions instead of d_model."""
        import numpy as np

        codes = self.codes(shape).astype(np.float64)
        values = codes if self.values == "bits" else 2 * codes - 1
        spread = self.spread(shape)
        rank = int(np.linalg.matrix_rank(values.T @ values))
        # Reordered norms do not read the table, and learned positions are added before a norm reads it.
        if shape.norm_placement != "pre" or shape.positions == "learned":
            return Insight(rank, False, len(codes), len(codes))
        if shape.norm == "layernorm":
            spread = spread - spread.mean(0)
        # z has the inner products of the (centred) vectors: |z|² / d_model is what the norm divides by.
        sizes, directions = np.linalg.eigh(spread.T @ spread)
        z = values @ directions * np.sqrt(np.where(sizes > 1e-9 * sizes.max(), sizes, 0))
        mean_square = (z**2).sum(1, keepdims=True) / shape.d_model
        z = z / np.sqrt(mean_square + shape.norm_eps)
        distinct = len(np.unique(np.round(z, 6) + 0.0, axis=0))
        return Insight(rank, False, len(codes), distinct, int((mean_square < 1e-12).sum()))


@INTERFACES.register("binary")
class Binary(Codes):
    """The bits of the id itself."""

    bits: Annotated[int, Field(ge=1, le=62)] | None = None
    """Null: as many as the vocabulary takes."""
    stored: bool = False
    """Keeps the V × K table in the weights, as the published model does; the function is the same."""

    def n_bits(self, shape: ModelShape) -> int:
        return self.bits or max(1, (shape.vocabulary - 1).bit_length())

    def table(self, shape: ModelShape) -> tuple[str, tuple[str, ...], int] | None:
        return (CODES, ("vocabulary", "code"), self.n_bits(shape)) if self.stored else None

    def codes(self, shape: ModelShape) -> np.ndarray:
        import numpy as np

        return (np.arange(shape.vocabulary)[:, None] >> np.arange(self.n_bits(shape))) & 1


@INTERFACES.register("affine_binary")
class AffineBinary(Codes):
    """The id's bits c recoded as A·c ⊕ b over GF(2), A invertible and drawn from a seed: no table."""

    bits: Annotated[int, Field(ge=1, le=62)] | None = None
    """Null: as many as the vocabulary takes."""
    seed: Seed = 0

    def n_bits(self, shape: ModelShape) -> int:
        return self.bits or max(1, (shape.vocabulary - 1).bit_length())

    def table(self, shape: ModelShape) -> None:
        return None

    def recoding(self, shape: ModelShape) -> tuple[list[int], int]:
        """The columns of A and b, each as a number whose bit i is row i."""
        bits, draw = self.n_bits(shape), random.Random(self.seed)
        columns: list[int] = []
        while len(columns) < bits:
            columns = [draw.getrandbits(bits) for _ in range(bits)]
            columns = columns if _independent(columns) else []
        return columns, draw.getrandbits(bits)

    def codes(self, shape: ModelShape) -> np.ndarray:
        import numpy as np

        columns, offset = self.recoding(shape)
        ids = np.arange(shape.vocabulary)
        recoded = np.full(shape.vocabulary, offset)
        for j, column in enumerate(columns):
            recoded ^= ((ids >> j) & 1) * column
        return (recoded[:, None] >> np.arange(len(columns))) & 1


@INTERFACES.register("random_codes")
class RandomCodes(Codes):
    """Codes drawn at random, all different; stored."""

    bits: Annotated[int, Field(ge=1, le=4096)] = 64
    seed: Seed = 0

    def n_bits(self, shape: ModelShape) -> int:
        return self.bits

    def table(self, shape: ModelShape) -> tuple[str, tuple[str, ...], int]:
        return CODES, ("vocabulary", "code"), self.bits

    def codes(self, shape: ModelShape) -> np.ndarray:
        import numpy as np

        draw = np.random.Generator(np.random.PCG64(self.seed))
        if self.bits <= 24:
            numbers = draw.permutation(2**self.bits)[: shape.vocabulary]
            return (numbers[:, None] >> np.arange(self.bits)) & 1
        codes = draw.integers(0, 2, (shape.vocabulary, self.bits), dtype=np.int64)
        while True:
            packed = np.packbits(codes.astype(bool), axis=1)
            _, first = np.unique(packed, axis=0, return_index=True)
            again = np.setdiff1d(np.arange(len(codes)), first)
            if not len(again):
                return codes
            codes[again] = draw.integers(0, 2, (len(again), self.bits), dtype=np.int64)


def _independent(numbers: list[int]) -> bool:
    """Whether vectors over GF(2), written as numbers, are linearly independent."""
    basis: list[int] = []
    for number in numbers:
        for other in basis:
            number = min(number, number ^ other)
        if not number:
            return False
        basis.append(number)
    return True


LEARNED = Learned()
