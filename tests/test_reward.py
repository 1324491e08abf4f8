"""Stage 2: the three losses against plain loops, bad data, the model in plain transformers."""

import json
import math
from itertools import combinations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import reward

torch.set_num_threads(1)

PAIRS = [
    dict(prompt="What is the capital?", chosen="The capital is Paris.", rejected="a boat"),
    dict(prompt="Please tell me a story.", chosen="Once there was a sea.", rejected="I do not."),
    dict(prompt="How do I boil an egg?", chosen="Put it into hot water and wait.", rejected="No"),
    dict(prompt="你好", chosen="今天天气", rejected="egg egg egg egg egg egg egg"),
]
POINTS = [
    dict(prompt="What is the capital?", response="The capital is Paris.", score=2.5),
    dict(prompt="Please tell me a story.", response="No", score=-1),
    dict(prompt="How do I boil an egg?", response="Put it into hot water.", score=0.5),
]
LISTS = [
    dict(prompt="the sea", responses=["a boat", "the water of the sea", "egg"], ranks=[2, 1, 3]),
    dict(prompt="an egg", responses=["hot", "hot water", "wait", "Paris"], ranks=[1, 2, 2, 3]),
    dict(prompt="weather", responses=["今天天气怎么样", "story"], ranks=[2, 1]),
]
DATA = dict(pairwise=PAIRS, pointwise=POINTS, listwise=LISTS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(tmp_path, folder, loss, **flags):
    data = write(tmp_path / f"{loss}.jsonl", DATA[loss])
    settings = dict(
        model=str(folder), loss=loss, data=data, eval_data=data, out=str(tmp_path / "out"),
        device="cpu", batch_size=len(DATA[loss]), steps=1, warmup=0,
    )  # fmt: skip
    return reward.Config(**(settings | flags))


# the losses, against loops


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def loop_listwise(rewards, ranks, mask):
    """Over all pairs: the mean of each list's pairs, then the mean over lists that have one."""
    lists = []
    for r, rank, real in zip(rewards, ranks, mask):
        items = [(a, b) for a, b, m in zip(r, rank, real) if m]
        pairs = []
        for (r_a, rank_a), (r_b, rank_b) in combinations(items, 2):
            if rank_a < rank_b:
                pairs.append(-log_sigmoid(r_a - r_b))
            if rank_b < rank_a:
                pairs.append(-log_sigmoid(r_b - r_a))
        if pairs:
            lists.append(sum(pairs) / len(pairs))
    return sum(lists) / max(1, len(lists))


def random_lists(seed, B=6, K=5):
    generator = torch.Generator().manual_seed(seed)
    rewards = 3 * torch.randn(B, K, generator=generator, dtype=torch.float64)
    ranks = torch.randint(1, 4, (B, K), generator=generator)  # 5 responses, 3 ranks: always ties
    lengths = torch.randint(2, K + 1, (B,), generator=generator)
    mask = (torch.arange(K) < lengths[:, None]).double()
    return rewards, ranks, mask


def test_pointwise_loss_is_the_mean_squared_error():
    rewards = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    scores = torch.tensor([1.0, -2.5, -1.0], dtype=torch.float64)
    assert reward.pointwise_loss(rewards, scores).item() == pytest.approx((0.25 + 0.25 + 16) / 3)


def test_pairwise_loss_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = 4 * torch.randn(2, 9, generator=generator, dtype=torch.float64)
    loop = [-log_sigmoid(c - r) for c, r in zip(chosen.tolist(), rejected.tolist())]
    assert reward.pairwise_loss(chosen, rejected).item() == pytest.approx(sum(loop) / 9, rel=1e-12)
    far = torch.tensor([-500.0]), torch.tensor([500.0])  # exp would overflow
    assert reward.pairwise_loss(*far).item() == pytest.approx(1000)


@pytest.mark.parametrize("seed", range(5))
def test_listwise_loss_against_loops(seed):
    rewards, ranks, mask = random_lists(seed)
    expected = loop_listwise(rewards.tolist(), ranks.tolist(), mask.tolist())
    assert reward.listwise_loss(rewards, ranks, mask).item() == pytest.approx(expected, rel=1e-12)
    everything = loop_listwise(rewards.tolist(), ranks.tolist(), torch.ones(6, 5).tolist())
    assert reward.listwise_loss(rewards, ranks).item() == pytest.approx(everything, rel=1e-12)


def test_listwise_loss_leaves_out_lists_without_a_pair():
    rewards = torch.tensor([[1.0, 0.0, 5.0], [3.0, 9.0, 4.0], [2.0, 7.0, 0.0]])
    ranks = torch.tensor([[2, 1, 1], [1, 1, 1], [1, 2, 3]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    # Only the first list has a pair: 0.0 should beat 1.0.
    loss = reward.listwise_loss(rewards, ranks, mask)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(1.0)))
    assert reward.listwise_loss(rewards[1:2], ranks[1:2]).item() == 0.0


def test_listwise_of_two_is_pairwise():
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    ranks = torch.tensor([[1, 2]] * 7)
    pairwise = reward.pairwise_loss(rewards[:, 0], rewards[:, 1]).item()
    assert reward.listwise_loss(rewards, ranks).item() == pytest.approx(pairwise, rel=1e-12)
    swapped = reward.listwise_loss(rewards.flip(1), ranks.flip(1)).item()
    assert swapped == pytest.approx(pairwise, rel=1e-12)


def test_gradients_against_finite_differences():
    rewards, ranks, mask = random_lists(1)
    a, b = rewards[:, 0].clone().requires_grad_(), rewards[:, 1].clone().requires_grad_()
    rewards.requires_grad_()
    assert torch.autograd.gradcheck(reward.pointwise_loss, (a, b.detach()))
    assert torch.autograd.gradcheck(reward.pairwise_loss, (a, b))
    assert torch.autograd.gradcheck(lambda r: reward.listwise_loss(r, ranks, mask), (rewards,))
    reward.listwise_loss(rewards, ranks, mask).backward()
    assert (rewards.grad[mask == 0] == 0).all()  # nothing learns from padding


# accuracy and its interval


def test_ordered_right():
    assert reward.ordered_right([(2.0, 1), (1.0, 2)]) == (1, 1)
    assert reward.ordered_right([(1.0, 1), (2.0, 2)]) == (0, 1)
    assert reward.ordered_right([(1.0, 1), (1.0, 2)]) == (0.5, 1)  # equal rewards: half
    assert reward.ordered_right([(1.0, 2), (5.0, 2)]) == (0, 0)  # a tie of the judge is no pair
    # Ranks 1, 2, 2, 3: five pairs; 3.0 beats all, of the rest 1.0 > 0.0 is right, 2.0 too.
    assert reward.ordered_right([(3.0, 1), (1.0, 2), (2.0, 2), (0.0, 3)]) == (5, 5)
    assert reward.ordered_right([(3.0, 3), (1.0, 2), (2.0, 2), (0.0, 1)]) == (0, 5)


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    known = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]
    known += [(1, 29, 0.0061, 0.1718)]
    for hits, n, low, high in known:
        assert reward.wilson_interval(hits / n, n) == pytest.approx((low, high), abs=6e-5)


def test_evaluate_against_scores_one_by_one(tmp_path, tiny_folder, capsys):
    tokenizer = common.load_tokenizer(str(tiny_folder))
    model = reward.new_reward_model(str(tiny_folder), tokenizer, "cpu", seed=1)
    for loss, rows in DATA.items():
        cfg = config(tmp_path, tiny_folder, loss)
        judgements = reward.load_judgements(cfg, tokenizer, cfg.max_length)[1]
        results = reward.evaluate(model, judgements, micro_tokens=64)
        items = [alone(model, j) for j in judgements]
        if loss == "pointwise":
            points = [(r[0], t[0]) for r, t in zip(items, [j.targets for j in judgements])]
            pairs = list(combinations(points, 2))
            right = sum((r - q) * (s - t) > 0 for (r, s), (q, t) in pairs)
            total = len(pairs)
            expected = sum((r - s) ** 2 for r, s in points) / len(points)
        else:
            right = total = 0
            for scores, judgement in zip(items, judgements):
                for (r, a), (q, b) in combinations(zip(scores, judgement.targets), 2):
                    total += a != b
                    right += a != b and (r - q) * (b - a) > 0
            targets = [j.targets for j in judgements]
            expected = loop_listwise(items, targets, [[1] * len(t) for t in targets])
        assert results["accuracy"] == pytest.approx(right / total), loss
        assert results["loss"] == pytest.approx(expected, rel=1e-4), loss
        assert results["n"] == len(rows)


def alone(model, judgement):
    """Scores of a judgement's responses, one forward each through the model's own pooling."""
    scores = []
    with torch.no_grad():
        for ids, _ in judgement.examples:
            scores.append(model(input_ids=torch.tensor([ids])).logits.item())
    return scores


# bad data


BAD_ROWS = [
    ("pointwise", dict(prompt="a", response="b", score=float("nan")), '"score"'),
    ("pointwise", dict(prompt="a", response="b", score=float("inf")), '"score"'),
    ("pointwise", dict(prompt="a", response="b", score="3"), '"score"'),
    ("pointwise", dict(prompt="a", response="b", score=True), '"score"'),
    ("pointwise", dict(prompt="a", response="b"), '"score"'),
    ("pointwise", dict(prompt="a", response="", score=1.0), '"response"'),
    ("pointwise", dict(prompt="a", score=1.0), '"response"'),
    ("pointwise", dict(response="b", score=1.0), '"prompt"'),
    ("pairwise", dict(prompt="a", chosen="b"), '"rejected"'),
    ("pairwise", dict(prompt="a", chosen="b", rejected=" "), '"rejected"'),
    ("pairwise", dict(prompt="a", chosen=3, rejected="c"), '"chosen"'),
    ("pairwise", dict(prompt=None, chosen="b", rejected="c"), '"prompt"'),
    ("pairwise", dict(chosen="b", rejected="c"), '"prompt"'),
    ("pairwise", dict(prompt="a", response="b", score=1.0), "--loss"),
    ("listwise", dict(prompt="a", responses=["b", "c"], ranks=[1]), '"ranks"'),
    ("listwise", dict(prompt="a", responses=["b", "c"], ranks=[1, 2, 3]), '"ranks"'),
    ("listwise", dict(prompt="a", responses=["b", "c"], ranks=[0, 1]), '"ranks"'),
    ("listwise", dict(prompt="a", responses=["b", "c"], ranks=[1, 2.5]), '"ranks"'),
    ("listwise", dict(prompt="a", responses=["b", "c"], ranks="12"), '"ranks"'),
    ("listwise", dict(prompt="a", responses=["b", "c"]), '"ranks"'),
    ("listwise", dict(prompt="a", responses=["b"], ranks=[1]), '"responses"'),
    ("listwise", dict(prompt="a", responses="bc", ranks=[1, 2]), '"responses"'),
    ("listwise", dict(prompt="a", responses=["b", ""], ranks=[1, 2]), '"response'),
    ("listwise", dict(prompt="a", responses=["b", 4], ranks=[1, 2]), '"response'),
    ("listwise", dict(responses=["b", "c"], ranks=[1, 2]), '"prompt"'),
]


@pytest.mark.parametrize("loss, row, names", BAD_ROWS)
def test_a_bad_row_is_told_with_its_line(tmp_path, tiny_folder, loss, row, names):
    cfg = config(tmp_path, tiny_folder, loss)
    write(tmp_path / f"{loss}.jsonl", DATA[loss][:1] + [row])
    tokenizer = common.load_tokenizer(str(tiny_folder))
    with pytest.raises(common.UserError) as error:
        reward.load_judgements(cfg, tokenizer, cfg.max_length)
    message = str(error.value)
    assert message.startswith(f"{cfg.data}:2: ") and names in message and "\n" not in message


# the model


def test_new_head_has_its_spread_and_its_seed(tmp_path, tiny_tokenizer, tiny_llama):
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer), hidden_size=1024, num_hidden_layers=1).save_pretrained(tmp_path)
    heads = []
    for seed in (0, 0, 1):
        model = reward.new_reward_model(str(tmp_path), tokenizer, "cpu", seed)
        heads.append(model.score.weight.detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    both = torch.cat([heads[0], heads[2]])
    assert both.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.07)  # 4 standard errors
    assert abs(both.mean().item()) < 4 / 1025**0.5 / 2048**0.5


@pytest.fixture(scope="module")
def pad_is_eos(tmp_path_factory, tiny_tokenizer, tiny_llama):
    """Like many checkpoints: the pad token is EOS."""
    folder = tmp_path_factory.mktemp("pad_is_eos")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tiny_llama(len(tokenizer), pad_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loss", DATA)
def test_saved_model_scores_alike_in_plain_transformers(tmp_path, pad_is_eos, loss):
    cfg = config(tmp_path, pad_is_eos, loss, steps=3, lr=1e-2, micro_tokens=60)
    reward.main(cfg)
    plain = AutoModelForSequenceClassification.from_pretrained(cfg.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(cfg.out)
    assert plain.config.num_labels == 1
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert plain.config.pad_token_id == tokenizer.pad_token_id

    judgements = reward.load_judgements(cfg, tokenizer, cfg.max_length)[0]
    examples = [example for judgement in judgements for example in judgement.examples]
    ours = common.load_reward(cfg.out, "cpu")
    with torch.no_grad():
        batch = common.collate(examples, range(len(examples)), "cpu")
        scores = common.sequence_scores(ours, batch) + ours.config.reward_mean
        padded = tokenizer.pad(dict(input_ids=[ids for ids, _ in examples]), return_tensors="pt")
        logits = plain(**padded).logits.squeeze(1)
        hidden = plain.model(**padded).last_hidden_state
    assert torch.allclose(scores, logits, atol=1e-5)
    for row, (ids, _) in enumerate(examples):  # read at EOS
        assert ids[-1] == tokenizer.eos_token_id
        at_eos = plain.score(hidden[row, len(ids) - 1]).item()
        assert logits[row].item() == pytest.approx(at_eos, abs=1e-5)

    # Centred: the best response of each training judgement scores 0 on average.
    best = []
    for judgement in judgements:
        scores = alone(plain, judgement)
        top = judgement.targets.index(min(judgement.targets))
        best.append(scores[0] if loss == "pointwise" else scores[top])
    assert ours.config.reward_mean == pytest.approx(sum(best) / len(best), abs=1e-5)
    assert abs(ours.config.reward_mean) > 1e-3  # or the check above says nothing


def gradients_of_main(monkeypatch, cfg):
    """Run reward.main and return the gradient of each optimiser step, before it is clipped."""
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def keep(parameters, *args, **kwargs):
        parameters = list(parameters)
        seen.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return clip(parameters, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        reward.main(cfg)
    return seen


@pytest.mark.parametrize("loss", DATA)
def test_gradient_is_that_of_the_whole_batch(tmp_path, tiny_folder, monkeypatch, loss):
    """Against one plain forward a response, and whatever the micro-batches."""
    tokenizer = common.load_tokenizer(str(tiny_folder))
    model = reward.new_reward_model(str(tiny_folder), tokenizer, "cpu", seed=5)
    cfg = config(tmp_path, tiny_folder, loss)
    total = 0
    judgements = reward.load_judgements(cfg, tokenizer, cfg.max_length)[0]
    for judgement in judgements:
        r = [model(input_ids=torch.tensor([ids])).logits[0, 0] for ids, _ in judgement.examples]
        t = judgement.targets
        if loss == "pointwise":
            part = (r[0] - t[0]) ** 2
        else:
            pairs = [(a, b) for a in range(len(t)) for b in range(len(t)) if t[a] < t[b]]
            part = sum(torch.log1p((r[b] - r[a]).exp()) for a, b in pairs) / len(pairs)
        total = total + part / len(judgements)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])

    for micro_tokens in (1, 100, 10_000):
        cfg = config(
            tmp_path, tiny_folder, loss, micro_tokens=micro_tokens, seed=5, overwrite=True
        )
        (gradient,) = gradients_of_main(monkeypatch, cfg)
        assert torch.allclose(gradient, expected, atol=1e-6 * expected.abs().max().item() + 1e-6)
        (row,) = common.read_jsonl(f"{cfg.out}/metrics.jsonl")
        assert row["loss"] == pytest.approx(total.item(), rel=1e-5)
