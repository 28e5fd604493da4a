"""Memory, time and ranked layouts of a run before it starts. Pure functions: no torch, no devices."""
