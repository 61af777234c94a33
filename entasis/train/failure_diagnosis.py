"""What goes wrong in the middle of training, said so that one knows where and what to change."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from entasis.errors import Failure
from entasis.model.transformer import Transformer
from entasis.train import parallel, sharding


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own error, the CPU allocator's RuntimeError, or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = (
        "can't allocate memory", "not enough memory", "CUDA out of memory", "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def out_of_memory(micro: int, sequence: int, step: int) -> Failure:
    """Which setting to lower."""
    if micro != 1:
        advice = f"lower batch.micro (now {micro} sequences of {sequence} tokens), or set activation_memory"
    else:
        advice = f"batch.micro is 1 already: set activation_memory, or lower data.sequence (now {sequence}) or the shape's budget"
    return Failure(f"out of memory at step {step}: {advice}")


def non_finite(model: Transformer, step: int, loss: float, tokens_BT: torch.Tensor, micro: int) -> Failure:
    """Finds the first layer whose weights, output or gradient is not finite. The update was not made."""
    kept = "; the weights were not updated and the checkpoints before it are whole"
    # What needs the other ranks comes first and unconditionally: each may then find something else.
    gathered = sharding.unsharded(model)
    parameters = list(model.named_parameters())
    bad_weights = _first_bad(parameters)
    # Backward runs from the last layer down, so the last one in forward order is where it began.
    bad_gradient = _first_bad([(n, p.grad) for n, p in reversed(parameters)])
    if name := bad_weights:
        where = f"the weights {name} were not finite before it"
    elif place := _first_bad_output(gathered, tokens_BT, micro):
        where = f"first in the output of {place}"
    elif name := bad_gradient:
        where = f"first in the gradient of {name}"
    else:
        where = "in the sum over the batch"
    what = "gradient" if torch.isfinite(torch.tensor(loss)) else "loss"
    return Failure(
        f"non-finite {what} at step {step}, {where}{kept}; lower optimizer.lr or use precision=fp32"
    )


def _first_bad(tensors: Sequence[tuple[str, torch.Tensor | None]]) -> str | None:
    found = [(name, sharding.local(x)) for name, x in tensors if x is not None]
    bad = torch.stack([(~torch.isfinite(x)).any().float() for _, x in found])
    places = parallel.sum_over_ranks(bad).nonzero()
    return found[int(places[0])][0] if len(places) else None


@torch.no_grad()
def _first_bad_output(model: Transformer, tokens_BT: torch.Tensor, micro: int) -> str | None:
    bad: list[str] = []

    def note(name: str):
        def hook(_module: torch.nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                bad.append(name)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        for rows_BT in tokens_BT.split(micro):
            if not bad and not torch.isfinite(model.head_logits(model.hidden(rows_BT))).all():
                bad.append("head")
    finally:
        for handle in hooks:
            handle.remove()
    return bad[0] if bad else None
