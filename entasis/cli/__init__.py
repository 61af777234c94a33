"""The command line: `entasis VERB`. One file a verb in this folder, imported only when it is called.

A verb's module has a docstring (its help, with an example), `add_arguments(parser)` and `run(args) -> int`.
A new verb is one file here and one line in `VERBS`.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from entasis import __version__, files, signals
from entasis.errors import Failure, Stopped, UserError

VERBS = {
    "shape": "design, solve, draw and compare model shapes",
    "data": "prepare, import, inspect and examine corpora",
    "train": "train a model from a recipe",
    "environment": "say what this machine can do, what is slow and the cure",
    "report": "a page of one run, or of several side by side",
    "bench": "measure a recipe: speed, memory, and time layer by layer",
    "study": "train arms against each other at equal cost and judge them",
    "generate": "continue a text",
    "evaluate": "score a model on text and on lm-eval tasks",
    "anatomy": "dissect a trained model layer by layer",
    "grow": "make a larger model of a trained one",
    "export": "hand a model to transformers or llama.cpp",
    "import": "make a model of a Hugging Face folder or a GGUF file",
}


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help says more)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The verb and its options; nothing is done yet. Raises `UserError`."""
    for argument in argv:
        if "\0" in argument:
            raise UserError("an argument holds a NUL character")
        try:
            os.fsencode(argument)
        except UnicodeEncodeError as error:
            raise UserError("an argument holds a lone surrogate, which no name has") from error
    parser = _Parser(
        prog="entasis",
        description="Design, train, dissect and serve language models whose layers differ.",
        epilog="example: entasis shape crown-paper/crown-18     (more: entasis VERB --help)",
    )
    parser.add_argument("--version", action="version", version=f"entasis {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        # Only the verb that is called is imported, so `entasis --help` stays quick.
        if name in argv[:1]:
            module = importlib.import_module(f"entasis.cli.{name}")
            verb = verbs.add_parser(
                name,
                help=summary,
                description=module.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_arguments(verb)
        else:
            verbs.add_parser(name, help=summary, add_help=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit codes: 0 done, 1 the work failed, 2 the input cannot be used."""
    with signals.raised(last=argv is None):
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    try:
        args = parse(argv)
        return importlib.import_module(f"entasis.cli.{args.verb}").run(args) or 0
    except UserError as error:
        return 2 if error.told_elsewhere else _complain(error, 2)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        return _complain(error, 2)
    except (Stopped, KeyboardInterrupt) as error:
        # All processes of a run stop together; one of them says so.
        if os.environ.get("RANK", "0") != "0":
            return 1
        if isinstance(error, KeyboardInterrupt):
            return _complain(f"stopped by {signals.name_of(error)}", 1)
        return _complain(error, 1)
    except Failure as error:
        return _complain(error, 1)
    except BrokenPipeError:
        return 1
    except RecursionError:
        return _complain("the input refers to itself, or is nested too deeply", 2)
    except Exception as error:
        if files.is_disk_full(error):
            return _complain(files.no_space(Path(getattr(error, "filename", None) or "."), error), 1)
        if _is_out_of_memory(error):
            return _complain("out of memory: this machine or device has less than the work needs", 1)
        if isinstance(error, ValueError) and "embedded null" in str(error):  # Python's words on such a path
            return _complain("a path holds a NUL character", 2)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return _complain(error, 2)
        if isinstance(error, OSError) or signals.hear():
            return _complain(error, 1)
        raise


def _is_out_of_memory(error: Exception) -> bool:
    """Python's error, or one of torch's, which is not imported for that."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def _complain(error: BaseException | str, code: int) -> int:
    if (signal := signals.hear()) and not isinstance(error, Failure):
        error, code = f"stopped by {signal}", 1  # whatever that ended in
    if os.environ.get("ENTASIS_DEBUG") and isinstance(error, BaseException):
        raise error
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error).replace("\n", " "))
    # Whoever's name or value is in it may be as long as a file.
    text = text if len(text) <= 1200 else f"{text[:800]} … {text[-300:]}"
    print(f"entasis: {text}", file=sys.stderr)
    return code
