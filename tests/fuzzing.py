"""What test_fuzz.py and test_fuzz_files.py share: drawing damaged input, and judging what became of it.

Whatever stands in a file or on the command line must end in one clear UserError that names it, or in what an
independent check confirms; never in a traceback, a hang or a silently wrong result. Every test counts how many cases
were accepted and refused, and wants enough of both. The cases are the same on every machine; FUZZ=10 tries ten times
as many.
"""

import collections
import copy
import functools
import json
import operator
import os
import signal
import zlib

import hypothesis
from hypothesis import strategies as st

from errors import UserError

FUZZ = int(os.environ.get("FUZZ", "1"))


class Hang(BaseException):
    """Raised by the alarm: no handler of the product's may take it for something else."""


def attempt(action, *names):
    """(result, "") of action(), or (None, message) if it ends in a UserError, which must be one printable line with one
    of the names in it."""

    def ring(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        return action(), ""
    except UserError as error:
        message = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert 10 < len(message) <= 1000 and message.isprintable(), message
    assert any(str(name) in message for name in names), f"{message!r} names none of {names}"
    return None, message


def fuzz(count, test, *strategies, accepted=0.15, refused=0.15):
    """Call test(*drawn) so often; it returns whether the case was accepted, and enough of both must come."""
    counts = collections.Counter()

    @hypothesis.settings(
        max_examples=count * FUZZ,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],  # shrinking takes minutes
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.tuples(*strategies))
    def case(drawn):
        outcome = bool(test(*drawn))
        hypothesis.event(f"accepted: {outcome}")
        counts[outcome] += 1

    case()
    total = counts.total()
    print(f"{total} cases, {counts[True] / total:.0%} accepted")
    assert total >= 0.9 * count and counts[True] >= accepted * total and counts[False] >= refused * total, counts


# ---------------------------------------------------------------------- what is drawn

ODD_JSON = [
    b"",
    b"\xff\xfe\x00",
    b"null",
    b"[]",
    b"[3]",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 5000,
    b"NaN",
    b"\xef\xbb\xbf{}",
    b"{}",
    b'"splits"',
    b"1e999",
    b"\0" * 64,
    '{"files": "\u2028"}'.encode(),
]
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([10**30, 2**31, 2**63, -1, 0, 1e308, "../../x", "/dev/zero", "x\0y", "\ud800", "step_00000001"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def places(value, at=()):
    """The paths to everything inside a JSON value."""
    for key, inner in value.items() if type(value) is dict else enumerate(value) if type(value) is list else ():
        yield (*at, key)
        yield from places(inner, (*at, key))


@st.composite
def damaged(draw, raw, head=None):
    """Bytes with some changed, cut out, put in, or the end lost; near the start if `head` is given."""
    raw, place = bytearray(raw), st.integers(0, max(min(len(raw), head or len(raw)) - 1, 0))
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(place), draw(st.integers(0, 8))
        match draw(st.sampled_from(["set", "set", "cut", "put", "end", "more"])):
            case "set" if at < len(raw):
                raw[at] = draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + size]
            case "put":
                raw[at:at] = draw(st.binary(max_size=8))
            case "end":
                del raw[at:]
            case "more":
                raw += bytes(size)
    return bytes(raw)


@st.composite
def json_file(draw, good):
    """The bytes of a JSON file: a good one, with up to two places changed, or damaged, or something else altogether."""
    value, kind = copy.deepcopy(good), draw(st.integers(0, 9))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        *path, key = draw(st.sampled_from(list(places(value)) or [(None,)]))
        if key is None:
            break
        holder = functools.reduce(operator.getitem, path, value)
        if type(holder[key]) is int and draw(st.booleans()):
            holder[key] += draw(st.sampled_from([-1, 1, 2**32, -(2**40), 10**30]))
        elif draw(st.integers(0, 3)):
            holder[key] = draw(ANY_JSON)
        else:
            del holder[key]
    raw = json.dumps(value).encode()
    return draw(damaged(raw)) if kind == 8 else draw(st.sampled_from(ODD_JSON)) if kind == 9 else raw


def is_sound(folder):
    """Whether the manifest of a step folder lists every file with its true size and checksum."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
        return (
            all(
                manifest["files"][name]["size"] == len(raw) and manifest["files"][name]["crc32"] == zlib.crc32(raw)
                for name, raw in files.items()
            )
            and f"step_{manifest['step']:08d}" == folder.name
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
