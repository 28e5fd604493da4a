"""Where the project meets the machine: devices, process groups, launching, and megatron-core on CPU."""
