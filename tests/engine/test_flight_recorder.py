"""The record that outlives its writer."""

import os
import subprocess
import sys
import time

from engine.flight_recorder import FlightRecorder


def test_a_step_is_visible_while_it_runs_and_gone_afterwards() -> None:
    recorder = FlightRecorder.create(max_num_sequences=4)
    reader = FlightRecorder(os.dup(recorder.descriptor))

    recorder.start_step([7, 2**40])
    during = reader.seq_ids_in_step()
    recorder.end_step()

    assert during == [7, 2**40]
    assert reader.seq_ids_in_step() == []
    assert reader.num_steps == 1
    recorder.close()
    reader.close()


def test_signs_of_life_move_with_steps() -> None:
    recorder = FlightRecorder.create(max_num_sequences=1)
    assert recorder.last_sign_of_life == 0

    before = time.monotonic()
    recorder.start_step([1])
    started = recorder.last_sign_of_life
    recorder.end_step()

    assert before <= started <= recorder.last_sign_of_life <= time.monotonic()
    recorder.close()


def test_the_record_of_a_killed_process_names_the_sequences_of_its_step() -> None:
    recorder = FlightRecorder.create(max_num_sequences=3)
    program = (
        "import os, signal, sys\n"
        "from engine.flight_recorder import FlightRecorder\n"
        "recorder = FlightRecorder(int(sys.argv[1]))\n"
        "recorder.start_step([1]); recorder.end_step(); recorder.start_step([3, 5])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    status = subprocess.run(
        [sys.executable, "-c", program, str(recorder.descriptor)],
        pass_fds=[recorder.descriptor],
        check=False,
    ).returncode

    assert status == -9
    assert recorder.seq_ids_in_step() == [3, 5]
    assert recorder.num_steps == 1
    recorder.close()
