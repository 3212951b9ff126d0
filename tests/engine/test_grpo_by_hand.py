"""One step of GRPO in plain PyTorch, line by line, beside the step that minirl takes: the tutorial.

Read it if you know PyTorch and not reinforcement learning. A language model is here called the policy: in each state
(the text so far) it has a probability for each action (the next token). Nobody shows it what to write. It writes by
itself, a reward says how good each text was as a whole, and a gradient step makes the better ones more likely.
GRPO is from DeepSeekMath, arXiv 2402.03300, section 4.1; the equation numbers are that paper's.
"""

import pytest
import torch
from helpers import Quiet, check_close, fp32_tolerance, full_logits, records

from minirl.grpo import GRPOConfig
from minirl.lab.training import train_grpo
from minirl.losses import PolicyLoss
from minirl.model import Transformer
from minirl.sampler import Sampler
from minirl.task import Task
from minirl.tokenizer import Tokenizer

G, EPOCHS, LR, CLIP, BETA, DECAY = 3, 2, 0.03, 0.2, 0.1, 0.01
# Two prompts to train on. The third is held out: minirl measures accuracy on it, which this test does not look at.
TRAIN, HELDOUT = [{"prompt": "1+2="}, {"prompt": "40+5="}], [{"prompt": "7+7="}]


def variety(prompts, completions, **columns) -> list[float]:
    """Reward a text for different characters. Any function of the texts will do: no gradient flows through it."""
    return [len(set(text)) / 6 for text in completions]


def log_probs(model: Transformer, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return log π(o_t | q, o_<t) of each token o_t of a completion o of the prompt q, [T]."""
    logp = full_logits(model, prompt + completion).log_softmax(dim=-1)  # [len(prompt) + T, vocabulary]
    # The logits at a position are about the next token, so those of the completion start one place before it.
    return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def step_by_hand(folder, groups, rewards, dtype) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Take one GRPO step. Return how far it moved each weight, and the numbers of each update.

    groups: for each prompt its tokens and G completions, as token ids; rewards [prompts, G], of the same completions.
    """
    policy = Transformer.from_pretrained(folder).to(dtype)
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}

    # 1. The advantage: how much better a completion is than the others of its prompt (section 4.1.2). The group's mean
    #    is the baseline, so an easy prompt pushes no harder than a difficult one; PPO trains a second network for that.
    R = rewards.to(dtype)
    A = (R - R.mean(dim=1, keepdim=True)) / (R.std(dim=1, keepdim=True) + 1e-4)
    rows = [(q, o, A[i, j]) for i, (q, completions) in enumerate(groups) for j, o in enumerate(completions)]

    # 2. What the policy gave each token before the step. The samples serve two updates, and in the second the policy
    #    is not the one that drew them any more: these are the denominators of the ratios. In the first step of a run
    #    the reference, from which the policy shall not stray, is the same model.
    with torch.no_grad():
        old = [log_probs(policy, q, o) for q, o, _ in rows]
    reference = old

    m = {name: torch.zeros_like(p) for name, p in start.items()}  # AdamW's mean of the gradient
    v = {name: torch.zeros_like(p) for name, p in start.items()}  # and of its square
    numbers = []
    for update in range(1, EPOCHS + 1):
        loss, clipped = 0.0, []
        for i, (q, o, advantage) in enumerate(rows):
            logp = log_probs(policy, q, o)

            # 3. The importance ratio of each token. In the first update it is 1 and its gradient that of log π: plain
            #    policy gradient, in which a positive advantage makes all tokens of the completion more likely.
            ratio = (logp - old[i]).exp()

            # 4. PPO's clip: a token whose probability has already moved by more than 20 % the way of its advantage
            #    has no gradient any more. The minimum keeps the gradient of one that moved the other way.
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            clipped += (surrogate < ratio * advantage).tolist()

            # 5. The KL divergence to the reference, by an estimate that is never negative (eq. 4).
            log_ratio = reference[i] - logp
            kl = log_ratio.exp() - log_ratio - 1

            # 6. The mean over the tokens of a completion, then over all completions (eq. 3). Minus: AdamW minimises.
            loss = loss - (surrogate - BETA * kl).mean() / len(rows)

        # 7. The gradient, scaled down to norm 1 where it is longer.
        policy.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm=1.0)

        # 8. AdamW: matrices decay, then every weight moves by its mean gradient over the root of its mean square.
        with torch.no_grad():
            for name, p in policy.named_parameters():
                m[name] = 0.9 * m[name] + 0.1 * p.grad
                v[name] = 0.999 * v[name] + 0.001 * p.grad**2
                mean, square = m[name] / (1 - 0.9**update), v[name] / (1 - 0.999**update)
                p *= 1 - LR * DECAY * (p.dim() > 1)
                p -= LR * mean / (square.sqrt() + 1e-8)
        numbers.append({"loss/total": loss.item(), "grad_norm": norm.item(), "clip/frac": sum(clipped) / len(clipped)})
    return {name: p.detach() - start[name] for name, p in policy.named_parameters()}, numbers


def test_a_step_of_grpo_is_the_one_by_hand(checkpoint, tmp_path, monkeypatch):
    """Both learn from the completions that minirl samples; float32 is compared with float64."""
    samples, generate = {}, Sampler.generate

    def remember(sampler, prompts, *args):
        completions = generate(sampler, prompts, *args)
        samples.update(zip(map(tuple, prompts), completions, strict=True))
        return completions

    monkeypatch.setattr(Sampler, "generate", remember)
    task = Task("two prompts", TRAIN, HELDOUT, {"variety": (1.0, variety)}, variety, str)
    loss = PolicyLoss(eps_low=CLIP, eps_high=CLIP, kl="k3", kl_coef=BETA, aggregation="seq_mean")
    options = {"steps": 1, "prompts": 2, "group": G, "max_tokens": 8, "epochs": EPOCHS, "lr": LR, "weight_decay": DECAY}
    config = GRPOConfig(str(checkpoint), out=str(tmp_path), loss=loss, **options, clip_norm=1.0, dtype="float32")
    trained = Transformer.from_pretrained(train_grpo(config, Quiet(), task))

    tokenizer = Tokenizer.from_pretrained(checkpoint)
    prompts = [tokenizer.encode(example["prompt"]) for example in TRAIN]
    groups = [(prompt, [completion.tokens for completion in samples[tuple(prompt)]]) for prompt in prompts]
    rewards = torch.tensor([variety(prompts, [tokenizer.decode(o) for o in completions]) for _, completions in groups])
    exact, numbers = step_by_hand(checkpoint, groups, rewards, torch.float64)
    rounded, _ = step_by_hand(checkpoint, groups, rewards, torch.float32)

    start = dict(Transformer.from_pretrained(checkpoint).named_parameters())
    moved = {name: (p - start[name]).detach() for name, p in trained.named_parameters()}
    check_close(moved, exact, fp32_tolerance(rounded, exact))
    assert numbers[0]["clip/frac"] == 0 < numbers[1]["clip/frac"]
    for name in numbers[0]:  # a step logs the means over its updates
        logged = records(tmp_path)[-1][name]
        assert logged == pytest.approx(sum(update[name] for update in numbers) / EPOCHS, rel=1e-4), name
