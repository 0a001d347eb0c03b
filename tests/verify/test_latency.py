"""Latency: what is counted, the order of the figures, fresh processes, and clear errors. Nothing asserts a speed."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.verify.latency import RunnerSpec, compare_latency, measure, summarize
from zsq_deploy.verify.machine import machine_info, peak_rss_bytes

HERE = str(Path(__file__).parent)
FEEDS = {"x": np.zeros((1, 3), np.float32), "odd name:0": np.ones((1, 2), np.int64)}


def spec(function, **arguments):
    return RunnerSpec(f"bench_fake:{function}", arguments, FEEDS, threads=1, mode=function, path=[HERE])


def ordered(latency):
    return 0 < latency.min_ms <= latency.median_ms <= latency.p90_ms <= latency.p95_ms <= latency.p99_ms


def test_summary_against_closed_forms():
    found = summarize([float(value) for value in range(1, 102)], threads=2, mode="x")
    assert (found.median_ms, found.p90_ms, found.p95_ms, found.p99_ms) == (51, 91, 96, 100)
    assert (found.iqr_ms, found.mean_ms, found.min_ms) == (50, 51, 1)
    assert (found.runs, found.threads, found.mode) == (101, 2, "x")
    assert (found.device_median_ms, found.device_p90_ms, found.device_p99_ms) == (None, None, None)
    told = summarize([5.0, 6.0], threads=1, device_ms=[float(value) for value in range(1, 102)])
    assert (told.device_median_ms, told.device_p90_ms, told.device_p99_ms) == (51, 91, 100)
    assert told.median_ms == 5.5
    with pytest.raises(UsageError):
        summarize([], threads=1)


def test_warm_up_is_not_timed_and_the_first_run_is_kept_apart():
    calls = []

    def run():
        calls.append(1)
        time.sleep(0.05 if len(calls) == 1 else 0.001)

    found = measure(run, warmup=4, min_seconds=0, min_runs=10, threads=1)
    assert len(calls) == 14
    assert found.runs == 10
    assert ordered(found)
    assert found.min_ms >= 1
    assert found.first_ms >= 50 > 0
    assert found.load_ms is None


def test_a_slow_run_ends_at_the_largest_time():
    found = measure(lambda: time.sleep(0.02), warmup=1, min_seconds=10, min_runs=1000, max_seconds=0.05)
    assert 1 <= found.runs <= 10


def test_two_runners_side_by_side():
    found = compare_latency(
        {"slow": spec("sleeper", seconds=0.02), "fast": spec("sleeper", seconds=0.002)},
        rounds=3,
        round_seconds=0.02,
        starts=2,
        warmup=1,
    )
    slow, fast = found.latencies["slow"], found.latencies["fast"]
    for latency in (slow, fast):
        assert ordered(latency)
        assert latency.load_ms == 12.5
        assert latency.first_ms > latency.min_ms  # the first run sleeps five times as long
        assert latency.peak_rss_bytes > 2**20
        assert latency.batch == 1
    assert slow.min_ms >= 20
    assert slow.runs >= 9
    assert len(found.medians["slow"]) == 3
    speedup = found.speedup("fast", over="slow")
    assert speedup.low <= speedup.high
    assert speedup.ratio == slow.median_ms / fast.median_ms
    assert speedup.ratio > 1
    assert found.environment["usable_cpus"] >= 1
    assert slow.device_median_ms is None


def test_the_time_of_an_accelerator_is_kept_apart():
    found = compare_latency(
        {"gpu": spec("accelerated", seconds=0.01)}, rounds=2, round_seconds=0.0, round_runs=4, starts=1, warmup=3
    )
    gpu = found.latencies["gpu"]
    # The fake counts its runs, from the one at loading: 2 rounds of 3 untimed and 4 timed ones follow.
    assert gpu.runs == 8
    assert gpu.device_median_ms == np.median([5, 6, 7, 8, 12, 13, 14, 15])
    assert gpu.median_ms >= 10


def test_memory_is_that_of_the_child_alone():
    ballast = np.ones(300 * 2**20, np.uint8)  # in this process: a child must not inherit it
    found = compare_latency({"hungry": spec("hungry")}, rounds=1, round_seconds=0, round_runs=1, starts=1)
    assert ballast[-1] == 1
    latency = found.latencies["hungry"]
    assert 60 * 2**20 < latency.added_rss_bytes < 120 * 2**20
    assert latency.peak_rss_bytes < 290 * 2**20
    assert latency.load_ms >= 0
    assert peak_rss_bytes() > 300 * 2**20


def test_a_runner_that_cannot_be_opened_is_named():
    with pytest.raises(EngineError, match="'bad' cannot be measured: this engine cannot be loaded"):
        compare_latency({"bad": spec("broken")}, rounds=1, starts=1)


def test_a_process_that_dies_is_reported_with_its_last_words():
    with pytest.raises(EngineError, match="ended with code 7: illegal something"):
        compare_latency({"good": spec("sleeper", seconds=0.001), "bad": spec("crashing")}, rounds=1, starts=1)


def test_nothing_to_measure_is_refused():
    with pytest.raises(UsageError):
        compare_latency({})


def test_machine_info_is_json_and_names_the_processor():
    import json

    info = machine_info()
    json.dumps(info, allow_nan=False)
    assert info["cpu"]
    assert info["memory_bytes"] > 2**28
