"""What goes wrong and what is left then: bad input, stops, kills, a full disk, NaN."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    CONFIGS,
    ROOT,
    STAGES,
    eval_of,
    flags_of,
    make_llama,
    rows_of,
    sft_config,
    weights_of,
    write,
)
from transformers import AutoTokenizer

import common

torch.set_num_threads(1)

CLOCK = """seconds peak_memory_gib rollout_seconds score_seconds update_seconds
    rollout_tokens_per_s score_tokens_per_s update_tokens_per_s""".split()


# bad input: one line, exit 2, nothing written


def command_line(monkeypatch, name, cfg, *more):
    """Run a stage the way `python name.py` does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags_of(cfg), *more])
    try:
        common.command_line(STAGES[name].Config, STAGES[name].main, STAGES[name].__doc__)
    except SystemExit as end:
        return end.code
    return 0


BAD = [
    ("sft", dict(model="nowhere/at/all"), "nowhere/at/all"),
    ("sft", dict(shard=True), "--shard: for several processes"),
    ("rejection_sample", dict(prompt="hi", shard=True), "--prompt: in one process"),
    ("sft", dict(data="missing.jsonl"), "missing.jsonl"),
    ("sft", dict(data="broken.jsonl"), "broken.jsonl:2"),
    ("sft", dict(data="empty.jsonl"), "empty.jsonl"),
    ("sft", dict(data="prompts.jsonl"), "prompts.jsonl:1"),
    ("sft", dict(eval_data="prompts.jsonl"), "prompts.jsonl:1"),
    ("sft", dict(data="one.jsonl", eval_data=""), "--eval_data"),
    ("sft", dict(max_length=2), "2 tokens"),
    ("sft", dict(model="NOEOS"), "EOS"),
    ("sft", dict(model="data"), "data"),
    ("sft", dict(model="CUT"), "CUT: no model to load"),
    ("sft", dict(model="UNFIT"), "UNFIT: no model to load"),
    ("sft", dict(model="", lora_rank=4), "--lora_rank"),
    ("sft", dict(lora_rank=-1), "--lora_rank"),
    ("sft", dict(data="typed.jsonl"), 'typed.jsonl:1: "prompt"'),
    ("sft", dict(data="blank.jsonl"), 'blank.jsonl:1: "prompt" is empty'),
    ("sft", dict(data="silent.jsonl"), 'silent.jsonl:1: "completion" is empty'),
    ("sft", dict(data="array.jsonl"), "array.jsonl:1"),
    ("sft", dict(lr=-1e-3), "--lr"),
    ("sft", dict(keep=0), "--keep"),
    ("sft", dict(lr=0.0), "--lr"),
    ("sft", dict(batch_size=0), "--batch_size"),
    ("sft", dict(device="abacus"), "--device"),
    ("reward", dict(model="nowhere/at/all"), "nowhere/at/all"),
    ("reward", dict(data="lists.jsonl"), "--loss"),
    ("reward", dict(loss="bradley"), "--loss"),
    ("reward", dict(data="ties.jsonl", loss="listwise"), "ties.jsonl"),
    ("reward", dict(epochs=0.0), "--epochs"),
    ("reward", dict(data="ranks.jsonl", loss="listwise"), 'ranks.jsonl:1: "ranks"'),
    ("reward", dict(data="nan.jsonl", loss="pointwise"), 'nan.jsonl:1: "score"'),
    ("ppo", dict(policy="nowhere/at/all"), "nowhere/at/all"),
    ("ppo", dict(policy="REWARD"), "causal"),
    ("ppo", dict(reward="SFT", reward_fn=""), "reward model"),
    ("ppo", dict(value="SFT"), "reward model"),
    ("ppo", dict(ref="REWARD"), "causal"),
    ("ppo", dict(data="scores_only.jsonl"), "scores_only.jsonl:1"),
    ("ppo", dict(batch_size=4, minibatches=3), "--minibatches"),
    ("ppo", dict(temperature=0.0), "--temperature"),
    ("ppo", dict(cliprange=0.0), "--cliprange"),
    ("ppo", dict(device="cuda:99"), "--device"),
    ("ppo", dict(max_new_tokens=256), "--max_new_tokens"),
    ("ppo", dict(objective="trpo"), "--objective"),
    ("ppo", dict(reward_fn="nowhere.py:score"), "nowhere.py:score"),
    ("ppo", dict(reward_fn="rule.py:nothing"), "nothing"),
    ("ppo", dict(reward_fn="rules.py:raises"), "ZeroDivisionError"),
    ("ppo", dict(reward_fn="rules.py:too_few"), "finite scores"),
    ("ppo", dict(reward_fn="rules.py:not_finite"), "finite scores"),
    ("ppo", dict(gold_fn="rules.py:raises"), "ZeroDivisionError"),
    ("ppo", dict(ptx_coef=0.1, ptx_data="prompts.jsonl"), "prompts.jsonl:1"),
    ("ppo", dict(max_prompt_tokens=1), "prompts"),
    ("rejection_sample", dict(policy="REWARD"), "causal"),
    ("rejection_sample", dict(reward="SFT", reward_fn=""), "reward model"),
    ("rejection_sample", dict(data="missing.jsonl"), "missing.jsonl"),
    ("rejection_sample", dict(data="scores_only.jsonl"), "scores_only.jsonl:1"),
    ("rejection_sample", dict(pairs="prompts.jsonl"), "prompts.jsonl:1"),
    ("rejection_sample", dict(pairs="pairs.jsonl", max_length=3), "pairs"),
    ("rejection_sample", dict(pairs="pairs.jsonl", loss="none"), "--loss"),
    ("rejection_sample", dict(method="rso", num_samples=8), "--num_samples"),
    ("rejection_sample", dict(method="rso", n=3), "--num_samples"),
    ("rejection_sample", dict(method="rso", rso_beta=0.0), "--rso_beta"),
    ("rejection_sample", dict(beta=-0.1), "--beta"),
    ("rejection_sample", dict(n=-1), "--n"),
    ("rejection_sample", dict(loss="slic"), "--loss"),
    ("rejection_sample", dict(rank="last_round"), "--rank"),
    ("rejection_sample", dict(gold_fn="rules.py:raises"), "ZeroDivisionError"),
    ("rejection_sample", dict(prompt="hello", reward_fn="rules.py:raises"), "ZeroDivisionError"),
]


def cut_weights(folder):
    """As an interrupted download leaves them."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def widen(folder):
    """A config that does not fit its weights."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(intermediate_size=65)))


@pytest.mark.parametrize("name, flags, says", BAD)
def test_bad_input_is_one_line_and_nothing_written(
    tmp_path, data, sft_folder, reward_folder, monkeypatch, capsys, name, flags, says
):
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (tmp_path / "empty.jsonl").write_text("\n")
    write(tmp_path / "one.jsonl", [dict(prompt="a", completion="b")])
    write(tmp_path / "ties.jsonl", [dict(prompt="a", responses=["b", "c"], ranks=[1, 1])])
    write(tmp_path / "scores_only.jsonl", [dict(score=1)])
    write(tmp_path / "typed.jsonl", [dict(prompt=5, completion="b")])
    write(tmp_path / "blank.jsonl", [dict(prompt=" ", completion="b")])
    write(tmp_path / "silent.jsonl", [dict(prompt="a", completion="")])
    (tmp_path / "array.jsonl").write_text("[1, 2]\n")
    write(tmp_path / "ranks.jsonl", [dict(prompt="a", responses=["b", "c"], ranks=[1, 2, 3])])
    write(tmp_path / "nan.jsonl", [dict(prompt="a", response="b", score=float("nan"))])
    no_eos = AutoTokenizer.from_pretrained(sft_folder)
    no_eos.eos_token = None
    no_eos.save_pretrained(tmp_path / "NOEOS")
    for name_of, spoil in (("CUT", cut_weights), ("UNFIT", widen)):
        shutil.copytree(sft_folder, tmp_path / name_of)
        spoil(tmp_path / name_of)
    (tmp_path / "data").mkdir()
    (tmp_path / "rules.py").write_text(
        "raises = lambda prompts, responses: [1 / 0]\n"
        "too_few = lambda prompts, responses: [1.0]\n"
        "not_finite = lambda prompts, responses: [float('nan') for r in responses]\n"
    )
    folders = dict(SFT=str(sft_folder), REWARD=str(reward_folder))
    flags = {k: folders.get(v, v) for k, v in flags.items()}
    monkeypatch.chdir(tmp_path)
    cfg = CONFIGS[name](tmp_path, sft_folder, tmp_path / "out", **flags)
    assert command_line(monkeypatch, name, cfg) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert error.startswith(f"{name}.py: ") and says in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, flags, says",
    [
        ("sft", ["--data", "missing.jsonl"], "missing.jsonl: no such file"),
        ("reward", ["--model", "nowhere", "--lr", "-1"], "--lr -1.0"),
        ("ppo", ["--reward_fn", "rule.py", "--policy", "/no/where"], "/no/where: no tokenizer"),
    ],
)
def test_bad_input_from_a_shell(tmp_path, name, flags, says):
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout.count("Traceback")
    assert done.stderr.startswith(f"{name}.py: ") and says in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", STAGES)
def test_an_unknown_flag_is_one_line_and_exit_2(
    tmp_path, data, sft_folder, monkeypatch, capsys, name
):
    cfg = CONFIGS[name](data, sft_folder, tmp_path / "out")
    for flag in ("--learning_rate", "--ste"):  # no such flag; no abbreviations
        assert command_line(monkeypatch, name, cfg, flag, "1") == 2
        out, error = capsys.readouterr()
        assert error.startswith(f"{name}.py: ") and flag in error and out == ""
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# the run folder


def test_an_existing_run_is_refused_and_overwritten(
    tmp_path, data, tiny_folder, monkeypatch, capsys
):
    cfg = sft_config(data, tiny_folder, tmp_path / "out", steps=1)
    assert command_line(monkeypatch, "sft", cfg) == 0
    before = weights_of(cfg.out)
    for more in (dict(), dict(resume=True)):  # a finished run has nothing to resume
        capsys.readouterr()
        assert command_line(monkeypatch, "sft", replace(cfg, seed=1, **more)) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and str(cfg.out) in error
        if not more:
            assert all(flag in error for flag in ("--resume", "--overwrite", "--out"))
    assert command_line(monkeypatch, "sft", replace(cfg, resume=True)) == 2
    assert "finished" in capsys.readouterr().err
    after = weights_of(cfg.out)
    assert all(torch.equal(before[name], after[name]) for name in before)

    assert command_line(monkeypatch, "sft", replace(cfg, seed=1, overwrite=True)) == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["seed"] == 1
    after = weights_of(cfg.out)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_folder_that_holds_no_run_is_never_replaced(
    tmp_path, data, tiny_folder, monkeypatch, capsys
):
    (tmp_path / "thesis.txt").write_text("years of work")
    cfg = sft_config(data, tiny_folder, tmp_path, overwrite=True)
    assert command_line(monkeypatch, "sft", cfg) == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def interrupt_after(patch, step, crash=False):
    """From now on a run is sent Ctrl-C (or dies) when it logs `step`."""
    log = common.Run.log

    def log_and_stop(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == step:
            if crash:
                raise RuntimeError("power cut")
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(common.Run, "log", log_and_stop)


# Everything that a checkpoint could forget: warm-up, adapted coefficients, ptx.
STOPPED = dict(
    sft=dict(steps=5, warmup=2, epochs=3.0),
    reward=dict(steps=5, warmup=2, epochs=3.0),
    ppo=dict(
        steps=5, warmup=2, objective="kl", kl_target=1.0, kl_horizon=20, beta_target=1e-9,
        ppo_epochs=2, minibatches=2, ptx_coef=0.1, lr_schedule="linear",
    ),
    rejection_sample=dict(steps=5, warmup=2),
)  # fmt: skip


@pytest.fixture(scope="module", params=STAGES)
def whole(request, tmp_path_factory, data, sft_folder, reward_folder):
    """A stage, and its run that nothing stopped."""
    name = request.param
    flags = STOPPED[name] | dict(save_every=2)
    if name == "ppo":
        flags |= dict(ptx_data=str(data / "sft.jsonl"), reward_fn="", reward=str(reward_folder))
    out = tmp_path_factory.mktemp("whole") / name
    cfg = CONFIGS[name](data, sft_folder, out, **flags)
    STAGES[name].main(cfg)
    return name, cfg


def assert_same(name, whole, parts):
    """The two runs left the same weights, metrics, results and files, but for what a kill right
    after eval.json leaves: --resume says that the run is finished, and clears it away.
    """
    with pytest.raises(common.UserError, match="this run is finished"):
        STAGES[name].main(replace(parts, resume=True))
    a, b = weights_of(whole.out), weights_of(parts.out)
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    assert eval_of(whole.out) == eval_of(parts.out)
    rows = [[{k: v for k, v in row.items() if k not in CLOCK} for row in rows_of(cfg.out)]
            for cfg in (whole, parts)]  # fmt: skip
    assert rows[0] and rows[0] == rows[1]
    names = [{path.name for path in Path(cfg.out).iterdir()} for cfg in (whole, parts)]
    assert names[0] == names[1]
    if name in ("ppo", "rejection_sample"):
        assert rows_of(whole.out, "samples") == rows_of(parts.out, "samples")


@pytest.mark.parametrize("crash, step", [(False, 3), (False, 5), (True, 1), (True, 3)])
def test_stopped_and_resumed_is_bit_for_bit_the_same(tmp_path, whole, monkeypatch, crash, step):
    """Checkpoints at 2 and 4: Ctrl-C in the middle and in the last step, a crash before the first
    checkpoint and after it (its step 3 is in the log already, and is run again)."""
    name, whole = whole
    parts = replace(whole, out=str(tmp_path / name))
    main, handler = STAGES[name].main, signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_after(patch, step, crash)
        with pytest.raises(RuntimeError if crash else SystemExit) as end:
            main(parts)
    assert crash or end.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(rows_of(parts.out)) == step and not (tmp_path / name / "eval.json").exists()
    with pytest.raises(common.UserError, match="--resume"):
        main(parts)
    with pytest.raises(common.UserError, match="seed"):
        main(replace(parts, resume=True, seed=7))
    main(replace(parts, resume=True))

    assert_same(name, whole, parts)


def fail_at(patch, point):
    """The second checkpoint, or the end of the run, fails at a `point`."""
    calls = dict(save=0, rmtree=0, replace=0)

    def failing(name, original, number, when=lambda *args: True):
        def call(*args, **kwargs):
            if when(*args):
                calls[name] += 1
                if calls[name] == number:
                    raise RuntimeError("power cut")
            return original(*args, **kwargs)

        return call

    if point == "while the checkpoint is written":
        patch.setattr(torch, "save", failing("save", torch.save, 2))
    elif point == "before the old checkpoint goes":
        old = lambda path, **kwargs: Path(path).name == "checkpoint-2"  # noqa: E731
        patch.setattr(common.shutil, "rmtree", failing("rmtree", common.shutil.rmtree, 1, old))
    elif point == "while the model is put in place":
        last = lambda a, b: Path(a).parent.name == "model.tmp"  # noqa: E731
        patch.setattr(os, "replace", failing("replace", os.replace, 2, last))


@pytest.mark.parametrize("point", [
    "while the checkpoint is written", "before the old checkpoint goes",
    "while the model is put in place",
])  # fmt: skip
def test_a_crash_while_files_are_written_loses_nothing(tmp_path, whole, monkeypatch, point):
    name, whole = whole
    parts = replace(whole, out=str(tmp_path / name))
    with monkeypatch.context() as patch:
        fail_at(patch, point)
        with pytest.raises(RuntimeError, match="power cut"):
            STAGES[name].main(parts)
    assert not (tmp_path / name / "eval.json").exists()
    STAGES[name].main(replace(parts, resume=True))
    assert_same(name, whole, parts)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(tmp_path, whole):
    """20 SIGKILLs, wherever they fall: start-up, steps, saving, the end."""
    name, whole = whole
    parts = replace(whole, out=str(tmp_path / name), resume=True)
    rng, kills, seconds = random.Random(name), 0, 10.0
    while kills < 20:
        command = [sys.executable, str(ROOT / f"{name}.py"), *flags_of(parts)]
        start = time.perf_counter()
        run = subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS="1"))
        try:
            run.wait(timeout=rng.uniform(0.4, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
        else:
            assert run.returncode == 0
            seconds = time.perf_counter() - start
        if (tmp_path / name / "eval.json").exists():
            assert_same(name, whole, parts)
            shutil.rmtree(tmp_path / name)  # from the start again


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(
    tmp_path, whole, monkeypatch, capsys
):
    name, whole = whole
    parts = replace(whole, out=str(tmp_path / name))
    save, calls = torch.save, []

    def full(thing, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(thing, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert command_line(patch, name, parts) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"{name}.py: no space left") and "--resume" in error
    assert (tmp_path / name / "checkpoint-2/state.pt").exists()
    assert not (tmp_path / name / "checkpoint-4").exists()
    STAGES[name].main(replace(parts, resume=True))
    assert_same(name, whole, parts)


def test_keep_holds_on_to_so_many_checkpoints(tmp_path, data, tiny_folder, monkeypatch):
    cfg = sft_config(data, tiny_folder, tmp_path / "out", steps=9, epochs=9.0, save_every=2, keep=2)
    left = []
    finish = common.Run.finish

    def look(self, *args):
        left.extend(path.name for path in self.checkpoints())
        finish(self, *args)

    monkeypatch.setattr(common.Run, "finish", look)
    STAGES["sft"].main(cfg)
    assert left == ["checkpoint-6", "checkpoint-8"] and not list(Path(cfg.out).glob("checkpoint*"))


# numbers that are not finite


def test_a_step_that_is_not_finite_touches_no_weight(tmp_path):
    model = torch.nn.Linear(3, 1)
    optimizer = common.make_adamw(model, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    cfg = STAGES["sft"].Config(out=str(tmp_path))
    for value in (torch.inf, torch.nan):
        model(torch.tensor([[1.0, value, 1.0]])).sum().backward()
        with pytest.raises(common.UserError, match="grad_norm"):
            common.optimizer_step(model, optimizer, dict(loss=torch.ones(())), [[5]], cfg)
        optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert not optimizer.state
        assert json.loads((tmp_path / "nonfinite.json").read_text())["ids"] == [[5]]
    model(torch.ones(1, 3)).sum().backward()
    stats = common.optimizer_step(model, optimizer, dict(loss=torch.ones(())), [[5]], cfg)
    assert stats["loss"] == 1 and stats["grad_norm"] == pytest.approx(2.0)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", STAGES)
def test_a_run_that_diverges_stops_with_one_line(
    tmp_path, data, sft_folder, monkeypatch, capsys, name
):
    cfg = CONFIGS[name](data, sft_folder, tmp_path / "out", lr=1e30, steps=4, save_every=1)
    if name == "ppo":
        cfg = replace(cfg, max_grad_norm=1e30)
    assert command_line(monkeypatch, name, cfg) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"{name}.py: ") and "not finite" in error
    assert len(rows_of(cfg.out)) < 4
    found = json.loads((tmp_path / "out/nonfinite.json").read_text())
    assert found["ids"] and all(isinstance(ids, list) for ids in found["ids"])


def test_ctrl_c_before_the_steps_is_one_line(tmp_path, data, tiny_folder, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load_policy", interrupted)
    assert command_line(monkeypatch, "sft", sft_config(data, tiny_folder, tmp_path / "out")) == 130
    assert capsys.readouterr().err == "sft.py: stopped\n"


def test_a_rule_that_draws_from_the_global_generators_resumes_the_same(
    tmp_path, data, sft_folder, monkeypatch
):
    rule = tmp_path / "noisy.py"
    rule.write_text(
        "import random, numpy, torch\n"
        "def score(prompts, responses):\n"
        "    noise = lambda: random.random() + numpy.random.rand() + torch.rand(()).item()\n"
        "    return [noise() for r in responses]\n"
    )
    cfg = CONFIGS["ppo"](data, sft_folder, tmp_path / "whole", steps=4, reward_fn=f"{rule}:score")
    STAGES["ppo"].main(cfg)
    parts = replace(cfg, out=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(SystemExit):
            STAGES["ppo"].main(parts)
    STAGES["ppo"].main(replace(parts, resume=True))
    scores = [[row["score"] for row in rows_of(run.out)] for run in (cfg, parts)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", STAGES)
def test_out_of_memory_is_one_line_with_the_plan_and_what_helps(
    tmp_path, data, sft_folder, monkeypatch, capsys, name
):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(common, "optimizer_step", no_memory)
    assert command_line(monkeypatch, name, CONFIGS[name](data, sft_folder, tmp_path / "out")) == 2
    out, error = capsys.readouterr()
    plan = next(line for line in out.splitlines() if line.startswith("memory, GiB: "))
    line = error.strip().splitlines()[-1]
    assert "2.00 GiB" in line and plan in line and "--micro_tokens" in line


def test_the_memory_plan_counts_what_is_there(capsys):
    model, cfg = make_llama(60), STAGES["ppo"].Config(micro_tokens=2**20)
    half = make_llama(60).bfloat16()
    common.print_memory_plan(torch.device("cpu"), cfg, [model, model], [half], half, 2**20)
    numbers = [float(x) for x in re.findall(r"[0-9.]+[0-9]", capsys.readouterr().out)]
    P = sum(p.numel() for p in model.parameters())
    kv = 2**20 * 2 * 2 * 2 * 8 * 2  # tokens, K and V, layers, groups, head size, bytes
    activations = 2**20 * 2 * (18 * 32 + 6 * 64)  # layers, hidden and intermediate size
    parts = [(4 + 4 + 2) * P, 4 * P, 16 * P, kv, activations]
    assert numbers == pytest.approx([x / 2**30 for x in [*parts, sum(parts)]], abs=0.006)


@pytest.mark.parametrize("compile", ["off", pytest.param("on", marks=pytest.mark.slow)])
@pytest.mark.parametrize("inner", [168, 372])  # SmolLM2's and Qwen2.5-1.5B's proportions
def test_the_rule_of_thumb_for_activations_is_what_autograd_keeps(inner, compile):
    """What a second sequence adds to the bytes saved for the backward: of the layers alone."""
    sizes = dict(hidden_size=64, intermediate_size=inner, num_hidden_layers=3)
    model = make_llama(60, **sizes)
    common.use_causal_attention(model)
    common.compile_layers(model, compile)

    def saved(B):
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.arange(256 * B).view(B, 256) % 60
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.sum().backward()
        return sum(storages.values())

    measured = (saved(4) - saved(2)) / 512
    rule = common.activation_bytes(model, checkpointing=False)
    assert 0.8 < measured / rule / (1.5 if compile == "off" else 1) < 1.25


@pytest.mark.slow  # it trains the embedded world's first steps
def test_sigterm_reaches_a_stage_that_ppo_started(tmp_path):
    """It went on alone once, without its parent."""
    command = [sys.executable, str(ROOT / "ppo.py"), "--device", "cpu"]
    run = subprocess.Popen(command, cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS="1"))
    metrics = tmp_path / "out/sft/metrics.jsonl"
    end = time.time() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < end:
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 143
    assert list((tmp_path / "out/sft").glob("checkpoint-*/state.pt"))
    size = metrics.stat().st_size
    time.sleep(2)
    assert metrics.stat().st_size == size  # nobody writes any more


def test_demonstrations_for_ptx_are_cut_to_the_context(tmp_path, data, sft_folder, capsys):
    long = [dict(prompt="the sea", completion="boat " * 400)]
    write(tmp_path / "long.jsonl", long + [dict(prompt="the sea", completion="boat")] * 4)
    flags = dict(ptx_coef=0.1, ptx_data=str(tmp_path / "long.jsonl"))
    STAGES["ppo"].main(CONFIGS["ppo"](data, sft_folder, tmp_path / "out", **flags))
    assert "1 of 5 demonstrations left out: longer than 256 tokens" in capsys.readouterr().out
