"""Compare minirl's Sampler with transformers' `generate`: one process, the same checkpoint, prompts and stop tokens.

    python bench/sampler_vs_transformers.py models/smollm2 --json sampler.json

Both draw from the full distribution at temperature 1, so the lengths of their completions must agree within noise: the
table shows them. The sides take turns, after one warm-up each. Only useful tokens count, those up to and including the
stop token; work on rows that have already ended costs time and adds no tokens. Either side runs with
its defaults: transformers with left padding, scaled-dot-product attention and a dynamic cache, without torch.compile.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean, variance

import common

QUESTIONS = (
    "What is 3 + 4?",
    "Name a colour.",
    "Write one sentence about the sea.",
    "Is water wet? Answer yes or no.",
    "What is the capital of France? Answer in one word.",
    "Count from one to five.",
    "Give me three words that rhyme with cat, separated by commas, and nothing else.",
    "I have two apples, buy three more and eat one of them. How many are left? Answer with just the number.",
)
SIDES = ("minirl", "transformers")

Draw = Callable[
    [int], list[list[int]]
]  # seed -> tokens of every completion, possibly with padding behind the stop token


@dataclass
class Measured:
    """One round of one side."""

    seconds: float
    lengths: list[int]  # of the completions, stop tokens included
    stopped: float  # share that ended with a stop token

    @property
    def tokens_per_s(self) -> float:
        return sum(self.lengths) / self.seconds


def minirl_side(args, dtype, prompts: list[list[int]], stop_ids: tuple[int, ...]) -> Draw:
    from minirl.model import Transformer
    from minirl.sampler import Sampler, SamplingParams

    model = Transformer.from_pretrained(args.model, dtype, args.device)
    sampler = Sampler(model, slots=len(prompts) * args.completions)

    def draw(seed: int) -> list[list[int]]:
        params = SamplingParams(n=args.completions, max_tokens=args.max_tokens, stop_ids=stop_ids, seed=seed)
        return [completion.tokens for group in sampler.generate(prompts, params) for completion in group]

    return draw


def transformers_side(args, dtype, prompts: list[list[int]], stop_ids: tuple[int, ...]) -> Draw:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    width, pad = max(map(len, prompts)), stop_ids[0]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=args.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=args.device)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": args.max_tokens}
    options |= {"num_return_sequences": args.completions, "pad_token_id": pad, "eos_token_id": list(stop_ids)}

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()

    return draw


def measure(draw: Draw, seed: int, stop_ids: tuple[int, ...], device) -> Measured:
    started = common.now(device)
    completions = draw(seed)
    seconds = common.now(device) - started
    ends = [next((i for i, t in enumerate(tokens) if t in stop_ids), None) for tokens in completions]
    lengths = [len(tokens) if end is None else end + 1 for tokens, end in zip(completions, ends, strict=True)]
    return Measured(seconds, lengths, sum(end is not None for end in ends) / len(ends))


def compare(args, dtype) -> dict[str, list[Measured]]:
    """Measure rounds of both sides, in turns after a warm-up of each."""
    from minirl.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(args.model)
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in QUESTIONS]
    rounds = {name: [] for name in SIDES}
    draws = {}
    for name, side in zip(SIDES, (minirl_side, transformers_side), strict=True):
        draws[name] = side(args, dtype, prompts, tokenizer.stop_ids)
        warm = measure(draws[name], 0, tokenizer.stop_ids, args.device)
        common.progress(f"warm-up    {name:12}  {warm.seconds:7.1f} s")
    for seed in range(1, args.repeats + 1):
        for name in SIDES:
            rounds[name].append(measure(draws[name], seed, tokenizer.stop_ids, args.device))
            common.progress(f"round {seed}/{args.repeats}  {name:12}  {rounds[name][-1].tokens_per_s:7.1f} tokens/s")
    return rounds


def summary(rounds: list[Measured], group: int) -> dict:
    """Return the numbers of one side; `group` consecutive lengths belong to one prompt."""
    of_prompt = [[n for r in rounds for n in r.lengths[i : i + group]] for i in range(0, len(rounds[0].lengths), group)]
    return {
        "tokens_per_s": common.spread([r.tokens_per_s for r in rounds]),
        "seconds": common.spread([r.seconds for r in rounds]),
        "mean_length": fmean(map(fmean, of_prompt)),
        # One standard error, of the draws: the prompts are the same on both sides.
        "mean_length_error": sum(variance(x) / len(x) for x in of_prompt) ** 0.5 / len(of_prompt),
        "stopped": fmean(r.stopped for r in rounds),
        "rounds": [asdict(r) for r in rounds],
    }


def show(sides: dict[str, dict], ratios: list[float]) -> None:
    rows = []
    for name, s in sides.items():
        speed = s["tokens_per_s"]
        rates = (f"{speed['median']:.1f}", f"{speed['min']:.1f} to {speed['max']:.1f}", f"{s['seconds']['median']:.2f}")
        length = f"{s['mean_length']:.1f} ± {s['mean_length_error']:.1f}"
        rows.append((name, *rates, length, f"{s['stopped']:.0%}"))
    print(common.table(("", "tokens/s", "range", "seconds", "mean length", "stopped"), rows))
    print(f"minirl / transformers, useful tokens per second: {common.ratio_text(ratios)}")


def arguments() -> argparse.Namespace:
    parser = common.arguments(__doc__, "rounds of each side, after a warm-up", 3)
    add = parser.add_argument
    add("--completions", type=int, default=8, help=f"of each of the {len(QUESTIONS)} prompts (default: %(default)s)")
    add("--max-tokens", type=int, default=64, help="longest completion (default: %(default)s)")
    args = parser.parse_args()
    common.at_least(parser, args, completions=2, max_tokens=1, repeats=1)
    return args


def main() -> None:
    args = arguments()
    common.need("transformers")
    common.need_checkpoint(args.model)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from minirl.policy import pick_device, pick_dtype

    args.device = pick_device(args.device)
    rounds = compare(args, pick_dtype(args.dtype, args.device))
    pairs = zip(*(rounds[name] for name in SIDES), strict=True)
    ratios = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]
    host = common.machine(common.device_name(args.device))
    sides = {name: summary(rounds[name], args.completions) for name in SIDES}
    print(f"{common.describe(host)}, {args.dtype}")
    print(f"{len(QUESTIONS)} prompts x {args.completions} completions of up to {args.max_tokens} tokens")
    show(sides, ratios)
    common.write_json(args, {"machine": host, "sides": sides, "ratio": common.spread(ratios), "ratios": ratios})


if __name__ == "__main__":
    common.run(main)
