"""Say what this machine and its software can do: what is slow, and the cure.

examples:
  entasis environment
  entasis environment --json

Products of matrices are timed in fp32 and bf16 (about a second); nothing is written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    from entasis.train.environment import examine_environment

    found = examine_environment(Path.cwd())
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in _rows(found):
        print(f"{name:16}{value}")
    print()
    for what, cure in found["slow"]:
        print(f"slow: {what}\n      {cure}")
    if not found["slow"]:
        print("nothing here is slow")
    return 0


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from entasis.train.environment import EXTRAS

    versions = found["versions"]
    fp32, bf16 = (found["flops_per_second"][precision] / 1e9 for precision in ("fp32", "bf16"))
    cores = f"{found['cores']} cores ({found['physical_cores']} physical), {found['threads']} threads"
    missing = dict.fromkeys(EXTRAS[name] for name, version in found["extras"].items() if version is None)
    extras = ", ".join(f"{name} {version}" for name, version in found["extras"].items() if version)
    gpus = [f"{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB" for gpu in found["gpus"]]
    return [
        ("entasis", f"{versions['entasis']}, Python {versions['python']}, numpy {versions['numpy']}"),
        ("torch", f"{versions['torch']} ({found['torch_build']})"),
        ("platform", found["platform"]),
        ("processor", found["processor"]),
        ("features", ", ".join(found["cpu_features"]) or "none that matters here"),
        ("cores", cores),
        ("GPU", "; ".join(gpus) or "none"),
        ("fp32", f"{fp32:,.0f} GFLOP/s in a large product, measured"),
        ("bf16", f"{bf16:,.0f} GFLOP/s, {bf16 / fp32:.2f} of fp32"),
        ("compiler", "found" if found["compiler"] else "none"),
        (
            "memory",
            f"{found['free_memory_bytes'] / 2**30:,.1f} of {found['memory_bytes'] / 2**30:,.1f} GiB free",
        ),
        ("disk", f"{found['free_disk_bytes'] / 2**30:,.1f} GiB free here"),
        ("extras", extras or "none"),
        *([("not installed", f"pip install 'entasis[{','.join(missing)}]'")] if missing else []),
    ]
