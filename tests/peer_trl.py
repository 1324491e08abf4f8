"""TRL's PPOTrainer (trl 1.12, the last release with one) beside ours: same policy, reward model,
prompts and settings.

    python tests/peer_trl.py --model MODEL --reward REWARD --data PROMPTS --out OUT --steps 10,20,40

Policies after the given numbers of updates go to OUT/STEPS; prints seconds an update, as JSON.
`bench_real.py` runs it, with a Python that has trl 1.12 (--trl).
"""

import argparse
import gzip
import json
import os
import statistics
import time
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--data", required=True, help="pairs with a prompt, JSONL or JSONL.gz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", default="10,20,40")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--max_prompt_tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    marks = [int(step) for step in args.steps.split(",")]

    cuda = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.reward, padding_side="left")
    with (gzip.open if args.data.endswith(".gz") else open)(args.data, "rt") as file:
        prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in file]
    prompts = [ids for ids in prompts if len(ids) <= args.max_prompt_tokens]
    policy, ref = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32) for _ in range(2)
    )
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(args.reward, dtype=torch.float32)
        for _ in range(2)
    )
    times = []

    class Save(TrainerCallback):
        def on_log(self, arguments, state, control, **kwargs):
            times.append(time.perf_counter())
            if len(times) in marks:
                policy.save_pretrained(args.out / str(len(times)))
                tokenizer.save_pretrained(args.out / str(len(times)))

    B = args.batch_size
    settings = PPOConfig(
        output_dir=str(args.out / "trainer"), per_device_train_batch_size=B // 4,
        gradient_accumulation_steps=4, num_mini_batches=1, num_ppo_epochs=4,
        response_length=args.max_new_tokens, total_episodes=B * max(marks),
        local_rollout_forward_batch_size=B, num_sample_generations=0, temperature=1.0,
        kl_coef=0.05, missing_eos_penalty=1.0, stop_token="eos", bf16=cuda, use_cpu=not cuda,
        save_strategy="no", report_to=[], learning_rate=3e-6, lr_scheduler_type="constant",
        gradient_checkpointing=False, logging_steps=1, seed=args.seed,
    )  # fmt: skip
    PPOTrainer(
        args=settings, processing_class=tokenizer, model=policy, ref_model=ref,
        reward_model=reward, value_model=value,
        train_dataset=Dataset.from_dict(dict(input_ids=prompts)),
        eval_dataset=Dataset.from_dict(dict(input_ids=prompts[:4])), callbacks=[Save()],
    ).train()  # fmt: skip
    seconds = [later - earlier for earlier, later in zip(times, times[1:])]
    seconds = statistics.median(seconds) if seconds else None
    print(json.dumps(dict(peer="trl 1.12 PPOTrainer", seconds_per_step=seconds)), flush=True)


if __name__ == "__main__":
    main()
