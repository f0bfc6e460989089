"""Public names of fewbit."""
