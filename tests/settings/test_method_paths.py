"""``run:NAME`` below ``method``, whose settings are known to its class alone."""

from dskd.settings.recipe import SINGLE, dump_run, read
from tests.settings.test_recipe import _refused, _write

IN_METHOD = """
base: {out: o, method: {kind: mine}}
runs:
  a: {}
  b: {method: {from: "run:a", deep: {list: ["run:a", "not run:a", "run:", 1]}}}
  c: {}
"""


def test_a_method_can_name_the_folder_of_an_earlier_run(tmp_path):
    """Wherever a setting is exactly that, for nobody knows yet what the method has."""
    runs = read(_write(tmp_path, IN_METHOD)).runs
    found = {"from": "o/a", "deep": {"list": ["o/a", "not run:a", "run:", 1]}}
    assert runs["b"].method == {"kind": "mine", **found}
    assert read(_write(tmp_path, dump_run(runs["b"]))).runs[SINGLE].method == runs["b"].method
    over = ["runs.c.method.from=run:b", "runs.b.method.deep=3"]
    runs = read(_write(tmp_path, IN_METHOD), over).runs
    assert (runs["c"].method["from"], runs["b"].method["deep"]) == ("o/b", 3)


def test_a_method_can_name_no_later_run(tmp_path):
    later = IN_METHOD.replace("run:a", "run:c").replace('["run:c"', '["run:aa"')
    assert _refused(tmp_path, later) == [
        "FILE: runs.b.method.from: 'run:c' names no earlier run; earlier ones: a",
        "FILE: runs.b.method.deep.list.0: 'run:aa' names no earlier run; did you mean 'a'?;"
        " earlier ones: a",
    ]
