"""Runs one chat template, in a process that is held to its limits: `python -P rendering.py < work.json`.

Reads {"template", "messages", "special"} and writes the text, as JSON. Exits with `REFUSED` and the reason where the
template cannot be run, and is killed by the system after `SECONDS` of work.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SECONDS = 5
MEMORY = 1 << 30
REFUSED = 3


def main() -> int:
    _limit()
    work = json.load(sys.stdin)
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks what a model is trained to write; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 (as the library has it)

        def parse(self, parser: Any) -> nodes.Scope:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def refuse(message: str) -> str:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        template = environment.from_string(work["template"])
        text = template.render(messages=work["messages"], add_generation_prompt=True, **work["special"])
        answer = json.dumps(text)
    except MemoryError:
        print(json.dumps(f"it takes more than {MEMORY >> 30} GiB of memory"))
        return REFUSED
    except Exception as error:  # a template is a program: it can raise anything
        print(json.dumps(" ".join(str(error).split())[:500] or type(error).__name__))
        return REFUSED
    print(answer)
    return 0


def _limit() -> None:
    """Where the system knows such limits (not on Windows, memory not on macOS)."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main())
