"""Look at a model before trusting it to these scripts: each check with its number and its bound.

    python tests/check.py --policy HuggingFaceTB/SmolLM2-135M-Instruct
    python tests/check.py --policy out/sft --reward out/reward

Exit code 1 when one fails. Runs in float32 on the CPU, so that the bounds can be tight.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import ppo  # noqa: E402

CPU = torch.device("cpu")
QUESTIONS = ["What is the capital of France?", "Tell me a story about the sea.", "How?", "你好"]
ANSWERS = ["The capital is Paris.", "Once there was a boat, and it went away.", "Yes.", "你好！"]
NEW = 12  # tokens of the answers that are sampled here


def encode(tokenizer):
    """Questions with their answers, of different lengths, as examples."""
    return [common.encode(tokenizer, q, a) for q, a in zip(QUESTIONS, ANSWERS)]


def logprobs_of(policy, examples, grad=False):
    """(B, T) log-probs of the responses, all in one batch."""
    with torch.set_grad_enabled(grad):
        return policy(common.collate(examples))[0]


def largest(a, b):
    return (a - b).abs().max().item()


def as_loaded(lm):
    """The same weights under the plainest of transformers' own attentions."""
    plain = copy.deepcopy(lm).eval()
    plain.set_attn_implementation("eager")
    return plain


@torch.no_grad()
def plain_greedy(lm, prompts, max_new_tokens, eos):
    """Greedy answers by `model.generate`, one prompt at a time, so that nothing is padded."""
    plain = as_loaded(lm)
    plain.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos[0]
    )
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answered = plain.generate(ids, attention_mask=torch.ones_like(ids))
        answers.append(answered[0, len(prompt) :].tolist())
    return answers


def check_policy(policy, tokenizer):
    """Yield (what, measured, bound): a check passes when measured is at most its bound."""
    examples = encode(tokenizer)
    prompts = [common.encode_prompt(tokenizer, question) for question in QUESTIONS]
    batch = common.collate(examples)
    eos = common.stop_ids(policy.lm, tokenizer)
    together = logprobs_of(policy, examples)

    missing = sum(example["ids"][-1] not in eos for example in examples)
    yield "answers that end in no stop token", missing, 0
    head = policy.lm.get_output_embeddings().weight
    learned = logprobs_of(policy, examples[:1], grad=True)[0, -1]  # of EOS
    gradient = torch.autograd.grad(learned, head)[0]
    yield "EOS learns nothing from an answer", int(gradient.abs().max() == 0), 0

    ratio = (logprobs_of(policy, examples, grad=True).detach() - together).exp()
    yield "ratio before the first update: largest |ratio - 1|", largest(ratio, torch.ones(())), 0
    reference = logprobs_of(copy.deepcopy(policy), examples)
    yield "KL to the reference at the start", largest(reference, together), 0

    with torch.no_grad():
        full = as_loaded(policy.lm)(input_ids=batch["ids"], use_cache=False).logits[:, :-1]
    expected = common.token_logprobs(full, batch["ids"][:, 1:]) * batch["mask"][:, 1:]
    yield "log-probs against transformers' own logits", largest(together[:, 1:], expected), 1e-3
    alone = torch.zeros_like(together)
    for row, example in enumerate(examples):
        alone[row, : len(example["ids"])] = logprobs_of(policy, [example])[0]
    yield "padding: log-prob alone against in a batch", largest(alone, together), 1e-3

    gradients = []
    for parts in ([examples], [[example] for example in examples]):
        policy.zero_grad()
        for part in parts:
            logprobs_of(policy, part, grad=True).sum().backward()
        grads = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))
    policy.zero_grad()
    gap = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    yield "micro-batches: relative difference of the gradient", gap.item(), 1e-3

    longest = max(map(len, prompts)) + NEW
    sampler = common.Sampler(policy, eos, NEW, longest, slots=3)
    responses, sampled = sampler(prompts, torch.Generator().manual_seed(0))
    sampler.close()
    rollout = [common.join(p, r) for p, r in zip(prompts, responses)]
    mask = common.collate(rollout)["mask"].bool()
    trained = logprobs_of(policy, rollout)[mask]
    gap = largest(torch.tensor(sum(sampled, [])), trained)
    yield "sampling: log-prob there against in training", gap, 1e-3

    sampler = common.Sampler(policy, eos, NEW, longest, temperature=0, slots=3)
    greedy, _ = sampler(prompts)
    sampler.close()
    plain = plain_greedy(policy.lm, prompts, NEW, eos)
    yield "greedy answers unlike model.generate's", sum(a != b for a, b in zip(greedy, plain)), 0

    if tokenizer.chat_template is not None:
        question = [dict(role="user", content=QUESTIONS[0])]
        ids = common.encode(tokenizer, question, ANSWERS[0], ends=eos)["ids"]
        dialogue = question + [dict(role="assistant", content=ANSWERS[0])]
        text = tokenizer.apply_chat_template(dialogue, tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        n = len(ids) - 1  # where the template ends no turn, EOS does
        yield "chat: prompt and answer are not the dialogue", int(whole[:n] != ids[:n]), 0
        yield "chat: the turn ends in no stop token", int(ids[-1] not in eos), 0

    # A response token that looks like padding counts like any other.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    counted = common.collate([common.join(prompts[0], [pad, pad, eos[0]])])["mask"].sum().item()
    yield "padding tokens in an answer that are not counted", 3 - counted, 0

    loss, _ = ppo.policy_loss(together, together, torch.ones_like(together), batch["mask"])
    yield "PPO at ratio 1: |loss + mean advantage|", abs(loss.item() + 1), 1e-6


def check_reward(scorer, tokenizer):
    """The same for a reward model: the score of a batch is that of each text alone."""
    examples = encode(tokenizer)
    plain = as_loaded(scorer.lm)
    with torch.no_grad():
        together = scorer.last(common.collate(examples))
        # One sequence has no padding, so plain transformers reads its last token.
        alone = [plain(torch.tensor([example["ids"]])).logits.item() for example in examples]
    gap = largest(together, torch.tensor(alone) - scorer.mean)
    bound = 1e-3 * max(1.0, together.abs().max().item())
    yield "score of a batch against each alone in transformers", gap, bound
    yield "scores that are not finite", int((~together.isfinite()).sum()), 0
    yield "different answers that all score the same", int(together.std() == 0), 0


def report(title, checks):
    """Print a table; returns how many failed."""
    print(f"\n{title}")
    failed = 0
    for what, measured, bound in checks:
        good = measured <= bound
        failed += not good
        print(f"  {'ok  ' if good else 'FAIL'}  {what:56}{measured:10.2g}  (at most {bound:.2g})")
    return failed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", help="causal LM: folder or hub name")
    parser.add_argument("--reward", help="reward model: folder or hub name")
    args = parser.parse_args(argv)
    failed = 0
    try:
        if args.policy:
            policy = common.load_policy(args.policy, CPU)
            tokenizer = common.load_tokenizer(args.policy, policy.lm)
            failed += report(args.policy, check_policy(policy, tokenizer))
        if args.reward:
            scorer = common.load_scorer(args.reward, CPU)
            if not scorer.reads_tokens:
                raise common.UserError(f"{args.reward}: it reads text by its own forward, not here")
            tokenizer = common.load_tokenizer(args.reward)
            failed += report(args.reward, check_reward(scorer, tokenizer))
    except common.UserError as problem:
        sys.exit(f"check.py: {problem}")
    if not args.policy and not args.reward:
        parser.error("nothing to check: --policy, --reward or both")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
