"""A dense decoder of the Llama family: Llama, Mistral, Qwen2, Qwen3, SmolLM2 and SmolLM3, read top to bottom.

Parameter names are those of the Hugging Face checkpoints, so a state dict goes in and out as it is. The forward runs on
a flat axis of N tokens; a layout (attention.py) decides which tokens attend to which. It ends at the hidden states, so
that the logits [N, V], the largest tensor of all, exist only where they are asked for. Left out on purpose: dropout,
mixture of experts, tensor parallelism, fused projections.

Shapes: N tokens, D width, H heads, K key-value heads, Dh head width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute

from minirl.checkpoint import load_model, save_model
from minirl.kernels.linear import TILE, pad_rows, tiled_product
from minirl.model_config import ModelConfig, ScalarHead


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and one number a row for the backward pass, where autograd would keep three fp32
    copies of the input."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        h = x.to(torch.promote_types(x.dtype, torch.float32))  # fp64 stays fp64: tests of gradients need it
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (h * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """Return dx = (g − n · mean(g · n)) / rms(x) and d_weight = Σ dy · n, with n = x / rms(x), g = dy · weight."""
        x, weight, scale = ctx.saved_tensors
        n, dy = x * scale, dy.to(scale.dtype)
        g = dy * weight
        dx = (g - n * (g * n).mean(-1, keepdim=True)) * scale
        return dx.to(x.dtype), (dy * n).flatten(0, -2).sum(0).to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up that keeps only its two inputs and computes silu(gate) again in the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        return dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x / rms(x) · weight, the root mean square in fp32 at least (Zhang & Sennrich 2019, eq. 4)."""
        return _RMSNorm.apply(x, self.weight, self.eps)


def rope_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Return the angular frequency of each pair of a head, [Dh/2] fp32 in radians a position, and the factor on cos and
    sin, which is 1 for all but yarn."""
    # On the CPU even inside `with torch.device("meta")`, where a model is built before its weights are read.
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequency = 1.0 / config.rope_theta**half
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return frequency / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(frequency, scaling), 1.0
    if kind == "yarn":
        return _yarn(frequency, scaling, config)
    return frequency, 1.0


def _llama3(frequency: torch.Tensor, s: dict) -> torch.Tensor:
    """Slow down long wavelengths by `factor`, keep short ones, and blend linearly between (Llama 3.1)."""
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)  # over the original context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequency / s["factor"] + keep * frequency


def _yarn(frequency: torch.Tensor, s: dict, config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Interpolate NTK-by-parts, and find the attention temperature (YaRN, Peng et al. 2309.00071, eq. 17-24)."""
    factor, original = s["factor"], s.get("original_max_position_embeddings") or config.max_positions

    def pair_with_turns(turns: float) -> float:
        return config.head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    # Pairs that turn more than beta_fast times within the original context keep their frequency, those that turn less
    # than beta_slow times are slowed by `factor`, and between the two the share changes linearly.
    low, high = pair_with_turns(s.get("beta_fast") or 32), pair_with_turns(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    pair = torch.arange(config.head_dim // 2, dtype=torch.float32, device="cpu")
    slow = ((pair - low) / max(high - low, 0.001)).clamp(0.0, 1.0)  # 0.001: no division by 0 where both are equal

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0  # √(1/t): on q and on k

    attention = s.get("attention_factor")
    if attention is None:
        above, below = s.get("mscale"), s.get("mscale_all_dim")
        attention = temperature(above) / temperature(below) if above and below else temperature(1.0)
    return slow * frequency / factor + (1 - slow) * frequency, attention


class _TiledLinear(torch.autograd.Function):
    """x @ weight.T + bias in products of TILE rows. The gradient, which may differ by rounding, is one
    product."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return tiled_product(x, weight.t(), x.new_empty(len(x), len(weight)), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        return dy @ weight if by_x else None, dy.t() @ x if by_weight else None, dy.sum(0) if by_bias else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [N, in] @ weight [out, in].T + bias.

    On a CPU a matrix library chooses its order of summation by the number of rows. So that a token's result does not
    depend on how many others share its batch, whole tiles are multiplied one by one, and other numbers of rows are
    padded to a multiple of MIN_ROWS."""
    if x.device.type == "cpu" and len(x) and len(x) % TILE == 0:
        return _TiledLinear.apply(x, weight, bias)
    padded = pad_rows(x)
    return F.linear(padded, weight, bias)[: len(x)] if padded is not x else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + Dh/2) of x [N, heads, Dh] by angles with cos, sin [N, 1, Dh] (RoFormer 2104.09864; the
    pairing is that of GPT-NeoX)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    """Grouped-query attention on a layout, with rotary embedding and, for Qwen3, norms on queries and keys."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.window, self.rotates = c.windows[layer] if c.windows else None, c.rotates(layer)
        self.q_proj = Linear(c.width, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.heads * c.head_dim, c.width, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], layout) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.o_proj(layout.attend(self.layer, q, k, v, self.window).flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x) (Shazeer 2002.05202)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.width, c.mlp_width, bias=c.mlp_bias)
        self.up_proj = Linear(c.width, c.mlp_width, bias=c.mlp_bias)
        self.down_proj = Linear(c.mlp_width, c.width, bias=c.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], layout) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, blocks and final norm, under the names of the checkpoints
    (`model.layers.0.self_attn.q_proj.weight`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.layers)])
        self.norm = RMSNorm(config.width, config.norm_eps)


def _score(width: int, layers: str) -> nn.Module:
    """Make a scalar head under the names that other engines know: score.weight, or score.0 and score.2 of an MLP."""
    if layers == "linear":
        return nn.Linear(width, 1, bias=False)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


class Transformer(nn.Module):
    """A language model, or with `scalar_head` a reward model or critic: one fp32 number a token instead of logits."""

    def __init__(self, config: ModelConfig, scalar_head: bool | ScalarHead = False):
        """Build the modules; `scalar_head` True stands for the default `ScalarHead`."""
        super().__init__()
        self.config = config
        # Ids from here on pad the embedding to a round size: no text has them, so they are never drawn and have no
        # probability in training. `policy.load`, which knows the tokenizer, sets it.
        self.active_vocab = config.vocab_size
        self.head = ScalarHead() if scalar_head is True else scalar_head or None
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping its activations
        self.model = Trunk(config)
        # Without lm_head a tied model takes its logits from the embedding, see `head_weight`.
        self.lm_head = None if config.tied or scalar_head else nn.Linear(config.width, config.vocab_size, bias=False)
        self.score = None if self.head is None else _score(config.width, self.head.layers)
        # Not a buffer: `.to(bfloat16)` would round the frequencies.
        self.rope_frequency, self.rope_scale = rope_frequencies(config)

    @classmethod
    def from_pretrained(
        cls, path: str, dtype: torch.dtype | None = None, device=None, scalar_head: bool | ScalarHead = False
    ) -> "Transformer":
        """Read a Hugging Face directory or hub id. `dtype` None keeps the checkpoint's own. `checkpoint.load_model`
        explains `scalar_head` and the errors."""
        return load_model(cls, path, dtype, device, scalar_head)

    def save_pretrained(self, path: str) -> None:
        """Write config.json and model.safetensors so that transformers and other engines load them."""
        save_model(self, path)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """Return the output weights [V, D], which are the embedding's in a tied model."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens: torch.Tensor, layout) -> torch.Tensor:
        """Return the hidden states [N, D] after the final norm for tokens [N] on a layout; `logits` and `values` take
        them."""
        # The last tile is filled with token 0 at position 0, and cut off again at the end.
        padding = -len(tokens) % TILE if layout.tiled else 0
        x = self.model.embed_tokens(F.pad(tokens, (0, padding)))
        rope = self._rope(F.pad(layout.positions, (0, padding)))
        for block in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():  # without gradients nothing is kept anyway
                x = recompute(block, x, rope, layout, use_reentrant=False)
            else:
                x = block(x, rope, layout)
        return self.model.norm(x)[: len(tokens)]

    def _rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [N, 1, Dh] of the angles at positions [N], once for all layers."""
        self.rope_frequency = self.rope_frequency.to(positions.device)  # a copy only on the first forward
        angle = positions.float().unsqueeze(1) * self.rope_frequency  # [N, Dh/2]; fp32, also in a bf16 model
        angle = torch.cat((angle, angle), -1).unsqueeze(1)  # [N, 1, Dh]
        return (angle.cos() * self.rope_scale).to(self.dtype), (angle.sin() * self.rope_scale).to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [N, V] of hidden states [N, D]."""
        if hidden.is_cuda and not torch.is_grad_enabled():  # never rounded to bf16, as in `linear_token_logprobs`
            return torch.mm(hidden, self.head_weight.t(), out_dtype=torch.float32)
        return linear(hidden, self.head_weight).float()

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the scalar head gives for hidden states [N, D]: fp32 [N], its bias subtracted."""
        x = hidden.float()  # the head computes in fp32 in a bf16 model too: scores differ in their last digits
        for i, layer in enumerate(self._score_layers()):
            x = x if i == 0 else F.relu(x)
            x = linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())
        return x.squeeze(-1) - self.head.bias

    def _score_layers(self) -> list[nn.Linear]:
        return [module for module in self.score.modules() if isinstance(module, nn.Linear)]

    @torch.no_grad()
    def initialise_score(self, seed: int) -> "Transformer":
        """Fill the scalar head from a seed: weights N(0, 1/(d+1)) for d inputs (Stiennon et al. 2009.01325, app. B.1),
        biases 0."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same weights on every device
        for layer in self._score_layers():
            noise = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.copy_(noise / math.sqrt(layer.in_features + 1))
            if layer.bias is not None:
                layer.bias.zero_()
        return self

    @torch.no_grad()
    def initialise(self, seed: int, std: float = 0.02) -> "Transformer":
        """Fill all weights from a seed: N(0, std²), with std / √(2·layers) for projections back into the residual
        stream (GPT-2); norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            scale = std / math.sqrt(2 * self.config.layers) if "o_proj" in name or "down_proj" in name else std
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
        return self
