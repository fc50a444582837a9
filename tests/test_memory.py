"""Memory that a process keeps: counted in page faults, each of which is a page taken again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from isovit.backends import memory
from isovit.benchmarks import driver
from isovit.errors import InputError

MEBIBYTES = 64
STEPS = f"""
from isovit.backends.memory import keep_memory
from isovit.benchmarks.worker import page_faults

keep = KEEP
assert not keep or keep_memory()

def step():
    bytes(b"x") * ({MEBIBYTES} << 20)  # filled and freed

step()
print(sum(page_faults(step) for _ in range(10)))
"""


def page_faults(*, keep: bool) -> int:
    """Of ten steps, each of which takes 64 MiB and frees them, in a process of its own."""
    code = STEPS.replace("KEEP", str(keep))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not memory.can_keep_memory(), reason="the C library is not glibc")
def test_what_is_kept_is_not_asked_for_again() -> None:
    import resource

    pages = (MEBIBYTES << 20) // resource.getpagesize()
    assert page_faults(keep=True) < pages / 10
    assert page_faults(keep=False) > 9 * pages, "as it comes, every step takes every page"


def test_where_the_c_library_cannot_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # a call would fail
    assert memory.keep_memory() is False


def test_measurements_keep_memory_where_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(**options: memory.Memory) -> set[str]:
        return {case.memory for case in driver.plan(["vit_s16"], backends=["torch"], **options)}

    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert kinds() == {"kept"}
    assert kinds(memory="returned") == {"returned"}
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert kinds() == {"returned"}
    with pytest.raises(InputError, match="wanted the C library glibc"):
        kinds(memory="kept")
