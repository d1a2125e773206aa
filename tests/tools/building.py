"""Build region stores with tools/build_features.py for tests, and compare them."""

import hashlib
import sys

from megatron_interbert.data.store import RegionStore
from tests.launching import launch
from tests.preparation.formats import lxmert_line


def command(*flags):
    return (sys.executable, "tools/build_features.py", *flags)


def build(output, *flags):
    """Build a store, which must succeed; return it, opened, and the output."""
    code, out, err = launch(*command(*flags, "--output", output))
    assert code == 0, out + err
    return RegionStore(str(output)), out


def refused(*flags):
    """Return the last line of a build that must be refused."""
    code, out, err = launch(*command(*flags))
    assert code == 2, out + err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def content(folder):
    """Return the hashes of all files of a store, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def tsv(path, images, line=lxmert_line):
    path.write_text("".join(map(line, images)))
    return path
