"""The four scripts end to end on tiny data: files, flags, metrics, learning."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    ANSWERS,
    QUESTIONS,
    ROOT,
    chat,
    eval_of,
    flags_of,
    letters,
    ppo_config,
    rejection_sample_config,
    reward_config,
    rows_of,
    sft_config,
    weights_of,
    write,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import common
import ppo
import reward
import sft

torch.set_num_threads(1)

PPO_METRICS = """step episodes score score_std score_penalised reward kl kl_coef approx_kl clipfrac
    ratio entropy pg_loss vf_loss explained_variance response_len eos_rate lr rollout_tokens_per_s
    update_tokens_per_s seconds peak_memory_gib rollout_seconds score_seconds update_seconds
    score_tokens_per_s sampler_gap sampler_gap_max""".split()
def plain_scores(out, inputs):
    """Scores of tokenised texts, each alone through plain transformers, less the stored mean."""
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    logits = []
    with torch.no_grad():
        for keys in inputs:
            logits.append(model(**{k: torch.tensor([v]) for k, v in keys.items()}).logits.item())
    return [x - getattr(model.config, "reward_mean", 0.0) for x in logits]


# the chain, as a user runs it


def script(name, *flags):
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_the_stages_by_their_command_lines(tmp_path, data, tiny_folder):
    configs = dict(
        sft=sft_config(data, tiny_folder, tmp_path / "sft"),
        reward=reward_config(data, tmp_path / "sft", tmp_path / "reward"),
        ppo=ppo_config(
            data, tmp_path / "sft", tmp_path / "ppo", reward_fn="", reward=str(tmp_path / "reward")
        ),
    )
    configs["rejection_sample"] = rejection_sample_config(
        data, tmp_path / "sft", tmp_path / "rejection_sample", reward_fn="",
        reward=str(tmp_path / "reward"),
    )  # fmt: skip
    for name, cfg in configs.items():
        done = script(name, *flags_of(cfg))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name / "eval.json").exists()
        settings = json.loads((tmp_path / name / "run.json").read_text())
        changed = {k for k, v in settings.items() if vars(cfg)[k] != v}
        assert not changed and {"lr", "seed", "batch_size"} < set(settings)
        if name in ("ppo", "rejection_sample"):
            assert "before" in done.stdout and "after" in done.stdout
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")
    started = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    moved = [not torch.equal(a, b) for a, b in zip(policy.parameters(), started.parameters())]
    assert any(moved)


# the same in this process: outputs


def test_sft_outputs(data, sft_folder):
    rows, results = rows_of(sft_folder), eval_of(sft_folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["loss"] < rows[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(sft_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(sft_folder)
    nll, tokens = plain_sft_loss(model, tokenizer, common.read_jsonl(data / "sft.jsonl"))
    assert results["loss"] == pytest.approx(nll.item() / tokens, rel=1e-5)
    assert not list(Path(sft_folder).glob("checkpoint*")) + list(Path(sft_folder).glob("*.tmp"))


def test_the_new_tokenizer_does_not_depend_on_where_the_data_is(tmp_path, data):
    """The file's path was among the texts once, so that every folder gave another tokenizer."""
    found = []
    for folder in ("a", "a/much/longer/path"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in ("sft.jsonl", "turns.jsonl"):
            (tmp_path / folder / name).write_bytes((data / name).read_bytes())
        rows = [common.read_jsonl(tmp_path / folder / f"{n}.jsonl") for n in ("sft", "turns")]
        texts = [sft.texts_of(part) for part in rows]
        assert texts[0] == texts[1]  # the same dialogues, as prompt and completion, and as messages
        found.append(sft.new_tokenizer(texts[0], 300).get_vocab())
    assert found[0] == found[1]


def plain_sft_loss(model, tokenizer, rows):
    """Summed -log pi(completion + EOS | prompt), row by row, and how many tokens that is."""
    total, tokens = 0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        answer = answer + [tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        labels = torch.tensor(answer)
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        tokens += len(answer)
    return total, tokens


LOSSES = [("pairwise", "pairs"), ("pointwise", "scores"), ("listwise", "lists")]


@pytest.mark.parametrize("loss, file", LOSSES)
def test_reward_outputs(tmp_path, data, sft_folder, loss, file):
    path = str(data / f"{file}.jsonl")
    cfg = reward_config(
        data, sft_folder, tmp_path / "r", loss=loss, data=path, eval_data=path, steps=12
    )
    reward.main(cfg)
    rows, results = rows_of(cfg.out), eval_of(cfg.out)
    assert [row["step"] for row in rows] == [1, 2, 3]  # one epoch of 12 lines, 4 a step
    assert {"accuracy", "loss", "n"} <= set(results) and results["n"] == 12
    (interval,) = [v for v in results.values() if isinstance(v, list)]
    assert interval[0] <= results["accuracy"] <= interval[1]
    model = AutoModelForSequenceClassification.from_pretrained(cfg.out)
    assert model.config.num_labels == 1 and model.dtype == torch.float32
    AutoTokenizer.from_pretrained(cfg.out)


@pytest.mark.parametrize("objective", ["clip", "kl", "pg"])
def test_ppo_outputs(tmp_path, data, sft_folder, reward_folder, objective):
    cfg = ppo_config(
        data, sft_folder, tmp_path / "ppo", objective=objective, reward_fn="",
        reward=str(reward_folder), ppo_epochs=3,
    )  # fmt: skip
    ppo.main(cfg)
    rows, results = rows_of(cfg.out), eval_of(cfg.out)
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["episodes"] for row in rows] == [4, 8]
    for row in rows:
        assert set(PPO_METRICS) <= set(row)
        assert row["epochs"] == (1 if objective == "pg" else 3)
        assert row["entropy"] > 0 and row["lr"] == cfg.lr
        assert 0 <= row["sampler_gap"] <= row["sampler_gap_max"] < 1e-4
    assert rows[0]["kl"] == 0 and rows[1]["kl"] != 0
    samples = rows_of(cfg.out, "samples")
    names = {"prompt", "before", "after", "score_before", "score_after"}
    assert len(samples) == 3 and all(set(sample) == names for sample in samples)
    assert [s["prompt"] for s in samples] == [q + " Please" for q in QUESTIONS[:3]]
    assert {"score_before", "score_after", "kl"} <= set(results)
    for when in ("before", "after"):
        mean = sum(s[f"score_{when}"] for s in samples) / 3
        assert results[f"score_{when}"] == pytest.approx(mean, rel=1e-5)
    AutoModelForCausalLM.from_pretrained(cfg.out)
    AutoTokenizer.from_pretrained(cfg.out)
    assert not list(Path(cfg.out).glob("checkpoint*")) + list(Path(cfg.out).glob("*.tmp"))


def test_one_held_out_point_orders_nothing(tmp_path, data, sft_folder):
    """With 12 lines the last 5% is one: no pair to order, and eval.json must still be JSON."""
    path = str(data / "scores.jsonl")
    cfg = reward_config(
        data, sft_folder, tmp_path / "r", loss="pointwise", data=path, eval_data=""
    )
    reward.main(cfg)
    results = eval_of(cfg.out)
    assert results["n"] == 1 and results["accuracy"] is None


def test_held_out_judgements_of_another_form(tmp_path, data, sft_folder):
    """Pointwise training on scores, judged on pairs (the embedded default), and on a mixture."""
    scores, pairs = str(data / "scores.jsonl"), str(data / "pairs.jsonl")
    flags = dict(loss="pointwise", data=scores, eval_data=pairs)
    cfg = reward_config(data, sft_folder, tmp_path / "r", **flags)
    reward.main(cfg)
    assert eval_of(cfg.out)["n"] == 12
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(Path(scores).read_text() + Path(pairs).read_text())
    found = []
    for micro_tokens in (1, 10_000):  # one judgement a forward; all of them in one
        out = tmp_path / str(micro_tokens)
        flags = dict(eval_data=str(mixed), out=str(out), micro_tokens=micro_tokens, lr=1e-30)
        try:
            reward.main(replace(cfg, **flags))
        except common.UserError as refused:
            assert "mixed.jsonl" in str(refused)
            return
        found.append(eval_of(out))
    for key in ("accuracy", "loss"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-4), key


# ppo.py: the algorithm's promises


def record_policy_loss(monkeypatch):
    """Every call of policy_loss: its new and old log-probs on real tokens, and the advantages."""
    calls, original = [], ppo.policy_loss

    def keep(new, old, advantages, mask, *args):
        where = mask.bool()
        calls.append((new.detach()[where], old[where], advantages[where]))
        return original(new, old, advantages, mask, *args)

    monkeypatch.setattr(ppo, "policy_loss", keep)
    return calls


def test_every_ratio_is_exactly_one_before_the_first_update(
    tmp_path, data, sft_folder, monkeypatch
):
    """In a one-epoch run that is every ratio, in step 2 as well: pi_old was synced."""
    calls = record_policy_loss(monkeypatch)
    cfg = ppo_config(data, sft_folder, tmp_path / "a", ppo_epochs=1, batch_size=8, micro_tokens=40)
    ppo.main(cfg)
    assert len(calls) > 2 * cfg.steps  # several micro-batches
    assert all(torch.equal(new, old) for new, old, _ in calls)
    for row in rows_of(cfg.out):
        assert (row["ratio"], row["approx_kl"], row["clipfrac"]) == (1, 0, 0)

    # Policy at rest (no float32 weight feels 1e-30): the same in all epochs of all minibatches.
    calls.clear()
    cfg = replace(cfg, out=str(tmp_path / "b"), lr=1e-30, ppo_epochs=3, minibatches=2)
    ppo.main(cfg)
    assert all(torch.equal(new, old) for new, old, _ in calls)
    assert [row["kl"] for row in rows_of(cfg.out)] == [0, 0]


def test_advantages_are_whitened_over_the_rollout_except_for_pg(
    tmp_path, data, sft_folder, monkeypatch
):
    calls = record_policy_loss(monkeypatch)
    flags = dict(ppo_epochs=1, steps=1, batch_size=8, minibatches=2, micro_tokens=40)
    ppo.main(ppo_config(data, sft_folder, tmp_path / "clip", **flags))
    whole = torch.cat([advantages for _, _, advantages in calls]).double()
    assert whole.mean().item() == pytest.approx(0, abs=1e-5)
    assert whole.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    calls.clear()
    ppo.main(ppo_config(data, sft_folder, tmp_path / "pg", objective="pg", **flags))
    whole = torch.cat([advantages for _, _, advantages in calls])
    assert whole.min() >= -1  # a count, less the missing-EOS penalty: untouched
    assert torch.equal(whole, whole.round())


def test_stop_kl_ends_the_epochs(tmp_path, data, sft_folder):
    """Epoch 1 measures KL 0, before its update; epoch 2 measures more than nothing."""
    cfg = ppo_config(data, sft_folder, tmp_path / "a", ppo_epochs=4, stop_kl=1e-9)
    ppo.main(cfg)
    assert [row["epochs"] for row in rows_of(cfg.out)] == [2, 2]
    cfg = replace(cfg, out=str(tmp_path / "b"), stop_kl=1e9)
    ppo.main(cfg)
    assert [row["epochs"] for row in rows_of(cfg.out)] == [4, 4]


def test_kl_target_moves_kl_coef(tmp_path, data, sft_folder):
    flags = dict(steps=4, kl_target=0.05, kl_coef=0.2, kl_horizon=40, lr=3e-2)
    cfg = ppo_config(data, sft_folder, tmp_path / "ppo", **flags)
    ppo.main(cfg)
    rows = rows_of(cfg.out)
    coef = 0.2
    for row in rows:
        assert row["kl_coef"] == pytest.approx(coef, rel=1e-4)
        error = min(0.2, max(-0.2, row["kl"] / 0.05 - 1))
        coef *= 1 + error * 4 / 40
    assert rows[1]["kl_coef"] < 0.2 and rows[3]["kl_coef"] > rows[2]["kl_coef"]


def test_beta_adapts_with_the_kl_objective(tmp_path, data, sft_folder):
    cfg = ppo_config(data, sft_folder, tmp_path / "ppo", objective="kl", steps=3, beta=8.0)
    ppo.main(replace(cfg, beta_target=1e6))
    assert [row["beta"] for row in rows_of(cfg.out)] == [8, 4, 2]
    ppo.main(replace(cfg, beta_target=1e-12, overwrite=True))
    assert [row["beta"] for row in rows_of(cfg.out)] == [8, 16, 32]


def test_ptx_mixes_the_sft_loss_in(tmp_path, data, sft_folder):
    path = tmp_path / "ptx.jsonl"
    write(path, [dict(prompt=q, completion=a) for q, a in zip(QUESTIONS, ANSWERS)])  # 4 lines
    cfg = ppo_config(data, sft_folder, tmp_path / "a", steps=1, ppo_epochs=1, micro_tokens=30)
    ppo.main(cfg)
    ptx = replace(cfg, out=str(tmp_path / "b"), ptx_coef=0.5, ptx_data=str(path))
    ppo.main(ptx)
    model = AutoModelForCausalLM.from_pretrained(sft_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(sft_folder)
    loss, tokens = plain_sft_loss(model, tokenizer, common.read_jsonl(path))
    assert "ptx_loss" not in rows_of(cfg.out)[0]
    assert rows_of(ptx.out)[0]["ptx_loss"] == pytest.approx(loss.item() / tokens, rel=1e-5)
    without, mixed = weights_of(cfg.out), weights_of(ptx.out)
    assert any(not torch.equal(without[name], mixed[name]) for name in without)


def test_ptx_goes_through_all_its_data(tmp_path, data, sft_folder):
    """Four lines, four optimiser steps of one line each: no line is learned twice."""
    rows = [dict(prompt=q, completion=a) for q, a in zip(QUESTIONS, ANSWERS)]
    write(tmp_path / "ptx.jsonl", rows)
    cfg = ppo_config(
        data, sft_folder, tmp_path / "ppo", ptx_coef=1.0, ptx_data=str(tmp_path / "ptx.jsonl"),
        batch_size=2, minibatches=2, ppo_epochs=1, lr=1e-30,
    )  # fmt: skip
    ppo.main(cfg)
    model = AutoModelForCausalLM.from_pretrained(sft_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(sft_folder)
    losses = [plain_sft_loss(model, tokenizer, [row]) for row in rows]
    expected = sum(loss.item() / tokens for loss, tokens in losses) / 4
    found = sum(row["ptx_loss"] for row in rows_of(cfg.out)) / 2
    assert found == pytest.approx(expected, rel=1e-5)


def test_missing_eos_costs_what_it_says(tmp_path, data, sft_folder):
    flags = dict(max_new_tokens=1, missing_eos_penalty=2.5, kl_coef=0.0, batch_size=32)
    cfg = ppo_config(data, sft_folder, tmp_path / "ppo", **flags)
    ppo.main(cfg)
    for row in rows_of(cfg.out):
        penalty = 2.5 * (1 - row["eos_rate"])
        assert row["score_penalised"] == pytest.approx(row["score"] - penalty, abs=1e-5)
        assert row["reward"] == pytest.approx(row["score_penalised"], abs=1e-5)
        assert row["response_len"] == 1 and row["eos_rate"] < 1


def test_reward_fn_scores_the_decoded_responses(tmp_path, data, sft_folder):
    cfg = ppo_config(data, sft_folder, tmp_path / "ppo", max_new_tokens=12)
    ppo.main(replace(cfg, gold_fn=cfg.reward_fn))
    samples = rows_of(cfg.out, "samples")
    for when in ("before", "after"):
        assert [s[f"score_{when}"] for s in samples] == [letters(s[when]) for s in samples]
        good = sum(letters(s[when]) > 0 for s in samples) / 3
        assert eval_of(cfg.out)[f"gold_{when}"] == pytest.approx(good, abs=1e-6)
    assert sum(letters(s["before"]) for s in samples) > 0


def test_a_constant_reward_leaves_no_nan_in_the_log(tmp_path, data, sft_folder):
    """Returns without a spread: nothing to explain, and still JSON (rows_of refuses NaN)."""
    cfg = ppo_config(
        data, sft_folder, tmp_path / "ppo", reward_fn=f"{data / 'rule.py'}:constant",
        missing_eos_penalty=0.0, kl_coef=0.0, max_new_tokens=1, lam=1.0,
    )  # fmt: skip
    ppo.main(cfg)
    assert [row["score_std"] for row in rows_of(cfg.out)] == [0, 0]
    assert all(w.isfinite().all() for w in weights_of(cfg.out).values())


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_reward_model_with_another_tokenizer_reads_the_text(
    tmp_path, data, sft_folder, tiny_tokenizer, tiny_llama, kind, monkeypatch
):
    other = tiny_tokenizer(290)
    if kind == "llama":
        base = tiny_llama(len(other), seed=3)
        base.save_pretrained(tmp_path / "base")
        other.save_pretrained(tmp_path / "base")
        cfg = reward_config(data, tmp_path / "base", tmp_path / "r", lr=0.05)
        reward.main(cfg)
    else:
        other = PreTrainedTokenizerFast(
            tokenizer_object=other.backend_tokenizer, eos_token="<eos>", pad_token="<pad>",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )  # fmt: skip
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_labels=1)
        config = BertConfig(
            vocab_size=len(other), num_attention_heads=2, pad_token_id=0, **sizes,
            initializer_range=0.5,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(tmp_path / "r")
        other.save_pretrained(tmp_path / "r")
    cfg = ppo_config(
        data, sft_folder, tmp_path / "ppo", reward_fn="", reward=str(tmp_path / "r"),
        max_new_tokens=12,
    )  # fmt: skip
    said = {"before": [], "after": []}  # token ids, to know which ones were cut
    generate = common.generate

    def listen(model, prompts, *args, logprobs=False, **kwargs):
        answers = generate(model, prompts, *args, logprobs=logprobs, **kwargs)
        if not logprobs:
            said["after" if said["before"] else "before"] = answers
        return answers

    monkeypatch.setattr(common, "generate", listen)
    ppo.main(cfg)
    samples = rows_of(cfg.out, "samples")
    endings = set()
    for when in ("before", "after"):
        inputs = []
        for sample, ids in zip(samples, said[when]):
            if kind == "bert":  # a text pair, told apart by its token types
                inputs.append(other(sample["prompt"], sample[when]))
                assert set(inputs[-1]["token_type_ids"]) == {0, 1}
            else:
                ended = [2] if ids[-1] == 2 else []  # a cut answer gets no EOS
                endings.add(len(ended))
                response = other(sample[when], add_special_tokens=False)["input_ids"] + ended
                inputs.append(dict(input_ids=other(sample["prompt"])["input_ids"] + response))
        expected = plain_scores(tmp_path / "r", inputs)
        assert [s[f"score_{when}"] for s in samples] == pytest.approx(expected, abs=1e-4)
        assert max(expected) - min(expected) > 1e-3
    assert endings == ({0, 1} if kind == "llama" else set())
    if kind == "bert":  # no value for each token
        with pytest.raises(common.UserError, match="causal"):
            ppo.main(replace(cfg, value=str(tmp_path / "r"), out=str(tmp_path / "v")))


def test_trace_prints_one_line_a_token(tmp_path, data, sft_folder, capsys):
    cfg = ppo_config(data, sft_folder, tmp_path / "ppo", steps=1, trace=1, lam=1.0)
    ppo.main(cfg)
    lines = capsys.readouterr().out.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.split()[:2] == ["token", "logprob"]]
    names = lines[at].split()[1:]
    assert {"logprob", "ref_logprob", "kl", "reward", "value", "advantage", "return"} == set(names)
    table = []
    for line in lines[at + 1 :]:
        try:
            table.append(dict(zip(names, map(float, line[14:].split()))))
        except ValueError:
            break
        if len(table[-1]) < len(names):
            table.pop()
            break
    assert 1 <= len(table) <= 6
    for i, row in enumerate(table):
        assert row["kl"] == 0 and row["logprob"] == row["ref_logprob"] < 0
        assert row["reward"] == 0 or i == len(table) - 1
        # With lam 1 and no KL yet, every return is what comes at the end.
        assert row["return"] == pytest.approx(table[-1]["reward"], abs=1e-3)
        assert row["advantage"] == pytest.approx(row["return"] - row["value"], abs=1e-3)


def test_chat_messages_through_the_template(tmp_path, data, tiny_folder, capsys):
    turns = str(data / "turns.jsonl")
    cfg = sft_config(data, tiny_folder, tmp_path / "sft", data=turns, eval_data=turns, steps=0)
    sft.main(cfg)
    # Here the template writes <bos> + user + assistant + <eos>, as plain prompts are encoded too.
    plain = sft_config(data, tiny_folder, tmp_path / "plain", steps=0)
    sft.main(plain)
    assert eval_of(cfg.out) == eval_of(plain.out)
    cfg = ppo_config(
        data, tmp_path / "sft", tmp_path / "ppo", data=str(data / "chat_prompts.jsonl"),
        eval_data=turns,
    )  # fmt: skip
    ppo.main(cfg)
    samples = rows_of(cfg.out, "samples")
    assert samples[0]["prompt"] == chat("user", QUESTIONS[0]) and len(samples) == 12

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(tmp_path / "bare")
    bare = sft_config(data, tmp_path / "bare", tmp_path / "none", data=turns)
    with pytest.raises(common.UserError, match="turns.jsonl:1: .*chat template"):
        sft.main(bare)


# the gradient does not depend on the micro-batches


def gradients_of(monkeypatch, module, cfg):
    """Run a stage and return its gradients, each before it is clipped."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def keep(parameters, *args, **kwargs):
        parameters = list(parameters)
        seen.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))
        return clip(parameters, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        module.main(cfg)
    return seen


@pytest.mark.parametrize("objective", ["clip", "pg"])
def test_ppo_gradients_do_not_depend_on_micro_tokens(
    tmp_path, data, sft_folder, monkeypatch, objective
):
    found = {}
    for micro_tokens in (1, 60, 10_000):
        cfg = ppo_config(
            data, sft_folder, tmp_path / str(micro_tokens), micro_tokens=micro_tokens, steps=1,
            batch_size=8, minibatches=2, ppo_epochs=1, objective=objective, lr=1e-30,
            value_lr=1e-30,
        )  # fmt: skip
        found[micro_tokens] = gradients_of(monkeypatch, ppo, cfg)
    assert len(found[1]) == 4  # policy and value, two minibatches
    for micro_tokens in (60, 10_000):
        for a, b in zip(found[1], found[micro_tokens]):
            assert torch.allclose(a, b, atol=2e-5 * a.abs().max().item()) and a.abs().max() > 0


def test_sft_gradient_is_that_of_the_plain_loss(tmp_path, data, tiny_folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    total, tokens = plain_sft_loss(model, tokenizer, common.read_jsonl(data / "sft.jsonl"))
    (total / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for micro_tokens in (1, 60, 10_000):
        out = tmp_path / str(micro_tokens)
        flags = dict(batch_size=12, steps=1, micro_tokens=micro_tokens)
        cfg = sft_config(data, tiny_folder, out, **flags)
        (found,) = gradients_of(monkeypatch, sft, cfg)
        assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item())
        assert rows_of(out)[0]["loss"] == pytest.approx(total.item() / tokens, rel=1e-5)


# does it learn?


@pytest.mark.parametrize("objective, seed", [("clip", 0), ("clip", 1), ("clip", 2), ("kl", 0)])
def test_ppo_learns_a_rule(tmp_path, data, tiny_folder, objective, seed):
    """From a random model: the share of ASCII letters in the response rises to most of it."""
    cfg = ppo_config(
        data, tiny_folder, tmp_path / "ppo", reward_fn=f"{data / 'rule.py'}:share", seed=seed,
        objective=objective, steps=12, batch_size=32, lr=2e-2, value_lr=1e-2, kl_coef=0.0,
        missing_eos_penalty=0.0, micro_tokens=2048, beta=0.1, beta_target=0.3,
    )  # fmt: skip
    ppo.main(cfg)
    scores, results = [row["score"] for row in rows_of(cfg.out)], eval_of(cfg.out)
    assert scores[0] < 0.5 and scores[-1] > 0.8
    assert results["score_after"] > results["score_before"] + 0.2
