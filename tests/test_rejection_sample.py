"""Stage 3': selection against enumerated laws, losses against formulas, the script end to end."""

import io
import json
import math
import shutil
import sys
from collections import Counter
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from conftest import eval_of, letters, rows_of, sft_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import rejection_sample as rs
import sft

torch.set_num_threads(1)


# selection


def test_best_of_n_is_the_first_best_of_each_row():
    rewards = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 5.0], [-1.0, -1.0, -1.0]])
    assert rs.best_of_n(rewards).tolist() == [1, 0, 0]


def test_best_of_n_kl_against_the_exact_law():
    """N draws of M equally likely answers with different rewards: the law of the best one is
    ((i+1)^N - i^N) / M^N, whose KL tends to log N - (N-1)/N from below as M grows."""
    for n in (1, 2, 4, 16):
        M = 4000
        law = np.diff((np.arange(M + 1) / M) ** n)
        law = law[law > 0]
        kl = (law * np.log(law * M)).sum()
        assert kl <= rs.best_of_n_kl(n) + 1e-9
        assert kl == pytest.approx(rs.best_of_n_kl(n), abs=0.02 * n / 16 + 1e-3)


def acceptance_law(rewards, num_samples, beta):
    """Every ordered outcome of RSO's algorithm with its probability, answers visited in random
    order: by enumeration of what each round accepts."""

    def rounds(left, needed):
        if needed == 0:
            return {(): 1.0}
        best = max(rewards[i] for i in left)
        chances = [math.exp((rewards[i] - best) / beta) for i in left]
        law = Counter()
        for taken in product([0, 1], repeat=len(left)):
            chance = math.prod(p if t else 1 - p for p, t in zip(chances, taken))
            if chance == 0:  # the best one is always taken
                continue
            accepted = [i for i, t in zip(left, taken) if t]
            first = list(permutations(accepted, min(needed, len(accepted))))
            for start in first:
                rest = tuple(i for i in left if i not in accepted)
                for end, p in rounds(rest, needed - len(start)).items():
                    law[start + end] += chance * p / len(first)
        return law

    return rounds(tuple(range(len(rewards))), num_samples)


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("rewards, beta", [([0.0, 1.0, 0.4], 0.5), ([2.0, 2.0, -1.0], 1.5)])
def test_the_acceptance_law_for_three_answers(rewards, beta, num_samples):
    law = acceptance_law(rewards, num_samples, beta)
    assert sum(law.values()) == pytest.approx(1)
    rng, draws = np.random.default_rng(0), 20_000
    found = Counter(
        tuple(rs.statistical_rejection(rewards, num_samples, beta, rng)) for _ in range(draws)
    )
    assert set(found) <= {outcome for outcome, p in law.items() if p > 0}
    for outcome, p in law.items():
        assert abs(found[outcome] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 1e-9, outcome


def test_a_small_beta_takes_the_best_and_a_large_one_any():
    rewards, rng = [0.3, 2.0, -1.0, 1.0, 0.5], np.random.default_rng(0)
    assert rs.statistical_rejection(rewards, 3, 1e-6, rng) == [1, 3, 4]
    found = Counter(i for _ in range(4000) for i in rs.statistical_rejection(rewards, 2, 1e9, rng))
    for i in range(5):  # each answer is among 2 of 5 with probability 0.4
        assert abs(found[i] / 4000 - 0.4) < 5 * math.sqrt(0.24 / 4000)
    assert rs.statistical_rejection([-1e6, 0.0, 1e6], 2, 1e-3, rng) == [2, 1]  # no overflow


def test_nothing_is_accepted_twice():
    rng = np.random.default_rng(0)
    for _ in range(200):
        accepted = rs.statistical_rejection(rng.normal(size=12), 9, 0.3, rng)
        assert len(set(accepted)) == 9 and all(type(i) is int for i in accepted)


@pytest.mark.parametrize(
    "rewards, num_samples, beta",
    [([1, 2], 2, 1.0), ([1, 2], 0, 1.0), ([1, 2], 1, 0.0), ([1, math.nan], 1, 1.0)],
)
def test_rejection_without_a_meaning_is_refused(rewards, num_samples, beta):
    with pytest.raises(ValueError):
        rs.statistical_rejection(rewards, num_samples, beta, np.random.default_rng(0))


@pytest.mark.parametrize(
    "rewards, method, pairs",
    [
        ([1, 3, 2, 0], "first_round", [(1, 0), (2, 3)]),  # the docstring's
        ([1, 3, 2, 0], "tournament", [(1, 0), (2, 3), (1, 2)]),
        ([1, 3, 2], "first_round", [(1, 0)]),
        ([1, 3, 4], "tournament", [(1, 0), (2, 1)]),  # the third one enters the second round
        ([1, 1, 0, 5], "first_round", [(3, 2)]),  # equal rewards make no pair
        ([2, 2, 1, 0], "tournament", [(2, 3), (0, 2)]),  # ... but somebody goes on
        ([7], "tournament", []),
        ([], "first_round", []),
    ],
)
def test_rank_pairs(rewards, method, pairs):
    assert rs.rank_pairs(rewards, method) == pairs


def test_a_tournament_of_n_has_n_minus_one_pairs_and_the_best_never_loses():
    rng = np.random.default_rng(0)
    for n in range(2, 20):
        rewards = rng.normal(size=n)
        pairs = rs.rank_pairs(rewards, "tournament")
        assert len(pairs) == n - 1 and all(rewards[a] > rewards[b] for a, b in pairs)
        assert sorted(loser for _, loser in pairs) == sorted(set(range(n)) - {rewards.argmax()})
    with pytest.raises(ValueError, match="first_round"):
        rs.rank_pairs([1, 2], "last_round")


# losses


def test_losses_against_their_formulas():
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(7, generator=generator, dtype=torch.float64) * 5 for _ in range(4)]
    for beta in (0.05, 0.5, 3.0):
        expected = dict(sigmoid=0.0, hinge=0.0, ipo=0.0)
        for pc, pr, rc, rr in zip(*(x.tolist() for x in numbers)):
            better, worse = math.exp(pc - rc), math.exp(pr - rr)  # pi / pi_ref
            chance = better**beta / (better**beta + worse**beta)  # Bradley-Terry of DPO's rewards
            h = math.log(better / worse)
            expected["sigmoid"] -= math.log(chance) / 7
            expected["hinge"] += max(0.0, 1 - beta * h) / 7
            expected["ipo"] += (h - 0.5 / beta) ** 2 / 7
        for loss, value in expected.items():
            assert rs.dpo_loss(*numbers, beta, loss).item() == pytest.approx(value, rel=1e-9)
    assert rs.dpo_loss(*numbers).item() == rs.dpo_loss(*numbers, 0.1, "sigmoid").item()
    with pytest.raises(ValueError, match="sigmoid"):
        rs.dpo_loss(*numbers, loss="softmax")


def test_the_gradient_at_the_start_is_half_beta_times_the_difference_of_log_prob_gradients(
    tiny_llama,
):
    model, beta = tiny_llama(40), 0.3
    pairs = [
        [common.join([5, 6], [7, 8, 2]), common.join([5, 6], [9, 2])],
        [common.join([10], [11, 2]), common.join([10], [12, 13, 14])],
    ]

    def summed(ids, mask):  # plain log-softmax, one sequence at a time
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(log_p[t - 1, ids[t]] for t in range(len(ids)) if mask[t])

    difference = sum(summed(*chosen) - summed(*rejected) for chosen, rejected in pairs) / 2
    expected = torch.autograd.grad(-beta / 2 * difference, list(model.parameters()))
    chosen, rejected = rs.pair_logprobs(model, pairs, 1.0)
    assert chosen[1].item() == pytest.approx(summed(*pairs[1][0]).item(), rel=1e-5)
    rs.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta).backward()
    for parameter, gradient in zip(model.parameters(), expected):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_a_step_does_not_depend_on_the_micro_batches(tiny_llama, micro_tokens):
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(6):
        lengths = torch.randint(1, 9, (3,), generator=generator).tolist()
        prompt, *both = [
            torch.randint(3, 40, (n,), generator=generator).tolist() for n in lengths
        ]
        pairs.append([common.join(prompt, response) for response in both])
    model, ref = tiny_llama(40), tiny_llama(40, seed=1)
    cfg = rs.Config(micro_tokens=micro_tokens, beta=0.2, max_grad_norm=1e9)
    ref_logprobs = rs.all_logprobs(ref, pairs, cfg)
    with torch.no_grad():
        logprobs = [x for x in rs.pair_logprobs(model, pairs, 1.0)]
        refs = [torch.tensor(ref_logprobs[key]) for key in ("chosen", "rejected")]
        loss = rs.dpo_loss(*logprobs, *refs, 0.2).item()
        up, down = logprobs[0] - refs[0], logprobs[1] - refs[1]
    stats = rs.preference_step(
        model, torch.optim.SGD(model.parameters(), lr=0.0), pairs, list(range(6)), ref_logprobs, cfg
    )
    expected = dict(loss=loss, margin=0.2 * (up - down).mean().item(), chosen_logratio=up.mean())
    expected |= dict(rejected_logratio=down.mean(), accuracy=(up > down).float().mean())
    for name, value in expected.items():
        assert stats[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


# the script


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory, data, tiny_folder):
    """A tiny model that has learned to end its answers, most of the time."""
    out = tmp_path_factory.mktemp("policy") / "sft"
    sft.main(sft_config(data, tiny_folder, out, steps=12, epochs=10.0))
    return out


def config(files, folder, out, **flags):
    settings = dict(
        policy=str(folder), reward_fn=f"{files / 'rule.py'}:score",
        data=str(files / "prompts.jsonl"), eval_data=str(files / "eval_prompts.jsonl"),
        n=6, num_samples=4, max_new_tokens=12, batch_size=2, steps=4, epochs=4.0, lr=1e-3,
        warmup=0, device="cpu", out=str(out),
    )  # fmt: skip
    return rs.Config(**(settings | flags))


@pytest.fixture(scope="module")
def best_of_n_run(tmp_path_factory, data, policy_folder):
    cfg = config(data, policy_folder, tmp_path_factory.mktemp("rs") / "best_of_n")
    rs.main(cfg)
    return cfg


def judged(cfg, name="candidates"):
    """Each prompt's answers as (text, reward by the rule less the penalty, ended), from the ids."""
    tokenizer = AutoTokenizer.from_pretrained(cfg.policy)
    found = []
    for row in rows_of(cfg.out, name):
        answers = []
        for ids, score, ended in zip(row["responses"], row["scores"], row["ended"]):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert score == letters(text) and ended == (ids[-1] == tokenizer.eos_token_id)
            assert ended or len(ids) == cfg.max_new_tokens
            answers.append((text, score - (not ended), ended))
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert len(answers) == cfg.n
        found.append((row["prompt"], answers))
    return found


def test_best_of_n_files(data, best_of_n_run):
    cfg = best_of_n_run
    candidates = judged(cfg)
    assert [prompt for prompt, _ in candidates] == [
        row["prompt"] for row in common.read_jsonl(cfg.data)
    ]
    flat = [ended for _, answers in candidates for *_, ended in answers]
    assert 0 < sum(flat) < len(flat)  # both kinds occur, or the test would be of no use
    best, pairs = [], []
    for prompt, answers in candidates:
        answers = [a for a in answers if a[0].strip()]
        whole = [a for a in answers if a[2]]
        if not whole:
            continue
        winner = max(whole, key=lambda a: a[1])
        best.append(dict(prompt=prompt, completion=winner[0]))
        worst = min(answers, key=lambda a: a[1])
        if winner[1] > worst[1]:
            pairs.append(dict(prompt=prompt, chosen=winner[0], rejected=worst[0]))
    assert rows_of(cfg.out, "sft") == best and rows_of(cfg.out, "dpo") == pairs and pairs
    rows = rows_of(cfg.out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the policy is the reference
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    names = {"loss", "accuracy", "margin", "chosen_logratio", "rejected_logratio", "grad_norm"}
    assert all(names | {"lr", "seconds"} <= set(row) for row in rows)


def test_best_of_n_in_eval_and_samples(best_of_n_run):
    cfg = best_of_n_run
    results, samples = eval_of(cfg.out), rows_of(cfg.out, "samples")
    held_out = judged(cfg, "eval_candidates")
    assert len(held_out) == len(samples) == results["n"] == 3
    best = lambda answers: max([a for a in answers if a[2]] or answers, key=lambda a: a[1])  # noqa: E731
    for (prompt, answers), sample in zip(held_out, samples):
        text, reward, ended = best(answers)
        assert sample["prompt"] == prompt and sample["best_of_n"] == text
        assert sample["score_best_of_n"] == reward + (not ended)
    assert set(samples[0]) == {
        "prompt", "before", "best_of_n", "after", "score_before", "score_best_of_n", "score_after",
    }  # fmt: skip
    for name in ("before", "best_of_n", "after"):
        mean = sum(sample[f"score_{name}"] for sample in samples) / 3
        assert results[f"score_{name}"] == pytest.approx(mean, rel=1e-5)
    assert results["kl"] != 0 and results["kl_best_of_n"] == math.log(6) - 5 / 6

    assert [point["n"] for point in results["best_of_n"]] == [1, 2, 4, 6]
    for point in results["best_of_n"]:
        n, picked = point["n"], []
        for _, answers in held_out:
            groups = [answers[i : i + n] for i in range(0, 6 // n * n, n)]
            for group in groups:
                _, reward, ended = best(group)
                picked.append(reward + (not ended))
        assert point["score"] == pytest.approx(sum(picked) / len(picked), rel=1e-5)
        assert point["kl"] == pytest.approx(math.log(n) - (n - 1) / n)


def test_sft_trains_on_what_best_of_n_wrote(tmp_path, data, best_of_n_run):
    path = f"{best_of_n_run.out}/sft.jsonl"
    sft.main(sft_config(data, best_of_n_run.policy, tmp_path / "sft", data=path, eval_data=path))
    AutoModelForCausalLM.from_pretrained(tmp_path / "sft")


@pytest.mark.parametrize("rank", ["first_round", "tournament"])
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "none"])
def test_rso_outputs(tmp_path, data, policy_folder, rank, loss):
    cfg = config(data, policy_folder, tmp_path / "rso", method="rso", rank=rank, loss=loss)
    rs.main(cfg)
    rewards = {(p, text): (r, ended) for p, answers in judged(cfg) for text, r, ended in answers}
    pairs = rows_of(cfg.out, "dpo")
    for pair in pairs:
        assert set(pair) == {"prompt", "chosen", "rejected"}
        winner = rewards[pair["prompt"], pair["chosen"]]
        assert winner[0] > rewards[pair["prompt"], pair["rejected"]][0] and winner[1]
    most = Counter(pair["prompt"] for pair in pairs).most_common(1)[0][1]
    assert most <= (2 if rank == "first_round" else 3)
    assert not (tmp_path / "rso/sft.jsonl").exists()
    names = {path.name for path in (tmp_path / "rso").iterdir()}
    assert ("model.safetensors" in names) == (loss != "none")
    assert ("score_after" in eval_of(cfg.out)) == (loss != "none")
    if loss != "none":
        moved = AutoModelForCausalLM.from_pretrained(cfg.out).state_dict()
        start = AutoModelForCausalLM.from_pretrained(cfg.policy).state_dict()
        assert any(not torch.equal(moved[key], start[key]) for key in start)


def test_human_pairs_need_no_sampling_and_no_reward_model(tmp_path, data, policy_folder):
    path = str(data / "pairs.jsonl")
    cfg = config(
        data, policy_folder, tmp_path / "dpo", pairs=path, eval_data=path, reward_fn="",
        steps=12, batch_size=12, epochs=12.0, lr=1e-2,
    )  # fmt: skip
    rs.main(cfg)
    results, rows = eval_of(cfg.out), rows_of(cfg.out)
    assert results["accuracy"] == 1.0 and "score_after" not in results  # it fits the 12 pairs
    assert rows[-1]["loss"] < 0.5 < rows[0]["loss"] and rows[-1]["accuracy"] == 1
    names = {path.name for path in (tmp_path / "dpo").iterdir()}
    assert not names & {"candidates.jsonl", "eval_candidates.jsonl", "sft.jsonl", "dpo.jsonl"}
    assert {"prompt", "before", "after"} == set(rows_of(cfg.out, "samples")[0])


def test_answers_without_text_and_pairs_of_the_same_text_are_left_out(
    tmp_path, data, policy_folder
):
    """sft.py and --pairs refuse an empty response, and "sea", ended or cut, is no preference."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    sea, boat = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("sea", "boat"))
    a = tokenizer("a")["input_ids"]
    cfg = config(data, policy_folder, tmp_path / "out", n=3)
    run = common.Run(cfg)
    run.begin()

    def candidate(*answers):
        responses = [ids + [2] * ended for ids, ended, _ in answers]
        ended, scores = [bool(e) for _, e, _ in answers], [s for *_, s in answers]
        return dict(prompt="a", prompt_ids=a, responses=responses, ended=ended, rewards=scores)

    candidates = [
        candidate(([], 1, 5.0), (sea, 1, 3.0), (boat, 1, 1.0), ([], 1, 0.0)),  # not the empty ones
        candidate((sea, 1, 3.0), (sea, 0, 2.0), (sea, 1, 3.0)),  # the same text wins and loses
        candidate((sea, 1, 3.0), (boat, 0, 9.0), (boat, 1, 1.0)),  # cut, so not the best
        candidate((sea, 0, 3.0), (boat, 0, 9.0), (boat, 0, 1.0)),  # none ended
    ]
    pairs = rs.select(run, candidates, tokenizer, cfg)
    sft_rows = rows_of(cfg.out, "sft")
    assert [row["completion"] for row in sft_rows] == ["sea", "sea", "sea"]
    assert rows_of(cfg.out, "dpo") == [dict(prompt="a", chosen="sea", rejected="boat")] * 2
    assert pairs == [[common.join(a, sea + [2]), common.join(a, boat + [2])]] * 2
    # The file, read back as anybody's pairs, is the same: here the text tokenises to the same ids.
    rows = common.read_jsonl(tmp_path / "out/dpo.jsonl")
    assert rs.encode_pairs(rows, tokenizer, 99) == pairs


def test_candidates_of_more_prompts_than_there_are_now_are_refused(
    tmp_path, data, best_of_n_run
):
    folder, prompts = tmp_path / "out", tmp_path / "prompts.jsonl"
    shutil.copytree(best_of_n_run.out, folder)
    cfg = replace(best_of_n_run, out=str(folder), resume=True)
    (folder / "eval.json").unlink()
    settings = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(settings | dict(data=str(prompts))))
    prompts.write_text("".join((data / "prompts.jsonl").read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(common.UserError, match="candidates.jsonl"):
        rs.main(replace(cfg, data=str(prompts)))


@pytest.mark.parametrize("line", [b"garbage", b"", b"\xff\xfe", b"[1]", b'{"a": 1}'])
def test_candidates_that_this_run_did_not_write_are_refused(tmp_path, best_of_n_run, line):
    folder = tmp_path / "out"
    shutil.copytree(best_of_n_run.out, folder)
    (folder / "eval.json").unlink()
    path = folder / "candidates.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(common.UserError, match="candidates.jsonl: not what this run wrote"):
        rs.main(replace(best_of_n_run, out=str(folder), resume=True))


def test_overwrite_never_deletes_what_the_run_reads(tmp_path, best_of_n_run):
    folder = tmp_path / "out"
    shutil.copytree(best_of_n_run.out, folder)
    before = sorted(path.name for path in folder.iterdir())
    cfg = replace(best_of_n_run, out=str(folder), overwrite=True)
    for flags in (dict(pairs=str(folder / "dpo.jsonl")), dict(policy=str(folder))):
        with pytest.raises(common.UserError, match="--overwrite"):
            rs.main(replace(cfg, **flags))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_chat_prompts_give_chat_files(tmp_path, data, policy_folder):
    flags = dict(data=str(data / "chat_prompts.jsonl"), eval_data=str(data / "chat_prompts.jsonl"))
    cfg = config(data, policy_folder, tmp_path / "chat", loss="none", **flags)
    rs.main(cfg)
    row = rows_of(cfg.out, "sft")[0]
    assert row["prompt"][0]["role"] == "user" and row["completion"][0]["role"] == "assistant"
    tokenizer = AutoTokenizer.from_pretrained(cfg.policy)
    ids, mask = common.demonstration(tokenizer, row | dict(where="sft.jsonl:1"))
    assert ids[-1] == tokenizer.eos_token_id and any(mask)
    pair = rows_of(cfg.out, "dpo")[0]
    assert rs.encode_pairs([pair | dict(where="dpo.jsonl:1")], tokenizer, 99)


def test_equal_answers_are_scored_once_and_alike(tiny_llama):
    calls = []

    def score(prompts, prompt_ids, responses):
        calls.append(len(responses))
        assert len({(p, tuple(r)) for p, r in zip(prompts, responses)}) == len(responses)
        return torch.arange(len(responses)).float()

    model, prompts = tiny_llama(8), [dict(prompt="a", ids=[3]), dict(prompt="b", ids=[3])]
    cfg = rs.Config(n=40, max_new_tokens=1)
    generator = torch.Generator().manual_seed(0)
    found = rs.sample_and_score(model, score, prompts, [2], generator, cfg)
    assert calls[0] <= 16 and all(len(f["responses"]) == len(f["scores"]) == 40 for f in found)
    for candidate in found:
        seen = {}
        for response, value in zip(candidate["responses"], candidate["scores"]):
            assert seen.setdefault(tuple(response), value) == value
    assert set(found[0]["scores"]).isdisjoint(found[1]["scores"])  # another prompt, another score


def test_interrupted_sampling_goes_on_where_it_stopped(tmp_path, data, best_of_n_run, monkeypatch):
    """Killed in the third part, a half-written line behind: on --resume nothing that is on disk is
    sampled again, and the files are the same, byte for byte."""
    whole = replace(best_of_n_run, slots=3, out=str(tmp_path / "whole"))  # 2 prompts a part
    rs.main(whole)
    parts = replace(whole, out=str(tmp_path / "parts"))
    original, sampled = rs.sample_and_score, []

    def counted(policy, score, prompts, eos, generator, cfg, stop=None):
        if len(sampled) == stop:
            raise RuntimeError("power cut")
        sampled.append(len(prompts))
        return original(policy, score, prompts, eos, generator, cfg)

    with monkeypatch.context() as patch:
        patch.setattr(rs, "sample_and_score", lambda *a: counted(*a, stop=2))
        with pytest.raises(RuntimeError):
            rs.main(parts)
    path = tmp_path / "parts/candidates.jsonl"
    assert len(path.read_bytes().splitlines()) == 4
    fifth = (tmp_path / "whole/candidates.jsonl").read_bytes().splitlines(keepends=True)[4]
    path.write_bytes(path.read_bytes() + fifth + b'{"pro')
    sampled.clear()
    monkeypatch.setattr(rs, "sample_and_score", counted)
    with pytest.raises(common.UserError, match="--resume"):
        rs.main(parts)
    rs.main(replace(parts, resume=True))
    assert sampled == [2, 2, 1]  # the last two prompts, then the three held-out ones
    for name in ("candidates", "eval_candidates", "sft", "dpo", "samples"):
        mine, theirs = (tmp_path / run / f"{name}.jsonl" for run in ("parts", "whole"))
        assert mine.read_bytes() == theirs.read_bytes(), name
    assert eval_of(parts.out) == eval_of(whole.out)


def test_answers_to_other_prompts_are_not_taken_over(tmp_path, data, policy_folder, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes((data / "prompts.jsonl").read_bytes())
    cfg = config(data, policy_folder, tmp_path / "out", data=str(prompts))

    def power_cut(*args):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(rs, "select", power_cut)
        with pytest.raises(RuntimeError):
            rs.main(cfg)
    prompts.write_text(prompts.read_text().replace("capital", "country"))
    with pytest.raises(common.UserError, match="candidates.jsonl"):
        rs.main(replace(cfg, resume=True))


# one prompt on the terminal


def shown(out):
    first, *lines = out.rstrip("\n").split("\n")
    found = []
    for line in lines:
        if line.startswith(" " * 10):  # a line feed in the answer above
            found[-1][1] += line
        else:
            found.append([float(line.split()[0]), line])
    return found, first


def test_prompt_prints_the_answers_best_first_and_writes_nothing(
    tmp_path, data, policy_folder, capsys, monkeypatch
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    cfg = config(data, policy_folder, tmp_path / "out", prompt="tell me a story")
    rs.main(cfg)
    found, first = shown(capsys.readouterr().out)
    assert first == "tell me a story" and len(found) == 6
    scores = [score for score, _ in found]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    for score, line in found:
        assert letters(line) == score
    assert not list(tmp_path.iterdir())


def test_prompts_from_a_pipe(tmp_path, data, policy_folder, capsys, monkeypatch):
    for chat in (False, True):
        monkeypatch.setattr(sys, "stdin", io.StringIO("the sea\n\nHow?\n"))
        rs.main(config(data, policy_folder, tmp_path / "out", prompt="-", n=2, chat=chat))
        lines = capsys.readouterr().out.rstrip("\n").split("\n")
        assert [line for line in lines if not line.startswith(" ")] == ["the sea", "How?"]


def test_a_whole_run_by_its_own_folder_is_json(best_of_n_run):
    settings = json.loads((common.Path(best_of_n_run.out) / "run.json").read_text())
    assert settings["n"] == 6 and settings["method"] == "best_of_n"
