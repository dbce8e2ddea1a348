"""Benchmarks behind one small face; MM-RLHF-RewardBench, its rewards, statistics, reports and figures."""
