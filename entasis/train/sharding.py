"""Models larger than one device: FSDP2, and HSDP on several machines.

    torchrun --nproc-per-node 8 -m entasis train recipes/large.yaml parallel.kind=fsdp --output runs/large

Every process holds its share of each parameter, gradient and moment (split along dimension 0, as DTensors). A block's
parameters are gathered when it runs and dropped afterwards; its gradients are summed into the shares. Under `hsdp` the
shares of one copy lie within one machine, and only summed gradients cross between machines.

In bf16 the blocks' parameters are gathered in bf16 and gradients summed in fp32; embedding, final norm and head are
gathered in fp32, so that the residual stream stays in fp32, as it does under autocast on one device.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate

from entasis.errors import UserError
from entasis.model.transformer import Transformer
from entasis.train import adapters, parallel
from entasis.train.recipe import Parallel


def shard(model: Transformer, how: Parallel, device: torch.device, precision: str) -> None:
    """Shards an initialised model over the processes, in place and on `device`.

    Afterwards only `model.loss` may be called: what else needs the parameters takes `unsharded(model)`. Raises
    `UserError` for a `parallel.shard` that does not divide the processes.
    """
    across = mesh(how, device)
    in_block = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in model.blocks:
        fully_shard(block, mesh=across, mp_policy=in_block)
    fully_shard(model, mesh=across, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by all tokens of the step already, so gradients add up, not average.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def mesh(how: Parallel, device: torch.device) -> DeviceMesh:
    """One dimension for `fsdp`; for `hsdp` two: copies of the model × the processes that share one."""
    world = parallel.world()
    if how.kind == "fsdp":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    each = how.shard or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % each:
        raise UserError(
            f"recipe: parallel.shard is {each}, but {world} processes cannot be split into groups of {each}"
        )
    return init_device_mesh(device.type, (world // each, each), mesh_dim_names=("copy", "shard"))


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def unsharded(model: Transformer) -> Transformer:
    """A model with all its parameters on every process, LoRA's adapters merged: itself, or a copy. All ranks call it.

    What was sharded is gathered in fp32.
    """
    if adapters.has_adapters(model):
        return adapters.merged(model)
    if not is_sharded(model):
        return model
    with torch.device("meta"):
        copy = Transformer(model.shape, attention=model.attention)
    copy.load_state_dict({name: full(p.detach()) for name, p in model.named_parameters()}, assign=True)
    return copy


def full(x: torch.Tensor) -> torch.Tensor:
    """A tensor with nothing left on other ranks. All ranks call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(whole: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor that every rank holds whole, split as `p` is; `whole` itself where `p` is not split."""
    if not isinstance(p, DTensor):
        return whole
    everywhere = [Replicate()] * p.device_mesh.ndim
    return DTensor.from_local(whole, p.device_mesh, everywhere, run_check=False).redistribute(
        placements=p.placements
    )


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def reduce_between_copies(model: nn.Module, now: bool) -> None:
    """Under `hsdp`, puts off the sum over machines until the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(now)
