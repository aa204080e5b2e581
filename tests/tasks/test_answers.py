"""Scores of written answers: closed forms, values of the original code, and what is refused."""

from typing import Any, get_args

import pytest

from dskd.errors import ConfigError, DataError
from dskd.settings.sets import AnswerMetricName
from dskd.tasks import answers
from dskd.tasks.answers import (
    ANSWER_METRICS,
    Answers,
    check_answer_metric,
    check_detail,
    normalised,
)
from dskd.tasks.queries import LogicalForm, logical_form
from tests.goldens import golden

CASES = {case["id"]: case for case in golden("l2kd_tasks")["cases"]}


def score(name: str, predicted: list[str], references: list[Any], details: Any = None) -> Any:
    if (library := ANSWER_METRICS[name].library) is not None:
        pytest.importorskip(library)
    texts = [[r] if isinstance(r, str) else r for r in references]
    return ANSWER_METRICS[name].compute(Answers(predicted, texts, details))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Cat's hat.", "cats hat"),
        ("a.n apple, an Anna", "apple anna"),  # punctuation goes first, and makes an article
        ("the", ""),
    ],
)
def test_normalised_text(text, wanted):
    assert normalised(text) == wanted


def test_exact_matches_take_any_reference():
    predicted, references = ["Thai", " thai", "x"], [["thai", "Thai"], ["thai"], ["y", "z"]]
    assert score("em", predicted, references) == {"em": pytest.approx(100 / 3)}
    assert score("nem", predicted, references) == {"nem": pytest.approx(200 / 3)}


def test_word_f1_takes_the_best_reference():
    """2 of 3 words and 2 of 4: F1 4/7, against 1 of 3 and 1 of 1: 1/2."""
    found = score("nf1", ["x y z", "q"], [["y", "x y u v"], ["the"]])
    assert found == {"nf1": pytest.approx(100 * (4 / 7) / 2)}
    assert score("nf1", ["the"], ["a"]) == {"nf1": 0.0}  # nothing is left of either
    assert score("nf1", ["x x y"], ["x y y"]) == {"nf1": pytest.approx(100 * 2 / 3)}


def test_corpus_f1():
    """Two of three answers are right, two of four questions that have one are answered so."""
    predicted = ["Paris and the Rome", "Oslo", "Unanswerable", "unanswerable", "Bern"]
    references = [["rome", "Paris."], ["Bergen"], ["Lima"], ["unanswerable"], ["bern"]]
    wanted = {"corpus_f1": 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4), "precision": 2 / 3}
    found = score("corpus_f1", predicted, references)
    assert found == pytest.approx({n: 100 * x for n, x in (wanted | {"recall": 2 / 4}).items()})
    nothing = {"corpus_f1": 0.0, "precision": 0.0, "recall": 0.0}
    assert score("corpus_f1", ["unanswerable"], ["unanswerable"]) == nothing


def test_bleu_lowers_letters_and_takes_fewer_references():
    """Four words of five, no shorter than needed by the second reference: precision 1, brevity
    exp(1 - 5/4) against the first alone."""
    found = score("bleu", ["A b c D"], [["a b c d e"]])["bleu"]
    assert found == pytest.approx(100 * 2.718281828**-0.25, rel=1e-6)
    both = score("bleu", ["A b c D", "q r s t"], [["a b c d e", "a b c d"], ["q r s t"]])["bleu"]
    assert both == pytest.approx(100.0)


def test_scores_of_dialogues_are_those_of_the_original():
    case = CASES["woz_metrics"]
    names, predicted, wanted = (case["inputs"][name] for name in ("turn_ids", "pred", "gold"))
    details = [list(pair) for pair in zip(names, wanted, strict=True)]
    found = score("joint_goal_em", predicted, wanted, details)
    assert found == pytest.approx(case["expected"], abs=case["tol"])
    assert next(iter(found)) == "joint_goal_em"


def test_a_dialogue_remembers_what_was_told():
    """The first turn is wrong about food, the second corrects it; the third asks in other words
    than ``None``."""
    told = ["food: thai;", "food: thai, area: north;", "None"]
    details = [[f"en_7_{turn}", answer] for turn, answer in enumerate(told)]
    predicted = ["food: thal;", "food: thai, area: north, area;", ";"]
    found = score("joint_goal_em", predicted, ["."] * 3, details)
    wanted = {"joint_goal_em": 2 / 3, "turn_request_em": 1, "turn_goal_em": 2 / 3}
    assert {n: found[n] for n in wanted} == pytest.approx({n: 100 * x for n, x in wanted.items()})
    assert score("joint_goal_em", ["food: thai; a; b"], ["."], details[:1])["turn_goal_em"] == 0


def test_turns_count_in_the_order_of_their_numbers():
    """Wherever a file has them: what turn 10 lacks, turn 2 has said. Other names are in order."""
    for end, right in (("", 3), ("x", 2)):
        names = [f"en_3_10{end}", f"en_3_2{end}", f"en_4_0{end}"]
        details = list(zip(names, ["food: thai;", "food: thai;", "None"], strict=True))
        found = score("joint_goal_em", ["None", "food: thai;", "None"], ["."] * 3, details)
        assert found["joint_goal_em"] == pytest.approx(100 * right / 3), end


def test_logical_forms_are_those_of_the_original():
    case = CASES["wikisql_lfem"]
    predicted, details = case["inputs"]["pred"], case["inputs"]["answers"]
    forms = case["expected"]["logical_forms"]
    for text, detail, form in zip(predicted, details, forms, strict=True):
        conditions = [tuple(condition) for condition in form["conds"]]
        wanted = LogicalForm(form["sel"], form["agg"], conditions)
        assert logical_form(text, detail["table"]["header"]) == wanted
        check_detail("lfem", detail, "answers.json: entry 0")
    found = score("lfem", predicted, predicted, details)
    assert found == {"lfem": pytest.approx(case["expected"]["lfem"], abs=case["tol"])}


HEADER = ["Player", "Player number", "Team"]


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        # the nearest column, whatever is misspelt
        ("select plaier numbr from table", LogicalForm(1, 0, [])),
        ("select max player number from table", LogicalForm(1, 1, [])),
        ("select most player number from table", None),  # no aggregator
        (
            "select team from table where playr = a b and player number < 3 and team > the band",
            LogicalForm(2, 0, [(0, 0, "ab"), (1, 2, "3"), (2, 1, "theband")]),
        ),
        ("select team from table where player", None),  # no operator
        ("select team from table where player = a team = b", None),  # no `and`
        ("select team from table where team = a band and player = b", None),  # one too many
    ],
)
def test_logical_forms(query, wanted):
    assert logical_form(query, HEADER) == wanted


def test_a_query_with_its_conditions_in_another_order_is_wrong():
    detail = {"table": {"header": HEADER}, "sql": {"sel": 2, "agg": 0}}
    detail["sql"]["conds"] = [[0, 0, "A b"], [1, 0, 7]]
    texts = ["player = a b and player number = 7", "player number = 7 and player = a b"]
    predicted = [f"select team from table where {text}" for text in texts]
    assert score("lfem", predicted, predicted, [detail] * 2) == {"lfem": 50.0}


def test_names():
    assert list(get_args(AnswerMetricName)) == list(ANSWER_METRICS)


def test_a_missing_library_is_named_with_the_metric_and_the_extra(monkeypatch):
    monkeypatch.setattr(answers, "find_spec", lambda library: None)
    for name, library in (("bleu", "sacrebleu"), ("avg_rouge", "nltk")):
        with pytest.raises(ConfigError) as caught:
            check_answer_metric(name, False, "m")
        assert str(caught.value) == f"m: {name} needs {library}: pip install 'dskd[tasks]'"
    check_answer_metric("nf1", False, "m")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lfem", "m: lfem is of queries of WikiSQL; name their file in `answers`"),
        ("joint_goal_em", "m: joint_goal_em is of turns of WOZ; name their file in `answers`"),
    ],
)
def test_a_metric_without_the_details_that_it_takes_is_refused(name, told):
    with pytest.raises(ConfigError) as caught:
        check_answer_metric(name, False, "m")
    assert str(caught.value) == told
    check_answer_metric(name, True, "m")


QUERY = {"sql": {"sel": 0, "agg": 0, "conds": []}, "table": {"header": ["a"]}}


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("lfem", ["en_0_0", "None"]), ("lfem", {"sql": QUERY["sql"]}),
        ("lfem", QUERY | {"table": {"header": []}}), ("lfem", QUERY | {"table": {"header": [1]}}),
        ("lfem", QUERY | {"sql": {"sel": "a", "agg": 0, "conds": []}}),
        ("lfem", QUERY | {"sql": {"sel": 0, "agg": 0, "conds": [[0, 1]]}}),
        ("joint_goal_em", QUERY), ("joint_goal_em", ["en_0_0"]), ("joint_goal_em", ["en_0_0", 1]),
    ],
)  # fmt: skip
def test_entries_that_are_no_details_are_refused(name, detail):
    with pytest.raises(DataError, match=r"^a\.json: entry 3: \w+ takes "):
        check_detail(name, detail, "a.json: entry 3")


def test_entries_that_are_details():
    check_detail("lfem", QUERY, "")
    check_detail("joint_goal_em", ["en_0_0", "None"], "")
    check_detail("em", "anything", "")
