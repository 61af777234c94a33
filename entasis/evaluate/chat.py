"""The chat template of a model: messages → the text that it was trained to answer.

A template is a Jinja program written by whoever made the model. It runs in Jinja's immutable sandbox, as it does in
transformers, and in a process of its own that may take some seconds and some memory and no more (`rendering.py`): a
sandbox keeps a program from doing harm, not from never ending.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entasis.errors import Failure, UserError
from entasis.evaluate.rendering import REFUSED, SECONDS

_PATIENCE = 60
"""Seconds by the clock after which a template is given up, where its process cannot be held to `SECONDS` of work."""
_ENDLESS = f"the chat template fails: it takes more than {SECONDS} seconds"


@dataclass(frozen=True)
class Chat:
    """A template and the special tokens that it may name (`bos_token`, `eos_token`, …)."""

    template: str
    special: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for messages of `role` and `content`, up to where the assistant answers.

        Raises `UserError` for a template that cannot be run or refuses the messages.
        """
        work = {"template": self.template, "messages": list(messages), "special": dict(self.special)}
        try:
            done = subprocess.run(
                # -P: nothing is imported from the folder that the program lies or is called in.
                [sys.executable, "-P", str(Path(__file__).with_name("rendering.py"))],
                input=json.dumps(work).encode(),
                capture_output=True,
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(_ENDLESS) from error
        if done.returncode == 0:
            return json.loads(done.stdout)
        if done.returncode == REFUSED:
            raise UserError(f"the chat template fails: {json.loads(done.stdout)}")
        if done.returncode < 0:  # killed at its limit
            raise UserError(_ENDLESS)
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Failure(f"the chat template could not be run: {''.join(last)}")


def load(folder: Path) -> Chat | None:
    """The template in a folder's tokenizer_config.json, None where there is none. Raises `UserError`."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no mapping")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        return None
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            special[name] = text
    for name, text in {"chat_template": template, **special}.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: {name} holds a lone surrogate, which no text has") from error
    return Chat(template, special)
