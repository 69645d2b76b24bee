"""What a binary asks of the C library before it starts."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, resource, threading
from steel_ad import cli
{call}
lib = ctypes.CDLL("libc.so.6")
lib.malloc.restype = ctypes.c_void_p
lib.free.argtypes = [ctypes.c_void_p]
lib.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def work():
    block = lib.malloc(64 << 20)
    lib.memset(block, 1, 64 << 20)
    lib.free(block)
def faults(threads):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(threads):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2)
print(faults(4))
"""


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
@pytest.mark.skipif(HUGE.exists() and "[always]" in HUGE.read_text(), reason="pages are not of 4 KiB")
def test_freed_memory_is_used_again_in_every_thread():
    """A page that the system gives anew is a fault: 4 KiB each, of a block in a thread that is not the main one."""

    def run(call):
        program = PROGRAM.format(call=call)
        return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)

    assert run("cli.keep_freed_memory()") < 1000 < 20000 < run("")
