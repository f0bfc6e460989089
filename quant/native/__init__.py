"""C for the CPU, compiled by the system's compiler at first use; `compiler.library()` loads it."""
