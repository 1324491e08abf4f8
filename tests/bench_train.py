"""Forward and backward of the policy's update, eager and compiled; a JSON line a configuration.

    python tests/bench_train.py                          # all that the targets speak of
    python tests/bench_train.py --shapes demo --batch 8 --length 64     # on a CPU

The loop of an update: float32 weights under bfloat16 autocast, right-padded sequences without a
mask, the second half of each a response, log-probs by common.response_logprobs, a fused AdamW
step. The floor is the operations over the rate of a large matrix product.
"""

import argparse
import gc
import json
from functools import partial

import torch
from bench_shapes import SHAPES, matmul_flops, random_model, seconds

import common


def one_update(model, optimizer, batches, tokens):
    for batch in batches:
        (-common.response_logprobs(model, batch).sum() / tokens).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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
    for shape in args.shapes.split(","):
        for mode in args.compile.split(","):
            model = random_model(shape, device, torch.float32).train()
            common.use_causal_attention(model)
            common.has_plain_head(model)
            if args.gradient_checkpointing:
                model.gradient_checkpointing_enable()
            common.compile_layers(model, mode)
            optimizer = common.make_adamw(model, 1e-6)
            generator = torch.Generator().manual_seed(0)
            size = (args.batch, args.length)
            ids = torch.randint(5, model.config.vocab_size, size, generator=generator).tolist()
            half = args.length // 2
            examples = [common.join(row[:half], row[half:]) for row in ids]
            parts = common.micro_batches([args.length] * args.batch, args.micro_tokens)
            batches = [common.collate(examples, part, device) for part in parts]

            update = partial(one_update, model, optimizer, batches, args.batch * half)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            best, warm_up = seconds(update, device, repeats=5)
            optimizer_only, _ = seconds(optimizer.step, device)
            tokens = args.batch * args.length
            flops = common.training_flops([model], tokens, args.batch * half)
            row = dict(
                shape=shape, compile=mode, compiled=common.is_compiled(model), batch=args.batch,
                length=args.length, device=str(device), ms=1e3 * best, tokens_per_s=tokens / best,
                tflops=flops / best / 1e12, floor_ms=1e3 * flops / peak,
                matmul_tflops=peak / 1e12, optimizer_ms=1e3 * optimizer_only, warm_up_s=warm_up,
                peak_gib=common.peak_memory_gib(),
            )  # fmt: skip
            row |= common.utilisation(flops, best, device)
            print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v
                              for k, v in row.items()}), flush=True)  # fmt: skip
            del model, optimizer, update
            gc.collect()  # a compiled layer refers to itself; two models would share the memory


if __name__ == "__main__":
    main()
