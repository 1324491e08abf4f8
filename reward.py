"""Stage 2, the reward model: human judgements -> r(x, y), a score for any response y to a prompt x.

    python reward.py                                                       # after python sft.py
    python reward.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --lr 2e-5  # your own

Three ways to judge, three losses, all on the score that a linear head reads at the last token:

    pointwise  {"prompt", "response", "score"}    L = E[(r(x,y) - score)^2]
    pairwise   {"prompt", "chosen", "rejected"}   L = -E[log sigma(r(x,y+) - r(x,y-))]
    listwise   {"prompt", "responses", "ranks"}   the same, averaged over all C(K,2) pairs

As in InstructGPT, the K responses of a ranking are forwarded once each, not once a pair, and the
saved model is centred: the mean score of the best training responses is stored in its config
(`reward_mean`) and subtracted wherever this project scores. Held-out `accuracy` is the share of
response pairs that the model orders as the judge did; a tie counts half.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F

import common
from common import flag

EMBEDDED_DATA = dict(pointwise="scores.jsonl", pairwise="pairs.jsonl", listwise="rankings.jsonl")

@dataclass
class Config(common.Settings):
    # model and data
    model: str = flag("out/sft", "SFT model: folder or hub name")
    loss: str = flag("pairwise", "what the judgements are", choices=list(EMBEDDED_DATA))
    data: str = flag("", "judgements, JSONL; empty: embedded, to fit --loss")
    eval_data: str = flag("", "held-out ones; empty: a part of --data")
    max_length: int = flag(1024, "tokens; longer ones are left out", over=1)
    # optimisation
    epochs: float = flag(1.0, "passes over the data", over=0)
    steps: int = flag(0, "cap on the optimiser steps; 0: none", least=0)
    batch_size: int = flag(32, "judgements per optimiser step", over=0)
    lr: float = flag(7e-4, "peak rate; about 2e-5 for a real model", over=0)
    warmup: int = flag(10, "steps of linear warm-up, at most half of all", least=0)
    out: str = flag("out/reward", "folder of the run")

# The three losses of the lecture: pure functions

def pointwise_loss(rewards, scores):
    """Squared error against direct scores: (B,), (B,) -> scalar."""
    return ((rewards - scores) ** 2).mean()

def pairwise_loss(chosen, rejected):
    """Bradley-Terry: -log sigma(r+ - r-), (B,), (B,) -> scalar."""
    return -F.logsigmoid(chosen - rejected).mean()

def listwise_loss(rewards, ranks, mask=None):
    """Bradley-Terry over all pairs of each ranking (InstructGPT eq. 1): (B, K), (B, K) -> scalar.

    Rank 1 is best, a tie is no pair, and `mask` (B, K) is 0 where a list has fewer than K
    responses. The mean is over a list's pairs first, then over the lists that have a pair, so that
    long lists do not outweigh short ones.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]).float()  # (B, K, K): i beats j
    if mask is not None:
        better = better * mask[:, :, None] * mask[:, None, :]
    margin = rewards[:, :, None] - rewards[:, None, :]
    pairs = better.sum((1, 2))  # (B,)
    per_list = -(F.logsigmoid(margin) * better).sum((1, 2)) / pairs.clamp(min=1)
    return per_list.sum() / (pairs > 0).sum().clamp(min=1)

# Judgements: whatever the form, K responses to one prompt with their ranks, or one with its score

@dataclass
class Judgement:
    examples: list  # K examples: prompt + response
    targets: list  # K ranks, 1 is best; for a point, its score
    form: str  # pointwise | pairwise | listwise

def form_of(row):
    if "chosen" in row:
        return "pairwise"
    return "listwise" if "responses" in row else "pointwise"

def read_judgement(tokenizer, ends, row):
    """One line of data as a Judgement. Raises common.UserError naming the line and the key."""
    where = row["where"]
    form = form_of(row)
    prompt, responses = common.prompt_and_responses(row)
    if form == "pairwise":
        targets = [1, 2]
    elif form == "listwise":
        targets = row.get("ranks")
        numbers = isinstance(targets, list) and all(type(r) is int for r in targets)
        if not numbers or not all(1 <= r < 2**31 for r in targets) or len(targets) < 2:
            raise common.UserError(f'{where}: "ranks" must be two or more whole numbers from 1')
    else:
        targets = [row.get("score")]
        if type(targets[0]) not in (int, float) or not abs(targets[0]) < 1e30:
            what = 'no "chosen" and "rejected", no "responses", and "score" is no finite number'
            raise common.UserError(f"{where}: {what}")
    if len(responses) != len(targets):
        raise common.UserError(f"{where}: {len(responses)} responses, expected {len(targets)}")
    examples = [common.encode(tokenizer, prompt, r, row, ends) for r in responses]
    if form != "pointwise":
        same = all(example == examples[0] for example in examples)
        if same or len(set(targets)) == 1:
            what = "the same response throughout" if same else "nothing but ties"
            raise common.Unlearnable(f"{where}: {what}")
    return Judgement(examples, targets, form)

def load_judgements(cfg, tokenizer, ends, max_length):
    """Training and held-out judgements; the training ones must fit --loss."""
    data = cfg.data or str(common.EMBEDDED / EMBEDDED_DATA[cfg.loss])
    train_rows, eval_rows = common.read_split(data, cfg.eval_data, "eval_pairs.jsonl")

    def read(form, row):
        judgement = read_judgement(tokenizer, ends, row)
        if judgement.form != form:
            found = f"{row['where']}: {judgement.form} data"
            raise common.UserError(f"{found}, expected {form} (--loss {cfg.loss})")
        return judgement, max(len(example["ids"]) for example in judgement.examples)

    judgements = common.read_all(train_rows, partial(read, cfg.loss), max_length, "judgements")
    read_held_out = partial(read, form_of(eval_rows[0]))  # one form, maybe not that of --loss
    return judgements, common.read_all(eval_rows, read_held_out, max_length, "held-out judgements")

def judgement_loss(form, scores, judgements):
    """The mean loss of B judgements from the scores of all their responses, one after the other."""
    counts = [len(judgement.targets) for judgement in judgements]
    if form == "pointwise":
        targets = [judgement.targets[0] for judgement in judgements]
        return pointwise_loss(scores, torch.tensor(targets, device=scores.device))
    if form == "pairwise":
        chosen, rejected = scores.view(-1, 2).unbind(1)
        return pairwise_loss(chosen, rejected)
    # Lists of different lengths: (B, K), K the longest, with a mask.
    rewards = torch.nn.utils.rnn.pad_sequence(scores.split(counts), batch_first=True)
    ranks = common.pad_right([judgement.targets for judgement in judgements]).to(scores.device)
    mask = common.pad_right([[1] * count for count in counts]).to(scores.device)
    return listwise_loss(rewards, ranks, mask)

def score_all(scorer, judgements, cfg):
    """The model's scores: one tensor (K,) for each judgement."""
    examples = [example for judgement in judgements for example in judgement.examples]
    scores = common.evaluate(scorer.last, examples, cfg, scorer.lm.device)
    return scores.split([len(judgement.examples) for judgement in judgements])

def ordered_right(items):
    """[(reward, rank), ...] -> (pairs in which the better rank has the higher reward, pairs);
    equal rewards count half.
    """
    right = pairs = 0
    for (reward_a, rank_a), (reward_b, rank_b) in combinations(items, 2):
        if rank_a != rank_b:
            pairs += 1
            right += 0.5 if reward_a == reward_b else (reward_a > reward_b) == (rank_a < rank_b)
    return right, pairs

def wilson_interval(p, n, z=1.96):
    """95% interval of a proportion `p` seen in `n` independent lines (Wilson 1927)."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half

def held_out_results(scorer, judgements, cfg):
    """For eval.json: accuracy on held-out judgements, its 95% interval, and their own loss."""
    n, form = len(judgements), judgements[0].form
    scores = score_all(scorer, judgements, cfg)
    loss = judgement_loss(form, torch.cat(scores), judgements).item()
    lists = [list(zip(s.tolist(), j.targets)) for s, j in zip(scores, judgements)]
    if form == "pointwise":  # one list of all points; a higher score is better, a lower rank is
        lists = [[(reward, -score) for [(reward, score)] in lists]]
    right, pairs = map(sum, zip(*map(ordered_right, lists)))
    accuracy = right / pairs if pairs else None  # a single point orders nothing
    interval = wilson_interval(accuracy, n) if pairs else None
    return dict(accuracy=accuracy, interval=interval, loss=loss, n=n)

def new_reward_model(cfg, device):
    """A causal LM's layers with a fresh score head, its tokenizer, and the ids that end a response.
    The head is N(0, 1/(d + 1)) as in Ziegler et al. 2019: scores start near 0 whatever the width.
    """
    dtype = common.trained_dtype(cfg, device)
    scorer = common.load_scorer(cfg.model, device, dtype, new_head=True)
    lm = scorer.lm
    if not scorer.reads_tokens:
        raise common.UserError(f"{cfg.model}: it has no score at every token to build on")
    tokenizer = common.load_tokenizer(cfg.model, lm)
    ends = common.stop_ids(lm, tokenizer)
    lm.config.eos_token_id = ends  # where common.stop_ids finds them in the saved model
    # Plain transformers reads the score at the last token that is not pad, so no id that ends a
    # response may be pad. Take a special token made for padding, or add one.
    if tokenizer.pad_token_id in (None, *ends):
        special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        spare = [token for token in special if "pad" in token.lower()]
        tokenizer.add_special_tokens(dict(pad_token=(*spare, "<|pad|>")[0]))
    known = lm.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        lm.get_input_embeddings().weight.data[known:] = 0
    lm.config.pad_token_id = tokenizer.pad_token_id
    d = lm.score.weight.shape[1]
    head = torch.randn(1, d, generator=common.make_generator("cpu", cfg.seed, "head"))
    lm.score.weight.data.copy_(head / math.sqrt(d + 1))
    common.add_lora(scorer, cfg)
    return scorer, tokenizer, ends

def main(cfg):
    device = common.choose_device(cfg.device)
    run = common.Run(cfg)
    scorer, tokenizer, ends = new_reward_model(cfg, device)
    limit = min(cfg.max_length, common.context_length(scorer.lm))
    judgements, held_out = load_judgements(cfg, tokenizer, ends, limit)
    # A judgement's loss needs its K responses together: they count K times the longest.
    lengths = [len(j.examples) * max(len(e["ids"]) for e in j.examples) for j in judgements]

    optimizer = common.make_optimizer(scorer, cfg, cfg.lr)
    run.begin(scorer=(scorer, optimizer))
    steps = common.total_steps(cfg, len(judgements))
    print(
        f"Reward model ({cfg.loss}) on {device}: {scorer.lm.num_parameters() / 1e6:.1f}M "
        f"parameters, {len(judgements)} judgements, {steps} steps of {cfg.batch_size}"
    )

    for step in run.steps(steps):
        lr = common.set_lr(optimizer, cfg.lr, step, steps, cfg)
        indices = common.epoch_batch(len(judgements), cfg.batch_size, step, cfg.seed)
        totals = {}
        for part in common.micro_batches(indices, lengths, common.token_budget(cfg, device)):
            some = [judgements[i] for i in part]
            batch = common.collate([example for j in some for example in j.examples], device)
            share = len(some) / len(indices)  # every judgement weighs the same
            loss = judgement_loss(cfg.loss, scorer.last(batch), some)
            (loss * share).backward()
            common.add_up(totals, share, loss=loss)

        grad_norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), cfg.max_grad_norm)
        stats = common.read_stats(totals, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        run.log(("loss", "lr"), lr=lr, **stats)

    results = held_out_results(scorer, held_out, cfg)
    # Centre: the best responses of the first 500 judgements score 0 on average.
    scores = score_all(scorer, judgements[:500], cfg)
    best = [s[j.targets.index(min(j.targets))] for s, j in zip(scores, judgements)]
    scorer.mean = scorer.lm.config.reward_mean = torch.stack(best).mean().item()
    run.finish(scorer, tokenizer, results)
    accuracy = "no pairs to order"
    if results["accuracy"] is not None:
        low, high = results["interval"]
        accuracy = f"{results['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%})"
    print(f"held-out accuracy {accuracy}, loss {results['loss']:.3f}, n = {results['n']}")

if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
