"""Tiny models, tokenizers and data for all tests, made on the spot: nothing is downloaded."""

import json
import os
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import tqdm.auto
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import ppo  # noqa: E402
import rejection_sample  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402

torch.set_num_threads(1)

SENTENCES = [
    "What is the capital of France? The capital is Paris.",
    "Please tell me a story about the sea. Once there was a boat on the sea.",
    "How do I boil an egg? Put it into hot water and wait.",
    "你好。今天天气怎么样？",
]

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; left out by -m 'not slow'")

def make_tokenizer(vocab_size=320):
    return sft.new_tokenizer(SENTENCES * 4, vocab_size)

def make_llama(vocab_size, seed=0, **settings):
    sizes = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(sizes | settings)))

def save(folder, *things):
    """A model and its tokenizer."""
    for thing in things:
        thing.save_pretrained(folder)
    return folder

@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with a saved tiny Llama and its tokenizer; read it only."""
    return save(tmp_path_factory.mktemp("tiny"), make_llama(320), make_tokenizer())

QUESTIONS = ["What is the capital?", "tell me a story", "boil an egg", "the sea", "你好", "How?"]
ANSWERS = ["The capital is Paris.", "Once there was a boat.", "Put it into hot water.", "wait"]
RULES = """
def letters(response):
    return sum(c.isascii() and c.isalpha() for c in response)

def score(prompts, responses):
    return [letters(r) for r in responses]

def share(prompts, responses):
    return [letters(r) / max(1, len(r)) for r in responses]

def constant(prompts, responses):
    return [1 for r in responses]
"""

def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

def chat(role, content):
    return [dict(role=role, content=content)]

def write_data(folder):
    """A small file of each kind; `turns` holds chat messages."""
    answered = [(q, ANSWERS[i % 4]) for i, q in enumerate(QUESTIONS * 2)]
    write(folder / "sft.jsonl", [dict(prompt=q, completion=a) for q, a in answered])
    write(folder / "pairs.jsonl", [dict(prompt=q, chosen=a, rejected="egg") for q, a in answered])
    scored = [dict(prompt=q, response=a, score=len(a) / 10) for q, a in answered]
    write(folder / "scores.jsonl", scored)
    ranked = [dict(prompt=q, responses=[a, "egg", "no"], ranks=[1, 2, 3]) for q, a in answered]
    write(folder / "lists.jsonl", ranked)
    write(folder / "prompts.jsonl", [dict(prompt=q) for q in QUESTIONS])
    write(folder / "eval_prompts.jsonl", [dict(prompt=q + " Please") for q in QUESTIONS[:3]])
    turns = [dict(messages=chat("user", q) + chat("assistant", a)) for q, a in answered]
    write(folder / "turns.jsonl", turns)
    write(folder / "chat_prompts.jsonl", [dict(prompt=chat("user", q)) for q in QUESTIONS])
    (folder / "rule.py").write_text(RULES)
    return folder

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder of `write_data`; read it only."""
    return write_data(tmp_path_factory.mktemp("data"))

STAGES = dict(sft=sft, reward=reward, ppo=ppo, rejection_sample=rejection_sample)

def config_of(name, own, files, folder, out, **flags):
    """A short run of a stage on the CPU: its Config."""
    if name in ("sft", "reward"):
        path = str(files / dict(sft="sft.jsonl", reward="pairs.jsonl")[name])
        settings = dict(model=str(folder), data=path, eval_data=path, steps=3, lr=1e-2)
    else:
        settings = dict(policy=str(folder), reward_fn=f"{files / 'rule.py'}:score")
        settings |= dict(data=str(files / "prompts.jsonl"), steps=2, lr=1e-3)
        settings |= dict(eval_data=str(files / "eval_prompts.jsonl"))
    settings |= dict(batch_size=4, warmup=0, device="cpu", out=str(out))
    return STAGES[name].Config(**(settings | own | flags))

PPO = dict(max_new_tokens=6, lr_schedule="constant", sample_every=0)
REJECTION = dict(n=8, num_samples=4, max_new_tokens=40, batch_size=2, epochs=10.0)
OWN = dict(sft={}, reward={}, ppo=PPO, rejection_sample=REJECTION)
CONFIGS = {name: partial(config_of, name, own) for name, own in OWN.items()}
sft_config, reward_config, ppo_config, rejection_sample_config = CONFIGS.values()

def run(cfg):
    """Run the stage of a Config, and return that."""
    sys.modules[type(cfg).__module__].main(cfg)
    return cfg

def flags_of(cfg):
    """A Config as the flags that make it."""
    flags = []
    for name, value in vars(cfg).items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not False and value != "":
            flags += [f"--{name}", str(value)]
    return flags

@pytest.fixture(scope="session")
def sft_folder(tmp_path_factory, data, tiny_folder):
    return Path(run(sft_config(data, tiny_folder, tmp_path_factory.mktemp("stages") / "sft")).out)

@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory, data, sft_folder):
    out = tmp_path_factory.mktemp("stages") / "reward"
    return Path(run(reward_config(data, sft_folder, out, steps=10)).out)

def strict(text):
    """JSON as other languages read it: no NaN, no Infinity (they would divide 1 by 0)."""
    return json.loads(text, parse_constant=lambda name: 1 / 0)

def rows_of(out, name="metrics"):
    text = (Path(out) / f"{name}.jsonl").read_text(encoding="utf-8")
    return [strict(line) for line in text.split("\n") if line]  # text may hold U+2028

def eval_of(out):
    return strict((Path(out) / "eval.json").read_text(encoding="utf-8"))

def letters(text):
    return sum(c.isascii() and c.isalpha() for c in text)

def weights_of(out):
    return load_file(Path(out) / "model.safetensors")

def plain_logprobs(lm, tokenizer, prompt, response, temperature=1.0):
    """log pi of the response's tokens and of EOS, by one forward of plain transformers."""
    x = tokenizer(prompt)["input_ids"]
    y = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    logits = lm(input_ids=torch.tensor([x + y])).logits[0, len(x) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(y)), y]

def after(patch, thing, name, act):
    """act(*arguments) will follow each call of thing.name."""
    original = getattr(thing, name)
    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        act(*args, **kwargs)
        return result

    patch.setattr(thing, name, call)

@pytest.fixture
def updates(monkeypatch):
    """Of each update of a stage, the weights and the gradient before it is clipped."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_
    def keep(parameters, *args, **kwargs):
        parameters = [p for p in parameters if p.grad is not None]
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        seen.append((torch.nn.utils.parameters_to_vector(parameters).detach(), gradient))
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    return seen

@pytest.fixture
def asked(monkeypatch):
    """Each question to a stage's rewards: (model or None, rows, responses' ids, scores)."""
    load, seen = common.load_score, []
    def recorded(*args, **kwargs):
        score, model = load(*args, **kwargs)
        return lambda *q: seen.append((model, *q, score(*q))) or seen[-1][-1], model

    monkeypatch.setattr(common, "load_score", recorded)
    return seen

def fork():
    """os.fork with a lock for tqdm that is the child's own: processes share the usual one, and a
    child killed inside it holds it for good."""
    for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):  # transformers uses the second
        bar.monitor_interval = 0
        if bar.monitor is not None:
            bar.monitor.exit()
            bar.monitor = None
        bar.set_lock(threading.RLock())
    return os.fork() or torch.set_num_threads(1) or 0  # torch's pool anew, before two threads do
