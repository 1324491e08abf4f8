"""Stage 3': selection against enumerated laws, losses against formulas, the script end to end."""

import io
import math
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import eval_of, letters, plain_logprobs, rejection_sample_config, rows_of, run
from conftest import sft_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import rejection_sample as rs

def test_best_of_n_and_its_kl_against_the_exact_law():
    """N draws of M equally likely answers with different rewards: the law of the best one is
    ((i+1)^N - i^N) / M^N, whose KL tends to log N - (N-1)/N from below as M grows."""
    assert rs.best_of_n(torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 5.0]])).tolist() == [1, 0]
    for n in (1, 2, 4, 16):
        law = np.diff((np.arange(4001) / 4000) ** n)
        law = law[law > 0]
        kl = (law * np.log(law * 4000)).sum()
        assert kl <= rs.best_of_n_kl(n) + 1e-9
        assert kl == pytest.approx(rs.best_of_n_kl(n), abs=0.02 * n / 16 + 1e-3)

def acceptance_law(rewards, left, needed, beta):
    """Every ordered outcome of RSO's algorithm with its probability, answers visited in random
    order: by enumeration of what each round accepts of those `left`."""
    if needed == 0:
        return {(): 1.0}
    best = max(rewards[i] for i in left)
    chances = [math.exp((rewards[i] - best) / beta) for i in left]
    law = Counter()
    for taken in product([0, 1], repeat=len(left)):
        chance = math.prod(p if t else 1 - p for p, t in zip(chances, taken))
        accepted = [i for i, t in zip(left, taken) if t]
        rest = [i for i in left if i not in accepted]
        orders = list(permutations(accepted, min(needed, len(accepted))))
        for start in orders if chance else []:  # the best one is always taken
            for end, p in acceptance_law(rewards, rest, needed - len(start), beta).items():
                law[start + end] += chance * p / len(orders)
    return law

@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("rewards, beta", [
    ([0.0, 1.0, 0.4], 0.5), ([2.0, 2.0, -1.0], 1.5), ([-1e6, 0.0, 1e6], 1e-3), ([3, 1, 2], 1e9),
])  # fmt: skip
def test_the_acceptance_law_for_three_answers(rewards, beta, num_samples):
    law = acceptance_law(rewards, range(3), num_samples, beta)
    assert sum(law.values()) == pytest.approx(1)
    rng, draws = np.random.default_rng(0), 10_000
    accept = rs.statistical_rejection
    found = Counter(tuple(accept(rewards, num_samples, beta, rng)) for _ in range(draws))
    assert set(found) <= set(law)
    for outcome, p in law.items():
        assert abs(found[outcome] / draws - p) < 5 * math.sqrt(p * (1 - p) / draws) + 1e-9, outcome
    for wrong in (([1, 2], 2, 1.0), ([1, 2], 0, 1.0), ([1, 2], 1, 0.0), ([1, math.nan], 1, 1.0)):
        with pytest.raises(ValueError):
            accept(*wrong, rng)

@pytest.mark.parametrize("rewards, method, pairs", [
    ([1, 3, 2, 0], "first_round", [(1, 0), (2, 3)]),  # the docstring's
    ([1, 3, 2, 0], "tournament", [(1, 0), (2, 3), (1, 2)]), ([1, 3, 2], "first_round", [(1, 0)]),
    ([1, 3, 4], "tournament", [(1, 0), (2, 1)]),  # the third one enters the second round
    ([1, 1, 0, 5], "first_round", [(3, 2)]),  # equal rewards make no pair
    ([2, 2, 1, 0], "tournament", [(2, 3), (0, 2)]),  # ... but somebody goes on
    ([7], "tournament", []), ([], "first_round", []),
])  # fmt: skip
def test_rank_pairs(rewards, method, pairs):
    assert rs.rank_pairs(rewards, method) == pairs
    with pytest.raises(ValueError, match="first_round"):
        rs.rank_pairs(rewards, "last_round")

def test_losses_against_their_formulas():
    generator = torch.Generator().manual_seed(0)
    numbers = 5 * torch.randn(4, 7, generator=generator, dtype=torch.float64)
    for beta in (0.05, 0.5, 3.0):
        expected = dict(sigmoid=0.0, hinge=0.0, ipo=0.0)
        for pc, pr, rc, rr in numbers.T.tolist():
            better, worse = math.exp(pc - rc), math.exp(pr - rr)  # pi / pi_ref
            chance = better**beta / (better**beta + worse**beta)  # Bradley-Terry of DPO's rewards
            h = math.log(better / worse)
            expected["sigmoid"] -= math.log(chance) / 7
            expected["hinge"] += max(0.0, 1 - beta * h) / 7
            expected["ipo"] += (h - 0.5 / beta) ** 2 / 7
        found = {loss: rs.dpo_loss(*numbers, beta, loss).item() for loss in expected}
        assert found == pytest.approx(expected, rel=1e-9)
    assert rs.dpo_loss(*numbers).item() == rs.dpo_loss(*numbers, 0.1, "sigmoid").item()
    with pytest.raises(ValueError, match="sigmoid"):
        rs.dpo_loss(*numbers, loss="softmax")

@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory, data, tiny_folder):
    """A tiny model that has learned to end its answers, most of the time."""
    out = tmp_path_factory.mktemp("policy") / "sft"
    return Path(run(sft_config(data, tiny_folder, out, steps=12, epochs=10.0)).out)

config = partial(rejection_sample_config, max_new_tokens=12)

@pytest.mark.parametrize("loss, micro_tokens", [("sigmoid", 1), ("hinge", 10_000), ("ipo", 99)])
def test_steps_in_plain_torch(tmp_path, data, policy_folder, updates, loss, micro_tokens):
    """Human pairs; loss and gradient by a plain forward a sequence, whatever the micro-batches."""
    path, T, beta = str(data / "pairs.jsonl"), 0.7, 0.3
    flags = dict(pairs=path, eval_data=path, reward_fn="", loss=loss, temperature=T, beta=beta)
    flags |= dict(batch_size=12, steps=3, micro_tokens=micro_tokens)
    cfg = run(config(data, policy_folder, tmp_path / "dpo", **flags))
    tokenizer, pairs = AutoTokenizer.from_pretrained(cfg.policy), rows_of(data, "pairs")
    ref, plain, final = map(AutoModelForCausalLM.from_pretrained, (cfg.policy, cfg.policy, cfg.out))
    def logratios(lm, key):  # log pi(y|x) / pi_ref(y|x) of all 12
        texts = [(tokenizer, row["prompt"], row[key], T) for row in pairs]
        ours, theirs = ([plain_logprobs(m, *x).sum() for x in texts] for m in (lm, ref))
        return torch.stack(ours) - torch.stack(theirs).detach()

    for (weights, gradient), metrics in zip(updates, rows_of(cfg.out), strict=True):
        torch.nn.utils.vector_to_parameters(weights, plain.parameters())
        up, down = logratios(plain, "chosen"), logratios(plain, "rejected")
        mean = rs.dpo_loss(up, down, torch.zeros(12), torch.zeros(12), beta, loss)
        right = ((up - down).sign() + 1).mean() / 2  # a tie counts half
        expected = [mean, right, beta * (up - down).mean(), up.mean(), down.mean()]
        names = "loss accuracy margin chosen_logratio rejected_logratio".split()
        found = [metrics[name] for name in names]
        assert found == pytest.approx([x.item() for x in expected], rel=1e-4, abs=1e-5)
        parts = torch.autograd.grad(mean, list(plain.parameters()))
        whole = torch.cat([part.flatten() for part in parts])
        assert torch.allclose(gradient, whole, atol=1e-5 * whole.abs().max().item())
    right = logratios(final, "chosen") > logratios(final, "rejected")
    assert eval_of(cfg.out)["accuracy"] == pytest.approx(right.float().mean().item())

@pytest.fixture(scope="module")
def best_of_n_run(tmp_path_factory, data, policy_folder):
    return run(config(data, policy_folder, tmp_path_factory.mktemp("rs") / "best_of_n"))

def judged(cfg, name):
    """Each prompt's answers as (text, reward by the rule less the penalty, ended), from the ids."""
    tokenizer = AutoTokenizer.from_pretrained(cfg.policy)
    found = []
    for row in rows_of(cfg.out, name):
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in row["responses"]]
        ended = [ids[-1] == tokenizer.eos_token_id for ids in row["responses"]]
        assert row["scores"] == list(map(letters, texts)) and row["ended"] == ended
        assert row["prompt_ids"] == common.encode_prompt(tokenizer, row["prompt"])
        rewards = [score - (not whole) for score, whole in zip(row["scores"], ended)]
        found.append((row["prompt"], list(zip(texts, rewards, ended))))
    return found

def best(answers):
    return max([a for a in answers if a[2]] or answers, key=lambda answer: answer[1])

def test_best_of_n_files(tmp_path, data, best_of_n_run):
    cfg, demonstrations, pairs, flat = best_of_n_run, [], [], []
    for prompt, answers in judged(cfg, "candidates"):
        flat += [ended for *_, ended in answers]
        winner, worst = best(answers), min(answers, key=lambda answer: answer[1])
        if winner[2]:
            demonstrations.append(dict(prompt=prompt, completion=winner[0]))
        if winner[2] and winner[1] > worst[1]:
            pairs.append(dict(prompt=prompt, chosen=winner[0], rejected=worst[0]))
    assert 0 < sum(flat) < len(flat)  # both kinds occur, or the test would be of no use
    assert rows_of(cfg.out, "sft") == demonstrations and rows_of(cfg.out, "dpo") == pairs and pairs
    path = f"{cfg.out}/sft.jsonl"
    run(sft_config(data, cfg.policy, tmp_path / "sft", data=path, eval_data=path))
    results, samples = eval_of(cfg.out), rows_of(cfg.out, "samples")
    for (prompt, answers), sample in zip(judged(cfg, "eval_candidates"), samples, strict=True):
        text, reward, ended = best(answers)
        assert sample["prompt"] == prompt and sample["best_of_n"] == text and len(answers) == 8
        assert sample["score_best_of_n"] == reward + (not ended)
    assert results["kl"] != 0 and results["kl_best_of_n"] == math.log(8) - 7 / 8

@pytest.mark.parametrize("rank, name", [("first_round", "prompts"), ("tournament", "chat_prompts")])
def test_rso_outputs(tmp_path, data, policy_folder, rank, name):
    loss = "none" if rank == "first_round" else "sigmoid"
    flags = dict(method="rso", rank=rank, loss=loss, data=str(data / f"{name}.jsonl"))
    cfg = run(config(data, policy_folder, tmp_path / "rso", **flags))
    answers = {(str(p), a[0]): a for p, answers in judged(cfg, "candidates") for a in answers}
    pairs = rows_of(cfg.out, "dpo")
    for pair in pairs:
        both = [pair[key] for key in ("chosen", "rejected")]
        if name == "chat_prompts":
            assert {turn["role"] for [turn] in both} == {"assistant"}
            both = [turn["content"] for [turn] in both]
        winner, loser = (answers[str(pair["prompt"]), text] for text in both)
        assert winner[1] > loser[1] and winner[2]
    most = max(Counter(str(pair["prompt"]) for pair in pairs).values())
    assert most <= (2 if rank == "first_round" else 3)
    names = {path.name for path in (tmp_path / "rso").iterdir()}
    assert "sft.jsonl" not in names and ("model.safetensors" in names) == (loss != "none")

def test_pairs_are_two_texts_and_the_better_one_ended(tmp_path, data, policy_folder):
    """An empty text is one, but "sea", ended or cut, is no preference. The tools go along."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    a, sea, boat = (tokenizer(text)["input_ids"] for text in ("a", "sea", "boat"))
    sea, boat = sea[1:], boat[1:]  # without <bos>
    def candidate(*answers):
        responses = [ids + [2] * ended for ids, ended, _ in answers]
        _, ended, rewards = map(list, zip(*answers))
        return dict(prompt="a", prompt_ids=a, responses=responses, ended=ended, rewards=rewards)

    Y, N, cfg = True, False, config(data, policy_folder, tmp_path)
    candidates = [
        candidate(([], Y, 5.0), (sea, Y, 3.0), (boat, Y, 1.0)),
        candidate((sea, Y, 3.0), (sea, N, 2.0), (sea, Y, 3.0)),  # the same text wins and loses
        candidate((sea, Y, 3.0), (boat, N, 9.0), (boat, Y, 1.0)),  # cut, so not the best
        candidate((sea, N, 3.0), (boat, N, 9.0), (sea, N, 1.0)),  # none ended
    ]
    line = dict(prompt="a", tools=[dict(name="row")])
    prompts = [line | dict(ids=a, where="f:1", kind="x")] * 4
    pairs = rs.select(SimpleNamespace(out=tmp_path), prompts, candidates, tokenizer, cfg)
    assert rows_of(cfg.out, "sft") == [line | dict(completion=text) for text in ("", "sea", "sea")]
    assert rows_of(cfg.out, "dpo") == [line | dict(chosen=t, rejected="boat") for t in ("", "sea")]
    # Read back as anybody's pairs the file is the same: here the text tokenises to the same ids.
    assert rs.load_pairs(common.read_jsonl(f"{cfg.out}/dpo.jsonl"), tokenizer, (), 99) == pairs
    cfg = replace(cfg, missing_eos_penalty=0)  # who needs no end lets a cut answer win
    rs.select(SimpleNamespace(out=tmp_path), prompts[3:], candidates[3:], tokenizer, cfg)
    assert rows_of(cfg.out, "dpo") == [line | dict(chosen="boat", rejected="sea")]

@pytest.mark.parametrize("line", [b"garbage", b"", b"\xff\xfe", b"[1]", b'{"a": 1}', "others"])
def test_candidates_that_this_run_did_not_write_are_refused(tmp_path, best_of_n_run, line):
    folder = tmp_path / "out"
    shutil.copytree(best_of_n_run.out, folder)
    (folder / "eval.json").unlink()
    path = folder / "candidates.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:] if line == "others" else [*lines, line, b"\n"]))
    with pytest.raises(common.UserError, match="candidates.jsonl"):
        rs.main(replace(best_of_n_run, out=str(folder), resume=True))

@pytest.mark.parametrize("prompt, prompts", [("the sea", ["the sea"]), ("-", ["boats", "How?"])])
def test_terminal(tmp_path, data, policy_folder, capsys, monkeypatch, prompt, prompts):
    """Each with its answers, best first; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("boats\n\nHow?\n"))
    rs.main(config(data, policy_folder, tmp_path / "out", prompt=prompt))
    blocks = re.split(r"\n(?=\S)", capsys.readouterr().out)
    assert [block.partition("\n")[0] for block in blocks] == prompts
    for block in blocks:
        _, *answers = re.split(r"\n(?= {1,9}\S)", block)  # past a line feed in one stand 10 spaces
        scores = [float(answer.split()[0]) for answer in answers]
        assert len(scores) == 8 and scores == sorted(map(letters, answers), reverse=True)
    assert not list(tmp_path.iterdir())
