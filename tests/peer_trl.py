"""TRL's RLOOTrainer on the task of bench_real.py, beside `ppo.py --advantage group`: same model,
adapters, prompts, reward, answers and tokens. Writes OUT/steps.json: seconds and mean reward of
each rollout with its two updates. (`bench_real.py --only peer` runs it; pip install trl.)
"""

import argparse
import json
import time
from pathlib import Path

import sentiment
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="prompts, JSONL")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    args = parser.parse_args()
    epochs = 2  # updates of a rollout
    times, rewards = [], []

    def reward(prompts, completions, **_):
        rewards.append(sentiment.vader(prompts, completions))
        return rewards[-1]

    class Clock(TrainerCallback):
        def on_step_begin(self, settings, state, control, **_):
            if state.global_step % epochs == 0:
                times.append(time.perf_counter())

    config = RLOOConfig(
        output_dir=str(args.out), per_device_train_batch_size=args.batch_size, seed=args.seed,
        num_generations=args.group, max_completion_length=args.max_new_tokens,
        num_iterations=epochs, max_steps=epochs * args.steps, beta=0.05, temperature=1.0,
        learning_rate=5e-4, lr_scheduler_type="constant_with_warmup", warmup_steps=5 * epochs,
        adam_beta2=0.95, max_grad_norm=1.0, gradient_checkpointing=False, bf16=False, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    lines = Path(args.data).read_text(encoding="utf-8").splitlines()
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        peft_config=LoraConfig(
            r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        reward_funcs=reward,
        args=config,
        callbacks=[Clock()],
    )
    trainer.train()
    times.append(time.perf_counter())
    found = dict(
        seconds=[end - start for start, end in zip(times, times[1:])],
        reward=[sum(some) / len(some) for some in rewards],
    )
    (args.out / "steps.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
