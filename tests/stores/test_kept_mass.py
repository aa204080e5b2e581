"""What ``dskd cache info`` says: the mass of the kept tokens at every position, and the cost."""

import numpy as np
import pytest

from dskd.data.views import CausalView
from dskd.errors import StoreError
from dskd.stores.cache_info import cache_info
from dskd.stores.cost import FILE, Cost, Costs, Meter, read_costs
from dskd.stores.kept_mass import _Counts, kept_masses
from dskd.stores.sweep import Work
from tests.stores.caches import ToyMasks, ToyRows
from tests.stores.test_logits import layout_of, store_all, teach, whole_batch


def dense(rows, view, heat: float) -> np.ndarray:
    """Softmax at a temperature of all positions [N, V], of two draws."""
    batches = [whole_batch(rows, view, draw) for draw in range(view.draws)]
    logits_NV = np.concatenate([teach(batch).double().numpy() for batch in batches]) / heat
    exp_NV = np.exp(logits_NV - logits_NV.max(1, keepdims=True))
    return exp_NV / exp_NV.sum(1, keepdims=True)


@pytest.mark.parametrize("values", ["fp32", "fp16"])
@pytest.mark.parametrize("view", [ToyMasks(), CausalView()])
def test_kept_mass_is_that_of_the_teacher(tmp_path, values, view):
    """Of its five largest probabilities; at 1, of which no tail is stored, and at two others."""
    rows = ToyRows(equal=True)
    masked = not isinstance(view, CausalView)
    layout = layout_of(values=values, masked=masked, temperatures=(2.0, 0.5))
    cache = store_all(tmp_path / "c", layout, rows, view, teach)
    found = kept_masses(cache, (5, 50, 100))
    assert [mass.temperature for mass in found] == [0.5, 1.0, 2.0]
    near = 1e-6 if values == "fp32" else 2e-3
    for mass in found:
        kept_N = np.sort(dense(rows, view, mass.temperature), 1)[:, -5:].sum(1)
        assert mass.mean == pytest.approx(kept_N.mean(), abs=near)
        ordered = np.sort(kept_N)
        for cent, value in mass.percentiles.items():
            wanted = ordered[-(-len(kept_N) * cent // 100) - 1]
            assert value == pytest.approx(wanted, abs=near), (mass.temperature, cent)
        exact = np.sort(np.array([*mass.percentiles.values()]))
        assert 0 < exact[0] < exact[1] < exact[2] <= 1


def test_a_percentile_is_exactly_one_of_the_masses(tmp_path):
    """Bit for bit that of float32, of many masses that begin with the same bits."""
    random = np.random.RandomState(0)
    mass_N = (0.7 + 0.001 * random.rand(10_001)).astype(np.float32)
    mass_N[:3] = 0.0, 1.0, 1.0
    counts = _Counts(1.0, (1, 5, 50, 99))
    for look in (counts.count_high, counts.count_low):
        for part in np.array_split(mass_N, 7):
            look(part)
    found = counts.result()
    ordered = np.sort(mass_N)
    for cent, value in found.percentiles.items():
        assert np.float32(value) == ordered[-(-10_001 * cent // 100) - 1]
    assert found.mean == pytest.approx(mass_N.astype(np.float64).mean(), abs=1e-12)


def test_info_names_cost_and_mass(tmp_path):
    folder = tmp_path / "recipe" / "a" / "cache"
    store_all(folder, layout_of(temperatures=(2.0,)), ToyRows(), ToyMasks(), teach)
    assert not any(name.startswith("capture") for name in cache_info(folder))
    for run, rows in (("a", 3), ("b", 4), ("a", 20)):
        Meter(folder, tmp_path / "recipe" / run).add(Work(rows, 10 * rows, 2))
    costs = read_costs(folder)
    assert costs.by.keys() == {"..", "../../b"}
    assert costs.by[".."].model_copy(update={"seconds": 0.0}) == Cost(rows=23, tokens=230, passes=4)
    about = cache_info(folder)
    assert about["capture cost"] == "0:00 for 27 rows of 270 tokens in 6 teacher passes"
    assert about["of that by ../../b"] == "0:00 for 4 rows of 40 tokens in 2 teacher passes"
    assert about["rows_held"] == 46
    assert about["kept mass at temperature 1"].startswith("mean 0.")
    assert "; 5 % of positions at most 0." in about["kept mass at temperature 2"]


def test_a_damaged_cost_is_named(tmp_path):
    folder = tmp_path / "c"
    store_all(folder, layout_of(), ToyRows(), ToyMasks(), teach)
    Meter(folder, tmp_path).add(Work(1, 2, 3))
    assert read_costs(folder) != Costs()
    path = folder / FILE
    path.write_text(path.read_text().replace('"rows": 1', '"rows": 7'))
    with pytest.raises(StoreError, match=r"cost\.json: damaged"):
        cache_info(folder)
