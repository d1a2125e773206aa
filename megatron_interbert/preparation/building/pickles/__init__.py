"""Pickles from strangers, decoded in a confined process; reading.loads is the way in."""
