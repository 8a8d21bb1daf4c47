"""What ends a process from outside, as far as one process shows it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

BUSY = """
import time
from concurrent.futures import ThreadPoolExecutor
from nemo_hybrid.parallel.watch import Watch

beside = ThreadPoolExecutor(1)
beside.submit(time.sleep, 60)  # Python itself would wait for this at its end
with Watch(0, 0) as watch:
    print("ready", flush=True)
    while not watch.stop_requested:
        time.sleep(0.01)
    print("stopping", flush=True)
    time.sleep(60)
"""


def test_a_second_ctrl_c_ends_at_once_also_while_a_checkpoint_is_written() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        assert process.stderr
        for word in (b"ready\n", b"stopping\n"):
            assert process.stdout.readline() == word
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - began < 10
        assert process.stderr.read() == b"interrupted\n"
