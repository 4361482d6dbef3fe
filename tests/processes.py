"""Programs of several processes, started by tests that run side by side."""

from __future__ import annotations

import os
import random
import socket

RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "NODE_RANK", "LOCAL_RANK", "PL_GLOBAL_SEED")


def quiet_port() -> int:
    """A free port that the system gives to nobody else.

    Lightning's own choice is from those that every outgoing connection gets one of, and seconds pass until it is used.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def environment(**more: str) -> dict[str, str]:
    """This process's, without what a distributed test may have left in it, and with a port to meet at."""
    kept = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return {**kept, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(quiet_port()), **more}
