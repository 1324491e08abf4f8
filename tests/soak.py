"""Random settings, random kills: run it for as long as you like; it is no part of the tests.

    python tests/soak.py --minutes 30

Each round takes a stage and random valid settings, runs it once undisturbed, and once with SIGKILL
and SIGINT at random moments and --resume after each. The two must leave the same weights, metrics,
results and files. On a failure it prints the settings and stops.
"""

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from conftest import (
    CONFIGS,
    STAGES,
    fork,
    make_llama,
    make_tokenizer,
    rows_of,
    write_data,
)
from test_faults import assert_same

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def random_flags(rng, name, data):
    """Settings that every stage accepts, and some of the stage's own."""
    flags = dict(
        seed=rng.randrange(1000), batch_size=rng.choice([2, 4, 6]), steps=rng.randint(1, 7),
        save_every=rng.randint(0, 3), warmup=rng.randint(0, 3),
        lr=rng.choice([1e-4, 1e-2]), lr_schedule=rng.choice(["linear", "constant"]),
        micro_tokens=rng.choice([0, 1, 40, 4000]), max_grad_norm=rng.choice([0.1, 1.0]),
        gradient_checkpointing=rng.random() < 0.2, lora_rank=rng.choice([0, 0, 0, 4]),
    )  # fmt: skip
    if name in ("sft", "reward", "rejection_sample"):
        flags["epochs"] = 9.0
    if name == "reward":
        files = dict(pairwise="pairs", pointwise="scores", listwise="lists")
        loss = rng.choice(list(files))
        flags |= dict(loss=loss, data=str(data / f"{files[loss]}.jsonl"))
    if name in ("ppo", "rejection_sample"):
        flags |= dict(temperature=rng.choice([0.7, 1.0]), slots=rng.choice([2, 5, 256]))
        flags |= dict(missing_eos_penalty=rng.choice([0.0, 1.0]))
    if name == "ppo":
        flags |= dict(
            objective=rng.choice(["clip", "kl", "pg"]), ppo_epochs=rng.randint(1, 3),
            minibatches=rng.choice([1, 2]), kl_coef=rng.choice([0.0, 0.2]),
            kl_target=rng.choice([0.0, 1.0]), stop_kl=rng.choice([0.0, 1e-3]),
            ptx_coef=rng.choice([0.0, 0.1]), ptx_data=str(data / "sft.jsonl"),
            max_new_tokens=rng.randint(1, 9), gamma=rng.choice([0.9, 1.0]), lam=rng.random(),
        )  # fmt: skip
    if name == "rejection_sample":
        flags |= dict(
            method=rng.choice(["best_of_n", "rso"]), rank=rng.choice(["first_round", "tournament"]),
            loss=rng.choice(["sigmoid", "hinge", "ipo", "none"]), rso_beta=rng.choice([0.1, 10.0]),
            pairs=rng.choice(["", "", str(data / "pairs.jsonl")]),
        )  # fmt: skip
        if flags["pairs"] and flags["loss"] == "none":
            flags["loss"] = "ipo"
    return flags


def in_a_child(run, kill=None, after=0.0):
    """Fork, run, send `kill` after so many seconds; returns the exit code, or minus the signal."""
    child = fork()
    if child == 0:
        code = 0
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            with contextlib.redirect_stderr(nowhere):
                try:
                    run()
                except SystemExit as end:
                    code = end.code
                except KeyboardInterrupt:  # before the steps; the command line makes it 130 too
                    code = 130
                except BaseException as error:
                    os.write(2, f"{type(error).__name__}: {error}\n".encode())
                    code = 99
        os._exit(code)
    if kill:
        time.sleep(after)
        os.kill(child, kill)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def one_round(rng, folder, data, model, counts):
    name = rng.choice(list(STAGES))
    cfg = CONFIGS[name](data, model, folder / "whole", **random_flags(rng, name, data))
    main = STAGES[name].main
    print(name, {k: v for k, v in vars(cfg).items() if v != vars(type(cfg)).get(k)}, flush=True)
    start = time.perf_counter()
    code = in_a_child(lambda: main(cfg))
    seconds = time.perf_counter() - start
    if code and not (folder / "whole/dpo.jsonl").exists():
        raise AssertionError(f"exit code {code}")
    if code:  # tiny random models may leave no pair to learn from
        counts["no pairs"] += 1
        return
    parts = replace(cfg, out=str(folder / "parts"), resume=True)
    for _ in range(rng.randint(1, 4)):
        kill = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        code = in_a_child(lambda: main(parts), kill, rng.random() * seconds)
        counts[f"{name}: {signal.Signals(kill).name} -> {code}"] += 1
        assert code in (0, 130, 143, -kill), code
        if (folder / "parts/eval.json").exists():
            break
    if not (folder / "parts/eval.json").exists():
        code = in_a_child(lambda: main(parts))
        assert code == 0, f"the last resume: exit code {code}"
    if getattr(cfg, "loss", "") == "none":
        assert rows_of(folder / "whole", "samples") == rows_of(folder / "parts", "samples")
        return
    assert_same(cfg, parts)
    steps = [row["step"] for row in rows_of(parts.out)]
    assert steps == list(range(1, len(steps) + 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, counts, rounds = random.Random(args.seed), Counter(), 0
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as base:
        base = Path(base)
        (base / "data").mkdir()
        data, model = write_data(base / "data"), base / "model"
        tokenizer = make_tokenizer()
        make_llama(len(tokenizer)).save_pretrained(model)
        tokenizer.save_pretrained(model)
        while time.monotonic() < end:
            folder = base / str(rounds)
            folder.mkdir()
            one_round(rng, folder, data, model, counts)
            rounds += 1
    print(f"\n{rounds} rounds, every one ended as if nothing had happened")
    for what, count in sorted(counts.items()):
        print(f"{count:6}  {what}")


if __name__ == "__main__":
    main()
