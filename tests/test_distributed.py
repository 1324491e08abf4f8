"""Several processes, as torchrun starts them, against one: gloo on the CPU."""

import copy
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import CONFIGS, ROOT, STAGES, after, eval_of, flags_of, fork, rows_of, run
from conftest import weights_of
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

import common

MODES = pytest.mark.parametrize("lora", [{}, dict(lora_rank=4)], ids=["full", "lora"])

def start(world, main):
    """`main()` in `world` processes; their process ids."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    children = []
    for rank in range(world):
        child = fork()
        if child:
            children.append(child)
            continue
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=port)
        code = 1
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            os.write(2, f"rank {rank}: {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return children

def codes(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

def run_in(world, cfg):
    return codes(start(world, partial(run, cfg)))

@pytest.fixture
def greedy(monkeypatch):
    """Sampling that does not depend on which process draws: what is compared is all the rest."""
    zero = property(lambda sampler: 0, lambda sampler, temperature: None)
    monkeypatch.setattr(common.Sampler, "temperature", zero, raising=False)

@pytest.fixture
def case(data, sft_folder, reward_folder):
    """A function: case(name, out, **flags) -> a Config, with small micro-batches."""
    ppo = dict(ptx_coef=0.1, ptx_data=str(data / "sft.jsonl"), kl_target=0.5, reward_fn="")
    special = dict(sft={}, reward=dict(loss="listwise", data=str(data / "lists.jsonl")))
    special |= dict(rejection_sample=dict(pairs=str(data / "pairs.jsonl")))
    special |= dict(ppo=ppo | dict(reward=str(reward_folder)))
    def make(name, out, **flags):
        flags = dict(batch_size=4, steps=3, lr=3e-4, micro_tokens=40) | special[name] | flags
        return CONFIGS[name](data, sft_folder, out, **flags)

    return make

def check_weights(one, many, tolerance=1e-5):
    a, b = weights_of(one.out), weights_of(many.out)
    assert set(a) == set(b)
    assert max((a[key] - b[key]).abs().max() for key in a) <= tolerance

@MODES
@pytest.mark.parametrize("name", [*STAGES, "ppo group"])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_processes_end_as_one(tmp_path, case, greedy, name, lora, world):
    name, *group = name.split()
    flags = lora | (dict(advantage="group", group=2) if group else {})
    one, many = (case(name, tmp_path / out, **flags) for out in ("one", "many"))
    run(one)
    assert run_in(world, many) == [0] * world
    check_weights(one, many)
    # The first accuracy of the preference step is that of margins which are 0 but for rounding.
    skip = ("second", "tokens_per_s", "sampler_gap", "accuracy")
    for x, y in zip(rows_of(one.out), rows_of(many.out), strict=True):
        assert set(x) == set(y)
        for key in x:
            if not any(word in key for word in skip):
                assert x[key] == pytest.approx(y[key], rel=2e-3, abs=2e-5), key
    for key, value in eval_of(one.out).items():
        assert eval_of(many.out)[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key

def test_rejection_sampling_gathers_everybodys_answers(tmp_path, case, greedy):
    flags = dict(pairs="", n=3, loss="none")
    one, many = (case("rejection_sample", tmp_path / out, **flags) for out in ("one", "many"))
    run(one)
    assert run_in(2, many) == [0, 0]
    for name in ("candidates", "eval_candidates", "samples", "sft"):
        assert rows_of(one.out, name) == rows_of(many.out, name)

def test_processes_draw_different_answers(tmp_path, case):
    """They share the seed, and must not share the noise."""
    (tmp_path / "same.jsonl").write_text('{"prompt": "the sea"}\n' * 8)
    flags = dict(pairs="", data=str(tmp_path / "same.jsonl"), n=4, loss="none", temperature=2.0)
    cfg = case("rejection_sample", tmp_path / "out", **flags)
    assert run_in(2, cfg) == [0, 0]
    answers = [str(r) for row in rows_of(cfg.out, "candidates") for r in row["responses"]]
    assert len(set(answers)) == len(answers) == 32

def test_more_processes_than_prompts(tmp_path, case):
    """One has no share: it must not call the reward function with nothing."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "the sea"}\n')
    (tmp_path / "rule.py").write_text("def score(p, r): return [max(map(len, r))] * len(r)\n")
    flags = dict(eval_data=str(tmp_path / "one.jsonl"), reward_fn=f"{tmp_path / 'rule.py'}:score")
    assert run_in(2, case("ppo", tmp_path / "ppo", reward="", **flags)) == [0, 0]
    flags |= dict(data=str(tmp_path / "one.jsonl"), pairs="", n=1, loss="none")
    assert run_in(2, case("rejection_sample", tmp_path / "rs", **flags)) == [0, 0]

def test_a_batch_that_does_not_divide_by_the_processes_is_refused(tmp_path, case, capfd):
    assert run_in(2, case("sft", tmp_path / "out", batch_size=3)) == [1, 1]
    assert "UserError: --batch_size: 3 a step, not for 2 proc" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()

@MODES
def test_one_signal_stops_all_and_any_number_goes_on(tmp_path, case, greedy, lora, monkeypatch):
    """After the same step; as many processes end bit for bit as if nothing had been."""
    flags = dict(ppo_epochs=1, max_new_tokens=3, save_every=0, **lora)
    two, same, fewer, more = (case("ppo", tmp_path / out, **flags) for out in "abcd")
    assert run_in(2, two) == [0, 0]
    save = torch.save
    def stop(run, *args, **kwargs):
        if run.step == 2 and common.rank() == common.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        after(patch, common.Run, "log", stop)
        patch.setattr(torch, "save", lambda *args: time.sleep(0.5) or save(*args))
        first, second = start(2, partial(run, same))
        assert codes([second]) == [143] and (tmp_path / "b/checkpoint.pt").exists()
        os.kill(first, signal.SIGTERM)  # as torchrun does as soon as one has ended
        assert codes([first]) == [143]
        with pytest.raises(SystemExit):
            run(more)
    shutil.copytree(same.out, fewer.out)
    run(replace(fewer, resume=True))
    assert run_in(2, replace(same, resume=True)) == [0, 0]
    assert run_in(2, replace(more, resume=True)) == [0, 0]
    check_weights(two, same, tolerance=0)
    check_weights(two, fewer)
    check_weights(two, more)

SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
KINDS = dict(
    tied=LlamaConfig(**SIZES, tie_word_embeddings=True), untied=LlamaConfig(**SIZES),
    gpt2=GPT2Config(**SIZES, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    capped=Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0),
)

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_holds_parts_and_gives_the_same(tmp_path, case, kind, checkpointing):
    """The gradients of plain transformers; what is copied and saved is what was learned."""
    examples = [common.join([5, 6, 7], [8, 2]), common.join([4], [9, 9, 9, 2])] * 2
    cfg = case("sft", tmp_path / "out", gradient_checkpointing=checkpointing)
    def compare():
        common.choose_device("cpu")
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(KINDS[kind]).train()
        policy = common.Policy(copy.deepcopy(plain))
        copied = common.sampling_copy(policy, cfg)
        optimizer, calls = common.make_optimizer(policy, cfg, 1e-3), []
        layers = [m for name, m in policy.named_modules() if name.endswith(".mlp")]
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
        for part in common.micro_batches(range(4), [5] * 4, 5):  # two for each process
            (-policy(common.collate([examples[i] for i in part]))[0].sum()).backward()
        assert len(calls) == 2 * len(layers) * (1 + checkpointing) == 4 * (1 + checkpointing)
        batch = common.collate(examples)
        logits = plain(input_ids=batch["ids"], use_cache=False).logits[:, :-1]
        logprobs = common.token_logprobs(logits, batch["ids"][:, 1:])
        (-(logprobs * batch["mask"][:, 1:]).sum()).backward()
        for a, b in zip(plain.parameters(), policy.parameters(), strict=True):
            assert (a.grad - b.grad.full_tensor()).abs().max() < 1e-5
            assert 0.4 * a.numel() <= b.to_local().numel() <= 0.6 * a.numel()
        optimizer.step()
        learned = [p.full_tensor() for p in policy.parameters()]
        common.Sampler(copied, [2], 2, 8, slots=1).sync(policy)
        common.save_model(policy, tmp_path / "saved")
        common.gather([])
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        for lm in (copied.lm, saved):
            assert all(map(torch.equal, learned, lm.parameters()))
        assert len(learned) == len(list(saved.parameters()))

    assert codes(start(2, compare)) == [0, 0]

@MODES
def test_every_model_is_in_parts_and_bfloat16_where_frozen(tmp_path, case, lora, monkeypatch):
    """As on a GPU: float32 for what is trained, bfloat16 for frozen models and the sampler's."""
    models, dtypes = [], (torch.bfloat16, torch.float32)
    def check(*args, **kwargs):
        assert len(models) == (2 if lora else 4)
        for name, parameter in (x for model in models for x in model.named_parameters()):
            assert isinstance(parameter, DTensor), name
            if "score" not in name:
                assert parameter.dtype == dtypes[parameter.requires_grad], name

    after(monkeypatch, common, "prepare", lambda m, cfg, shard=True: models.extend([m] * shard))
    after(monkeypatch, common.Run, "log", check)
    monkeypatch.setattr(common, "weight_dtype", lambda _, frozen: dtypes[not frozen])
    monkeypatch.setattr(common, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    assert run_in(2, case("ppo", tmp_path / "out", steps=2, **lora)) == [0, 0]
    assert all(x.dtype == torch.float32 for x in weights_of(tmp_path / "out").values())

@pytest.mark.slow
def test_by_torchrun(tmp_path, case):
    """The command of README; only the first process prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*torchrun, ROOT / "sft.py", *flags_of(case("sft", tmp_path / "out"))]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SFT on") == done.stdout.count("held-out loss") == 1
    assert done.stderr.count(" 0/3 ") == 1 and "Warning" not in done.stderr
    assert (tmp_path / "out/eval.json").exists()
