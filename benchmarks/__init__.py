"""Speed and memory, ours and other libraries', timed in turn in one process."""
