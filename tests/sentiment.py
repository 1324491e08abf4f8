"""Two judges of the sentiment of a film review's sentence, for `--reward_fn` and `--gold_fn`.

    pip install vaderSentiment
    python ppo.py --reward_fn tests/sentiment.py:vader --gold_fn tests/sentiment.py:gold ...

vader   the reward: a lexicon's compound score, -1 to 1. It agrees with people on 64% of sentences.
gold    what the reward stands for, the probability that people call the sentence positive: naive
        Bayes on words and pairs of words, fitted to sentences that people labelled (Pang and Lee).
        `python tests/sentiment.py` prints how well it does on sentences it has not seen.
"""

import gzip
import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "shared/data"
LABELLED = DATA / "rt_polarity_labelled.jsonl.gz"  # lines of text and label, 1 is positive


@cache
def analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(prompts, responses):
    return [analyzer().polarity_scores(p + r)["compound"] for p, r in zip(prompts, responses)]


def features(text):
    """The words of a text and its pairs of neighbours, each once."""
    words = re.findall(r"[a-z']+|[^\sa-z]", text.lower())
    return set(words) | set(zip(words, words[1:]))


class NaiveBayes:
    """Bernoulli counts with Laplace's smoothing; absent features say nothing."""

    def __init__(self, rows):
        self.size, self.counts = Counter(), {0: Counter(), 1: Counter()}
        for row in rows:
            self.size[row["label"]] += 1
            self.counts[row["label"]].update(features(row["text"]))

    def log_odds(self, text):
        """log P(positive | text) - log P(negative | text)."""
        total = math.log(self.size[1] / self.size[0])
        for feature in features(text):
            down, up = self.counts[0][feature], self.counts[1][feature]
            if down or up:
                total += math.log((up + 1) / (self.size[1] + 2))
                total -= math.log((down + 1) / (self.size[0] + 2))
        return total


@cache
def labelled():
    with gzip.open(LABELLED, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@cache
def bayes():
    return NaiveBayes(labelled())


def gold(prompts, responses):
    odds = [bayes().log_odds(p + r) for p, r in zip(prompts, responses)]
    return [1 / (1 + math.exp(-max(-50.0, x))) for x in odds]


def main():
    rows, folds = labelled(), 10
    right = Counter()
    for fold in range(folds):
        model = NaiveBayes(row for i, row in enumerate(rows) if i % folds != fold)
        for row in rows[fold::folds]:
            right["gold"] += (model.log_odds(row["text"]) > 0) == row["label"]
            right["vader"] += (vader([row["text"]], [""])[0] > 0) == row["label"]
    for name, count in right.items():
        print(f"{name}: {count / len(rows):.1%} of {len(rows)} sentences as people labelled them")


if __name__ == "__main__":
    main()
