"""Sizes: what a student may have, what its groups lose, and what is said of the impossible."""

import pytest

from dskd.errors import ConfigError
from dskd.narrowing.widths import Cut, Family, Target, Widths, cuts, student_widths

BERT = Widths(hidden=768, intermediate=3072, heads=12, kv_heads=12, head_dim=64)
LLAMA = Widths(hidden=1024, intermediate=2816, heads=16, kv_heads=4, head_dim=64)
QWEN3 = Widths(hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128)
JOINED, ROTARY, DIVIDING = Family(), Family(rotary=True), Family(rotary=True, divides=True)


@pytest.mark.parametrize(
    ("teacher", "target", "family", "wanted"),
    [
        (BERT, Target(192), JOINED, Widths(192, 768, 12, 12, 16)),
        (BERT, Target(516), JOINED, Widths(516, 2064, 12, 12, 43)),
        (BERT, Target(192, strategy="head"), JOINED, Widths(192, 768, 3, 3, 64)),
        (BERT, Target(512, 1000, 8, strategy="head"), JOINED, Widths(512, 1000, 8, 8, 64)),
        (BERT, Target(768, 768), JOINED, Widths(768, 768, 12, 12, 64)),
        (LLAMA, Target(256), DIVIDING, Widths(256, 704, 4, 1, 64)),
        (LLAMA, Target(256, kv_heads=2), DIVIDING, Widths(256, 704, 8, 2, 64)),
        (LLAMA, Target(250, heads=12), ROTARY, Widths(250, 688, 12, 3, 64)),  # 687.5: halves up
        (LLAMA, Target(8, heads=4), ROTARY, Widths(8, 22, 4, 1, 64)),
        (QWEN3, Target(100, strategy="head"), ROTARY, Widths(100, 300, 2, 1, 128)),
    ],
)
def test_reachable_sizes(teacher, target, family, wanted):
    assert student_widths(teacher, target, family) == wanted


ORIGINAL = {"rule": "original"}


@pytest.mark.parametrize(
    ("teacher", "target", "family", "message"),
    [
        (BERT, Target(200), JOINED,
         "method.hidden_size: 200 is not a multiple of the 12 heads that strategy dim keeps;"
         " nearest possible: 192 or 204"),
        (BERT, Target(516, strategy="head"), JOINED, "strategy head keeps; nearest possible: 512"),
        (BERT, Target(1024), JOINED, "1024 is not within the teacher's 768; nearest possible: 768"),
        (BERT, Target(0), JOINED, "0 is not within the teacher's 768; nearest possible: 12"),
        (BERT, Target(128, **ORIGINAL), JOINED, "the 12 heads .* possible: 120 or 132"),
        (BERT, Target(756, **ORIGINAL), JOINED,
         "removes 1 of each of 12 chunks; rule original removes at least 8;"
         " nearest possible: 672 or 768"),
        (BERT, Target(192, heads=3), JOINED, "method.heads: 3 does not go .* possible: 12"),
        (BERT, Target(192, kv_heads=1), JOINED, "method.kv_heads: 1 does not go"),
        (BERT, Target(192, 4000), JOINED, "method.intermediate_size: 4000 .* possible: 3072"),
        (BERT, Target(192, 0), JOINED, "method.intermediate_size: 0 .* possible: 1$"),
        (LLAMA, Target(254), DIVIDING, "254 is not a multiple of its 4 heads; .* 252 or 256"),
        (LLAMA, Target(256, heads=6), DIVIDING, "method.heads: 6 .* nearest possible: 4 or 8"),
        (LLAMA, Target(256, kv_heads=5), DIVIDING, "method.kv_heads: 5 .* nearest possible: 4"),
        (LLAMA, Target(256, heads=8, kv_heads=1), DIVIDING, "kv_heads: 1 .* heads 8; .*: 2"),
        (LLAMA, Target(200, **ORIGINAL), ROTARY, "200 does not remove as many of each of 16"),
        (LLAMA, Target(200, strategy="head", **ORIGINAL), ROTARY,
         "200 does not remove whole chunks of 64 .* possible: 192 or 256"),
        (Widths(100, 300, 16, 4, 8), Target(50, **ORIGINAL), ROTARY,
         "needs rule annealed: .* nearest possible: none"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused_with_the_nearest(teacher, target, family, message):
    with pytest.raises(ConfigError, match=message):
        student_widths(teacher, target, family)


@pytest.mark.parametrize(
    ("strategy", "rule", "stream", "attention"),
    [
        ("dim", "annealed", Cut(768, 576), Cut(768, 576, 12, "eighths")),
        ("head", "annealed", Cut(768, 576), Cut(12, 9, pace="heads")),
        ("dim", "original", Cut(768, 576, 12, "eighths"), Cut(768, 576, 12, "eighths")),
        ("head", "original", Cut(12, 9, pace="heads"), Cut(12, 9, pace="heads")),
    ],
)
def test_what_the_groups_of_bert_lose(strategy, rule, stream, attention):
    student = student_widths(BERT, Target(192, strategy=strategy, rule=rule), JOINED)
    wanted = {"R": stream, "T": Cut(768, 576), "A": attention, "F": Cut(3072, 2304)}
    assert cuts(BERT, student, strategy, rule, JOINED) == wanted


@pytest.mark.parametrize(
    ("strategy", "rule"), [("dim", "annealed"), ("head", "annealed"), ("dim", "original")]
)
def test_rotary_attention_loses_kv_groups(strategy, rule):
    """And the stream is cut in chunks by the original rule."""
    student = student_widths(LLAMA, Target(256, strategy=strategy, rule=rule), DIVIDING)
    found = cuts(LLAMA, student, strategy, rule, DIVIDING)
    assert found["A"] == Cut(4, 3, pace="heads")
    assert found["R"] == Cut(1024, 768, *((16, "eighths") if rule == "original" else ()))
