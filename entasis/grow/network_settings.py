"""How LESA's network is trained, without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from entasis.configuration import Settings

Amount = Annotated[int, Field(ge=1, le=1_000_000)]


class NetworkSettings(Settings):
    """The defaults are those of LESA's code, early stopping apart."""

    basis: Literal["shared", "none"] = "shared"
    """What the network sees rows of: V_i in the basis that all layers share, or (the paper's ablation) W_i as it is."""
    norm_loss: Literal["batch", "row", "none"] = "batch"
    """(‖out‖ − ‖V‖)² of a batch as one vector, as in LESA's code; the mean of that over its rows; or left out."""
    norm_weight: Annotated[float, Field(ge=0, le=1)] = 5e-4
    """λ of (1 − λ) · mean squared error + λ · norm loss."""
    epochs: Amount = 10
    """The most; training ends sooner when held-out triples stop improving."""
    patience: Annotated[int, Field(ge=0, le=1_000_000)] = 2
    """Epochs without improvement after which it ends; the best epoch's network is kept. 0: all epochs and the last network,
    as in LESA's code."""
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-3
    batch: Amount = 64
    hidden: Amount = 256
