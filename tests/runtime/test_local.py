"""All stages in one process."""

import handmade
import judge
import pytest

from fxpipe.runtime.run.local import LocalEngine


@pytest.mark.parametrize("name", ["chain", "knot", "image"])
@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_loss_and_gradients_are_those_of_the_plain_model(name, num_stages):
    with judge.float64():
        case = getattr(handmade, name)()
        whole = case.draft(case.model, num_stages, case.batch)
        stages = handmade.stages_of(case.model, whole)
        for num in (1, 3, 8):
            for stage in stages:
                stage.zero_grad()
            jobs = handmade.jobs_of(case, stages, num_stages, num)
            loss = LocalEngine(stages).train(jobs)
            expected, gradients = handmade.reference(case, num)
            judge.assert_close(loss, expected, "loss")
            found = handmade.gradients_of(stages)
            found.pop("head.weight", None)  # the other name of the tied weight, where another stage holds it
            judge.assert_close(found, gradients, "gradients")
