"""Stage 3's losses: against loops, and against exact expectations over every trajectory."""

import math
from itertools import product

import pytest
import torch

import common
import ppo

torch.set_num_threads(1)

EPS, BETA = 0.2, 0.7


def random_batch(seed, B=4, T=6):
    """log pi, log pi_old, advantages and mask in float64; rubbish where the mask is 0."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    new = old + 0.4 * torch.randn(B, T, generator=generator, dtype=torch.float64)
    advantages = torch.randn(B, T, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    mask = (torch.arange(T) < lengths[:, None]).double()
    rubbish = 1 - mask
    return new + 5 * rubbish, old - 7 * rubbish, advantages + 100 * rubbish, mask


def real(mask, *tensors):
    """The entries of each tensor where the mask is 1, as tuples of floats."""
    where = mask.bool()
    return list(zip(*[x[where].tolist() for x in tensors]))


# policy_loss


@pytest.mark.parametrize("objective", ["clip", "kl", "pg"])
@pytest.mark.parametrize("seed", range(4))
def test_policy_loss_against_a_loop(objective, seed):
    new, old, advantages, mask = random_batch(seed)
    gains, kls, cuts, ratios = [], [], [], []
    for n, o, a in real(mask, new, old, advantages):
        rho = math.exp(n - o)
        kl = rho - 1 - (n - o)
        bounded = min(max(rho, 1 - EPS), 1 + EPS)
        gain = dict(clip=min(rho * a, bounded * a), kl=rho * a - BETA * kl, pg=n * a)
        gains.append(gain[objective])
        kls.append(kl)
        ratios.append(rho)
        cuts.append((a > 0 and rho > 1 + EPS) or (a < 0 and rho < 1 - EPS))
    loss, stats = ppo.policy_loss(new, old, advantages, mask, objective, EPS, BETA)
    assert loss.item() == pytest.approx(-sum(gains) / len(gains), rel=1e-12)
    assert stats["approx_kl"].item() == pytest.approx(sum(kls) / len(kls), rel=1e-12)
    assert stats["ratio"].item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-12)
    assert stats["clipfrac"].item() == pytest.approx(sum(cuts) / len(cuts), rel=1e-6)
    assert not any(stat.requires_grad for stat in stats.values())


def test_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="ppo"):
        ppo.policy_loss(*random_batch(0), "ppo")


def gradient(new, old, advantages, mask, *args):
    new = new.clone().requires_grad_()
    ppo.policy_loss(new, old, advantages, mask, *args)[0].backward()
    return new.grad


@pytest.mark.parametrize("objective", ["clip", "kl", "pg"])
def test_gradient_at_ratio_one_is_the_policy_gradient(objective):
    _, old, advantages, mask = random_batch(1)
    expected = -advantages * mask / mask.sum()
    found = gradient(old, old, advantages, mask, objective, EPS, BETA)
    assert torch.allclose(found, expected, atol=1e-14)


def test_clip_cuts_the_gradient_where_the_formula_says():
    """All of: ratio below, inside, above the range, and A < 0, A > 0."""
    ratios, signs = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], [-1.5, 1.5]
    grid = torch.tensor(list(product(ratios, signs)), dtype=torch.float64).T
    ratio, advantages = grid[0][None], grid[1][None]  # (1, 14) each
    mask, old = torch.ones_like(ratio), torch.full_like(ratio, -1.0)
    found = gradient(old + ratio.log(), old, advantages, mask, "clip", EPS)[0].tolist()
    cut = 0
    for g, rho, a in zip(found, ratio[0].tolist(), advantages[0].tolist()):
        if (a > 0 and rho > 1 + EPS) or (a < 0 and rho < 1 - EPS):
            assert g == 0
            cut += 1
        else:
            assert g == pytest.approx(-rho * a / 14, rel=1e-12)
    assert cut == 4
    _, stats = ppo.policy_loss(old + ratio.log(), old, advantages, mask, "clip", EPS)
    assert stats["clipfrac"].item() == pytest.approx(4 / 14)


@pytest.mark.parametrize("objective", ["clip", "kl", "pg"])
def test_padding_gets_no_gradient(objective):
    new, old, advantages, mask = random_batch(2)
    found = gradient(new, old, advantages, mask, objective, EPS, BETA)
    assert (found[mask == 0] == 0).all() and (mask == 0).any()


def test_approx_kl_is_never_negative_and_zero_only_at_the_start():
    for seed in range(20):
        new, old, advantages, mask = random_batch(seed)
        for scale in (1e-3, 1.0, 5.0):
            moved = old + scale * (new - old) * mask
            kl = ppo.policy_loss(moved, old, advantages, mask)[1]["approx_kl"].item()
            assert kl > 0
        assert ppo.policy_loss(old, old, advantages, mask)[1]["approx_kl"].item() == 0


@pytest.mark.parametrize("objective", ["clip", "kl", "pg"])
def test_minibatch_gradient_does_not_depend_on_the_cut(objective):
    """Micro-batches weighted by their share of the tokens, as in ppo.py, against one piece."""
    new, old, advantages, mask = random_batch(5, B=8)
    whole = gradient(new, old, advantages, mask, objective, EPS, BETA)
    for cut in ([1] * 8, [3, 5], [1, 2, 5], [7, 1]):
        pieces = new.clone().requires_grad_()
        parts = zip(*[x.split(cut) for x in (pieces, old, advantages, mask)])
        for part in parts:
            loss, _ = ppo.policy_loss(*part, objective, EPS, BETA)
            (loss * part[3].sum() / mask.sum()).backward()
        assert torch.allclose(pieces.grad, whole, atol=1e-14), cut


# value_loss


@pytest.mark.parametrize("seed", range(4))
def test_value_loss_against_a_loop(seed):
    values, old, returns, mask = random_batch(seed)
    values = values.requires_grad_()
    loss, clipfrac = ppo.value_loss(values, old, returns, mask, EPS)
    errors, cuts = [], []
    for v, o, r in real(mask, values, old, returns):
        clipped = min(max(v, o - EPS), o + EPS)
        errors.append(0.5 * max((v - r) ** 2, (clipped - r) ** 2))
        cuts.append((clipped - r) ** 2 > (v - r) ** 2)
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-12)
    assert clipfrac.item() == pytest.approx(sum(cuts) / len(cuts), rel=1e-6)

    loss.backward()
    assert (values.grad[mask == 0] == 0).all()
    for (g, v, r), cut in zip(real(mask, values.grad, values, returns), cuts):
        expected = 0 if cut else (v - r) / len(errors)
        assert g == pytest.approx(expected, rel=1e-12)


# rewards and the controllers


def test_token_rewards_put_the_score_on_the_last_real_token():
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 9.0, 9.0], [-1.0, -1.0, 9.0]])
    ref = torch.tensor([[-1.5, -1.0, -0.5], [-2.0, -9.0, -9.0], [-1.0, -3.0, -9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    rewards = ppo.token_rewards(torch.tensor([5.0, -4.0, 2.0]), logprobs, ref, mask, 0.1)
    expected = [[-0.05, 0.1, 5.0], [-4.0 + 0.1, 0.0, 0.0], [0.0, 2.0 - 0.2, 0.0]]
    assert torch.allclose(rewards, torch.tensor(expected), atol=1e-6)


def test_adapt_kl_coef():
    # On target: no change. The error is capped at 20%, so 128 episodes of 10,000 move 0.256%.
    assert ppo.adapt_kl_coef(0.3, 6.0, 6.0, 128, 10_000) == 0.3
    up, down = (ppo.adapt_kl_coef(0.3, kl, 6.0, 128, 10_000) for kl in (60.0, -60.0))
    assert up == pytest.approx(0.3 * 1.00256) and down == pytest.approx(0.3 * 0.99744)
    assert ppo.adapt_kl_coef(0.3, 6.6, 6.0, 100, 1000) == pytest.approx(0.3 * 1.01)


def test_adapt_beta():
    known = [(0.03, 4.0), (0.0151, 4.0), (0.0149, 2.0), (0.01, 2.0), (0.0067, 2.0), (0.0066, 1.0)]
    for kl, expected in known:
        assert ppo.adapt_beta(2.0, kl, 0.01) == expected, kl
    assert ppo.adapt_beta(2.0, 0.0, 0.01) == 1.0


# The deck's (8.14): why the advantage


def test_raw_q_raises_the_worst_action_and_the_advantage_lowers_it():
    """Three actions, 0 < Q1 < Q2 < Q3, and the first one is sampled."""
    q = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    start = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()

    def after_a_step(weight):
        logits = start.clone().requires_grad_()
        logprob = logits.log_softmax(0)[0].view(1, 1)  # of the first action
        ones = torch.ones(1, 1, dtype=torch.float64)
        loss, _ = ppo.policy_loss(logprob, logprob.detach(), weight * ones, ones, "pg")
        loss.backward()
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


def table(seed, scale=1.0):
    """Logits of each state: (7, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(PREFIXES), 3, generator=generator, dtype=torch.float64)


def logprobs_of(logits, trajectory):
    """(1, LIMIT): log pi of each token, 0 past the end."""
    states = [PREFIXES.index(trajectory[:t]) for t in range(len(trajectory))]
    found = logits.log_softmax(1)[states, list(trajectory)]
    return torch.cat([found, found.new_zeros(LIMIT - len(trajectory))])[None]


def mask_of(trajectory):
    return (torch.arange(LIMIT) < len(trajectory)).double()[None]


def score_of(trajectory):
    return 1.0 + 2 * trajectory[0] - 3.0 * (trajectory[-1] != EOS) + 0.5 * len(trajectory) ** 2


def test_the_trajectories_are_all_there_are():
    total = sum(logprobs_of(table(0), tau).sum().exp().item() for tau in TRAJECTORIES)
    assert total == pytest.approx(1.0, rel=1e-12) and len(TRAJECTORIES) == 15


@pytest.mark.parametrize("objective, baseline", [
    ("pg", False), ("clip", False), ("clip", True), ("kl", False), ("kl", True),
])  # fmt: skip
def test_expected_gradient_is_that_of_the_expected_reward(objective, baseline):
    """grad E[score - kl_coef KL], by autograd through all 15 probabilities, against the mean of
    the gradients that PPO takes: token_rewards, gae with lam=1, policy_loss at ratio 1.

    A value function (any numbers) is a baseline: it must not change the expected gradient.
    """
    kl_coef = 0.4
    ref, state_values = table(11), table(12)[:, 0]
    exact = table(10).requires_grad_()
    expected_reward = 0
    for tau in TRAJECTORIES:
        log_p = logprobs_of(exact, tau).sum()
        penalty = kl_coef * (log_p - logprobs_of(ref, tau).sum())
        expected_reward = expected_reward + log_p.exp() * (score_of(tau) - penalty)
    expected_reward.backward()

    logits = table(10).requires_grad_()
    for tau in TRAJECTORIES:
        new, mask = logprobs_of(logits, tau), mask_of(tau)
        old = new.detach()
        score = torch.tensor([score_of(tau)], dtype=torch.float64)
        rewards = ppo.token_rewards(score, old, logprobs_of(ref, tau), mask, kl_coef)
        if objective == "pg":
            advantages = rewards.sum(1, keepdim=True) * mask
        else:
            values = torch.zeros(1, LIMIT, dtype=torch.float64)
            if baseline:
                for t in range(len(tau)):
                    values[0, t] = state_values[PREFIXES.index(tau[:t])]
            advantages, _ = common.gae(rewards, values, mask, gamma=1.0, lam=1.0)
        loss, _ = ppo.policy_loss(new, old, advantages, mask, objective, EPS, BETA)
        (loss * len(tau) * old.sum().exp()).backward()  # a sum over tokens, times p(tau)
    assert exact.grad.abs().max() > 0.1
    assert torch.allclose(-logits.grad, exact.grad, atol=1e-12)


def test_importance_sampling_is_unbiased():
    """E_old[ratio * A] = E_new[A] in every state, and E_old[approx_kl] = KL(pi_old, pi_new)."""
    old, new = table(20), table(21)
    advantages = table(22)
    one = torch.ones(1, 1, dtype=torch.float64)
    p_old, p_new = old.softmax(1), new.softmax(1)
    for state in range(len(PREFIXES)):
        weighted = kl = ratio = 0.0
        for action in range(3):
            logprobs = [x.log_softmax(1)[state, action].view(1, 1) for x in (new, old)]
            loss, stats = ppo.policy_loss(
                *logprobs, advantages[state, action] * one, one, "kl", beta=0.0
            )
            weighted -= p_old[state, action] * loss
            kl += p_old[state, action] * stats["approx_kl"]
            ratio += p_old[state, action] * stats["ratio"]
        exact_kl = (p_old[state] * (p_old[state] / p_new[state]).log()).sum()
        assert torch.allclose(weighted, (p_new[state] * advantages[state]).sum(), atol=1e-12)
        assert torch.allclose(kl, exact_kl, atol=1e-12)
        assert torch.allclose(ratio, one, atol=1e-12)


def test_approx_kl_of_all_trajectories_is_the_exact_kl():
    old, new = table(30), table(31)
    exact = estimate = 0.0
    for tau in TRAJECTORIES:
        log_new, log_old = logprobs_of(new, tau), logprobs_of(old, tau)
        p = log_old.sum().exp()
        exact += p * (log_old - log_new).sum()
        _, stats = ppo.policy_loss(log_new, log_old, torch.zeros_like(log_old), mask_of(tau))
        estimate += p * stats["approx_kl"] * len(tau)
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-12) and exact > 0.1


def test_ppo_on_exact_expectations_finds_the_best_trajectory():
    """Clip steps from the uniform policy: the expected score climbs to the best one's."""
    logits = torch.zeros(len(PREFIXES), 3, dtype=torch.float64, requires_grad=True)
    means = []
    for _ in range(25):
        old_logits = logits.detach().clone()
        olds = [logprobs_of(old_logits, tau) for tau in TRAJECTORIES]
        means.append(sum(o.sum().exp() * score_of(t) for o, t in zip(olds, TRAJECTORIES)).item())
        for _ in range(2):
            loss = 0
            for tau, old in zip(TRAJECTORIES, olds):
                mask = mask_of(tau)
                advantages = (score_of(tau) - means[-1]) * mask
                part, _ = ppo.policy_loss(logprobs_of(logits, tau), old, advantages, mask)
                loss = loss + part * len(tau) * old.sum().exp()
            (step,) = torch.autograd.grad(loss, logits)
            logits.data -= 0.5 * step
    assert all(later > sooner for sooner, later in zip(means, means[1:]))
    best = max(score_of(tau) for tau in TRAJECTORIES)
    assert means[0] < 0.7 * best and means[-1] > 0.95 * best
