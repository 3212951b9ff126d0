"""Check for equal numbers to transformers on a real checkpoint, in fp32: perplexity and greedy completions.

    python bench/parity_with_transformers.py models/smollm2

Perplexity is that of the first 1,024 tokens of the LICENSE file; greedy completions are of 20 chat prompts, 64 tokens
each, sampled in one batch here and one by one by transformers.
"""

import argparse
import sys
import time
from pathlib import Path

import common
import torch

from minirl.attention import Packed
from minirl.kernels import linear_token_logprobs
from minirl.model import Transformer
from minirl.sampler import Sampler, SamplingParams
from minirl.tokenizer import Tokenizer

TOKENS, LENGTH = 1024, 64
PROMPTS = [f"What is {a} + {b}?" for a, b in ((3, 4), (12, 7), (9, 9), (20, 22), (5, 0))]
PROMPTS += [f"What is the capital of {x}?" for x in ("France", "Japan", "Peru", "Kenya", "Norway")]
PROMPTS += [f"Write one sentence about {x}." for x in ("the sea", "a dog", "rain", "bread", "the moon")]
PROMPTS += [f"Name three {x}." for x in ("colours", "fruits", "rivers", "planets", "tools")]


@torch.inference_mode()
def perplexities(model: Transformer, peer, ids: list[int]) -> tuple[float, float]:
    layout = Packed([(ids, [])])
    hidden = model(layout.tokens, layout)
    ours, _ = linear_token_logprobs(hidden[:-1], model.head_weight, layout.tokens[1:])
    theirs = peer(layout.tokens.unsqueeze(0)).logits[0, :-1].log_softmax(-1).gather(1, layout.tokens[1:].unsqueeze(1))
    return ours.mean().neg().exp().item(), theirs.mean().neg().exp().item()


def greedy_of_peer(peer, prompt: list[int], stop: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = peer.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH, pad_token_id=stop
    )
    return out[0, len(prompt) :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="models/smollm2", help="(default: %(default)s)")
    path = parser.parse_args().model
    common.need("transformers")
    common.need_checkpoint(path)
    from transformers import AutoModelForCausalLM

    model, tokenizer = Transformer.from_pretrained(path, torch.float32), Tokenizer.from_pretrained(path)
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    text = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    ours, theirs = perplexities(model, peer, tokenizer.encode(" ".join(text.split()))[:TOKENS])
    print(f"perplexity of {TOKENS} tokens: minirl {ours:.5f}, transformers {theirs:.5f}", flush=True)

    prompts = [tokenizer.chat([{"role": "user", "content": p}]) for p in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=LENGTH, stop_ids=tokenizer.stop_ids)
    started = time.perf_counter()
    completions = Sampler(model).generate(prompts, params)
    between = time.perf_counter()
    wanted = [greedy_of_peer(peer, prompt, tokenizer.stop_ids[0]) for prompt in prompts]
    print(
        f"greedy: {between - started:.0f} s for the batch here, {time.perf_counter() - between:.0f} s one by one there"
    )
    equal = sum(c.tokens == w for [c], w in zip(completions, wanted, strict=True))
    print(f"greedy completions equal to transformers': {equal} of {len(prompts)}")
    sys.exit(not (equal == len(prompts) and abs(ours - theirs) < 0.1))


if __name__ == "__main__":
    main()
