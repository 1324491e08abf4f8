"""The four scripts end to end on tiny data: files, flags, metrics, learning."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ANSWERS, CONFIGS, QUESTIONS, ROOT, after, eval_of, flags_of, letters
from conftest import make_llama, make_tokenizer, plain_logprobs, ppo_config, reward_config, rows_of
from conftest import run, save, sft_config, weights_of, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import ppo
import reward
import sft

PPO_METRICS = """step episodes score score_std score_penalised reward kl kl_coef approx_kl clipfrac
    ratio entropy pg_loss vf_loss explained_variance response_len eos_rate lr rollout_tokens_per_s
    update_tokens_per_s seconds sampler_gap sampler_gap_max""".split()

def plain_sft_loss(folder, rows):
    """Mean -log pi(completion + EOS | prompt) of plain transformers, row by row; and the model."""
    lm, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    found = [plain_logprobs(lm, tokenizer, row["prompt"], row["completion"]) for row in rows]
    return -torch.cat(found).mean(), lm

def test_the_stages_by_their_command_lines(tmp_path, data, tiny_folder):
    """On a terminal that cannot show all of the text."""
    flags = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONIOENCODING="ascii")
    models = dict(sft=tiny_folder, reward="sft", ppo="sft", rejection_sample="ppo")
    for name, model in models.items():
        cfg = CONFIGS[name](data, tmp_path / model, tmp_path / name)
        if name in ("ppo", "rejection_sample"):
            cfg = replace(cfg, reward_fn="", reward=str(tmp_path / "reward"))
        command = [sys.executable, str(ROOT / f"{name}.py"), *flags_of(cfg)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | flags)
        assert done.returncode == 0, done.stderr
        assert eval_of(cfg.out) and weights_of(cfg.out)
        settings = json.loads((tmp_path / name / "run.json").read_text())
        assert {"lr", "seed", "batch_size"} < set(settings)
        assert not {k for k, v in settings.items() if vars(cfg)[k] != v}
        if name in ("ppo", "rejection_sample"):
            assert "before" in done.stdout and "after" in done.stdout
    started, policy = weights_of(tmp_path / "sft"), weights_of(tmp_path / "ppo")
    assert any(not torch.equal(started[key], policy[key]) for key in started)

def test_sft_outputs(data, sft_folder):
    rows = rows_of(sft_folder)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["loss"] < rows[0]["loss"]
    loss, _ = plain_sft_loss(sft_folder, common.read_jsonl(data / "sft.jsonl"))
    assert eval_of(sft_folder)["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert not [*Path(sft_folder).glob("checkpoint*"), *Path(sft_folder).glob("*.tmp")]

def test_the_new_tokenizer_depends_on_the_texts_alone(data):
    """Not on where the file is, nor on the form of its lines."""
    forms = [common.read_jsonl(data / f"{name}.jsonl") for name in ("sft", "turns")]
    texts = [sft.texts_of(rows) for rows in forms]
    moved = sft.texts_of([dict(row, where="elsewhere.jsonl:1") for row in forms[0]])
    assert texts[0] == texts[1] == moved and "sft.jsonl" not in "".join(moved)

def test_held_out_judgements_of_another_form(tmp_path, data, sft_folder):
    """Pointwise training on scores, judged on one point (the last 5% of 12 lines), on pairs, and on
    a mixture, which is refused."""
    scores, pairs = str(data / "scores.jsonl"), str(data / "pairs.jsonl")
    flags = dict(loss="pointwise", data=scores, overwrite=True)
    for held_out, n in (("", 1), (pairs, 12)):
        cfg = run(reward_config(data, sft_folder, tmp_path / "out", **flags, eval_data=held_out))
        assert eval_of(cfg.out)["n"] == n and (eval_of(cfg.out)["accuracy"] is None) == (n == 1)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(Path(scores).read_text() + Path(pairs).read_text())
    with pytest.raises(common.UserError, match="mixed.jsonl:13: pairwise data"):
        reward.main(replace(cfg, eval_data=str(mixed), out=str(tmp_path / "mixed")))

@pytest.mark.parametrize("objective, advantage", [
    ("clip", "gae"), ("kl", "gae"), ("pg", "gae"), ("clip", "group"),
])  # fmt: skip
def test_ppo_outputs(tmp_path, data, sft_folder, reward_folder, objective, advantage, capsys):
    flags = dict(objective=objective, ppo_epochs=3, reward_fn="", reward=str(reward_folder))
    flags |= dict(advantage=advantage, group=2, gamma=0.9 if advantage == "group" else 1.0)
    cfg = run(ppo_config(data, sft_folder, tmp_path / "ppo", **flags))
    value = {"vf_loss", "vf_clipfrac", "vf_grad_norm", "explained_variance"}
    assert f"no use for --{'gamma' if cfg.gamma < 1 else 'group'}\n" in capsys.readouterr().out
    rows, results = rows_of(cfg.out), eval_of(cfg.out)
    assert [(row["step"], row["episodes"]) for row in rows] == [(1, 4), (2, 8)]
    for row in rows:
        assert set(PPO_METRICS) - value <= set(row)
        assert (value & set(row)) == (value if advantage == "gae" else set())
        assert row["epochs"] == (1 if objective == "pg" else 3)
        assert row["entropy"] > 0 and row["lr"] == cfg.lr
        assert 0 <= row["sampler_gap"] <= row["sampler_gap_max"] < 1e-4
    assert abs(rows[0]["kl"]) < 1e-5 < abs(rows[1]["kl"])
    samples = rows_of(cfg.out, "samples")
    names = {"prompt", "before", "after", "score_before", "score_after"}
    assert all(set(sample) == names for sample in samples)
    assert [s["prompt"] for s in samples] == [q + " Please" for q in QUESTIONS[:3]]
    for when in ("before", "after"):
        mean = sum(s[f"score_{when}"] for s in samples) / 3
        assert results[f"score_{when}"] == pytest.approx(mean, rel=1e-5)

@pytest.fixture
def losses(monkeypatch):
    """Every call of policy_loss: its new and old log-probs on real tokens, and the advantages."""
    calls = []
    def keep(new, old, advantages, mask, *args, **kwargs):
        calls.append([x.detach()[mask.bool()] for x in (new, old, advantages)])

    after(monkeypatch, ppo, "policy_loss", keep)
    return calls

def test_every_ratio_is_one_before_the_first_update(tmp_path, data, sft_folder, losses):
    """In a one-epoch run that is every ratio, in step 2 as well: pi_old was synced. With a policy
    at rest (no float32 weight feels 1e-30) it is, too, in all epochs of all minibatches; and as
    long as only the value model learns."""
    flags, epochs = dict(ppo_epochs=1, batch_size=8, micro_tokens=40), dict(ppo_epochs=3)
    for rest in ({}, epochs | dict(lr=1e-30, minibatches=2), epochs | dict(value_warmup=2)):
        losses.clear()
        cfg = run(ppo_config(data, sft_folder, tmp_path / str(rest), **flags | rest))
        assert len(losses) > 2 * cfg.steps  # several micro-batches
        assert all(torch.allclose(new, old, atol=1e-5) for new, old, _ in losses)
        for row in rows_of(cfg.out):
            assert row["ratio"] == pytest.approx(1, abs=1e-5) and row["clipfrac"] == 0
            assert row["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert [row["kl"] for row in rows_of(cfg.out)] == pytest.approx([0, 0], abs=1e-5)

def test_advantages_are_whitened_over_the_rollout(tmp_path, data, sft_folder, losses):
    flags = dict(ppo_epochs=1, steps=1, batch_size=8, minibatches=2, micro_tokens=40)
    for scaled in (True, False):
        ppo.main(ppo_config(data, sft_folder, tmp_path / str(scaled), whiten=scaled, **flags))
        whole = torch.cat([advantages for _, _, advantages in losses]).double()
        assert whole.mean().item() == pytest.approx(0, abs=1e-5)
        assert (whole.std(correction=0).item() == pytest.approx(1, abs=1e-4)) == scaled
        losses.clear()  # pg has the whole reward in their place
    ppo.main(ppo_config(data, sft_folder, tmp_path / "pg", objective="pg", **flags))
    whole = torch.cat([advantages for _, _, advantages in losses])
    # A count, less the missing-EOS penalty, less a KL of rounding errors: untouched.
    assert whole.min() >= -1.001 and torch.allclose(whole, whole.round(), atol=1e-4)

def test_kl_stops_the_epochs_and_moves_kl_coef_and_beta(tmp_path, data, sft_folder):
    """Epoch 1 measures KL 0, before its update; epoch 2 measures more than nothing."""
    cfg = ppo_config(data, sft_folder, tmp_path / "ppo", ppo_epochs=4, overwrite=True)
    for stop_kl, epochs in [(1e-6, [2, 2]), (1e9, [4, 4])]:
        assert [row["epochs"] for row in rows_of(run(replace(cfg, stop_kl=stop_kl)).out)] == epochs
    for target, betas in [(1e6, [8, 4, 2]), (1e-12, [8, 16, 32])]:
        run(replace(cfg, objective="kl", steps=3, beta=8.0, beta_target=target))
        assert [row["beta"] for row in rows_of(cfg.out)] == betas
    run(replace(cfg, steps=4, kl_target=0.05, kl_coef=0.2, kl_horizon=40, lr=3e-2))
    rows, coef = rows_of(cfg.out), 0.2
    for row in rows:
        assert row["kl_coef"] == pytest.approx(coef, rel=1e-4)
        error = min(0.2, max(-0.2, row["kl"] / 0.05 - 1))
        coef *= 1 + error * 4 / 40
    assert rows[1]["kl_coef"] < 0.2 and rows[3]["kl_coef"] > rows[2]["kl_coef"]

def test_ptx_mixes_the_sft_loss_in(tmp_path, data, sft_folder):
    rows = [dict(prompt=q, completion=a) for q, a in zip(QUESTIONS, ANSWERS)]  # 4 lines
    write(tmp_path / "ptx.jsonl", rows)
    cfg = run(ppo_config(data, sft_folder, tmp_path / "a", steps=1, ppo_epochs=1, micro_tokens=30))
    flags = dict(ptx_coef=0.5, ptx_data=str(tmp_path / "ptx.jsonl"))
    ptx = run(replace(cfg, out=str(tmp_path / "b"), **flags))
    loss, _ = plain_sft_loss(sft_folder, rows)
    assert "ptx_loss" not in rows_of(cfg.out)[0]
    assert rows_of(ptx.out)[0]["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)
    without, mixed = weights_of(cfg.out), weights_of(ptx.out)
    assert any(not torch.equal(without[name], mixed[name]) for name in without)
    # Four optimiser steps of one line each: no line is learned twice.
    ppo.main(replace(ptx, out=str(tmp_path / "c"), steps=2, batch_size=2, minibatches=2, lr=1e-30))
    expected = sum(plain_sft_loss(sft_folder, [row])[0].item() for row in rows) / 2
    assert sum(x["ptx_loss"] for x in rows_of(tmp_path / "c")) == pytest.approx(expected, rel=1e-5)

@pytest.mark.parametrize("rule, penalty", [("score", 2.5), ("constant", 0.0)])
def test_missing_eos_costs_what_it_says(tmp_path, data, sft_folder, rule, penalty):
    """A constant reward leaves returns without a spread: nothing to explain, and no NaN, which
    rows_of refuses."""
    flags = dict(max_new_tokens=1, missing_eos_penalty=penalty, kl_coef=0.0, batch_size=32, lam=1.0)
    flags["reward_fn"] = f"{data / 'rule.py'}:{rule}"
    cfg = run(ppo_config(data, sft_folder, tmp_path / "ppo", **flags))
    for row in rows_of(cfg.out):
        cost = penalty * (1 - row["eos_rate"])
        assert row["score_penalised"] == pytest.approx(row["score"] - cost, abs=1e-5)
        assert row["reward"] == pytest.approx(row["score_penalised"], abs=1e-5)
        assert row["response_len"] == 1 and row["eos_rate"] < 1
        assert rule == "score" or row["score_std"] == 0
    assert all(w.isfinite().all() for w in weights_of(cfg.out).values())

def test_reward_fn_scores_the_decoded_responses(tmp_path, data, sft_folder):
    cfg = ppo_config(data, sft_folder, tmp_path / "ppo", max_new_tokens=12)
    ppo.main(replace(cfg, gold_fn=cfg.reward_fn))
    samples = rows_of(cfg.out, "samples")
    for when in ("before", "after"):
        assert [s[f"score_{when}"] for s in samples] == [letters(s[when]) for s in samples]
        good = sum(letters(s[when]) > 0 for s in samples) / 3
        assert eval_of(cfg.out)[f"gold_{when}"] == pytest.approx(good, abs=1e-6)
    assert sum(letters(s["before"]) for s in samples) > 0

def test_a_reward_model_of_another_tokenizer_reads_the_text(tmp_path, data, sft_folder, asked):
    base = save(tmp_path / "base", make_tokenizer(290), make_llama(290, seed=3))
    folder = run(reward_config(data, base, tmp_path / "reward", lr=0.05)).out
    flags = dict(reward_fn="", reward=folder, max_new_tokens=100)
    cfg = run(ppo_config(data, sft_folder, tmp_path / "ppo", **flags))
    model, _, responses, scores = asked[-1]
    assert model is None and len(asked) == 4
    assert [s["score_after"] for s in rows_of(cfg.out, "samples")] == scores.tolist()
    ended = [response[-1] == 2 for response in responses]
    assert eval_of(cfg.out)["eos_rate_after"] == pytest.approx(sum(ended) / 3)

def test_trace_prints_one_line_a_token(tmp_path, data, sft_folder, capsys):
    ppo.main(ppo_config(data, sft_folder, tmp_path / "ppo", steps=1, trace=1, lam=1.0))
    lines = capsys.readouterr().out.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.split()[:2] == ["token", "logprob"]]
    names = lines[at].split()[1:]
    assert names == ["logprob", "ref_logprob", "kl", "reward", "advantage", "value", "return"]
    table = [line[-12 * len(names) :].split() for line in lines[at + 1 :] if "'" in line[:14]]
    assert 1 <= len(table) <= 6
    rows = [dict(zip(names, map(float, numbers), strict=True)) for numbers in table]
    for i, row in enumerate(rows):
        assert row["kl"] == 0 and row["logprob"] == row["ref_logprob"] < 0
        assert row["reward"] == 0 or i == len(rows) - 1
        # With lam 1 and no KL yet, every return is what comes at the end.
        assert row["return"] == pytest.approx(rows[-1]["reward"], abs=1e-3)
        assert row["advantage"] == pytest.approx(row["return"] - row["value"], abs=1e-3)

@pytest.mark.parametrize("objective", ["clip", "kl", "pg"])
def test_ppo_gradients_do_not_depend_on_the_cut(tmp_path, data, sft_folder, updates, objective):
    flags = dict(steps=1, batch_size=8, minibatches=2, ppo_epochs=1, lr=1e-30, value_lr=1e-30)
    for micro_tokens in (1, 60, 10_000):
        flags |= dict(micro_tokens=micro_tokens, objective=objective)
        ppo.main(ppo_config(data, sft_folder, tmp_path / str(micro_tokens), **flags))
    gradients = [gradient for _, gradient in updates]
    one, some, all_at_once = gradients[:4], gradients[4:8], gradients[8:]
    assert len(all_at_once) == 4  # policy and value, two minibatches
    for a, b, c in zip(one, some, all_at_once):
        atol = 2e-5 * a.abs().max().item()
        assert torch.allclose(a, b, atol=atol) and torch.allclose(a, c, atol=atol) and atol > 0

def test_sft_gradient_is_that_of_the_plain_loss(tmp_path, data, tiny_folder, updates):
    loss, model = plain_sft_loss(tiny_folder, common.read_jsonl(data / "sft.jsonl"))
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for micro_tokens in (1, 60, 10_000):
        out, flags = tmp_path / str(micro_tokens), dict(batch_size=12, steps=1)
        sft.main(sft_config(data, tiny_folder, out, micro_tokens=micro_tokens, **flags))
        atol = 1e-5 * expected.abs().max().item()
        assert torch.allclose(updates.pop()[1], expected, atol=atol)
        assert rows_of(out)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)

@pytest.mark.parametrize("objective, seed", [("clip", 0), ("clip", 1), ("clip", 2), ("kl", 0)])
def test_ppo_learns_a_rule(tmp_path, data, tiny_folder, objective, seed):
    """From a random model: the share of ASCII letters in the response rises to most of it."""
    flags = dict(objective=objective, seed=seed, reward_fn=f"{data / 'rule.py'}:share", steps=12)
    flags |= dict(batch_size=32, lr=2e-2, value_lr=1e-2, kl_coef=0.0, missing_eos_penalty=0.0)
    flags |= dict(micro_tokens=2048, beta=0.1, beta_target=0.3)
    cfg = run(ppo_config(data, tiny_folder, tmp_path / "ppo", **flags))
    scores, results = [row["score"] for row in rows_of(cfg.out)], eval_of(cfg.out)
    assert scores[0] < 0.5 and scores[-1] > 0.8
    assert results["score_after"] > results["score_before"] + 0.2
