"""What an attempt begins with: where rank 0 lets all ranks continue, and the state there."""
