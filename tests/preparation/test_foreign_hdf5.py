"""Test foreign HDF5 files, in stores and as sources: nothing outside the file is read, no code is
loaded, and a file that the system does not let us read is not reported as damaged.
"""

import ast
import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.opening import open_features
from tests.campaigns import hostile_hdf5
from tests.corpus import write_store
from tests.launching import ENVIRONMENT, ROOT, launch
from tests.preparation.formats import adaptive_hdf5, made_up_images
from tests.preparation.hostile import (
    HOSTILE,
    external_link,
    external_storage,
    plugin_filter,
    renew,
    virtual,
)

SECRET = b"the-root-password:" * 400
compiler = shutil.which("gcc")
needs_compiler = pytest.mark.skipif(compiler is None, reason="needs gcc")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("original") / "store")


@pytest.fixture
def store(original, tmp_path):
    return shutil.copytree(original, tmp_path / "store")


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    return path


def read_all(path):
    """Return everything that a store provides."""
    store = RegionStore(str(path))
    texts = [store.caption(number) for number in range(store.num_captions)]
    images = [store.read(number) for number in range(store.num_images)]
    return texts, images, store.languages(), store.region_counts()


@pytest.mark.parametrize("feature", HOSTILE, ids=lambda feature: feature.__name__)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("captions.h5", "text"),
        ("tokens.h5", "ids"),
        ("shard-00001.h5", "image_features"),
        ("shard-00001.h5", "pos_boxes"),
    ],
)
def test_stores_do_not_reach_out(store, secret, file, name, feature):
    with h5py.File(store / file, "r+") as opened:
        feature(opened, name, secret)
    renew(store)
    with pytest.raises(UsageError, match=f"{file}: dataset '{name}' {HOSTILE[feature]}"):
        read_all(store)


@pytest.mark.parametrize("feature", HOSTILE, ids=lambda feature: feature.__name__)
@pytest.mark.parametrize(
    "name", ["image_features", "image_bb", "spatial_features", "pos_boxes", "image_ids"]
)
def test_sources_do_not_reach_out(tmp_path, secret, name, feature):
    path = source(tmp_path)
    with h5py.File(path, "r+") as file:
        feature(file, name, secret)
    with pytest.raises(
        UsageError, match=rf"features.hdf5: dataset '{name}' {HOSTILE[feature]}"
    ) as refusal:
        source_of(str(path))

    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "feature", [external_storage, external_link, virtual], ids=lambda feature: feature.__name__
)
def test_a_build_ends_in_one_line(tmp_path, secret, feature):
    path = source(tmp_path, fixed=True)
    with h5py.File(path, "r+") as file:
        feature(file, "image_features", secret)

    flags = ("--detector", "x", "--workers", 1, "--output", tmp_path / "store")
    code, _, err = launch(sys.executable, "tools/build_features.py", path, *flags)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"features.hdf5: dataset 'image_features' {HOSTILE[feature]}" in err
    assert not list(tmp_path.glob("store*"))


def source(folder, fixed=False):
    """Write a bottom-up attention file of three images, with their names; `fixed` gives each two
    regions.
    """
    path = folder / "features.hdf5"
    names = adaptive_hdf5(path, made_up_images(3))

    with h5py.File(path, "r+") as file:
        file["image_ids"] = names
        if fixed:
            for name in ("image_features", "image_bb", "spatial_features"):
                values = file[name][:6]
                del file[name]
                file[name] = values.reshape(3, 2, -1)

            del file["pos_boxes"]

    return path


def test_sound_sources_are_read_in_every_form_that_needs_no_plug_in(tmp_path):
    plain = source(tmp_path)
    expected = list(open_features(str(plain), "hdf5", ReadOptions()).read([0, 3]))
    packings = [
        {"compression": "gzip", "shuffle": True, "fletcher32": True},
        {"compression": "lzf"},
        {"chunks": True},
    ]
    for number, packing in enumerate(packings):
        packed = tmp_path / f"packed-{number}.hdf5"
        with h5py.File(plain) as old, h5py.File(packed, "w", userblock_size=512) as new:
            for name in old:
                more = (
                    {"compression": packing.get("compression"), "chunks": True}
                    if name == "image_ids"
                    else packing
                )
                new.create_dataset(name, data=old[name][:].tolist(), dtype=old[name].dtype, **more)

        for record, other in zip(
            expected, open_features(str(packed), "hdf5", ReadOptions()).read([0, 3]), strict=True
        ):
            assert record.regions.image_id == other.regions.image_id
            np.testing.assert_array_equal(record.regions.features, other.regions.features)


def test_texts_equal_those_of_h5py(tmp_path):
    texts = ["", "a", "一只猫", "x" * 5000, *(f"text {number}" for number in range(3000))]
    from megatron_interbert.data.hdf5 import Hdf5File

    for number, layout in enumerate(({}, {"chunks": (7,), "compression": "gzip"})):
        path = tmp_path / f"{number}.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("texts", data=texts, dtype=h5py.string_dtype(), **layout)
            file.attrs["languages"] = ["en", "zh"]

        with Hdf5File(path) as file, h5py.File(path) as plain:
            assert file.strings("texts").tolist() == plain["texts"].asstr()[:].tolist() == texts
            assert file.attribute("languages").tolist() == ["en", "zh"]
            assert file.attribute("none") is None


def test_one_text_named_a_thousand_times_does_not_fill_the_memory(store):
    """Check this because each entry of a list of texts is a pointer: if all point to one long text,
    a small file takes any amount of memory.
    """
    path = store / "shard-00001.h5"

    with h5py.File(path, "r+") as file:
        entries = len(file["image_ids"])
        del file["image_ids"]
        file.create_dataset(
            "image_ids", data=["x" * 1_000_000] + ["y"] * (entries - 1), dtype=h5py.string_dtype()
        )
        place = file["image_ids"].id.get_offset()

    data = bytearray(path.read_bytes())
    data[place : place + 16 * entries] = data[place : place + 16] * entries
    path.write_bytes(data)
    renew(store)

    with pytest.raises(
        UsageError, match="'image_ids' repeats texts until they are longer than the file"
    ):
        RegionStore(str(store)).image_id(20)


@pytest.mark.parametrize("length", [0, 2**64 - 16, 2**64 - 20])
def test_a_heap_without_end_is_not_walked_for_ever(store, length):
    """Check this because HDF5 itself loops forever on a heap object of size zero, and only ending
    the process stops it.
    """
    path = store / "captions.h5"
    data = bytearray(path.read_bytes())
    first = data.index(b"GCOL") + 16
    data[first : first + 2] = (0 if length == 0 else 1).to_bytes(2, "little")
    data[first + 8 : first + 16] = length.to_bytes(8, "little")
    path.write_bytes(data)
    renew(store)
    command = (sys.executable, "-m", "tests.campaigns.hostile_hdf5", "--read", str(store))
    ended = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 0, ended.stderr
    assert "holds an object without end" in ended.stdout


PLUGIN = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void loaded(void) {
  FILE *f = fopen(getenv("MARKER"), "w"); if (f) fclose(f);
}
"""


@needs_compiler
@pytest.mark.parametrize("door", [False, True])
def test_no_plug_in_is_loaded(tmp_path, secret, door):
    """Check also that HDF5 alone loads the library from the same file; otherwise the test would
    prove nothing.
    """
    path = source(tmp_path)
    with h5py.File(path, "r+") as file:
        plugin_filter(file, "image_features", secret)

    build_library(PLUGIN, tmp_path / "plugins" / "libhostile.so")
    marker = tmp_path / "marker"
    setting = "import megatron_interbert.data.hdf5\n" if door else ""
    code = (
        setting
        + "import sys, h5py\ntry:\n h5py.File(sys.argv[1])['image_features'][:]\nexcept OSError as"
        " e:\n print(e)"
    )
    changes = {"HDF5_PLUGIN_PATH": str(tmp_path / "plugins"), "MARKER": str(marker)}
    subprocess.run(
        (sys.executable, "-c", code, path),
        cwd=ROOT,
        env={**ENVIRONMENT, **changes},
        check=True,
        timeout=60,
    )
    assert marker.exists() is not door


def build_library(code, path):
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".c").write_text(code)
    subprocess.run(
        (compiler, "-shared", "-fPIC", "-o", path, path.with_suffix(".c"), "-ldl"),
        check=True,
        timeout=60,
    )


FAILING_READS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <sys/uio.h>
#include <unistd.h>
static int bad(int fd) {
    char link[64], name[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof name - 1);
    if (n < 0) return 0;
    name[n] = 0;
    return strstr(name, getenv("BAD_FILE")) != NULL;
}
ssize_t preadv64(int fd, const struct iovec *v, int n, off_t at) {
    static ssize_t (*real)(int, const struct iovec *, int, off_t);
    if (!real) real = dlsym(RTLD_NEXT, "preadv64");
    if (bad(fd)) { errno = EIO; return -1; }
    return real(fd, v, n, at);
}
ssize_t preadv(int fd, const struct iovec *v, int n, off_t at) { return preadv64(fd, v, n, at); }
ssize_t pread64(int fd, void *p, size_t n, off_t at) {
    struct iovec v = {p, n};
    return preadv64(fd, &v, 1, at);
}
ssize_t pread(int fd, void *p, size_t n, off_t at) { return pread64(fd, p, n, at); }
ssize_t read(int fd, void *p, size_t n) {
    static ssize_t (*real)(int, void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "read");
    if (bad(fd)) { errno = EIO; return -1; }
    return real(fd, p, n);
}
"""


@needs_compiler
@pytest.mark.parametrize("file", ["captions.h5", "tokens.h5", "shard-00001.h5", "features.hdf5"])
def test_a_failing_disk_is_not_called_damage(store, tmp_path, file):
    build_library(FAILING_READS, tmp_path / "library" / "failing.so")
    code = (
        "import sys\nfrom megatron_interbert.errors import UsageError\n"
        "from tests.preparation.test_foreign_hdf5 import *\n"
        "try:\n source_of(sys.argv[2]) if 'hdf5' in sys.argv[2] else read_all(sys.argv[1])\n"
        "except UsageError as e:\n print(e)"
    )
    path = source(tmp_path)
    changes = {"LD_PRELOAD": str(tmp_path / "library" / "failing.so"), "BAD_FILE": file}
    command = (sys.executable, "-c", code, store, path if file == path.name else "")
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**ENVIRONMENT, **changes},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"{file}: could not be read (Input/output error)" in ended.stdout
    assert "rebuild" not in ended.stdout


def source_of(path):
    return list(open_features(path, "hdf5", ReadOptions()).read([0, 3]))


def in_child(function):
    """Call a function in a forked process; return the text of its UsageError or, after the type,
    of another exception, "" for none.
    """
    ends = os.pipe()
    child = os.fork()
    if child == 0:
        said = "no UsageError"
        try:
            function()
            said = ""
        except UsageError as error:
            said = str(error)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"

        os.write(ends[1], said.encode())
        os._exit(0)

    os.close(ends[1])
    os.waitpid(child, 0)
    with open(ends[0], "rb") as end:
        return end.read().decode()


def test_a_forbidden_file_is_not_called_damage(store):
    for path in (store, *store.parents):
        if path.is_relative_to(tempfile.gettempdir()) and path != Path(tempfile.gettempdir()):
            path.chmod(0o755)

    (store / "captions.h5").chmod(0)

    def read():
        if os.geteuid() == 0:
            os.setuid(65534)
        read_all(store)

    said = in_child(read)
    assert "captions.h5: could not be read (Permission denied)" in said, said


def test_too_many_open_files_is_not_called_damage(store):
    opened = RegionStore(str(store))

    def read():
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        opened.read(20)

    assert "shard-00001.h5: could not be read (Too many open files)" in in_child(read)


def test_no_memory_is_not_called_damage(tmp_path):
    from megatron_interbert.data.hdf5 import Hdf5File

    path = tmp_path / "large.h5"
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w") as file:  # a sparse file: large, but written at once
        space = h5py.h5s.create_simple((1 << 31,))
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_UINT8, space, properties)

    def read():
        with open("/proc/self/statm") as statm:
            now = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20), now + (256 << 20)))
        with Hdf5File(path) as file:
            file["x"][:]

    assert "large.h5: could not be read (Cannot allocate memory)" in in_child(read)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_what_hdf5_says_in_words_only_is_understood(number):
    from megatron_interbert.data.hdf5 import reading_problem

    words = OSError(
        f"Can't synchronously read data (file read failed: time = now, errno = {number}, error"
        " message = '...')"
    )
    assert os.strerror(number) in str(reading_problem("x.h5", words))
    assert "damage" not in str(reading_problem("x.h5", words))
    assert "rebuild" in str(reading_problem("x.h5", OSError("file signature not found")))


def test_a_shard_that_was_replaced_is_checked_anew(store, tmp_path, monkeypatch):
    """Check this because rows are read at offsets learnt from one file, which are wrong for another
    file of the same name.
    """
    monkeypatch.setattr("megatron_interbert.data.store.MAX_OPEN_SHARDS", 1)
    opened = RegionStore(str(store))
    expected = opened.read(20).features
    opened.read(0)  # the shard of image 20 is closed now
    other = tmp_path / "other.h5"
    with h5py.File(store / "shard-00001.h5") as old, h5py.File(other, "w") as new:
        for name in reversed(list(old)):  # moves everything
            old.copy(old[name], new, name)

    os.replace(other, store / "shard-00001.h5")
    np.testing.assert_array_equal(opened.read(20).features, expected)


def test_no_other_place_reads_hdf5():
    """Check that only data/hdf5.py opens HDF5 files for reading; writing is allowed anywhere."""
    found = set()

    for folder in ("megatron_interbert", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(call, ast.Call) or ast.unparse(call.func) not in (
                    "h5py.File",
                    "File",
                    "h5f.open",
                ):
                    continue

                modes = [
                    *call.args[1:2],
                    *(word.value for word in call.keywords if word.arg == "mode"),
                ]
                if [ast.unparse(mode) for mode in modes] == ["'w'"]:
                    continue

                found.add(str(path.relative_to(ROOT)))

    assert found == {"megatron_interbert/data/hdf5.py"}


def test_mutated_files_do_no_harm(tmp_path):
    """Run a short form of `python -m tests.campaigns.hostile_hdf5`."""
    outcomes = hostile_hdf5.campaign(120, 5, tmp_path)
    assert outcomes["refused"] > 40, outcomes
    assert outcomes["read"] > 10, outcomes


def test_a_list_that_was_never_written_reads_as_zeros(tmp_path):
    """Check this because a store without captions has one: its caption offsets are a single
    zero.
    """
    from megatron_interbert.data.hdf5 import Hdf5File

    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("offsets", (1,), np.int64)
    with Hdf5File(path) as file:
        assert file["offsets"][:].tolist() == [0]

    store = write_store(tmp_path / "store", captions_each=0)
    assert RegionStore(str(store)).num_captions == 0


def test_a_process_that_met_a_damaged_dataset_ends_as_any_other(tmp_path, secret):
    """Check this because HDF5 keeps parts of a virtual dataset that it failed to open, and called
    Python for them after Python had ended.
    """
    path = source(tmp_path)
    with h5py.File(path, "r+") as file:
        virtual(file, "pos_boxes", secret)
    with h5py.File(path) as file:
        header = h5py.h5o.get_info(file["pos_boxes"].id).addr

    data = bytearray(path.read_bytes())
    message = data.index(b"\x05\x00\x08\x00", header)  # the fill value and its length
    data[message + 8] = 99
    path.write_bytes(data)
    command = (sys.executable, "-m", "tests.campaigns.hostile_hdf5", "--read", str(path))
    ended = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert "bad version number for fill value" in ended.stdout


def with_checksums(path, order=("deflate", "fletcher32")):
    """Pack `pos_boxes` of a source in one chunk, through filters in this order; return its size."""
    with h5py.File(path, "r+") as file:
        values = file["pos_boxes"][:]
        del file["pos_boxes"]
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk(values.shape)
        for name in order:
            getattr(creation, f"set_{name}")()

        kind = h5py.h5t.py_create(values.dtype)
        space = h5py.h5s.create_simple(values.shape)
        made = h5py.h5d.create(file.id, b"pos_boxes", kind, space, creation)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, values)

        return made.get_chunk_info(0).size


def test_packed_values_with_checksums_are_read(tmp_path):
    path = source(tmp_path)
    plain = [record.regions.boxes.tolist() for record in source_of(path)]
    with_checksums(path)
    assert [record.regions.boxes.tolist() for record in source_of(path)] == plain


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_chunk_too_short_for_its_checksum(tmp_path, length):
    """Check this because HDF5 2.0.0 subtracts four bytes even from a size of zero, and the process
    died of SIGSEGV.
    """
    path = source(tmp_path)
    size = with_checksums(path)
    data = bytearray(path.read_bytes())
    keys = [
        at
        for at in range(len(data) - 8)
        if data[at : at + 8] == size.to_bytes(4, "little") + bytes(4)
    ]
    for at in keys:  # the chunk's key in its tree, and whatever looks like it
        data[at : at + 4] = length.to_bytes(4, "little")

    path.write_bytes(data)
    with pytest.raises(
        UsageError, match=r"'pos_boxes' has a chunk at .* too short for its checksum"
    ):
        source_of(path)


def test_checksums_before_compression(tmp_path):
    path = source(tmp_path)
    with_checksums(path, order=("fletcher32", "deflate"))
    with pytest.raises(UsageError, match="'pos_boxes' adds its checksums before compression"):
        source_of(path)
