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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import ppo  # noqa: E402

CPU = torch.device("cpu")
QUESTIONS = ["What is the capital of France?", "Tell me a story about the sea.", "How?", "你好"]
ANSWERS = ["The capital is Paris.", "Once there was a boat, and it went away.", "Yes.", "你好！"]


def encode(tokenizer):
    """Prompts and answers of different lengths, as token ids."""
    prompts = [common.encode_prompt(tokenizer, q) for q in QUESTIONS]
    return prompts, [common.encode_response(tokenizer, q, a) for q, a in zip(QUESTIONS, ANSWERS)]


def logprobs_of(model, examples, rows, grad=False):
    """(len(rows), R) log-probs of the responses, rows together in one batch."""
    with torch.set_grad_enabled(grad):
        return common.response_logprobs(model, common.collate(examples, rows, CPU))


def largest(a, b):
    return (a - b).abs().max().item()


def check_policy(policy, tokenizer):
    """Yield (what, measured, bound): a check passes when measured is at most its bound."""
    prompts, answers = encode(tokenizer)
    examples = [common.join(p, a) for p, a in zip(prompts, answers)]
    everything = range(len(examples))
    eos = common.stop_ids(policy, tokenizer)
    together = logprobs_of(policy, examples, everything)

    missing = sum(answer[-1] not in eos for answer in answers)
    yield "answers that end in no stop token", missing, 0
    learned = logprobs_of(policy, examples, [0], grad=True)
    head = policy.get_output_embeddings().weight
    if head.requires_grad:
        gradient = torch.autograd.grad(learned[0, len(answers[0]) - 1], head)[0]
        yield "EOS learns nothing from an answer", int(gradient.abs().max() == 0), 0

    ratio = (logprobs_of(policy, examples, everything, grad=True).detach() - together).exp()
    yield "ratio before the first update: largest |ratio - 1|", largest(ratio, torch.ones(())), 0
    reference = copy.deepcopy(policy)
    yield "KL to the reference at the start", largest(
        logprobs_of(reference, examples, everything), together
    ), 0  # fmt: skip

    alone = torch.zeros_like(together)
    for row in everything:
        one = logprobs_of(policy, examples, [row])
        alone[row, : one.shape[1]] = one
    yield "padding: log-prob alone against in a batch", largest(alone, together), 1e-3

    norms = []
    for parts in ([list(everything)], [[row] for row in everything]):
        policy.zero_grad()
        for part in parts:
            logprobs_of(policy, examples, part, grad=True).sum().backward()
        grads = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        norms.append(torch.cat(grads))
    policy.zero_grad()
    gap = (norms[0] - norms[1]).norm() / norms[0].norm()
    yield "micro-batches: relative difference of the gradient", gap.item(), 1e-3

    responses, sampled = common.generate(
        policy, prompts, 12, eos, generator=torch.Generator().manual_seed(0), slots=3, logprobs=True
    )
    if sampled is not None:
        rollout = [common.join(p, r) for p, r in zip(prompts, responses)]
        trained = logprobs_of(policy, rollout, everything)
        gap = largest(common.pad_right(sampled, CPU), trained)
        yield "sampling: log-prob there against in training", gap, 1e-3

    greedy = common.generate(policy, prompts, 12, eos, temperature=0, slots=3)
    plain = common.transformers_generate(
        policy, prompts, common.Sampling(eos, 12, temperature=0), None, batch_size=1
    )
    wrong = sum(a != b for a, b in zip(greedy, plain))
    yield "greedy answers unlike model.generate's", wrong, 0

    if tokenizer.chat_template is not None:
        question = [dict(role="user", content=QUESTIONS[0])]
        dialogue = question + [dict(role="assistant", content=ANSWERS[0])]
        ids, mask = common.encode_dialogue(tokenizer, dialogue)
        prompt = common.encode_prompt(tokenizer, question)
        cut = [i for i, m in zip(ids, mask) if m]
        answer = common.encode_response(tokenizer, question, ANSWERS[0])
        yield "chat: prompt and answer are not the dialogue", int(
            ids[: len(prompt)] != prompt or cut != answer
        ), 0  # fmt: skip
        yield "chat: the turn ends in no stop token", int(answer[-1] not in eos), 0

    # A response token that looks like padding counts like any other.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    odd = [common.join(prompts[0], [pad, *answers[0]])]
    counted = common.collate(odd, [0], CPU).mask.sum().item()
    yield "padding tokens in an answer that are not counted", len(answers[0]) + 1 - counted, 0

    loss, stats = ppo.policy_loss(together, together, torch.ones_like(together), together < 0)
    yield "PPO at ratio 1: |loss + mean advantage|", abs(loss.item() + 1), 1e-6


def with_own_attention(model):
    """The same weights with transformers' own attention."""
    model = copy.deepcopy(model)
    if hasattr(model, "own_attention"):
        model.set_attn_implementation(model.own_attention)
    return model


def check_reward(reward, reward_tokenizer):
    """The same for a reward model: the score of a batch is that of each text alone."""
    prompts, answers = encode(reward_tokenizer)
    examples = [common.join(p, a) for p, a in zip(prompts, answers)]
    with torch.no_grad():
        together = common.sequence_scores(reward, common.collate(examples, range(4), CPU))
        mean = getattr(reward.config, "reward_mean", 0.0)
        # One sequence has no padding, so plain transformers reads its last token or all of it.
        plain = with_own_attention(reward)
        alone = [plain(input_ids=torch.tensor([ids])).logits.item() - mean for ids, _ in examples]
    yield "score of a batch against each alone in transformers", largest(
        together, torch.tensor(alone)
    ), 1e-3 * max(1.0, together.abs().max().item())  # fmt: skip
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
            failed += report(args.policy, check_policy(policy, common.load_tokenizer(args.policy)))
        if args.reward:
            tokenizer = common.load_tokenizer(args.reward)
            reward = common.load_reward(args.reward, CPU)
            failed += report(args.reward, check_reward(reward, tokenizer))
    except common.UserError as problem:
        sys.exit(f"check.py: {problem}")
    if not args.policy and not args.reward:
        parser.error("nothing to check: --policy, --reward or both")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
