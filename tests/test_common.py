"""common.py against float64, brute force and plain transformers."""

import copy
import gzip
import json
import math
import os
import signal
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from conftest import make_llama, make_tokenizer
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

import common
import sft
from common import UserError

CPU = torch.device("cpu")
EOS = 2


def randn(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def length_mask(lengths, width):
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).float()


# ----------------------------------------------------------------------------------------------
# Log-probs and GAE


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_token_logprobs_equals_float64_log_softmax(temperature):
    logits, tokens = 20 * randn(3, 5, 11), torch.randint(11, (3, 5))
    exact = torch.log_softmax(logits.double() / temperature, -1)
    got = common.token_logprobs(logits, tokens, temperature)
    for b in range(3):
        for t in range(5):
            assert got[b, t].item() == pytest.approx(exact[b, t, tokens[b, t]].item(), abs=2e-5)


def test_token_logprobs_of_bfloat16_logits_are_float32_and_accurate():
    logits, tokens = (10 * randn(40, 300)).bfloat16(), torch.randint(300, (40,))
    got = common.token_logprobs(logits, tokens)
    exact = torch.log_softmax(logits.double(), -1)[torch.arange(40), tokens]
    assert got.dtype == torch.float32
    assert (got.double() - exact).abs().max() < 1e-5


def test_masked_mean_and_variance_are_those_of_the_kept_entries():
    x, mask = randn(4, 6) * 3 + 5, length_mask([6, 1, 3, 0], 6)
    kept = x[mask.bool()].double()
    assert common.masked_mean(x, mask).item() == pytest.approx(kept.mean().item(), rel=1e-6)
    variance = ((kept - kept.mean()) ** 2).sum() / len(kept)
    assert common.masked_variance(x, mask).item() == pytest.approx(variance.item(), rel=1e-5)


def test_masked_mean_of_nothing_is_zero():
    assert common.masked_mean(torch.ones(2, 3), torch.zeros(2, 3)).item() == 0


def test_whiten_has_population_variance_one_and_zeros_elsewhere():
    x, mask = randn(4, 6) * 3 + 5, length_mask([6, 1, 3, 0], 6)
    white, kept = common.whiten(x, mask), x[mask.bool()].double()
    exact = (kept - kept.mean()) / kept.std(unbiased=False)
    assert torch.allclose(white[mask.bool()].double(), exact, atol=1e-5)
    assert (white[mask == 0] == 0).all()


def test_whiten_does_not_see_the_padding():
    x, mask = randn(4, 6), length_mask([6, 1, 3, 2], 6)
    garbage = torch.where(mask.bool(), x, 1e3 * randn(4, 6, seed=1))
    assert torch.equal(common.whiten(x, mask), common.whiten(garbage, mask))
    wider = torch.cat([x, torch.full((4, 3), 7.0)], 1)
    wider_mask = torch.cat([mask, torch.zeros(4, 3)], 1)
    assert torch.allclose(common.whiten(wider, wider_mask)[:, :6], common.whiten(x, mask))


def brute_force_gae(rewards, values, length, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, one sequence, in float64 with no recursion."""
    r, v = rewards[:length].double().tolist(), values[:length].double().tolist() + [0.0]
    delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
    return [
        sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)
    ]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (1.0, 1.0)])
def test_gae_equals_the_sum_of_discounted_deltas(gamma, lam):
    lengths = [7, 1, 4, 6]
    rewards, values, mask = randn(4, 7), randn(4, 7, seed=1), length_mask(lengths, 7)
    advantages, returns = common.gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(lengths):
        exact = torch.tensor(brute_force_gae(rewards[b], values[b], length, gamma, lam))
        assert torch.allclose(advantages[b, :length], exact, atol=1e-5)
        assert torch.allclose(returns[b, :length], exact + values[b, :length], atol=1e-5)
        assert (advantages[b, length:] == 0).all() and (returns[b, length:] == 0).all()


def test_gae_limits_are_the_td_error_and_the_monte_carlo_advantage():
    rewards, values, mask = randn(1, 5), randn(1, 5, seed=1), torch.ones(1, 5)
    td = rewards + torch.cat([values[:, 1:], torch.zeros(1, 1)], 1) - values
    to_go = torch.stack([rewards[:, t:].sum(1) for t in range(5)], 1)
    assert torch.allclose(common.gae(rewards, values, mask, 1.0, 0.0)[0], td, atol=1e-6)
    advantages, returns = common.gae(rewards, values, mask, 1.0, 1.0)
    assert torch.allclose(advantages, to_go - values, atol=1e-5)
    assert torch.allclose(returns, to_go, atol=1e-5)


def test_gae_does_not_see_what_lies_past_the_last_real_token():
    mask = length_mask([3, 5, 1], 5)
    rewards, values = randn(3, 5) * mask, randn(3, 5, seed=1) * mask
    noise = 1e3 * randn(3, 5, seed=2) * (1 - mask)
    clean = common.gae(rewards, values, mask)
    dirty = common.gae(rewards + noise, values - noise, mask)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


# ----------------------------------------------------------------------------------------------
# Generation

SIZES = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
    eos_token_id=EOS,
)  # fmt: skip
GROUPED = SIZES | dict(intermediate_size=64, num_key_value_heads=2)
UNTIED = dict(tie_word_embeddings=False)  # a tied random head mostly repeats the last token
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=None),
    "gemma": lambda: GemmaConfig(**GROUPED, head_dim=16, **UNTIED),
    "gpt2": lambda: GPT2Config(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=64),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **UNTIED),
}
PROMPTS = [[5, 6, 7, 8, 9], [11], [12, 13, 14], [15, 3, 4, 18, 19, 20, 21, 22], [30, 31], [40, 7]]


@cache
def cached_model(family):
    torch.manual_seed(0)
    if family == "llama":
        return make_llama(60, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(CONFIGS[family]()).train()


@torch.no_grad()
def plain_greedy(model, prompts, max_new_tokens, eos):
    """One unpadded prompt at a time through `model.generate`; responses up to their EOS."""
    plain, responses = copy.deepcopy(model).eval(), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
            eos_token_id=eos, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        responses.append(out[0, len(prompt) :].tolist())
    return responses


def some_eos(model, max_new_tokens=12):
    """Two token ids that greedy decoding does reach, at different steps."""
    free = plain_greedy(model, PROMPTS, max_new_tokens, [59])
    return [free[0][4], free[2][2]]


@pytest.mark.parametrize("family", ["llama", *CONFIGS])
def test_greedy_equals_model_generate(family):
    model = cached_model(family)
    eos = some_eos(model)
    expected = plain_greedy(model, PROMPTS, 12, eos)
    assert len({token for row in expected for token in row}) > 8  # no trivial repetition
    assert len({len(row) for row in expected}) > 1  # some stop early
    assert common.slots_work(model, 20)
    assert common.generate(model, PROMPTS, 12, eos, temperature=0) == expected
    assert common.generate(model, PROMPTS, 12, eos, temperature=0, slots=2) == expected


def test_large_logits_do_not_look_like_a_disagreement(capsys):
    """SmolLM2's logits reach 34, where float32 differs by more than 1e-3 between two orders of
    summation: an absolute bound sent the whole model to the slow way."""
    model = make_llama(60)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert common.slots_work(model, 20) and capsys.readouterr().out == ""


def test_a_model_with_a_plain_head_keeps_it_when_generate_sees_it_first():
    model = make_llama(60)
    common.generate(model, PROMPTS[:1], 2, EOS, temperature=0)
    assert model.plain_head


def test_sampled_responses_keep_their_eos_and_end_there():
    model, eos = make_llama(12, initializer_range=0.05), [2, 7]
    responses = common.generate(
        model, [[3 + i % 5, 4] for i in range(40)], 9, eos, slots=6,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert {len(r) for r in responses} >= {1, 2, 3, 9}
    assert {r[-1] for r in responses if len(r) < 9} == {2, 7}
    for response in responses:
        assert 1 <= len(response) <= 9
        assert not set(response[:-1]) & {2, 7}


def test_eos_id_may_be_one_number_or_several():
    model = cached_model("llama")
    (one,) = set(some_eos(model)[:1])
    expected = plain_greedy(model, PROMPTS, 12, [one])
    assert common.generate(model, PROMPTS, 12, one, temperature=0) == expected
    assert common.generate(model, PROMPTS, 12, [one], temperature=0) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_the_model_as_it_found_it(family, training):
    torch.manual_seed(0)
    model = copy.deepcopy(cached_model(family)).train(training)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    attention = model.config._attn_implementation
    common.generate(model, PROMPTS, 4, EOS, generator=torch.Generator().manual_seed(0))
    assert model.config._attn_implementation == attention
    assert all(module.training == training for module in model.modules())
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    for module in model.modules():
        assert not [name for name in vars(module) if isinstance(vars(module)[name], torch.Tensor)]
    assert not any(p.grad is not None for p in model.parameters())


def test_generate_restores_the_model_when_it_is_interrupted(monkeypatch):
    model = make_llama(60).train()
    common.slots_work(model, 10)
    monkeypatch.setattr(common, "decode_step", lambda *_: 1 / 0)
    attention = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError):
        common.generate(model, PROMPTS, 4, EOS)
    assert model.training and model.config._attn_implementation == attention
    assert not any(hasattr(module, "slot_keys") for module in model.modules())


def test_generate_uses_its_generator_and_no_other():
    model = make_llama(60, initializer_range=0.05)
    draw = lambda seed: common.generate(  # noqa: E731
        model, PROMPTS, 8, EOS, generator=torch.Generator().manual_seed(seed), slots=4
    )
    first, state = draw(1), torch.get_rng_state()
    torch.rand(3)
    assert draw(1) == first and draw(2) != first
    torch.set_rng_state(state)
    draw(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_prompt_raises_and_no_prompt_gives_no_response():
    model = cached_model("llama")
    with pytest.raises(ValueError, match="empty prompt"):
        common.generate(model, [[3], []], 4, EOS)
    assert common.generate(model, [], 4, EOS) == []


def windowed_mistral():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MistralConfig(**GROUPED, sliding_window=6)).train()


def test_a_window_in_reach_falls_back_and_equals_model_generate(capsys):
    model = windowed_mistral()
    expected = plain_greedy(model, PROMPTS, 12, [EOS])
    assert not common.slots_work(model, 20)
    assert common.generate(model, PROMPTS, 12, EOS, temperature=0, slots=4) == expected
    assert capsys.readouterr().out.count("model.generate") == 1  # told once
    assert model.training
    model.config.sliding_window = None
    assert plain_greedy(model, PROMPTS, 12, [EOS]) != expected  # the window did matter


def test_fallback_samples_by_its_arguments_and_not_by_the_models_generation_config():
    model = windowed_mistral()
    expected = plain_greedy(model, PROMPTS, 12, [EOS])
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    assert common.generate(model, PROMPTS, 12, EOS, temperature=0) == expected
    assert model.generation_config.repetition_penalty == 5.0
    many = common.generate(
        model, [[5]] * 50, 1, EOS, temperature=3.0, generator=torch.Generator().manual_seed(0)
    )
    assert len({row[0] for row in many}) > 5


def test_fallback_stops_at_eos_and_reproduces_with_a_generator():
    model = windowed_mistral()
    draw = lambda seed: common.generate(  # noqa: E731
        model, [[5, 6]] * 30, 9, [2, 7, 9, 11], temperature=3.0, slots=8,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    responses = draw(0)
    assert responses == draw(0) and responses != draw(1)
    assert {len(r) for r in responses} >= {1, 2, 9}
    for response in responses:
        assert not set(response[:-1]) & {2, 7, 9, 11}


def test_hybrid_models_are_generated_for_by_transformers_with_their_own_attention(tmp_path):
    """Convolution and attention in turn: no slots, and left padding needs transformers' masks."""
    from transformers import Lfm2Config

    torch.manual_seed(0)
    config = Lfm2Config(
        **GROUPED, block_multiple_of=8, layer_types=["conv", "full_attention"], conv_L_cache=3
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    expected = plain_greedy(model, PROMPTS, 6, [EOS])
    loaded = common.load_policy(tmp_path, CPU)
    attention = loaded.config._attn_implementation
    assert common.generate(loaded, PROMPTS[:1], 6, EOS, temperature=0) == expected[:1]
    assert len(common.generate(loaded, PROMPTS, 6, EOS, temperature=0)) == len(PROMPTS)
    assert loaded.config._attn_implementation == attention


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_scaling_that_sets_in_falls_back(kind):
    """Beyond the original context the angles depend on the longest sequence in the batch."""
    factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4) if kind == "longrope" else {}
    rope = dict(rope_type=kind, rope_theta=1e4, factor=4.0, **factors)
    rope["original_max_position_embeddings"] = 16
    model = make_llama(60, max_position_embeddings=64, rope_parameters=rope)
    assert common.slots_work(model, 16) and not common.slots_work(model, 17)


@pytest.mark.parametrize("config", [
    BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    Gemma2Config(**GROUPED | dict(initializer_range=0.02), head_dim=8, query_pre_attn_scalar=8,
                 sliding_window=64, attn_logit_softcapping=5.0, final_logit_softcapping=5.0),
])  # fmt: skip
def test_attention_that_slots_cannot_do_falls_back(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    attention = model.config._attn_implementation
    assert not common.slots_work(model, 20)
    assert model.training and model.config._attn_implementation == attention
    expected = plain_greedy(model, PROMPTS, 6, [EOS])
    assert common.generate(model, PROMPTS, 6, EOS, temperature=0) == expected


def assert_drawn_from(counts, probabilities):
    """Pearson's chi-square within 5 standard deviations of its mean; nothing impossible drawn."""
    counts, probabilities = counts.double().flatten(), probabilities.double().flatten()
    expected = probabilities * counts.sum()
    assert counts[probabilities == 0].sum() == 0
    common_enough = expected >= 5
    freedom = int(common_enough.sum()) - 1
    assert freedom >= 1
    statistic = ((counts - expected) ** 2 / expected)[common_enough].sum()
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.9, -4.0])
N = 20_000


def draw_counts(**kwargs):
    noise = torch.rand(N, len(LOGITS), generator=torch.Generator().manual_seed(0))
    sampling = common.Sampling([], 1, **kwargs)
    draws, logprobs = common.draw(LOGITS.expand(N, -1), noise, sampling)
    log_p = (LOGITS.double() / sampling.temperature).log_softmax(-1)  # of the whole softmax
    assert torch.allclose(logprobs.double(), log_p[draws], atol=1e-6)
    return torch.bincount(draws, minlength=len(LOGITS))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sample_frequencies_match_softmax(temperature):
    counts = draw_counts(temperature=temperature)
    assert_drawn_from(counts, (LOGITS.double() / temperature).softmax(-1))
    with pytest.raises(AssertionError):  # the check itself can tell a wrong temperature
        assert_drawn_from(counts, (LOGITS.double() / (1.1 * temperature)).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_top_k_keeps_the_k_largest(top_k):
    p = LOGITS.double().softmax(-1)
    kept = set(sorted(range(len(p)), key=lambda i: -p[i])[:top_k])
    p = torch.tensor([x if i in kept else 0.0 for i, x in enumerate(p.tolist())])
    counts = draw_counts(top_k=top_k)
    if top_k == 1:
        assert counts.nonzero().flatten().tolist() == [0]
    else:
        assert_drawn_from(counts, p / p.sum())


@pytest.mark.parametrize("top_p, temperature", [(0.3, 1.0), (0.6, 1.0), (0.9, 0.5), (0.999, 1.0)])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, temperature):
    p = (LOGITS.double() / temperature).softmax(-1).tolist()
    kept, mass = set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass < top_p:
            kept.add(i)
            mass += p[i]
    counts = draw_counts(top_p=top_p, temperature=temperature)
    p = torch.tensor([x if i in kept else 0.0 for i, x in enumerate(p)])
    if len(kept) == 1:
        assert counts.nonzero().flatten().tolist() == list(kept)
    else:
        assert_drawn_from(counts, p / p.sum())


def test_temperature_zero_is_argmax_per_row():
    logits = randn(9, 30)
    tokens, _ = common.draw(logits, None, common.Sampling([], 1, temperature=0))
    assert tokens.tolist() == [max(range(30), key=row.__getitem__) for row in logits.tolist()]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_generated_pairs_of_tokens_match_the_models_joint_distribution(temperature):
    model, prompt, n = make_llama(8, initializer_range=0.15), [3, 5, 4], 4000
    responses = common.generate(
        model, [prompt] * n, 2, 99, temperature=temperature, slots=n // 2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    pairs = torch.tensor(responses)
    with torch.no_grad():
        ids = torch.tensor([prompt + [a] for a in range(8)])
        logits = model.eval()(ids).logits.double() / temperature
    first, second = logits[0, 2].softmax(-1), logits[:, 3].softmax(-1)
    counts = torch.bincount(8 * pairs[:, 0] + pairs[:, 1], minlength=64)
    assert_drawn_from(counts, first[:, None] * second)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
@pytest.mark.parametrize("family", ["llama", *CONFIGS])
def test_log_probs_at_sampling_are_those_of_the_training_forward(family, temperature):
    """One token at a time through K/V buffers and refilled slots, against the whole sequence in one
    forward; top-k and top-p do not count."""
    model = cached_model(family)
    responses, logprobs = common.generate(
        model, PROMPTS * 2, 9, EOS, temperature, top_k=30, top_p=0.9, slots=5, logprobs=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    examples = [common.join(p, r) for p, r in zip(PROMPTS * 2, responses)]
    batch = common.collate(examples, range(len(examples)), CPU)
    with torch.no_grad():
        expected = common.response_logprobs(model, batch, temperature or 1.0)
    assert [len(p) for p in logprobs] == [len(r) for r in responses]
    assert torch.allclose(common.pad_right(logprobs, CPU), expected, atol=1e-4)


def test_a_model_that_transformers_generates_for_has_no_log_probs():
    responses, logprobs = common.generate(windowed_mistral(), PROMPTS, 8, EOS, logprobs=True)
    assert len(responses) == len(PROMPTS) and logprobs is None
    assert common.generate(cached_model("llama"), [], 4, EOS, logprobs=True) == ([], [])


# The way of a GPU, with Python functions in the place of graphs: bursts of steps between two looks,
# steps kept by their range of lengths, buffers that stay for the next call.


@pytest.fixture
def graphs(monkeypatch):
    """The steps that were captured, in order."""
    captured = []

    def capture(step, pool):
        captured.append(step)
        return step

    monkeypatch.setattr(common, "uses_graphs", lambda model: True)
    monkeypatch.setattr(common, "capture", capture)
    return captured


def test_with_graphs_greedy_equals_model_generate(graphs):
    model = copy.deepcopy(cached_model("llama"))
    expected = plain_greedy(model, PROMPTS, 12, [EOS])
    for slots in (6, 2):
        assert common.generate(model, PROMPTS, 12, EOS, temperature=0, slots=slots) == expected
    assert model.state_dict().keys() == cached_model("llama").state_dict().keys()


def test_a_graph_serves_a_range_of_lengths_and_later_calls(graphs):
    model = copy.deepcopy(cached_model("llama"))
    long = [[5 + i % 40 for i in range(n)] for n in (3, 110, 60)]
    expected = plain_greedy(model, long, 18, [EOS])
    assert common.generate(model, long, 18, EOS, temperature=0) == expected
    assert len(graphs) == 1  # 128 positions: two bursts
    buffers = [m.slot_keys.data_ptr() for m in model.modules() if hasattr(m, "slot_keys")]
    assert len(buffers) == 2
    for prompts in (PROMPTS[:3], long):  # shorter ones fit too
        plain = plain_greedy(model, prompts, 18, [EOS])
        assert common.generate(model, prompts, 18, EOS, temperature=0) == plain
    assert len(graphs) == 1
    assert buffers == [m.slot_keys.data_ptr() for m in model.modules() if hasattr(m, "slot_keys")]
    longer = [[5 + i % 40 for i in range(n)] for n in (3, 120, 60)]  # 120 + 18 > 128: new buffers
    # (this model's position embeddings are rotary, so 138 positions are fine)
    plain = plain_greedy(model, longer, 18, [EOS])
    assert common.generate(model, longer, 18, EOS, temperature=0) == plain and len(graphs) > 1


def test_kept_graphs_see_weights_that_change_in_place_and_settings_that_change(graphs):
    model = copy.deepcopy(cached_model("llama"))
    first = common.generate(model, PROMPTS, 8, EOS, temperature=0)
    common.copy_weights(make_llama(60, seed=5, initializer_range=0.3), model)
    second = common.generate(model, PROMPTS, 8, EOS, temperature=0)
    assert second == plain_greedy(model, PROMPTS, 8, [EOS]) != first and len(graphs) == 1
    drawn = lambda **how: common.generate(  # noqa: E731
        model, PROMPTS, 8, EOS, generator=torch.Generator().manual_seed(0), **how
    )
    hot = drawn(temperature=5.0)
    assert drawn(temperature=1.0) != hot and drawn(temperature=5.0) == hot
    assert drawn(temperature=5.0, top_k=1) == second


def test_kept_slots_are_not_many_more_than_a_later_call_needs(graphs):
    """An evaluation of many prompts once made every rollout after it decode as many rows."""
    model = copy.deepcopy(cached_model("llama"))
    plain = plain_greedy(model, PROMPTS, 8, [EOS])
    for n, size in ((6, 6), (5, 6), (2, 2), (4, 4)):
        found = common.generate(model, PROMPTS[:n], 8, EOS, temperature=0)
        assert found == plain[:n] and model.kept_slots.size == size


def test_a_step_that_waits_for_the_device_is_told(monkeypatch, capsys):
    monkeypatch.setattr(common, "never_waits", lambda step: False)
    model = make_llama(60, initializer_range=0.3)  # a cached one may have been asked already
    found = common.generate(model, PROMPTS, 8, EOS, temperature=0)
    assert found == plain_greedy(model, PROMPTS, 8, [EOS])
    assert capsys.readouterr().out.count("no CUDA graph") == 1


def test_out_of_memory_is_not_taken_for_a_model_that_slots_cannot_run(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(common, "prefill", full)
    with pytest.raises(torch.OutOfMemoryError):
        common.generate(make_llama(60), PROMPTS, 8, EOS)


@pytest.mark.slow  # a minute of compilation
def test_a_compiled_model_that_falls_back_runs_its_cache_uncompiled():
    """Each layer would be a graph of its own, and past 64 of them torch stops."""
    from torch._dynamo.utils import counters

    model = copy.deepcopy(cached_model("llama"))
    common.compile_layers(model, "on")
    model.slots_agree = False
    counters.clear()
    found = common.generate(model, PROMPTS, 8, EOS, temperature=0)
    assert found == plain_greedy(copy.deepcopy(cached_model("llama")), PROMPTS, 8, [EOS])
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("entropy", [False, True])
def test_the_compiled_head_gives_the_same_log_probs_and_gradients(entropy):
    """Of 1,600 tokens, so in two chunks, each computed again in the backward."""
    model = make_llama(60, seed=1)
    common.has_plain_head(model)
    examples = [([5 + i % 50 for i in range(250)], [0] * 50 + [1] * 200)] * 8
    batch = common.collate(examples, range(8), CPU)

    def run():
        out = common.response_logprobs(model, batch, 0.7, entropy)
        out = sum(out) if entropy else out
        model.zero_grad()
        out.sum().backward()
        return out.detach(), [p.grad.clone() for p in model.parameters()]

    plain, gradients = run()
    model.compiled_head_logprobs = torch.compile(common.head_logprobs, dynamic=True)
    compiled, same = run()
    assert (plain - compiled).abs().max() < 1e-4
    for a, b in zip(gradients, same):
        assert (a - b).abs().max() < 1e-4 * max(1, a.abs().max())


@pytest.mark.slow  # a minute of compilation
def test_compiled_layers_generate_the_same_without_compiling_for_every_length():
    from torch._dynamo.utils import counters

    model = copy.deepcopy(cached_model("llama"))
    draw = lambda: common.generate(  # noqa: E731
        model, PROMPTS * 2, 12, EOS, slots=4, generator=torch.Generator().manual_seed(0)
    )
    expected = draw()
    common.compile_layers(model, "on")
    counters.clear()
    assert draw() == expected and draw() == expected
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4  # lengths from 3 to 20 went through


def test_with_graphs_sampled_pairs_match_the_joint_distribution(graphs):
    test_generated_pairs_of_tokens_match_the_models_joint_distribution(1.0)


# ----------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("family", ["llama", *CONFIGS])
def test_training_forwards_do_not_read_position_ids_back(family, tmp_path, monkeypatch):
    """transformers looks whether sequences are packed, on the host; our attention does not ask, and
    a saved model shows no trace of it."""
    from transformers import masking_utils

    model = copy.deepcopy(cached_model(family))
    batch = common.collate(EXAMPLES, range(3), CPU)
    with torch.no_grad():
        expected = common.response_logprobs(model, batch)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: 1 / 0)
    if family != "opt":  # transformers' own attention does
        with pytest.raises(ZeroDivisionError):
            AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([[5, 6]]), use_cache=False)
    monkeypatch.undo()
    loaded = common.load_policy(tmp_path, CPU)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: 1 / 0)
    with torch.no_grad():
        assert torch.allclose(common.response_logprobs(loaded, batch), expected, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert "slots" not in (tmp_path / "again/config.json").read_text()
    with pytest.raises(ValueError, match="common.generate"):
        loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)


def test_attention_that_is_not_plainly_causal_is_left_alone(tmp_path):
    windowed_mistral().save_pretrained(tmp_path / "mistral")
    assert common.load_policy(tmp_path / "mistral", CPU).config._attn_implementation != "slots"
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=64, num_labels=1))
    bert.save_pretrained(tmp_path / "bert")
    assert common.load_reward(tmp_path / "bert", CPU).config._attn_implementation != "slots"


def test_training_flops_against_torchs_own_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = make_llama(200, hidden_size=64, intermediate_size=160, num_hidden_layers=4)
    examples = [common.join([5, 6, 7, 8], [9, 10, EOS, 11]) for _ in range(6)]
    batch = common.collate(examples, range(6), CPU)
    common.has_plain_head(model)  # a forward of its own, the first time
    with FlopCounterMode(display=False) as counter:
        common.response_logprobs(model, batch).sum().backward()
    assert common.training_flops([model], 48, 24) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


EXAMPLES = [
    common.join([5, 6], [7, EOS]),
    common.join([8], [9, 10, 11, 12, 13]),
    common.join([14, 15, 16, 17, 18, 19], [20, EOS]),
    common.join([21, 22, 23], [EOS]),
    ([24, 25, 26, EOS, 27, 28, EOS], [0, 1, 1, 1, 0, 1, 1]),  # a dialogue: two trained turns
]


def brute_force_logprobs(model, example, temperature=1.0):
    """Log-probs of one example's trained tokens from the model's own full float64 softmax."""
    ids, mask = example
    logits = model(input_ids=torch.tensor([ids])).logits[0].double() / temperature
    log_p = logits.log_softmax(-1)
    return torch.stack([log_p[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_response_logprobs_and_entropy_equal_the_full_softmax(temperature):
    model = cached_model("llama")
    batch = common.collate(EXAMPLES, range(len(EXAMPLES)), CPU)
    logprobs, entropy = common.response_logprobs(model, batch, temperature, entropy=True)
    assert torch.equal(logprobs, common.response_logprobs(model, batch, temperature))
    assert logprobs.dtype == torch.float32 and logprobs.shape == batch.mask.shape
    for b, example in enumerate(EXAMPLES):
        exact = brute_force_logprobs(model, example, temperature)
        assert torch.allclose(logprobs[b, : len(exact)].double(), exact, atol=1e-4)
        assert (logprobs[b, len(exact) :] == 0).all() and (entropy[b, len(exact) :] == 0).all()
        ids, mask = example
        logits = model(input_ids=torch.tensor([ids])).logits[0].double() / temperature
        p = torch.stack([logits[t - 1].softmax(-1) for t in range(1, len(ids)) if mask[t]])
        assert torch.allclose(
            entropy[b, : len(p)].double(), torch.special.entr(p).sum(-1), atol=1e-4
        )


@pytest.mark.parametrize("family", ["llama", *CONFIGS])
def test_padding_on_the_right_without_an_attention_mask_changes_nothing(family):
    model = cached_model(family)
    together = common.response_logprobs(model, common.collate(EXAMPLES, range(5), CPU))
    for b, example in enumerate(EXAMPLES):
        exact = brute_force_logprobs(model, example)
        assert torch.allclose(together[b, : len(exact)].double(), exact, atol=2e-4)


def test_log_probs_do_not_depend_on_the_micro_batches():
    model, lengths = cached_model("llama"), [len(ids) for ids, _ in EXAMPLES]
    grids = []
    for budget in (1, 10, 16, 1000):
        grid = torch.zeros(5, 5)
        for rows in common.micro_batches(lengths, budget):
            batch = common.collate(EXAMPLES, rows, CPU)
            batch.paste(grid, common.response_logprobs(model, batch).detach())
            assert torch.equal(batch.cut(grid), grid[rows][:, : batch.mask.shape[1]])
        grids.append(grid)
    assert all(torch.allclose(grid, grids[0], atol=1e-5) for grid in grids)
    assert (grids[0] != 0).sum() == sum(sum(mask) for _, mask in EXAMPLES)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_equal_those_of_the_full_softmax_and_pads_have_none():
    model = make_llama(60)
    batch = common.collate(EXAMPLES, range(5), CPU)
    assert (batch.ids == 0).any()
    ours = gradients(model, common.response_logprobs(model, batch).sum())
    exact = gradients(model, sum(brute_force_logprobs(model, e).sum() for e in EXAMPLES))
    for name in exact:
        assert torch.allclose(ours[name], exact[name], atol=2e-4), name
    embedding = ours["model.embed_tokens.weight"]
    assert (embedding[0] == 0).all() and (embedding[5] != 0).any()


def test_eos_is_learned():
    model = make_llama(60)
    batch = common.collate([common.join([21, 22, 23], [EOS])], [0], CPU)
    head = gradients(model, common.response_logprobs(model, batch).sum())["lm_head.weight"]
    hidden = model.model(batch.ids).last_hidden_state[0, 2]
    p = model.lm_head(hidden).softmax(-1)[EOS]
    assert torch.allclose(head[EOS], ((1 - p) * hidden).detach(), atol=1e-5)


def test_more_than_1024_tokens_are_checkpointed_and_nothing_changes(monkeypatch):
    model, calls = make_llama(60), []
    real = common.checkpoint
    monkeypatch.setattr(common, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    tokens = torch.randint(3, 60, (30, 80), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [common.join(row[:5], row[5 : 40 + i]) for i, row in enumerate(tokens)]
    weights = randn(30, 64)
    batch = common.collate(examples, range(30), CPU)
    logprobs = common.response_logprobs(model, batch)
    assert len(calls) == -(-int(batch.mask.sum()) // 1024) >= 2
    ours = gradients(model, (logprobs * weights).sum())
    exact = [brute_force_logprobs(model, example) for example in examples]
    for row, want in zip(logprobs, exact):
        assert torch.allclose(row[: len(want)].double(), want, atol=1e-4)
    want = gradients(model, sum((x * w[: len(x)]).sum() for x, w in zip(exact, weights)))
    for name in want:
        assert torch.allclose(ours[name], want[name], atol=1e-3), name


@pytest.mark.parametrize("config", [
    CohereConfig(**GROUPED, logit_scale=0.0625),
    Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=5.0),
    Gemma2Config(**GROUPED | dict(initializer_range=0.02), head_dim=8, query_pre_attn_scalar=8,
                 final_logit_softcapping=30.0),
])  # fmt: skip
def test_scaled_or_capped_logits_go_through_the_models_own_forward(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    assert not common.has_plain_head(model) and model.training
    logprobs = common.response_logprobs(model, common.collate(EXAMPLES, range(5), CPU))
    for b, example in enumerate(EXAMPLES):
        exact = brute_force_logprobs(model, example)
        assert torch.allclose(logprobs[b, : len(exact)].double(), exact, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", *CONFIGS])
def test_plain_heads_are_recognised(family):
    assert common.has_plain_head(cached_model(family))


def reward_folder(tmp_path, pad_token_id, seed=0, vocab_size=60, **settings):
    torch.manual_seed(seed)
    config = make_llama(vocab_size).config
    config.num_labels, config.pad_token_id = 1, pad_token_id
    for name, value in settings.items():
        setattr(config, name, value)
    folder = tmp_path / f"reward-{pad_token_id}-{seed}"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def score_by_hand(model, ids):
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return (hidden @ model.score.weight[0]).item()


@pytest.mark.parametrize("pad_token_id", [0, EOS, None])
def test_scores_are_read_at_the_last_real_token(tmp_path, pad_token_id):
    model = common.load_reward(reward_folder(tmp_path, pad_token_id), CPU)
    assert model.scores_tokens
    batch = common.collate(EXAMPLES, range(5), CPU)
    scores, values = common.sequence_scores(model, batch), common.response_values(model, batch)
    for b, (ids, mask) in enumerate(EXAMPLES):
        assert scores[b].item() == pytest.approx(score_by_hand(model, ids), abs=1e-4)
        before = [ids[:t] for t in range(1, len(ids)) if mask[t]]
        for r, state in enumerate(before):
            assert values[b, r].item() == pytest.approx(score_by_hand(model, state), abs=1e-4)


def test_scores_equal_transformers_pooling_where_pad_is_not_eos(tmp_path):
    folder = reward_folder(tmp_path, 0)
    plain = LlamaForSequenceClassification.from_pretrained(folder).eval()
    batch = common.collate(EXAMPLES, range(5), CPU)
    logits = plain(input_ids=batch.ids, attention_mask=(batch.ids != 0).long()).logits[:, 0]
    assert torch.allclose(common.sequence_scores(common.load_reward(folder, CPU), batch), logits)


def test_the_stored_mean_is_subtracted(tmp_path):
    plain = common.load_reward(reward_folder(tmp_path, 0), CPU)
    centred = common.load_reward(reward_folder(tmp_path, 0, reward_mean=0.75), CPU)
    batch = common.collate(EXAMPLES, range(5), CPU)
    for read in (common.sequence_scores, common.response_values):
        assert torch.allclose(read(plain, batch) - read(centred, batch), torch.tensor(0.75))


def test_an_encoder_is_scored_with_its_attention_mask(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    config.reward_mean = 0.5
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    model = common.load_reward(tmp_path / "bert", CPU)
    assert not model.scores_tokens
    scores = common.sequence_scores(model, common.collate(EXAMPLES, range(5), CPU))
    for score, (ids, _) in zip(scores, EXAMPLES):
        alone = model(input_ids=torch.tensor([ids])).logits.item() - 0.5
        assert score.item() == pytest.approx(alone, abs=1e-5)


def test_load_policy_refuses_a_reward_model_and_load_reward_a_language_model(tmp_path, tiny_folder):
    with pytest.raises(UserError, match="a reward model"):
        common.load_policy(reward_folder(tmp_path, 0), CPU)
    with pytest.raises(UserError, match="is no reward model"):
        common.load_reward(tiny_folder, CPU)
    three = reward_folder(tmp_path, 0, seed=1, num_labels=3)
    with pytest.raises(UserError, match="one.label"):
        common.load_reward(three, CPU)
    for load in (common.load_policy, common.load_reward, common.load_tokenizer):
        with pytest.raises(UserError, match="nowhere"):
            load(str(tmp_path / "nowhere"), *[CPU] * (load is not common.load_tokenizer))


@pytest.mark.parametrize("settings", [
    GPT2Config(**SIZES, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    GPTNeoXConfig(**SIZES, intermediate_size=64, attention_dropout=0.5, hidden_dropout=0.5),
    OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5,
              layerdrop=0.5),
    Qwen2Config(**GROUPED, attention_dropout=0.5),
])  # fmt: skip
def test_dropout_is_zeroed_and_the_model_trains(tmp_path, settings):
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(settings).train()
    ids = torch.arange(2, 30)[None]
    assert not torch.equal(fresh(ids).logits, fresh(ids).logits)  # dropout is on here
    fresh.save_pretrained(tmp_path)
    model = common.load_policy(tmp_path, CPU)
    assert model.training and model.dtype == torch.float32
    assert torch.allclose(model(ids).logits, fresh.eval()(ids).logits, atol=1e-5)


def test_reward_dropout_is_zeroed(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_labels=1, hidden_dropout_prob=0.5,
        attention_probs_dropout_prob=0.5, classifier_dropout=0.5, initializer_range=0.3,
    )  # fmt: skip
    fresh, ids = BertForSequenceClassification(config).train(), torch.arange(2, 30)[None]
    assert (fresh(ids).logits - fresh(ids).logits).abs() > 1e-3  # dropout is on here
    fresh.save_pretrained(tmp_path)
    model = common.load_reward(tmp_path, CPU)
    assert model.training
    assert torch.allclose(model(ids).logits, fresh.eval()(ids).logits, atol=1e-5)


def test_set_lr_warms_up_and_decays():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=9.0)
    rates = [common.set_lr(optimizer, 2.0, s, 10, 4, "linear") for s in range(1, 11)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert torch.allclose(torch.tensor(rates[4:]).diff(), torch.tensor(-2.0 / 7))
    assert rates[-1] == pytest.approx(2.0 / 7)  # one more step would be 0
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    constant = [common.set_lr(optimizer, 2.0, s, 10, 0, "constant") for s in range(1, 11)]
    assert constant == [2.0] * 10


@pytest.mark.parametrize("n, size", [(10, 3), (10, 10), (4, 7), (1, 3)])
def test_epoch_batches_cover_each_row_once_an_epoch(n, size):
    steps = [common.epoch_batch(n, size, step, seed=5) for step in range(1, n + 1)]
    assert all(len(rows) == size for rows in steps)
    series = sum(steps, [])
    for start in range(0, len(series), n):
        assert sorted(series[start : start + n]) == list(range(n))
    for step in (n, 1):  # out of order: nothing is remembered
        assert common.epoch_batch(n, size, step, seed=5) == steps[step - 1]


def test_epochs_are_shuffled_differently_and_by_the_seed():
    epochs = [tuple(common.epoch_batch(20, 20, step, 0)) for step in (1, 2, 3)]
    assert len({*epochs, tuple(common.epoch_batch(20, 20, 1, 1)), tuple(range(20))}) == 5


# ----------------------------------------------------------------------------------------------
# Data


def test_read_jsonl_reads_plain_and_gzip_and_remembers_the_line(tmp_path):
    text = '{"prompt": "a"}\n\n{"prompt": "你好"}\n'
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for path in (tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"):
        rows = common.read_jsonl(path)
        assert [row["prompt"] for row in rows] == ["a", "你好"]
        assert [row["where"] for row in rows] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("content, told", [
    (b'{"a": 1}\n{"a": \n', "x.jsonl:2: not JSON"),
    (b'{"a": 1}\n\n[1, 2]\n', "x.jsonl:3: expected one JSON object"),
    (b"\n\n", "no lines"),
    (b'{"a": "\xff\xfe"}\n', "cannot be read"),
])  # fmt: skip
def test_read_jsonl_names_the_bad_line(tmp_path, content, told):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=told):
        common.read_jsonl(tmp_path / "x.jsonl")


LINES = "".join(f'{{"a": "{os.urandom(9).hex()}"}}\n' for _ in range(99)).encode()


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(LINES)[:500]])
def test_read_jsonl_of_a_broken_gzip(tmp_path, content):
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        common.read_jsonl(tmp_path / "x.jsonl.gz")
    with pytest.raises(UserError, match="no such file"):
        common.read_jsonl(tmp_path / "y.jsonl")


def test_read_split_holds_out_the_last_twentieth(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(dict(prompt=str(i))) + "\n" for i in range(60)))
    train, held_out = common.read_split(path, "", None)
    assert [row["prompt"] for row in train] == [str(i) for i in range(57)]
    assert [row["prompt"] for row in held_out] == ["57", "58", "59"]
    assert "last 3 of 60" in capsys.readouterr().out
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="--eval_data"):
        common.read_split(path, "", None)


@pytest.mark.parametrize("row, told", [
    (dict(other="a"), 'no "prompt".*other'),
    (dict(prompt=3), "must be a string or a list"),
    (dict(prompt=[dict(role="user")]), "must be a string or a list"),
    (dict(prompt="  "), "is empty"),
    (dict(prompt=[]), "is empty"),
])  # fmt: skip
def test_field_names_the_line_and_the_key(row, told):
    with pytest.raises(UserError, match=f"f.jsonl:7: .*{told}|f.jsonl:7: {told}"):
        common.field(row | dict(where="f.jsonl:7"), "prompt")


def user(text):
    return dict(role="user", content=text)


def assistant(text):
    return dict(role="assistant", content=text)


def test_split_pair_of_whole_dialogues_as_hh_rlhf_writes_them():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    row = dict(chosen=start + " Because it is", rejected=start + " Because not", where="f:1")
    assert common.split_pair(row) == (start, " Because it is", " Because not")
    assert common.prompt_of(row) == start


def test_split_pair_of_whole_dialogues_in_messages():
    start = [user("Hi"), assistant("Hello"), user("Why?")]
    row = dict(chosen=start + [assistant("b")], rejected=start + [assistant("a")], where="f:1")
    assert common.split_pair(row) == (start, [assistant("b")], [assistant("a")])


@pytest.mark.parametrize("chosen, rejected", [
    ("yes", "no"),
    ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d"),
    ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:"),
    ([user("a"), assistant("b")], [user("c"), assistant("b")]),
    ([user("a"), assistant("b")], "text"),
])  # fmt: skip
def test_split_pair_without_a_shared_dialogue_is_refused(chosen, rejected):
    with pytest.raises(UserError, match="f:1: "):
        common.split_pair(dict(chosen=chosen, rejected=rejected, where="f:1"))


def test_prompts_are_found_in_every_form():
    row = dict(where="f:1")
    assert common.split_pair(row | dict(prompt="p", chosen="a", rejected="b")) == ("p", "a", "b")
    assert common.prompt_of(row | dict(prompt="p", chosen="a", rejected="b")) == "p"
    dialogue = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert common.prompt_of(row | dict(messages=dialogue)) == dialogue[:3]
    with pytest.raises(UserError):
        common.prompt_of(row | dict(messages=[assistant("d")]))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def chat_tokenizer(template=CHATML):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(dict(extra_special_tokens=["<|im_start|>", "<|im_end|>"]))
    tokenizer.chat_template = template
    return tokenizer


def runs_of_ones(tokenizer, ids, mask):
    """The text of each maximal run of trained tokens."""
    runs, previous = [], 0
    for token, m in zip(ids, mask):
        if m and not previous:
            runs.append([])
        if m:
            runs[-1].append(token)
        previous = m
    return [tokenizer.decode(run) for run in runs]


def test_encode_dialogue_trains_exactly_the_assistant_turns():
    tokenizer = chat_tokenizer()
    dialogue = [
        dict(role="system", content="be nice"),
        user("What is it?"), assistant("A boat."), user("Why? 你好"), assistant("Wait."),
    ]  # fmt: skip
    ids, mask = common.encode_dialogue(tokenizer, dialogue)
    assert len(ids) == len(mask) and set(mask) == {0, 1}
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(dialogue, tokenize=False)
    assert runs_of_ones(tokenizer, ids, mask) == ["A boat.<|im_end|>", "Wait.<|im_end|>"]


def test_encode_dialogue_ends_a_turn_with_eos_where_the_template_writes_no_end_token():
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ids, mask = common.encode_dialogue(tokenizer, [user("a"), assistant("b")])
    assert runs_of_ones(tokenizer, ids, mask) == ["b\n<eos>"]
    assert tokenizer.decode(ids) == "user: a\nassistant: b\n<eos>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = chat_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else '...' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    one = [user("a"), assistant("b")]
    assert runs_of_ones(tokenizer, *common.encode_dialogue(tokenizer, one)) == ["b<|im_end|>"]
    with pytest.raises(UserError, match="f:3: .*rewrites earlier turns"):
        common.encode_dialogue(tokenizer, one + [user("c"), assistant("d")], "f:3")
    upper = chat_tokenizer("{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(UserError, match="rewrites earlier turns"):
        common.encode_dialogue(upper, one)


def test_messages_without_a_usable_template_or_assistant_are_refused():
    refusing = chat_tokenizer("{{ raise_exception('no way') }}")
    with pytest.raises(UserError, match="f:3: .*no way"):
        common.encode_prompt(refusing, [user("a")], "f:3")
    with pytest.raises(UserError, match="no assistant message"):
        common.encode_dialogue(chat_tokenizer(), [user("a")])
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        common.encode_prompt(bare, [user("a")])


def test_prompt_and_response_in_messages_are_the_whole_rendering_in_two_parts():
    tokenizer, prompt = chat_tokenizer(), [user("a"), assistant("b"), user("c")]
    ids = common.encode_prompt(tokenizer, prompt)
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == rendered
    for response in ("Paris.", [assistant("Paris.")]):
        turn = common.encode_response(tokenizer, prompt, response)
        assert tokenizer.decode(turn) == "Paris.<|im_end|>"
    with pytest.raises(UserError, match="one assistant message"):
        common.encode_response(tokenizer, prompt, [user("d")])


def test_encode_prompt_strips_the_eos_that_a_tokenizer_appends():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    text = tokenizer("the sea", add_special_tokens=False)["input_ids"]
    assert tokenizer("the sea")["input_ids"] == [1, *text, 2]
    assert common.encode_prompt(tokenizer, "the sea") == [1, *text]
    assert common.encode_response(tokenizer, "x", "the sea") == [*text, 2]


def test_demonstrations_of_every_form(tiny_tokenizer):
    tokenizer, row = tiny_tokenizer(), dict(where="f:1")
    plain = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompt, answer = [1, *plain("the sea")], [*plain(" a boat"), 2]
    want = (prompt + answer, [0] * len(prompt) + [1] * len(answer))
    for form in (dict(completion=" a boat"), dict(chosen=" a boat", rejected="b")):
        assert common.demonstration(tokenizer, row | dict(prompt="the sea") | form) == want
    messages = dict(messages=[user("a"), assistant("b")])
    ids, mask = common.demonstration(chat_tokenizer(), row | messages)
    assert runs_of_ones(chat_tokenizer(), ids, mask) == ["b<|im_end|>"]


def test_stop_ids_are_the_models_the_tokenizers_and_the_templates():
    model, tokenizer = make_llama(400), chat_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [7, 9]
    assert common.stop_ids(model, tokenizer) == sorted({2, 7, 9, end})
    model.generation_config.eos_token_id = 5
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert common.stop_ids(model, tokenizer) == [2, 5]
    model.generation_config.eos_token_id = None
    assert common.stop_ids(model, tokenizer) == [2]


def test_keep_short_drops_what_is_too_long_and_says_so(capsys):
    assert common.keep_short(["a", "bbb", "cc"], 2, len, "things") == ["a", "cc"]
    assert "1 of 3 things" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 1 things"):
        common.keep_short(["bbb"], 2, len, "things")


def test_collate_as_its_docstring_says():
    batch = common.collate([([5, 6, 7, 2], [0, 0, 1, 1])], [0], CPU)
    assert batch.ids.tolist() == [[5, 6, 7, 2]] and batch.tokens.tolist() == [[7, 2]]
    assert batch.positions.tolist() == [[1, 2]] and batch.mask.tolist() == [[1.0, 1.0]]


def test_collate_of_ragged_rows():
    batch = common.collate(EXAMPLES, [4, 3], CPU)
    assert batch.lengths.tolist() == [7, 4] and batch.rows.tolist() == [4, 3]
    assert batch.ids[1].tolist() == [21, 22, 23, EOS, 0, 0, 0]
    assert batch.tokens.tolist() == [[25, 26, EOS, 28, EOS], [EOS, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 4, 5], [2, 0, 0, 0, 0]]
    assert batch.mask.tolist() == [[1.0] * 5, [1.0, 0, 0, 0, 0]]
    assert batch.mask.dtype == torch.float32
    assert list(zip(*(x.tolist() for x in batch.real))) == [
        (0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0),
    ]  # fmt: skip


def test_paste_writes_real_tokens_only_into_its_own_rows():
    grid = torch.full((5, 5), -1.0)
    common.collate(EXAMPLES, [4, 3], CPU).paste(grid, torch.full((2, 5), 7.0))
    assert grid[4].tolist() == [7.0] * 5 and grid[3].tolist() == [7.0, 0, 0, 0, 0]
    assert (grid[:3] == -1).all()


def test_micro_batches_as_its_docstring_says():
    assert common.micro_batches([3, 9, 4], 8) == [[0, 2], [1]]


@pytest.mark.parametrize("budget", [1, 20, 64, 10_000])
def test_micro_batches_keep_the_budget_and_every_row(budget):
    lengths = torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = list(range(0, 50, 2))
    for chosen in (None, rows):
        parts = common.micro_batches(lengths, budget, chosen)
        assert sorted(sum(parts, [])) == (rows if chosen else list(range(50)))
        for part in parts:
            assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= budget
        for part, following in zip(parts, parts[1:]):  # no part could have taken one more
            assert (len(part) + 1) * lengths[following[0]] > budget


# ----------------------------------------------------------------------------------------------
# Scores


def scorer_file(tmp_path, body):
    path = tmp_path / "rule.py"
    path.write_text(body)
    return f"{path}:score"


def test_function_scorer_gives_the_rule_texts_without_special_tokens(tmp_path, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    spec = scorer_file(
        tmp_path,
        "def score(prompts, responses):\n"
        "    return [len(p) + 100 * len(r) for p, r in zip(prompts, responses)]\n",
    )
    responses = [common.encode_response(tokenizer, "p", text) for text in ("boat", "a")]
    score = common.function_scorer(spec, tokenizer)
    assert score(["ab", "c"], None, responses).tolist() == [402.0, 101.0]


@pytest.mark.parametrize("body, told", [
    ("def score(p, r): return 1 / 0", "ZeroDivisionError"),
    ("def score(p, r): return [1.0]", "expected 2 finite scores"),
    ("def score(p, r): return [1.0, float('nan')]", "finite"),
    ("def score(p, r): return [1.0, None]", "TypeError"),
    ("def score(p, r): return 3.0", "TypeError"),
])  # fmt: skip
def test_function_scorer_tells_what_the_rule_did_wrong(tmp_path, tiny_tokenizer, body, told):
    score = common.function_scorer(scorer_file(tmp_path, body), tiny_tokenizer())
    with pytest.raises(UserError, match=f"rule.py:score.*{told}"):
        score(["a", "b"], None, [[5], [6]])


def test_load_function_errors(tmp_path):
    spec = scorer_file(tmp_path, "x = 1\n")
    for bad in ("nothing", f"{tmp_path}/none.py:score", spec, spec.replace(":score", ":x")):
        with pytest.raises(UserError):
            common.load_function(bad)
    with pytest.raises(UserError, match="fails when loaded .ValueError"):
        common.load_function(scorer_file(tmp_path, "raise ValueError('x')\n"))


def test_load_function_can_load_a_dataclass(tmp_path):
    spec = scorer_file(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: int\n\n"
        "def score(p, r):\n    return [A(1).x]\n",
    )
    assert common.load_function(spec)(None, None) == [1]


PAIRS = [("the sea", " a boat"), ("How do I boil an egg?", "wait"), ("你好", " 天气")]


@pytest.mark.parametrize("budget", [1, 1000])
def test_model_scorer_with_the_same_tokenizer_reads_the_ids(tmp_path, tiny_tokenizer, budget):
    tokenizer = tiny_tokenizer()
    reward = common.load_reward(reward_folder(tmp_path, 0, vocab_size=len(tokenizer)), CPU)
    prompts = [common.encode_prompt(tokenizer, p) for p, _ in PAIRS]
    responses = [[9, 8, 7], [5], [300, 2]]  # ids that no text would give: they must not be re-made
    score = common.model_scorer(reward, tiny_tokenizer(), tokenizer, budget)
    scores = score([p for p, _ in PAIRS], prompts, responses)
    for got, p, r in zip(scores, prompts, responses):
        assert got.item() == pytest.approx(score_by_hand(reward, p + r), abs=1e-4)


def test_model_scorer_with_another_tokenizer_reads_the_text(tmp_path, tiny_tokenizer):
    tokenizer, other = tiny_tokenizer(320), tiny_tokenizer(270)
    reward = common.load_reward(reward_folder(tmp_path, 0, vocab_size=len(other)), CPU)
    prompts = [common.encode_prompt(tokenizer, p) for p, _ in PAIRS]
    responses = [common.encode_response(tokenizer, p, r) for p, r in PAIRS]
    score = common.model_scorer(reward, other, tokenizer, 64)
    scores = score([p for p, _ in PAIRS], prompts, responses)
    for got, (p, r) in zip(scores, PAIRS):
        ids = [1, *other(p, add_special_tokens=False)["input_ids"]]
        ids += [*other(r, add_special_tokens=False)["input_ids"], 2]
        assert got.item() == pytest.approx(score_by_hand(reward, ids), abs=1e-4)


# ----------------------------------------------------------------------------------------------
# The run folder


@dataclass
class Settings:
    out: str
    lr: float = 0.1
    resume: bool = False
    overwrite: bool = False
    save_every: int = 2
    device: str = "cpu"
    keep: int = 1
    seed: int = 0
    tensorboard: bool = False
    wandb: bool = False
    quiet: bool = False
    merge: bool = False
    batch_size: int = 1
    lora_rank: int = 0
    shard: bool = False


def train(out, steps, stop_after=None, how="crash", tokenizer=None, **flags):
    """A toy stage: the weights after each step depend on all the steps before."""
    cfg = Settings(out=str(out), **flags)
    run = common.Run(cfg)
    model, extra = make_llama(10), dict(total=0)
    optimizer = common.make_adamw(model, cfg.lr)
    run.begin(model=model, optimizer=optimizer, extra=extra)
    for step in run.steps(steps):
        loss = (model.lm_head.weight * step).sum() + model.lm_head.weight.pow(2).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        extra["total"] += step
        run.log(("loss",), loss=loss.item(), total=extra["total"])
        if step == stop_after:
            if how == "crash":
                raise RuntimeError("power cut")
            os.kill(os.getpid(), how)
    if tokenizer:
        run.finish(model, tokenizer, dict(loss=1.0))
    run.metrics.close()
    return model, optimizer, extra


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["total"]) for row in rows]


def assert_same(first, second):
    for a, b in zip(first[0].parameters(), second[0].parameters()):
        assert torch.equal(a, b)
    a, b = first[1].state_dict()["state"], second[1].state_dict()["state"]
    assert len(a) and all(torch.equal(a[k]["exp_avg"], b[k]["exp_avg"]) for k in a)
    assert first[2] == second[2]


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path):
    whole = train(tmp_path / "whole", 7)
    with pytest.raises(RuntimeError):
        train(tmp_path / "cut", 7, stop_after=5)
    cut = tmp_path / "cut"
    assert [p.name for p in cut.glob("checkpoint*")] == ["checkpoint-4"]
    assert [row[0] for row in metrics(cut)] == [1, 2, 3, 4, 5]
    assert_same(train(cut, 7, resume=True), whole)
    assert metrics(cut) == metrics(tmp_path / "whole")


def test_begin_restores_objects_in_place_and_truncates_metrics(tmp_path):
    at_four = train(tmp_path / "four", 4)
    with pytest.raises(RuntimeError):
        train(tmp_path / "cut", 7, stop_after=5)
    run = common.Run(Settings(out=str(tmp_path / "cut"), resume=True))
    model, extra = make_llama(10, seed=1), dict(total=-1)
    optimizer = common.make_adamw(model, 0.1)
    run.begin(model=model, optimizer=optimizer, extra=extra)
    assert run.start == 4
    assert_same((model, optimizer, extra), at_four)
    run.metrics.close()
    assert [row[0] for row in metrics(tmp_path / "cut")] == [1, 2, 3, 4]


def test_a_second_signal_stops_at_once_unless_it_is_the_same_one(tmp_path, monkeypatch):
    """torchrun passes on what its processes were sent, too."""
    run, now = common.Run(Settings(out=str(tmp_path / "out"))), [100.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    run.on_signal(signal.SIGTERM, None)
    now[0] += 0.5
    run.on_signal(signal.SIGTERM, None)
    assert run.stop_signal == signal.SIGTERM
    now[0] += 1
    with pytest.raises(SystemExit) as end:
        run.on_signal(signal.SIGINT, None)
    assert end.value.code == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_saves_and_exits(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", 7, stop_after=3, how=number)
    assert stop.value.code == 128 + number and signal.getsignal(number) == before
    assert [p.name for p in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-3"]
    assert_same(train(tmp_path / "run", 7, resume=True), train(tmp_path / "whole", 7))


def test_a_folder_that_is_not_empty_is_refused_in_one_line(tmp_path):
    out = tmp_path / "run"
    train(out, 1)
    with pytest.raises(UserError) as told:
        common.Run(Settings(out=str(out)))
    assert all(flag in str(told.value) for flag in ("--resume", "--overwrite", "--out"))
    assert "\n" not in str(told.value)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file is in the way"):
        common.Run(Settings(out=str(tmp_path / "file")))


def test_a_folder_that_is_no_run_is_never_overwritten_or_resumed(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    for flag in ("overwrite", "resume"):
        with pytest.raises(UserError, match="not empty and holds no run"):
            common.Run(Settings(out=str(tmp_path), **{flag: True}))
    assert (tmp_path / "thesis.txt").exists()


def test_changed_settings_are_refused_on_resume(tmp_path):
    train(tmp_path / "run", 1)
    with pytest.raises(UserError, match="--lr was 0.1"):
        common.Run(Settings(out=str(tmp_path / "run"), lr=0.2, resume=True))
    common.Run(Settings(out=str(tmp_path / "run"), resume=True, save_every=5, device="auto"))


def test_overwrite_starts_again_and_only_at_begin(tmp_path):
    out = tmp_path / "run"
    train(out, 5)
    common.Run(Settings(out=str(out), overwrite=True))
    assert len(metrics(out)) == 5
    assert_same(train(out, 3, overwrite=True, lr=0.3), train(tmp_path / "other", 3, lr=0.3))
    assert len(metrics(out)) == 3
    assert json.loads((out / "run.json").read_text())["lr"] == 0.3


def test_a_finished_run_loads_has_no_checkpoints_and_is_refused_on_resume(tmp_path, tiny_tokenizer):
    out, tokenizer = tmp_path / "run", tiny_tokenizer()
    model, _, _ = train(out, 5, tokenizer=tokenizer)
    assert not list(out.glob("checkpoint*")) and not list(out.glob("*.tmp"))
    assert json.loads((out / "eval.json").read_text()) == dict(loss=1.0)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    assert common.load_tokenizer(out).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(UserError, match="is finished"):
        common.Run(Settings(out=str(out), resume=True))


def test_require_wants_values_over_the_first_bound_and_at_most_the_second():
    cfg = sft.Config(lr=0.5)
    common.require(cfg, lr=(0, math.inf))
    common.require(cfg, lr=(0, 0.5))
    for value, bounds in [(0.5, (0.5, math.inf)), (0.5, (0, 0.4)), (float("nan"), (0, math.inf))]:
        with pytest.raises(UserError, match="--lr"):
            common.require(sft.Config(lr=value), lr=bounds)


def test_a_bfloat16_copy_keeps_its_rotary_frequencies(tiny_folder):
    exact = common.load_policy(tiny_folder, CPU)
    coarse = common.load_policy(tiny_folder, CPU, torch.bfloat16)
    assert coarse.dtype == torch.bfloat16
    buffers = dict(coarse.named_buffers())
    assert buffers
    for name, buffer in exact.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype
