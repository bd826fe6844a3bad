"""A process that dies or is stopped: one line that names it, of real runs with torchrun."""

import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from avion.engine import watch
from avion.engine.watch import Loss, Peer, Watch
from tests.endurance import dead_ranks, frame
from tests.processes import run_processes


def trial(folder):
    return frame.Trial(0, folder, np.random.default_rng(), True)


def test_a_killed_rank_is_one_line(tmp_path):
    dead_ranks.killed(trial(tmp_path))


def test_a_stopped_rank_is_one_line(tmp_path):
    dead_ranks.stopped(trial(tmp_path))


def test_torchrun_itself_adds_its_report_and_nothing_else_is_added(tmp_path):
    dead_ranks.killed_under_plain_torchrun(trial(tmp_path))


def _together(rank, size):
    """Three processes: a failure of process 2, as the two others hear of it."""
    import torch.distributed as dist

    dist.init_process_group("gloo")

    def gather(value):
        values = [None] * size
        dist.all_gather_object(values, value)
        return values

    peers = Watch(rank, size, gather, "127.0.0.1")
    assert peers.works
    watch._GRACE_S = 60.0
    if rank == 2:
        peers.leave("RuntimeError: out of memory")
        return None
    loss = peers.find_loss(30)
    result = loss, peers.line().replace(str(peers.peers[2].pid), "PID"), peers.tells()
    time.sleep(1)  # the hub must not say goodbye before the other one has heard
    peers.leave(None)
    return result


_STUCK = """
import sys, time
import torch.distributed as dist
from avion.engine.watch import Watch

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

def gather(value):
    values = [None] * 2
    dist.all_gather_object(values, value)
    return values

peers = Watch(rank, 2, gather, "127.0.0.1")
print("met", flush=True)
if rank == 0:
    peers.find_loss(60)  # as a main thread does that is about to leave
time.sleep(60)
"""


def test_a_loss_is_told_also_where_the_main_thread_does_not_come_to_it(tmp_path):
    """On a busy machine the main thread may need longer for its way out than the others are promised."""
    words = [sys.executable, "-c", _STUCK]
    processes = [
        subprocess.Popen(
            [*words, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["met\n"] * 2
        processes[1].kill()
        _, told = processes[0].communicate(timeout=40)
        line = f"-c: stopped because process 1 of 2 (pid {processes[1].pid} on {os.uname().nodename}) died: "
        assert processes[0].returncode == 2 and told.splitlines()[-1].startswith(line), told
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_failure_is_told_to_all(tmp_path):
    first, second, _ = run_processes(_together, 3, tmp_path)
    host = os.uname().nodename
    line = f"process 2 of 3 (pid PID on {host}) failed: RuntimeError: out of memory"
    assert first == (Loss(2, "failed: RuntimeError: out of memory"), line, True)
    assert second == (first[0], line, False)


def test_strangers_are_not_of_the_run():
    hub = SimpleNamespace(size=2, _links={}, _add=lambda rank, link: hub._links.update({rank: link}))
    server = watch._listen()
    port = server.getsockname()[1]
    links = []
    for said in (b"GET / HTTP/1.1\r\n\r\n" + bytes(40), b"x" * 32 + b"        1", b"w" * 32 + b"        7", b""):
        links.append(socket.create_connection(("127.0.0.1", port)))
        links[-1].sendall(said)
        if not said:
            links[-1].close()
    links.append(socket.create_connection(("127.0.0.1", port)))
    links[-1].sendall(b"w" * 32 + b"        1")
    Watch._accept(hub, server, "w" * 32)
    assert list(hub._links) == [1]
    server.close()


@pytest.mark.parametrize(
    ("rank", "lost", "tells"), [(0, 1, True), (2, 1, False), (1, 0, True), (2, 0, False), (3, 0, True)]
)
def test_one_process_tells(rank, lost, tells):
    peers = [Peer(r, "a" if r < 3 else "b", 10 + r, "boot", "1") for r in range(5)]
    assert Watch.tells(SimpleNamespace(rank=rank, peers=peers, loss=Loss(lost, "died"))) is tells


def test_a_pid_of_another_process_is_not_watched():
    own = watch.this_process(0)
    assert watch._is_there(own) == os.path.exists("/proc/self/stat")
    assert not watch._is_there(Peer(0, own.host, own.pid, own.boot, "1"))
    assert not watch._is_there(Peer(0, own.host, 2**22 + 1, own.boot, own.start))
