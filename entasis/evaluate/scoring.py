"""Bits per byte of a model on text as it lies there: a corpus, a text file or a folder of them."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from entasis.data import left_out
from entasis.data.corpus import Corpus
from entasis.data.prepare import prepare
from entasis.data.sources import COLUMN, is_corpus
from entasis.data.tokenizer import Tokenizer
from entasis.errors import UserError
from entasis.evaluate.bits_per_byte import Score, evaluate
from entasis.evaluate.loading import Loaded


@contextlib.contextmanager
def corpus_of(text: str | Path, tokenizer: Tokenizer, *, column: str = COLUMN) -> Iterator[Corpus]:
    """The text as a corpus of this tokenizer, prepared in a temporary folder unless it is one. Raises `UserError`.

    What is left out of the text, and what of it the tokenizer loses, is said on stderr.
    """
    if is_corpus(text, column):
        corpus = Corpus(str(text))
        corpus.verify()
        if corpus.tokenizer_hash != tokenizer.hash:
            raise UserError(f"{text}: made with another tokenizer than the model's; give the text itself")
        _tell_lost(corpus)
        yield corpus
        return
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / "tokenizer.json"
        tokenizer.save(named)
        result = prepare([text], Path(folder) / "corpus", tokenizer=named, validation=0, column=column)
        left_out.tell(result["left_out"])
        corpus = Corpus(Path(folder) / "corpus" / "train")
        _tell_lost(corpus)
        yield corpus


def _tell_lost(corpus: Corpus) -> None:
    if lost := left_out.lost_by_tokenizer(corpus.text_lost):
        print(f"entasis: {lost}", file=sys.stderr)


def score(
    loaded: Loaded,
    corpus: Corpus,
    *,
    sequence: int | None = None,
    tokens: int | None = None,
    document_masking: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """The score of whole documents up to so many `tokens`, read `sequence` at once (the context, at most 1024).

    Attention stays inside a document where `document_masking` says so, by default where the model was trained like that.
    Raises `UserError` for more than a table of positions has.
    """
    sequence = sequence or min(1024, loaded.shape.context)
    if loaded.shape.positions == "learned" and sequence > loaded.shape.context:
        raise UserError(f"--sequence is {sequence}; the model has positions for {loaded.shape.context}")
    return evaluate(
        loaded.model,
        corpus,
        sequence=sequence,
        batch=4,
        device=loaded.device,
        max_tokens=tokens,
        document_masking=loaded.document_masking if document_masking is None else document_masking,
        tokenizer=loaded.tokenizer,
        progress=progress,
    )
