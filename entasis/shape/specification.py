"""From what a user writes to a shape.

A specification is a mapping, as under `shape:` in a recipe or as options of `entasis shape`. It is one of

- `{preset: crown-paper/crown-18, …}`: a preset; other keys replace its fields;
- `{layers: [{n_heads, n_kv_heads, d_ff}, …], d_model: …, …}`: the explicit list;
- `{profile: crown, layers: 18, d_model: 768, budget: 180M, …}`: a profile, solved to a budget where one is given.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from entasis.errors import UserError
from entasis.registry import advise
from entasis.shape import profiles, rounding
from entasis.shape.shapes import LayerShape, ModelShape
from entasis.shape.solve import MEASURES, Budget, Silhouette, Solution, flattened, solve

FIELDS = [f.name for f in dataclasses.fields(ModelShape)]
DESIGN = {
    "profile": "name of a profile, or {ffn: NAME, heads: NAME}; /reversed and /shuffled:SEED are controls",
    "ffn_multipliers": "numbers of the FFN profile: start, mid, end, frame, value, share, points, values",
    "head_multipliers": "the same for the heads",
    "budget": "a number such as 180M (parameters), or {parameters | parameters_without_input_embedding | "
    "flops_per_token | kv_bytes_per_token: NUMBER, sequence: N}",
    "scale": "whose multipliers meet the budget: ffn, heads or both",
    "rounding": "exact, tensor-core, crown-paper or corenet",
    "device": "for tensor-core: hopper or other",
    "ffn_multiple": "step between FFN widths, instead of the policy's",
    "q_per_kv": "query heads per KV head, the same in every layer",
    "n_kv_heads": "KV heads, the same in every layer",
    "aspect": "d_model / layers, when the budget has to find both",
}


def resolve(source: Mapping[str, Any]) -> Solution:
    """The shape that a specification describes. Raises `UserError`."""
    if not isinstance(source, Mapping):
        raise UserError(f"shape: {source!r} is not a mapping; write preset: NAME or profile: NAME")
    source = {key: value for key, value in source.items() if value is not None or key in _NULLABLE}
    known = ["preset", *FIELDS, *DESIGN]
    for key in source:
        if key not in known:
            raise UserError(f"shape: unknown key {key!r}; {advise(key, known)}")
    if "preset" in source:
        from entasis.shape.presets import preset

        for key in source:
            if key in DESIGN or key == "layers":
                raise UserError(f"shape: {key} cannot be combined with preset; name a profile instead")
        return Solution(dataclasses.replace(preset(source["preset"]), **_fields(source)))
    if isinstance(source.get("layers"), list | tuple):
        for key in source:
            if key in DESIGN:
                raise UserError(f"shape: {key} cannot be combined with an explicit list of layers")
        return Solution(ModelShape.from_dict(source))
    return _design(source)


_NULLABLE = {"rope_scaling", "attention_scale"}


def number(value: Any, where: str) -> int:
    """`180M`, `1.5B`, `4_000` or a plain number. Raises `UserError`."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([kKMBGT]?)", str(value).strip())
    if isinstance(value, bool) or not match:
        raise UserError(f"shape: {where} is {value!r}; write a number such as 180M or 1.5B")
    scale = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}[match[2]]
    return round(float(match[1].replace("_", "")) * scale)


def _fields(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key in FIELDS and key != "layers"}


def _design(source: Mapping[str, Any]) -> Solution:
    budget = _budget(source.get("budget"))
    if "profile" not in source:
        raise UserError("shape: name a preset, a profile, or give the list of layers")
    depth, width = source.get("layers"), source.get("d_model")
    if not budget and (depth is None or width is None):
        raise UserError("shape: give layers and d_model, or a budget that finds them")
    scale = source.get("scale", "heads" if budget and budget.kind == "kv_bytes_per_token" else "ffn")
    best: tuple[float, Solution] | None = None
    complaint: UserError | None = None
    for n, d in _candidates(source, depth, width):
        silhouette = _silhouette(source, n, d)
        if budget is None:
            shape = silhouette.shape()
            return Solution(shape, notes=tuple(flattened(silhouette, shape)))
        try:
            solution, factor = solve(silhouette, budget, scale)
        except UserError as error:
            complaint = error
            continue
        # Searching depth or width, the multipliers as given are the aim: the least bent candidate wins.
        bent = abs(math.log(factor)) + (abs(solution.miss) if abs(solution.miss) > 0.001 else 0) * 100
        if best is None or bent < best[0]:
            best = (bent, solution)
    if best is None:
        assert complaint is not None
        raise complaint
    if depth is None or width is None:
        shape = best[1].shape
        found = f"found {shape.n_layers} layers of d_model {shape.d_model}"
        return dataclasses.replace(best[1], notes=(found, *best[1].notes))
    return best[1]


def _candidates(source: Mapping[str, Any], depth: Any, width: Any) -> list[tuple[int, int]]:
    """Pairs (layers, d_model) to try."""
    head_dim = source.get("head_dim", 64)
    for name, value in (("layers", depth), ("d_model", width), ("head_dim", head_dim)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"shape: {name} is {value!r}; it must be a whole number of at least 1")
    if depth is not None and width is not None:
        return [(depth, width)]
    if depth is not None:
        return [(depth, head_dim * i) for i in range(1, 257)]
    if width is not None:
        return [(n, width) for n in range(1, 257)]
    aspect = source.get("aspect", 64)
    return [(n, max(1, round(aspect * n / head_dim)) * head_dim) for n in range(2, 129)]


def _silhouette(source: Mapping[str, Any], n: int, d_model: int) -> Silhouette:
    profile = source["profile"]
    names = profile if isinstance(profile, Mapping) else {"ffn": profile, "heads": profile}
    if set(names) != {"ffn", "heads"}:
        raise UserError(f"shape: profile is {profile!r}; write a name or {{ffn: NAME, heads: NAME}}")
    ratio, fixed = source.get("q_per_kv"), source.get("n_kv_heads")
    if ratio is not None and fixed is not None:
        raise UserError("shape: give q_per_kv (a ratio) or n_kv_heads (a number), not both")
    for name, value in (
        ("q_per_kv", ratio),
        ("n_kv_heads", fixed),
        ("ffn_multiple", source.get("ffn_multiple")),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"shape: {name} is {value!r}; it must be a whole number of at least 1")
    template = ModelShape(
        **{
            "head_dim": 64,
            "vocabulary": 50_304,
            **_fields(source),
            "d_model": d_model,
            "layers": (LayerShape(1, 1, 1),),
        }
    )
    return Silhouette(
        profiles.multipliers(names["ffn"], n, "ffn", _numbers(source, "ffn_multipliers")),
        profiles.multipliers(names["heads"], n, "heads", _numbers(source, "head_multipliers")),
        rounding.policy(
            source.get("rounding", "exact"),
            head_dim=template.head_dim,
            group=fixed or ratio or 1,
            ffn_multiple=source.get("ffn_multiple"),
            device=source.get("device", "other"),
        ),
        fixed,
        ratio or 1,
        template=template,
    )


def _numbers(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = source.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(
            f"shape: {key} is {value!r}; write the profile's numbers, such as {{start: 1, end: 4}}"
        )
    return value


def _budget(value: Any) -> Budget | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return Budget("parameters", number(value, "budget"))
    kinds = [key for key in value if key != "sequence"]
    if len(kinds) != 1 or kinds[0] not in MEASURES:
        raise UserError(f"shape: budget is {dict(value)!r}; name one of {', '.join(MEASURES)}")
    return Budget(kinds[0], number(value[kinds[0]], f"budget.{kinds[0]}"), int(value.get("sequence", 1024)))
