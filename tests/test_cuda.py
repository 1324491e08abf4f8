"""What only a GPU can show: graphs, compiled layers, bfloat16. Skipped where there is none."""

import copy

import pytest
import torch
from conftest import eval_of, make_llama, rows_of, write
from test_common import EOS, PROMPTS, plain_greedy

import common
import ppo

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = torch.device("cuda")


def cuda_llama(seed=0):
    return make_llama(60, seed, initializer_range=0.3).to(DEVICE)


def test_graphs_are_captured_and_greedy_equals_model_generate(capsys):
    model = cuda_llama()
    expected = [row for p in PROMPTS for row in on_cuda_greedy(model, [p])]
    for slots in (6, 2):
        assert common.generate(model, PROMPTS, 12, EOS, temperature=0, slots=slots) == expected
    assert model.kept_slots.graphs and "no CUDA graph" not in capsys.readouterr().out


def on_cuda_greedy(model, prompts):
    return plain_greedy(copy.deepcopy(model).cpu(), prompts, 12, [EOS])


def test_a_kept_graph_sees_new_weights():
    model, other = cuda_llama(), cuda_llama(5)
    common.generate(model, PROMPTS, 12, EOS, temperature=0)
    common.copy_weights(other, model)
    found = common.generate(model, PROMPTS, 12, EOS, temperature=0)
    assert found == on_cuda_greedy(other, PROMPTS)


def test_sampled_log_probs_are_those_of_the_training_forward():
    model = cuda_llama()
    generator = torch.Generator(DEVICE).manual_seed(0)
    responses, logprobs = common.generate(
        model, PROMPTS * 20, 12, EOS, slots=16, generator=generator, logprobs=True
    )
    examples = [common.join(p, r) for p, r in zip(PROMPTS * 20, responses)]
    batch = common.collate(examples, range(len(examples)), DEVICE)
    with torch.no_grad():
        expected = common.response_logprobs(model, batch)  # under bfloat16 autocast
    gap = (common.pad_right(logprobs, DEVICE) - expected).abs()
    assert common.masked_mean(gap, batch.mask) < 0.05
    first = torch.bincount(torch.tensor([r[0] for r in responses]), minlength=60)
    assert (first > 0).sum() > 10  # the noise changes from replay to replay


def test_compiled_layers_generate_the_same_and_never_run_eagerly():
    model = cuda_llama()
    expected = common.generate(model, PROMPTS, 12, EOS, temperature=0)
    model = cuda_llama()
    common.has_plain_head(model)
    common.compile_layers(model, "on")
    assert common.generate(model, PROMPTS, 12, EOS, temperature=0) == expected
    assert torch._dynamo.config.fail_on_recompile_limit_hit


@pytest.mark.parametrize("compile", ["off", "on"])
def test_ppo_starts_at_ratio_one_and_learns(tmp_path, data, tiny_folder, compile):
    (tmp_path / "rule.py").write_text((data / "rule.py").read_text())
    write(tmp_path / "prompts.jsonl", [dict(prompt=p) for p in ("the sea", "How?", "an egg")] * 9)
    cfg = ppo.Config(
        policy=str(tiny_folder), reward_fn=f"{tmp_path / 'rule.py'}:share",
        data=str(tmp_path / "prompts.jsonl"), out=str(tmp_path / "ppo"), steps=8, batch_size=32,
        max_new_tokens=6, lr=2e-2, value_lr=1e-2, kl_coef=0.0, missing_eos_penalty=0.0, warmup=0,
        sample_every=0, compile=compile, ppo_epochs=2,
    )  # fmt: skip
    ppo.main(cfg)
    rows = rows_of(cfg.out)
    assert rows[-1]["score"] > rows[0]["score"] + 0.2
    assert abs(rows[0]["kl"]) < 0.05 and rows[0]["sampler_gap"] < 0.05
    assert eval_of(cfg.out)["score_after"] > eval_of(cfg.out)["score_before"]
