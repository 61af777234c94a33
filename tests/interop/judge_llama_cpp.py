"""llama.cpp as a judge: its log-probabilities after a prompt, through the wheel `xllamacpp`."""

from __future__ import annotations

from pathlib import Path

import xllamacpp


def open_server(path: Path, threads: int = 1) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 128
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = -1
    params.cpuparams.n_threads = threads
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def log_probabilities(server: xllamacpp.Server, ids: list[int] | str, top: int) -> dict[int, float]:
    """Token id → log-probability of the `top` likeliest next tokens."""
    answer = server.handle_completions(
        {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": top, "cache_prompt": False}
    )
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


def n_tokens(server: xllamacpp.Server, text: str) -> int:
    """How many tokens llama.cpp makes of a text."""
    answer = server.handle_completions(
        {"prompt": text, "n_predict": 1, "temperature": 0.0, "cache_prompt": False}
    )
    return answer["usage"]["prompt_tokens"]
