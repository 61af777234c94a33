"""Floor 7: what each layer of a trained model does.

from entasis.anatomy import dissect
frame = dissect("runs/tiny", "corpora/stdlib/validation", measures=["structure", "skip"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entasis.anatomy.runner import dissect as dissect


def __getattr__(name: str) -> Any:
    # torch and pandas are imported when something is dissected, not when the room is.
    if name == "dissect":
        from entasis.anatomy.runner import dissect

        return dissect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
