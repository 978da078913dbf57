"""Freed memory goes back: what many threads allocate and free does not stay resident."""

import subprocess
import sys

import pytest

PROGRAM = """
import threading, torch
{call}
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
torch.ones(8 << 18).sum()  # the threshold rises with what is freed
before = resident()
def work(kept=[]):
    for size in range(3 << 18, 6 << 18, 1 << 16):
        torch.ones(size)
        kept.append(torch.ones(64))
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library's allocator")
def test_little_stays_resident():
    def grown(call: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM.format(call=call)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    freed = grown("from bitgrain.runtime.memory import return_freed_memory; return_freed_memory()")
    assert freed < 12_000_000
    assert freed < grown("") / 2
