"""Who is measured: one module for each library, run by `serve` in a process and a Python of its own."""
