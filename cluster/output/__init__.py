"""What a command prints: progress, results, and the kept log of a job."""
