"""Growing a model of eight billion parameters within 8 GB of memory: time and peak by operator.

    python benchmarks/growth_scale.py --operators llama_pro,average --folder FOLDER      # needs 41 GB of disk there
    python benchmarks/growth_scale.py --operators lesa_ridge --folder FOLDER
    python benchmarks/growth_scale.py --divide 8 --folder FOLDER                         # widths of an eighth, for a trial

Writes a checkpoint of Llama-3-8B's shape (bf16, 32 layers, d_model 4096, FFN 14336, 32 heads on 8 KV heads, vocabulary
128256) with random weights, one tensor at a time, then grows it to 48 layers after 15..30, where LESA's authors put
theirs, by `entasis grow` in a process of its own for each operator. The peak is the process's largest resident set, pages of
mapped files included. Grown models are checked (layers, size of the file) and removed, the checkpoint at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import write

from entasis.model import weights, weights_writer
from entasis.model.weights import StoredWeights
from entasis.shape import cost, layout
from entasis.shape.shapes import LayerShape, ModelShape


def main() -> None:
    """Writes, grows, measures, removes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operators", default="llama_pro,average,lesa_ridge")
    parser.add_argument("--divide", type=int, default=1, help="all widths and the vocabulary by this (1)")
    parser.add_argument("--folder", default=None, help="where the checkpoints lie for a while (temporary)")
    args = parser.parse_args()
    shape = _shape(args.divide)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="growth-scale-") as folder:
        source = Path(folder) / "source"
        began = time.perf_counter()
        _write_checkpoint(shape, source)
        figures = {"checkpoint_seconds": round(time.perf_counter() - began, 1)}
        grown = {name: _grow(source, Path(folder) / name, name) for name in args.operators.split(",")}
    write(
        "growth-scale",
        ["torch", "safetensors", "scipy"],
        parameters=cost.parameters(shape),
        layers={"before": shape.n_layers, "after": shape.n_layers + 16},
        d_model=shape.d_model,
        bytes=2 * cost.parameters(shape),
        threads=torch.get_num_threads(),
        load_average=os.getloadavg(),
        **figures,
        operators=grown,
    )


def _shape(divide: int) -> ModelShape:
    layer = LayerShape(n_heads=32 // divide, n_kv_heads=max(1, 8 // divide), d_ff=14336 // divide)
    return ModelShape(
        d_model=4096 // divide,
        head_dim=128,
        vocabulary=128256 // divide,
        layers=(layer,) * 32,
        rope_theta=500_000.0,
        context=8192,
    )


def _write_checkpoint(shape: ModelShape, folder: Path) -> None:
    folder.mkdir()
    (folder / weights.SHAPE).write_text(json.dumps(shape.to_dict()), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Iterator[tuple[str, torch.Tensor]]:
        for p in layout.parameters(shape):
            if p.is_matrix:
                yield p.name, torch.empty(p.size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            else:
                yield p.name, torch.ones(p.size, dtype=torch.bfloat16)

    described = {name: (torch.bfloat16, size) for name, size in layout.sizes(shape).items()}
    weights_writer.write(folder / weights.WEIGHTS, described, drawn(), weights.hashes_beside(folder))


def _grow(source: Path, target: Path, operator: str) -> dict[str, float]:
    command = [sys.executable, "-m", "entasis", "grow", str(source), str(target)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--operator", operator, "--after", "15..30", "--json"], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{operator}: entasis grow ended with {os.waitstatus_to_exitcode(status)}")
    stored = StoredWeights(target)
    assert stored.shape.n_layers == 48
    assert stored.path.stat().st_size > 2 * cost.parameters(stored.shape)
    shutil.rmtree(target)
    # Linux counts in units of 1024 bytes.
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }


if __name__ == "__main__":
    main()
