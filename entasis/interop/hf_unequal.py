"""Our own exported folders with unequal layers, read by their config; the code in them is not run.

`per_layer_config` gives some layers their own heads, KV heads and FFN width: as transformers saves it, a number
that equals the whole model's is left out, and so is a layer with none left. Folders of earlier versions have
`layer_shapes`, a list of [heads, KV heads, FFN width].
"""

from __future__ import annotations

from entasis.interop.config_reader import ConfigReader, Description, read_layer_count
from entasis.interop.hf_families import FAMILIES, Reader, family, read_llama, read_olmo2, read_qwen3
from entasis.interop.hf_gelu_families import read_starcoder2
from entasis.shape.shapes import LayerShape

WIDTH_KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""What a layer's own config may say: its query heads, KV heads and FFN width."""


def read_layers(config: ConfigReader, n_tensors: int) -> list[LayerShape]:
    """The layers that a config describes. Raises `UserError` for anything in it that is not known."""
    count = read_layer_count(config, "num_hidden_layers", n_tensors)
    if config.get("layer_shapes") is not None:
        return _read_layer_shapes(config, count)
    given = config.mapping("per_layer_config")
    if given is None:
        raise config.wrong("per_layer_config", None, f"a mapping of layers, from 0 to {count - 1}")
    heads = config.integer("num_attention_heads")
    default = [heads, config.integer("num_key_value_heads", heads), config.integer("intermediate_size")]
    result = [_layer(default)] * count
    seen: set[int] = set()
    for key in given:
        index = int(key) if key.isdecimal() and len(key) < 10 else count
        if index >= count or index in seen:
            raise config.wrong("per_layer_config", key, f"layers from 0 to {count - 1}, each once")
        seen.add(index)
        where = f"{config.where}: per_layer_config: {key}"
        one = ConfigReader(ConfigReader(given, f"{config.where}: per_layer_config").mapping(key) or {}, where)
        for name in one.values:
            if name not in WIDTH_KEYS:
                raise one.refuse(name, f"only {', '.join(WIDTH_KEYS)} differ between layers here")
        numbers = [one.integer(name, value) for name, value in zip(WIDTH_KEYS, default, strict=True)]
        result[index] = _layer(numbers)
    return result


def _read_layer_shapes(config: ConfigReader, count: int) -> list[LayerShape]:
    given = config.get("layer_shapes")
    if not isinstance(given, list) or len(given) != count or not all(isinstance(x, list) for x in given):
        raise config.wrong("layer_shapes", given, f"a list of {count} lists, one for each layer")
    lists = ConfigReader({f"layer_shapes[{i}]": numbers for i, numbers in enumerate(given)}, config.where)
    return [_layer(lists.integers(key, 3)) for key in lists.values]


def _layer(widths: list[int]) -> LayerShape:
    heads, kv_heads, d_ff = widths
    return LayerShape(heads, kv_heads, d_ff)


for _name, _read in (
    ("llama", read_llama),
    ("qwen3", read_qwen3),
    ("olmo2", read_olmo2),
    ("starcoder2", read_starcoder2),
):

    @family(
        f"entasis_{_name}",
        names=FAMILIES[_name].names,
        model_types=(f"entasis_{_name}",),
        architectures=("EntasisForCausalLM",),
        reads=("per_layer_config", "layer_shapes"),
    )
    def _(config: ConfigReader, n_tensors: int, read: Reader = _read) -> Description:
        return read(config, n_tensors, read_layers(config, n_tensors))
