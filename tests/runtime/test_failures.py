"""What the others see when a rank fails, and what nobody sees when a script simply ends."""

import os
import socket

import launch
import pytest

from fxpipe.runtime.ranks.connections import Connections
from fxpipe.runtime.ranks.status import OtherStatus, OwnStatus

CAUSE = "rank 1 (stage 1, microbatch 0{layer}) failed: ValueError: the weights are gone"


@pytest.mark.parametrize(("way", "schedule"), [("forward", "1F1B"), ("backward", "ZBVZeroBubble")])
def test_the_others_raise_the_cause_while_the_failed_rank_still_lives(way, schedule, tmp_path):
    results = launch.launch("runtime/failure_worker.py", 4, way, schedule, str(tmp_path))
    assert [result.returncode for result in results] == [3, 4, 3, 3], [result.stderr for result in results]
    cause = CAUSE.format(layer=", layer layers.2" if way == "forward" else "")
    for rank, result in enumerate(results):
        if rank == 1:
            assert result.stdout == "the weights are gone\n"
        else:
            assert result.stdout.startswith(f"{cause}\n  see the output of that rank")
            assert f"the pipeline ended earlier: {cause}\n  start the script again" in result.stdout


def test_a_killed_rank_is_reported_as_a_lost_connection(tmp_path):
    results = launch.launch("runtime/failure_worker.py", 4, "kill", "1F1B", str(tmp_path))
    assert [result.returncode for result in results] == [3, 9, 3, 3]
    for rank in (0, 2, 3):
        assert results[rank].stdout.startswith("rank 1 (stage 1) ended without a word in step; last actions: ")


@pytest.mark.parametrize("way", ["ours", "user", "closed"])
def test_a_script_may_simply_end(way):
    results = launch.launch("runtime/exit_worker.py", 2, way, fresh=True)
    assert [(result.returncode, result.stdout, result.stderr) for result in results] == [(0, "", "")] * 2


@pytest.mark.skipif(not hasattr(socket, "SOCK_NONBLOCK"), reason="only Linux tells Python so")
def test_connections_of_others_stay_as_they_are_under_a_default_timeout():
    noted = Connections()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        socket.setdefaulttimeout(5.0)  # a script's own: torch's store, and gloo, must not hear of it
        try:
            with noted.made_here():
                other, _ = server.accept()
                other.settimeout(None)
        finally:
            socket.setdefaulttimeout(None)
            noted.close()
        with other:
            assert os.get_blocking(client.fileno())
            assert os.get_blocking(other.fileno())


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="a file has a name on this system")
def test_what_a_rank_does_is_read_by_others_and_leaves_no_file_behind():
    own = OwnStatus()
    assert not any(own.token in name for name in os.listdir("/dev/shm"))
    other = OtherStatus(own.path, own.token)
    assert not OtherStatus(own.path, "of another machine").is_here
    own.unlink()
    own.enter("step")
    assert other.is_here
    assert other.read().call == "step"
    assert not OtherStatus(own.path, own.token).is_here
