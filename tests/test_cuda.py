"""What only a GPU can show: graphs, compiled layers, bfloat16. Skipped where there is none."""

import copy

import pytest
import torch
from check import plain_greedy
from conftest import eval_of, make_llama, ppo_config, rows_of, write

import common
import ppo

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = torch.device("cuda")
PROMPTS = [[5, 6, 7, 8, 9], [11], [12, 13, 14], [15, 3, 4, 18, 19, 20, 21, 22], [30, 31], [40, 7]]
EOS, NEW, LONGEST = 2, 12, 20

def cuda_policy(seed=0):
    return common.Policy(make_llama(60, seed, initializer_range=0.3).to(DEVICE), LONGEST)

def greedy_on_cpu(policy):
    return plain_greedy(copy.deepcopy(policy.lm).cpu(), PROMPTS, NEW, [EOS])

def test_graphs_are_captured_and_see_new_weights(capsys):
    policy, other = cuda_policy(), cuda_policy(5)
    first, second = greedy_on_cpu(policy), greedy_on_cpu(other)
    sampler = common.Sampler(policy, [EOS], NEW, LONGEST, temperature=0, slots=4)
    for _ in range(2):  # the second time every step is replayed
        assert sampler(PROMPTS)[0] == first != second
    sampler.sync(other)
    assert sampler(PROMPTS)[0] == second
    assert sampler.use_graphs and sampler.graphs and "CUDA graph" not in capsys.readouterr().out
    sampler.close()
    assert common.generate(policy.lm, PROMPTS, NEW, EOS, temperature=0, slots=2) == second

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_log_probs_are_those_of_the_training_forward(dtype):
    policy = cuda_policy()
    pi_old = policy if dtype == torch.float32 else common.sampling_copy(policy, ppo.Config())
    assert pi_old.lm.dtype == dtype and policy.lm.dtype == torch.float32
    sampler = common.Sampler(pi_old, [EOS], NEW, LONGEST, slots=16)
    responses, logprobs = sampler(PROMPTS * 20, torch.Generator(DEVICE).manual_seed(0))
    batch = common.collate(list(map(common.join, PROMPTS * 20, responses)), DEVICE)
    with torch.no_grad():
        expected, _ = policy(batch)  # under bfloat16 autocast
    gaps = torch.tensor(sum(logprobs, [])) - expected[batch["mask"].bool()].cpu()
    assert gaps.abs().mean() < 0.05
    assert len({tuple(r) for r in responses}) > 100  # the noise changes with every replay

def test_compiled_layers_generate_the_same_and_never_run_eagerly():
    policy = common.prepare(cuda_policy(), ppo.Config(compile="on"))
    sampler = common.Sampler(policy, [EOS], NEW, LONGEST, temperature=0, slots=4)
    # What cannot be compiled, or not often enough, is an error here, not a slower run.
    strict = dict(suppress_errors=False, fail_on_recompile_limit_hit=True)
    with torch._dynamo.config.patch(strict):
        assert sampler(PROMPTS)[0] == greedy_on_cpu(policy)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0

@pytest.mark.parametrize("mode", [dict(compile="off"), dict(compile="on"), dict(lora_rank=8)])
def test_ppo_starts_at_ratio_one_and_learns(tmp_path, data, tiny_folder, mode):
    write(tmp_path / "some.jsonl", [dict(prompt=p) for p in ("the sea", "How?", "an egg")] * 9)
    flags = dict(steps=8, batch_size=32, lr=2e-2, value_lr=1e-2, kl_coef=0.0, ppo_epochs=2)
    flags |= dict(reward_fn=f"{data / 'rule.py'}:share", missing_eos_penalty=0.0)
    flags |= dict(data=str(tmp_path / "some.jsonl"), device="auto")
    out = tmp_path / "ppo"
    ppo.main(ppo_config(data, tiny_folder, out, **flags | mode))
    rows, results = rows_of(out), eval_of(out)
    assert abs(rows[0]["kl"]) < 0.05 < rows[-1]["kl"] and rows[0]["sampler_gap"] < 0.05
    if "lora_rank" not in mode:  # adapters learn little of a model that knows nothing
        assert rows[-1]["score"] > rows[0]["score"] + 0.2
        assert results["score_after"] > results["score_before"]
