"""Seconds of a PPO step and of a decode step, of this edition beside the first; a line of JSON.

    python tests/bench_editions.py --first FOLDER --policy out/sft --reward out/reward --turns 3

FOLDER is a checkout of the first edition. The two take turns, each in a process of its own, at the
same number of threads. The embedded world, 128 episodes, rates so small that the policy stays as it
is: all answers are equally long. A PPO step is the median of a turn, a decode step its best; ratios
are this edition's over the first one's in a turn: median, least, most. --cpu counts CPU seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import torch

NEW, BATCH = 48, 128


def measure(folder, args):
    """One turn of the edition in `folder`."""
    torch.set_num_threads(args.threads)
    if args.cpu:
        time.perf_counter = time.process_time  # both editions' own timings go by it
    sys.path.insert(0, folder)
    import common
    import ppo
    loaded = common.load_policy(args.policy, torch.device("cpu"))
    tokenizer = common.load_tokenizer(args.policy)
    rows = common.read_jsonl(common.EMBEDDED / "prompts.jsonl")[:BATCH]
    prompts = [common.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    if "Sampler" in vars(common):
        decode = common.Sampler(loaded, [], NEW, max(map(len, prompts)) + NEW, slots=BATCH)
    else:
        how = dict(slots=BATCH, logprobs=True)
        decode = partial(common.generate, loaded, max_new_tokens=NEW, eos_id=-1, **how)
    times = [time.perf_counter()]
    for _ in range(6):
        decode(prompts)
        times.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as out:
        ppo.main(ppo.Config(
            policy=args.policy, reward=args.reward, out=f"{out}/ppo", steps=args.steps + 1,
            batch_size=BATCH, max_new_tokens=NEW, lr=1e-12, value_lr=1e-12, save_every=0,
            sample_every=0, device="cpu",
        ))  # fmt: skip
        rows = common.read_jsonl(f"{out}/ppo/metrics.jsonl")[1:]
    step, length = ([row[key] for row in rows] for key in ("seconds", "response_len"))
    decode = 1e3 / NEW * min(after - before for before, after in pairwise(times))
    return dict(ppo_step_s=median(step), decode_ms=decode, response_len=mean(length))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("first", "policy", "reward"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("turns", 3), ("steps", 8), ("threads", 1)):  # PPO steps: and one more
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the folder of an edition
    args = parser.parse_args()
    if args.measure:
        return print("\n" + json.dumps(measure(args.measure, args)))
    environment = dict(os.environ, OMP_NUM_THREADS=str(args.threads))
    editions = dict(first=args.first, second=str(Path(__file__).resolve().parent.parent))
    found = dict(first=[], second=[])
    for turn in range(args.turns):
        for name in sorted(editions, reverse=turn % 2 == 1):
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", editions[name]]
            printed = subprocess.check_output(command, env=environment)
            found[name].append(json.loads(printed.splitlines()[-1]))
    row = dict(threads=args.threads, turns=args.turns, steps=args.steps, cpu_seconds=args.cpu)
    for key in found["first"][0]:
        both = [[turn[key] for turn in turns] for turns in found.values()]
        row[key] = dict(zip(found, (round(median(column), 4) for column in both)))
        ratios = [second / first for first, second in zip(*both)]
        row[f"{key}_ratio"] = [round(x, 3) for x in (median(ratios), min(ratios), max(ratios))]
    print(json.dumps(row))


if __name__ == "__main__":
    main()
