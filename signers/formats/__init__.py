"""Bytes only: pure functions that read and write artifact formats. No keys, no I/O of their own."""
