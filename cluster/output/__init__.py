"""The output of commands: progress, results, and the kept log of a job."""
