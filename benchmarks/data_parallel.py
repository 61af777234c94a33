"""Data parallelism three ways: ours (`parallel.GradientSum`), torch's DDP, `fully_shard` on a mesh of (processes, 1).

    python benchmarks/data_parallel.py --processes 4 --steps 20

Every process computes the gradients of its own batch again and again, without updating, as one that was killed after some
steps and started again would. Printed for each way: whether the summed gradients of every later pass are those of the first
to the bit (else a resumed run is not the run), the largest difference, and seconds of processor time of a pass.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.specification import resolve
from entasis.train import parallel, sharding

SHAPE = {"profile": "crown", "budget": "6M", "layers": 8, "d_model": 192, "head_dim": 32, "context": 128,
         "vocabulary": 4096}  # fmt: skip
Pass = Callable[[torch.Tensor], None]


class Loss(nn.Module):
    """A model's loss as a module, which is what DDP wraps."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])


def ours(model: Transformer) -> Pass:
    gradients = parallel.GradientSum(model.parameters())
    gradients.sending = True

    def work(tokens_BT: torch.Tensor) -> None:
        (Loss(model)(tokens_BT) / tokens_BT.numel()).backward()
        gradients.wait()

    return work


def ddp(model: Transformer) -> Pass:
    wrapped = DistributedDataParallel(Loss(model), gradient_as_bucket_view=True)

    def summed(_, bucket):  # no annotations: DDP compares them, and ours are text
        sending = dist.all_reduce(bucket.buffer(), async_op=True)
        assert sending is not None
        return sending.get_future().then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, summed)
    return lambda tokens_BT: (wrapped(tokens_BT) / tokens_BT.numel()).backward()


def shards_of_one(model: Transformer) -> Pass:
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("copy", "shard"))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")
    return lambda tokens_BT: (Loss(model)(tokens_BT) / tokens_BT.numel()).backward()


WAYS = {"ours": ours, "ddp": ddp, "fully_shard (n, 1)": shards_of_one}


def gradients_of(model: Transformer) -> Iterator[torch.Tensor]:
    return (sharding.full(p.grad).clone() for p in model.parameters() if p.grad is not None)


def one_rank(rank: int, world: int, port: int, steps: int, answer: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    told = {}
    for name, way in WAYS.items():
        model = Transformer(resolve(SHAPE).shape)
        init_weights(model, 0)
        tokens_BT = torch.randint(4096, (2, 129), generator=torch.Generator().manual_seed(rank))
        work = way(model)
        first: list[torch.Tensor] = []
        worst, spent = 0.0, []
        for _ in range(steps):
            model.zero_grad(set_to_none=True)
            dist.barrier()
            begun = time.process_time()
            work(tokens_BT)
            spent.append(time.process_time() - begun)
            found = list(gradients_of(model))
            first = first or found
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(first, found, strict=True)))
        told[name] = {
            "equal_to_the_bit": worst == 0.0,
            "largest_difference": worst,
            "processor_seconds": sorted(spent[2:])[len(spent[2:]) // 2],
        }
    if rank == 0:
        answer.put(told)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = mp.get_context("spawn").SimpleQueue()
    mp.spawn(one_rank, (args.processes, port, args.steps, answer), nprocs=args.processes)
    print(json.dumps({"processes": args.processes, "torch": torch.__version__, **answer.get()}, indent=1))


if __name__ == "__main__":
    main()
