"""Test reading untrusted pickles: honest ones give what pickle.loads gives, all others are
refused.
"""

import collections
import concurrent.futures
import contextlib
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import struct
import sys
import threading
import time
import warnings

import numpy as np
import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.pickles import reading
from megatron_interbert.preparation.building.pickles.nodes import UNSAFE, VALUE, UnsafePickle
from megatron_interbert.preparation.building.pickles.process import PickleProcess
from megatron_interbert.preparation.building.pickles.reading import is_pickle, loads
from tests.campaigns.pickles import campaign
from tests.launching import launch
from tests.preparation.crafted import (
    Call,
    array_call,
    dtype_call,
    python_2,
    with_pointers,
)

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
RANDOM = np.random.default_rng(5)
SHARED_LIST = ["one list", "in two places"]
VALUES = {
    "numbers": [0, 1, -1, 255, 256, 65536, -(1 << 31), 1 << 31, -(1 << 63), (1 << 64) - 1],
    "floats": [0.0, -0.0, 0.1, 1e-320, 1.7e308, math.inf, -math.inf],
    "constants": (None, True, False),
    "texts": ["", "a", "狗\n'\"\\ü", "\x00\xff\u0100", "😀", "\ud800", "a" * 70_000],
    "bytes": [b"", b"a", bytes(range(256)), b"\n" * 300, os.urandom(70_000)],
    "containers": [[], (), {}, [1, (2, [3, {"a": (4,)}])], (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "sets": [set(), {1, "a", b"b"}, frozenset({2.5, None})],
    "ordered": collections.OrderedDict([("b", 1), ("a", [2])]),
    "keys": {1: "a", b"x": "b", 2.5: "c", None: "d", False: "e", "text": "f"},
    "shared": [SHARED_LIST, SHARED_LIST, {"again": SHARED_LIST}],
    "scalars": [
        np.float32(0.1),
        np.float16(2),
        np.float64(3),
        np.int64(-4),
        np.uint8(5),
        np.bool_(True),
    ],
    "texts of NumPy": [np.str_("狗"), np.str_(""), np.bytes_(b"ab")],
    "info": np.array({"objects": np.arange(3), "name": "狗"}, dtype=object),
    "objects": np.array([[1, "a"], [None, [2.5]]], dtype=object),
    "long list": list(range(3000)),
}
CODES = (
    "<f4",
    ">f4",
    "<f2",
    "<f8",
    ">f8",
    "|i1",
    "<i2",
    ">i4",
    "<i8",
    "|u1",
    ">u2",
    "<u4",
    "<u8",
    "|b1",
    "|S5",
    "<U7",
    ">U3",
)


def same(got, expected):
    """Check that two values are equal except for what we do differently: NumPy scalars, ordered
    dictionaries, byte order.
    """
    if isinstance(expected, np.generic):
        expected = expected.item()
    if isinstance(expected, np.ndarray):
        assert type(got) is np.ndarray
        assert got.shape == expected.shape
        assert got.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
        if expected.dtype == object:
            return all(same(a, b) for a, b in zip(got.ravel(), expected.ravel(), strict=True))

        return (
            got.astype(got.dtype.newbyteorder("=")).tobytes()
            == expected.astype(expected.dtype.newbyteorder("=")).tobytes()
        )

    if isinstance(expected, dict):
        assert type(got) is dict
        return same(list(got), list(expected)) and same(list(got.values()), list(expected.values()))

    assert type(got) is type(expected)
    if isinstance(expected, list | tuple):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, float):
        return struct.pack("d", got) == struct.pack("d", expected)

    return got == expected


def old_spelling(data):
    """Return a pickle with NumPy's names from before version 2; their length prefixes change too,
    and the frame is left out.
    """
    data = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    data = data.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
    if data[2:3] == pickle.FRAME:
        data = data[:2] + data[11:]

    return data.replace(b"cnumpy._core.", b"cnumpy.core.")


def arrays_in_all_layouts(code):
    numbers = RANDOM.integers(0, 2 if code == "|b1" else 100, (3, 4, 5))
    whole = numbers.astype(code)
    layouts = {
        "C": whole,
        "Fortran": np.asfortranarray(whole),
        "transposed": whole.transpose(1, 0, 2),
        "every other": whole[:, ::2, ::-1],
        "none": np.zeros((0, 4), code),
        "0-d": whole[0, 0, 0:1].reshape(()),
        "flat": whole.ravel(),
    }
    read_only = whole.copy()
    read_only.flags.writeable = False

    return {**layouts, "read-only": read_only, "shared": [whole, {"again": whole}]}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", VALUES)
def test_honest_values_come_out_as_pickle_gives_them(name, protocol):
    data = pickle.dumps(VALUES[name], protocol)
    assert same(loads(data), pickle.loads(data))
    older = old_spelling(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(loads(older), pickle.loads(older))


@pytest.mark.parametrize("code", CODES)
def test_arrays_of_every_type_and_layout(code):
    for (layout, array), protocol in itertools.product(
        arrays_in_all_layouts(code).items(), PROTOCOLS
    ):
        data = pickle.dumps(array, protocol)
        for spelling in (data, old_spelling(data)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert same(loads(spelling), pickle.loads(spelling)), (layout, protocol)


def test_nan_stays_nan():
    assert math.isnan(loads(pickle.dumps(math.nan)))
    assert math.isnan(loads(pickle.dumps(np.float32("nan"), 0)))


@pytest.mark.parametrize("protocol", [0, 1, 2])
@pytest.mark.parametrize("code", ["<f4", ">i8", "|u1", "|S3"])
def test_pickles_of_python_2(code, protocol):
    array = np.arange(200, 206).reshape(2, 3).astype(code)
    data = python_2(array, protocol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pickle.loads(data, encoding="latin1")

    np.testing.assert_array_equal(expected["features"], array)
    assert same(loads(data), expected)


def test_text_and_ordered_dictionaries_of_python_2():
    data = (
        b"ccollections\nOrderedDict\n((lp0\n(lp1\nS'a\\xe9\\n'\naI1\naa(lp2\nS\"b'\"\naL-2L\naatR."
    )
    expected = pickle.loads(data, encoding="latin1")
    assert expected == {"aé\n": 1, "b'": -2}
    assert same(loads(data), expected)
    old_set = b"c__builtin__\nset\n((lI1\naI2\natR."
    assert loads(old_set) == pickle.loads(old_set) == {1, 2}


def test_arrays_are_of_their_own_memory():
    got = loads(pickle.dumps([np.ones(5)] * 2))
    got[0][:] = 7
    np.testing.assert_array_equal(got[1], np.ones(5))


def test_a_boolean_array_counts_right_whatever_its_bytes():
    array = loads(pickle.dumps(array_call(np.dtype("?"), (4,), b"\x00\x01\x02\xff")))
    assert np.count_nonzero(array) == 3
    assert array[array].shape == (3,)


def test_is_pickle_tells_rows_apart():
    msgpack = pytest.importorskip("msgpack")
    for protocol in PROTOCOLS:
        assert is_pickle(pickle.dumps({"a": 1}, protocol))
        assert is_pickle(pickle.dumps(["a"], protocol))

    for row in (["a", 1.0, b"x."], {"a": "."}, {}, [], list(range(46))):
        assert not is_pickle(msgpack.packb(row))

    assert not is_pickle(b"")


def dumps_both(value):
    """Yield the value pickled with protocol 5 and, if that is possible, with 2."""
    yield pickle.dumps(value, 5)
    with contextlib.suppress(pickle.PicklingError):
        yield pickle.dumps(value, 2)


@pytest.mark.parametrize("name", with_pointers())
def test_bytes_never_become_pointers(name):
    for data in dumps_both({"a": with_pointers()[name]}):
        with pytest.raises(UnsafePickle):
            loads(data)


FOREIGN = {
    "a call": Call(os.getpid, ()),
    "eval": Call(eval, ("1",)),
    "a function itself": len,
    "a partial": functools.partial(int),
    "a class": collections.Counter(a=1),
    "a date": datetime.date(2020, 1, 1),
    "a type itself": np.dtype("f4"),
    "the class of arrays": np.ndarray,
    "complex numbers": np.ones(2, complex),
    "times": np.zeros(2, "M8[s]"),
    "long floats": np.ones(2, np.longdouble),
    "records": np.zeros(2, [("a", "f4")]),
    "raw bytes": np.zeros(2, "V4"),
    "a subarray": array_call(dtype_call("V8", "|", (np.dtype("f4"), (2,)), None, None, 8, 1, 0)),
    "a matrix": np.ones((2, 2)).view(np.matrix),
    "a masked array": np.ma.ones(3),
    "a wide type": array_call(dtype_call("f8", "<", None, None, None, 1 << 30, 1, 0)),
    "an unknown state": array_call(Call(np.dtype, ("f8", False, True), (3,))),
    "odd text": Call(__import__("_codecs").encode, ("a", "rot13")),
    "a dtype of text": array_call(Call(np.dtype, ("f4,O", False, True))),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("protocol", [2, 4])
def test_whatever_is_more_than_data_is_refused_by_name(name, protocol):
    with pytest.raises(UnsafePickle) as caught:
        loads(pickle.dumps([FOREIGN[name]], protocol))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"Pabc\n.",
        b"K\x01Q.",
        b"\x82\x01.",
        b"\x83\x01\x00.",
        b"(ios\nsystem\n.",
        b"(cos\nsystem\no.",
        b"\x97.",
        b"]\x98.",
        b"ccollections\nOrderedDict\n)R}b.",
        b"cnumpy\nndarray\n)R.",
    ],
)
def test_opcodes_of_objects_are_refused(data):
    with pytest.raises(UnsafePickle):
        loads(data)


def laughs(levels, first=b"]"):
    """Return a pickle of nested lists that each hold the previous one ten times, stored once."""
    body = first + b"q\x00"
    for level in range(levels):
        body += (
            b"](" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 9 + b"eq" + bytes([level + 1])
        )

    return b"\x80\x02" + body + b"."


BAD_SHAPE = {
    "negative": (-1,),
    "huge": (1 << 62, 1 << 62),
    "of text": ("a",),
    "of 33": (1,) * 33,
    "of booleans": (True,),
}
BEYOND = {
    "a billion laughs": laughs(9),
    "a billion laughs of text": laughs(7, b"X\x00\x01\x00\x00" + b"a" * 256),
    "many uses of a large array": laughs(4, b"\x80\x05" + pickle.dumps(np.zeros(1 << 20), 4)[2:-1]),
    "many uses of large bytes": laughs(5, b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20)),
    "a list in itself": b"]q\x00h\x00a.",
    "a tuple in itself": b"]q\x00(h\x00tq\x01a0h\x01.",
    "a dictionary in itself": b"}q\x00K\x01h\x00s.",
    "objects that hold themselves": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btRq\x00"
        b"(K\x01(K\x01tcnumpy\ndtype\n(U\x02O8K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89](h\x00etb."
    ),
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b"N" + b"\x85" * 1_000_000 + b".",
    "deep marks": b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
    "deep by sharing": (
        b"]q\x00"
        + b"".join(b"](h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(200))
        + b"."
    ),
    "many decimals": b"I" + b"9" * 3_000_000 + b"\n.",
    "many decimals of a long": b"L" + b"9" * 3_000_000 + b"L\n.",
    "many digits of a float": b"F" + b"9" * 3_000_000 + b"\n.",
    "a long of a megabyte": b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b".",
    "a long of negative length": b"\x8b" + struct.pack("<i", -1) + b".",
    "65 bits": pickle.dumps(1 << 64),
    "a far place in the memo": b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "bytes that are not there": b"\x8e" + struct.pack("<Q", 1 << 62) + b"ab.",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "a text encoded many times": (
        b"c_codecs\nencode\nq\x00X\x00\x00\x10\x00"
        + b"a" * (1 << 20)
        + b"\x85q\x01"
        + b"h\x00h\x01R0" * 10_000
        + b"N."
    ),
    "keys that are lists": b"}]K\x01s.",
    "keys of one hash": (
        b"}(" + b"".join(b"K" + bytes([n]) + b"K\x00\x86N" for n in range(9)) + b"u."
    ),
    "nothing": b"",
    "no end": b"N",
    "an empty stack": b".",
    "a value below a mark": b"N(.",
    "no such opcode": b"\xff.",
    "half a key": b"}(K\x01u.",
    "too few arguments": b"cnumpy\ndtype\n)R.",
    "a call of a number": b"K\x01)R.",
    "an array without content": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR."
    ),
    **{
        f"a shape {name}": pickle.dumps(array_call(np.dtype("f8"), shape))
        for name, shape in BAD_SHAPE.items()
    },
    "too few bytes": pickle.dumps(array_call(np.dtype("f8"), (2,))),
    "too many bytes": pickle.dumps(array_call(np.dtype("f4"), (1,))),
    "no bytes each": pickle.dumps(
        array_call(
            np.dtype("S0") if np.dtype("S0").itemsize == 0 else Call(np.dtype, ("S0",)),
            (1 << 40,),
            b"",
        )
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_damage_and_absurd_sizes_are_refused(name):
    with pytest.raises(ValueError) as caught:
        loads(BEYOND[name])
    assert not isinstance(caught.value, UsageError)
    assert len(str(caught.value)) < 400


def test_neither_reader_nor_helper_takes_much_memory_for_what_is_refused():
    script = (
        "import resource, pickle\n"
        "from tests.preparation.test_pickles import BEYOND\n"
        "from megatron_interbert.preparation.building.pickles.reading import loads, _process\n"
        "loads(pickle.dumps(1))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for data in BEYOND.values():\n"
        "    try: loads(data)\n"
        "    except ValueError: pass\n"
        "_process.close()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10,\n"
        "      resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)\n"
    )
    code, out, err = launch(sys.executable, "-c", script)
    assert code == 0, out + err
    reader, helper = map(int, out.split())
    assert reader < 100
    assert helper < 700


def test_too_large_a_pickle_is_refused_unread(monkeypatch):
    monkeypatch.setattr(reading, "MAX_PICKLE", 10)
    with pytest.raises(ValueError, match="expected at most 10"):
        loads(pickle.dumps("a" * 20))


@pytest.fixture
def process():
    made = PickleProcess()
    yield made
    made.close()


def test_a_killed_helper_is_started_anew(process):
    assert process.ask(pickle.dumps(1))[:2] == (VALUE, b"1")
    first = process.process.pid
    os.kill(first, signal.SIGKILL)
    assert process.ask(pickle.dumps(2))[:2] == (VALUE, b"2")
    assert process.process.pid != first


def test_killed_again_and_again_nothing_is_lost_or_mixed_up(process):
    ended = threading.Event()

    def kill():
        while not ended.wait(0.15):
            with contextlib.suppress(AttributeError, ProcessLookupError):
                os.kill(process.process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    answers = collections.Counter()

    for number in range(1500):
        try:
            got = int(process.ask(pickle.dumps(number))[1])
        except UsageError:  # killed while starting
            answers["not started"] += 1
        except ValueError as error:
            answers[str(error)] += 1
        else:
            answers["right" if got == number else "wrong"] += 1

    ended.set()
    killer.join()
    assert answers["right"] > 1000
    assert answers.keys() <= {
        "right",
        "not started",
        "the process that decodes pickles ended over it (SIGKILL)",
    }


@pytest.mark.parametrize("size", [10, 5_000_000])
def test_a_helper_that_hangs_costs_one_row(size):
    process = PickleProcess(seconds=1)
    try:
        process.ask(pickle.dumps(1))
        os.kill(process.process.pid, signal.SIGSTOP)
        with pytest.raises(ValueError, match="longer than 1 s"):
            process.ask(pickle.dumps(b"a" * size))
        assert process.ask(pickle.dumps(2))[:2] == (VALUE, b"2")
    finally:
        process.close()


def test_a_pickle_beyond_the_memory_costs_one_row():
    process = PickleProcess(memory=200 << 20)
    try:
        kind, text, _ = process.ask(b"(" + b"]" * 3_000_000 + b"t.")
        assert kind not in (VALUE, UNSAFE)
        assert text == b"needs too much memory"
        assert process.ask(pickle.dumps(2))[:2] == (VALUE, b"2")
        with pytest.raises(ValueError, match="ended over it"):
            process.ask(bytes(300 << 20))

        assert process.ask(pickle.dumps(3))[:2] == (VALUE, b"3")
    finally:
        process.close()


def test_no_helper_at_all_is_one_line_of_its_own(monkeypatch, process):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UsageError, match="cannot start the process that decodes pickles"):
        process.ask(pickle.dumps(1))

    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UsageError, match="exit code 1"):
        process.ask(pickle.dumps(1))

    monkeypatch.undo()
    assert process.ask(pickle.dumps(2))[:2] == (VALUE, b"2")


def test_an_interruption_in_the_middle_mixes_up_nothing(process):
    process.ask(pickle.dumps(1))

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        os.kill(process.process.pid, signal.SIGSTOP)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            process.ask(pickle.dumps("first"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert process.ask(pickle.dumps("second"))[1] == b'"second"'


def gone(pid):
    """Check whether a process has ended, waiting up to 10 s."""
    for _ in range(200):
        try:
            with open(f"/proc/{pid}/stat") as handle:
                if handle.read().rpartition(")")[2].split()[0] in "ZX":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True

        time.sleep(0.05)

    return False


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_the_helper_ends_with_its_reader(end):
    script = (
        "import os, pickle\n"
        "from megatron_interbert.preparation.building.pickles.reading import loads, _process\n"
        f"loads(pickle.dumps(1)); print(_process.process.pid, flush=True); {end}\n"
    )
    _, out, err = launch(sys.executable, "-W", "error", "-c", script)
    assert not err
    assert gone(int(out))


def load_in_a_worker(number):
    return loads(pickle.dumps(number)), reading._process.process.pid


def test_each_worker_of_a_pool_has_a_helper_that_ends_with_it():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        answers = list(pool.map(load_in_a_worker, range(20)))
    assert [value for value, _ in answers] == list(range(20))
    assert all(gone(pid) for pid in {pid for _, pid in answers})


def test_after_a_fork_parent_and_child_have_a_helper_each(process):
    process.ask(pickle.dumps(1))
    ours = process.process.pid
    child = os.fork()
    if child == 0:
        try:
            right = (
                process.ask(pickle.dumps("child"))[1] == b'"child"' and process.process.pid != ours
            )
            process.close()
            os._exit(0 if right else 1)
        finally:
            os._exit(2)

    assert os.waitpid(child, 0)[1] == 0
    assert process.ask(pickle.dumps("parent"))[1] == b'"parent"'
    assert process.process.pid == ours


ATTEMPTS = """
import json, os, socket, sys
from megatron_interbert.preparation.building.pickles import confinement
if sys.argv[1] == "limits alone":
    confinement.MACHINES.clear()
attempts = {
    "open": lambda: open(sys.argv[2]).close(),
    "create": lambda: open(sys.argv[2] + ".new", "w").close(),
    "socket": lambda: socket.socket().close(),
    "pair": lambda: socket.socketpair(),
    "list": lambda: os.listdir("/"),
    "pipe": lambda: os.pipe(),
    "fork": lambda: os.fork() or os._exit(0),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
    "remove": lambda: os.unlink(sys.argv[2]),
    "more limits": lambda: __import__("resource").setrlimit(7, (50, 50)),
}
import resource
print(confinement.confine(1 << 30))
results = {}
for name, attempt in attempts.items():
    if sys.argv[1] == "limits alone" and name in ("fork", "exec", "kill", "remove", "more limits"):
        continue
    try:
        attempt()
        results[name] = "done"
    except (OSError, ValueError):
        results[name] = "refused"
print(json.dumps(results))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["all", "limits alone"])
def test_a_confined_process_opens_neither_files_nor_sockets(tmp_path, kind):
    (tmp_path / "file").write_text("x")
    code, out, err = launch(sys.executable, "-c", ATTEMPTS, kind, tmp_path / "file")
    assert code == 0, out + err
    filtered, results = out.splitlines()
    if kind == "all" and filtered == "False":
        pytest.skip("no seccomp here; the limits alone are tested by themselves")

    assert set(json.loads(results).values()) == {"refused"}, results
    assert (tmp_path / "file").exists()
    assert not (tmp_path / "file.new").exists()


def test_the_helper_is_confined(process):
    process.ask(pickle.dumps(1))
    with open(f"/proc/{process.process.pid}/limits") as handle:
        limits = {line[:26].strip(): line[26:].split()[:2] for line in handle}

    assert limits["Max open files"] == ["0", "0"]
    assert limits["Max file size"] == ["0", "0"]
    assert limits["Max address space"] == [str(2 << 30)] * 2
    assert len(os.listdir(f"/proc/{process.process.pid}/fd")) == 3
    with open(f"/proc/{process.process.pid}/status") as handle:
        status = handle.read()
    if "Seccomp:\t0" in status:
        pytest.skip("no seccomp here")

    assert "Seccomp:\t2" in status


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[",
        b"{}[]",
        b"[[[",
        b'["bytes", 0]',
        b'["bytes", -1, 1]',
        b'["bytes", 0, 99]',
        b'["bytes", true, 1]',
        b"[]",
        b'["array", "O8", [1], "C", 0, 8]',
        b'["array", "V8", [1], "C", 0, 8]',
        b'["array", "f4", [9], "C", 0, 8]',
        b'["array", "f4", [2], "A", 0, 8]',
        b'["array", "f4", [2], [1], 0, 8]',
        b'["array", "f4", "2", "C", 0, 8]',
        b'["objects", [2], "C", ["list", 1]]',
        b'["objects", [1], "C", 5]',
        b'["dict", 1]',
        b'["dict", ["list"], 1]',
        b'["os", 1]',
        b'{"a": ["bytes"]}',
        b'["list"' * 3000 + b"]" * 3000,
        b'["list",' * 100 + b"1" + b"]" * 100,
        b"1" * 5000,
    ],
)
def test_nonsense_from_the_helper_is_an_error_too(monkeypatch, text):
    """Check that the helper's answers are checked again, in case it was taken over."""
    monkeypatch.setattr(reading._process, "ask", lambda data: (VALUE, bytearray(text), bytearray()))
    with pytest.raises(ValueError):
        loads(b"12345678")


def test_mutated_pickles_end_in_errors():
    """Run a short form of tests/campaigns/pickles.py."""
    counts = campaign(2000, seed=1)
    assert sum(counts.values()) == 2000
    assert counts["value"] > 100, "heavier damage would test only the first checks"
    assert counts["damaged"] > 500
    assert counts["unsafe"] > 50


def test_random_bytes_are_no_pickles():
    chance = random.Random(3)
    for _ in range(300):
        with contextlib.suppress(ValueError):
            loads(bytes(chance.choices(b"()]}lteasu.KNq\x00h\x00\x85R0", k=40)))
