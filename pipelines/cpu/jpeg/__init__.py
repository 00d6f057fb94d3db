"""Decode JPEG files and check their headers."""
