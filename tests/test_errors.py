"""Errors as users see them."""

import pickle

from less_assets.errors import CorruptArtifactError


def test_an_error_about_what_cannot_be_printed_can_be_printed():
    error = CorruptArtifactError("no field 'separ\ud800ator'", where="zarr.json", fix="run it again")
    assert str(error).encode() == b"no field 'separ\\ud800ator'\n  where: zarr.json\n  to do: run it again"


def test_an_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(CorruptArtifactError("what", where="here", fix="this")))
    assert (error.what, error.where, error.fix) == ("what", "here", "this")
