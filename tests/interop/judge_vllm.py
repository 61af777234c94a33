"""vLLM's opinion on an exported folder; run with the Python of vLLM's own environment (`make test-vllm`).

    python judge_vllm.py FOLDER PROMPTS.json ANSWER.json

PROMPTS.json is a list of lists of ids; ANSWER.json gets for each the 40 greedy tokens and the log-probabilities of the
prompt's own tokens, from the second on, and how many tokens the cache holds. In fp32: vLLM's own choice for fp32 weights is
bf16.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, answer = sys.argv[1:]
    engine = LLM(folder, trust_remote_code=True, dtype="float32", skip_tokenizer_init=True, max_model_len=128)
    sampling = SamplingParams(
        temperature=0, max_tokens=40, prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    asked = json.loads(Path(prompts).read_text())
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in asked], sampling)
    told = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "log_probabilities": [
                at[token].logprob
                for token, at in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            ],
        }
        for output in outputs
    ]
    cache = engine.llm_engine.vllm_config.cache_config
    size = {"blocks": cache.num_gpu_blocks, "tokens_per_block": cache.block_size}
    Path(answer).write_text(json.dumps({"answers": told, "cache": size}))
