"""What a shape makes of its fields."""

import pytest

from entasis.shape import LayerShape, ModelShape

LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "numbers"), [("default", {}), ("linear", {"factor": 2}), ("llama3", LLAMA3)]
)
def test_the_kind_of_rope_scaling_has_one_name(kind, numbers):
    size = {"d_model": 32, "head_dim": 16, "vocabulary": 64, "layers": (LayerShape(2, 1, 32),)}
    plain = ModelShape(**size, rope_scaling={"rope_type": kind, **numbers})
    for other in ({"type": kind, **numbers}, {**numbers, "type": "old", "rope_type": kind}):
        shape = ModelShape(**size, rope_scaling=other)
        assert shape == plain
        assert shape.to_dict()["rope_scaling"] == {"rope_type": kind, **numbers}
