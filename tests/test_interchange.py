"""What we write is read by the other side itself: transformers, its pipelines, and TRL."""

import pytest
import torch
from conftest import QUESTIONS, eval_of, make_llama, make_tokenizer, ppo_config
from conftest import rejection_sample_config, reward_config, rows_of, run, save
from test_common import CONFIGS as MODELS
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import PreTrainedTokenizerFast, pipeline

import common
import reward

CPU = torch.device("cpu")

@pytest.fixture(scope="module", params=["own_pad", "pad_is_eos", "GPT-2", "Pythia"])
def stages(request, tmp_path_factory, data):
    """Folders of a model and of our reward model on it. Its pad token is its own, or EOS; or EOS
    is all that it has, so that reward.py adds a token and a row; or a token has no role yet."""
    kind, tokenizer = request.param, make_tokenizer()
    folder = tmp_path_factory.mktemp(kind)
    if kind == "pad_is_eos":
        tokenizer.pad_token = "<eos>"
    base = make_llama(len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    if kind in ("GPT-2", "Pythia"):
        spare = "<none>" if kind == "GPT-2" else "<|padding|>"
        text = tokenizer.backend_tokenizer.to_str().replace("<pad>", spare)
        same = dict.fromkeys(("bos_token", "eos_token"), "<eos>")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **same)
        config = MODELS["gpt2" if kind == "GPT-2" else "neox"]()
        config.update(dict(vocab_size=len(tokenizer), pad_token_id=None))
        base = AutoModelForCausalLM.from_config(config)
    save(folder / "base", base, tokenizer)
    cfg = run(reward_config(data, folder / "base", folder / "rm"))
    rows = AutoModelForSequenceClassification.from_pretrained(cfg.out).get_input_embeddings().weight
    assert len(rows) == base.config.vocab_size + (kind == "GPT-2")
    if kind == "GPT-2":  # nothing trains it, and it is the same in every run
        again, *_ = reward.new_reward_model(cfg, CPU)
        assert torch.equal(rows[-1], again.lm.get_input_embeddings().weight[-1])
    return cfg.model, cfg.out

def test_our_models_in_plain_transformers(tmp_path, data, stages, asked):
    """The reward model by the policy's ids in ppo.py, and by text in a pipeline, alone and in a
    padded batch; what the policy that ppo.py trains writes."""
    (base, rm), load = stages, common.load_score
    cfg = run(ppo_config(data, base, tmp_path, reward_fn="", reward=rm))
    classify = pipeline("text-classification", rm, function_to_apply="none")
    plain, mean, tokenizer = classify.model, classify.model.config.reward_mean, classify.tokenizer
    assert len(asked) == 4 and mean != 0  # the held-out prompts before and after, and two steps
    for model, prompts, responses, scores in asked:
        assert model is not None  # or it would read the text
        for prompt, response, score in zip(prompts, responses, scores.tolist(), strict=True):
            ids = torch.tensor([prompt["ids"] + response])
            hidden = plain.base_model(ids).last_hidden_state
            assert score == pytest.approx(plain.score(hidden)[0, -1].item() - mean, abs=1e-5)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    questions, answers = QUESTIONS[:4], ["egg", "The capital is Paris.", "wait", "boat"]
    ids = [y + [2] for y in tokenizer(answers, add_special_tokens=False)["input_ids"]]
    score, _ = load(cfg, common.load_policy(base, CPU), AutoTokenizer.from_pretrained(base))
    ours = score([dict(ids=x) for x in tokenizer(questions)["input_ids"]], ids).tolist()
    assert max(ours) - min(ours) > 1e-3
    for size in (1, 4):  # the pipeline's tokenizer writes no EOS, so it stands in the text
        labels = classify([q + a + "<eos>" for q, a in zip(questions, answers)], batch_size=size)
        assert ours == pytest.approx([label["score"] - mean for label in labels], abs=1e-5)
    prompts = tokenizer(QUESTIONS)["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(cfg.out)
    responses = common.generate(common.load_policy(cfg.out, CPU).lm, prompts, 20, 2, temperature=0)
    for prompt, response in zip(prompts, responses, strict=True):
        written = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert written[0, len(prompt) :].tolist() == response

TRL = dict(
    max_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
    gradient_checkpointing=False,
)  # fmt: skip

@pytest.mark.parametrize("name", ["prompts", "chat_prompts"])
def test_trl_trains_dpo_on_our_dpo_file(tmp_path, data, sft_folder, name):
    trl, datasets = map(pytest.importorskip, ("trl", "datasets"))
    flags = dict(loss="none", data=str(data / f"{name}.jsonl"))
    cfg = run(rejection_sample_config(data, sft_folder, tmp_path / "ours", **flags))
    rows = datasets.load_dataset("json", data_files=f"{cfg.out}/dpo.jsonl", split="train")
    assert len(rows) == len(rows_of(cfg.out, "dpo")) > 0
    model = AutoModelForCausalLM.from_pretrained(sft_folder)
    before = model.lm_head.weight.detach().clone()
    size = dict(per_device_train_batch_size=len(rows), logging_steps=1, learning_rate=1e-3)
    arguments = trl.DPOConfig(str(tmp_path / "trl"), beta=0.3, **TRL, **size)
    how = dict(train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(sft_folder))
    trainer = trl.DPOTrainer(model, args=arguments, **how)
    trainer.train()
    # Before the first step the policy is the reference: log 2, theirs and ours.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert not torch.equal(model.lm_head.weight, before)

def test_trl_judges_our_reward_model_as_we_do(tmp_path, data, sft_folder):
    trl, datasets = map(pytest.importorskip, ("trl", "datasets"))
    cfg = run(reward_config(data, sft_folder, tmp_path / "rm", lr=3e-3))
    rows = datasets.load_dataset("json", data_files=str(data / "pairs.jsonl"), split="train")
    size = dict(per_device_eval_batch_size=4, learning_rate=0.0)
    trainer = trl.RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(cfg.out), train_dataset=rows,
        args=trl.RewardConfig(str(tmp_path / "trl"), **TRL, **size), eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(cfg.out),
    )  # fmt: skip
    found, ours = trainer.evaluate(), eval_of(cfg.out)
    assert found["eval_loss"] == pytest.approx(ours["loss"], abs=1e-4)
    assert found["eval_accuracy"] == pytest.approx(ours["accuracy"], abs=1e-6)
