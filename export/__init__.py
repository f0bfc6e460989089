"""Bytes in, bytes out: checkpoint readers and writers, metadata, reports."""
