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
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from entasis.configuration import Settings, parse
from entasis.errors import UserError
from entasis.registry import advise
from entasis.shape import profiles, rounding
from entasis.shape.presets import PRESETS
from entasis.shape.shapes import MOST, MOST_LAYERS, LayerShape, ModelShape
from entasis.shape.solve import MEASURES, Budget, Silhouette, Solution, flattened, nearest

FIELDS = [f.name for f in dataclasses.fields(ModelShape)]
DESIGN = {
    "profile": "name of a profile, or {ffn: NAME, heads: NAME}; /reversed and /shuffled:SEED are controls",
    "ffn_multipliers": "numbers of the FFN profile: start, mid, end, frame, value, share, points, values",
    "head_multipliers": "the same for the heads",
    "budget": "a number such as 180M (parameters), or {parameters | parameters_without_input_embedding | "
    "flops_per_token | kv_bytes_per_token: NUMBER, sequence: N, attended: full | causal}",
    "scale": "whose multipliers meet the budget: ffn, heads or both",
    "rounding": "exact, tensor-core, crown-paper or corenet",
    "device": "for tensor-core: hopper or other",
    "ffn_multiple": "step between FFN widths, instead of the policy's",
    "q_per_kv": "query heads per KV head, the same in every layer",
    "n_kv_heads": "KV heads, the same in every layer",
    "aspect": "d_model / layers, when the budget has to find both",
}

DEFAULT_VOCABULARY = 50_304
"""GPT-2's, padded to a multiple of 64."""

Whole = Annotated[int, Field(ge=1, le=MOST)] | None
Numbers = dict[str, Any] | None


class _Names(Settings):
    ffn: str
    heads: str


class _Design(Settings):
    """Types and ranges of what `DESIGN` describes."""

    model_config = ConfigDict(extra="ignore")

    profile: str | _Names
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)] | None = None
    d_model: Whole = None
    head_dim: Whole = None
    ffn_multipliers: Numbers = None
    head_multipliers: Numbers = None
    scale: Literal["ffn", "heads", "both"] | None = None
    rounding: str = "exact"
    device: str | None = None
    ffn_multiple: Whole = None
    q_per_kv: Whole = None
    n_kv_heads: Whole = None
    aspect: Annotated[float, Field(ge=0.01, le=10_000)] = 64


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


def preset(name: str) -> ModelShape:
    """The shape of a published model. Raises `UserError` for an unknown name, with the nearest."""
    found = PRESETS.find(name)
    return found if isinstance(found, ModelShape) else resolve(found).shape


_NULLABLE = {"rope_scaling", "attention_scale"}


def number(value: Any, where: str) -> int:
    """`180M`, `1.5B`, `4_000` or a plain number. Raises `UserError`."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([kKMBGT]?)", str(value).strip())
    scale = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    result = float(match[1].replace("_", "")) * scale[match[2]] if match else math.inf
    if isinstance(value, bool) or math.isinf(result):
        raise UserError(f"shape: {where} is {value!r}; write a number such as 180M or 1.5B")
    return round(result)


def _fields(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key in FIELDS and key != "layers"}


def _design(source: Mapping[str, Any]) -> Solution:
    budget = _budget(source.get("budget"))
    if "profile" not in source:
        raise UserError("shape: name a preset, a profile, or give the list of layers")
    parse(_Design, dict(source), "shape")
    depth, width = source.get("layers"), source.get("d_model")
    if not budget and (depth is None or width is None):
        raise UserError("shape: give layers and d_model, or a budget that finds them")
    if budget is None and "scale" in source:
        raise UserError(f"shape: scale is {source['scale']!r}, and there is no budget to meet with it")
    scale = source.get("scale", "heads" if budget and budget.kind == "kv_bytes_per_token" else "ffn")
    if "aspect" in source and (depth is not None or width is not None):
        given = "layers" if depth is not None else "d_model"
        raise UserError(f"shape: aspect is for a budget that finds layers and d_model; {given} is given")
    silhouettes = _silhouettes(source, _candidates(source, depth, width))
    if budget is None:
        shape = silhouettes[0].shape()
        return Solution(
            shape, notes=(*flattened(silhouettes[0], shape), *_too_few_layers(source, shape.n_layers))
        )
    try:
        found = nearest(silhouettes, budget, scale)
    except UserError as error:
        if "vocabulary" in source or budget.kind == "kv_bytes_per_token":
            raise
        raise UserError(
            f"{error}; the vocabulary was left at its default of {DEFAULT_VOCABULARY:,} rows, give your own"
        ) from error
    notes = _too_few_layers(source, found.shape.n_layers)
    if depth is None or width is None:
        notes.insert(0, f"found {found.shape.n_layers} layers of d_model {found.shape.d_model}")
    return dataclasses.replace(found, notes=(*notes, *found.notes))


def _too_few_layers(source: Mapping[str, Any], n: int) -> list[str]:
    """What is to be said of profiles whose `n` layers span less than half of what many would."""
    notes = []
    for kind, name in _profiles_of(source).items():
        options = source.get("ffn_multipliers" if kind == "ffn" else "head_multipliers") or {}
        try:
            ours, many = (profiles.multipliers(name, k, kind, options) for k in (n, 64))
        except UserError:  # a list of values has one length
            continue
        if max(ours) - min(ours) < (max(many) - min(many)) / 2:
            notes.append(
                f"{n} layers are too few for {name}: its {kind} multipliers go from {min(ours):.3g} to {max(ours):.3g}, "
                f"over 64 layers from {min(many):.3g} to {max(many):.3g}"
            )
    return notes


def _profiles_of(source: Mapping[str, Any]) -> Mapping[str, str]:
    profile = source["profile"]
    return profile if isinstance(profile, Mapping) else {"ffn": profile, "heads": profile}


def _candidates(source: Mapping[str, Any], depth: Any, width: Any) -> list[tuple[int, int]]:
    """Pairs (layers, d_model) to try."""
    head_dim = source.get("head_dim", 64)
    if depth is not None and width is not None:
        return [(depth, width)]
    if depth is not None:
        if depth > 256:
            raise UserError(f"shape: layers is {depth}; give d_model too where it is more than 256")
        return [(depth, head_dim * i) for i in range(1, 257)]
    if width is not None:
        return [(n, width) for n in range(1, 257)]
    aspect = source.get("aspect", 64)
    return [(n, max(1, round(aspect * n / head_dim)) * head_dim) for n in range(2, 129)]


def _silhouettes(source: Mapping[str, Any], candidates: list[tuple[int, int]]) -> list[Silhouette]:
    """Those of the candidates (layers, d_model) that can be. Raises the `UserError` of the last where none can."""
    found, complaint = [], None
    for n, d_model in candidates:
        try:
            found.append(_silhouette(source, n, d_model))
        except UserError as error:  # a width may be none for the interface
            complaint = error
    if not found and complaint:
        raise complaint
    return found


def _silhouette(source: Mapping[str, Any], n: int, d_model: int) -> Silhouette:
    names = _profiles_of(source)
    ratio, fixed = source.get("q_per_kv"), source.get("n_kv_heads")
    if ratio is not None and fixed is not None:
        raise UserError("shape: give q_per_kv (a ratio) or n_kv_heads (a number), not both")
    template = ModelShape(
        **{
            "head_dim": 64,
            "vocabulary": DEFAULT_VOCABULARY,
            **_fields(source),
            "d_model": d_model,
            "layers": (LayerShape(1, 1, 1),),
        }
    )
    return Silhouette(
        profiles.multipliers(names["ffn"], n, "ffn", source.get("ffn_multipliers") or {}),
        profiles.multipliers(names["heads"], n, "heads", source.get("head_multipliers") or {}),
        rounding.policy(
            source.get("rounding", "exact"),
            head_dim=template.head_dim,
            group=fixed or ratio or 1,
            ffn_multiple=source.get("ffn_multiple"),
            device=source.get("device"),
        ),
        fixed,
        ratio or 1,
        template=template,
    )


def _budget(value: Any) -> Budget | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return Budget("parameters", number(value, "budget"))
    kinds = [key for key in value if key not in ("sequence", "attended")]
    if len(kinds) != 1 or kinds[0] not in MEASURES:
        raise UserError(f"shape: budget is {dict(value)!r}; name one of {', '.join(MEASURES)}")
    return Budget(
        kinds[0],
        number(value[kinds[0]], f"budget.{kinds[0]}"),
        number(value.get("sequence", 1024), "budget.sequence"),
        value.get("attended", "full"),
    )
