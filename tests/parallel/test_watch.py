"""What ends a process from outside, as far as one process shows it."""

from __future__ import annotations

import signal
import subprocess
import sys

from helpers.processes import HANG_S

BUSY = """
import time
from concurrent.futures import ThreadPoolExecutor
from nemo_hybrid.parallel.watch import Watch

beside = ThreadPoolExecutor(1)
beside.submit(time.sleep, 1500)  # Python itself would wait for this at its end
with Watch(0, 0) as watch:
    print("ready", flush=True)
    while not watch.stop_requested:
        time.sleep(0.01)
    print("stopping", flush=True)
    time.sleep(1500)
"""


def test_a_second_ctrl_c_ends_at_once_also_while_a_checkpoint_is_written() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        assert process.stderr
        for word in (b"ready\n", b"stopping\n"):
            assert process.stdout.readline() == word
            process.send_signal(signal.SIGINT)
        assert process.wait(HANG_S) == 130  # both sleep for longer
        assert process.stderr.read() == b"interrupted\n"
