"""A change that is not meant to change numbers leaves this curve as it is.

Taken in fp32 on one thread. The order in which a matrix product is summed depends on the kernels that a CPU gets, so
on another kind of CPU the last bits may differ: the bound is 1e-5, relative. On one machine the curve is the same to
the bit from run to run and through every setting that is not part of the computation. A change of initialisation,
order, schedule, optimizer or loss moves it by far more than the bound.
"""

import pytest

from entasis.train.metrics import records
from entasis.train.run import train

LOSSES = [
    5.579196929931641,
    5.400956153869629,
    4.796442985534668,
    4.423785209655762,
    3.9602138996124268,
    3.645700454711914,
    3.268768787384033,
    3.0920090675354004,
    2.7849836349487305,
    2.626927614212036,
    2.5227928161621094,
    2.446406841278076,
    2.5408177375793457,
    2.345602035522461,
    2.5291123390197754,
    2.301929473876953,
    2.2426137924194336,
    2.238643169403076,
    2.2390100955963135,
    2.4027881622314453,
]
BITS_PER_BYTE = 3.2945321848726086


@pytest.fixture
def golden(tmp_path):
    """A corpus that no release of Python changes, and a recipe for it."""
    from entasis.data.prepare import prepare
    from entasis.train.recipe import from_dict

    (tmp_path / "text").mkdir()
    for n in range(12):
        words = " ".join(str((n + 1) * k * k % 997) for k in range(400))
        (tmp_path / "text" / f"squares-{n}.txt").write_text(f"The squares of {n + 1}: {words}.\n")
    prepare([tmp_path / "text"], tmp_path / "corpora", tokenizer="bytes", validation=0.2)

    def make(**changes):
        layers = [{"n_heads": 1, "n_kv_heads": 1, "d_ff": 96}, {"n_heads": 4, "n_kv_heads": 2, "d_ff": 48}]
        source = {
            "shape": {"d_model": 32, "head_dim": 8, "vocabulary": 257, "context": 64, "layers": layers},
            "data": {
                "train": str(tmp_path / "corpora" / "train"),
                "validation": str(tmp_path / "corpora" / "validation"),
                "sequence": 64,
            },
            "batch": {"tokens": 512, "micro": 4},
            "tokens": 512 * 20,
            "optimizer": {"lr": 1e-2},
            "precision": "fp32",
            "compile": False,
            "attention": "plain",
            "device": "cpu",
            "logging": {"tensorboard": False},
        }
        return from_dict({**source, **changes})

    return make


def run(recipe, folder):
    result = train(recipe, folder)
    return [row["loss"] for row in records(folder)], result["validation"]["bits_per_byte"]


def test_the_curve_is_the_golden_one(golden, tmp_path):
    losses, bits_per_byte = run(golden(), tmp_path / "run")
    assert losses == pytest.approx(LOSSES, rel=1e-5)
    assert bits_per_byte == pytest.approx(BITS_PER_BYTE, rel=1e-5)


def test_what_is_no_computation_changes_no_bit(golden, tmp_path):
    expected = run(golden(), tmp_path / "plain")
    settings = {
        "checkpoint": {"every": 3, "keep_every": 6},
        "logging": {"tensorboard": True},
        "evaluation": {"every": 7, "tokens": 1000},
    }
    losses, _ = run(golden(**settings), tmp_path / "changed")
    assert losses == expected[0]
    assert run(golden(), tmp_path / "again") == expected
