"""common.py against float64, brute force and plain transformers."""

import copy
import io
import json
import shutil
import sys
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from unittest.mock import Mock

import pytest
import torch
import transformers as hf
from check import plain_greedy
from conftest import make_llama, make_tokenizer
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import common
import sft
from common import UserError

CPU = torch.device("cpu")
EOS = 2

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))

@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_equals_float64_log_softmax(temperature, dtype):
    logits, tokens = (20 * randn(3, 5, 11)).to(dtype), torch.randint(11, (3, 5))
    exact = torch.log_softmax(logits.double() / temperature, -1)
    exact = torch.tensor([[exact[b, t, tokens[b, t]] for t in range(5)] for b in range(3)]).float()
    found = common.token_logprobs(logits, tokens, temperature)
    assert found.dtype == torch.float32 and torch.allclose(found, exact, atol=2e-5)

def test_masked_statistics_are_those_of_the_kept_entries():
    x, mask = randn(4, 6) * 3 + 5, (torch.arange(6) < torch.tensor([[6], [1], [3], [0]])).float()
    real = x[mask.bool()].double()
    variance = ((real - real.mean()) ** 2).sum() / len(real)
    found = [common.masked_mean(x, mask).item(), common.masked_variance(x, mask).item()]
    assert found == pytest.approx([real.mean().item(), variance.item()], rel=1e-5)
    assert common.masked_mean(x, 0 * mask).item() == 0
    white = common.whiten(x, mask)
    exact = (real - real.mean()) / real.std(unbiased=False)
    assert torch.allclose(white[mask.bool()].double(), exact, atol=1e-5)
    assert (white[mask == 0] == 0).all()
    garbage = torch.where(mask.bool(), x, 1e3 * randn(4, 6, seed=1))
    assert torch.equal(white, common.whiten(garbage, mask))

@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (1.0, 1.0)])
def test_gae_equals_the_sum_of_discounted_deltas(gamma, lam):
    """A_t = sum_k (gamma lam)^(k-t) delta_k, in float64 with no recursion."""
    rewards, values = randn(4, 7), randn(4, 7, seed=1)  # past the end there are numbers, too
    mask = (torch.arange(7) < torch.tensor([[7], [1], [4], [6]])).float()
    advantages, returns = common.gae(rewards, values, mask, gamma, lam)
    for b, T in enumerate([7, 1, 4, 6]):
        r, v = rewards[b].tolist(), values[b, :T].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(T)]
        exact = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, T)) for t in range(T)]
        assert advantages[b, :T].tolist() == pytest.approx(exact, abs=1e-5)
        assert torch.equal(returns[b, :T], advantages[b, :T] + values[b, :T])
        assert not advantages[b, T:].any() and not returns[b, T:].any()

EXAMPLES = [
    common.join([5, 6], [7, EOS]), common.join([8], [9, 10, 11, 12, 13]),
    common.join([14, 15, 16, 17, 18, 19], [20, EOS]), common.join([21, 22, 23], [EOS]),
    dict(ids=[24, 25, 26, EOS, 27, 28, EOS], mask=[0, 1, 1, 1, 0, 1, 1]),  # two turns
]  # fmt: skip

def test_collate_and_take_of_ragged_rows():
    batch = {key: x.tolist() for key, x in common.collate([common.join([5, 6], [7, 2])]).items()}
    assert batch == dict(ids=[[5, 6, 7, 2]], mask=[[0.0, 0.0, 1.0, 1.0]], at=[2, 3])  # docstring
    batch = common.collate([dict(e, spare=e["ids"]) for e in EXAMPLES])
    assert batch["ids"].shape == (5, 8) and torch.equal(batch["spare"], batch["ids"])
    some = common.take(batch | dict(logprobs=randn(5, 8)), [4, 3], CPU)
    assert some["ids"].tolist() == [EXAMPLES[4]["ids"], [21, 22, 23, EOS, 0, 0, 0]]
    assert some["mask"].tolist() == [[0, 1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0]]
    assert torch.equal(some["logprobs"], randn(5, 8)[[4, 3], :7])
    assert some["at"].tolist() == [1, 2, 3, 5, 6, 7 + 3]
    with pytest.raises(AssertionError, match="first token"):
        common.collate([common.join([], [5, 6])])

@pytest.mark.parametrize("budget", [1, 20, 64, 10_000])
def test_micro_batches_keep_the_budget_and_every_row(budget):
    assert common.micro_batches([0, 1, 2], [3, 9, 4], 8) == [[0, 2], [1]]  # the docstring's
    lengths = torch.randint(1, 40, (50,), generator=seeded()).tolist()
    for rows in (list(range(50)), list(range(48, 0, -3))):
        parts = common.micro_batches(rows, lengths, budget)
        assert sorted(sum(parts, [])) == sorted(rows)
        for part in parts:
            assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= budget
        for part, following in zip(parts, parts[1:]):  # no part could have taken one more
            assert (len(part) + 1) * lengths[following[0]] > budget

SIZES = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
    eos_token_id=EOS, tie_word_embeddings=False,  # a tied random head mostly repeats a token
)  # fmt: skip
WIDE = SIZES | dict(intermediate_size=64)
GROUPED = WIDE | dict(num_key_value_heads=2)
GEMMA2 = GROUPED | dict(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=5.0)
CONFIGS = {
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=None),
    "gemma": lambda: hf.GemmaConfig(**GROUPED, head_dim=16),
    "gpt2": lambda: hf.GPT2Config(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "neox": lambda: hf.GPTNeoXConfig(**WIDE),
    "opt": lambda: hf.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
}
UNUSUAL = {
    "short window": lambda: hf.MistralConfig(**GROUPED, sliding_window=6),
    "alibi": lambda: hf.BloomConfig(vocab_size=60, hidden_size=32, n_head=4, initializer_range=0.3),
    "capped logits": lambda: hf.Gemma2Config(**GEMMA2, attn_logit_softcapping=None),
    "capped attention": lambda: hf.Gemma2Config(**GEMMA2, attn_logit_softcapping=5.0),
    "scaled logits": lambda: hf.CohereConfig(**GROUPED, logit_scale=0.0625),
    "divided logits": lambda: hf.GraniteConfig(**GROUPED, logits_scaling=8.0),
    "convolutions": lambda: hf.Lfm2Config(**GROUPED, block_multiple_of=8, conv_L_cache=3,
                                          layer_types=["conv", "full_attention"]),
}  # fmt: skip
FAMILIES = ["llama", *CONFIGS]
every_model = pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])

@cache
def cached_model(family):
    torch.manual_seed(0)
    if family == "llama":
        return make_llama(60, initializer_range=0.3)
    # Only eager attention caps its scores, whatever a version of transformers would choose.
    how = dict(attn_implementation="eager") if family == "capped attention" else {}
    return hf.AutoModelForCausalLM.from_config((CONFIGS | UNUSUAL)[family](), **how)

def policy_of(family):
    return common.Policy(copy.deepcopy(cached_model(family)))

def full_softmax(lm, example, temperature=1.0):
    """In float64, of one unpadded example: log softmax at its n trained tokens (n, V), and (n,)."""
    logits = lm(input_ids=torch.tensor([example["ids"]])).logits[0].double() / temperature
    at = [t for t, m in enumerate(example["mask"]) if m]
    log_p = logits.log_softmax(-1)[[t - 1 for t in at]]
    return log_p, log_p.gather(1, torch.tensor(example["ids"])[at, None])[:, 0]

def gradients(lm, loss):
    lm.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters()}

def assert_close(ours, exact, atol):
    for name, x in exact.items():
        assert (ours[name] - x).abs().max() <= atol * max(1.0, x.abs().max()), name

@every_model
def test_log_probs_entropy_and_gradients_equal_the_full_softmax(family):
    """Padded on the right, without an attention mask."""
    lm, policy = cached_model(family), policy_of(family)
    assert policy.usual == (family in FAMILIES)
    batch = common.collate(EXAMPLES)
    with torch.no_grad():
        logprobs, entropy = policy(batch, 0.6)
    assert logprobs.dtype == torch.float32 and not policy(batch)[1].any()
    assert not logprobs[batch["mask"] == 0].any() and not entropy[batch["mask"] == 0].any()
    for b, example in enumerate(EXAMPLES):
        log_p, exact = full_softmax(lm, example, 0.6)
        real = batch["mask"][b].bool()
        assert torch.allclose(logprobs[b, real].double(), exact, atol=2e-4)
        exact = torch.special.entr(log_p.exp()).sum(-1)
        assert torch.allclose(entropy[b, real].double(), exact, atol=2e-4)
    ours = gradients(policy.lm, policy(batch)[0].sum())
    assert_close(ours, gradients(lm, sum(full_softmax(lm, e)[1].sum() for e in EXAMPLES)), 1e-4)

def long_examples():
    """1,635 trained tokens: more than one chunk of the LM head."""
    tokens = torch.randint(3, 60, (30, 80), generator=seeded()).tolist()
    return [common.join(row[:5], row[5 : 45 + i]) for i, row in enumerate(tokens)]

def test_more_than_1024_tokens_are_checkpointed_and_nothing_changes(monkeypatch):
    policy, calls, real = policy_of("llama"), [], common.checkpoint
    monkeypatch.setattr(common, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    lm, batch = cached_model("llama"), common.collate(long_examples())
    logprobs = policy(batch)[0][batch["mask"].bool()]
    assert len(calls) == -(-len(batch["at"]) // 1024) == 2
    exact = torch.cat([full_softmax(lm, example)[1] for example in long_examples()])
    assert torch.allclose(logprobs.double(), exact, atol=1e-4)
    weights = randn(len(exact))
    ours = gradients(policy.lm, (logprobs * weights).sum())
    assert_close(ours, gradients(lm, (exact * weights).sum()), 1e-4)

def test_large_logits_do_not_look_like_a_disagreement(capsys):
    lm = make_llama(60)
    lm.lm_head.weight.data *= 1e4
    assert common.Policy(lm).usual and capsys.readouterr().out == ""

@pytest.mark.parametrize("family", FAMILIES)
def test_training_forwards_do_not_read_position_ids_back(family, tmp_path, monkeypatch):
    """transformers looks, on the host, whether sequences are packed; ours does not ask, and a saved
    model shows no trace of it."""
    cached_model(family).save_pretrained(tmp_path)
    policy, batch = common.load_policy(tmp_path, CPU), common.collate(EXAMPLES)
    monkeypatch.setattr(hf.masking_utils, "find_packed_sequence_indices", lambda *_: 1 / 0)
    if family != "opt":  # transformers' own attention does
        with pytest.raises(ZeroDivisionError):
            cached_model(family)(batch["ids"], use_cache=False)
    policy(batch)
    with pytest.raises(ValueError, match="common.generate"):  # rather than a wrong text
        policy.lm.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)
    common.save_model(policy, tmp_path / "again")
    assert "slots" not in (tmp_path / "again/config.json").read_text()

def make_reward(folder, pad_token_id=0, vocab_size=60, **settings):
    config = make_llama(vocab_size).config
    config.update(dict(num_labels=1, pad_token_id=pad_token_id) | settings)
    torch.manual_seed(0)
    hf.LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder

def score_by_hand(lm, ids):
    return (lm.base_model(torch.tensor([ids])).last_hidden_state[0, -1] @ lm.score.weight[0]).item()

@pytest.mark.parametrize("pad_token_id", [0, EOS, None])
def test_scores_are_read_at_each_token_and_at_the_last(tmp_path, pad_token_id):
    """Less the mean that is stored in the config."""
    scorer = common.load_scorer(make_reward(tmp_path, pad_token_id, reward_mean=0.75), CPU)
    batch = common.collate(EXAMPLES)
    scores, last = scorer(batch), scorer.last(batch)
    for b, ids in enumerate(example["ids"] for example in EXAMPLES):
        exact = [score_by_hand(scorer.lm, ids[: t + 1]) - 0.75 for t in range(len(ids))]
        assert scores[b, : len(exact)].tolist() == pytest.approx(exact, abs=1e-4)
        assert last[b].item() == pytest.approx(exact[-1], abs=1e-4)

PROMPTS = [[5, 6, 7, 8, 9], [11], [12, 13, 14], [15, 3, 4, 18, 19, 20, 21, 22], [30, 31], [40, 7]]

@every_model
def test_greedy_equals_model_generate(family, capsys):
    """Ragged prompts, with and without fewer slots than prompts; one or two ids are EOS."""
    lm = cached_model(family)
    free = plain_greedy(lm, PROMPTS, 12, [59])
    eos = [free[0][4], free[2][2]]
    expected = plain_greedy(lm, PROMPTS, 12, eos)
    assert len({token for row in expected for token in row}) > 8  # no trivial repetition
    assert len({len(row) for row in expected}) > 1  # some stop early
    for slots in (6, 2):
        assert common.generate(lm, PROMPTS, 12, eos, temperature=0, slots=slots) == expected
    assert capsys.readouterr().out.count("more slowly") == (0 if family in FAMILIES else 2)
    expected = plain_greedy(lm, PROMPTS, 12, eos[:1])
    assert common.generate(lm, PROMPTS, 12, eos[0], temperature=0) == expected

def test_a_window_counts_only_where_sequences_are_longer():
    lm = copy.deepcopy(cached_model("mistral"))
    lm.config.sliding_window = 14
    for new, usual in ((6, True), (7, False), (12, False)):
        longest = max(map(len, PROMPTS)) + new
        assert common.Policy(copy.deepcopy(lm), longest).usual == usual
        expected = plain_greedy(lm, PROMPTS, new, [EOS])
        assert common.generate(lm, PROMPTS, new, EOS, temperature=0) == expected

@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
@every_model
def test_log_probs_at_sampling_are_those_of_the_training_forward(family, temperature):
    """One token at a time through K/V buffers and refilled slots, against one whole forward."""
    policy = policy_of(family)
    sampler = common.Sampler(policy, [EOS], 9, 17, temperature, slots=5)
    responses, logprobs = sampler(PROMPTS * 2, seeded())
    batch = common.collate([common.join(p, r) for p, r in zip(PROMPTS * 2, responses)])
    with torch.no_grad():
        expected, _ = policy(batch, temperature or 1.0)
    assert [len(p) for p in logprobs] == [len(r) for r in responses]
    assert torch.allclose(torch.tensor(sum(logprobs, [])), expected[batch["mask"] == 1], atol=2e-4)

def assert_drawn_from(counts, probabilities):
    """Pearson's chi-square is within 5 standard deviations of its mean."""
    expected = probabilities * counts.sum()
    enough = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[enough].sum()
    freedom = enough.sum() - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5

@contextmanager
def graphs(sampler):
    """The way of a GPU, with Python functions in the place of graphs: bursts of steps between two
    looks, and one captured step for a range of lengths."""
    decode = sampler.decode
    class Graph:
        def replay(self):
            decode(self.kv)

    @contextmanager
    def capture(graph, pool):
        sampler.decode = partial(setattr, graph, "kv")  # recorded, not run
        yield
        sampler.decode = decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        sampler.use_graphs = True
        yield

@pytest.mark.parametrize("way", [nullcontext, graphs])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_pairs_of_tokens_match_the_models_joint_distribution(temperature, way):
    policy, prompt = common.Policy(make_llama(7, initializer_range=0.2)), [3, 5, 4]
    sampler = common.Sampler(policy, [99], 2, 5, temperature, slots=2000)
    with way(sampler):
        found = torch.tensor(sampler([prompt] * 4000, seeded())[0])
    counts = torch.bincount(7 * found[:, 0] + found[:, 1], minlength=49)
    pairs = [common.join(prompt, [a, b]) for a in range(7) for b in range(7)]
    log_p = torch.stack([full_softmax(policy.lm, pair, temperature)[1].sum() for pair in pairs])
    assert_drawn_from(counts, log_p.exp())
    with pytest.raises(AssertionError):  # the check itself can tell a wrong temperature
        assert_drawn_from(counts, (log_p * 1.2).softmax(0))

def test_a_graph_serves_a_range_of_lengths_and_new_weights_in_place():
    long = [[5 + i % 40 for i in range(n)] for n in (3, 110, 60)]
    first, second = cached_model("llama"), make_llama(60, seed=5, initializer_range=0.3)
    sampler = common.Sampler(policy_of("llama"), [EOS], 18, 140, 0, slots=2)
    layers = [layer.self_attn for layer in sampler.lm.model.layers]
    with graphs(sampler):
        assert sampler(long)[0] == plain_greedy(first, long, 18, [EOS])
        buffers = [layer.slot_kv[0].data_ptr() for layer in layers]
        sampler.sync(common.Policy(copy.deepcopy(second)))
        for prompts in (PROMPTS, long):
            assert sampler(prompts)[0] == plain_greedy(second, prompts, 18, [EOS])
    assert len(sampler.graphs) == 2  # up to 128 positions, and up to 140
    assert buffers == [layer.slot_kv[0].data_ptr() for layer in layers]
    sampler.close()
    assert not sampler.graphs and not any(hasattr(layer, "slot_kv") for layer in layers)

def test_a_step_that_is_no_graph_is_told_once_and_runs(monkeypatch, capsys):
    sampler = common.Sampler(policy_of("llama"), [EOS], 8, 16, 0, slots=2)
    sampler.use_graphs = True
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock(side_effect=RuntimeError("not permitted")))
    assert sampler(PROMPTS)[0] == plain_greedy(cached_model("llama"), PROMPTS, 8, [EOS])
    assert capsys.readouterr().out.count("no CUDA graph") == 1

def traces(lm):
    """What a generation could leave behind."""
    modes = [module.training for module in lm.modules()]
    left = [name for module in lm.modules() for name in vars(module)]
    state = torch.get_rng_state().numpy().tobytes()
    return modes, len(left), lm.config._attn_implementation, lm.generation_config.top_k, hash(state)

@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "short window"])
def test_generate_leaves_everything_as_it_was(family, training, crash, monkeypatch):
    lm = copy.deepcopy(cached_model(family)).train(training)
    lm.generation_config.top_k = 1  # has no say
    weights, before = copy.deepcopy(lm.state_dict()), traces(lm)
    if crash:
        monkeypatch.setattr(common.Sampler, "decode", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt) if crash else nullcontext():
        drawn = [common.generate(lm, PROMPTS * 9, 2, EOS, 3.0, seeded(seed)) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2] and len({row[0] for row in drawn[0]}) > 5
    assert traces(lm) == before and lm.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in lm.state_dict().items())

def test_an_empty_prompt_raises_and_no_prompt_gives_no_response():
    assert common.generate(cached_model("llama"), [], 4, EOS) == []
    with pytest.raises(ValueError, match="empty prompt"):
        common.generate(cached_model("llama"), [[3], []], 4, EOS)

def test_out_of_memory_is_not_taken_for_an_unusual_model(monkeypatch):
    monkeypatch.setattr(common.Sampler, "prefill", Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        policy_of("llama")

@pytest.mark.slow  # a minute of compilation
def test_compiled_it_gives_the_same_without_compiling_for_every_length():
    batch, found = common.collate(long_examples()), {}
    for compile in ("off", "on"):
        policy = common.prepare(policy_of("llama"), sft.Config(compile=compile))
        counters.clear()
        sampler = common.Sampler(policy, [EOS], 12, 20, slots=4)
        responses, logprobs = sampler(PROMPTS * 2, seeded())
        assert sampler(PROMPTS * 2, seeded())[0] == responses
        compiled = counters["stats"]["unique_graphs"]
        assert 0 < compiled <= 6 if compile == "on" else compiled == 0  # of 18 lengths
        trained, _ = policy(batch, 0.7)
        numbers = dict(sampled=torch.tensor(sum(logprobs, [])), trained=trained.detach())
        found[compile] = responses, numbers | gradients(policy.lm, trained.sum())
        assert not counters["graph_break"]
    assert found["on"][0] == found["off"][0]
    assert_close(found["on"][1], found["off"][1], 1e-4)

@pytest.mark.parametrize("settings", [
    hf.GPT2Config(**SIZES, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    hf.GPTNeoXConfig(**WIDE, attention_dropout=0.5, hidden_dropout=0.5),
    hf.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5),
    hf.Qwen2Config(**GROUPED, attention_dropout=0.5),
    hf.BertConfig(**WIDE, num_labels=1, hidden_dropout_prob=0.5, classifier_dropout=0.5),
], ids=lambda settings: settings.model_type)  # fmt: skip
def test_dropout_is_zeroed_and_the_model_trains(tmp_path, settings):
    encoder = settings.model_type == "bert"
    auto = hf.AutoModelForSequenceClassification if encoder else hf.AutoModelForCausalLM
    fresh, ids = auto.from_config(settings).train(), torch.arange(2, 30)[None]
    assert not torch.equal(fresh(ids).logits, fresh(ids).logits)  # dropout is on here
    fresh.save_pretrained(tmp_path)
    loaded = (common.load_scorer if encoder else common.load_policy)(tmp_path, CPU)
    assert loaded.lm.training and loaded.lm.dtype == torch.float32
    assert torch.allclose(loaded.lm(ids).logits, fresh.eval()(ids).logits, atol=1e-4)
    assert not encoder or not loaded.reads_tokens

def edit(folder, config={}, weights=lambda w: w):
    """Change what is saved in a model's folder."""
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    file = folder / "model.safetensors"
    save_file(weights(load_file(file)), file, metadata=dict(format="pt"))
    return folder

def renamed(old, new):
    return lambda weights: {name.replace(old, new): x for name, x in weights.items()}

@pytest.mark.parametrize("family, change, says", [
    ("llama", dict(config=dict(num_hidden_layers=3)), "9 weights missing, such as model.layers.2."),
    ("llama", dict(config=dict(num_hidden_layers=1)), "9 weights of a layer too many, such as mod"),
    ("gpt2", dict(config=dict(n_layer=1)), "of a layer too many, such as transformer.h.1."),
    ("llama", dict(config=dict(intermediate_size=65)), "6 weights of another shape, such as"),
    ("llama", dict(weights=renamed("s.1.", "s.2.")), "9 weights missing, such as model.layers.1."),
    ("llama", dict(weights=renamed("model.", "module.")), "weights missing, such as"),
    ("llama", dict(weights=lambda w: w | {"model.norm.weight": torch.full((32,), torch.nan)}),
     "1 weights not finite, such as model.norm.weight"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, family, change, says):
    cached_model(family).save_pretrained(tmp_path)
    edit(tmp_path, **change)
    for load in (common.load_policy, partial(common.load_scorer, new_head=True)):
        with pytest.raises(UserError) as error:
            load(tmp_path, CPU)
        assert str(error.value).startswith(f"{tmp_path}: ") and says in str(error.value)
        assert "\n" not in str(error.value)

def test_models_of_another_kind_are_refused_in_one_line(tmp_path, tiny_folder):
    reward, three = make_reward(tmp_path / "one"), make_reward(tmp_path / "three", num_labels=3)
    headless = edit(make_reward(tmp_path / "headless"), weights=renamed("score.", "lm_head."))
    for load, path, says in [
        (common.load_policy, reward, "LlamaForSequenceClassification, where a causal"),
        (partial(common.load_scorer, new_head=True), reward, "where a causal language model"),
        (common.load_scorer, tiny_folder, "where a reward model is needed"),
        (common.load_scorer, three, "of another shape, such as score.weight"),
        (common.load_scorer, headless, "1 weights missing, such as score.weight"),
        (common.load_policy, tmp_path / "nowhere", "nowhere: "),
    ]:
        with pytest.raises(UserError, match=says) as error:
            load(path, CPU)
        assert "\n" not in str(error.value)

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_tied_and_untied_models_are_the_base_of_a_reward_model(tmp_path, family, tied):
    config = copy.deepcopy(cached_model(family).config)
    config.tie_word_embeddings = tied
    base, batch = hf.AutoModelForCausalLM.from_config(config), common.collate(EXAMPLES[3:4])
    base.save_pretrained(tmp_path)
    scorer = common.load_scorer(tmp_path, CPU, new_head=True)
    assert scorer.reads_tokens and not scorer(batch).any()  # a head of zeros
    torch.nn.init.normal_(scorer.lm.score.weight)
    exact = base.base_model(batch["ids"]).last_hidden_state @ scorer.lm.score.weight[0]
    assert torch.allclose(scorer(batch), exact, atol=1e-4)

def test_no_code_of_a_folder_runs_and_nobody_is_asked(tmp_path, tiny_folder, monkeypatch):
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    for folder, new in ((known, {}), (unknown, dict(model_type="x", tokenizer_class="X"))):
        shutil.copytree(tiny_folder, folder)
        (folder / "x.py").write_text("open(__file__ + '.ran', 'w')\n")
        classes = dict(AutoConfig="x.A", AutoModelForCausalLM="x.A", AutoTokenizer=["x.A", "x.A"])
        for name in ("config.json", "tokenizer_config.json"):
            config = json.loads((folder / name).read_text()) | dict(auto_map=classes)
            (folder / name).write_text(json.dumps(config | new))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    common.load_tokenizer(known, common.load_policy(known, CPU).lm)
    for load in (common.load_policy, common.load_scorer, common.load_tokenizer):
        with pytest.raises(UserError, match="unknown: [^\n]*$"):
            load(unknown, *[CPU][: load is not common.load_tokenizer])
    assert sys.stdin.tell() == 0 and not list(tmp_path.rglob("*.ran"))

def test_a_tokenizer_fits_its_model(tmp_path, tiny_folder):
    tokenizer, lm = make_tokenizer(), make_llama(320)
    assert common.load_tokenizer(tiny_folder, lm).get_vocab() == tokenizer.get_vocab()
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="more ids than the model has embeddings"):
        common.load_tokenizer(tmp_path, lm)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)  # an encoder's may have none, a policy's may not
    assert common.load_tokenizer(tmp_path).eos_token is None
    with pytest.raises(UserError, match="no EOS token"):
        common.load_tokenizer(tmp_path, lm)

def test_a_bfloat16_copy_keeps_its_rotary_frequencies(tiny_folder, monkeypatch):
    exact = dict(common.load_policy(tiny_folder, CPU).lm.named_buffers())
    monkeypatch.setattr(common, "weight_dtype", lambda device, frozen: torch.bfloat16)
    loaded, cast = common.load_policy(tiny_folder, CPU).lm, make_llama(320)
    common.cast(cast, torch.bfloat16)
    assert loaded.dtype == cast.dtype == torch.bfloat16
    for name, buffer in [*loaded.named_buffers(), *cast.named_buffers()]:
        assert torch.equal(exact[name], buffer) and exact[name].dtype == buffer.dtype

def test_the_context_ends_where_rotary_scaling_sets_in():
    rope = dict(rope_type="dynamic", factor=4.0, original_max_position_embeddings=16)
    # Beyond it the angles depend on the whole batch.
    assert common.context_length(make_llama(60, rope_parameters=rope)) == 16
    assert common.context_length(make_llama(60)) == 256

def test_set_lr_warms_up_and_decays():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0)
    for warmup, schedule, expected in [
        (4, "linear", [0.5, 1.0, 1.5, 2.0, *(2.0 * (1 - i / 7) for i in range(1, 7))]),
        (0, "constant", [2.0] * 10),
    ]:
        cfg = sft.Config(warmup=warmup, lr_schedule=schedule)
        rates = [common.set_lr(optimizer, 2.0, step, 10, cfg) for step in range(1, 11)]
        assert rates == pytest.approx(expected) and optimizer.param_groups[0]["lr"] == rates[-1]

@pytest.mark.parametrize("n, size", [(10, 3), (10, 10), (4, 7), (1, 3)])
def test_epoch_batches_cover_each_row_once_an_epoch(n, size):
    steps = [common.epoch_batch(n, size, step, seed=5) for step in range(1, n + 1)]
    assert all(len(rows) == size for rows in steps)
    series = sum(steps, [])
    for start in range(0, len(series), n):
        assert sorted(series[start : start + n]) == list(range(n))
    assert common.epoch_batch(n, size, 1, seed=5) == steps[0]  # nothing is remembered
    orders = [tuple(common.epoch_batch(20, 20, *key)) for key in ((1, 0), (2, 0), (1, 1))]
    assert len({*orders, tuple(range(20))}) == 4
