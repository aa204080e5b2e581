"""Scores by dropout on a GPU are those of the CPU, and nothing waits while they are made."""

import pytest
import torch

from tests.shadow.waits import Watch
from tests.stores.test_dropout_scores import BY_ROW, classifier, config_of, rows_of, scorer

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("kind", [*BY_ROW, "deberta-v2"])
def test_scores_are_those_of_the_cpu_without_a_wait(kind):
    batch, model = rows_of(), classifier(config_of(kind))
    expected = scorer(model, at_once=4)(batch)
    sent = batch.pinned().to(GPU)
    ask = scorer(model.to(GPU), at_once=4)
    with Watch() as watch:
        found = ask(sent)
    assert not [wait for _, wait in watch.found if wait.own]
    assert {each.device for each in found} == {GPU}
    here = [each.cpu() for each in found]
    torch.testing.assert_close(here, [*expected], atol=1e-5, rtol=1e-5)
