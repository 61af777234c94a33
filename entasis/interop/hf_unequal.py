"""Our own exported folders with unequal layers, read by their config; the code in them is not run.

`per_layer_config` gives some layers their own heads, KV heads and FFN width: as transformers saves it, a number
that equals the whole model's is left out, and so is a layer with none left. Folders of earlier versions have
`layer_shapes`, a list of [heads, KV heads, FFN width].
"""

from __future__ import annotations

from entasis.interop.hf_families import Reader, family, layer_count, llama, olmo2, qwen3
from entasis.interop.plan import Plan
from entasis.interop.settings import Settings
from entasis.shape.shapes import LayerShape

_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def layers(config: Settings, n_tensors: int) -> list[LayerShape]:
    """The layers that a config describes. Raises `UserError` for anything in it that is not known."""
    count = layer_count(config, "num_hidden_layers", n_tensors)
    if config.get("layer_shapes") is not None:
        return _of_earlier_versions(config, count)
    given = config.mapping("per_layer_config")
    if given is None:
        raise config.wrong("per_layer_config", None, f"a mapping of layers, from 0 to {count - 1}")
    heads = config.whole("num_attention_heads")
    whole = [heads, config.whole("num_key_value_heads", heads), config.whole("intermediate_size")]
    result = [_layer(whole)] * count
    seen: set[int] = set()
    for key in given:
        index = int(key) if key.isdecimal() and len(key) < 10 else count
        if index >= count or index in seen:
            raise config.wrong("per_layer_config", key, f"layers from 0 to {count - 1}, each once")
        seen.add(index)
        where = f"{config.where}: per_layer_config: {key}"
        one = Settings(Settings(given, f"{config.where}: per_layer_config").mapping(key) or {}, where)
        for name in one.values:
            if name not in _WIDTHS:
                raise one.refuse(name, f"only {', '.join(_WIDTHS)} differ between layers here")
        numbers = [one.whole(name, default) for name, default in zip(_WIDTHS, whole, strict=True)]
        result[index] = _layer(numbers)
    return result


def _of_earlier_versions(config: Settings, count: int) -> list[LayerShape]:
    given = config.get("layer_shapes")
    if not isinstance(given, list) or len(given) != count or not all(isinstance(x, list) for x in given):
        raise config.wrong("layer_shapes", given, f"a list of {count} lists, one for each layer")
    lists = Settings({f"layer_shapes[{i}]": numbers for i, numbers in enumerate(given)}, config.where)
    return [_layer(lists.wholes(key, 3)) for key in lists.values]


def _layer(widths: list[int]) -> LayerShape:
    heads, kv_heads, width = widths
    return LayerShape(heads, kv_heads, width)


for _name, _read in (("llama", llama), ("qwen3", qwen3), ("olmo2", olmo2)):

    @family(
        f"entasis_{_name}",
        model_types=(f"entasis_{_name}",),
        architectures=("EntasisForCausalLM",),
        reads=("per_layer_config", "layer_shapes"),
    )
    def _(config: Settings, n_tensors: int, read: Reader = _read) -> Plan:
        return read(config, n_tensors, layers(config, n_tensors))
