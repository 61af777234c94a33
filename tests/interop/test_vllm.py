"""Exported folders give the same tokens in vLLM. `make test-vllm` runs this, in two environments."""

import copy
import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from test_export import OLMO, QWEN, made, trained  # noqa: F401  (trained is a fixture)

from entasis.cli import main
from entasis.interop.exporting import export
from entasis.model import weights
from entasis.shape import LayerShape

PYTHON = os.environ.get("VLLM_PYTHON")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
HEADS = ((4, 4, 320), (2, 1, 896), (3, 3, 512), (6, 2, 384), (4, 1, 640), (1, 1, 448))
UNEQUAL = tuple(LayerShape(*widths) for widths in HEADS)
HALVES = (*UNEQUAL[:2], LayerShape(0, 0, 512), LayerShape(3, 1, 0))
CASES = {
    "llama": (UNEQUAL, {}, "hf"),
    "qwen3": (UNEQUAL, QWEN, "hf"),
    "olmo2": (UNEQUAL, OLMO, "hf"),
    "llama-biased": (UNEQUAL, {"qkv_bias": True, "ffn_bias": True}, "hf"),
    "llama-halves": (HALVES, {"tied_embeddings": True}, "hf"),
    "qwen3-padded": (UNEQUAL, QWEN, "padded"),
}
# Unequal layers by copies; predicted and averaged ones between equal layers; norms of new layers that are zero.
GROWN = [
    ("llama_pro", {}, UNEQUAL),
    ("half_step", QWEN, HALVES),
    ("llama_pro", OLMO, UNEQUAL),
    ("lesa", {}, (LayerShape(4, 2, 320),) * 6),
    ("average", QWEN, (LayerShape(4, 2, 320),) * 6),
]


def asked_vllm(folder, prompts, tmp_path):
    """What vLLM answers, and how many tokens a cache of 1 GiB holds."""
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    script = Path(__file__).with_name("judge_vllm.py")
    command = [PYTHON, script, folder, tmp_path / "prompts.json", tmp_path / "answer.json"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SETTINGS
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "answer.json").read_text())
    return told["answers"], told["cache"]["blocks"] * told["cache"]["tokens_per_block"]


def check_answers(model, tokenizer, tmp_path):
    """vLLM's forty greedy tokens for `out` are ours, and its log-probabilities as near to fp64's as ours are. Returns how many tokens
    its cache holds."""
    prompts = [tokenizer.encode(text) for text in ("import json\n", "def dumps(obj, *, indent=None):\n    ")]
    answers, cached = asked_vllm(tmp_path / "out", prompts, tmp_path)
    exact, rounding = copy.deepcopy(model).double(), 0.0
    for prompt, theirs in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            ours, right = (
                m(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for m in (model, exact)
            )
            for _ in range(40):
                ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
        assert theirs["tokens"] == ids[0, len(prompt) :].tolist()
        # How far fp32 is from the right answer depends on the model and on the processor's order of sums.
        rounding = max(rounding, float((ours - right).abs().max()))
        assert (torch.tensor(theirs["log_probabilities"]).double() - right).abs().max() < 4 * rounding + 2e-5
    return cached


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="needs vLLM's own environment: make test-vllm")
@pytest.mark.parametrize("case", CASES)
def test_forty_greedy_tokens_and_prompt_log_probabilities_are_ours(tmp_path, trained, case):  # noqa: F811
    layers, changes, to = CASES[case]
    model = made(tmp_path / "model", trained, layers, {"d_model": 256, "head_dim": 64, **changes})
    assert export(tmp_path / "model", tmp_path / "out", to=to)["remote_code"] == (to == "hf")
    cached = check_answers(model, trained, tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    whole = {"num_key_value_heads": config["num_key_value_heads"]}
    kv_heads = [
        config.get("per_layer_config", {}).get(str(i), whole)["num_key_value_heads"]
        for i in range(len(layers))
    ]
    per_token = 2 * 4 * model.shape.head_dim * sum(kv_heads)
    print(f"{case}: {cached:,} tokens in 1 GiB, {per_token} bytes each")
    assert 0 <= 2**30 // per_token - cached < 256


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="needs vLLM's own environment: make test-vllm")
@pytest.mark.parametrize("operator, block, layers", GROWN)
def test_a_grown_model_answers_as_ours(tmp_path, trained, operator, block, layers):  # noqa: F811
    made(tmp_path / "model", trained, layers, {"d_model": 256, "head_dim": 64, **block})
    command = ["grow", tmp_path / "model", tmp_path / "grown", "--operator", operator, "--after", "1..2"]
    assert main([str(word) for word in command]) == 0
    export(tmp_path / "grown", tmp_path / "out", to="hf")
    grown = weights.load(tmp_path / "grown").eval()
    assert grown.shape.n_layers == len(layers) + 2
    check_answers(grown, trained, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="needs vLLM's own environment: make test-vllm")
def test_it_is_served_over_http(tmp_path, trained):  # noqa: F811
    made(tmp_path / "model", trained, UNEQUAL, {"d_model": 256, "head_dim": 64})
    export(tmp_path / "model", tmp_path / "out", to="hf")
    model, chosen = weights.load(tmp_path / "model").eval(), trained.encode("import json\n")
    ids = torch.tensor([chosen])
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SETTINGS
    words = ["--model", "out", "--trust-remote-code", "--dtype", "float32", "--port", str(port)]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *words]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(1)
        body = {"model": "out", "prompt": "import json\n", "max_tokens": 20, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request))["choices"][0]
    finally:
        server.terminate()
        server.wait()
        log.close()
    assert answer["token_ids"] == ids[0, len(chosen) :].tolist()
