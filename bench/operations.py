"""Define the operations to measure: their inputs, minirl's implementation, and those of its rivals.

Eager is the textbook formula in PyTorch: fp32 log-softmax and autograd. Every rival returns log-prob and entropy beside
loss and gradients where it can; Liger has no entropy. Shapes: N rows, V vocabulary, D width, B sequences of N / B rows.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.measure import Run
from minirl import kernels

EPS, BETA = 0.2, 0.04  # clip range, weight of the KL to the reference
EXACT_ROWS = 64  # that are compared with float64
SLICE = 64  # rows that helpers here compute at a time


class Unavailable(Exception):
    """Raised with the reason why a rival is not measured."""


class Shape(NamedTuple):
    rows: int
    vocab: int
    width: int
    sequences: int = 8

    def __str__(self) -> str:
        return f"N {self.rows}, V {self.vocab}, D {self.width}"


@dataclass
class Inputs:
    """The tensors of one operation; those it does not need are None."""

    shape: Shape
    targets: torch.Tensor  # [N]
    advantages: torch.Tensor  # [N], one number a sequence, repeated
    old_logp: torch.Tensor  # [N]
    ref_logp: torch.Tensor  # [N]
    by_logp: torch.Tensor  # [N], an incoming gradient
    by_entropy: torch.Tensor  # [N]
    logits: torch.Tensor | None = None  # [N, V]
    saved: torch.Tensor | None = None  # the logits again, for those who overwrite them
    hidden: torch.Tensor | None = None  # [N, D]
    weight: torch.Tensor | None = None  # [V, D]
    scan: tuple[torch.Tensor, ...] = ()
    weights: torch.Tensor = field(init=False)  # [N], 1/N: a mean over tokens

    def __post_init__(self):
        self.weights = torch.full_like(self.advantages, 1 / self.shape.rows)

    def rows(self, part: slice, dtype: torch.dtype) -> "Inputs":
        """Return some rows in another precision. Weights stay 1/N of all rows, so that parts add up to the whole."""

        def take(x, wide=True):
            x = None if x is None else x.detach()[part]
            return x.to(dtype) if wide and x is not None else x

        names = ("advantages", "old_logp", "ref_logp", "by_logp", "by_entropy", "logits", "hidden")
        given = {name: take(getattr(self, name)) for name in names}
        for name in ("logits", "hidden"):
            if given[name] is not None:
                given[name].requires_grad_()
        weight = None if self.weight is None else self.weight.detach().to(dtype).requires_grad_()
        out = Inputs(self.shape, take(self.targets, False), weight=weight, **given)
        out.weights = self.weights[part].to(dtype)
        return out


def make_inputs(kind: str, shape: Shape, device, dtype: torch.dtype, silent: bool = False, seed: int = 0) -> Inputs:
    """Make random inputs whose logits have a deviation of 2. `silent`: half of the sequences have advantage 0."""
    g = torch.Generator(device).manual_seed(seed)

    def noise(*size, scale=1.0, dtype=torch.float32):
        return torch.empty(*size, device=device, dtype=dtype).normal_(std=scale, generator=g)

    n, v, d, b = shape
    advantages = noise(b)
    if silent:
        advantages[b // 2 :] = 0
    targets = torch.randint(max(v, 1), (n,), generator=g, device=device)
    small = {"by_logp": noise(n, scale=1 / n), "by_entropy": noise(n, scale=0.1 / n)}
    x = Inputs(shape, targets, advantages.repeat_interleave(n // b), noise(n), noise(n), **small)
    if kind == "logits":
        x.logits = noise(n, v, scale=2.0, dtype=dtype).requires_grad_()
    elif kind == "head":
        x.hidden = noise(n, d, dtype=dtype).requires_grad_()
        x.weight = noise(v, d, scale=2 * d**-0.5, dtype=dtype).requires_grad_()
    elif kind == "scan":
        x.scan = (noise(b, n // b), noise(b, n // b), torch.ones(b, n // b, device=device, dtype=torch.bool))
    if kind in ("logits", "head"):
        logp = _log_probs(x)
        x.old_logp, x.ref_logp = logp + noise(n, scale=0.1), logp + noise(n, scale=0.1)
    return x


@torch.no_grad()
def _log_probs(x: Inputs) -> torch.Tensor:
    parts = []
    for i in range(0, x.shape.rows, SLICE):
        z = x.logits[i : i + SLICE] if x.logits is not None else x.hidden[i : i + SLICE] @ x.weight.t()
        parts.append(z.float().log_softmax(-1).gather(1, x.targets[i : i + SLICE, None]).squeeze(1))
    return torch.cat(parts)


# ---- the textbook ----------------------------------------------------------------------------------------------------


def eager_logprobs(logits, targets):
    logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def eager_chosen(logits, targets):
    """Return log-probs of the targets, and the entropy without gradient, as it is only logged."""
    logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def eager_loss(logp, x: Inputs, beta: float):
    """Return the loss of GRPO: clip and, with beta, k3 (2402.03300)."""
    ratio = (logp - x.old_logp).exp()
    loss = -torch.min(ratio * x.advantages, ratio.clamp(1 - EPS, 1 + EPS) * x.advantages)
    if beta:
        d = x.ref_logp - logp
        loss = loss + beta * (d.exp() - d - 1)
    return (loss * x.weights).sum()


def eager_draw(logits, top_p: float):
    p = logits.float().softmax(-1)
    if top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        cut = ordered.cumsum(-1) - ordered >= top_p
        p = torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(cut, 0.0))
        p = p / p.sum(-1, keepdim=True)
    token = torch.multinomial(p, 1).squeeze(-1)
    logp = p.gather(-1, token.unsqueeze(-1)).squeeze(-1).log()
    return token, logp, -torch.xlogy(p, p).sum(-1)


def eager_gae(rewards, values, mask, gamma=0.99, lam=0.95):
    """Compute GAE step by step backwards in time (1506.02438 eq. 16)."""
    nxt, advantage, out = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * nxt - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        nxt = torch.where(mask[:, t], values[:, t], nxt)
        out.append(advantage)
    return torch.stack(out[::-1], 1)


# ---- an operation ----------------------------------------------------------------------------------------------------


Log = Callable[[torch.Tensor, torch.Tensor], tuple]  # (logits or hidden states, targets) -> logp, entropy


def _differentiated(x: Inputs, loss: Callable[[], tuple], reset: Callable | None = None) -> Run:
    """Return a run of `loss() -> (loss, logp, entropy)` and its gradients: of the logits, or of hidden states and
    weight."""
    leaves = {"d_logits": x.logits} if x.logits is not None else {"d_hidden": x.hidden, "d_weight": x.weight}

    def run() -> dict:
        value, logp, entropy = loss()
        gradients = torch.autograd.grad(value, list(leaves.values()))
        outputs = {"logp": logp, "entropy": entropy} | dict(zip(leaves, gradients, strict=True))
        return {name: y for name, y in outputs.items() if y is not None}

    if reset is not None:
        run.reset = reset
    return run


def _restored(x: Inputs) -> Callable:
    """Return a function that restores the logits after an in-place operation has overwritten them."""
    x.saved = x.logits.detach().clone() if x.saved is None else x.saved
    return lambda: x.logits.detach().copy_(x.saved)


def _need(package: str, x: Inputs, gpu: bool = False) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable("not installed")
    if gpu and not x.targets.is_cuda:
        raise Unavailable("needs CUDA")


def _compiled(function):
    """Compile for exactly the shapes at hand; sweeps over many shapes leave these rivals out."""
    return torch.compile(function, dynamic=False)


# ---- statistics, forward ---------------------------------------------------------------------------------------------


def _forward(function: Log, *inputs) -> Run:
    @torch.no_grad()
    def run() -> dict:
        logp, entropy = function(*inputs)
        return {"logp": logp, "entropy": entropy} if entropy is not None else {"logp": logp}

    return run


def _trl_logprobs(x: Inputs) -> Log:
    _need("trl", x)
    if x.targets.is_cuda:
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy as log
    else:
        from trl.trainer.utils import selective_log_softmax_and_entropy as log
    return lambda logits, targets: log(logits.unsqueeze(0), targets.unsqueeze(0))


def _flat(log: Log) -> Log:
    def flat(logits, targets):
        return (y.squeeze(0) for y in log(logits, targets))

    return flat


def _liger_stats(x: Inputs) -> Run:
    _need("liger_kernel", x, gpu=True)
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    b, length = x.shape.sequences, x.shape.rows // x.shape.sequences
    logits = _with_last(x)
    ids = x.targets.view(b, length)
    return _forward(lambda: (fused_selective_log_softmax(logits, ids, 1.0).reshape(-1), None))


def _with_last(x: Inputs) -> torch.Tensor:
    """Return logits [B, L + 1, V]: Liger's kernels ignore the last logits of a sequence."""
    b, length = x.shape.sequences, x.shape.rows // x.shape.sequences
    logits = x.logits.detach().new_zeros(b, length + 1, x.shape.vocab)
    logits[:, :-1] = x.logits.detach().view(b, length, -1)
    return logits


STATS = {
    "minirl": lambda x: _forward(kernels.token_logprobs, x.logits, x.targets),
    "eager": lambda x: _forward(eager_logprobs, x.logits, x.targets),
    "compile": lambda x: _forward(_compiled(eager_logprobs), x.logits, x.targets),
    "Liger": _liger_stats,
    "TRL": lambda x: _forward(_flat(_trl_logprobs(x)), x.logits, x.targets),
}

# ---- log-probs and entropy, with an incoming gradient ----------------------------------------------------------------


def _logprobs(log, x: Inputs, reset: Callable | None = None) -> Run:
    def loss():
        logp, entropy = log(x)
        return (x.by_logp * logp).sum() + (x.by_entropy * entropy).sum(), logp, entropy

    return _differentiated(x, loss, reset)


def _trl_both(x: Inputs) -> Run:
    log = _flat(_trl_logprobs(x))
    return _logprobs(lambda x: log(x.logits, x.targets), x)


def _compiled_logprobs(x: Inputs) -> Run:
    log = _compiled(eager_logprobs)
    return _logprobs(lambda x: log(x.logits, x.targets), x)


LOGPROBS = {
    "minirl": lambda x: _logprobs(lambda x: kernels.token_logprobs(x.logits, x.targets), x),
    "minirl in place": lambda x: _logprobs(
        lambda x: kernels.token_logprobs(x.logits, x.targets, inplace=True), x, _restored(x)
    ),
    "eager": lambda x: _logprobs(lambda x: eager_logprobs(x.logits, x.targets), x),
    "compile": _compiled_logprobs,
    "TRL": _trl_both,
}

# ---- policy loss on logits -------------------------------------------------------------------------------------------

KL = kernels.TokenLoss(kl="k3", kl_coef=BETA)
PLAIN = kernels.TokenLoss()


def _our_policy(x: Inputs, inplace: bool = False) -> Run:
    given = {"old_logp": x.old_logp, "ref_logp": x.ref_logp, "inplace": inplace}
    args = (x.logits, x.targets, x.advantages, x.weights, KL)
    return _differentiated(x, lambda: kernels.fused_policy_loss(*args, **given), _restored(x) if inplace else None)


def _policy_of(log: Log, beta: float):
    """Return a function of the inputs that gives loss, logp and entropy: a rival's log-probs, the textbook loss."""

    def policy(x: Inputs):
        logp, entropy = log(x.logits, x.targets)
        return eager_loss(logp, x, beta), logp.detach(), entropy

    return policy


def _eager_policy(x: Inputs, wrap=lambda f: f) -> Run:
    def policy(logits, targets, advantages, old_logp, ref_logp, weights):
        logp, entropy = eager_chosen(logits, targets)
        parts = _Parts(advantages, old_logp, ref_logp, weights)
        return eager_loss(logp, parts, BETA), logp.detach(), entropy

    function = wrap(policy)
    args = (x.logits, x.targets, x.advantages, x.old_logp, x.ref_logp, x.weights)
    return _differentiated(x, lambda: function(*args))


class _Parts(NamedTuple):
    """The tensors that `eager_loss` reads, in a form that torch.compile can trace."""

    advantages: torch.Tensor
    old_logp: torch.Tensor
    ref_logp: torch.Tensor
    weights: torch.Tensor


def _trl_policy(x: Inputs) -> Run:
    log = _flat(_trl_logprobs(x))

    def logged(logits, targets):
        logp, entropy = log(logits, targets)
        return logp, entropy.detach()

    policy = _policy_of(logged, BETA)
    return _differentiated(x, lambda: policy(x))


def _liger_policy(x: Inputs) -> Run:
    _need("liger_kernel", x, gpu=True)
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    b = x.shape.sequences
    ids, old, ref = (y.view(b, -1) for y in (x.targets, x.old_logp, x.ref_logp))
    logits, advantages = _with_last(x), x.advantages.view(b, -1)[:, 0].contiguous()
    saved = logits.clone()
    logits.requires_grad_()
    options = {"temperature": 1.0, "beta": BETA, "eps_low": EPS, "eps_high": EPS, "loss_type": "bnpo", "reduce": True}

    def run() -> dict:
        loss, _ = triton_grpo_loss(logits, old, ref, ids, advantages, **options)
        (gradient,) = torch.autograd.grad(loss, [logits])
        return {"d_logits": gradient[0, :-1]}  # of the first sequence; all of them would be a copy

    run.reset = lambda: logits.detach().copy_(saved)
    return run


POLICY = {
    "minirl": _our_policy,
    "minirl in place": functools.partial(_our_policy, inplace=True),
    "eager": _eager_policy,
    "compile": functools.partial(_eager_policy, wrap=_compiled),
    "Liger": _liger_policy,
    "TRL": _trl_policy,
}

# ---- from hidden states ----------------------------------------------------------------------------------------------


def _eager_head(log: Log) -> Log:
    return lambda hidden, weight, targets: log(F.linear(hidden, weight), targets)


def _head_logprobs(log, x: Inputs) -> Run:
    return _logprobs(lambda x: log(x.hidden, x.weight, x.targets), x)


def _trl_chunked(x: Inputs):
    """Return TRL's function for log-probs from hidden states, in tiles of rows and vocabulary."""
    _need("trl", x)
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def log(hidden, weight, targets):
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",))[:2]

    return log


def _liger_cross_entropy(x: Inputs) -> Run:
    """Return a run of Liger's mean of log-probs: one weight for all rows, no entropy, no log-prob of a single row."""
    _need("liger_kernel", x, gpu=True)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def run() -> dict:
        torch.autograd.grad(loss(x.weight, x.hidden, x.targets), [x.hidden, x.weight])
        return {}

    return run


LINEAR_LOGPROBS = {
    "minirl": lambda x: _head_logprobs(kernels.linear_token_logprobs, x),
    "eager": lambda x: _head_logprobs(_eager_head(eager_logprobs), x),
    "compile": lambda x: _head_logprobs(_compiled(_eager_head(eager_logprobs)), x),
    "Liger": _liger_cross_entropy,
    "TRL": lambda x: _head_logprobs(_trl_chunked(x), x),
}


def _our_head_policy(x: Inputs) -> Run:
    args = (x.hidden, x.weight, x.targets, x.advantages, x.weights, PLAIN)
    return _differentiated(x, lambda: kernels.linear_policy_loss(*args, old_logp=x.old_logp))


def _eager_head_policy(x: Inputs, wrap=lambda f: f) -> Run:
    def policy(hidden, weight, targets, advantages, old_logp, weights):
        logp, entropy = eager_chosen(F.linear(hidden, weight), targets)
        return eager_loss(logp, _Parts(advantages, old_logp, old_logp, weights), 0.0), logp.detach(), entropy

    function = wrap(policy)
    args = (x.hidden, x.weight, x.targets, x.advantages, x.old_logp, x.weights)
    return _differentiated(x, lambda: function(*args))


def _trl_head_policy(x: Inputs) -> Run:
    log = _trl_chunked(x)

    def loss():
        logp, entropy = log(x.hidden, x.weight, x.targets)
        return eager_loss(logp, x, 0.0), logp.detach(), entropy.detach()

    return _differentiated(x, loss)


def _liger_head_policy(x: Inputs) -> Run:
    _need("liger_kernel", x)
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    b = x.shape.sequences
    ids, old = x.targets.view(b, -1), x.old_logp.view(b, -1)
    mask, advantages = torch.ones_like(ids), x.advantages.view(b, -1)[:, 0].contiguous()
    options = {"beta": 0.0, "use_ref_model": False, "loss_type": "bnpo", "epsilon_low": EPS, "epsilon_high": EPS}
    loss = LigerFusedLinearGRPOLoss(**options, compiled=x.targets.is_cuda)  # compiled is its default

    def value():
        out, _ = loss(x.hidden.view(b, -1, x.shape.width), x.weight, ids, mask, advantages, old_per_token_logps=old)
        return out, None, None

    return _differentiated(x, value)


LINEAR_POLICY = {
    "minirl": _our_head_policy,
    "eager": _eager_head_policy,
    "compile": functools.partial(_eager_head_policy, wrap=_compiled),
    "Liger": _liger_head_policy,
    "TRL": _trl_head_policy,
}

# ---- sampling and scans ----------------------------------------------------------------------------------------------


def _our_draw(x: Inputs, **options) -> Run:
    place = torch.arange(x.shape.rows, device=x.targets.device)

    @torch.no_grad()
    def run() -> dict:
        draw = kernels.sample_tokens(x.logits, 0, place, place, **options)
        return {"token": draw.token}

    return run


def _eager_draw(x: Inputs, top_p: float = 1.0, wrap=lambda f: f) -> Run:
    function = wrap(functools.partial(eager_draw, top_p=top_p))

    @torch.no_grad()
    def run() -> dict:
        return {"token": function(x.logits)[0]}

    return run


def _our_gae(x: Inputs) -> Run:
    return lambda: {"advantages": kernels.gae(*x.scan, gamma=0.99, lam=0.95)[0]}


SAMPLE = {
    "minirl": _our_draw,
    "eager": _eager_draw,
    "compile": functools.partial(_eager_draw, wrap=_compiled),
}
SAMPLE_TOP_P = {
    "minirl": functools.partial(_our_draw, top_p=0.9),
    "eager": functools.partial(_eager_draw, top_p=0.9),
    "compile": functools.partial(_eager_draw, top_p=0.9, wrap=_compiled),
}
GAE = {"minirl": _our_gae, "eager": lambda x: lambda: {"advantages": eager_gae(*x.scan)}}


class Operation(NamedTuple):
    title: str
    kind: str  # of its inputs: logits, head, scan
    rivals: dict[str, Callable[[Inputs], Run]]
    passes: float = 0.0  # minimal traffic in passes over the logits: bytes = passes · N · V · itemsize
    products: float = 0.0  # minimal arithmetic in head products: FLOP = products · 2NVD
    silent: bool = False  # half of the sequences have advantage 0


OPERATIONS = {
    "stats": Operation("token_logprobs, forward", "logits", STATS, passes=1),
    "logprobs": Operation("token_logprobs, forward and backward", "logits", LOGPROBS, passes=3),
    "policy": Operation("fused_policy_loss, forward and backward", "logits", POLICY, passes=2),
    "linear_logprobs": Operation("linear_token_logprobs, forward and backward", "head", LINEAR_LOGPROBS, products=3),
    "linear_policy": Operation("linear_policy_loss, forward and backward", "head", LINEAR_POLICY, products=3),
    "linear_policy_half": Operation(
        "linear_policy_loss, half of the rows without signal", "head", LINEAR_POLICY, products=1.5, silent=True
    ),
    "sample": Operation("sampling", "logits", SAMPLE, passes=1),
    "sample_top_p": Operation("sampling, top-p 0.9", "logits", SAMPLE_TOP_P, passes=1),
    "gae": Operation("GAE", "scan", GAE),
}


def exact(operation: str, x: Inputs) -> dict:
    """Return outputs in float64: those of the first rows, and the whole gradient of the weight; {} for sampling."""
    kind = operation.removesuffix("_half")
    if kind == "gae":
        rewards, values, mask = x.scan
        return {"advantages": eager_gae(rewards.double(), values.double(), mask)}
    if kind not in ("stats", "logprobs", "policy", "linear_logprobs", "linear_policy"):
        return {}
    first = x.rows(slice(0, EXACT_ROWS), torch.float64)
    outputs = _reference(kind, first)
    if x.hidden is not None:
        parts = (slice(i, i + 1024) for i in range(0, x.shape.rows, 1024))
        outputs["d_weight"] = sum(_reference(kind, x.rows(part, torch.float64))["d_weight"] for part in parts)
    if kind == "linear_policy" and operation.endswith("_half"):
        outputs = {name: y for name, y in outputs.items() if name.startswith("d_")}
    return {name: y.detach() for name, y in outputs.items()}


def _reference(kind: str, x: Inputs) -> dict:
    if kind == "stats":
        return _forward(eager_logprobs, x.logits, x.targets)()
    if kind == "logprobs":
        return LOGPROBS["eager"](x)()
    if kind == "linear_logprobs":
        return LINEAR_LOGPROBS["eager"](x)()
    return (_eager_policy if kind == "policy" else _eager_head_policy)(x)()
