"""tests/check.py passes sound models of eight families, and notices what is broken."""

import check
import pytest
import torch
from conftest import make_llama, make_tokenizer, reward_config
from test_common import CONFIGS
from transformers import AutoModelForCausalLM

import common
import reward

FAMILIES = ["llama", *CONFIGS]


def make_model(family, tokenizer):
    torch.manual_seed(0)
    if family == "llama":
        return make_llama(len(tokenizer))
    config = CONFIGS[family]()
    config.update(dict(vocab_size=len(tokenizer)))
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_pass(family, tmp_path, capsys):
    tokenizer = make_tokenizer()
    make_model(family, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert check.main(["--policy", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("  ok  ") >= 11 and "FAIL" not in out and "sampling" in out


def test_a_sound_reward_model_passes(tmp_path, data, tiny_folder, capsys):
    reward.main(reward_config(data, tiny_folder, tmp_path / "reward"))
    assert check.main(["--reward", str(tmp_path / "reward")]) == 0
    assert capsys.readouterr().out.count("  ok  ") == 3


def failures(capsys, folder):
    code = check.main(["--policy", str(folder)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert code == (1 if lines else 0)
    return " ".join(lines)


def test_broken_ones_are_noticed(tiny_folder, monkeypatch, capsys):
    assert failures(capsys, tiny_folder) == ""

    with monkeypatch.context() as patch:  # padding on the left, unnoticed by the mask
        pad = common.pad_right

        def pad_left(rows, device):
            width = max(map(len, rows))
            return pad([[0] * (width - len(row)) + row for row in rows], device)

        patch.setattr(common, "pad_right", pad_left)
        assert "padding" in failures(capsys, tiny_folder)

    with monkeypatch.context() as patch:  # the sampler's cache is off by one
        decode = common.decode_logits

        def late(model, slots, kv):
            slots.length -= 1
            logits = decode(model, slots, kv)
            slots.length += 1
            return logits

        patch.setattr(common, "slots_agree", lambda model, ids: True)
        patch.setattr(common, "decode_logits", late)
        found = failures(capsys, tiny_folder)
        assert "sampling" in found and "greedy" in found

    with monkeypatch.context() as patch:  # answers without their EOS
        patch.setattr(common, "encode_response", lambda t, p, r, where="": common.plain_ids(t, r))
        assert "stop token" in failures(capsys, tiny_folder)

    with monkeypatch.context() as patch:  # dropout left on
        load = common.load_policy

        def noisy(*args):
            model = load(*args)
            head = model.get_output_embeddings()
            head.register_forward_pre_hook(lambda _, x: torch.nn.functional.dropout(x[0], 0.1))
            return model

        patch.setattr(common, "load_policy", noisy)
        assert "ratio" in failures(capsys, tiny_folder)


def test_what_is_no_model_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="check.py: .*no model"):
        check.main(["--policy", str(tmp_path)])
    with pytest.raises(SystemExit):
        check.main([])
