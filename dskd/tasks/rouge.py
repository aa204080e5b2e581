"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) as the original script computes them, version 1.5.5.

That is ``ROUGE-1.5.5.pl -a -c 95 -m -n 2``: words of ASCII letters and digits, those of more than
three by their Porter stem; of several references, hits and totals are added up over all of them
before anything is divided (``-f A``); ROUGE-L of several sentences is the union of their longest
common subsequences. Sentences end at ``.``. What is left out is the script's list of irregular
forms, of WordNet: ``children`` and ``child`` are two words here (up to 0.1 points of an average of
real texts).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

_WORD = re.compile(r"[a-z0-9]+")
_STEMMED_FROM = 4  # letters
_DECIMALS = 5


class RougeScore(NamedTuple):
    """Recall, precision and their F1 of one example, 0 to 1, to the script's five decimals."""

    recall: float
    precision: float
    f: float


class _Hits(NamedTuple):
    """What is in common, and how much there is in a reference and in what was written."""

    common: int
    wanted: int
    written: int


def rouge_scores(predicted: str, references: Sequence[str]) -> dict[str, RougeScore]:
    """``rouge1``, ``rouge2`` and ``rougeL`` of a text.

    Args:
        predicted: the text.
        references: one or more texts that it is compared with.
    """
    sentences = _sentences(predicted)
    wanted = [_sentences(reference) for reference in references]
    return {
        "rouge1": _score([_ngrams(sentences, reference, 1) for reference in wanted]),
        "rouge2": _score([_ngrams(sentences, reference, 2) for reference in wanted]),
        "rougeL": _score([_subsequences(sentences, reference) for reference in wanted]),
    }


def _sentences(text: str) -> list[list[str]]:
    """The words of each sentence, in the form in which they are compared."""
    return [_words(sentence) for sentence in text.split(".")]


def _words(text: str) -> list[str]:
    words = _WORD.findall(text.lower())
    return [_stem(word) if len(word) >= _STEMMED_FROM else word for word in words]


def _stem(word: str) -> str:
    return _stemmer()(word)


@cache
def _stemmer() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer

    # Of the three rule sets of nltk this is Porter's own program, which the script has, too.
    return cache(PorterStemmer(mode=PorterStemmer.MARTIN_EXTENSIONS).stem)


def _ngrams(written: list[list[str]], wanted: list[list[str]], n: int) -> _Hits:
    """Runs of n words in common, also across sentences."""
    counts = []
    for sentences in (written, wanted):
        words = [word for sentence in sentences for word in sentence]
        counts.append(Counter(zip(*(words[k:] for k in range(n)), strict=False)))
    return _Hits((counts[0] & counts[1]).total(), counts[1].total(), counts[0].total())


def _subsequences(written: list[list[str]], wanted: list[list[str]]) -> _Hits:
    """Words of each wanted sentence that are in its longest common subsequence with any written
    one; a word counts at most as often as it was written (Lin 2004, section 3.2)."""
    left = Counter(word for sentence in written for word in sentence)
    total, common = left.total(), 0
    for sentence in wanted:
        union = set().union(*(_longest(sentence, other) for other in written))
        for place in sorted(union):
            if left[sentence[place]]:
                left[sentence[place]] -= 1
                common += 1
    return _Hits(common, sum(map(len, wanted)), total)


def _longest(one: list[str], other: list[str]) -> set[int]:
    """Places in ``one`` of a longest common subsequence; of several, that of the script."""
    table = [[0] * (len(other) + 1)]
    for word in one:
        above, row = table[-1], [0]
        for m, that in enumerate(other, 1):
            row.append(above[m - 1] + 1 if word == that else max(above[m], row[-1]))
        table.append(row)
    places, n, m = set(), len(one), len(other)
    while n and m:
        if one[n - 1] == other[m - 1]:
            n, m = n - 1, m - 1
            places.add(n)
        elif table[n - 1][m] >= table[n][m - 1]:
            n -= 1
        else:
            m -= 1
    return places


def _score(hits: list[_Hits]) -> RougeScore:
    common, wanted, written = (sum(column) for column in zip(*hits, strict=True))
    recall = round(common / wanted, _DECIMALS) if wanted else 0.0
    precision = round(common / written, _DECIMALS) if written else 0.0
    both = recall + precision
    # Of the rounded numbers, as in the script.
    return RougeScore(recall, precision, round(2 * recall * precision / both if both else 0.0, 5))
