"""Passes, one file each; discovery lists this folder."""
