"""Measurements; each file without an underscore is a script (`./dev bench`), and docs/benchmarks.md says what it prints."""
