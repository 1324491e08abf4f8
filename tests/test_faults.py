"""What goes wrong and what is left then: bad input, stops, kills, a full disk, NaN."""

import fcntl
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import CONFIGS, ROOT, STAGES, eval_of, flags_of, rows_of, run, sft_config
from conftest import weights_of, write

import common

def command_line(monkeypatch, cfg, *more):
    """Run a stage the way `python name.py` does; returns its exit code."""
    stage = sys.modules[type(cfg).__module__]
    monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *flags_of(cfg), *more])
    try:
        common.command_line(stage.Config, stage.main, stage.__doc__)
    except SystemExit as end:
        return end.code
    return 0

@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(cfg, *flags) -> the one line of a stage that ends with exit code 2."""

    def end(cfg, *more, begun=False):  # there may be progress before it
        capsys.readouterr()
        assert command_line(monkeypatch, cfg, *more) == 2
        error, name = capsys.readouterr().err.strip().splitlines(), type(cfg).__module__
        assert error[-1].startswith(f"{name}.py: ") and (begun or len(error) == 1), error
        return error[-1]

    return end

BAD = [
    ("sft", "--model nowhere/at/all", "nowhere/at/all"),
    ("sft", "--model CUT", "CUT: SafetensorError"),
    ("sft", "--model= --lora_rank 4", "--lora_rank"),
    ("sft", "--data missing.jsonl", "missing.jsonl: FileNotFoundError"),
    ("sft", "--data prompts.jsonl", "prompts.jsonl:1"),
    ("sft", "--resume --overwrite", "give one of them"),
    ("ppo", "--gold_fn rule.py", "expected file.py:function"),
    ("sft", "--out rule.py", "File exists: 'rule.py'"),
    ("sft", "--out MINE", "is not empty, and its run.json"),
    ("sft", "--out THEIRS --overwrite", "is not empty, and its run.json"),
    ("ppo", "--policy REWARD", "Classification, where a causal"),
    ("ppo", "--ptx_coef 0.1 --ptx_data prompts.jsonl", "prompts.jsonl:1"),
    ("ppo", "--batch_size 4 --minibatches 3", "--minibatches"),
    ("ppo", "--device cuda:99", "--device"),
    ("ppo", "--reward_fn nowhere.py:score", "nowhere.py: FileNotFoundError"),
    ("ppo", "--reward_fn rule.py:nothing", "rule.py: KeyError: 'nothing'"),
    ("ppo", "--reward_fn rules.py:raises", "rules.py:2: ZeroDivisionError"),
    ("ppo", "--reward_fn rules.py:not_finite", "expected 3 finite scores"),
    ("ppo", "--reward_fn rules.py:leaves", "rules.py:4: SystemExit: bye"),
    ("ppo", "--reward_fn leaves.py:score", "leaves.py:2: SystemExit: bye"),
    ("ppo", "--reward_fn rules.py:starves", "Tried to allocate 2.00 GiB."),
    ("ppo", "--gold_fn rules.py:raises", "rules.py:2: ZeroDivisionError"),
    ("rejection_sample", "--pairs prompts.jsonl", "prompts.jsonl:1"),
    ("rejection_sample", "--pairs pairs.jsonl --loss none", "--loss"),
    ("rejection_sample", "--pairs pairs.jsonl --prompt hi", "--prompt"),
    ("rejection_sample", "--method rso --num_samples 8", "--num_samples"),
    ("rejection_sample", "--n 1", "--n 1"),
    ("rejection_sample", "--prompt hi --reward_fn rules.py:raises", "ZeroDivisionError"),
]
LIMITS = """sft lr 0.0, sft lr -1e-3, sft lr inf, sft lr nan, sft lr fast, sft lora_rank -1,
    sft save_every -1, sft batch_size 0, sft device abacus, reward epochs 0, reward loss bradley,
    ppo temperature 0, ppo cliprange 0, ppo gamma 1.01, ppo lam -0.1, ppo objective trpo,
    rejection_sample rso_beta 0, rejection_sample n -1, ppo seed -1, rejection_sample beta -0.1,
    rejection_sample loss slic, rejection_sample rank last_round, sft learning_rate 1, ppo ste 1"""
for name, flag, value in map(str.split, LIMITS.split(",")):
    BAD.append((name, f"--{flag} {value}", f"--{flag}"))
RULES = """import os, random, signal, time, numpy, torch
raises = lambda prompts, responses: [1 / 0]
not_finite = lambda prompts, responses: [float('nan') for r in responses]
leaves = lambda prompts, responses: exit('bye')
def starves(prompts, responses):
    raise torch.OutOfMemoryError('Tried to allocate 2.00 GiB.')
def spoils(prompts, responses):
    scores = [len(r) for r in responses]
    for prompt in prompts:
        prompt[0]['content'] = 'spoilt'
    prompts.clear(), responses.clear()
    return scores
unspoilt = lambda p, r: ['spoilt' not in str(p) and len(p) == len(r)] * len(r)
def noisy(prompts, responses):
    step = len(prompts) == 4  # a step's batch, not the 3 held-out prompts
    noise = step and random.random() + numpy.random.rand() + torch.rand(()).item()
    return [len(r) + noise for r in responses]
def slow(prompts, responses):
    for pause in [1.1, 1.1] if len(prompts) == 4 else []:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(pause)
    return [1.0 for r in responses]
"""

@pytest.fixture(scope="module")
def bad(tmp_path_factory, data, sft_folder, reward_folder):
    """A folder with the good files and some that are not; read it only."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(data, folder, dirs_exist_ok=True)
    for path in (folder / "THEIRS/run.json", folder / "MINE/metrics.jsonl"):
        path.parent.mkdir()
        path.write_text('{"out": "of another program"}')
    (folder / "rules.py").write_text(RULES)
    (folder / "leaves.py").write_text("import sys\nsys.exit('bye')\n")
    for name, model in dict(SFT=sft_folder, REWARD=reward_folder, CUT=sft_folder).items():
        shutil.copytree(model, folder / name)
    os.truncate(folder / "CUT/model.safetensors", 1000)  # as an interrupted download leaves it
    return folder

@pytest.mark.parametrize("name, flags, says", BAD)
def test_bad_input_is_one_line(tmp_path, bad, monkeypatch, refused, name, flags, says):
    """And nothing is written."""
    monkeypatch.chdir(bad)
    before = set(bad.rglob("*.*"))
    cfg = CONFIGS[name](bad, bad / "SFT", tmp_path / "out")
    assert says in refused(cfg, *flags.split())
    assert set(bad.rglob("*.*")) - set(bad.glob("*/*.pyc")) == before - set(bad.glob("*/*.pyc"))
    assert not (tmp_path / "out").exists()

def test_a_finished_run_says_what_to_type(tmp_path, data, tiny_folder, monkeypatch, refused):
    cfg = sft_config(data, tiny_folder, tmp_path / "out", steps=1)
    assert command_line(monkeypatch, cfg) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for more in ([], ["--resume"]):
        line = refused(replace(cfg, seed=1), *more)
        assert f"{cfg.out} holds a finished run" in line
        assert "--overwrite" in line and "another --out" in line
    refused(replace(cfg, data="missing.jsonl"), "--overwrite")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert command_line(monkeypatch, replace(cfg, seed=1), "--overwrite") == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["seed"] == 1
    assert before["model.safetensors"] != (tmp_path / "out/model.safetensors").read_bytes()

def test_overwrite_removes_the_runs_own_files_and_no_other(tmp_path, data, tiny_folder, refused):
    out = tmp_path / "out"
    cfg = run(CONFIGS["rejection_sample"](data, tiny_folder, out, overwrite=True))
    link = tmp_path / "link.jsonl"
    link.symlink_to(out / "dpo.jsonl")
    mine = dict.fromkeys(["notes.txt", "my/sft.jsonl", "mymodel.safetensors"], "years of work")
    mine["rule.py"] = (data / "rule.py").read_text()
    (out / "my").mkdir()
    for name, text in mine.items():
        (out / name).write_text(text)
    rule = f"{out / 'rule.py'}:score"
    for flag, path in dict(policy=out, data=out / "sft.jsonl", pairs=link, reward_fn=rule).items():
        line = refused(replace(cfg, **{flag: str(path)}))
        assert "it holds what this run reads" in line and link.exists()
    (out / "vocab.txt").write_text("stale")  # of another tokenizer
    run(replace(cfg, method="rso"))
    assert {name: (out / name).read_text() for name in mine} == mine and link.exists()
    assert not (out / "sft.jsonl").exists() and not (out / "vocab.txt").exists()

def test_a_second_start_is_one_line(tmp_path, bad, monkeypatch, refused):
    cfg, lines = sft_config(bad, bad / "SFT", tmp_path / "out", steps=3), []
    def start_two():
        lines.extend(refused(cfg, flag, begun=True) for flag in ("--resume", "--overwrite"))

    act_at(monkeypatch, common.Run, "log", 2, start_two)
    run(cfg)
    assert len(lines) == 2 and all("another run is writing there" in line for line in lines)
    assert len(rows_of(cfg.out)) == 3 and eval_of(cfg.out)

def test_of_two_at_once_the_later_one_touches_nothing(tmp_path, bad, monkeypatch, refused):
    """Both find no folder; while the second one loads its model the first one begins."""
    cfg = sft_config(bad, bad / "SFT", tmp_path / "out", steps=1)
    act_at(monkeypatch, common, "load_tokenizer", 1, partial(run, cfg))
    assert cfg.out in refused(replace(cfg, seed=1), begun=True)
    assert json.loads((tmp_path / "out/run.json").read_text())["seed"] == 0 and eval_of(cfg.out)

def act_at(patch, thing, name, call, act, file="", before=False):
    """Something will happen at the end, or at the beginning, of the `call`th call of thing.name (of
    those whose last argument is a path to `file`)."""
    original, calls = getattr(thing, name), itertools.count(1)
    def call_and_act(*args, **kwargs):
        now = file in ("", Path(str(args[-1])).name) and next(calls) == call
        if now and before:
            act()
        result = original(*args, **kwargs)
        if now and not before:
            act()
        return result

    patch.setattr(thing, name, call_and_act)

def power_cut():
    raise KeyboardInterrupt  # no Exception: nothing in the scripts catches it

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore
ctrl_c, sigterm = (partial(os.kill, os.getpid(), n) for n in (signal.SIGINT, signal.SIGTERM))
ENDS = {ctrl_c: "SystemExit(130)", sigterm: "SystemExit(143)", power_cut: "KeyboardInterrupt()"}

def how_it_ends(cfg):
    """What ended the stage, as text: the exception itself would keep the run and its lock."""
    try:
        run(cfg)
    except (SystemExit, KeyboardInterrupt, common.UserError) as end:
        return repr(end)

@pytest.fixture(scope="module", params=STAGES)
def whole(request, tmp_path_factory, bad):
    """A stage's run that nothing stopped, with everything that a checkpoint could forget: warm-up,
    adapted coefficients, ptx, a rule that draws numbers of its own."""
    name = request.param
    flags = dict(
        sft=dict(epochs=3.0), reward=dict(epochs=3.0), ppo=dict(
            objective="kl", kl_target=1.0, kl_horizon=20, beta_target=1e-9, ppo_epochs=2,
            minibatches=2, ptx_coef=0.1, ptx_data=str(bad / "sft.jsonl"), lr_schedule="linear",
            reward_fn=f"{bad / 'rules.py'}:noisy", value_warmup=3,  # first checkpoint inside it
        ), rejection_sample=dict(slots=4, reward_fn="", reward=str(bad / "REWARD")),
    )[name] | dict(steps=5, warmup=2, save_every=2)  # fmt: skip
    return run(CONFIGS[name](bad, bad / "SFT", tmp_path_factory.mktemp("whole") / name, **flags))

@pytest.fixture
def parts(tmp_path, whole):
    """The same in another folder."""
    return replace(whole, out=str(tmp_path / "parts"))

def assert_same(whole, parts):
    """The two runs left the same weights, metrics, results and files, but for the checkpoint that a
    kill right after eval.json leaves."""
    assert "holds a finished run" in how_it_ends(replace(parts, resume=True))
    a, b = weights_of(whole.out), weights_of(parts.out)
    assert set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)
    assert eval_of(whole.out) == eval_of(parts.out)
    rows = [[{k: v for k, v in row.items() if "seconds" not in k and "_per_s" not in k}
             for row in rows_of(cfg.out)] for cfg in (whole, parts)]  # fmt: skip
    assert rows[0] and rows[0] == rows[1]
    names = [{path.name for path in Path(cfg.out).iterdir()} - {"checkpoint.pt"}
             for cfg in (whole, parts)]  # fmt: skip
    assert names[0] == names[1]
    if "samples.jsonl" in names[0]:
        assert rows_of(whole.out, "samples") == rows_of(parts.out, "samples")

STEP, FILE = (common.Run, "log"), (os, "replace")  # a file counts once its name is the last one
ACCIDENTS = [(*STEP, 3, ctrl_c), (*STEP, 5, sigterm), (*STEP, 1, power_cut), (*STEP, 3, power_cut)]
for before in (True, False):
    ACCIDENTS.append((common, "save_model", 1, power_cut, "", before))
    for file in ("run.json", "checkpoint.pt", "eval.json"):  # of the checkpoints, the second one
        ACCIDENTS.append((*FILE, 1 + (file == "checkpoint.pt"), power_cut, file, before))

@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda a: " ".join(map(str, a[2:3] + a[4:])))
def test_stopped_and_resumed_is_bit_for_bit_the_same(whole, parts, monkeypatch, accident):
    """With checkpoints at 2 and 4; after a crash in step 3 that step is in the log twice."""
    out, handler = Path(parts.out), signal.getsignal(signal.SIGINT)
    act_at(monkeypatch, *accident)
    assert how_it_ends(parts) == ENDS[accident[3]]
    assert signal.getsignal(signal.SIGINT) is handler
    assert accident[1] != "log" or len(rows_of(out)) == accident[2]
    finished = (out / "eval.json").exists()
    assert finished == (accident[4:] == ("eval.json", False))
    if not finished and (out / "run.json").exists():
        assert "--resume" in how_it_ends(parts)
        assert "--seed was 0" in how_it_ends(replace(parts, resume=True, seed=7))
    if not finished:
        run(replace(parts, resume=True))
    assert_same(whole, parts)

@pytest.mark.parametrize("whole", ["rejection_sample"], indirect=True)
def test_stopped_while_it_samples(whole, parts, monkeypatch):
    """In the answers and in those to held-out prompts; then half a part and half a line lie there.
    Only what was not written, and they, are sampled again, to the same bytes."""
    stage, candidates = STAGES["rejection_sample"], Path(parts.out) / "candidates.jsonl"
    spy = Mock(wraps=stage.sample_and_score)
    monkeypatch.setattr(stage, "sample_and_score", spy)
    for call in (2, 3):
        act_at(monkeypatch, stage, "sample_and_score", call, ctrl_c)
        assert how_it_ends(replace(parts, resume=True)) == "KeyboardInterrupt()"
    candidates.write_bytes(b"".join(candidates.open("rb").readlines()[:5]) + b'{"pro')
    assert_same(whole, run(replace(parts, resume=True)))
    assert [len(call.args[2]) for call in spy.call_args_list] == [2, 2, 2, 2, 2, 2, 2, 1]
    for name in ("candidates", "eval_candidates", "sft", "dpo"):
        mine, theirs = (Path(cfg.out) / f"{name}.jsonl" for cfg in (parts, whole))
        assert mine.read_bytes() == theirs.read_bytes(), name

@pytest.mark.parametrize("save_every", [0, 1])
def test_checkpoints_change_nothing(whole, parts, save_every):
    assert_same(whole, run(replace(parts, save_every=save_every)))

@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(whole, parts):
    """20 SIGKILLs, wherever they fall: loading, sampling, steps, saving, the end."""
    from soak import in_a_child

    rng, kills, done = random.Random(0), 0, Path(parts.out, "eval.json")
    start = time.perf_counter()
    assert in_a_child(partial(run, parts)) == 0
    seconds = time.perf_counter() - start
    while kills < 20 or not done.exists():
        if done.exists():
            assert_same(whole, parts)
            shutil.rmtree(parts.out)  # from the start again
        delay = rng.uniform(0.1, 1.1 + 0.1 * (kills > 20)) * seconds
        code = in_a_child(partial(run, replace(parts, resume=True)), signal.SIGKILL, delay)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert_same(whole, parts)

@pytest.mark.parametrize("step", [3, 5])
def test_a_full_disk_is_one_line_and_no_loss(whole, parts, monkeypatch, refused, step):
    """From `step` on no file can grow beyond 60,000 bytes: no further checkpoint, no model."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (60_000, limits[1]))
    act_at(monkeypatch, common.Run, "log", step, fill)
    try:
        assert parts.out in refused(parts, begun=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state = torch.load(f"{parts.out}/checkpoint.pt", weights_only=True)
    assert state["step"] == step - 1 and not os.path.exists(f"{parts.out}/eval.json")
    assert_same(whole, run(replace(parts, resume=True)))

@pytest.fixture
def halted(tmp_path, data, tiny_folder, monkeypatch):
    """An sft run that was stopped after step 2, on data and a model of its own."""
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(tiny_folder, tmp_path / "model")
    cfg = sft_config(tmp_path / "data", tmp_path / "model", tmp_path / "out")
    act_at(monkeypatch, common.Run, "log", 2, sigterm)
    assert how_it_ends(cfg) == "SystemExit(143)"
    return replace(cfg, resume=True)

@pytest.mark.parametrize("keep", [0, 100])
@pytest.mark.parametrize("file", ["run.json", "checkpoint.pt"])
def test_a_damaged_run_folder_is_one_line(halted, refused, file, keep):
    os.truncate(Path(halted.out) / file, keep)
    assert file in refused(halted).removeprefix(f"sft.py: {halted.out}")
    assert (Path(halted.out) / file).stat().st_size == keep

@pytest.mark.parametrize("changed", [False, True])
def test_resume_says_what_has_changed(halted, monkeypatch, capsys, changed):
    if changed:
        write(Path(halted.data), [dict(prompt="one", completion="more")] * 20)
        os.utime(Path(halted.model) / "config.json", (time.time() + 10, time.time() + 10))
    assert command_line(monkeypatch, halted) == 0
    said = [x for x in capsys.readouterr().out.splitlines() if "changed since the run" in x]
    paths = [halted.data, halted.model] if changed else []
    assert sorted(x.split(": ")[1].split()[0] for x in said) == paths

def test_ctrl_c_before_the_steps_is_one_line(tmp_path, bad, monkeypatch, capsys):
    act_at(monkeypatch, common, "load_policy", 1, ctrl_c)
    assert command_line(monkeypatch, sft_config(bad, bad / "SFT", tmp_path / "out")) == 130
    assert capsys.readouterr().err == "sft.py: stopped\n" and not (tmp_path / "out").exists()

def test_a_second_ctrl_c_stops_at_once(tmp_path, bad, monkeypatch, capsys):
    """Within a --reward_fn, too, whose own SystemExit would be an error."""
    cfg = CONFIGS["ppo"](bad, bad / "SFT", tmp_path / "out", reward_fn=f"{bad / 'rules.py'}:slow")
    assert command_line(monkeypatch, cfg) == 130
    assert "rules.py" not in capsys.readouterr().err and not rows_of(cfg.out)

@pytest.mark.slow  # it trains the embedded world's first steps
def test_sigterm_reaches_a_stage_that_ppo_started(tmp_path):
    command = [sys.executable, str(ROOT / "ppo.py"), "--device", "cpu"]
    run = subprocess.Popen(command, cwd=tmp_path, env=dict(os.environ, OMP_NUM_THREADS="1"))
    metrics = tmp_path / "out/sft/metrics.jsonl"
    end = time.time() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < end:
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 143 and (tmp_path / "out/sft/checkpoint.pt").exists()
    with open(metrics, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody writes any more

def test_a_closed_pipe_ends_no_run(tmp_path, bad):
    cfg = sft_config(bad, bad / "SFT", tmp_path / "out")
    nobody, pipe = os.pipe()
    os.close(nobody)
    command, env = [sys.executable, str(ROOT / "sft.py")], dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([*command, *flags_of(cfg)], env=env, stdout=pipe, stderr=subprocess.PIPE)
    assert done.returncode == 0 and b"Error" not in done.stderr
    assert eval_of(cfg.out) and weights_of(cfg.out)

@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", STAGES)
def test_a_run_that_diverges_ends_in_one_line(tmp_path, data, sft_folder, refused, name, steps):
    flags = dict(lr=1e30, steps=steps, save_every=1)
    flags |= dict(max_grad_norm=1e30, ppo_epochs=1) if name == "ppo" else {}
    line = refused(CONFIGS[name](data, sft_folder, tmp_path / "out", **flags), begun=True)
    assert " is nan; " in line or " is inf; " in line
    assert ("no model is saved" if steps == 1 else "--warmup") in line
    left = set(os.listdir(tmp_path / "out"))
    assert not left & {"eval.json", "model.safetensors", "model.tmp", "config.json"}

def test_functions_get_copies(tmp_path, bad):
    prompts, rules = str(bad / "chat_prompts.jsonl"), str(bad / "rules.py")
    flags = dict(reward_fn=f"{rules}:spoils", gold_fn=f"{rules}:unspoilt", eval_data=prompts)
    cfg = run(CONFIGS["ppo"](bad, bad / "SFT", tmp_path / "ppo", data=prompts, **flags))
    assert eval_of(cfg.out)["gold_before"] == eval_of(cfg.out)["gold_after"] == 1
    assert "spoilt" not in (tmp_path / "ppo/samples.jsonl").read_text()

def test_a_folder_may_be_named_like_a_choice(tmp_path, data, sft_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for overwrite in (False, True):
        run(CONFIGS["ppo"](data, sft_folder, "clip", steps=1, overwrite=overwrite))
