"""tests/check.py passes sound models of eight families, and notices what is broken."""

import check
import pytest
import torch
from conftest import make_llama, make_tokenizer, reward_config, run, save
from test_common import CONFIGS
from transformers import AutoModelForCausalLM

import common

@pytest.mark.parametrize("family", ["llama", *CONFIGS])
def test_sound_models_pass(family, tmp_path, capsys):
    tokenizer = make_tokenizer()
    rows = len(tokenizer) + 8  # to spare: for a Qwen2, transformers gives any tokenizer one more id
    config = CONFIGS[family]() if family in CONFIGS else make_llama(1).config
    config.update(dict(vocab_size=rows))
    torch.manual_seed(0)
    save(tmp_path, AutoModelForCausalLM.from_config(config), tokenizer)
    assert check.main(["--policy", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("  ok  ") == 13 and "FAIL" not in out and "slowly" not in out

def test_a_sound_reward_model_passes(tmp_path, data, tiny_folder, capsys):
    cfg = run(reward_config(data, tiny_folder, tmp_path / "reward"))
    assert check.main(["--reward", cfg.out]) == 0
    assert capsys.readouterr().out.count("  ok  ") == 3

def left(rows):
    """Padding on the left, unnoticed by the mask."""
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows])

def late(sampler, kv, logits=common.Sampler.logits):
    """The sampler's cache is off by one."""
    sampler.length -= 1
    found = logits(sampler, kv)
    sampler.length += 1
    return found

def without_eos(*args, encode=common.encode, **more):
    return {key: values[:-1] for key, values in encode(*args, **more).items()}

def head_with_dropout(policy, hidden):
    return policy.lm.get_output_embeddings()(torch.nn.functional.dropout(hidden, 0.1))

@pytest.mark.parametrize("place, name, broken, expected", [
    (common, "pad_right", left, ["padding: "]), (common, "encode", without_eos, ["no stop token"]),
    (common.Sampler, "logits", late, ["sampling: ", "greedy"]),
    (common.Policy, "head", head_with_dropout, ["ratio", "KL"]),
])  # fmt: skip
def test_a_fault_is_noticed(place, name, broken, expected, tiny_folder, monkeypatch, capsys):
    policy = common.load_policy(tiny_folder, torch.device("cpu"))  # before the fault
    monkeypatch.setattr(common, "load_policy", lambda *args: policy)
    assert check.main(["--policy", str(tiny_folder)]) == 0
    monkeypatch.setattr(place, name, broken)
    capsys.readouterr()
    assert check.main(["--policy", str(tiny_folder)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert all(word in " ".join(failed) for word in expected)
