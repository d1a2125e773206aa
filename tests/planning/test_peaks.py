"""Test the peak memory of real ranks against the formula, with a small model; for larger ones see
tests/campaigns/peaks.py.
"""

from tests.campaigns.peaks import compare, libraries_of, write_sizes


def test_the_peak_of_two_ranks(store, tmp_path):
    """Take 100 M parameters, so that the 0.1 GB by which runs differ matter little."""
    libraries = libraries_of(store, tmp_path)
    model = write_sizes(tmp_path, 1024, (3, 3, 2))
    count, measured, planned = compare(store, model, 2, libraries)
    assert count > 100e6
    assert abs(measured / planned - 1) < 0.15, (measured, planned, libraries)
