"""lm-eval's own harness over our models (the extra `eval`).

A context that several continuations share is read once and its keys and values are used for all of them; contexts
of equal length are read together. What does not fit into the model's context is cut from the left, as lm-eval's own
models do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from entasis.errors import UserError
from entasis.evaluate.generation import Sampling, generate
from entasis.evaluate.loading import Loaded
from entasis.model.cache import KVCache

_ROWS = 16
"""Contexts read together."""
_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm-eval's names for the same number, the first that is given counts."""
_CHOICE = ("do_sample", "temperature", "top_k", "top_p", "min_p")


class Harness(TemplateLM):
    """A `Loaded` model as lm-eval sees it. Raises `UserError` without a tokenizer that has an end-of-text token."""

    backend = "causal"

    def __init__(self, loaded: Loaded, max_length: int | None = None) -> None:
        super().__init__()
        if loaded.tokenizer is None or not loaded.stop:
            raise UserError("lm-eval needs a tokenizer with an end-of-text token; this model has none")
        self.loaded, self.tokenizer_ours = loaded, loaded.tokenizer
        self.max_length = max_length or loaded.shape.context

    @property
    def eot_token_id(self) -> int:
        end = self.tokenizer_ours.end_of_text
        return min(self.loaded.stop) if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty context."""
        return self.eot_token_id if self.loaded.first is None else self.loaded.first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids with what the model wants in front, as lm-eval's own model has them, unless lm-eval says otherwise."""
        return (
            self.tokenizer_ours.encode(string) if add_special_tokens is False else self.loaded.encode(string)
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each continuation after its context.

        Raises `UserError` for a continuation that the model's context cannot hold.
        """
        shared: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise UserError(
                    f"lm-eval: a continuation has {len(continuation)} tokens; the model's context is {self.max_length}"
                )
            shared[tuple(context[-room:])].append((number, continuation))
        by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for kept in shared:
            by_length[len(kept)].append(kept)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for contexts in by_length.values():
            for start in range(0, len(contexts), _ROWS):
                rows = contexts[start : start + _ROWS]
                self._answer(rows, [shared[c] for c in rows], answers)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _answer(
        self,
        contexts: list[tuple[int, ...]],
        wanted: list[list[tuple[int, list[int]]]],
        answers: list[tuple[float, bool]],
    ) -> None:
        """Reads contexts of one length, then all their continuations on top of copies of the cache."""
        model, device = self.loaded.model, self.loaded.device
        owner = [row for row, group in enumerate(wanted) for _ in group]
        numbers = [number for group in wanted for number, _ in group]
        continuations = [ids for group in wanted for _, ids in group]
        longest = max(map(len, continuations))
        dtype = model.norm.weight.dtype
        cache = KVCache(model.shape, len(contexts), len(contexts[0]) + longest, dtype=dtype, device=device)
        x_BTD = model.hidden(torch.tensor(contexts, device=device), cache=cache)
        first_RV = model.head_logits(x_BTD[:, -1]).float().log_softmax(-1)[owner]
        log_p_RTV = first_RV[:, None]
        if longest > 1:
            cache.layers = [layer[:, owner] for layer in cache.layers]
            padded = [ids[:-1] + [0] * (longest - len(ids)) for ids in continuations]
            rest_RTV = model(torch.tensor(padded, device=device), cache=cache).float().log_softmax(-1)
            log_p_RTV = torch.cat([log_p_RTV, rest_RTV], 1)
        for row, (number, ids) in enumerate(zip(numbers, continuations, strict=True)):
            chosen_TV = log_p_RTV[row, : len(ids)]
            targets_T = torch.tensor(ids, device=device)
            score = chosen_TV.gather(1, targets_T[:, None]).sum().item()
            answers[number] = (score, bool((chosen_TV.argmax(-1) == targets_T).all()))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of at most `max_length`."""
        result = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            result.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return result

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled continuations, cut at the first of the stop strings.

        Raises `UserError` for a setting of the task that is not known here.
        """
        result = []
        for number, request in enumerate(requests):
            text, settings = request.args
            stops, most, sampling = _read_settings(settings, seed=number)
            prompt, most = self._fit(self.tok_encode(text), most)
            ids: list[int] = []
            answer = ""
            for step in generate(
                self.loaded.model, [prompt], tokens=most, sampling=sampling, stop=self.loaded.stop
            ):
                ids += [x for x in step if x is not None]
                answer = self.tokenizer_ours.decode(ids)
                if any(stop in answer for stop in stops):
                    break
            for stop in stops:
                answer = answer.split(stop)[0]
            result.append(answer)
            self.cache_hook.add_partial("generate_until", (text, settings), answer)
        return result

    def _fit(self, prompt: list[int], most: int) -> tuple[list[int], int]:
        """The end of a prompt that leaves room for `most` new tokens, and how many of those there is room for.

        Where they alone would fill the context (lm-eval's own model refuses that), the prompt stays and what is left
        is written: at least one token.
        """
        kept = self.max_length - most if most < self.max_length else self.max_length - 1
        prompt = prompt[-kept:] or [self.eot_token_id]
        return prompt, min(most, self.max_length - len(prompt))


def _read_settings(settings: dict[str, Any], *, seed: int) -> tuple[list[str], int, Sampling]:
    """Stop strings, most new tokens and how to choose them, from a task's `generation_kwargs`.

    As in transformers a given temperature samples unless `do_sample` is false, and sampling without one is at 1. Each
    request has a seed of its own, so that repeats of one prompt differ. Raises `UserError` for an unknown setting.
    """
    if unknown := [
        name
        for name, value in settings.items()
        if name not in ("until", *_MOST_TOKENS, *_CHOICE) and not (name == "num_beams" and value == 1)
    ]:
        raise UserError(
            f"lm-eval: generation_kwargs has {unknown[0]}, which cannot be followed here; "
            f"known are until, {', '.join((*_MOST_TOKENS, *_CHOICE))}"
        )
    until = settings.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    most = next((settings[name] for name in _MOST_TOKENS if settings.get(name) is not None), 256)
    temperature = settings.get("temperature")
    do_sample = settings.get("do_sample")
    if do_sample is None:
        do_sample = bool(temperature)
    if not do_sample:
        return stops, int(most), Sampling(0.0)
    # transformers reads 0 as "no such filter".
    filters = {name: settings.get(name) or None for name in ("top_k", "top_p", "min_p")}
    return (
        stops,
        int(most),
        Sampling(1.0 if temperature is None else float(temperature), **filters, seed=seed),
    )


def run(
    loaded: Loaded,
    tasks: Sequence[str],
    *,
    include_path: str | Sequence[str] | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
) -> dict[str, Any]:
    """lm-eval's results for `tasks`, in its own form. Raises `UserError` for unknown tasks."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    folders = [include_path] if isinstance(include_path, str) else list(include_path or ())
    # lm-eval's own thousands are only looked through where they are needed.
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folders)
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(
                f"task {task!r} is not known to lm-eval; --include-path names a folder with tasks"
            )
    # lm-eval asks git about the current folder, which complains where it is none of its own, and pip about all there is.
    silent = mock.patch.multiple(
        evaluator, get_git_commit_hash=lambda: None, add_env_info=lambda storage: None
    )
    with silent:
        results = evaluator.simple_evaluate(
            model=Harness(loaded),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=fewshot,
            bootstrap_iters=1000,
            log_samples=False,
        )
    assert results is not None
    return results
