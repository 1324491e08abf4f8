"""Stage 3's losses: against loops, and against exact expectations over every trajectory."""

import math
from itertools import product

import pytest
import torch

import common
import ppo

OBJECTIVES = ["clip", "kl", "pg"]
EPS, BETA = 0.2, 0.7

def random_batch(seed, B=4, T=6):
    """log pi, log pi_old, advantages and mask in float64; where the mask is 0, rubbish."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    new = old + 0.4 * torch.randn(B, T, generator=generator, dtype=torch.float64)
    advantages = torch.randn(B, T, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    mask = (torch.arange(T) < lengths[:, None]).double()
    rubbish = 1 - mask
    return new + 1e3 * rubbish, old - 7 * rubbish, advantages + 100 * rubbish, mask

def every_case_of_the_clip():
    """The ratio below, inside and above the range, A < 0 and A > 0: 14 tokens, 4 of them cut."""
    ratios, signs = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], [-1.5, 1.5]
    ratio, advantages = torch.tensor(list(product(ratios, signs)), dtype=torch.float64).T
    old = torch.full((1, 14), -1.0, dtype=torch.float64)
    return old + ratio.log(), old, advantages[None], torch.ones_like(old)

CASES = {f"seed {seed}": random_batch(seed) for seed in range(4)}
CASES["clip"] = every_case_of_the_clip()
CASES["start"] = CASES["seed 1"][1:2] + CASES["seed 1"][1:]  # every ratio is 1

def real(mask, *tensors):
    """The entries of each tensor where the mask is 1, as tuples of floats."""
    return list(zip(*[x[mask.bool()].tolist() for x in tensors]))

@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", CASES)
def test_policy_loss_and_its_gradient_against_a_loop(objective, case):
    new, old, advantages, mask = CASES[case]
    new = new.clone().requires_grad_()
    loss, stats = ppo.policy_loss(new, old, advantages, mask, objective, EPS, BETA)
    loss.backward()
    assert (new.grad[mask == 0] == 0).all()  # padding learns nothing

    tokens = real(mask, new, old, advantages, new.grad)
    found = []
    for n, o, a, grad in tokens:
        rho = math.exp(n - o)
        kl = rho - 1 - (n - o)
        bounded = min(max(rho, 1 - EPS), 1 + EPS)
        cut = (a > 0 and rho > 1 + EPS) or (a < 0 and rho < 1 - EPS)
        gain = dict(clip=min(rho * a, bounded * a), kl=rho * a - BETA * kl, pg=n * a)
        slope = dict(clip=0 if cut else rho * a, kl=rho * a - BETA * (rho - 1), pg=a)
        assert grad == pytest.approx(-slope[objective] / len(tokens), rel=1e-12)
        found.append((-gain[objective], kl, cut, rho))
    means = [sum(numbers) / len(tokens) for numbers in zip(*found)]
    ours = [loss.item(), *(stats[key].item() for key in ("approx_kl", "clipfrac", "ratio"))]
    assert ours == pytest.approx(means, rel=1e-12)
    assert case != "clip" or means[2] == 4 / 14
    assert not any(stat.requires_grad for stat in stats.values())
    with pytest.raises(ValueError, match="ppo"):
        ppo.policy_loss(new, old, advantages, mask, "ppo")

@pytest.mark.parametrize("seed", range(4))
def test_value_loss_against_a_loop(seed):
    values, old, returns, mask = random_batch(seed)
    loss, clipfrac = ppo.value_loss(values.requires_grad_(), old, returns, mask, EPS)
    loss.backward()
    assert (values.grad[mask == 0] == 0).all()
    tokens = real(mask, values, old, returns, values.grad)
    found = []
    for v, o, r, grad in tokens:
        clipped = min(max(v, o - EPS), o + EPS)
        cut = (clipped - r) ** 2 > (v - r) ** 2
        assert grad == pytest.approx(0 if cut else (v - r) / len(tokens), rel=1e-12)
        found.append((0.5 * max((v - r) ** 2, (clipped - r) ** 2), cut))
    means = [sum(numbers) / len(tokens) for numbers in zip(*found)]
    assert [loss.item(), clipfrac.item()] == pytest.approx(means, rel=1e-12)

def test_the_value_of_a_state_is_read_at_the_token_before():
    assert ppo.state_values(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[0.0, 1.0, 2.0]]

def test_token_rewards_put_the_score_on_the_last_real_token():
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 9.0, 9.0], [-1.0, -1.0, 9.0]])
    ref = torch.tensor([[-1.5, -1.0, -0.5], [-2.0, -9.0, -9.0], [-1.0, -3.0, -9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    rewards = ppo.token_rewards(torch.tensor([5.0, -4.0, 2.0]), logprobs, ref, mask, 0.1)
    expected = [[-0.05, 0.1, 5.0], [-4.0 + 0.1, 0.0, 0.0], [0.0, 2.0 - 0.2, 0.0]]
    assert torch.allclose(rewards, torch.tensor(expected), atol=1e-6)

def test_the_controllers_of_the_two_kls():
    # On target: no change. The error is capped at 20%, so 128 episodes of 10,000 move 0.256%.
    cfg = ppo.Config(kl_target=6, batch_size=100, kl_horizon=1000, objective="kl", beta_target=0.01)
    factors = {6.0: 1, 60.0: 1.02, -60.0: 0.98, 6.6: 1.01}
    betas = {0.03: 4, 0.0151: 4, 0.0149: 2, 0.01: 2, 0.0067: 2, 0.0066: 1, 0.0: 1}
    for kl, approx_kl in product(factors, betas):
        ppo.adapt_coefs(coefs := dict(kl_coef=0.3, beta=2.0), kl, approx_kl, cfg)
        assert coefs["beta"] == betas[approx_kl] and (coefs["kl_coef"] == 0.3) == (kl == 6)
        assert coefs["kl_coef"] == pytest.approx(0.3 * factors[kl])

def test_raw_q_raises_the_worst_action_and_the_advantage_lowers_it():
    """The deck's (8.14): three actions, 0 < Q1 < Q2 < Q3, and the first one is sampled."""
    q = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    start = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()

    def after_a_step(weight):
        logits = start.clone().requires_grad_()
        logprob = logits.log_softmax(0)[0].view(1, 1)  # of the first action
        ones = torch.ones(1, 1, dtype=torch.float64)
        ppo.policy_loss(logprob, logprob.detach(), weight * ones, ones, "pg")[0].backward()
        return (logits - 0.1 * logits.grad).softmax(0).tolist()

    raw = after_a_step(q[0])
    value = (start.exp() * q).sum()  # V = E[Q] (8.13)
    advantage = after_a_step(q[0] - value)
    assert raw[0] > 0.2 and raw[1] < 0.5 and raw[2] < 0.3  # the best one loses: wrong
    assert advantage[0] < 0.2 and advantage[1] > 0.5 and advantage[2] > 0.3

# Exact expectations: a table policy over three tokens, every trajectory enumerated

EOS, LIMIT = 2, 3
PREFIXES = [p for n in range(LIMIT) for p in product((0, 1), repeat=n)]  # 1 + 2 + 4 states
TRAJECTORIES = [p + (EOS,) for p in PREFIXES] + list(product((0, 1), repeat=LIMIT))

def table(seed):
    """Logits of each state: (7, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), 3, generator=generator, dtype=torch.float64)

def logprobs_of(logits, trajectory):
    """(1, LIMIT): log pi of each token, 0 past the end."""
    states = [PREFIXES.index(trajectory[:t]) for t in range(len(trajectory))]
    found = logits.log_softmax(1)[states, list(trajectory)]
    return torch.cat([found, found.new_zeros(LIMIT - len(trajectory))])[None]

def mask_of(trajectory):
    return (torch.arange(LIMIT) < len(trajectory)).double()[None]

KL_COEF, REF = 0.4, table(11)

def score_of(trajectory):
    return 1.0 + 2 * trajectory[0] - 3.0 * (trajectory[-1] != EOS) + 0.5 * len(trajectory) ** 2

@pytest.fixture
def exact():
    """grad E[score - kl_coef KL], by autograd through all 15 probabilities."""
    logits, expected_reward, total = table(10).requires_grad_(), 0, 0
    for tau in TRAJECTORIES:
        log_p = logprobs_of(logits, tau).sum()
        penalty = KL_COEF * (log_p - logprobs_of(REF, tau).sum())
        expected_reward = expected_reward + log_p.exp() * (score_of(tau) - penalty)
        total += log_p.exp().item()
    assert total == pytest.approx(1.0, rel=1e-12) and len(TRAJECTORIES) == 15  # all there are
    expected_reward.backward()
    assert logits.grad.abs().max() > 0.1
    return logits.grad

def episodes(logits, group):
    """log pi with its gradient and without, rewards and mask of some trajectories: (B, LIMIT)."""
    new, ref = (torch.cat([logprobs_of(x, tau) for tau in group]) for x in (logits, REF))
    scores = torch.tensor([score_of(tau) for tau in group], dtype=torch.float64)
    mask, old = torch.cat([mask_of(tau) for tau in group]), new.detach()
    return new, old, ppo.token_rewards(scores, old, ref, mask, KL_COEF), mask

@pytest.mark.parametrize("objective, baseline", [
    ("pg", False), ("clip", False), ("clip", True), ("kl", False), ("kl", True),
])  # fmt: skip
def test_expected_gradient_is_that_of_the_expected_reward(exact, objective, baseline):
    """The mean of PPO's gradients: token_rewards, gae with lam=1, policy_loss at ratio 1. A value
    function (any numbers) is a baseline: it must not change the mean.
    """
    state_values, logits = table(12)[:, 0], table(10).requires_grad_()
    for tau in TRAJECTORIES:
        new, old, rewards, mask = episodes(logits, [tau])
        values = torch.zeros(1, LIMIT, dtype=torch.float64)
        for t in range(len(tau) if baseline else 0):
            values[0, t] = state_values[PREFIXES.index(tau[:t])]
        advantages, _ = common.gae(rewards, values, mask, gamma=1.0, lam=1.0)
        if objective == "pg":
            advantages = rewards.sum(1, keepdim=True) * mask
        loss, _ = ppo.policy_loss(new, old, advantages, mask, objective, EPS, BETA)
        (loss * len(tau) * old.sum().exp()).backward()  # a sum over tokens, times p(tau)
    assert torch.allclose(-logits.grad, exact, atol=1e-12)

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_group_baseline_is_unbiased(exact, objective):
    """All 225 groups of two answers, of 1 to 3 tokens: the other's total reward is a baseline."""
    logits = table(10).requires_grad_()
    for group in product(TRAJECTORIES, repeat=2):
        new, old, rewards, mask = episodes(logits, group)
        advantages = ppo.group_advantages(rewards, mask, 2)
        loss, _ = ppo.policy_loss(new, old, advantages, mask, objective, EPS, BETA)
        (loss * mask.sum() / 2 * old.sum().exp()).backward()  # a mean over the two answers
    assert torch.allclose(-logits.grad, exact, atol=1e-12)

def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2, 0], [4, 0, 0], [0, 0, 5], [1, 1, 1], [2, 0, 0], [6, 0, 0]])
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    # Totals 3 4 5 and 3 2 6: less (4 + 5) / 2, (3 + 5) / 2, ...
    expected = [[-1.5, -1.5, 0], [0, 0, 0], [1.5] * 3, [-1.0] * 3, [-2.5, 0, 0], [3.5, 3.5, 0]]
    assert ppo.group_advantages(rewards, mask, 3).tolist() == expected

def test_importance_sampling_is_unbiased():
    """E_old[ratio * A] = E_new[A] in every state, and E_old[approx_kl] = KL(pi_old, pi_new)."""
    old, new, advantages = table(20).log_softmax(1), table(21).log_softmax(1), table(22)
    one = torch.ones(1, 1, dtype=torch.float64)
    found = torch.zeros(3, len(PREFIXES), dtype=torch.float64)
    for state, action in product(range(len(PREFIXES)), range(3)):
        chosen = [x[state, action].view(1, 1) for x in (new, old, advantages)]
        loss, stats = ppo.policy_loss(*chosen, one, "kl", beta=0.0)
        numbers = torch.stack([-loss, stats["approx_kl"], stats["ratio"]])
        found[:, state] += old[state, action].exp() * numbers
    exact_kl = (old.exp() * (old - new)).sum(1)
    expected = torch.stack([(new.exp() * advantages).sum(1), exact_kl, torch.ones(7).double()])
    assert torch.allclose(found, expected, atol=1e-12)
