"""LoRA: adapters on shared backbones, in PEFT's format."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import (
    CONFIGS,
    QUESTIONS,
    STAGES,
    make_llama,
    ppo_config,
    reward_config,
    rows_of,
    sft_config,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

import common
import ppo
import reward
import sft

CPU = torch.device("cpu")
RANK = dict(lora_rank=4, lora_alpha=8.0)


def adapted(folder, seed=0, fill=False, **flags):
    """The policy of a folder with LoRA; with `fill` its B is no longer zero."""
    model = common.load_policy(folder, CPU)
    common.add_lora(model, ppo.Config(**RANK | flags, seed=seed))
    if fill:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.1)
    return model


def logits_of(model, ids=((5, 9, 7, 30, 11),)):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), use_cache=False).logits


def test_a_new_adapter_changes_nothing_and_only_it_is_trained(tiny_folder):
    plain, model = common.load_policy(tiny_folder, CPU), adapted(tiny_folder)
    assert torch.equal(logits_of(model), logits_of(plain))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    # Every linear layer of both blocks: q, k, v, o and gate, up, down.
    assert len(trained) == 2 * 7 * 2
    A = torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith("lora_A")])
    assert A.std().item() == pytest.approx(1 / RANK["lora_rank"], rel=0.05)
    batch = common.collate([([5, 9, 7, 30], [0, 0, 1, 1])], [0], CPU)
    common.response_logprobs(model, batch).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
        if name.endswith("lora_B"):
            assert parameter.grad.abs().max() > 0


def test_the_update_is_that_of_the_paper(tiny_folder):
    """W + (alpha / r) B A, put into the weights by hand in float64."""
    model = adapted(tiny_folder, fill=True)
    by_hand = common.load_policy(tiny_folder, CPU).double()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, common.LoRALinear):
                update = layer.lora_B.double() @ layer.lora_A.double()
                by_hand.get_submodule(name).weight += 8.0 / 4 * update
    expected = logits_of(by_hand)
    assert (logits_of(model) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits_of(common.load_policy(tiny_folder, CPU)) - expected).abs().max() > 0.1


def test_generation_uses_the_adapter(tiny_folder):
    model = adapted(tiny_folder, fill=True)
    prompts = [[5, 9, 7], [30, 11], [8]]
    ours = common.generate(model, prompts, 12, 2, temperature=0)
    plain = common.generate(common.load_policy(tiny_folder, CPU), prompts, 12, 2, temperature=0)
    assert ours != plain
    for prompt, response in zip(prompts, ours):
        ids = list(prompt)
        for token in response:
            assert logits_of(model, [ids])[0, -1].argmax() == token
            ids.append(token)


def test_a_model_without_linear_layers_is_refused():
    sizes = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32)
    with pytest.raises(common.UserError, match="no linear layers"):
        common.add_lora(GPT2LMHeadModel(GPT2Config(**sizes)), ppo.Config(**RANK))


# files


def test_peft_gets_the_same_logits_from_our_adapter(tmp_path, tiny_folder):
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = adapted(tiny_folder, fill=True)
    common.save_model(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert (logits_of(theirs) - logits_of(model)).abs().max() < 1e-4
    assert not list(tmp_path.rglob("model.safetensors"))


def test_peft_gets_the_same_scores_from_our_reward_adapter(tmp_path, data, sft_folder):
    peft = pytest.importorskip("peft", reason="pip install peft")
    cfg = reward_config(data, sft_folder, tmp_path / "rm", **RANK, steps=6)
    reward.main(cfg)
    settings = json.loads((tmp_path / "rm/adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
    base = AutoModelForSequenceClassification.from_pretrained(
        sft_folder, num_labels=1, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "rm").eval()
    ours = common.load_reward(tmp_path / "rm", CPU)
    ids = [[5, 9, 7, 30, 2]]
    assert ours.config.reward_mean != 0
    assert logits_of(ours, ids).item() == pytest.approx(logits_of(theirs, ids).item(), abs=1e-5)


def test_merged_and_adapter_say_the_same(tmp_path, tiny_folder):
    model = adapted(tiny_folder, fill=True)
    common.save_model(model, tmp_path / "adapter")
    common.save_model(model, tmp_path / "merged", merge=True)
    expected = logits_of(model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits_of(plain) - expected).abs().max() < 1e-4
    assert (logits_of(common.load_policy(tmp_path / "adapter", CPU)) - expected).abs().max() < 1e-4
    coarse = common.load_policy(tmp_path / "adapter", CPU, torch.bfloat16)
    frequencies = [m.model.rotary_emb.inv_freq for m in (coarse, model)]
    assert coarse.dtype == torch.bfloat16 and torch.equal(*frequencies)


def test_an_adapter_on_an_adapter(tmp_path, tiny_folder):
    """As ppo.py after sft.py, both with --lora_rank: neither update is lost."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    first = adapted(tiny_folder, fill=True)
    common.save_model(first, tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    second = adapted(tmp_path / "first", seed=1, fill=True)
    common.save_model(second, tmp_path / "second")
    assert (logits_of(second) - logits_of(first)).abs().max() > 0.01
    again = common.load_policy(tmp_path / "second", CPU)
    assert (logits_of(again) - logits_of(second)).abs().max() < 1e-4


def test_an_adapter_of_a_reward_model_is_no_policy(tmp_path, data, sft_folder):
    reward.main(reward_config(data, sft_folder, tmp_path / "rm", **RANK))
    with pytest.raises(common.UserError, match="a reward model where"):
        common.load_policy(tmp_path / "rm", CPU)
    sft.main(sft_config(data, sft_folder, tmp_path / "sft", **RANK))
    with pytest.raises(common.UserError, match="no reward model"):
        common.load_reward(tmp_path / "sft", CPU)


def test_an_adapter_whose_base_is_gone_is_one_line(tmp_path, tiny_folder):
    common.save_model(adapted(tiny_folder), tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    settings = json.loads(path.read_text()) | dict(base_model_name_or_path=str(tmp_path / "gone"))
    path.write_text(json.dumps(settings))
    with pytest.raises(common.UserError, match="no model to load"):
        common.load_policy(tmp_path / "a", CPU)


@pytest.mark.parametrize("odd", ["use_rslora", "use_dora", "rank_pattern", "embeddings"])
def test_an_adapter_of_another_kind_is_refused_not_read_wrong(tmp_path, tiny_folder, odd):
    peft = pytest.importorskip("peft", reason="pip install peft")
    flags = {
        "use_rslora": dict(use_rslora=True),
        "use_dora": dict(use_dora=True),
        "rank_pattern": dict(rank_pattern={"q_proj": 2}),
        "embeddings": dict(target_modules=["q_proj", "embed_tokens"]),
    }[odd]
    settings = peft.LoraConfig(
        **dict(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") | flags
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(common.UserError, match="not a plain LoRA adapter"):
        common.load_policy(tmp_path / "theirs", CPU)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_an_adapter_made_by_peft_is_read(tmp_path, tiny_folder, task):
    """Its folder has no config.json."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    auto = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    more = {} if task == "CAUSAL_LM" else dict(num_labels=1)
    base = auto.from_pretrained(tiny_folder, dtype=torch.float32, **more)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type=task,
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    load = common.load_policy if task == "CAUSAL_LM" else common.load_reward
    ours, ids = load(tmp_path / "theirs", CPU), [[5, 9, 7, 30, 2]]
    assert (logits_of(ours, ids) - logits_of(theirs, ids)).abs().max() < 1e-4


def test_overwrite_never_deletes_the_base_of_an_adapter(tmp_path, data, sft_folder):
    base = sft_config(data, sft_folder, tmp_path / "base")
    sft.main(base)
    sft.main(sft_config(data, tmp_path / "base", tmp_path / "adapter", **RANK))
    cfg = sft_config(data, tmp_path / "adapter", tmp_path / "base", **RANK, overwrite=True)
    with pytest.raises(common.UserError, match="it holds what this run reads"):
        sft.main(cfg)
    assert (tmp_path / "base/model.safetensors").exists()


# the stages


def test_four_models_share_two_backbones(tmp_path, data, sft_folder, reward_folder, monkeypatch):
    """The reference is the policy's base, the value model stands on the reward model's."""
    seen = {}
    read = ppo.read_rollout

    def look(policy, ref, value, *rest):
        seen.update(policy=policy, ref=ref, value=value)
        return read(policy, ref, value, *rest)

    monkeypatch.setattr(ppo, "read_rollout", look)
    scorers = []
    load = common.load_scorer
    monkeypatch.setattr(common, "load_scorer", lambda *a: scorers.append(load(*a)) or scorers[0])
    before = common.load_reward(reward_folder, CPU)
    cfg = ppo_config(
        data, sft_folder, tmp_path / "ppo", reward_fn="", reward=str(reward_folder), **RANK,
        steps=3, lr=0.01, value_lr=0.01,
    )  # fmt: skip
    ppo.main(cfg)
    rewards = scorers[0][1]
    for full, light in ((seen["ref"], seen["policy"]), (rewards, seen["value"])):
        theirs = {p.data_ptr() for p in full.parameters()}
        own = [n for n, p in light.named_parameters() if p.data_ptr() not in theirs]
        assert own and all(".lora_" in name or name == "score.weight" for name in own)
    rows = rows_of(cfg.out)
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] != 0
    # The frozen ones did not move under them.
    for (name, a), b in zip(before.named_parameters(), rewards.parameters()):
        assert torch.equal(a, b), name
    assert (seen["value"].score.weight != before.score.weight).any()
    start = common.load_policy(sft_folder, CPU)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), seen["ref"].parameters()))


def test_every_ratio_is_one_before_the_first_update(tmp_path, data, sft_folder, monkeypatch):
    ratios = []
    loss = ppo.policy_loss

    def look(logprobs, old_logprobs, *rest):
        ratios.append((logprobs - old_logprobs).abs().max().item())
        return loss(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(ppo, "policy_loss", look)
    ppo.main(ppo_config(data, sft_folder, tmp_path / "ppo", **RANK, steps=1, minibatches=1))
    assert ratios[0] == 0 and max(ratios) > 0


@pytest.mark.parametrize("name", STAGES)
def test_stages_stop_and_resume_bit_for_bit_with_adapters(
    tmp_path, data, sft_folder, name, monkeypatch
):
    flags = dict(RANK, save_every=1, steps=4)
    whole = CONFIGS[name](data, sft_folder, tmp_path / "whole", **flags)
    STAGES[name].main(whole)
    parts = replace(whole, out=str(tmp_path / "parts"))
    log = common.Run.log

    def cut(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == 3:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", cut)
        with pytest.raises(RuntimeError):
            STAGES[name].main(parts)
    assert (tmp_path / "parts/checkpoint-2").exists()
    STAGES[name].main(replace(parts, resume=True))
    a, b = (common.adapter_weights(tmp_path / part) for part in ("whole", "parts"))
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    assert any(x.abs().max() > 0 for key, x in a.items() if key.endswith("lora_B"))
    assert not (tmp_path / "whole/model.safetensors").exists()


def test_the_whole_chain_with_adapters_and_merge(tmp_path, data, tiny_folder):
    sft.main(sft_config(data, tiny_folder, tmp_path / "sft", **RANK))
    reward.main(reward_config(data, tmp_path / "sft", tmp_path / "reward", **RANK))
    cfg = ppo_config(
        data, tmp_path / "sft", tmp_path / "ppo", reward_fn="", reward=str(tmp_path / "reward"),
        **RANK, merge=True,
    )  # fmt: skip
    ppo.main(cfg)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo", dtype=torch.float32)
    start = make_llama(theirs.config.vocab_size)
    assert set(theirs.state_dict()) == set(start.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ppo")
    ids = tokenizer(QUESTIONS[0], return_tensors="pt")["input_ids"]
    assert theirs.generate(ids, max_new_tokens=5, do_sample=False).shape[1] > ids.shape[1]
