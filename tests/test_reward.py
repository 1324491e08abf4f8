"""Stage 2: the three losses against plain loops, bad data, the model in plain transformers."""

import math
from itertools import combinations

import pytest
import torch
from conftest import eval_of, make_llama, make_tokenizer, reward_config, rows_of, run, save, write
from test_data import TRIMMING, chat_tokenizer, user
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import reward

CPU = torch.device("cpu")
DATA = dict(
    pairwise=[dict(prompt=prompt, chosen=a, rejected=b) for prompt, a, b in [
        ("What is the capital?", "The capital is Paris.", "a boat"), ("an egg", "Hot water.", "No"),
        ("你好", "今天天气", "egg egg egg egg egg egg egg")]],
    pointwise=[dict(prompt=prompt, response=a, score=score) for prompt, a, score in [
        ("What is the capital?", "The capital is Paris.", 2.5), ("an egg", "Hot water.", 0.5),
        ("Please tell me a story.", "No", -1)]],
    listwise=[
        dict(prompt="the sea", responses=["a boat", "the sea", "egg"], ranks=[2, 1, 3]),
        dict(prompt="an egg", responses=["hot", "hot water", "wait", "No"], ranks=[1, 2, 2, 3]),
        dict(prompt="weather", responses=["今天天气怎么样", "story"], ranks=[2, 1]),
    ],
)  # fmt: skip

def config(tmp_path, folder, loss, rows=None, **flags):
    path = tmp_path / f"{loss}.jsonl"
    write(path, rows or DATA[loss])
    settings = dict(loss=loss, data=str(path), eval_data=str(path), batch_size=len(DATA[loss]))
    return reward_config(tmp_path, folder, tmp_path / "out", **(settings | flags))

def pairs_of(items):
    """[(reward, rank), ...] -> the (better, worse) rewards of every pair that is no tie."""
    ranked = sorted(items, key=lambda item: item[1])
    return [(a, b) for (a, i), (b, j) in combinations(ranked, 2) if i < j]

def loop_loss(loss, judgements):
    """Of [(reward, target), ...] for each judgement, the rewards are tensors."""
    means = []
    for items in judgements:
        parts = [(r - score) ** 2 for r, score in items]
        if loss != "pointwise":  # a pair is a list of two
            parts = [(1 + (worse - better).exp()).log() for better, worse in pairs_of(items)]
        means += [sum(parts) / len(parts)] if parts else []
    return sum(means) / max(1, len(means))

def random_lists(seed, B=6, K=5):
    generator = torch.Generator().manual_seed(seed)
    rewards = 3 * torch.randn(B, K, generator=generator, dtype=torch.float64)
    ranks = torch.randint(1, 4, (B, K), generator=generator)  # 5 responses, 3 ranks: always ties
    lengths = torch.randint(2, K + 1, (B,), generator=generator)
    return rewards, ranks, (torch.arange(K) < lengths[:, None]).double()

@pytest.mark.parametrize("seed", range(5))
def test_losses_against_loops(seed):
    rewards, ranks, mask = random_lists(seed)
    rewards.requires_grad_()
    items = [list(zip(some, own.tolist())) for some, own in zip(rewards, ranks)]
    real = [some[: int(n)] for some, n in zip(items, mask.sum(1))]
    a, b, first = rewards[:, 0], rewards[:, 1], torch.tensor([[1, 2]] * 6)
    points = [[(x, y)] for x, y in zip(a, b)]
    pairs = [[(x, 1), (y, 2)] for x, y in zip(a, b)]
    for found, loss, some in (
        (reward.listwise_loss(rewards, ranks), "listwise", items),
        (reward.listwise_loss(rewards, ranks, mask), "listwise", real),
        (reward.pointwise_loss(a, b), "pointwise", points),
        (reward.pairwise_loss(a, b), "pairwise", pairs),
        (reward.listwise_loss(rewards[:, :2], first), "pairwise", pairs),  # lists of two
        (reward.listwise_loss(rewards[:, :2].flip(1), first.flip(1)), "pairwise", pairs),
    ):
        expected = loop_loss(loss, some)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        both = [torch.autograd.grad(x, rewards, retain_graph=True)[0] for x in (found, expected)]
        assert torch.allclose(*both, rtol=1e-10, atol=1e-12)  # nothing learns from padding

def test_losses_at_their_edges():
    far = torch.tensor([-500.0]), torch.tensor([500.0])  # exp would overflow
    assert reward.pairwise_loss(*far).item() == pytest.approx(1000)
    rewards = torch.tensor([[1.0, 0.0, 5.0], [3.0, 9.0, 4.0], [2.0, 7.0, 0.0]])
    ranks = torch.tensor([[2, 1, 1], [1, 1, 1], [1, 2, 3]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    # Only the first list has a pair: 0.0 should beat 1.0.
    assert reward.listwise_loss(rewards, ranks, mask).item() == pytest.approx(math.log(1 + math.e))
    assert reward.listwise_loss(rewards[1:2], ranks[1:2]).item() == 0.0

def test_ordered_right():
    assert reward.ordered_right([[(2.0, 1), (1.0, 2)]]) == (1, 1)
    assert reward.ordered_right([[(1.0, 1), (2.0, 2)]]) == (0, 1)
    assert reward.ordered_right([[(1.0, 1), (1.0, 2)]]) == (0.5, 1)  # equal rewards: half
    assert reward.ordered_right([[(1.0, 2), (5.0, 2)]]) == (0, 0)  # a tie of the judge is no pair
    # Ranks 1, 2, 2, 3: five pairs; 3.0 beats all, of the rest 1.0 > 0.0 is right, 2.0 too.
    assert reward.ordered_right([[(3.0, 1), (1.0, 2), (2.0, 2), (0.0, 3)]]) == (5, 5)
    assert reward.ordered_right([[(3.0, 3), (1.0, 2), (2.0, 2), (0.0, 1)]]) == (0, 5)

def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    known = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]
    known += [(1, 29, 0.0061, 0.1718)]
    for hits, n, low, high in known:
        assert reward.wilson_interval(hits / n, n) == pytest.approx((low, high), abs=6e-5)

BAD_ROWS = [
    *[("pointwise", dict(response="b", score=score), '"score"')
      for score in (math.nan, 1e999, -(10**400), "3", True, None)],
    ("pointwise", dict(score=1.0), "0 responses"),
    ("pointwise", dict(response="b", completion="c", score=1.0), "2 responses"),
    ("pairwise", dict(chosen="b"), "'rejected'"),
    ("pairwise", dict(chosen=3, rejected="c"), '"chosen"'),
    ("pairwise", dict(chosen="b", rejected="c", prompt=None), '"prompt"'),
    ("pairwise", dict(response="b", score=1.0), "--loss"),
    *[("listwise", dict(responses=["b", "c"], ranks=ranks), '"ranks" must')
      for ranks in ([0, 1], [1, 2.5], [1, 10**30], [1], None)],
    ("listwise", dict(responses=["b", "c"], ranks=[1, 2, 3]), "2 responses, expected 3"),
    ("listwise", dict(responses=["b", 4], ranks=[1, 2]), '"responses"'),
]  # fmt: skip

@pytest.mark.parametrize("loss, row, names", BAD_ROWS)
def test_a_bad_row_is_told_with_its_line(tmp_path, tiny_folder, loss, row, names):
    cfg = config(tmp_path, tiny_folder, loss, DATA[loss][:1] + [dict(prompt="a") | row])
    with pytest.raises(common.UserError) as error:
        reward.load_judgements(cfg, common.load_tokenizer(tiny_folder), (), 99)
    message = str(error.value)
    assert message.startswith(f"{cfg.data}:2: ") and names in message and "\n" not in message

def test_what_orders_nothing_is_left_out(tmp_path, tiny_folder, capsys):
    """Ties, or one response throughout; a template may make it so."""
    rows = [dict(prompt="a", responses=["b", "c"], ranks=[2, 2]), *DATA["listwise"]]
    rows.append(dict(prompt="a", responses=["b", "b", "b"], ranks=[1, 2, 3]))
    cfg = config(tmp_path, tiny_folder, "listwise", rows)
    for found in reward.load_judgements(cfg, common.load_tokenizer(tiny_folder), (), 99):
        assert [judgement.targets for judgement in found] == [r["ranks"] for r in rows[1:-1]]
    told = f"2 of 5 {{}} left out, such as {cfg.data}:1: nothing but ties\n"
    expected = told.format("judgements") + told.format("held-out judgements")
    assert capsys.readouterr().out == expected
    pair = dict(prompt=user("a"), chosen="b", rejected=" b", where="")
    assert reward.read_judgement(chat_tokenizer(), (), 99, pair)
    with pytest.raises(common.Unlearnable, match="same response"):
        reward.read_judgement(chat_tokenizer(TRIMMING), (), 99, pair)

def test_new_head_has_its_spread_and_its_seed(tmp_path):
    save(tmp_path, make_llama(320, hidden_size=1024, num_hidden_layers=1), make_tokenizer())
    heads = []
    for seed in (0, 0, 1):
        cfg = reward_config(tmp_path, tmp_path, tmp_path / "out", seed=seed)
        heads.append(reward.new_reward_model(cfg, CPU)[0].lm.score.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    both = torch.cat([heads[0], heads[2]])
    assert both.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.07)  # 4 standard errors
    assert abs(both.mean().item()) < 4 / 1025**0.5 / 2048**0.5

def alone(lm, judgements):
    """[(score, target), ...] of each judgement: one plain forward for each response."""
    scored = []
    for judgement in judgements:
        logits = [lm(input_ids=torch.tensor([e["ids"]])).logits[0, 0] for e in judgement.examples]
        scored.append(list(zip(logits, judgement.targets)))
    return scored

@pytest.mark.parametrize("loss", DATA)
def test_a_run_against_its_scores_in_plain_transformers(tmp_path, tiny_folder, loss):
    cfg = run(config(tmp_path, tiny_folder, loss, epochs=3.0, micro_tokens=60))
    plain = AutoModelForSequenceClassification.from_pretrained(cfg.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(cfg.out)
    judgements = reward.load_judgements(cfg, tokenizer, (), 99)[0]
    with torch.no_grad():
        items = alone(plain, judgements)
    # Centred: the best response of each training judgement scores 0 on average.
    mean = sum(min(some, key=lambda item: item[1])[0] for some in items) / len(items)
    assert plain.config.reward_mean == pytest.approx(mean.item(), abs=1e-5)
    assert abs(mean) > 1e-3  # or the check above says nothing
    results = eval_of(cfg.out)  # the held-out data are the training data
    ranked = items if loss != "pointwise" else [[(r, -score) for [(r, score)] in items]]
    right = [a > b for some in ranked for a, b in pairs_of(some)]
    assert results["accuracy"] == pytest.approx(sum(right) / len(right))
    assert results["loss"] == pytest.approx(loop_loss(loss, items).item(), rel=1e-4)
    assert results["n"] == len(judgements)

@pytest.mark.parametrize("loss", DATA)
def test_gradient_is_that_of_the_whole_batch(tmp_path, tiny_folder, updates, loss):
    """Against one plain forward a response, and whatever the micro-batches."""
    cfg = config(tmp_path, tiny_folder, loss, seed=5, steps=1)
    scorer, tokenizer, ends = reward.new_reward_model(cfg, CPU)
    judgements = reward.load_judgements(cfg, tokenizer, ends, 99)[0]
    scorer.lm.set_attn_implementation("eager")
    total = loop_loss(loss, alone(scorer.lm, judgements))
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in scorer.parameters()])
    for micro_tokens in (1, 100, 10_000):
        flags = dict(micro_tokens=micro_tokens, overwrite=True)
        reward.main(config(tmp_path, tiny_folder, loss, seed=5, steps=1, **flags))
        atol = 1e-6 * expected.abs().max().item() + 1e-6
        assert torch.allclose(updates.pop()[1], expected, atol=atol) and not updates
        assert rows_of(cfg.out)[0]["loss"] == pytest.approx(total.item(), rel=1e-5)
