"""Checkpoints of the Hugging Face hub by name, through `huggingface_hub`, which comes with `tokenizers`."""

from __future__ import annotations

from pathlib import Path

from entasis.errors import UserError

PREFIX = "hf:"
_WANTED = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]


def fetch(name: str) -> Path:
    """The local folder of `hf:ORGANISATION/MODEL[@REVISION]`, downloaded into the hub's own cache where it is missing.

    Only descriptions, safetensors and tokenizers are fetched, never code or pickles. Raises `UserError`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        cause = " ".join(str(error).split())
        raise UserError(
            f"{name}: cannot be fetched ({type(error).__name__}: {cause[:160]}); "
            "a folder that was downloaded before can be named instead"
        ) from error
