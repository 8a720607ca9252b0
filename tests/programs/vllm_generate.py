"""Greedy generation by vLLM, in a process of an environment of its own: `python vllm_generate.py job.json out.json`."""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    model = LLM(**job["model"], dtype="float32", max_model_len=256, max_num_seqs=4, disable_log_stats=True)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
    parameters = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=1)
    actual = [output.outputs[0] for output in model.generate(prompts, parameters, use_tqdm=False)]
    content = {
        "config_module": type(model.llm_engine.model_config.hf_config).__module__,
        "tokens": [list(completion.token_ids) for completion in actual],
        "logprobs": [
            [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
            for completion in actual
        ],
    }
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(content, file)


if __name__ == "__main__":  # which vLLM's own processes import anew
    main()
