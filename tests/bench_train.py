"""Forward and backward of the policy's update, eager and compiled; a JSON line a configuration.

    python tests/bench_train.py                          # all that the targets speak of
    python tests/bench_train.py --shapes demo --batch 8 --length 64     # on a CPU

The loop of an update: float32 weights under bfloat16 autocast on a GPU, right-padded sequences
without a mask, the second half of each a response, log-probs by common.Policy, a fused AdamW step.
The floor is the operations over the rate of a large matrix product.
"""

import argparse
import gc
from functools import partial

import torch
from bench_shapes import (
    SHAPES,
    matmul_flops,
    peak_gib,
    print_row,
    random_model,
    seconds,
    start_memory,
    training_flops,
)

import common


def one_update(policy, optimizer, batches, tokens):
    for batch in batches:
        (-policy(batch)[0].sum() / tokens).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="135m,1.5b", help=", ".join(SHAPES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro_tokens", type=int, default=4096)
    parser.add_argument("--compile", default="off,auto")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    device = common.choose_device("auto")
    peak = matmul_flops(device)
    tokens, half = args.batch * args.length, args.length // 2
    for shape in args.shapes.split(","):
        for mode in args.compile.split(","):
            policy = common.Policy(random_model(shape, device, torch.float32))
            settings = argparse.Namespace(
                compile=mode, gradient_checkpointing=args.gradient_checkpointing
            )
            optimizer = common.make_optimizer(policy, settings, 1e-6)
            vocabulary, size = policy.lm.config.vocab_size, (args.batch, args.length)
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(5, vocabulary, size, generator=generator).tolist()
            examples = [common.join(row[:half], row[half:]) for row in ids]
            lengths = [args.length] * args.batch
            parts = common.micro_batches(range(args.batch), lengths, args.micro_tokens)
            batches = [common.collate([examples[row] for row in part], device) for part in parts]

            update = partial(one_update, policy, optimizer, batches, args.batch * half)
            start_memory(device)
            best, warm_up = seconds(update, device, repeats=5)
            peak_memory = peak_gib(device)
            for parameter in policy.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer_only, _ = seconds(optimizer.step, device)
            flops = training_flops(policy.lm, tokens, args.batch * half)
            compiled = policy.head_logprobs is not common.head_logprobs
            print_row(
                shape=shape, compile=mode, compiled=compiled, batch=args.batch,
                length=args.length, device=str(device), ms=1e3 * best,
                tokens_per_s=tokens / best, tflops=flops / best / 1e12, floor_ms=1e3 * flops / peak,
                matmul_tflops=peak / 1e12, optimizer_ms=1e3 * optimizer_only, warm_up_s=warm_up,
                peak_gib=peak_memory,
            )  # fmt: skip
            del policy, optimizer, update
            gc.collect()  # a compiled layer refers to itself; two models would share the memory


if __name__ == "__main__":
    main()
