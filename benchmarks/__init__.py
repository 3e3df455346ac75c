"""Measures the ops against the limits of the machine and against the best others. ``python -m benchmarks --help``"""
