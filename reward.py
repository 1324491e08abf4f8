"""Stage 2, the reward model: human judgements -> r(x, y), a score for any response y to a prompt x.

    python reward.py                                                       # after python sft.py
    python reward.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --lr 2e-5  # your own

Three ways to judge, three losses, all on the score that a linear head reads at the last token:

    pointwise  {"prompt", "response", "score"}    L = E[(r(x,y) - score)^2]
    pairwise   {"prompt", "chosen", "rejected"}   L = -E[log sigma(r(x,y+) - r(x,y-))]
    listwise   {"prompt", "responses", "ranks"}   the same, averaged over all C(K,2) pairs

As in InstructGPT, a ranking's K responses are forwarded once each, and the saved model is centred:
the mean score of the best training responses (`reward_mean` in its config) is subtracted wherever
we score. Held-out `accuracy` is the share of pairs ordered as the judge did; a tie counts half.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F

import common
from common import flag  # a default, what it means, its limits

EMBEDDED_DATA = dict(pointwise="scores.jsonl", pairwise="pairs.jsonl", listwise="rankings.jsonl")

@dataclass
class Config(common.Settings):  # what all stages share: folder, seed, device, LoRA, ...
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
    Rank 1 is best, a tie is no pair; `mask` (B, K) is 0 past the end of a list.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]).float()  # (B, K, K): 1 where i beats j
    if mask is not None:
        better = better * mask[:, :, None] * mask[:, None, :]
    margins = rewards[:, :, None] - rewards[:, None, :]  # (B, K, K)
    losses = -(F.logsigmoid(margins) * better).sum((1, 2))  # (B,)
    pairs = better.sum((1, 2))  # (B,): how many
    lists = (pairs > 0).sum()  # how many have a pair
    per_list = losses / pairs.clamp(min=1)  # the mean of each list first: all weigh the same
    return per_list.sum() / lists.clamp(min=1)

@dataclass
class Judgement:  # K responses to one prompt with their ranks, or one with its score
    examples: list  # K examples: prompt + response
    targets: list  # K ranks, 1 is best; for a point, its score
    form: str  # pointwise | pairwise | listwise

def form_of(row):
    if "chosen" in row:
        return "pairwise"
    return "listwise" if "responses" in row else "pointwise"

def read_judgement(tokenizer, ends, max_length, row):
    """One line of data as a Judgement. Raises ValueError, which names the key."""
    form = form_of(row)
    prompt, responses = common.prompt_and_responses(row)
    if form == "pairwise":
        targets = [1, 2]
    elif form == "listwise":
        targets = row.get("ranks")
        right = isinstance(targets, list) and len(targets) > 1
        if not right or not all(type(r) is int and 1 <= r < 2**31 for r in targets):
            raise ValueError('"ranks" must be two or more whole numbers from 1')
    else:
        score = row.get("score")
        targets = [score]
        if type(score) not in (int, float) or not abs(score) < 1e30:  # NaN is not, either
            what = 'no "chosen" and "rejected", no "responses", and "score" is no finite number'
            raise ValueError(what)
    if len(responses) != len(targets):
        raise ValueError(f"{len(responses)} responses, expected {len(targets)}")
    examples = [common.encode(tokenizer, prompt, r, row, ends, max_length) for r in responses]
    if form != "pointwise":
        same = all(example == examples[0] for example in examples)  # as token ids
        if same or len(set(targets)) == 1:
            raise common.Unlearnable("the same response throughout" if same else "nothing but ties")
    return Judgement(examples, targets, form)

def load_judgements(cfg, tokenizer, ends, max_length):
    """Training and held-out judgements; the training ones must fit --loss."""
    data = cfg.data or str(common.EMBEDDED / EMBEDDED_DATA[cfg.loss])
    train_rows, eval_rows = common.read_split(data, cfg.eval_data, "eval_pairs.jsonl")

    def read(form, source, row):
        judgement = read_judgement(tokenizer, ends, max_length, row)
        if judgement.form != form:
            raise ValueError(f"{judgement.form} data, expected {form} ({source})")
        return judgement

    read_training = partial(read, cfg.loss, f"--loss {cfg.loss}")
    read_held_out = partial(read, form_of(eval_rows[0]), "as the first line")  # maybe not --loss
    judgements = common.read_all(train_rows, read_training, "judgements")
    return judgements, common.read_all(eval_rows, read_held_out, "held-out judgements")

def judgement_loss(form, scores, judgements):
    """The mean loss of B judgements from the scores of all their responses, one after the other."""
    device, targets = scores.device, [judgement.targets for judgement in judgements]
    if form == "pointwise":
        return pointwise_loss(scores, torch.tensor([score for [score] in targets], device=device))
    if form == "pairwise":
        return pairwise_loss(scores[0::2], scores[1::2])  # chosen, rejected, chosen, ...
    counts = [len(ranks) for ranks in targets]  # K of each list; below, K is the longest's
    rewards = torch.nn.utils.rnn.pad_sequence(scores.split(counts), batch_first=True)  # (B, K)
    ranks = common.pad_right(targets).to(device)  # (B, K)
    mask = common.pad_right([[1] * count for count in counts]).to(device)  # (B, K)
    return listwise_loss(rewards, ranks, mask)

def score_all(scorer, judgements, cfg):
    """The model's scores: one tensor (K,) for each judgement."""
    examples = [example for judgement in judgements for example in judgement.examples]
    counts = [len(judgement.examples) for judgement in judgements]
    return common.evaluate(scorer.last, examples, cfg, scorer.lm.device).split(counts)

def ordered_right(lists):
    """Over the pairs in each list of (reward, rank): (how many are ordered right, how many)."""
    right = pairs = 0
    for items in lists:
        for (reward_a, rank_a), (reward_b, rank_b) in combinations(items, 2):
            if rank_a != rank_b:  # a tie is no pair
                pairs += 1
                agree = (reward_a > reward_b) == (rank_a < rank_b)  # rank 1 is best
                right += 0.5 if reward_a == reward_b else agree
    return right, pairs

def wilson_interval(p, n, z=1.96):
    """95% interval of a proportion `p` seen in `n` independent lines (Wilson 1927)."""
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return centre - half, centre + half

def held_out_results(scorer, judgements, cfg):
    """For eval.json: accuracy on held-out judgements, its 95% interval, and their own loss."""
    n, form = len(judgements), judgements[0].form  # all of one form
    scores = score_all(scorer, judgements, cfg)  # n tensors of (K,)
    loss = judgement_loss(form, torch.cat(scores), judgements).item()
    lists = []  # each of (reward, rank)
    for rewards, judgement in zip(scores, judgements):
        lists.append(list(zip(rewards.tolist(), judgement.targets)))
    if form == "pointwise":  # one list of all points; a higher score is better, a lower rank is
        lists = [[(reward, -score) for [(reward, score)] in lists]]
    right, pairs = ordered_right(lists)
    accuracy = right / pairs if pairs else None  # a single point orders nothing
    interval = wilson_interval(accuracy, n) if pairs else None
    return dict(accuracy=accuracy, interval=interval, loss=loss, n=n)

def new_reward_model(cfg, device):
    """A causal LM's layers under a new score head, its tokenizer, the ids that end a response."""
    scorer = common.load_scorer(cfg.model, device, frozen=cfg.lora_rank, new_head=True)
    lm = scorer.lm  # the Hugging Face model
    if not scorer.reads_tokens:  # an encoder: one score for a whole text
        raise common.UserError(f"{cfg.model}: it has no score at every token to build on")
    tokenizer = common.load_tokenizer(cfg.model, lm)
    ends = common.stop_ids(lm, tokenizer)
    lm.config.eos_token_id = ends  # where common.stop_ids finds them in the saved model
    # Plain transformers reads the score at the last token that is not pad: no end may be pad.
    if tokenizer.pad_token_id in (None, *ends):
        special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        spare = [token for token in special if "pad" in token.lower()]
        pad_token = spare[0] if spare else "<|pad|>"
        tokenizer.add_special_tokens(dict(pad_token=pad_token))
    known = lm.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        lm.get_input_embeddings().weight.data[known:] = 0  # no policy samples them
    lm.config.pad_token_id = tokenizer.pad_token_id
    d = lm.score.weight.shape[1]  # hidden size
    generator = common.make_generator("cpu", cfg.seed, "head")
    head = torch.randn(1, d, generator=generator)
    lm.score.weight.data.copy_(head / math.sqrt(d + 1))  # Ziegler et al. 2019: scores near 0
    common.add_lora(scorer, cfg)  # only with --lora_rank; the head is trained whole
    return scorer, tokenizer, ends

def main(cfg):
    device = common.choose_device(cfg.device)
    run = common.Run(cfg)  # the folder --out: metrics, checkpoints, the result
    scorer, tokenizer, ends = new_reward_model(cfg, device)
    room = min(cfg.max_length, common.context_length(scorer.lm))  # tokens
    judgements, held_out = load_judgements(cfg, tokenizer, ends, room)
    lengths = []  # padded tokens of each judgement, whose K responses stay together
    for judgement in judgements:
        longest = max(len(example["ids"]) for example in judgement.examples)
        lengths.append(len(judgement.examples) * longest)
    budget = common.token_budget(cfg, device)  # padded tokens a forward

    optimizer = common.make_optimizer(scorer, cfg, cfg.lr)
    run.begin(scorer=(scorer, optimizer))  # what a checkpoint holds; --resume loads it
    steps = common.total_steps(cfg, len(judgements))
    print(
        f"Reward model ({cfg.loss}) on {device}: {scorer.lm.num_parameters() / 1e6:.1f}M "
        f"parameters, {len(judgements)} judgements, {steps} steps of {cfg.batch_size}"
    )

    for step in run.steps(steps):
        lr = common.set_lr(optimizer, cfg.lr, step, steps, cfg)
        indices = common.epoch_batch(len(judgements), cfg.batch_size, step, cfg.seed)
        total = 0.0  # the batch's mean loss, a tensor on the device
        for part in common.micro_batches(indices, lengths, budget):
            some = [judgements[i] for i in part]
            examples = [example for judgement in some for example in judgement.examples]
            batch = common.collate(examples, device)  # (b * K, t)
            share = len(some) / len(indices)  # every judgement weighs the same
            loss = judgement_loss(cfg.loss, scorer.last(batch), some)
            (loss * share).backward()
            total += loss.detach() * share
        norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), cfg.max_grad_norm)
        stats = common.read_stats(dict(loss=total), norm)  # raises where not finite
        optimizer.step()
        optimizer.zero_grad()
        run.log(("loss", "lr"), lr=lr, **stats)

    results = held_out_results(scorer, held_out, cfg)
    # Centre: the best responses of the first 500 judgements score 0 on average.
    scores = score_all(scorer, judgements[:500], cfg)
    best = [j.targets.index(min(j.targets)) for j in judgements[:500]]
    mean = torch.stack([rewards[i] for rewards, i in zip(scores, best)]).mean().item()
    scorer.mean = scorer.lm.config.reward_mean = mean  # the config saves it
    run.finish(scorer, tokenizer, results)
    accuracy = "no pairs to order"
    if results["accuracy"] is not None:
        low, high = results["interval"]
        accuracy = f"{results['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%})"
    print(f"held-out accuracy {accuracy}, loss {results['loss']:.3f}, n = {results['n']}")

if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
