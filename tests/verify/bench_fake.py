"""Runners for the latency tests; opened by the bench child through their name."""

from __future__ import annotations

import os
import sys
import time

import numpy as np


class Sleeper:
    load_ms = 12.5

    def __init__(self, seconds):
        self.seconds = seconds
        self.calls = 0

    def run(self, feeds):
        self.calls += 1
        time.sleep(self.seconds * (5 if self.calls == 1 else 1))
        print("noise on standard output")
        os.write(1, b"noise from C\n")
        return {"y": feeds["x"]}


def sleeper(seconds):
    return Sleeper(seconds)


class Hungry:
    def run(self, feeds):
        block = np.ones(64 * 2**20, np.uint8)
        return {"y": block[:1]}


def hungry():
    return Hungry()


def broken():
    raise ValueError("this engine cannot be loaded")


def crashing():
    print("illegal something", file=sys.stderr)
    os._exit(7)


class Accelerated(Sleeper):
    """A runner that tells a time of its accelerator: the number of runs so far."""

    device_ms = 0.0

    def run(self, feeds):
        self.device_ms += 1
        return super().run(feeds)


def accelerated(seconds):
    return Accelerated(seconds)
