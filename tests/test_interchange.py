"""What we write is read by the other side itself: transformers, its pipelines, and TRL."""

import pytest
import torch
from conftest import (
    QUESTIONS,
    eval_of,
    ppo_config,
    rejection_sample_config,
    reward_config,
    rows_of,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    pipeline,
)

import common
import ppo
import rejection_sample
import reward


def test_our_reward_model_in_the_text_classification_pipeline(reward_folder):
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    classify = pipeline("text-classification", str(reward_folder), function_to_apply="none")
    texts = [(q, a) for q in QUESTIONS[:3] for a in ("egg", "The capital is Paris.")]
    # The pipeline's tokenizer writes no EOS, so it stands in the text.
    plain = classify([q + a + tokenizer.eos_token for q, a in texts], batch_size=1)
    model = common.load_reward(reward_folder, torch.device("cpu"))
    score = common.model_scorer(model, tokenizer, tokenizer, 512)
    ours = score(
        [q for q, _ in texts],
        [common.encode_prompt(tokenizer, q) for q, _ in texts],
        [common.encode_response(tokenizer, q, a) for q, a in texts],
    )
    mean = model.config.reward_mean
    assert mean != 0
    expected = [label["score"] - mean for label in plain]
    assert ours.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3


def test_our_policy_writes_the_same_in_plain_transformers(tmp_path, data, sft_folder):
    ppo.main(ppo_config(data, sft_folder, tmp_path / "ppo"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ppo")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo", dtype=torch.float32).eval()
    ours = common.load_policy(tmp_path / "ppo", torch.device("cpu"))
    prompts = [tokenizer(q)["input_ids"] for q in QUESTIONS]
    responses = common.generate(ours, prompts, 20, tokenizer.eos_token_id, temperature=0)
    for prompt, response in zip(prompts, responses):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert tokenizer.decode(out[0, len(prompt) :]) == tokenizer.decode(response)


def test_a_community_reward_model_of_another_family(tmp_path, data, sft_folder, tiny_tokenizer):
    """Qwen2 with its own tokenizer and chat template, as they lie on the hub."""
    tokenizer = tiny_tokenizer(300)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_labels=1)
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        eos_token_id=2, initializer_range=0.3, **sizes,
    )  # fmt: skip
    theirs = Qwen2ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    flags = dict(reward_fn="", reward=str(tmp_path / "rm"), data=str(data / "chat_prompts.jsonl"))
    flags["eval_data"] = str(data / "chat_prompts.jsonl")
    cfg = ppo_config(data, sft_folder, tmp_path / "ppo", **flags, max_new_tokens=12)
    ppo.main(cfg)
    cut = []
    for sample in rows_of(cfg.out, "samples"):
        answer = [dict(role="assistant", content=sample["after"])]
        text = tokenizer.apply_chat_template(sample["prompt"] + answer, tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            expected = [theirs(torch.tensor([ids])).logits.item() for ids in (whole, whole[:-1])]
        gaps = [abs(sample["score_after"] - score) for score in expected]
        assert min(gaps) < 1e-4 < max(gaps)
        cut.append(gaps[1] < gaps[0])  # an answer that was cut is read without its end token
    assert 1 - sum(cut) / len(cut) == pytest.approx(eval_of(cfg.out)["eos_rate_after"])


# TRL


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="pip install trl")


def test_trl_trains_dpo_on_our_dpo_file(tmp_path, data, sft_folder, trl):
    from datasets import load_dataset

    cfg = rejection_sample_config(data, sft_folder, tmp_path / "ours", loss="none")
    rejection_sample.main(cfg)
    rows = load_dataset("json", data_files=f"{cfg.out}/dpo.jsonl", split="train")
    assert len(rows) == len(rows_of(cfg.out, "dpo")) > 0
    tokenizer = AutoTokenizer.from_pretrained(sft_folder)
    arguments = trl.DPOConfig(
        str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=len(rows), beta=0.3,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, logging_steps=1,
        gradient_checkpointing=False, learning_rate=1e-3, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(sft_folder, dtype=torch.float32)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    # Before the first step the policy is the reference: log 2, theirs and ours.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    moved = [a - b for a, b in zip(model.parameters(), weights_in(sft_folder))]
    assert max(m.abs().max() for m in moved) > 0


def weights_in(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).parameters()


def test_trl_trains_a_reward_model_on_our_pairs_with_our_accuracy(tmp_path, data, sft_folder, trl):
    """TRL's RewardTrainer reads our pairs, and judges our reward model as we do."""
    from datasets import load_dataset

    cfg = reward_config(data, sft_folder, tmp_path / "rm", steps=6, lr=3e-3)
    reward.main(cfg)
    rows = load_dataset("json", data_files=str(data / "pairs.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(cfg.out)
    arguments = trl.RewardConfig(
        str(tmp_path / "trl"), max_steps=1, per_device_eval_batch_size=4, report_to=[],
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        learning_rate=0.0, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(cfg.out, dtype=torch.float32)
    trainer = trl.RewardTrainer(
        model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    found = trainer.evaluate()
    ours = eval_of(cfg.out)
    assert found["eval_loss"] == pytest.approx(ours["loss"], abs=1e-4)
    assert found["eval_accuracy"] == pytest.approx(ours["accuracy"], abs=1e-6)
