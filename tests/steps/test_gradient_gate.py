"""The gate before scoring: what a plan cannot see, because no setting shows it; and how extraction is batched."""

from types import SimpleNamespace

import pytest

from less_assets.errors import StaleArtifactError
from less_assets.method.gradients.sketch import Sketch
from less_assets.reading.files import BATCHING
from less_assets.steps.gradients import _token_budget, require_same_sketch
from less_assets.store.artifacts import ArtifactStore


def test_features_sketched_with_another_order_of_parameters_are_refused_by_name():
    weights = [("q.lora_A", (2, 4)), ("q.lora_B", (4, 2))]
    before, after = (Sketch("sparse", 16, 0, order).fingerprint for order in (weights, weights[::-1]))
    known: dict[str, str] = {}
    require_same_sketch(known, "train_gradients epoch-1|dolly-00000", before)
    require_same_sketch(known, "train_gradients epoch-1|dolly-00001", before)
    with pytest.raises(StaleArtifactError) as raised:
        require_same_sketch(known, "target_gradients epoch-1|bbh", after)
    assert "dolly-00000" in raised.value.what
    assert "target_gradients epoch-1|bbh" in raised.value.what


def test_the_batch_size_is_asked_once_and_again_only_if_its_record_is_damaged(tmp_path):
    folder = ArtifactStore(str(tmp_path)).artifact("gradients/train/epoch-1/plus-00000", "0" * 16)
    work, free = SimpleNamespace(folder=folder, project=SimpleNamespace(gradients=None)), iter([64, 32])
    loaded = SimpleNamespace(token_budget=lambda settings, longest: next(free))
    assert [_token_budget(work, loaded, 5), _token_budget(work, loaded, 5)] == [64, 64]
    folder.path(BATCHING).write_bytes(b'{"token_b')
    assert [_token_budget(work, loaded, 5), _token_budget(work, loaded, 5)] == [32, 32]
