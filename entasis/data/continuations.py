"""A multiple-choice task from held-out text: which of four continuations follows this context?

The text of each document is cut into stretches of as many words as a context and its continuation have. A stretch is one
item; the three wrong continuations are those of other stretches, of other documents where these have a quarter of all
or more. It is written as lm-eval reads tasks: a YAML file and the items in a JSONL file beside it.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from entasis.data import left_out, tokenizer
from entasis.data.corpus import Corpus
from entasis.data.held_out import Part, choose_documents
from entasis.data.readers import Losses
from entasis.data.sources import COLUMN, TextSources, is_corpus
from entasis.errors import UserError
from entasis.files import write_text

CHOICES = 4
_LONGEST_WORD = 50
"""Characters; what has no spaces for longer is no prose, or a script that is not written in words."""


@dataclass(frozen=True)
class Stretch:
    """A context and the continuation that follows it, without the space between."""

    document: int
    context: str
    space: str
    continuation: str


def texts_of(source: str | Path, part: Part = "all", column: str = COLUMN) -> Iterator[str]:
    """The documents of a prepared corpus (or of one part of it), or of text as `entasis data prepare` reads it.

    What is left out of text is said on stderr after its last document. Raises `UserError`.
    """
    if not is_corpus(source, column):
        losses = Losses()
        for document in TextSources((str(source),), column).documents(losses):
            yield document.text
        left_out.tell(losses.reasons)
        return
    corpus = Corpus(source)
    reader, offsets = tokenizer.load(corpus.tokenizer_path), corpus.document_offsets()
    for i in choose_documents(corpus, part=part):
        ids = corpus.read(int(offsets[i]), int(offsets[i + 1]))
        yield reader.decode(i for i in ids.tolist() if i != corpus.end_of_text)


def find_stretches(texts: Iterable[str], *, context: int, continuation: int) -> list[Stretch]:
    """Every stretch of `context` + `continuation` words, in order; those whose words stood in an earlier one are left out."""
    found: list[Stretch] = []
    contexts: set[str] = set()
    continuations: set[str] = set()
    for document, text in enumerate(texts):
        words = re.findall(r"\s*\S+", text)
        for begin in range(0, len(words) - context - continuation + 1, context + continuation):
            middle = begin + context
            stretch = words[begin : middle + continuation]
            if max(map(len, map(str.strip, stretch))) > _LONGEST_WORD:
                continue
            before, after = "".join(stretch[:context]).lstrip(), "".join(stretch[context:])
            rest = after.lstrip()
            if before not in contexts and rest not in continuations:
                found.append(Stretch(document, before, after[: len(after) - len(rest)], rest))
            contexts.add(before)
            continuations.add(rest)
    return found


def make_items(stretches: list[Stretch], items: int, seed: int) -> list[dict[str, Any]]:
    """So many items, drawn by the seed: `context`, `choices` (each begins with the space after the context) and `answer`.

    No stretch is the right answer twice. There must be as many stretches as items, and no fewer than four.
    """
    draw = random.Random(f"continuations/{seed}")
    of_document = Counter(stretch.document for stretch in stretches)
    result = []
    for true in draw.sample(stretches, items):
        # Of a few stretches elsewhere all items would have the same wrong answers, which a guesser sees.
        others = len(stretches) - of_document[true.document]
        elsewhere = others >= max(CHOICES - 1, len(stretches) / 4)
        wrong: list[str] = []
        while len(wrong) < CHOICES - 1:
            other = draw.choice(stretches)
            barred = other.document == true.document if elsewhere else other is true
            if not barred and other.continuation not in wrong:
                wrong.append(other.continuation)
        answer = draw.randrange(CHOICES)
        choices = [*wrong[:answer], true.continuation, *wrong[answer:]]
        result.append(
            {
                "context": true.context,
                "choices": [true.space + choice for choice in choices],
                "answer": answer,
            }
        )
    return result


def write_task(
    texts: Iterable[str],
    folder: str | Path,
    *,
    where: str,
    items: int = 200,
    context: int = 40,
    continuation: int = 10,
    seed: int = 0,
    name: str = "continuation",
) -> dict[str, Any]:
    """Writes `NAME.jsonl` and `NAME.yaml`; returns what was made, and of how many items the text has room for.

    The YAML names the items by their absolute path, since lm-eval looks for others from where it is called; written
    again into a folder that was moved, it names the new one. Raises `UserError`, which begins with `where`, for text that
    is too short and for a folder that holds other items.
    """
    stretches = find_stretches(texts, context=context, continuation=continuation)
    if len(stretches) < max(items, CHOICES):
        wanted = f"a task has at least {CHOICES}" if len(stretches) < CHOICES else f"{items} are asked for"
        raise UserError(
            f"{where}: has room for {len(stretches)} items of {context} + {continuation} words (between spaces), and {wanted}; "
            "ask for fewer or shorter ones, or hold out more text"
        )
    made = make_items(stretches, items, seed)
    data, task = Path(folder).absolute() / f"{name}.jsonl", Path(folder) / f"{name}.yaml"
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in made)
    if data.is_file() and data.read_text(encoding="utf-8") != lines:
        raise UserError(f"{data}: holds other items already; choose another folder")
    write_text(data, lines)
    write_text(
        task,
        yaml.safe_dump(
            {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "context",
                "doc_to_choice": "choices",
                "doc_to_target": "answer",
                "target_delimiter": "",
                "metric_list": [
                    {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                    for metric in ("acc", "acc_norm")
                ],
                "metadata": {"version": 1.0, "context_words": context, "continuation_words": continuation},
            },
            sort_keys=False,
        ),
    )
    return {
        "task": name,
        "output": str(folder),
        "items": items,
        "possible_items": len(stretches),
        "documents": len({stretch.document for stretch in stretches}),
        "context_words": context,
        "continuation_words": continuation,
        "seed": seed,
    }
