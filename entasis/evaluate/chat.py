"""The chat template of a model: messages → the text that it was trained to answer.

A template is a Jinja program written by whoever made the model, so it runs in Jinja's immutable sandbox, as it
does in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entasis.errors import UserError


@dataclass(frozen=True)
class Chat:
    """A template and the special tokens that it may name (`bos_token`, `eos_token`, …)."""

    template: str
    special: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for messages of `role` and `content`, up to where the assistant answers.

        Raises `UserError` for a template that cannot be run or refuses the messages.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> str:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        try:
            template = environment.from_string(self.template)
            return template.render(messages=list(messages), add_generation_prompt=True, **self.special)
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"the chat template fails: {' '.join(str(error).split())}") from error


def load(folder: Path) -> Chat | None:
    """The template in a folder's tokenizer_config.json, None where there is none. Raises `UserError`."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if not isinstance(template, str):
        return None
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            special[name] = text
    return Chat(template, special)
