"""The transformer: against transformers where it is installed, and its layouts against plain causal rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import full_logits, hidden_states, random_ids, randomise, same_weights, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minirl.attention import Packed, Slots
from minirl.checkpoint import save_model
from minirl.kernels import linear_token_logprobs
from minirl.model import ModelConfig, Transformer, _RMSNorm, _SwiGLU

LENGTHS = (1, 2, 37)
SIZES = {
    "vocab_size": 517,
    "hidden_size": 60,
    "intermediate_size": 83,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 50, "beta_fast": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SMOLLM2 = {
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
# name: (model_type, what differs from SIZES, what of our ModelConfig the case is about)
CASES: dict[str, tuple[str, dict, dict]] = {
    "llama": ("llama", {}, {"head_dim": 14}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}, {"rope_scaling": None}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
        {"rope_scaling": None},
    ),
    "llama-yarn": ("llama", {"rope_parameters": YARN}, {"rope_scaling": None}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.7}},
        {"rope_scaling": YARN},
    ),
    "llama-yarn-attention-factor": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.7}},
        {"rope_scaling": YARN},
    ),
    "llama-yarn-untruncated": ("llama", {"rope_parameters": YARN | {"truncate": False}}, {"rope_scaling": YARN}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {"mlp_bias": False}),
    "mistral-window": ("mistral", {"sliding_window": 5}, {"windows": ()}),
    "mistral-full": ("mistral", {"sliding_window": None}, {"windows": (5, 5, 5)}),
    "qwen2": ("qwen2", {}, {"qkv_bias": False}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        {"windows": (6, 6, 6)},
    ),
    "qwen3": ("qwen3", {}, {"qk_norm": False}),
    "qwen3-tied-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
        {"windows": (4, 4, 4)},
    ),
    "smollm2": ("llama", SMOLLM2, {"rope_theta": 10000.0}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}, {"rope_layers": ()}),
    "smollm3-window": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 4, "attention_bias": True},
        {"windows": ()},
    ),
}


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def theirs(transformers, model_type: str, changes: dict, seed: int = 0):
    """A model of transformers with every parameter random, fp32. Its SmolLM3 knows no head_dim: width / heads."""
    sizes = {key: value for key, value in SIZES.items() if model_type != "smollm3" or key != "head_dim"}
    config = transformers.AutoConfig.for_model(model_type, **sizes | changes)
    return randomise(transformers.AutoModelForCausalLM.from_config(config), seed).eval()


def their_load(transformers, folder: Path, **options):
    """from_pretrained, and not a key too many or too few."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(folder, output_loading_info=True, **{"dtype": torch.float32} | options)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def their_logits(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def assert_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert distance(ours, reference) <= 2e-5


# --- the same numbers as transformers, in and out -------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_transformers_gives_its_logits_and_goes_back_unchanged(transformers, tmp_path, case):
    model_type, changes, what_matters = CASES[case]
    reference = theirs(transformers, model_type, changes)
    reference.save_pretrained(tmp_path / "theirs")
    model = Transformer.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    back = their_load(transformers, tmp_path / "ours")
    assert same_weights(back, reference)
    for length in LENGTHS:
        tokens = random_ids(length, SIZES["vocab_size"], seed=length)
        logits = their_logits(reference, tokens)
        assert_close(model.logits(hidden_states(model, tokens)), logits)
        assert_close(their_logits(back, tokens), logits)
    if what_matters.keys() - {"head_dim"}:
        # Were the case's option not read, its logits would be these.
        other = Transformer(replace(model.config, **what_matters))
        other.load_state_dict(model.state_dict(), strict=False)
        assert distance(full_logits(other, tokens), logits) > 1e-3


FRESH: dict[str, ModelConfig] = {
    "llama": tiny_config(width=24, rope_theta=5000.0, rope_scaling=LLAMA3),
    "llama-yarn-tied": tiny_config(width=24, rope_scaling=YARN, tied=True),
    "llama-biases": tiny_config(width=24, qkv_bias=True, out_bias=True, mlp_bias=True),
    "mistral": tiny_config(model_type="mistral", windows=(7, 7, 7)),
    "mistral-full": tiny_config(model_type="mistral"),
    "qwen2": tiny_config(model_type="qwen2", qkv_bias=True),
    "qwen2-window": tiny_config(model_type="qwen2", qkv_bias=True, windows=(None, 5, 5)),
    "qwen3": tiny_config(model_type="qwen3", qk_norm=True, norm_eps=1e-3),
    "qwen3-window": tiny_config(model_type="qwen3", qk_norm=True, windows=(5, None, 5)),
    "smollm3": tiny_config(
        model_type="smollm3", width=24, head_dim=4, rope_layers=(True, False, True), rope_theta=50.0
    ),
    "smollm3-rotating": tiny_config(model_type="smollm3", width=24, head_dim=4, layers=5),
}


@torch.no_grad()
@pytest.mark.parametrize("case", FRESH)
def test_a_fresh_model_is_read_by_transformers_and_by_us(transformers, tmp_path, case):
    model = Transformer(FRESH[case]).initialise(seed=3, std=0.3)
    model.save_pretrained(tmp_path)
    again, reference = Transformer.from_pretrained(tmp_path), their_load(transformers, tmp_path)
    tokens = random_ids(37)
    logits = full_logits(model, tokens)
    assert same_weights(again, model)
    assert_close(full_logits(again, tokens), logits)
    assert_close(their_logits(reference, tokens), logits)


@torch.no_grad()
def test_config_files_from_before_rope_parameters_are_read_alike(transformers, tmp_path):
    """Most published checkpoints were: rope_theta and rope_scaling apart, `type` for rope_type, torch_dtype."""
    reference = theirs(transformers, "llama", {"rope_parameters": LLAMA3})
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = random_ids(37, SIZES["vocab_size"])
    model = Transformer.from_pretrained(tmp_path)
    assert_close(full_logits(model, tokens), their_logits(reference, tokens))
    model.save_pretrained(tmp_path)
    back = their_load(transformers, tmp_path)
    assert same_weights(back, reference)
    assert_close(their_logits(back, tokens), their_logits(reference, tokens))


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "left_out"),
    [
        ("mistral", {"sliding_window"}),
        ("smollm3", {"rope_parameters", "no_rope_layers", "layer_types", "tie_word_embeddings"}),
        ("qwen3", {"rope_parameters", "layer_types", "sliding_window", "head_dim", "attention_bias"}),
        (
            "llama",
            {"rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps", "hidden_act"},
        ),
    ],
)
def test_keys_that_config_json_leaves_out_have_the_defaults_of_transformers(
    transformers, tmp_path, model_type, left_out
):
    changes = {
        "smollm3": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5},
        "qwen3": {"use_sliding_window": True, "head_dim": 128},
        "llama": {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6},
    }
    theirs(transformers, model_type, {"num_hidden_layers": 5} | changes.get(model_type, {})).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in left_out}))
    tokens = random_ids(37, SIZES["vocab_size"])
    reference = their_load(transformers, tmp_path)
    assert_close(full_logits(Transformer.from_pretrained(tmp_path), tokens), their_logits(reference, tokens))


def test_a_sharded_checkpoint_is_put_together(transformers, tmp_path):
    reference = theirs(transformers, "qwen2", {})
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    model = Transformer.from_pretrained(tmp_path)
    assert all(torch.equal(p, reference.state_dict()[name]) for name, p in model.named_parameters())
    # Saved over the shards, the one new file is what both read.
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    for read in (Transformer.from_pretrained(tmp_path), their_load(transformers, tmp_path)):
        assert torch.equal(read.model.norm.weight, model.model.norm.weight)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_keeps_its_dtype_or_takes_another(transformers, tmp_path, dtype):
    exact = theirs(transformers, "qwen3", {})
    reference = theirs(transformers, "qwen3", {}).to(dtype)
    reference.save_pretrained(tmp_path)
    model, wide = Transformer.from_pretrained(tmp_path), Transformer.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.dtype == dtype and wide.dtype == torch.float32
    assert all(torch.equal(p, reference.state_dict()[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, reference.state_dict()[name].float()) for name, p in wide.named_parameters())
    model.save_pretrained(tmp_path / "again")
    assert their_load(transformers, tmp_path / "again", dtype="auto").dtype == dtype
    tokens = random_ids(37, SIZES["vocab_size"])
    truth = their_logits(exact, tokens)
    ours, torchs = (x.float() - truth for x in (full_logits(model, tokens), their_logits(reference, tokens)))
    assert ours.norm() <= 1.2 * torchs.norm()  # rounding may fall otherwise, but no more of it


@torch.no_grad()
@pytest.mark.parametrize("written", [False, True])
def test_a_tied_checkpoint_may_hold_the_head_a_second_time(transformers, tmp_path, written):
    reference = theirs(transformers, "llama", SMOLLM2)
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    if written:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = Transformer.from_pretrained(tmp_path)
    assert model.lm_head is None
    tokens = random_ids(37, SIZES["vocab_size"])
    assert_close(full_logits(model, tokens), their_logits(reference, tokens))
    model.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")


@torch.no_grad()
def test_a_reward_model_scores_alike_in_transformers(transformers, tmp_path):
    theirs(transformers, "qwen2", {}).save_pretrained(tmp_path / "policy")
    model = Transformer.from_pretrained(tmp_path / "policy", scalar_head=True)
    assert not model.score.weight.any()
    randomise(model)
    save_model(model, tmp_path / "reward")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    reference, info = load(tmp_path / "reward", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    tokens = random_ids(37, SIZES["vocab_size"])
    again = Transformer.from_pretrained(tmp_path / "reward", scalar_head=True)
    value = again.values(hidden_states(again, tokens))[-1]
    assert same_weights(again, model)
    assert_close(value, model.values(hidden_states(model, tokens))[-1])
    assert_close(value, reference.eval()(torch.tensor([tokens])).logits[0, 0])


# --- layouts --------------------------------------------------------------------------------------------------------

WINDOWS = {"full": (), "window": (3, None, 6)}


@pytest.fixture(scope="module", params=WINDOWS)
def double_model(request) -> Transformer:
    return tiny_model(windows=WINDOWS[request.param]).double()


def trees_of(shape: list[tuple[int, list[int]]], seed: int = 0) -> list[tuple[list[int], list[list[int]]]]:
    """Random tokens for (prompt length, response lengths)."""
    ids = iter(random_ids(sum(p + sum(r) for p, r in shape), seed=seed))
    return [([next(ids) for _ in range(p)], [[next(ids) for _ in range(n)] for n in r]) for p, r in shape]


def from_plain_rows(model: Transformer, trees) -> torch.Tensor:
    """Hidden states in the order of the flat axis, each response computed behind its own copy of the prompt."""
    parts = []
    for prompt, responses in trees:
        parts.append(hidden_states(model, prompt))
        parts += [hidden_states(model, prompt + response)[len(prompt) :] for response in responses]
    return torch.cat(parts)


SHAPES = {
    "ragged": [(5, [3, 1, 7]), (2, [4]), (9, [2, 2])],
    "prompt of one token": [(1, [5, 2]), (4, [3])],
    "empty responses": [(3, [0, 4, 0]), (6, [0])],
    "prompts alone": [(5, []), (1, []), (8, [])],
    "one row": [(4, [6])],
    "one token": [(1, [])],
}


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_gives_what_its_rows_give_alone(double_model, shape):
    trees = trees_of(SHAPES[shape])
    layout = Packed(trees)
    torch.testing.assert_close(
        double_model(layout.tokens, layout), from_plain_rows(double_model, trees), rtol=0, atol=1e-10
    )


@torch.no_grad()
@settings(max_examples=40)
@given(shape=st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), max_size=4)), min_size=1, max_size=4))
def test_any_tree_gives_what_its_rows_give_alone(shape):
    model = tiny_model(layers=2, windows=(3, None)).double()
    trees = trees_of(shape)
    layout = Packed(trees)
    torch.testing.assert_close(model(layout.tokens, layout), from_plain_rows(model, trees), rtol=0, atol=1e-10)


def gradients(model: Transformer, hidden: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss with another weight for every token, so that no two can be swapped unseen."""
    targets = tokens.flip(0)
    logp, entropy = linear_token_logprobs(hidden, model.head_weight, targets)
    weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    model.zero_grad()
    (logp @ weights + 0.1 * entropy @ weights.flip(0)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_of_a_tree_are_those_of_its_rows(double_model):
    trees = trees_of(SHAPES["ragged"] + SHAPES["empty responses"])
    layout = Packed(trees)
    tree = gradients(double_model, double_model(layout.tokens, layout), layout.tokens)
    rows = gradients(double_model, from_plain_rows(double_model, trees), layout.tokens)
    for name, gradient in rows.items():
        assert (tree[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), name


def test_gradient_checkpointing_computes_blocks_twice_and_changes_no_gradient(double_model):
    layout = Packed(trees_of(SHAPES["ragged"]))
    calls = []
    hook = double_model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(double_model, double_model(layout.tokens, layout), layout.tokens)
    assert len(calls) == 1
    double_model.checkpointing = True
    try:
        recomputed = gradients(double_model, double_model(layout.tokens, layout), layout.tokens)
    finally:
        double_model.checkpointing = False
        hook.remove()
    assert len(calls) == 3
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())


def slots_of(model: Transformer, slots: int, max_length: int) -> Slots:
    c = model.config
    return Slots(c.layers, slots, c.kv_heads, max_length, c.head_dim, model.dtype, "cpu")


@torch.no_grad()
def test_decoding_gives_what_the_full_forward_gives_around_the_edges_of_the_read(double_model):
    """The cache is read in widths of 32: tokens 32, 33, 64, 65 and their neighbours, in one step and then on."""
    lengths = (1, 2, 30, 31, 32, 33, 62, 63, 64, 65)
    texts = [random_ids(length + 3, seed=length) for length in lengths]
    cache = slots_of(double_model, len(lengths), 70)
    cache.kv.fill_(float("nan"))  # what nobody has written is never read
    cache.kv.nan_to_num_(1e3)
    layout = Packed([(text[: n - 1], []) for text, n in zip(texts, lengths, strict=True)], keep_kv=True)
    double_model(layout.tokens, layout)
    for slot, (start, length) in enumerate(layout.prompt_spans):
        cache.put([slot], layout.kv, start, length)
    full = [hidden_states(double_model, text) for text in texts]
    for ahead in range(3):
        places = [n - 1 + ahead for n in lengths]
        tokens = torch.tensor([text[place] for text, place in zip(texts, places, strict=True)])
        hidden = double_model(tokens, cache.step(torch.tensor(places), max(places)))
        expected = torch.stack([states[place] for states, place in zip(full, places, strict=True)])
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_slot_that_is_moved_or_shared_goes_on_as_before(double_model):
    text = random_ids(40)
    full = hidden_states(double_model, text)
    cache = slots_of(double_model, 4, 40)
    layout = Packed([(random_ids(5, seed=1), []), (text[:35], [])], keep_kv=True)
    double_model(layout.tokens, layout)
    cache.put([1, 3], layout.kv, *layout.prompt_spans[1])  # a prompt shared by two slots
    cache.move(3, 0, 35)
    for place in range(35, 40):
        tokens, positions = torch.tensor([text[place]] * 2), torch.tensor([place] * 2)
        hidden = double_model(tokens, cache.step(positions, place))
        torch.testing.assert_close(hidden, full[place].expand(2, -1), rtol=0, atol=1e-10)


# --- numbers --------------------------------------------------------------------------------------------------------


def test_a_token_has_the_same_logits_to_the_bit_however_few_share_its_batch():
    model = tiny_model(seed=4)
    hidden = torch.randn(16, model.config.width)
    together = model.logits(hidden)
    assert all(torch.equal(model.logits(hidden[:n]), together[:n]) for n in (1, 2, 5, 15))


def test_rotary_angles_stay_fp32_in_a_bf16_model():
    position = torch.tensor([4093])
    cos, sin = tiny_model().bfloat16()._rope(position)
    angle = 4093.0 * 100.0 ** (-torch.arange(0, 14, 2, dtype=torch.float64) / 14)
    assert cos.dtype == sin.dtype == torch.bfloat16
    torch.testing.assert_close(cos[0, 0, :7].double(), angle.cos(), rtol=0, atol=5e-3)
    torch.testing.assert_close(sin[0, 0, 7:].double(), angle.sin(), rtol=0, atol=5e-3)


def test_initial_weights_are_a_function_of_the_seed():
    config = tiny_config(qkv_bias=True, width=64)
    one, same, other = (Transformer(config).initialise(seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.dim() == 2:
            assert not torch.equal(a, c)
            shrink = (2 * config.layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            assert a.std().item() * shrink == pytest.approx(0.02, rel=0.1)
        else:
            assert a.eq(0.0 if name.endswith("bias") else 1.0).all()


@pytest.mark.parametrize("shape", [(5, 6), (3, 2, 4)])
def test_the_gradient_of_the_norm_is_that_of_its_formula(shape):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    leaves = x.requires_grad_(), weight.requires_grad_()

    def formula(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()

    torch.testing.assert_close(_RMSNorm.apply(x, weight, 1e-3), formula(x, weight))
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-3), leaves)


def test_the_gradient_of_swiglu_is_that_of_its_formula():
    gate, up = (torch.randn(4, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(_SwiGLU.apply(gate, up), gate * gate.sigmoid() * up)
    assert torch.autograd.gradcheck(_SwiGLU.apply, (gate, up))
