"""ROUGE against the original script, and what it counts."""

import pytest

pytest.importorskip("nltk")

from dskd.tasks import rouge
from dskd.tasks.answers import ANSWER_METRICS, Answers
from dskd.tasks.rouge import RougeScore, rouge_scores
from tests.goldens import golden

(CASE,) = (case for case in golden("l2kd_tasks")["cases"] if case["id"] == "rouge")
PREDICTED, REFERENCES = CASE["inputs"]["pred"], CASE["inputs"]["refs"]
EXPECTED = CASE["expected"]["per_example_RPF"]
TOLERANCE = CASE["tol"] / 100  # of the scores in per cent

IRREGULAR = 5
"""The one example with irregular forms."""
FORMS = {
    "children": "child", "better": "good", "mice": "mouse", "went": "go", "goes": "go", "were": "be"
}  # fmt: skip
"""What the script's list has of them."""


@pytest.mark.parametrize("index", [n for n in range(len(PREDICTED)) if n != IRREGULAR])
def test_the_scores_are_those_of_the_script(index):
    found = rouge_scores(PREDICTED[index], REFERENCES[index])
    for name, wanted in EXPECTED[index].items():
        assert found[name] == pytest.approx(wanted, abs=TOLERANCE), name


def test_with_the_list_of_irregular_forms_all_are(monkeypatch):
    stem = rouge._stem
    monkeypatch.setattr(rouge, "_stem", lambda word: FORMS.get(word) or stem(word))
    found = ANSWER_METRICS["avg_rouge"].compute(Answers(PREDICTED, REFERENCES))
    averages = {f"rouge{n.upper()}": f for n, f in CASE["expected"]["avg_f"].items()}
    wanted = {"avg_rouge": CASE["expected"]["avg_rouge"], **averages}
    assert found == pytest.approx(wanted, abs=CASE["tol"])
    assert list(found) == ["avg_rouge", "rouge1", "rouge2", "rougeL"]
    irregular = rouge_scores(PREDICTED[IRREGULAR], REFERENCES[IRREGULAR])
    assert irregular["rouge2"] == pytest.approx(EXPECTED[IRREGULAR]["rouge2"], abs=TOLERANCE)


def test_without_it_irregular_forms_are_words_of_their_own():
    """``3 times .. home`` of the first reference, ``children better``, ``ran``: 6 of the 18 words
    of all references, and of the 3 x 11 that were written."""
    found = rouge_scores(PREDICTED[IRREGULAR], REFERENCES[IRREGULAR])["rouge1"]
    assert found[:2] == (round(6 / 18, 5), round(6 / 33, 5))


def test_several_references_are_added_up():
    """3 of 4 + 1 of 2 words of the references, and 3 + 1 of 2 x 3 that were written."""
    recall, precision = round(4 / 6, 5), round(4 / 6, 5)
    assert rouge_scores("x y z", ["x y z u", "x w"])["rouge1"][:2] == (recall, precision)


def test_a_subsequence_of_each_sentence_and_their_union():
    """Of ``a b c d e``, the first sentence has ``a b`` and the second ``a c e`` in its order: four
    words, of five (Lin 2004, section 3.2)."""
    found = rouge_scores("a b f g h. a c i e k", ["a b c d e"])["rougeL"]
    assert found == RougeScore(0.8, 0.4, round(2 * 0.8 * 0.4 / 1.2, 5))
    # a word that was written once counts once
    assert rouge_scores("x", ["x. x"])["rougeL"][:2] == (0.5, 1.0)
    # as one sentence, `b a` have one word in their order
    assert rouge_scores("b a", ["a b"])["rougeL"].recall == 0.5


def test_runs_of_two_words_cross_sentences():
    assert rouge_scores("x. y", ["x y"])["rouge2"] == RougeScore(1.0, 1.0, 1.0)


def test_short_words_have_no_stem():
    assert rouge_scores("dies", ["die"])["rouge1"].f == 0.0  # dies -> di, die stays
    assert rouge_scores("running", ["runs"])["rouge1"].f == 1.0


@pytest.mark.parametrize("texts", [("", ["x"]), ("x", [""]), ("", [""]), ("...", ["-"])])
def test_nothing_in_common_with_nothing(texts):
    assert set(rouge_scores(*texts).values()) == {RougeScore(0.0, 0.0, 0.0)}
