"""The gate before scoring: what a plan cannot see, because no setting shows it."""

import pytest

from less_assets.assets.gradients import check_sketch
from less_assets.errors import StaleArtifactError
from less_assets.method.sketch import Sketch


def test_features_sketched_with_another_order_of_parameters_are_refused_by_name():
    weights = [("q.lora_A", (2, 4)), ("q.lora_B", (4, 2))]
    before, after = (Sketch("sparse", 16, 0, order).fingerprint for order in (weights, weights[::-1]))
    known: dict[str, str] = {}
    check_sketch(known, "train_gradients epoch-1|dolly-00000", before)
    check_sketch(known, "train_gradients epoch-1|dolly-00001", before)
    with pytest.raises(StaleArtifactError) as raised:
        check_sketch(known, "target_gradients epoch-1|bbh", after)
    assert "dolly-00000" in raised.value.what
    assert "target_gradients epoch-1|bbh" in raised.value.what
