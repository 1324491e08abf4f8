"""Several processes, as torchrun starts them, against one: gloo on the CPU."""

import contextlib
import copy
import io
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CONFIGS,
    ROOT,
    STAGES,
    eval_of,
    flags_of,
    fork,
    make_llama,
    rows_of,
    weights_of,
)
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

import common
from common import UserError


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


def start(world, main):
    """`main()` in `world` processes; their process ids."""
    port, children = free_port(), []
    for rank in range(world):
        child = fork()
        if child:
            children.append(child)
            continue
        os.environ |= dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
            MASTER_ADDR="localhost", MASTER_PORT=port,
        )  # fmt: skip
        code = 1
        try:
            with contextlib.redirect_stdout(io.StringIO()):
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


@pytest.fixture
def greedy(monkeypatch):
    """Sampling that does not depend on which process draws: what is compared is all the rest."""
    generate = common.generate

    def certain(model, prompts, max_new_tokens, eos, temperature, **kwargs):
        return generate(model, prompts, max_new_tokens, eos, 0, **kwargs)

    monkeypatch.setattr(common, "generate", certain)


def case(name, data, sft_folder, reward_folder, out):
    flags = dict(batch_size=4, steps=3)
    if name == "ppo":
        flags |= dict(
            reward_fn="", reward=str(reward_folder), minibatches=1, ptx_coef=0.1, kl_target=0.5,
            ptx_data=str(data / "sft.jsonl"), micro_tokens=30,
        )  # fmt: skip
    if name == "rejection_sample":  # from sampled answers there would be one pair a prompt at most
        flags |= dict(pairs=str(data / "pairs.jsonl"))
    if name == "reward":
        flags |= dict(loss="listwise", data=str(data / "lists.jsonl"), micro_tokens=40)
    return CONFIGS[name](data, sft_folder, out, **flags)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_processes_end_with_the_weights_of_one(
    tmp_path, data, sft_folder, reward_folder, greedy, name, shard, world
):
    one = case(name, data, sft_folder, reward_folder, tmp_path / "one")
    STAGES[name].main(one)
    many = replace(one, out=str(tmp_path / "many"), shard=shard)
    assert codes(start(world, partial(STAGES[name].main, many))) == [0] * world
    a, b = weights_of(one.out), weights_of(many.out)
    assert set(a) == set(b)
    for key in a:
        assert (a[key] - b[key]).abs().max() < 1e-5, key
    rows = rows_of(one.out), rows_of(many.out)
    assert len(rows[0]) == len(rows[1]) == 3
    clock = ("second", "tokens_per_s", "memory", "sampler_gap")
    for x, y in zip(*rows):
        assert set(x) == set(y)
        # In the preference step's first step the margins are 0 but for rounding, and so are signs.
        skip = (*clock, "accuracy") if x["step"] == 1 else clock
        for key in x:
            if not any(word in key for word in skip):
                assert x[key] == pytest.approx(y[key], rel=2e-3, abs=2e-5), key
    for key, value in eval_of(one.out).items():
        assert eval_of(many.out)[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_rejection_sampling_gathers_everybodys_answers(tmp_path, data, sft_folder, greedy):
    cfg = CONFIGS["rejection_sample"](data, sft_folder, tmp_path / "one", n=2, loss="none")
    STAGES["rejection_sample"].main(cfg)
    many = replace(cfg, out=str(tmp_path / "many"))
    assert codes(start(2, partial(STAGES["rejection_sample"].main, many))) == [0, 0]
    for name in ("candidates", "eval_candidates", "samples", "sft"):
        assert rows_of(cfg.out, name) == rows_of(many.out, name)


def test_processes_draw_different_answers(tmp_path, data, sft_folder):
    """They share the seed, and must not share the noise."""
    same = data / "same.jsonl"
    same.write_text('{"prompt": "the sea"}\n' * 8)
    cfg = CONFIGS["rejection_sample"](
        data, sft_folder, tmp_path / "out", data=str(same), n=4, loss="none", temperature=2.0
    )
    assert codes(start(2, partial(STAGES["rejection_sample"].main, cfg))) == [0, 0]
    answers = [row["responses"] for row in rows_of(cfg.out, "candidates")]
    assert len({str(responses) for responses in answers}) == 8


@pytest.mark.parametrize("shard", [False, True])
def test_processes_with_unequally_many_different_answers(
    tmp_path, data, sft_folder, reward_folder, shard, monkeypatch
):
    """Equal answers are scored once, so one process had fewer to score, and a sharded reward model
    waited for it in vain.
    """

    def generate(model, prompts, *args, **kwargs):
        return [[5 + i % 30 * common.rank(), 2] for i in range(len(prompts))]

    monkeypatch.setattr(common, "generate", generate)
    cfg = CONFIGS["rejection_sample"](
        data, sft_folder, tmp_path / "out", reward_fn="", reward=str(reward_folder), shard=shard,
        micro_tokens=16, loss="none",
    )  # fmt: skip
    assert codes(start(2, partial(STAGES["rejection_sample"].main, cfg))) == [0, 0]
    different = [len({str(r) for r in row["responses"]}) for row in rows_of(cfg.out, "candidates")]
    assert different == [1, 8] * 3


def test_more_processes_than_prompts(tmp_path, data, sft_folder):
    """One has no share: it must not call the reward function with nothing."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "the sea"}\n')
    (tmp_path / "rule.py").write_text(
        "def score(prompts, responses):\n    return [max(map(len, responses))] * len(responses)\n"
    )
    flags = dict(eval_data=str(tmp_path / "one.jsonl"), reward_fn=f"{tmp_path / 'rule.py'}:score")
    cfg = CONFIGS["ppo"](data, sft_folder, tmp_path / "ppo", **flags)
    assert codes(start(2, partial(STAGES["ppo"].main, cfg))) == [0, 0]
    cfg = CONFIGS["rejection_sample"](data, sft_folder, tmp_path / "rs", **flags, n=2, slots=2)
    assert codes(start(2, partial(STAGES["rejection_sample"].main, cfg))) == [0, 0]


def test_one_process_without_slots_does_not_put_the_others_out_of_step(tmp_path, data, sft_folder):
    """What `generate` falls back to depends on the longest prompt of a process's share."""
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(sft_folder)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, sliding_window=24)
    config = MistralConfig(
        vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **sizes,
        max_position_embeddings=256, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    prompts = ["the sea " * 12, "the"]
    rows = "".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text(rows)
    cfg = CONFIGS["ppo"](
        data, tmp_path / "m", tmp_path / "out", data=str(tmp_path / "prompts.jsonl"), batch_size=2,
        eval_data=str(tmp_path / "prompts.jsonl"),
    )  # fmt: skip
    assert codes(start(2, partial(STAGES["ppo"].main, cfg))) == [0, 0]
    assert "sampler_gap" not in rows_of(cfg.out)[0]


@pytest.mark.parametrize("shard", [False, True])
def test_a_signal_to_one_stops_all_after_the_same_step_and_resume_goes_on(
    tmp_path, data, sft_folder, reward_folder, greedy, shard, monkeypatch
):
    cfg = case("ppo", data, sft_folder, reward_folder, tmp_path / "many")
    cfg = replace(cfg, steps=6, save_every=0, shard=shard)
    log = common.Run.log

    def stop_at_two(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == 2 and common.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", stop_at_two)
        assert codes(start(2, partial(STAGES["ppo"].main, cfg))) == [143, 143]
    assert (tmp_path / "many/checkpoint-2/state.pt").exists()
    assert codes(start(2, partial(STAGES["ppo"].main, replace(cfg, resume=True)))) == [0, 0]
    one = replace(cfg, out=str(tmp_path / "one"), shard=False)
    STAGES["ppo"].main(one)
    a, b = weights_of(one.out), weights_of(cfg.out)
    assert all((a[key] - b[key]).abs().max() < 1e-5 for key in a)
    assert [row["step"] for row in rows_of(cfg.out)] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_sharded_models_is_whole(tmp_path, data, sft_folder, monkeypatch):
    """What several processes began, one goes on with, and the other way round."""
    cfg = CONFIGS["sft"](data, sft_folder, tmp_path / "whole", steps=4, save_every=2)
    STAGES["sft"].main(cfg)
    log = common.Run.log

    def cut(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == 3:
            raise SystemExit(3)

    begin, end = (partial(start, 2), True), (lambda main: main(), False)
    for out, (first, sharded), (then, still) in (("a", begin, end), ("b", end, begin)):
        parts = replace(cfg, out=str(tmp_path / out), shard=sharded)
        with monkeypatch.context() as patch:
            patch.setattr(common.Run, "log", cut)
            if sharded:
                assert codes(first(partial(STAGES["sft"].main, parts))) == [3, 3]
            else:
                with pytest.raises(SystemExit):
                    first(partial(STAGES["sft"].main, parts))
        parts = replace(parts, shard=still, resume=True)
        children = then(partial(STAGES["sft"].main, parts))
        assert not still or codes(children) == [0, 0]
        a, b = weights_of(cfg.out), weights_of(parts.out)
        assert set(a) == set(b)
        assert max((a[key] - b[key]).abs().max() for key in a) < 1e-5


KINDS = {
    "tied": (LlamaConfig, dict(tie_word_embeddings=True)),
    "untied": (LlamaConfig, dict(tie_word_embeddings=False)),
    "gpt2": (
        GPT2Config,
        dict(n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    ),
    "capped": (Gemma2Config, dict(head_dim=8, final_logit_softcapping=2.0)),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_holds_parts_and_gives_the_same(kind, checkpointing, capfd):
    config_class, settings = KINDS[kind]
    sizes = dict(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    sizes = {} if config_class is GPT2Config else sizes
    config = config_class(**(sizes | dict(vocab_size=60) | settings))
    examples = [common.join([5, 6, 7], [8, 2]), common.join([4], [9, 9, 9, 2])] * 2

    def compare():
        common.choose_device("cpu")
        flags = dict(gradient_checkpointing=checkpointing, compile="off", lora_rank=0)
        torch.manual_seed(0)
        whole = AutoModelForCausalLM.from_config(config).train()
        common.has_plain_head(whole)
        parts = copy.deepcopy(whole)
        models = {}
        for model, shard in ((whole, False), (parts, True)):
            optimizer = common.make_trainable(model, SimpleNamespace(**flags, shard=shard), 1e-2)
            models[model] = optimizer
        held = sum(common.own_part(p).numel() for p in parts.parameters())
        assert held <= 0.51 * sum(p.numel() for p in whole.parameters())
        run = SimpleNamespace(max_grad_norm=1.0, out="")
        for _ in range(3):
            norms = []
            for model, optimizer in models.items():
                for rows in common.share([[0], [1], [2], [3]]):
                    batch = common.collate(examples, rows, torch.device("cpu"))
                    (-common.response_logprobs(model, batch).sum()).backward()
                stats = common.optimizer_step(model, optimizer, {}, [], run)
                norms.append(stats["grad_norm"])
            assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        for a, b in zip(whole.parameters(), parts.parameters()):
            assert (a - common.whole(b)).abs().max() < 1e-5

    assert codes(start(2, compare)) == [0, 0], capfd.readouterr().err


def test_a_sharded_model_in_bfloat16_has_float32_log_probs_and_parts(capfd, monkeypatch):
    """As on a GPU: bfloat16 is for what is gathered, not for masks, weights and sums."""
    policy = partial(common.MixedPrecisionPolicy, torch.bfloat16, torch.float32)
    monkeypatch.setattr(common, "MixedPrecisionPolicy", policy)
    flags = SimpleNamespace(gradient_checkpointing=False, compile="off", lora_rank=0, shard=True)
    batch = common.collate([common.join([5, 6, 7], [8, 2])], [0], torch.device("cpu"))
    batch.mask[0, 1] = 1 / 3

    def compare():
        common.choose_device("cpu")
        model = make_llama(60)
        common.has_plain_head(model)
        with torch.no_grad():
            expected = common.response_logprobs(model, batch)
        common.make_trainable(model, flags, 1e-2)
        found = common.response_logprobs(model, batch)
        assert found.dtype == torch.float32 and batch.mask[0, 1].item() == pytest.approx(1 / 3)
        assert 0 < (found - expected).abs().max() < 0.1
        found.sum().backward()
        for parameter in model.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32

    assert codes(start(2, compare)) == [0, 0], capfd.readouterr().err


def test_shard_without_several_processes_or_with_lora_is_refused(tmp_path, data, sft_folder):
    cfg = CONFIGS["sft"](data, sft_folder, tmp_path / "out", shard=True)
    with pytest.raises(UserError, match="--shard: .* torchrun"):
        STAGES["sft"].main(cfg)

    def refused():
        with pytest.raises(UserError, match="--shard: .* without --lora_rank"):
            STAGES["sft"].main(replace(cfg, lora_rank=4))

    assert codes(start(2, refused)) == [0, 0]


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(tmp_path, data, sft_folder):
    cfg = CONFIGS["sft"](data, sft_folder, tmp_path / "out", batch_size=3)

    def refused():
        with pytest.raises(UserError, match="--batch_size: 3 sequences a step for 2 processes"):
            STAGES["sft"].main(cfg)

    assert codes(start(2, refused)) == [0, 0]
    assert not (tmp_path / "out").exists()


def test_none_leaves_before_the_checkpoint_is_whole(tmp_path, data, sft_folder, monkeypatch):
    """torchrun sends SIGTERM to the others as soon as one has ended."""
    cfg = CONFIGS["sft"](data, sft_folder, tmp_path / "out", save_every=0)
    log, save = common.Run.log, torch.save

    def stop(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == 2 and common.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def save_slowly(*args):
        time.sleep(1.5)
        save(*args)

    monkeypatch.setattr(common.Run, "log", stop)
    monkeypatch.setattr(torch, "save", save_slowly)
    first, second = start(2, partial(STAGES["sft"].main, cfg))
    assert codes([second]) == [143]
    os.kill(first, signal.SIGTERM)
    assert codes([first]) == [143]
    assert (tmp_path / "out/checkpoint-2/state.pt").exists()


@pytest.mark.slow
def test_by_torchrun(tmp_path, data, sft_folder):
    """The command of README; only one process prints."""
    cfg = CONFIGS["sft"](data, sft_folder, tmp_path / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    began = time.time()
    done = subprocess.run(
        [*command, str(ROOT / "sft.py"), *flags_of(cfg)], capture_output=True, text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1 and time.time() - began < 120
    assert (tmp_path / "out/eval.json").exists()


def test_share_and_gather_are_each_others_inverse():
    """In one process nothing happens; in several, `gather` undoes `share`."""
    rows = [random.Random(0).random() for _ in range(7)]
    assert common.share(rows) == rows and common.gather(rows) == rows

    def inverse():
        common.choose_device("cpu")
        for n in range(8):
            part = common.share(list(range(n)))
            assert len(part) == -(-n // 3)
            assert common.gather(part, n) == list(range(n))
        numbers = torch.tensor([1.0, 2.0])
        common.all_sum(numbers)
        assert numbers.tolist() == [3.0, 6.0]

    assert codes(start(3, inverse)) == [0, 0, 0]
