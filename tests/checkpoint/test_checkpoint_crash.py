"""The process dies, or the disk is full, in the middle of a save."""

import pathlib
import signal
import time

SAVER = str(pathlib.Path(__file__).with_name("saver.py"))


def test_killed_while_saving(tmp_path, python):
    reached = []
    for after in (0.03, 0.11, 0.2, 0.37, 0.05, 0.8, 1.6, 3.2, 6.4, 12.8):
        if after > 0.5 and reached[-1]:
            break  # The longer ones are for a slow disk or a busy machine.
        process = python(SAVER, str(tmp_path), "endless")
        line = process.stdout.readline()  # It has checked what it restored.
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert line.startswith("at "), errors
        reached.append(int(line.split()[1]))
    assert reached == sorted(reached) and reached[-1] > 0


def test_full_disk(tmp_path, python):
    process = python(SAVER, str(tmp_path), "full_disk")
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    first, second, restored, steps = output.splitlines()
    for line in (first, second):
        assert line.startswith(f"saving step 2 in {tmp_path} failed: ")
        assert "File too large" in line
    assert restored == "restored 1 [1]"
    assert steps == "steps [1, 2]"
