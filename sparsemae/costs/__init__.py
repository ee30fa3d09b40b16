"""What a job costs before it runs: multiply-adds, memory, hours."""
